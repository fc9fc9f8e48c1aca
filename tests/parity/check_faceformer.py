"""FaceFormer, VOCASET and BIWI modes: speech states stage by stage, masks, predictions, both losses, gradients."""

import pytest
import torch
from goldens import Golden
from torch import Tensor

from datamodules.batches import SpeechBatch
from trainers import backbones
from trainers.nets.cached_decoder import alignment_mask, causal_bias, periodic_positions
from trainers.nets.speech_encoder import FEATURE_RATE, SpeechEncoder
from trainers.speech.faceformer import FaceFormer, from_official, official_name

MODES = {"vocaset": ("interpolate", 30), "BIWI": ("pairs", 25)}


def build(golden: Golden) -> FaceFormer:
    """The golden's network in evaluation mode; trained as the official script trains it."""
    config = golden.config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "load", lambda spec, kind: SpeechEncoder(config["wav2vec2"]))
        system = FaceFormer(
            num_vertices=config["vertice_dim"] // 3,
            subjects=[str(i) for i in range(config["n_train_subjects"])],
            encoder="path:golden",
            alignment=MODES[config["dataset"]][0],
            dim=config["feature_dim"],
            period=config["period"],
            heads=config["n_head"],
        )
    system.load_state_dict(from_official(golden.weights))
    frozen = {key for key, parameter in system.named_parameters() if not parameter.requires_grad}
    assert frozen == {official_name(key) for key in config["frozen_parameters"]}
    return system.eval()


def batch(golden: Golden, audio: Tensor, vertices: Tensor) -> SpeechBatch:
    """A batch of one clip; ``vertices`` are (1, T, V·3)."""
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
    io, config = golden.io, golden.config
    system = build(golden)
    encoder, per_frame = system.encoder, system.decoder.audio_per_frame

    golden.close(
        "ppe_table", periodic_positions(io["ppe_table"].shape[1], config["feature_dim"], config["period"])[None]
    )
    longest = next(name for name in io if name.startswith("biased_mask_"))
    golden.close(longest, causal_bias(config["n_head"], io[longest].shape[1], config["period"]))
    golden.close("memory_mask", alignment_mask(len(io["memory_mask"]), per_frame))

    def check_prediction(name: str, audio: Tensor) -> None:
        (features,) = encoder.convolve(audio, torch.tensor([audio.shape[1]]))
        frames = int(len(features) / FEATURE_RATE * MODES[config["dataset"]][1])
        clip = batch(golden, audio, torch.zeros(1, frames, config["vertice_dim"]))
        golden.close(name, system.animate(clip).flatten(2))

    def check_audio(name: str, audio: Tensor, frames: int) -> None:
        clip = batch(golden, audio, torch.zeros(1, frames, config["vertice_dim"]))
        features = {}

        def record(module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
            features["resampled"], features["proj"] = inputs[0], output[0].clone()

        with encoder.network.feature_projection.register_forward_hook(record):
            features["enc"], _ = system.hear(clip)
        for stage, actual in features.items():
            if f"{name}_audio_{stage}" in io:
                golden.close(f"{name}_audio_{stage}", actual)

    def check_loss(name: str, mode: str, clip: SpeechBatch) -> None:
        system.zero_grad()
        system.past = {"tf": "true", "ar": "predicted"}[mode]
        speech, frames = system.hear(clip)
        loss = system.loss(speech, frames, clip)
        golden.close(f"{name}_{mode}_loss", loss)
        loss.backward()
        gradients = {key: parameter.grad for key, parameter in system.named_parameters()}
        prefix = f"{name}_{mode}_grad."
        for recorded in (key for key in io if key.startswith(prefix)):
            golden.close_gradient(recorded, gradients[official_name(recorded.removeprefix(prefix))])

    golden.close("predict_audio_conv", encoder.convolve(io["audio"], torch.tensor([io["audio"].shape[1]]))[0][None])
    check_audio("predict", io["audio"], io["predict"].shape[1])
    check_prediction("predict", io["audio"])
    check_prediction("predict_long", io["audio_long"])
    for name in ("same", "short", "long"):
        clip = batch(golden, io["audio"], io[f"{name}_vertice"])
        check_audio(name, io["audio"], clip.vertices.shape[1])
        check_loss(name, "tf", clip)
        check_loss(name, "ar", clip)
