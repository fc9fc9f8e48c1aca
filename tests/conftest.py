"""Tiny data sets that take no synthesiser and no renderer: random values in the formats that facebench reads."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.numpy import save

from datamodules.demo.talking import named_regions
from datamodules.demo.visemes import EMOTIONS
from datamodules.head import Head
from datamodules.shards import Manifest, Sample, npy_bytes, write_atomic, write_shard
from trainers import backbones
from trainers.nets.face_encoders import AttributeClassifier, IdentityEncoder, PerceptualDistance
from trainers.nets.inverter import InversionEncoder
from trainers.nets.stylegan2 import Generator

FPS, RATE, VERTICES = 30, 16_000, 12
ATTRIBUTES = ["Eyeglasses", "Male", "Young"]
SUBJECTS = ["anna", "bert", "carla", "dora"]


def write_data_set(root: Path, kind: str, fields: dict, splits: dict[str, list[list[Sample]]], files=None) -> Path:
    """Writes shards and a manifest as a build would."""
    files = files or {}
    for name, contents in files.items():
        write_atomic(root / name, contents)
    root.mkdir(parents=True, exist_ok=True)
    shards = [
        vars(write_shard(root / f"{split}-{i:06d}.tar", split, samples))
        for split, groups in splits.items()
        for i, samples in enumerate(groups)
    ]
    checksums = {name: hashlib.sha256(contents).hexdigest() for name, contents in files.items()}
    raw = {"schema": 1, "kind": kind, "name": "test data", "fields": fields, "files": checksums, "shards": shards}
    write_atomic(root / "manifest.json", json.dumps(raw).encode())
    Manifest.read(root, kind)
    return root


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def face_sample(number: int, size: int = 32) -> Sample:
    """A flat image whose colour is its number, and whose attributes are the number's bits."""
    labels = {
        "identity": number // 2,
        "age": 20.0 + number,
        "attributes": [number >> bit & 1 for bit in range(len(ATTRIBUTES))],
        "landmarks": [[1.0, 2.0]] * 68,
        "captions": [f"face {number}"],
    }
    members = {
        "png": png(np.full((size, size, 3), number, np.uint8)),
        "mask.png": png(np.zeros((size, size), np.uint8)),
        "json": json.dumps(labels).encode(),
    }
    return Sample(f"face-{number:03d}", 1, members)


def speech_sample(subject: str, number: int, frames: int, vertices: int = VERTICES) -> Sample:
    """A clip of ``frames`` frames whose mouth (vertices 0 and 1) opens with the loudness of a hum."""
    rng = np.random.default_rng(number)
    loudness = np.abs(np.sin(np.arange(frames) / 5 + number))
    offsets = np.zeros((frames, vertices, 3), np.float16)
    offsets[:, 0, 1], offsets[:, 1, 1] = 0.01 * loudness, -0.01 * loudness
    time = np.arange(frames * RATE // FPS) / RATE
    hum = 0.3 * np.interp(time, np.arange(frames) / FPS, loudness) * np.sin(2 * np.pi * 150 * time)
    buffer = io.BytesIO()
    soundfile.write(buffer, hum + 0.001 * rng.standard_normal(len(hum)), RATE, format="WAV", subtype="PCM_16")
    labels = {
        "subject": subject,
        "transcript": "a hum",
        "words": [["a", 0.0, 0.1], ["hum", 0.1, frames / FPS]],
        "phonemes": [["h", 0.0, 0.1], ["m", 0.1, frames / FPS]],
        "emotion": "neutral",
        "intensity": 0,
    }
    members = {
        "offsets.npy": npy_bytes(offsets),
        "wav": buffer.getvalue(),
        "json": json.dumps(labels).encode(),
        "weights.npy": npy_bytes(np.zeros((frames, 2), np.float16)),
    }
    return Sample(f"{subject}-{number:03d}", frames, members)


def build_faces(root: Path, size: int = 32) -> Path:
    identities = {"train": 9, "val": 2, "test": 4}
    fields = {"size": size, "attributes": ATTRIBUTES, "mask_classes": ["background"], "identities": identities}
    splits = {
        "train": [[face_sample(i, size) for i in range(0, 10)], [face_sample(i, size) for i in range(10, 17)]],
        "val": [[face_sample(i, size) for i in range(20, 24)]],
        "test": [[face_sample(i, size) for i in range(30, 38)]],
    }
    return write_data_set(root, "faces", fields, splits)


def build_talking(root: Path, vertices: int = VERTICES) -> Path:
    def clips(subjects: list[str], first: int) -> list[Sample]:
        return [
            speech_sample(subject, first + 10 * s + i, 15 + 4 * i, vertices)
            for s, subject in enumerate(subjects)
            for i in range(3)
        ]

    rng = np.random.default_rng(0)
    templates = {name: rng.normal(0, 0.05, (vertices, 3)).astype(np.float32) for name in SUBJECTS}
    regions = {
        "lips": np.array([0, 1, 2], np.int32),
        "upper_face": np.array([5, 6, 7], np.int32),
        "upper_lip_inner": np.array([0], np.int32),
        "lower_lip_inner": np.array([1], np.int32),
    }
    triangles = np.array([[i, i + 1, i + 2] for i in range(vertices - 2)], np.int32)
    fields = {
        "fps": FPS,
        "sample_rate": RATE,
        "unit": "metre",
        "topology": "test",
        "vertices": vertices,
        "subjects": SUBJECTS,
        "train_subjects": SUBJECTS[:2],
        "emotions": ["neutral"],
        "controls": ["open", "close"],
        "regions": list(regions),
    }
    splits = {"train": [clips(SUBJECTS[:2], 0)], "val": [clips(SUBJECTS[2:3], 30)], "test": [clips(SUBJECTS[3:], 60)]}
    files = {
        "templates.safetensors": save(templates),
        "topology.safetensors": save({"triangles": triangles, **regions}),
    }
    return write_data_set(root, "talking-heads", fields, splits, files)


@pytest.fixture(scope="session")
def write_data():
    """:func:`write_data_set`, for tests that make data of their own."""
    return write_data_set


@pytest.fixture(scope="session")
def faces_root(tmp_path_factory) -> Path:
    """17 train, 4 val and 8 test images of 32 pixels."""
    return build_faces(tmp_path_factory.mktemp("faces"))


@pytest.fixture(scope="session")
def talking_root(tmp_path_factory) -> Path:
    """Two training subjects, one for val and one for test, three clips each."""
    return build_talking(tmp_path_factory.mktemp("talking"))


HEAD_SUBJECTS = {"train": ["F1", "M1", "F2", "M2", "F3", "M3", "F4", "M4"], "val": ["F5"], "test": ["F6"]}


def head_sample(subject: str, number: int, frames: int) -> Sample:
    """A hum whose loudness opens the jaw, while the other controls move slowly and at random."""
    head, rng = Head.load(), np.random.default_rng(number)
    time = np.arange(frames) / FPS
    loudness = np.abs(np.sin(6 * time + number))
    weights = 0.15 * (1 + np.sin(3 * time[:, None] + rng.uniform(0, 6, len(head.units))))
    weights[:, head.units.index("jawOpen")] = loudness
    weights = weights.astype(np.float16)
    offsets = np.tensordot(weights.astype(np.float32), head.unit_deltas, axes=1)
    moments = np.arange(frames * RATE // FPS) / RATE
    hum = 0.3 * np.interp(moments, time, loudness) * np.sin(2 * np.pi * (120 + 10 * number) * moments)
    buffer = io.BytesIO()
    soundfile.write(buffer, hum + 0.01 * rng.standard_normal(len(hum)), RATE, format="WAV", subtype="PCM_16")
    half = round(frames / FPS / 2, 3)
    labels = {
        "subject": subject,
        "transcript": "Did Anna?",
        "words": [["Did", 0.0, half], ["Anna?", half, frames / FPS]],
        "phonemes": [["d", 0.0, half], ["m", half, frames / FPS]],
        "emotion": EMOTIONS[number % len(EMOTIONS)],
        "intensity": number % 3,
    }
    members = {
        "offsets.npy": npy_bytes(offsets.astype(np.float16)),
        "wav": buffer.getvalue(),
        "json": json.dumps(labels).encode(),
        "weights.npy": npy_bytes(weights),
        "pose.npy": npy_bytes(0.05 * np.sin(time[:, None] * [1.0, 2.0, 3.0] + number).astype(np.float32)),
    }
    return Sample(f"{subject}-{number:03d}", frames, members)


@pytest.fixture(scope="session")
def head_root(tmp_path_factory) -> Path:
    """Two clips of each of eight training subjects, two for val, four for test: one to two seconds each."""
    head = Head.load()
    numbers = iter(range(1000))

    def clips(subjects: list[str], each: int) -> list[Sample]:
        drawn = [(subject, next(numbers)) for subject in subjects for _ in range(each)]
        return [head_sample(subject, number, 30 + 6 * (number % 4)) for subject, number in drawn]

    everyone = [subject for subjects in HEAD_SUBJECTS.values() for subject in subjects]
    regions = named_regions(head)
    neutral = head.identity({})[: head.exterior]
    templates = {subject: (neutral * (1 + 0.01 * i)).astype(np.float32) for i, subject in enumerate(everyone)}
    fields = {
        "fps": FPS,
        "sample_rate": RATE,
        "unit": "metre",
        "topology": "demo-head",
        "vertices": head.exterior,
        "subjects": everyone,
        "train_subjects": HEAD_SUBJECTS["train"],
        "emotions": list(EMOTIONS),
        "intensities": [0.4, 0.7, 1.0],
        "controls": head.units,
        "regions": list(regions),
    }
    files = {
        "templates.safetensors": save(templates),
        "topology.safetensors": save({"triangles": head.triangles.astype(np.int32), **regions}),
    }
    each = {"train": 2, "val": 2, "test": 4}
    splits = {split: [clips(subjects, each[split])] for split, subjects in HEAD_SUBJECTS.items()}
    return write_data_set(tmp_path_factory.mktemp("head"), "talking-heads", fields, splits, files)


def prompt_sample(number: int, size: int = 32) -> Sample:
    """Even prompts are happy and smile, odd ones are sad and frown; a picture has three bands: the number's bits."""
    weights = np.zeros(len(Head.load().units), np.float32)
    moved = [("cheekSquintLeft", "mouthSmileLeft"), ("browInnerUp", "mouthFrownLeft")][number % 2]
    weights[[Head.load().units.index(name) for name in moved]] = 1, 0.5
    emotion = ["happy", "sad"][number % 2]
    labels = {
        "text": f"{emotion} prompt {number}",
        "emotion": emotion,
        "aus": {},
        "captions": [f"caption {number}"],
    }
    picture = np.zeros((size, size, 3), np.uint8)
    for bit in range(3):
        picture[bit * size // 3 : (bit + 1) * size // 3] = 255 * (number >> bit & 1)
    members = {
        "json": json.dumps(labels).encode(),
        "weights.npy": npy_bytes(weights),
        "png": png(picture),
    }
    return Sample(f"prompt-{number:03d}", 1, members)


@pytest.fixture(scope="session")
def prompts_root(tmp_path_factory) -> Path:
    """8 train, 2 val and 4 test prompts for the demo head, with pictures of 32 pixels."""
    fields = {"controls": Head.load().units, "emotions": ["happy", "sad"], "size": 32}
    numbers = {"train": range(8), "val": range(8, 10), "test": range(10, 14)}
    splits = {split: [[prompt_sample(i) for i in those]] for split, those in numbers.items()}
    return write_data_set(tmp_path_factory.mktemp("prompts"), "expression-prompts", fields, splits)


@pytest.fixture(scope="session")
def voca_config(talking_root, tmp_path_factory) -> Path:
    """A config that trains VOCA on the tiny talking heads in a second, with dropout-free but random batches."""
    import yaml

    from trainers.nets.speech_encoder import SpeechEncoder

    folder = tmp_path_factory.mktemp("voca")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_dim": [8] * 7,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    }
    init = {"config": sizes, "classes": ["sil", "m", "h"]}
    encoder = folder / "speech.safetensors"
    backbones.save(SpeechEncoder(**init), encoder, "speech", init, {})
    model = {"num_vertices": VERTICES, "subjects": SUBJECTS[:2], "encoder": f"path:{encoder}", "components": 4}
    config = {
        "model": {"class_path": "trainers.speech.voca.VOCA", "init_args": model},
        "data": {
            "class_path": "datamodules.speech.SpeechDataModule",
            "init_args": {"root": str(talking_root), "batch_size": 2},
        },
        "trainer": {"accelerator": "cpu", "max_epochs": 3, "enable_progress_bar": False, "log_every_n_steps": 1},
    }
    path = folder / "voca.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


# Tiny random backbones in files, for the systems that edit faces.
TINY_NETWORKS = {
    "generator": (
        Generator,
        {"z_dim": 8, "w_dim": 8, "resolution": 32, "channel_base": 256, "channel_max": 16, "mapping_layers": 2},
    ),
    "inverter": (
        InversionEncoder,
        {"num_layers": 8, "dim": 8, "architecture": "resnet10", "width": 8, "head_width": 8, "size": 32},
    ),
    "attributes": (
        AttributeClassifier,
        {
            "attributes": ["Male", "Young", "Eyeglasses"],
            "architecture": "resnet10",
            "width": 8,
            "head_layers": 1,
            "head_width": 8,
            "size": 32,
        },
    ),
    "identity": (IdentityEncoder, {"dim": 8, "architecture": "iresnet10", "width": 8, "size": 32}),
    "perceptual": (PerceptualDistance, {"architecture": "resnet10", "width": 8, "size": 32}),
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Backbone specification by kind."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbones")
    specs = {}
    for kind, (make, init) in TINY_NETWORKS.items():
        backbones.save(make(**init), folder / f"{kind}.safetensors", kind, init, card={})
        specs[kind] = f"path:{folder / kind}.safetensors"
    return specs
