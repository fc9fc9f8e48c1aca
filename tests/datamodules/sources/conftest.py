"""Writing tiny trees as the releases have them."""

import json
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from datamodules import shards
from datamodules.datamodule import ShardDataModule
from datamodules.shards import Manifest

RATE = 16_000


class Tree:
    """A release under construction."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rng = np.random.default_rng(0)

    def path(self, name: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def wav(self, name: str, seconds: float, rate: int = RATE) -> np.ndarray:
        """16-bit noise; gives what was written, (S,) int16."""
        samples = self.rng.integers(-20000, 20000, round(seconds * rate)).astype(np.int16)
        soundfile.write(self.path(name), samples, rate, subtype="PCM_16")
        return samples

    def npy(self, name: str, array: np.ndarray) -> np.ndarray:
        np.save(self.path(name), array)
        return array

    def text(self, name: str, *lines: str) -> None:
        self.path(name).write_text("\n".join(lines) + "\n")

    def image(self, name: str, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> np.ndarray:
        """Random pixels, (H, W, 3) or (H, W) uint8; a jpg gives what it decodes to."""
        shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
        Image.fromarray(self.rng.integers(0, 256, shape, dtype=np.uint8), mode).save(self.path(name))
        return np.array(Image.open(self.root / name))

    def obj(self, name: str, vertices: np.ndarray, faces: list[list[int]]) -> None:
        lines = [f"v {x} {y} {z}" for x, y, z in vertices.tolist()]
        self.text(name, *lines, "vt 0.5 0.5", *("f " + " ".join(f"{i + 1}/1" for i in face) for face in faces))

    def vertices(self, frames: int, count: int, dtype: type = np.float64) -> np.ndarray:
        return self.rng.normal(0, 0.1, (frames, count, 3)).astype(dtype)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "release")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a process takes longer than these builds; ``tests/facebench/test_data.py`` builds with real ones."""

    class Pool(ThreadPoolExecutor):
        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(1)

    monkeypatch.setattr(shards, "ProcessPoolExecutor", Pool)


@pytest.fixture
def read_back() -> Callable[[ShardDataModule, str], dict[str, Any]]:
    """Key -> one-sample batch of a split, through the data module."""

    def read(module: ShardDataModule, split: str) -> dict[str, Any]:
        return {batch.key[0]: batch for batch in module.loader(split)}

    return read


@pytest.fixture
def labels_of() -> Callable[[Manifest], dict[str, dict]]:
    """Key -> the json of every sample of a folder."""

    def read(manifest: Manifest) -> dict[str, dict]:
        found = {}
        for shard in manifest.shards:
            with tarfile.open(manifest.root / shard.file) as tar:
                for member in tar:
                    if member.name.endswith(".json"):
                        found[member.name.removesuffix(".json")] = json.load(tar.extractfile(member))
        return found

    return read
