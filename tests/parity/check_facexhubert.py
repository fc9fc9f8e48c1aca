"""FaceXHuBERT: HuBERT's states paired and resampled, predictions of both emotions, losses, gradients at two rates."""

import re

import pytest
import torch
from goldens import Golden
from torch import Tensor

from datamodules.batches import SpeechBatch
from trainers import backbones
from trainers.nets.speech_encoder import SpeechEncoder
from trainers.speech.facexhubert import FaceXHuBERT, from_official, official_name

ALIGNMENTS = {"25": "pair_states", "30": "resample_pairs"}


def build(golden: Golden, alignment: str) -> FaceXHuBERT:
    """The golden's network in evaluation mode; trained as the official script trains it."""
    config = golden.config
    with pytest.MonkeyPatch.context() as patch:
        hubert = {**config["hubert"], "model_type": "hubert"}
        patch.setattr(backbones, "load", lambda spec, kind: SpeechEncoder(hubert))
        system = FaceXHuBERT(
            num_vertices=config["vertice_dim"] // 3,
            subjects=[str(i) for i in range(config["n_train_subjects"])],
            encoder="path:golden",
            emotions=["neutral", "emotional"],
            alignment=alignment,
            dim=config["feature_dim"],
            layers=config["gru_layers"],
            dropout=config["gru_dropout"],
        )
    system.load_state_dict(from_official(golden.weights))
    frozen = {key for key, parameter in system.named_parameters() if not parameter.requires_grad}
    assert frozen == {official_name(key) for key in config["frozen_parameters"]}
    return system.eval()


def batch(golden: Golden, audio: Tensor, vertices: Tensor, emotion: int) -> SpeechBatch:
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
        emotion=torch.tensor([emotion]),
        intensity=torch.zeros(1, dtype=torch.int64),
        weights=torch.zeros(1, vertices.shape[1], 0),
        transcript=[""],
        words=[[]],
        phonemes=[[]],
    )


def check(golden: Golden) -> None:
    io = golden.io
    pairs = build(golden, "pair_states")
    states, _ = pairs.encoder(io["audio"], torch.tensor([io["audio"].shape[1]]))
    golden.close("hubert_last_hidden", states)
    for emotion in (0, 1):
        name = f"predict_emo{emotion}"
        clip = batch(golden, io["audio"], torch.zeros_like(io[name]), emotion)
        golden.close(f"emo_one_hot_{emotion}", pairs.emotional(clip))
        golden.close(name, pairs.animate(clip).flatten(2))

    for fps, alignment in ALIGNMENTS.items():
        system = build(golden, alignment)
        audio = io["audio" if fps == "25" else "audio30"]
        for name in sorted(key.removesuffix("_vertice") for key in io if re.fullmatch(rf"fps{fps}_\w+_vertice", key)):
            system.zero_grad()
            clip = batch(golden, audio, io[f"{name}_vertice"], emotion=1)
            speech, frames = system.hear(clip)
            golden.close(f"{name}_adjusted_audio", speech)
            loss = system.loss(speech, frames, clip)
            golden.close(f"{name}_loss", loss)
            loss.backward()
            gradients = {key: parameter.grad for key, parameter in system.named_parameters()}
            prefix = f"{name}_grad."
            for recorded in (key for key in io if key.startswith(prefix)):
                golden.close_gradient(recorded, gradients[official_name(recorded.removeprefix(prefix))])
