"""A tiny speech encoder, written as a backbone file."""

from pathlib import Path

import pytest
import torch

from trainers import backbones
from trainers.nets.speech_encoder import SpeechEncoder

CONFIG = {
    "conv_dim": [8] * 7,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
}


def write_encoder(path: Path, classes: list[str]) -> str:
    torch.manual_seed(0)
    init = {"config": CONFIG, "classes": classes}
    backbones.save(SpeechEncoder(**init), path, "speech", init, {})
    return f"path:{path}"


@pytest.fixture(scope="session")
def speech_backbone(tmp_path_factory) -> str:
    return write_encoder(tmp_path_factory.mktemp("speech") / "encoder.safetensors", ["sil", "m", "h"])


@pytest.fixture(scope="session")
def speech_backbone_without_classes(tmp_path_factory) -> str:
    return write_encoder(tmp_path_factory.mktemp("speech") / "encoder.safetensors", [])
