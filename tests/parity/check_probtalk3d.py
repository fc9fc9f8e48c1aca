"""ProbTalk3D: encoder, quantiser and its draws, decoder, predictor, both stages' losses and gradients."""

import pytest
import torch
from goldens import Golden
from torch import Tensor, nn

from datamodules.batches import SpeechBatch
from trainers import backbones, tasks
from trainers.nets.rig import Rig
from trainers.speech import probtalk3d
from trainers.speech.probtalk3d import ProbTalk3D, from_official, official_name


class Speech(nn.Module):
    """Stands in for the speech encoder: the golden records its states."""

    classifier = None

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def train_part(self, part: str) -> None:
        pass


def build(golden: Golden) -> ProbTalk3D:
    """The golden's network in evaluation mode."""
    config = golden.config
    subjects, emotions, _ = config["one_hot_dim"]
    controls = [f"exp_{i}" for i in range(config["nfeats"] - 3)] + [f"jaw_{i}" for i in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "load", lambda spec, kind: Speech(config["audio_dim"] // 2))
        patch.setattr(tasks, "load_rig", lambda spec: Rig(controls))
        system = ProbTalk3D(
            rig="names:golden",
            num_vertices=0,
            subjects=[str(i) for i in range(subjects)],
            emotions=[str(i) for i in range(emotions)],
            encoder="path:golden",
            dim=config["latent_dim"],
            heads=config["num_heads"],
            hidden=config["intermediate_size"],
            prior_layers=config["num_layers"],
            predictor_layers=config["num_layers"],
            codes=config["n_embed"],
            code_dim=config["zquant_dim"],
            beta=config["beta"],
            temperature=config["temperature"],
        )
    official = {key.replace("prior.", "motion_prior.", 1): value for key, value in golden.weights.items()}
    system.load_state_dict(from_official({key.removeprefix("pred."): value for key, value in official.items()}))
    return system.eval()


def check(golden: Golden) -> None:
    io, config = golden.io, golden.config
    system = build(golden)
    prior, bottleneck = system.prior, system.prior.bottleneck
    motion = io["motion"]
    lengths = torch.tensor([motion.shape[1]])

    encoded = prior.encoder(motion, lengths)
    golden.close("encoder_out", encoded)
    rows = bottleneck.rows(encoded, lengths)
    golden.close("quant_rows", rows)
    quantised, loss, numbers = bottleneck.codebook.nearest(rows)
    golden.close("quant", bottleneck.frames(quantised, lengths))
    golden.close("quant_loss", loss)
    golden.close("quant_indices", numbers[:, None])
    usage = torch.bincount(numbers, minlength=config["n_embed"]) / len(numbers)
    golden.close("quant_perplexity", torch.exp(-(usage * (usage + 1e-10).log()).sum()))
    decoded = prior.decoder(bottleneck.frames(quantised, lengths), lengths)
    golden.close("decoder_out", decoded)
    golden.close("forward", decoded)

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    golden.close("sample_probabilities_t0.2", bottleneck.codebook.probabilities(rows, 0.2))
    golden.close("sample_indices_seed9", bottleneck.codebook.draw(rows, 0.2, seeded(9))[:, None])
    golden.close("sample_indices_k3_t0.5_seed9", bottleneck.codebook.draw(rows, 0.5, seeded(9), number=3)[:, None])
    golden.close("sample_quant", bottleneck.draw(encoded, lengths, 0.2, [seeded(9)]))

    def check_terms(name: str, terms: dict[str, Tensor], weights: tuple[float, ...], labels: tuple[str, ...]) -> None:
        for label, term, weight in zip(labels, terms.values(), weights, strict=True):
            golden.close(f"{name}_loss_{label}", term / weight)
        total = torch.stack(list(terms.values())).sum()
        golden.close(f"{name}_loss", total)
        system.zero_grad()
        total.backward()

    def check_gradients(prefix: str, part: str) -> None:
        gradients = {key: parameter.grad for key, parameter in system.named_parameters()}
        for recorded in (key for key in io if key.startswith(prefix)):
            golden.close_gradient(recorded, gradients[official_name(part + recorded.removeprefix(prefix))])

    terms = system.prior_losses(motion, lengths)
    check_terms("prior", terms, probtalk3d.PRIOR_WEIGHTS["vq"], ("quant", "recons_exp", "recons_jaw"))
    check_gradients("prior_grad.", "motion_prior.")

    subjects, emotions, intensities = io["style_one_hot"].split(config["one_hot_dim"], dim=1)
    features = io["audio_features"]
    count = features.shape[1] // 2 * 2
    batch = SpeechBatch(
        key=["clip"],
        audio=torch.zeros(1, 1),
        audio_lengths=torch.tensor([1]),
        vertices=torch.zeros(1, motion.shape[1], 0, 3),
        lengths=lengths,
        template=torch.zeros(1, 0, 3),
        subject=["anyone"],
        subject_index=subjects.argmax(1),
        emotion=emotions.argmax(1),
        intensity=intensities.argmax(1),
        weights=motion,
        transcript=[""],
        words=[[]],
        phonemes=[[]],
    )
    system.encode = lambda batch: (features[:, :count], torch.tensor([count]))
    states, lengths = system.hear(batch)
    golden.close("predictor_out", system.predict(states, lengths, batch))
    system.temperature = 0.0
    golden.close("pred_motion", system.control(batch))
    system.temperature = config["temperature"]
    system.generators = lambda batch: [seeded(5)]
    golden.close("pred_motion_sampled_seed5", system.control(batch))
    rows = bottleneck.rows(io["predictor_out"], lengths)
    golden.close("pred_sampled_indices_seed5", bottleneck.codebook.draw(rows, system.temperature, seeded(5))[:, None])
    # Where both latents hold the same code they differ by rounding alone, whose sign is the official gradient there.
    # So values as recorded, with the gradient of ours.
    pinned = {system.predictor: io["predictor_out"], prior.encoder: io["encoder_out"]}
    for module in pinned:
        module.register_forward_hook(lambda module, inputs, output: pinned[module] + (output - output.detach()))
    terms = system.predictor_losses(batch)
    check_terms("pred", terms, probtalk3d.PREDICTOR_WEIGHTS, ("latent_manifold", "recons_exp", "recons_jaw"))
    check_gradients("pred_grad.", "")
