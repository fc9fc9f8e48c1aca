"""A made-up results file of two tasks, with media, for the tests of leaderboard and report."""

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

from metrics.protocols import Protocol, _open_fields
from sweeps.results import Result, write_results

CLIPS = [f"subject{s}-sentence{i:02d}" for s in (10, 11) for i in range(12)]
PHOTOS = [f"photo{i:03d}" for i in range(60)]
ATTRIBUTES = ("Eyeglasses", "Male", "Young")


def bound(name):
    """The protocol, its open choices filled with zeros."""
    protocol = Protocol.read(name)
    return protocol.bind(dict.fromkeys(_open_fields(protocol.spec), "0" * 64))


SPEECH, EDITING = bound("demo-speech"), bound("demo-editing")


def speech_result(system, title, role, seed, error, media=None):
    """Errors in mm around ``error``, with a difficulty that all systems share by clip."""
    spread = np.random.default_rng([seed, len(system)])
    difficulty = np.random.default_rng(0).uniform(0.6, 1.4, len(CLIPS))
    frames = dict(zip(CLIPS, range(60, 60 + len(CLIPS)), strict=True))
    factors = {
        "lve_l2": 1,
        "lve_squared": 3,
        "lve_centred": 0.8,
        "mve": 0.3,
        "mod": 0.5,
        "fdd_abs": 0.05,
        "fdd_signed": 0.03,
    }
    metrics = {}
    for name, factor in factors.items():
        noise = spread.normal(1 + 0.02 * seed, 0.05, len(CLIPS))
        values = dict(zip(CLIPS, (error * factor * difficulty * noise).tolist(), strict=True))
        pooled = not name.startswith("fdd")
        weights = frames if pooled else dict.fromkeys(CLIPS, 1)
        metrics[name] = {
            "value": sum(weights[key] * values[key] for key in CLIPS) / sum(weights.values()),
            "unit": "mm²" if "squared" in name or "fdd" in name else "mm",
            "higher_is_better": None if name == "fdd_signed" else False,
            "per_sample": values,
            **({"weights": frames} if pooled else {}),
        }
    return result("speech-to-mesh", system, title, role, seed, SPEECH, metrics, media=media)


def editing_result(system, title, role, seed, identity, media=None, reaches=True):
    spread = np.random.default_rng([seed, len(system)])
    person = np.random.default_rng(1).normal(0, 0.08, len(PHOTOS))

    def metric(mean, unit="", higher=True, sampled=True):
        values = np.clip(mean + person + spread.normal(0.005 * seed, 0.02, len(PHOTOS)), 0, 1)
        sample = dict(zip(PHOTOS, values.tolist(), strict=True)) if sampled and reaches else {}
        value = float(values.mean()) if sampled else mean + 0.3 * seed
        return {
            "value": value if reaches else None,
            "unit": unit,
            "higher_is_better": higher,
            "per_sample": sample,
        }

    metrics = {
        "identity": metric(identity),
        "identity_to_inversion": metric(identity + 0.1),
        "preservation": metric(0.5 + identity / 2),
        "fid": metric(40 - 20 * identity, higher=False, sampled=False),
        "kid": metric(20 - 10 * identity, higher=False, sampled=False),
        "accuracy": metric(0.9) | {"value": 0.9, "per_sample": dict.fromkeys(PHOTOS, 0.9)},
    }
    strengths = [0.0] if role == "ceiling" else [0.0, 1.0, 2.0, 4.0, 8.0, 16.0]
    curve = [
        {
            "attribute": attribute,
            "strength": strength,
            "accuracy": 1 - 0.97 * float(np.exp(-strength / (3 + i))),
            "preservation": 0.99 - 0.02 * (1.4 - identity) * strength,
            "identity": 0.85 - (1 - identity) * 0.04 * strength - 0.01 * i,
            "identity_to_inversion": 1 - (1 - identity) * 0.05 * strength,
        }
        for i, attribute in enumerate(ATTRIBUTES)
        for strength in strengths
    ]
    return result("face-editing", system, title, role, seed, EDITING, metrics, curve, media)


def result(task, system, title, role, seed, protocol, metrics, curve=(), media=None):
    trained = role == "system"
    return Result(
        task=task,
        system=system,
        title=title,
        role=role,
        seed=seed,
        data={"name": "demo corpus", "sha256": "d" * 64},
        split="test",
        protocol={"name": protocol.name, "id": protocol.id, "spec": protocol.spec},
        metrics=metrics,
        curve=list(curve),
        costs={
            "parameters": 1.2e6 * len(system),
            "train_seconds": 95.0 + 40 * seed,
            "throughput": 300.0 * len(system),
            "throughput_unit": "frames/s" if task == "speech-to-mesh" else "images/s",
            "peak_memory_mb": 740.0,
        }
        if trained
        else {},
        media=media or {},
        people={key: key[:9] for key in next(iter(metrics.values()))["per_sample"]},
        run=f"cells/{system}-{seed}",
        code="0" * 40,
    )


def write_media(folder: Path, system: str, task: str) -> dict[str, list[dict[str, str]]]:
    """A tiny strip or video below ``folder``; paths relative to it."""
    pixels = np.random.default_rng(len(system)).integers(0, 255, (32, 32 * 6, 3), dtype=np.uint8)
    place = folder / "cells" / system
    place.mkdir(parents=True, exist_ok=True)
    if task == "face-editing":
        imageio.imwrite(place / "strip.png", pixels)
        return {"strips": [{"key": "first", "file": f"cells/{system}/strip.png", "caption": f"Edits by {system}"}]}
    imageio.imwrite(place / "clip.mp4", np.stack([pixels[:, :32]] * 5), fps=30)
    return {"videos": [{"key": CLIPS[0], "file": f"cells/{system}/clip.mp4", "caption": "What was <said>?"}]}


@pytest.fixture
def results_file(tmp_path):
    """Two systems of three seeds in each of two tasks, with floors and ceilings; the path of ``results.jsonl``."""
    results = [
        speech_result("neutral", "Neutral face", "floor", 0, 6.0),
        speech_result("mean-motion", "Mean motion", "floor", 0, 5.0),
        speech_result("ground-truth", "Ground truth", "ceiling", 0, 0.0),
        editing_result("inversion", "Inversion, no edit", "ceiling", 0, 0.85),
    ]
    for seed in (1, 2, 3):
        for system, title, error in (("voca", "VOCA", 3.6), ("faceformer", "FaceFormer", 3.0)):
            media = write_media(tmp_path, system, "speech-to-mesh") if seed == 1 else None
            results.append(speech_result(system, title, "system", seed, error, media))
        for system, title, identity in (("interfacegan", "InterFaceGAN", 0.52), ("adatrans", "AdaTrans", 0.63)):
            media = write_media(tmp_path, system, "face-editing") if seed == 1 else None
            results.append(editing_result(system, title, "system", seed, identity, media))
    path = tmp_path / "results.jsonl"
    write_results(path, results)
    return path
