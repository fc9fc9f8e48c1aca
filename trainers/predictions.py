"""Predictions on disk: what ``predict`` writes and ``score`` reads, whoever made them.

One folder for one system on one split::

    predictions.json       task, system, seed, data and what the arrays hold; written last
    <clip>.npy             speech-to-mesh: (T, V, 3) float32 vertices in metres, or (S, T, V, 3) of S samples
    <clip>.controls.npy    (T, C) or (S, T, C) rig controls, of systems in the space of a rig
    <clip>.pose.npy        (T, 3) or (S, T, 3) rotation vectors of the head in radians, of systems that turn it
    batch-00000.npz        face-editing: uint8 images; "keys" (B,), "inversion" (B, H, W, 3) and for each
                           attribute (S, B, H, W, 3), one for each strength
                           text-to-face: "keys" (B,) and "images" (K, B, H, W, 3), K for each caption
"""

import json
import math
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from datamodules.errors import UserError
from datamodules.shards import write_atomic

DESCRIPTION = "predictions.json"

T = TypeVar("T")


class PredictionWriter(BasePredictionWriter):
    """Writes the predictions of ``facebench predict`` batch by batch, and how fast they came.

    Every rank writes its own batches into the one folder; stand-ins (``batch.real`` is False) are left out.

    Args:
        folder: where to.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(write_interval="batch")
        self.folder = Path(folder)
        self.seconds = 0.0
        self.items = 0
        self.keys: list[list[str]] = []  # of each batch
        self.started = 0.0

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes what an earlier run left: its batches may have been others."""
        if trainer.is_global_zero:
            (self.folder / DESCRIPTION).unlink(missing_ok=True)
            for path in self.folder.glob("batch-*.npz"):
                path.unlink()
        trainer.strategy.barrier("predictions")

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Starts the clock: it runs while the system works, not while files are written."""
        self.started = time.perf_counter()

    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Stops the clock, then writes."""
        self.seconds += time.perf_counter() - self.started
        super().on_predict_batch_end(trainer, pl_module, outputs, batch, *args)

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """One file a clip, or one a batch of images."""
        real = batch.real.cpu().numpy()
        keys = [key for key, is_real in zip(batch.key, real, strict=True) if is_real]
        self.keys.append(keys)
        info: Any = pl_module.info
        if info.task == "speech-to-mesh":
            for name, array in prediction.items():
                _write_array(self.folder / f"{name}.npy", array.float().cpu().numpy())
                self.items += math.prod(array.shape[:-2]) if name in keys else 0
        elif keys:
            images = {name: _pixels(value)[..., real, :, :, :] for name, value in prediction.items()}
            self.items += sum(math.prod(array.shape[:-3]) for array in images.values())
            number = batch_idx * trainer.world_size + trainer.global_rank  # in the order of the split
            _write_arrays(self.folder / f"batch-{number:05d}.npz", keys=np.array(keys), **images)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Describes the folder when all ranks have written: from now on it is complete."""
        ranks = gather((self.keys, self.items, self.seconds))
        if not trainer.is_global_zero:
            return
        batches = zip_longest(*(keys for keys, _, _ in ranks), fillvalue=[])
        info: Any = pl_module.info
        description = {
            "task": info.task,
            "system": info.name,
            "title": info.title,
            "data": trainer.datamodule.manifest.sha256,  # type: ignore[attr-defined]
            "split": trainer.datamodule.predict_split,  # type: ignore[attr-defined]
            "keys": [key for turn in batches for keys in turn for key in keys],
            # A system that is not told the speaker has no policy for strangers.
            "unseen": pl_module.unseen if "subject" in getattr(pl_module, "conditions", ()) else None,
            "strengths": getattr(pl_module, "strengths", None),
            "attributes": getattr(pl_module, "attributes", None),
            "caption": getattr(pl_module, "caption", None),
            "throughput": sum(items for _, items, _ in ranks) / max(seconds for _, _, seconds in ranks),
        }
        write_atomic(self.folder / DESCRIPTION, json.dumps(description, indent=1).encode())


def gather(value: T) -> list[T]:
    """The value of every rank, on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def read_description(folder: Path, task: str | None = None) -> dict[str, Any]:
    """Reads ``predictions.json``.

    Raises:
        UserError: no predictions, unfinished ones, or those of another task.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{path}: missing; not a folder of finished predictions (write them with 'facebench predict')")
    description = json.loads(path.read_text())
    if task is not None and description["task"] != task:
        raise UserError(f"{path}: predictions of task '{description['task']}', expected '{task}'")
    return description


def read_vertices(folder: Path, key: str) -> np.ndarray:
    """One clip's (T, V, 3) vertices, or the (S, T, V, 3) of its samples.

    Raises:
        UserError: the clip is missing.
    """
    path = Path(folder) / f"{key}.npy"
    if not path.is_file():
        raise UserError(f"{path}: no prediction for clip '{key}'; predict the whole split")
    return np.load(path, allow_pickle=False)


def read_curves(folder: Path, key: str, kind: str) -> np.ndarray | None:
    """One clip's ``controls`` or ``pose``; None of a system that predicts none."""
    path = Path(folder) / f"{key}.{kind}.npy"
    return np.load(path, allow_pickle=False) if path.is_file() else None


def read_images(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """The batches of edited images, in order."""
    for path in sorted(Path(folder).glob("batch-*.npz")):
        with np.load(path, allow_pickle=False) as stored:
            yield dict(stored)


def _pixels(images: Tensor) -> np.ndarray:
    """(..., 3, H, W) in [-1, 1] -> (..., H, W, 3) uint8."""
    scaled = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.byte().movedim(-3, -1).cpu().numpy()


def _write_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    partial.replace(path)


def _write_arrays(path: Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    partial.replace(path)
