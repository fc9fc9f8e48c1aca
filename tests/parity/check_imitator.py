"""Imitator: predictions of four decoder variants, losses with gradients, errors in mm, adaptation on cached visemes."""

import pytest
import torch
from goldens import Golden
from torch import Tensor

from datamodules.batches import SpeechBatch
from metrics.motion import lip_vertex_error, mean_vertex_error
from trainers import backbones
from trainers.nets.speech_encoder import FEATURE_RATE, SpeechEncoder
from trainers.speech.imitator import Imitator, frame_errors, from_official, official_name

FPS = 30
VARIANTS = {
    "add5": {},
    "cat5": {"style_mode": "concat"},
    "add1": {"decoder_layers": 1},
    "grow3": {"decoder_layers": 3, "growing": True},
}


def build(golden: Golden, variant: str) -> Imitator:
    """One of the golden's networks in evaluation mode."""
    config = golden.config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "load", lambda spec, kind: SpeechEncoder(config["wav2vec2"]))
        system = Imitator(
            num_vertices=config["vertice_dim"] // 3,
            subjects=[str(i) for i in range(config["num_identity_classes"])],
            encoder="path:golden",
            dim=config["feature_dim"],
            heads=config["n_head"],
            **VARIANTS[variant],
        )
    system.load_state_dict(from_official(golden.weights_under(f"{variant}.")))
    return system.eval()


def batch(golden: Golden, vertices: Tensor) -> SpeechBatch:
    """A batch of one clip; ``vertices`` are (1, T, V·3)."""
    audio = golden.io["audio"]
    return SpeechBatch(
        key=["clip"],
        audio=audio,
        audio_lengths=torch.tensor([audio.shape[1]]),
        vertices=vertices.unflatten(-1, (-1, 3)),
        lengths=torch.tensor([vertices.shape[1]]),
        template=golden.io["template"].unflatten(-1, (-1, 3)),
        subject=["anyone"],
        subject_index=golden.io["one_hot"].argmax(-1),
        emotion=torch.zeros(1, dtype=torch.int64),
        intensity=torch.zeros(1, dtype=torch.int64),
        weights=torch.zeros(1, vertices.shape[1], 0),
        transcript=[""],
        words=[[]],
        phonemes=[[]],
    )


def check(golden: Golden) -> None:
    io = golden.io
    clip = batch(golden, io["vertice"])
    target = io["vertice"]

    def forward(system: Imitator, style: Tensor) -> tuple[Tensor, Tensor]:
        visemes = system.hear(clip)
        return visemes, io["template"][:, None] + system.motion(visemes, style)

    for variant in VARIANTS:
        system = build(golden, variant)
        (features,) = system.encoder.convolve(clip.audio, clip.audio_lengths)
        frames = int(len(features) / FEATURE_RATE * FPS)
        golden.close(
            f"{variant}_predict", system.animate(batch(golden, torch.zeros(1, frames, target.shape[-1]))).flatten(2)
        )
        visemes, predicted = forward(system, io["one_hot"])
        golden.close(f"{variant}_viseme_feats", visemes)
        golden.close(f"{variant}_forward", predicted)
        golden.close(f"{variant}_loss", frame_errors(predicted - target).mean())

    system = build(golden, "add5")
    golden.close("audio_enc", system.encode(clip)[0])
    predicted = forward(system, io["one_hot"])[1]
    weights = io["mbp_frame_weights"][None, : predicted.shape[1]]
    errors, velocity = frame_errors(predicted - target), frame_errors((predicted - target).diff(dim=1)).mean()
    # Forward velocity, in the second set, has the same value and another gradient; no official configuration uses it.
    for name, closure, factor in (("base", 5.0, 10.0), ("all", 2.0, 3.0)):
        golden.close(f"{name}_mbp", (closure * weights * errors).mean())
        golden.close(f"{name}_velocity", velocity)
        golden.close(f"{name}_velocity_weighted", factor * velocity)

    meshes, truth = (vertices[0].unflatten(-1, (-1, 3)) for vertices in (predicted, target))
    lips = io["lip_mask"][0].unflatten(-1, (-1, 3))[:, 0].nonzero()[:, 0]
    golden.close("base_error_mm", 1e3 * mean_vertex_error(meshes, truth).mean())
    golden.close("base_lip_max_l2_mm", 1e3 * lip_vertex_error(meshes, truth, lips, "l2").mean())
    on_lips = mean_vertex_error(meshes[:, lips], truth[:, lips]).mean()
    golden.close("base_error_lip_mm", 1e3 * on_lips * len(lips) / meshes.shape[1])
    every = torch.arange(meshes.shape[1])
    golden.close("base_max_mm", 1e3 * lip_vertex_error(meshes, truth, every, "l2").max())

    system.lips, system.closure_weight, system.lip_weight = lips, 0.0, 0.4
    terms = system.losses(predicted - io["template"][:, None], clip)
    golden.close("base_velocity_weighted", terms["velocity"])
    golden.close("all_lip_weighted", terms["lips"])

    loss = terms["reconstruction"] + terms["velocity"] + (5.0 * weights * errors).mean()
    golden.close("base_net_loss", loss)
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in system.named_parameters()}
    for recorded in (key for key in io if key.startswith("base_grad.")):
        golden.close_gradient(recorded, gradients[official_name(recorded.removeprefix("base_grad."))])

    system.zero_grad()
    with torch.no_grad():
        visemes = system.hear(clip)
    second = io["template"][:, None] + system.motion(visemes, io["style_weights2"])
    golden.close("style_second_out", second)
    loss = frame_errors(second - target).mean()
    golden.close("style_second_loss", loss)
    loss.backward()
    golden.close("style_audio_map_has_grad", system.visemes.audio_projection.weight.grad is not None)
    golden.close_gradient("style_grad.obj_vector.weight", system.motion.style.weight.grad)
