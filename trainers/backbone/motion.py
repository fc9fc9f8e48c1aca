"""Training of the judge of motion: which emotion a clip shows."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from trainers import backbones
from trainers.backbone.attributes import one_cycle
from trainers.nets.motion_judge import MotionJudge


class MotionTraining(pl.LightningModule):
    """Trains a :class:`~trainers.nets.motion_judge.MotionJudge` on true motion with its emotions.

    Args:
        emotions: the data's, in order.
        region: of the data; every ``every``-th of its vertices is looked at.
        every: see ``region``.
        width: functions of a frame.
        dropout: in the judge.
        noise: standard deviation of what is added to every offset of a vertex, constant over a clip, in metres: a
            speaker's habit says nothing of the emotion.
        louder: clips move up to this share more or less.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
    """

    def __init__(
        self,
        emotions: list[str],
        region: str = "face",
        every: int = 8,
        width: int = 64,
        dropout: float = 0.5,
        noise: float = 2e-4,
        louder: float = 0.2,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network: MotionJudge | None = None

    def configure_model(self) -> None:
        """Builds the network for the mesh of the data.

        Raises:
            UserError: data without that region, or with other emotions.
        """
        if self.network is not None:
            return
        data, hparams = self.trainer.datamodule, self.hparams  # type: ignore[attr-defined]
        if hparams["region"] not in data.regions:
            raise UserError(
                f"model.region: {data.root} has no region '{hparams['region']}'; it has {', '.join(data.regions)}"
            )
        if data.manifest.fields["emotions"] != hparams["emotions"]:
            raise UserError(f"model.emotions: {data.root} has {data.manifest.fields['emotions']}; list the same")
        self.init = {
            "emotions": hparams["emotions"],
            "num_vertices": data.num_vertices,
            "vertices": data.regions[hparams["region"]][:: hparams["every"]].tolist(),
            "width": hparams["width"],
            "dropout": hparams["dropout"],
        }
        self.network = MotionJudge(**self.init)

    def logits(self, batch: SpeechBatch, augmented: bool = False) -> Tensor:
        """(B, E) float32."""
        assert self.network is not None
        rows = []
        for i, length in enumerate(batch.lengths.tolist()):
            vertices, template = batch.vertices[i, :length], batch.template[i]
            if augmented:
                louder = 1 + self.hparams["louder"] * (2 * torch.rand((), device=self.device) - 1)
                habit = self.hparams["noise"] * torch.randn_like(template)
                vertices = template + louder * (vertices - template) + habit
            rows.append(self.network(vertices, template))
        return torch.stack(rows)

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """Cross-entropy of clips with changed loudness and habits."""
        loss = cross_entropy(self.logits(batch, augmented=True), batch.emotion, ignore_index=-1, label_smoothing=0.1)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: SpeechBatch, batch_idx: int) -> None:
        """Share of clips whose emotion is right."""
        self._measure(batch, "val")

    def test_step(self, batch: SpeechBatch, batch_idx: int) -> None:
        """As validation, on the test split: the ceiling of every score by this judge."""
        self._measure(batch, "test")

    def _measure(self, batch: SpeechBatch, split: str) -> None:
        known = batch.real & (batch.emotion >= 0)
        if known.any():
            right = (self.logits(batch).argmax(1) == batch.emotion)[known].float()
            self.log(f"{split}/emotion_accuracy", right.mean(), prog_bar=True, batch_size=len(right))

    def configure_optimizers(self) -> Any:
        """AdamW, the rate warmed up and annealed over the whole training."""
        return one_cycle(self, self.hparams["lr"], self.hparams["weight_decay"])

    def export(self, path: Path, card: dict[str, Any]) -> None:
        """Writes a backbone of kind ``motion``."""
        assert self.network is not None
        backbones.save(self.network, path, "motion", self.init, card)
