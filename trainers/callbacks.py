"""What trainings of backbones leave behind."""

from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl

from trainers.cli import code_commit


class Exportable(Protocol):
    """A Lightning module that trains a backbone."""

    def export(self, path: Path, card: dict[str, Any]) -> None:
        """Writes the trained network by :func:`trainers.backbones.save`."""


class ExportBackbone(pl.Callback):
    """Writes the trained network when training ends, with a card that says where it comes from.

    The card holds the training's class and arguments (``model``), how long it trained (``training``), the data
    (``data``: name and SHA-256 of the shards), the code's ``commit`` and the last validation ``scores``.

    Args:
        path: the safetensors file to write.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.scores: dict[str, float] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the scores: Lightning forgets them unless asked now."""
        metrics = trainer.callback_metrics.items()
        self.scores = {name: round(value.item(), 4) for name, value in metrics if name.startswith("val/")}

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Exports from the first process."""
        if trainer.is_global_zero:
            pl_module.export(self.path, card(trainer, pl_module, self.scores))


def card(trainer: pl.Trainer, module: pl.LightningModule, scores: dict[str, float]) -> dict[str, Any]:
    """What a reader needs to judge the weights and to make them again."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    arguments = {name: value for name, value in module.hparams.items() if not name.startswith("_")}
    return {
        "model": {"class": f"{type(module).__module__}.{type(module).__name__}", **arguments},
        "training": {
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "batch_size": data.batch_size,
            "precision": str(trainer.precision),
        },
        "data": {"name": data.manifest.name, "sha256": data.manifest.sha256},
        "commit": code_commit(),
        "scores": scores,
    }
