"""Training of inversion encoders: photo to W+ code of a frozen StyleGAN2.

After Tov et al., "Designing an Encoder for StyleGAN Image Manipulation" (e4e), SIGGRAPH 2021: pixel, perceptual and
identity losses between photo and reconstruction, and a penalty on the offsets between a code's layers, which keeps
codes near W, where edits work. From the paper: the weights of these terms (1, 0.8 and, for faces, 0.1; section 4).

Deliberate differences:

* Half of what the encoder sees is drawn from the generator, where the true code is known and is regressed
  directly: quick to learn from, and it takes the place of e4e's latent discriminator, as those codes *are* W.
* The guiding attribute classifier must see the photo's attributes in the reconstruction.
* The offsets are free from the start; e4e frees them layer by layer.
* The identity term's network and the perceptual term's network are whatever backbones are given.
"""

from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.batches import FaceBatch
from datamodules.errors import UserError
from trainers import backbones
from trainers.backbone.attributes import one_cycle
from trainers.backbone.augmentation import mirror
from trainers.nets.face_encoders import resize
from trainers.nets.inverter import InversionEncoder


class InversionTraining(pl.LightningModule):
    """Trains an inversion encoder; guides give losses, judges give the validation's numbers.

    Args:
        generator: backbone specification of the StyleGAN2 generator.
        perceptual: of the perceptual distance.
        identity: of the identity encoder that guides.
        attributes: of the attribute classifier that guides.
        identity_judge: of the identity encoder that measures.
        attributes_judge: of the attribute classifier that measures.
        architecture: of the trunk, see :func:`trainers.nets.face_encoders.trunk`.
        width: channels of the trunk's first stage.
        head_width: channels of the pyramid and the heads.
        pixel_weight: of the mean squared error of pixels.
        perceptual_weight: of the perceptual distance.
        identity_weight: of 1 - cosine of identities.
        attributes_weight: of the cross-entropy between the attributes of reconstruction and photo.
        code_weight: of the mean squared error of known codes.
        offset_weight: of the mean squared offset between layers.
        lr: peak learning rate of AdamW.
        start: backbone specification of an inverter of the same shape to start from, for instance one of an earlier
            state of the generator.

    Raises:
        UserError: weights that cannot be had, or the guide given as judge.
    """

    frozen: ClassVar[tuple[str, ...]] = (
        "generator",
        "perceptual",
        "identity",
        "attributes",
        "identity_judge",
        "attributes_judge",
    )

    def __init__(
        self,
        generator: str,
        perceptual: str,
        identity: str,
        attributes: str,
        identity_judge: str,
        attributes_judge: str,
        architecture: str = "iresnet50",
        width: int = 64,
        head_width: int = 512,
        pixel_weight: float = 1.0,
        perceptual_weight: float = 0.8,
        identity_weight: float = 0.1,
        attributes_weight: float = 0.1,
        code_weight: float = 1.0,
        offset_weight: float = 0.1,
        lr: float = 1e-4,
        start: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        backbones.check_judge(identity, identity_judge)
        backbones.check_judge(attributes, attributes_judge)
        self.generator = backbones.load(generator, "generator")
        self.perceptual = backbones.load(perceptual, "perceptual")
        self.identity = backbones.load(identity, "identity")
        self.attributes = backbones.load(attributes, "attributes")
        self.identity_judge = backbones.load(identity_judge, "identity")
        self.attributes_judge = backbones.load(attributes_judge, "attributes")
        self.init = {
            "num_layers": self.generator.num_ws,
            "dim": self.generator.w_dim,
            "architecture": architecture,
            "width": width,
            "head_width": head_width,
            "size": min(self.generator.resolution, 256),
        }
        self.network = InversionEncoder(**self.init).to(memory_format=torch.channels_last)  # type: ignore[arg-type]
        if start is not None:
            self.network.load_state_dict(backbones.load(start, "inverter").state_dict())
        self.network.w_avg.copy_(self.generator.mapping.w_avg)
        self.generator_hash = backbones.weight_hash(generator)

    def setup(self, stage: str) -> None:
        """Compares the data with the judge before any work.

        Raises:
            UserError: an attribute that the data does not label.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        unknown = [name for name in self.attributes_judge.attributes if name not in data.attributes]
        if unknown:
            raise UserError(f"model.attributes_judge: {data.root} does not label {', '.join(unknown)}")
        self.labelled = [data.attributes.index(name) for name in self.attributes_judge.attributes]

    def train(self, mode: bool = True) -> "InversionTraining":
        """Frozen backbones stay in evaluation mode."""
        super().train(mode)
        for name in self.frozen:
            getattr(self, name).eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the frozen backbones out: they have files of their own."""
        state = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {key: value for key, value in state if not self._is_frozen(key)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the frozen backbones as they were loaded."""
        frozen = {key: value for key, value in self.state_dict().items() if self._is_frozen(key)}
        checkpoint["state_dict"] |= frozen

    def _is_frozen(self, key: str) -> bool:
        return key.split(".", 1)[0] in self.frozen

    def training_step(self, batch: FaceBatch, batch_idx: int) -> Tensor:
        """Reconstruction of photos, compared at the size the encoder sees, and regression of known codes."""
        drawn, codes = self.draw(len(batch))
        size = self.network.size
        photo = resize(mirror(batch.image), size)
        shared, offsets = self.network.components(torch.cat([photo, resize(drawn, size)]))
        w_plus = self.network.w_avg + shared[:, None] + offsets
        reconstruction = resize(self.generator.synthesis(w_plus[: len(batch)], noise_mode="const"), size)

        losses = {
            "pixel": F.mse_loss(reconstruction, photo),
            "perceptual": self.perceptual(reconstruction, photo).mean(),
            "identity": 1 - (self.identity(reconstruction) * self.identity(photo)).sum(1).mean(),
            "attributes": F.binary_cross_entropy_with_logits(
                self.attributes(reconstruction).float(), self.attributes(photo).float().sigmoid()
            ),
            "code": F.mse_loss(w_plus[len(batch) :], codes),
            "offset": offsets.square().mean(),
        }
        for name, value in losses.items():
            self.log(f"train/{name}", value)
        loss = torch.stack([self.hparams[f"{name}_weight"] * value for name, value in losses.items()]).sum()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Generated images (count, 3, H, W) and their codes (count, L, D)."""
        z = torch.randn(count, self.generator.z_dim, device=self.device)
        codes = self.generator.mapping(z).float()
        return self.generator.synthesis(codes, noise_mode="const").clamp(-1, 1), codes

    def validation_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """Compares photos with their reconstructions in pixels and as the judges see them."""
        self._measure(batch, "val")

    def test_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """As validation, on the test split."""
        self._measure(batch, "test")

    def _measure(self, batch: FaceBatch, split: str) -> None:
        if not batch.real.any():
            return
        image, identity = batch.image[batch.real], batch.identity[batch.real]
        inversion = self.generator.synthesis(self.network(image), noise_mode="const").clamp(-1, 1)
        inversion = resize(inversion, image.shape[-1])
        photo, inverted = self.identity_judge(image), self.identity_judge(inversion)
        other = identity[:, None] != identity
        correct = (self.attributes_judge(inversion) > 0) == (batch.attributes[batch.real][:, self.labelled] > 0.5)
        values = {
            "mse": F.mse_loss(inversion, image),
            "perceptual": self.perceptual(inversion, image).mean(),
            "identity": (photo * inverted).sum(1).mean(),
        }
        if other.any():
            values["identity_others"] = (inverted @ photo.T)[other].mean()
        values |= {
            f"accuracy/{name}": correct[:, i].float().mean() for i, name in enumerate(self.attributes_judge.attributes)
        }
        for name, value in values.items():
            self.log(f"{split}/{name}", value, batch_size=len(image), prog_bar=name == "identity")

    def configure_optimizers(self) -> Any:
        """AdamW, the rate warmed up and annealed over the whole training."""
        return one_cycle(self, self.hparams["lr"], weight_decay=0.0)

    def export(self, path: Path, card: dict[str, Any]) -> None:
        """Writes a backbone of kind ``inverter``; its card names the generator by hash."""
        card["generator"] = self.generator_hash
        backbones.save(self.network, path, "inverter", self.init, card)
