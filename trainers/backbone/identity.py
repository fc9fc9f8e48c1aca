"""Training of identity encoders.

Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019, with the additive cosine
margin of CosFace (Wang et al., CVPR 2018) to choose instead: classification of the training identities by the cosine
between an embedding and a learned centre per identity, made harder by a margin at the true one.
"""

import math
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn

from datamodules.batches import FaceBatch
from datamodules.errors import UserError
from trainers import backbones
from trainers.backbone.attributes import one_cycle
from trainers.backbone.augmentation import augment
from trainers.nets.face_encoders import IdentityEncoder


def margin_logits(cosine: Tensor, identity: Tensor, margin: float, scale: float, kind: str) -> Tensor:
    """Logits whose true class must win by a margin.

    Args:
        cosine: (B, N) between embeddings and centres.
        identity: (B,) int64, the true class.
        margin: m; radians for ``arcface``.
        scale: s.
        kind: ``arcface``: s cos(theta + m) (ArcFace, equation 3); ``cosface``: s (cos(theta) - m).

    Returns:
        (B, N) logits.
    """
    true = cosine.gather(1, identity[:, None])
    if kind == "arcface":
        sine = (1 - true.square()).clamp(min=1e-7).sqrt()
        moved = true * math.cos(margin) - sine * math.sin(margin)
        # Beyond theta = pi - m the cosine would rise again; a straight line keeps the gradient's direction.
        moved = torch.where(true > -math.cos(margin), moved, true - margin * math.sin(margin))
    else:
        moved = true - margin
    return scale * cosine.scatter(1, identity[:, None], moved)


def verification(similarity: Tensor, same: Tensor) -> tuple[float, float]:
    """How well similarities tell same from different.

    Args:
        similarity: (P,) of pairs.
        same: (P,) bool.

    Returns:
        Area under the ROC curve, and the equal-error rate, both in [0, 1].
    """
    false_positive, true_positive, _ = roc_curve(same.numpy(), similarity.numpy())
    crossing = abs(false_positive - (1 - true_positive)).argmin()
    error = (false_positive[crossing] + 1 - true_positive[crossing]) / 2
    return float(roc_auc_score(same.numpy(), similarity.numpy())), float(error)


class IdentityTraining(pl.LightningModule):
    """Trains an identity encoder and measures it by verification on identities it has never seen.

    Args:
        num_identities: N; training identities are numbered 0 to N - 1.
        dim: of the embedding.
        architecture: of the trunk, see :func:`trainers.nets.face_encoders.trunk`.
        width: channels of the trunk's first stage.
        dropout: before the embedding.
        size: image size in pixels to train at.
        crop: (top, left, side) of the square to look at, shares of the image's side.
        loss: ``arcface`` or ``cosface``.
        margin: m.
        scale: s.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        alike: attributes of a person, not of a picture: pairs that agree in them are also scored by themselves,
            which tells an encoder of identity from one of these attributes.
    """

    def __init__(
        self,
        num_identities: int,
        dim: int = 512,
        architecture: str = "iresnet50",
        width: int = 64,
        dropout: float = 0.0,
        size: int = 112,
        crop: tuple[float, float, float] = (0.0, 0.0, 1.0),
        loss: Literal["arcface", "cosface"] = "arcface",
        margin: float = 0.5,
        scale: float = 64.0,
        lr: float = 1e-3,
        weight_decay: float = 5e-4,
        alike: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.init = {
            "dim": dim,
            "architecture": architecture,
            "width": width,
            "dropout": dropout,
            "size": size,
            "crop": crop,
        }
        self.network = IdentityEncoder(**self.init).to(memory_format=torch.channels_last)  # type: ignore[arg-type]
        self.centres = nn.Parameter(torch.randn(num_identities, dim) * 0.01)
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def setup(self, stage: str) -> None:
        """Compares the data with the network before any work.

        Raises:
            UserError: another number of identities, or an attribute that the data does not label.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        found = data.manifest.fields["identities"]["train"]
        if stage == "fit" and found != self.hparams["num_identities"]:
            raise UserError(
                f"model.num_identities: {self.hparams['num_identities']}, but {data.root} trains on {found}; "
                f"set it to {found}"
            )
        alike = self.hparams["alike"] or []
        unknown = [name for name in alike if name not in data.attributes]
        if unknown:
            raise UserError(f"model.alike: {data.root} does not label {', '.join(unknown)}")
        self.alike = [data.attributes.index(name) for name in alike]

    def training_step(self, batch: FaceBatch, batch_idx: int) -> Tensor:
        """Margin loss on augmented images."""
        self.network.train(len(batch) > 1)  # batch normalisation needs two
        embedding = self.network(augment(batch.image))
        hparams = self.hparams
        with torch.autocast(self.device.type, enabled=False):
            cosine = embedding @ F.normalize(self.centres, dim=1).T
            logits = margin_logits(cosine, batch.identity, hparams["margin"], hparams["scale"], hparams["loss"])
            loss = F.cross_entropy(logits, batch.identity)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """Embeds; all pairs are compared at the end."""
        real = batch.real
        embedding = self.network(batch.image)
        self.seen.append((embedding[real], batch.identity[real], batch.attributes[real][:, self.alike]))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Logs and forgets."""
        self._log_verification("val")

    def on_test_epoch_end(self) -> None:
        """Logs and forgets."""
        self._log_verification("test")

    def _log_verification(self, split: str) -> None:
        embedding, identity, attributes = (torch.cat(parts).cpu() for parts in zip(*self.seen, strict=True))
        self.seen.clear()
        first, second = torch.triu_indices(len(identity), len(identity), offset=1)
        similarity = (embedding[first] * embedding[second]).sum(1)
        same = identity[first] == identity[second]
        if same.all() or not same.any():
            return  # a sanity check of few batches may hold no pair of either kind
        self._log_pairs(split, "", similarity, same)
        agree = (attributes[first] == attributes[second]).all(1)
        if self.alike:
            self._log_pairs(split, "_alike", similarity[agree], same[agree])

    def _log_pairs(self, split: str, name: str, similarity: Tensor, same: Tensor) -> None:
        auc, error = verification(similarity, same)
        self.log(f"{split}/auc{name}", auc, prog_bar=True)
        self.log(f"{split}/eer{name}", error)
        self.log(f"{split}/cosine_same{name}", similarity[same].mean())
        self.log(f"{split}/cosine_different{name}", similarity[~same].mean())

    def configure_optimizers(self) -> Any:
        """AdamW, the rate warmed up and annealed over the whole training."""
        return one_cycle(self, self.hparams["lr"], self.hparams["weight_decay"])

    def export(self, path: Path, card: dict[str, Any]) -> None:
        """Writes a backbone of kind ``identity``."""
        backbones.save(self.network, path, "identity", self.init, card)
