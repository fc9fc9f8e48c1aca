"""A CLIP and a tiny speech encoder for the tests of what uses one."""

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
def clip_folder(tmp_path_factory) -> Path:
    """A random CLIP of two narrow towers with a tokeniser of letters, as ``save_pretrained`` writes it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    ends = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    text = {**tower, **ends, "vocab_size": len(vocabulary), "max_position_embeddings": 12}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(vocabulary)}, [], model_max_length=12)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def speech_backbone(tmp_path_factory) -> str:
    return write_encoder(tmp_path_factory.mktemp("speech") / "encoder.safetensors", ["sil", "m", "h"])


@pytest.fixture(scope="session")
def speech_backbone_without_classes(tmp_path_factory) -> str:
    return write_encoder(tmp_path_factory.mktemp("speech") / "encoder.safetensors", [])
