"""Every paper-scale config of a speech system, on a batch of its real size: a step in each stage, and an animation.

Published weights cannot be had in a test; networks of their architecture and size with random weights stand in.
"""

import io
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import soundfile
import torch
import yaml
from safetensors.numpy import save

from datamodules.head import Head
from datamodules.shards import Sample, npy_bytes
from datamodules.speech import SpeechDataModule
from trainers import backbones
from trainers.backbone.text import word_tokenizer
from trainers.nets.extractors import CLIPEncoder
from trainers.nets.rig import load_rig
from trainers.nets.speech_encoder import SpeechEncoder
from trainers.nets.text_encoder import TextEncoder
from trainers.tasks import SpeechToRig

CONFIGS = Path(__file__).parents[3] / "configs" / "systems"
SECONDS, GIGABYTES = 3, 16

HUBERT_LARGE = {
    "model_type": "hubert",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "conv_bias": True,
}
BIWI = {"num_vertices": 23370, "subjects": ["F2", "F3", "F4", "M3", "M4", "M5"], "alignment": "pairs", "period": 25}
MODES = {
    "faceformer-biwi": ("faceformer", {**BIWI, "dim": 128}),
    "codetalker-biwi": (
        "codetalker",
        {**BIWI, "code_dim": 128, "codes_per_frame": 8, "code_projection": True, "layers": 12, "halve_every": None},
    ),
}


def speech_configs() -> dict[str, tuple[str, dict[str, Any]]]:
    names = {path.stem: (path.stem, {}) for path in sorted(CONFIGS.glob("*.yaml"))}
    speech = {
        name: value
        for name, value in names.items()
        if yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["class_path"].startswith("trainers.speech.")
    }
    return {**speech, **MODES}


def stand_in(spec: str, kind: str) -> torch.nn.Module:
    """What the hub would give, with random weights."""
    torch.manual_seed(0)
    match spec:
        case "hub:facebook/wav2vec2-base-960h":
            network: torch.nn.Module = SpeechEncoder({}, [chr(97 + i) for i in range(26)])
        case "hub:facebook/hubert-base-ls960":
            network = SpeechEncoder({"model_type": "hubert"})
        case "hub:facebook/hubert-large-ls960-ft":
            network = SpeechEncoder(HUBERT_LARGE)
        case "hub:gpt2":
            network = TextEncoder({}, word_tokenizer(["did anna"]).to_str())
        case "hub:openai/clip-vit-base-patch32":
            letters = "abcdefghijklmnopqrstuvwxyz"
            tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
            ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
            network = CLIPEncoder.from_config({"text_config": ends}, {token: i for i, token in enumerate(tokens)}, [])
        case _:
            raise AssertionError(f"{spec}: no stand-in of kind {kind}")
    return network.eval().requires_grad_(False)


def clip(subject: str, number: int, fps: int, vertices: int, controls: int, emotion: str) -> Sample:
    rng, frames = np.random.default_rng(number), SECONDS * fps
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * rng.standard_normal(SECONDS * 16_000), 16_000, format="WAV", subtype="PCM_16")
    labels = {
        "subject": subject,
        "transcript": "did anna",
        "words": [["did", 0.0, 1.0], ["anna", 1.0, SECONDS]],
        "phonemes": [["d", 0.0, 1.0], ["m", 1.0, SECONDS]],
        "emotion": emotion,
        "intensity": number % 3,
    }
    members = {
        "offsets.npy": npy_bytes((0.001 * rng.standard_normal((frames, vertices, 3))).astype(np.float16)),
        "wav": buffer.getvalue(),
        "json": json.dumps(labels).encode(),
        "weights.npy": npy_bytes(rng.random((frames, controls)).astype(np.float16)),
        "pose.npy": npy_bytes(0.1 * rng.standard_normal((frames, 3)).astype(np.float32)),
    }
    return Sample(f"{subject}-{number:03d}", frames, members)


@pytest.fixture
def arguments(request, tmp_path, write_data) -> tuple[dict[str, Any], str, int, str]:
    """A config's arguments with files of its own making, its class, its batch size, and data of its real size."""
    name, changes = speech_configs()[request.param]
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    found = {**config["model"]["init_args"], **changes}
    if "stage_epochs" in found:
        found["stage_epochs"] = [1] * len(found["stage_epochs"])
    controls: list[str] = []
    if found.get("rig", "").startswith("names:"):
        known = ["brow", "eye", "nose", "mouth", "jaw"]
        metahuman = [f"CTRL_L_{known[i % 5]}_{i}" for i in range(185)]
        controls = metahuman if "metahuman" in found["rig"] else Head.load().units[:51]
        (tmp_path / "controls.txt").write_text("\n".join(controls))
        found["rig"] = f"names:{tmp_path / 'controls.txt'}"
    elif "rig" in found:
        controls = load_rig(found["rig"]).controls
    for mask in ("mouth", "eyes", "eye_landmarks", "smooth"):
        if mask in found:
            np.savetxt(tmp_path / "mask.txt", np.linspace(0, 1, found["num_vertices"]))
            listed = isinstance(found[mask], list)
            found[mask] = [str(tmp_path / "mask.txt")] * len(found[mask]) if listed else str(tmp_path / "mask.txt")
    if "prompts" in found:
        labels = {"text": "a smile", "emotion": "happy", "aus": {}, "captions": []}
        rng = np.random.default_rng(0)
        prompts = [
            Sample(
                f"p{i}",
                1,
                {
                    "json": json.dumps(labels).encode(),
                    "weights.npy": npy_bytes(rng.random(len(controls)).astype(np.float32)),
                },
            )
            for i in range(300)
        ]
        fields = {"controls": controls, "emotions": ["happy"]}
        splits = {"train": [prompts], "val": [prompts[:2]], "test": [prompts[:2]]}
        found["prompts"] = str(write_data(tmp_path / "prompts", "expression-prompts", fields, splits))

    vertices, subjects = found["num_vertices"], found["subjects"]
    emotions = found.get("emotions") or ["neutral"]
    fps = 25 if found.get("alignment") in ("pairs", "pair_states") else int(found.get("fps", 30))
    size = config["data"]["init_args"]["batch_size"]
    each = [
        clip(subjects[i % len(subjects)], i, fps, vertices, len(controls), emotions[i % len(emotions)])
        for i in range(max(size, len(subjects)))
    ]
    regions = {"lips": np.arange(min(vertices, 30), dtype=np.int32)} if vertices else {}
    regions |= {"upper_face": np.arange(30, 60, dtype=np.int32)} if vertices else {}
    fields = {
        "fps": fps,
        "sample_rate": 16_000,
        "unit": "metre",
        "topology": "paper",
        "vertices": vertices,
        "subjects": subjects,
        "train_subjects": subjects,
        "emotions": emotions,
        "intensities": [0.4, 0.7, 1.0],
        "controls": controls,
        "regions": list(regions),
    }
    rng = np.random.default_rng(1)
    files = {
        "templates.safetensors": save({s: rng.normal(0, 0.1, (vertices, 3)).astype(np.float32) for s in subjects}),
        "topology.safetensors": save({"triangles": np.zeros((1, 3), np.int32), **regions}),
    }
    splits = {"train": [each], "val": [each[:1]], "test": [each[:1]]}
    root = write_data(tmp_path / "data", "talking-heads", fields, splits, files)
    return found, config["model"]["class_path"], size, str(root)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", list(speech_configs()), indirect=True)
def test_a_step_and_an_animation_at_paper_scale_fit_into_memory(arguments, monkeypatch) -> None:
    given, class_path, size, root = arguments
    load = backbones.load
    monkeypatch.setattr(
        backbones, "load", lambda spec, kind: stand_in(spec, kind) if spec.startswith("hub:") else load(spec, kind)
    )
    module, _, name = class_path.rpartition(".")
    system = getattr(__import__(module, fromlist=[name]), name)(**given)
    before = {key: value.clone() for key, value in system.named_parameters() if value.requires_grad}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=len(given.get("stage_epochs", [])) + 1,
        limit_train_batches=1,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    data = SpeechDataModule(root, batch_size=size)
    trainer.fit(system, datamodule=data)
    moved = [key for key, value in system.named_parameters() if key in before and not torch.equal(value, before[key])]
    assert moved
    del before
    batch = next(iter(data.loader("test"))).clip(0)
    system.eval()
    with torch.inference_mode():
        if isinstance(system, SpeechToRig):
            controls = system.control(batch)
            assert controls.shape == batch.weights.shape
            assert torch.isfinite(controls).all()
        vertices = system.animate(batch)
    assert vertices.shape == batch.vertices.shape
    assert torch.isfinite(vertices).all()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name}: {len(moved)} weights moved, peak {peak:.1f} GB")
    assert peak < GIGABYTES
