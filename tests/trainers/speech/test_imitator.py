import math

import pytest
import pytorch_lightning as pl
import torch

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers import backbones
from trainers.nets.speech_encoder import SpeechEncoder
from trainers.speech.imitator import Imitator, VisemeTransformer, closure_weights
from trainers.tasks import load_system


def system(encoder: str, **changes) -> Imitator:
    torch.manual_seed(0)
    settings = {"num_vertices": 12, "subjects": ["anna", "bert"], "encoder": encoder, "dim": 16, "unit": 0.01}
    return Imitator(**{**settings, **changes})


def moving(model: Imitator) -> Imitator:
    torch.nn.init.normal_(model.motion.last.weight, std=0.1)
    return model.eval()


def batch_of(root, split: str = "train", size: int = 6) -> SpeechBatch:
    return next(iter(SpeechDataModule(str(root), batch_size=size).loader(split)))


def fit(model: Imitator, root, folder, epochs: int) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, limit_val_batches=0, log_every_n_steps=1, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=SpeechDataModule(str(root), batch_size=3))
    return trainer


def test_cached_decoding_equals_the_whole_past_at_every_step() -> None:
    torch.manual_seed(0)
    network = VisemeTransformer(audio_dim=6, dim=8, heads=2).double().eval()
    speech = torch.randn(2, 7, 6).double()
    memory, position = network.audio_projection(speech), torch.tensor([0.0, 1.0] * 4).double()
    tokens = torch.zeros(2, 1, 8).double()
    for t in range(1, 8):
        others = ~torch.eye(7, dtype=torch.bool)[:t]
        future = torch.triu(torch.ones(t, t, dtype=torch.bool), diagonal=1)
        visemes = network.layer(tokens + position, memory, tgt_mask=future, memory_mask=others)
        tokens = torch.cat([tokens, visemes[:, -1:]], dim=1)
    torch.testing.assert_close(network(speech), visemes)


def test_visemes_know_no_style(talking_root, speech_backbone) -> None:
    model, batch = moving(system(speech_backbone)), batch_of(talking_root, size=1)
    visemes, vertices = model.hear(batch), model.animate(batch)
    batch.subject_index = 1 - batch.subject_index
    assert torch.equal(model.hear(batch), visemes)
    assert not torch.equal(model.animate(batch), vertices)


def clips(phonemes: list, frames: int = 10) -> SpeechBatch:
    """One clip for each list of phonemes, ten frames a second."""
    count = len(phonemes)
    return SpeechBatch(
        key=[f"clip-{i}" for i in range(count)], audio=torch.zeros(count, 1600 * frames),
        audio_lengths=torch.tensor([1600 * frames] * count), vertices=torch.zeros(count, frames, 12, 3),
        lengths=torch.tensor([frames] * count), template=torch.zeros(count, 12, 3), subject=["anna"] * count,
        subject_index=torch.zeros(count, dtype=torch.int64), emotion=torch.zeros(count, dtype=torch.int64),
        intensity=torch.zeros(count, dtype=torch.int64), weights=torch.zeros(count, frames, 0),
        transcript=[""] * count, words=[[]] * count, phonemes=phonemes,
    )  # fmt: skip


def test_closure_weights_are_one_in_a_bilabial_and_fall_off_as_a_bell() -> None:
    batch = clips([[("a", 0.0, 0.4), ("B", 0.4, 0.6), ("o", 0.6, 1.0)], [("a", 0.0, 1.0)]])
    weights = closure_weights(batch, width=0.1)
    bell = [math.exp(-0.5 * (d / 0.1) ** 2) for d in (0.35, 0.25, 0.15, 0.05, 0, 0, 0.05, 0.15, 0.25, 0.35)]
    torch.testing.assert_close(weights[0], torch.tensor(bell))
    assert weights[1].tolist() == [0.0] * 10
    with pytest.raises(UserError, match="clip 'clip-1': no phoneme times"):
        closure_weights(clips([[("m", 0.0, 0.1)], []]), width=0.1)


def test_losses_by_hand(speech_backbone) -> None:
    model = system(speech_backbone, num_vertices=2, unit=1.0, velocity_weight=2.0, closure_weight=4.0, lip_weight=0.5)
    model.lips = torch.tensor([1])
    batch = clips([[("b", 0.1, 0.2)]], frames=3)
    batch.lengths = torch.tensor([2])
    batch.audio_lengths = torch.tensor([3200])
    batch.template = torch.ones(1, 2, 3)
    batch.vertices = torch.ones(1, 3, 2, 3)
    offsets = torch.tensor([[[6.0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 12.0], [99.0] * 6]])
    terms = model.losses(offsets, batch)
    assert terms["reconstruction"] == (36 / 6 + 144 / 6) / 2
    assert terms["velocity"] == 2 * (36 + 144) / 6
    torch.testing.assert_close(terms["closure"], torch.tensor(4 * (36 / 6 * math.exp(-0.5) + 144 / 6) / 2))
    assert terms["lips"] == 0.5 * (144 / 6) / 2


def test_batch_gives_what_its_clips_give_alone(talking_root, speech_backbone) -> None:
    model, batch = moving(system(speech_backbone, lip_weight=0.5)), batch_of(talking_root)
    model.lips = torch.tensor([0, 1, 2])
    assert len(set(batch.lengths.tolist())) > 1
    together = model.animate(batch)
    sums = {"reconstruction": 0.0, "velocity": 0.0, "closure": 0.0, "lips": 0.0}
    for i in range(len(batch)):
        clip = batch.clip(i)
        torch.testing.assert_close(together[i, : batch.lengths[i]], model.animate(clip)[0], rtol=0, atol=1e-6)
        terms = model.losses(model.motion(model.hear(clip), model.style(clip)), clip)
        for name, value in terms.items():
            sums[name] = sums[name] + value * (batch.lengths[i] - int(name == "velocity"))
    frames = batch.lengths.sum()
    terms = model.losses(model.motion(model.hear(batch), model.style(batch)), batch)
    assert terms.keys() == sums.keys()
    for name, value in terms.items():
        torch.testing.assert_close(value, sums[name] / (frames - len(batch) * int(name == "velocity")))


def test_prediction_does_not_see_the_truth_and_takes_a_minute(talking_root, speech_backbone) -> None:
    model, batch = moving(system(speech_backbone)), batch_of(talking_root, size=1)
    before = model.animate(batch)
    batch.vertices = torch.randn_like(batch.vertices)
    assert torch.equal(model.animate(batch), before)
    batch.audio, batch.audio_lengths = torch.randn(1, 960_000), torch.tensor([960_000])
    batch.vertices, batch.lengths = torch.zeros(1, 1800, 12, 3), torch.tensor([1800])
    assert model.animate(batch).isfinite().all()


def test_adaptation_learns_a_style_and_leaves_the_original_alone(talking_root, speech_backbone) -> None:
    model = moving(system(speech_backbone, train_encoder="none", adaptation_steps=[40, 20]))
    reference = batch_of(talking_root, size=3)
    reference.subject = ["somebody"] * 3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # The person speaks as the network does with a style that nobody of the training has.
    visemes = model.hear(reference)
    with torch.no_grad():
        offsets = model.motion(visemes, torch.tensor([[3.0, -2.0]]).expand(3, 2))
    reference.vertices = reference.template[:, None] + 0.01 * offsets.unflatten(-1, (12, 3))

    def error(system: Imitator) -> float:
        return (system.animate(reference) - reference.vertices)[reference.frame_mask].norm(dim=-1).mean().item()

    adapted = model.adapt(reference)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    changed = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"motion.style.weight", "motion.last.weight", "motion.last.bias"}
    assert error(adapted) < 0.5 * error(model)

    vertices = adapted.animate(reference)
    reference.subject_index = 1 - reference.subject_index
    assert torch.equal(adapted.animate(reference), vertices)  # one style, whoever is named

    style_alone = moving(system(speech_backbone, train_encoder="none", adaptation_steps=[40, 0])).adapt(reference)
    changed = {name for name, value in style_alone.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"motion.style.weight"}


def test_adaptation_wants_one_person_and_a_second(talking_root, speech_backbone) -> None:
    model = system(speech_backbone)
    batch = batch_of(talking_root)
    with pytest.raises(UserError, match="clips of anna, bert; expected one person's"):
        model.adapt(batch)
    with pytest.raises(UserError, match=r"reference: lasts 0\.\d+ s, expected at least 1 s"):
        model.adapt(batch.clip(0))
    with pytest.raises(UserError, match="adaptation_steps"):
        system(speech_backbone, adaptation_steps=[5])


def test_parameter_count_is_that_of_the_layers(monkeypatch) -> None:
    monkeypatch.setattr(backbones, "load", lambda spec, kind: SpeechEncoder({}, ["a", "b"]).requires_grad_(False))
    with torch.device("meta"):
        model = Imitator(5023, list("abcdefgh"), "hub:facebook/wav2vec2-base-960h")
    attention = 4 * (64 * 64 + 64)
    layer = 2 * attention + (64 * 128 + 128) + (128 * 64 + 64) + 3 * 2 * 64
    motion = 8 * 64 + 4 * (64 * 64 + 64) + (64 * 15069 + 15069)
    assert sum(p.numel() for p in model.parameters()) == 94_371_712 + (768 * 64 + 64) + layer + motion


def test_it_learns_and_its_checkpoint_speaks_alike(talking_root, speech_backbone, tmp_path) -> None:
    model = system(speech_backbone, train_encoder="none", lr=0.01, dropout=0.0)
    trainer = fit(model, talking_root, tmp_path, epochs=60)
    batch = batch_of(talking_root)
    real = batch.frame_mask
    error = (model.eval().animate(batch) - batch.vertices)[real].square().mean()
    neutral = (batch.template[:, None] - batch.vertices)[real].square().mean()
    assert error < 0.3 * neutral
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert torch.equal(load_system(tmp_path / "model.ckpt").animate(batch), model.animate(batch))
