"""Training of attribute classifiers, and of the network behind the demo's perceptual distance.

At the paper's scale this is AdaTrans' classifier (ICCV 2023): an ImageNet ResNet-34 with one three-layer head per
attribute, binary cross-entropy, Adam 1e-4, batch 64, 10 epochs, 256 pixels, images mirrored at random. A ResNet-50
twin judges. Differences: AdamW with one cosine cycle, and the augmentation of
:mod:`trainers.backbone.augmentation`.
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.batches import FaceBatch
from datamodules.errors import UserError
from trainers import backbones
from trainers.backbone.augmentation import augment
from trainers.nets.face_encoders import AttributeClassifier, PerceptualDistance, load_imagenet


class AttributeTraining(pl.LightningModule):
    """Trains an attribute classifier.

    Args:
        attributes: what to classify: names that the data labels, or ``Age>=N`` for the age in years.
        architecture: of the trunk, see :func:`trainers.nets.face_encoders.trunk`.
        width: channels of the trunk's first stage.
        head_layers: hidden layers of each attribute's head.
        head_width: their width.
        size: image size in pixels to train at.
        imagenet: start from torchvision's ImageNet weights.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
    """

    def __init__(
        self,
        attributes: list[str],
        architecture: str = "resnet34",
        width: int = 64,
        head_layers: int = 3,
        head_width: int = 512,
        size: int = 256,
        imagenet: bool = False,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.init = {
            "attributes": attributes,
            "architecture": architecture,
            "width": width,
            "head_layers": head_layers,
            "head_width": head_width,
            "size": size,
        }
        self.network = AttributeClassifier(**self.init).to(memory_format=torch.channels_last)  # type: ignore[arg-type]
        if imagenet:
            load_imagenet(self.network.stages, architecture)

    def setup(self, stage: str) -> None:
        """Compares the data with the network before any work.

        Raises:
            UserError: an attribute that the data does not label.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        named = [name for name in self.network.attributes if not name.startswith("Age>=")]
        unknown = [name for name in named if name not in data.attributes]
        if unknown:
            raise UserError(f"model.attributes: {data.root} does not label {', '.join(unknown)}")
        self.labelled = data.attributes

    def targets(self, batch: FaceBatch) -> Tensor:
        """(B, A) float32, 0 or 1, in the order of the network's logits."""
        columns = []
        for name in self.network.attributes:
            if name.startswith("Age>="):
                columns.append((batch.age >= float(name.removeprefix("Age>="))).float())
            else:
                columns.append(batch.attributes[:, self.labelled.index(name)])
        return torch.stack(columns, 1)

    def training_step(self, batch: FaceBatch, batch_idx: int) -> Tensor:
        """Binary cross-entropy on augmented images."""
        self.network.train(len(batch) > 1)  # batch normalisation needs two
        logits = self.network(augment(batch.image))
        loss = F.binary_cross_entropy_with_logits(logits.float(), self.targets(batch))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """Share of correct answers, for each attribute and on average."""
        self._measure(batch, "val")

    def test_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """As validation, on the test split."""
        self._measure(batch, "test")

    def _measure(self, batch: FaceBatch, split: str) -> None:
        if not batch.real.any():
            return
        correct = ((self.network(batch.image) > 0) == (self.targets(batch) > 0.5)).float()[batch.real]
        self.log(f"{split}/accuracy", correct.mean(), batch_size=len(correct), prog_bar=True)
        for name, column in zip(self.network.attributes, correct.T, strict=True):
            self.log(f"{split}/accuracy/{name}", column.mean(), batch_size=len(correct))

    def configure_optimizers(self) -> Any:
        """AdamW, the rate warmed up and annealed over the whole training."""
        return one_cycle(self, self.hparams["lr"], self.hparams["weight_decay"])

    def export(self, path: Path, card: dict[str, Any]) -> None:
        """Writes a backbone of kind ``attributes``."""
        backbones.save(self.network, path, "attributes", self.init, card)


class PerceptualTraining(AttributeTraining):
    """Trains an attribute classifier and keeps its stages as a perceptual distance; arguments are the same."""

    def export(self, path: Path, card: dict[str, Any]) -> None:
        """Writes a backbone of kind ``perceptual``."""
        init = {name: self.init[name] for name in ("architecture", "width", "size")}
        network = PerceptualDistance(**init)  # type: ignore[arg-type]
        network.stages.load_state_dict(self.network.stages.state_dict())
        backbones.save(network, path, "perceptual", init, card)


def one_cycle(module: pl.LightningModule, lr: float, weight_decay: float) -> dict[str, Any]:
    """AdamW with a tenth of the steps of warm-up and a cosine to zero."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    steps = int(module.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, steps, pct_start=0.1, cycle_momentum=False)
    return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
