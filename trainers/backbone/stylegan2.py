"""Training of StyleGAN2, the image prior behind the text-to-face and face-editing systems.

Paper: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020 (configuration F).
Losses, lazy regularisation, style mixing and the averaged generator follow the official PyTorch code
(https://github.com/NVlabs/stylegan3), which the recorded losses and gradients in the tests come from.

Deliberate differences:

* Augmentation against a memorising discriminator is DiffAugment's colour and translation (Zhao et al., NeurIPS
  2020) at a fixed strength, not ADA.
* Mixed precision is bfloat16 autocast, which needs no clamping; R1 and path length run in float32.
"""

import math
import time
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import save_image

from datamodules.batches import FaceBatch
from datamodules.errors import UserError
from metrics.distribution import FrechetDistance
from trainers import backbones
from trainers.backbone.augmentation import mirror
from trainers.nets.stylegan2 import Discriminator, Generator


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating logistic loss of the generator, per sample; logits (B, 1)."""
    return F.softplus(-fake_logits)


def discriminator_fake_loss(fake_logits: Tensor) -> Tensor:
    """Logistic loss of the discriminator on generated images, per sample; logits (B, 1)."""
    return F.softplus(fake_logits)


def discriminator_real_loss(real_logits: Tensor) -> Tensor:
    """Logistic loss of the discriminator on real images, per sample; logits (B, 1)."""
    return F.softplus(-real_logits)


def r1_penalty(real_logits: Tensor, image: Tensor) -> Tensor:
    """Squared norm of the discriminator's gradient at real images (Mescheder et al., ICML 2018).

    Args:
        real_logits: (B, 1), computed from `image`.
        image: (B, C, H, W) that requires gradients.

    Returns:
        (B,), to be weighted by gamma / 2.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), image, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3))


def path_length_penalty(image: Tensor, ws: Tensor, mean: Tensor, decay: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps the length of image changes per step in w constant (Section 3.2).

    Args:
        image: (B, C, H, W), synthesised from `ws`.
        ws: (B, num_ws, w_dim) that require gradients.
        mean: (), the running mean of lengths.
        decay: how far this batch moves the mean.
        noise: (B, C, H, W), standard normal.

    Returns:
        The penalty (B,) and the moved mean (). The penalty's gradient passes through the moved mean.
    """
    direction = noise / math.sqrt(image.shape[2] * image.shape[3])
    (gradient,) = torch.autograd.grad((image * direction).sum(), ws, create_graph=True)
    lengths = gradient.square().sum(dim=2).mean(dim=1).sqrt()
    mean = mean.lerp(lengths.mean(), decay)
    return (lengths - mean).square(), mean


def augment_colour(image: Tensor) -> Tensor:
    """DiffAugment's random brightness, saturation and contrast of ``image: (B, 3, H, W)``, one draw per sample."""
    brightness, saturation, contrast = torch.rand(3, len(image), 1, 1, 1, device=image.device)
    image = image + (brightness - 0.5)
    grey = image.mean(dim=1, keepdim=True)
    image = (image - grey) * (saturation * 2) + grey
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    return (image - mean) * (contrast + 0.5) + mean


def augment_translation(image: Tensor, ratio: float = 1 / 8) -> Tensor:
    """DiffAugment's random shift by up to `ratio` of the size, black beyond the border, one draw per sample."""
    B, _, H, W = image.shape
    reach_y, reach_x = int(H * ratio + 0.5), int(W * ratio + 0.5)
    dy = torch.randint(-reach_y, reach_y + 1, (B, 1, 1), device=image.device)
    dx = torch.randint(-reach_x, reach_x + 1, (B, 1, 1), device=image.device)
    rows = (torch.arange(H, device=image.device)[None, :, None] + dy + 1).clamp(0, H + 1)
    columns = (torch.arange(W, device=image.device)[None, None, :] + dx + 1).clamp(0, W + 1)
    samples = torch.arange(B, device=image.device)[:, None, None]
    padded = F.pad(image, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    return padded[samples, rows, columns].permute(0, 3, 1, 2)


MBSTD_GROUP = 4
AUGMENTATIONS = {"colour": augment_colour, "translation": augment_translation}


class StyleGAN2(pl.LightningModule):
    """Trains a generator and a discriminator on face images, without labels.

    Args:
        resolution: of the images, a power of two.
        z_dim: size of the input latent.
        w_dim: size of w.
        channel_base: feature maps times resolution.
        channel_max: at most this many feature maps.
        mapping_layers: fully connected layers from z to w.
        lr: of Adam, before the correction for lazy regularisation.
        r1_gamma: weight of R1.
        r1_interval: discriminator steps from one R1 to the next.
        pl_weight: weight of the path length.
        pl_interval: generator steps from one path length to the next.
        pl_decay: of the running mean of path lengths.
        pl_batch_shrink: the path length sees this fraction of the batch.
        style_mixing: chance that a batch mixes two styles.
        ema_kimg: half-life of the averaged generator, thousands of images.
        ema_rampup: at most this fraction of the images seen so far is the half-life; null: no ramp.
        mirror: flip real images at random.
        augment: augmentations seen by the discriminator: ``colour``, ``translation``.
        sample_every_kimg: thousands of images from one picture of samples to the next.
    """

    pl_mean: Tensor
    images_seen: Tensor
    sample_z: Tensor

    def __init__(
        self,
        resolution: int = 1024,
        z_dim: int = 512,
        w_dim: int = 512,
        channel_base: int = 32768,
        channel_max: int = 512,
        mapping_layers: int = 8,
        lr: float = 0.002,
        r1_gamma: float = 10.0,
        r1_interval: int = 16,
        pl_weight: float = 2.0,
        pl_interval: int = 4,
        pl_decay: float = 0.01,
        pl_batch_shrink: int = 2,
        style_mixing: float = 0.9,
        ema_kimg: float = 10.0,
        ema_rampup: float | None = None,
        mirror: bool = True,
        augment: list[Literal["colour", "translation"]] | None = None,
        sample_every_kimg: float = 20.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator_init: dict[str, Any] = {
            "resolution": resolution,
            "z_dim": z_dim,
            "w_dim": w_dim,
            "channel_base": channel_base,
            "channel_max": channel_max,
            "mapping_layers": mapping_layers,
        }
        self.generator = Generator(**self.generator_init)
        self.averaged = Generator(**self.generator_init).eval().requires_grad_(False)
        self.averaged.load_state_dict(self.generator.state_dict())
        self.discriminator = Discriminator(resolution=resolution, channel_base=channel_base, channel_max=channel_max)
        self.augmentations = [AUGMENTATIONS[name] for name in augment or []]
        self.register_buffer("pl_mean", torch.zeros([]))
        self.register_buffer("images_seen", torch.zeros([], dtype=torch.int64))
        drawn = torch.randn(64, z_dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("sample_z", drawn, persistent=False)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for both, with rate and betas corrected for the extra step of each regulariser (Appendix B)."""

        def adam(network: torch.nn.Module, interval: int) -> torch.optim.Optimizer:
            ratio = interval / (interval + 1)
            return torch.optim.Adam(
                network.parameters(), lr=self.hparams["lr"] * ratio, betas=(0.0, 0.99**ratio), eps=1e-8
            )

        return [
            adam(self.generator, self.hparams["pl_interval"]),
            adam(self.discriminator, self.hparams["r1_interval"]),
        ]

    def setup(self, stage: str) -> None:
        """Compares the data with the network before any work.

        Raises:
            UserError: another image size.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.size != self.hparams["resolution"]:
            raise UserError(
                f"model.resolution: {self.hparams['resolution']}, but {data.root} holds images of {data.size} pixels"
            )

    def on_train_start(self) -> None:
        """Starts the clock behind ``seconds_per_kimg`` and lets each rank draw latents of its own."""
        self.clock = time.perf_counter()
        if self.trainer.world_size > 1:
            torch.manual_seed(int(torch.randint(2**31, [])) + self.trainer.global_rank)

    def training_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """One step of each network, and each regulariser when its turn comes."""
        hparams = self.hparams
        optimise_generator, optimise_discriminator = self.optimizers()  # type: ignore[misc, attr-defined]
        real = mirror(batch.image) if hparams["mirror"] else batch.image
        # An epoch's last batch may be short; the minibatch deviation needs whole groups.
        real = real[: len(real) // MBSTD_GROUP * MBSTD_GROUP or len(real)]
        step = self.trainer.fit_loop.total_batch_idx

        with self.toggled_optimizer(optimise_generator):
            logits = self.discriminator(self.augment(self.generate(len(real))))
            loss = generator_loss(logits).mean()
            self.step(optimise_generator, loss)
            self.log("train/generator_loss", loss, prog_bar=True)
            if step % hparams["pl_interval"] == 0:
                self.regularise_generator(optimise_generator, max(1, len(real) // hparams["pl_batch_shrink"]))

        with self.toggled_optimizer(optimise_discriminator):
            with torch.no_grad():
                fake = self.generate(len(real), update_average=True)
            fake_logits = self.discriminator(self.augment(fake))
            real_logits = self.discriminator(self.augment(real))
            loss = (discriminator_fake_loss(fake_logits) + discriminator_real_loss(real_logits)).mean()
            self.step(optimise_discriminator, loss)
            self.log("train/discriminator_loss", loss, prog_bar=True)
            if step % hparams["r1_interval"] == 0:
                self.regularise_discriminator(optimise_discriminator, real)

        self.log("train/fake_score", fake_logits.mean())
        self.log("train/real_score", real_logits.mean())
        # Rises from 0 towards 1 as the discriminator memorises the training images (Karras et al. 2020, ADA).
        self.log("train/real_sign", real_logits.sign().mean(), prog_bar=True)
        self.update_averaged(len(real))

    def validation_step(self, batch: FaceBatch, batch_idx: int) -> Tensor:
        """As many images of the averaged generator as the batch holds, in [-1, 1], for callbacks to judge."""
        z = torch.randn(len(batch), self.hparams["z_dim"], device=self.device)
        return self.averaged(z).clamp(-1, 1)

    def generate(self, count: int, update_average: bool = False) -> Tensor:
        """Draws images (count, 3, H, W) with mixed styles and fresh noise."""
        z = torch.randn(2, count, self.hparams["z_dim"], device=self.device)
        ws = self.generator.mapping(z[0], update_average=update_average)
        if torch.rand([]) < self.hparams["style_mixing"]:
            crossover = int(torch.randint(1, self.generator.num_ws, []))
            ws = torch.cat([ws[:, :crossover], self.generator.mapping(z[1])[:, crossover:]], dim=1)
        return self.generator.synthesis(ws)

    def augment(self, image: Tensor) -> Tensor:
        """What the discriminator sees of an image, real or not."""
        for augmentation in self.augmentations:
            image = augmentation(image)
        return image

    def step(self, optimiser: Any, loss: Tensor) -> None:
        """One update."""
        optimiser.zero_grad()
        self.manual_backward(loss)
        optimiser.step()

    def regularise_generator(self, optimiser: Any, count: int) -> None:
        """Path-length step, weighted for its rarity."""
        with torch.autocast(self.device.type, enabled=False):
            ws = self.generator.mapping(torch.randn(count, self.hparams["z_dim"], device=self.device))
            image = self.generator.synthesis(ws)
            penalty, mean = path_length_penalty(
                image, ws, self.pl_mean, self.hparams["pl_decay"], torch.randn_like(image)
            )
            self.step(optimiser, penalty.mean() * (self.hparams["pl_weight"] * self.hparams["pl_interval"]))
        self.pl_mean.copy_(mean.detach())
        self.log("train/path_length", mean)

    def regularise_discriminator(self, optimiser: Any, real: Tensor) -> None:
        """R1 step, weighted for its rarity."""
        with torch.autocast(self.device.type, enabled=False):
            image = real.detach().clone().requires_grad_()
            penalty = r1_penalty(self.discriminator(self.augment(image)), image)
            weight = self.hparams["r1_gamma"] / 2 * self.hparams["r1_interval"]
            self.step(optimiser, penalty.mean() * weight)
        self.log("train/r1", penalty.mean())

    @torch.no_grad()
    def update_averaged(self, count: int) -> None:
        """Moves the averaged generator and counts images."""
        count = count * self.trainer.world_size
        before = int(self.images_seen)
        self.images_seen += count
        half_life = self.hparams["ema_kimg"] * 1000
        if self.hparams["ema_rampup"] is not None:
            half_life = min(half_life, before * self.hparams["ema_rampup"])
        keep = 0.5 ** (count / max(half_life, 1e-8))
        averaged: list[Tensor] = list(self.averaged.parameters())
        current: list[Tensor] = list(self.generator.parameters())
        torch._foreach_lerp_(averaged, current, 1 - keep)
        for buffer, source in zip(self.averaged.buffers(), self.generator.buffers(), strict=True):
            buffer.copy_(source)

        every = self.hparams["sample_every_kimg"] * 1000
        if int(self.images_seen) // every > before // every:
            self.report(every)

    def report(self, images: float) -> None:
        """Logs the speed since the last report and saves a picture of samples in the run folder."""
        now = time.perf_counter()
        self.log("train/seconds_per_kimg", (now - self.clock) / images * 1000)
        self.log("train/kimg", self.images_seen / 1000)
        self.clock = now
        if self.trainer.is_global_zero:
            folder = Path(self.trainer.default_root_dir) / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            samples = self.averaged(self.sample_z, noise_mode="const").clamp(-1, 1)
            name = f"{int(self.images_seen) // 1000:06d}.png"
            save_image(samples, folder / name, nrow=8, normalize=True, value_range=(-1, 1), padding=1)

    def export(self, path: Path, card: dict[str, Any]) -> None:
        """Writes the averaged generator as a backbone of kind ``generator``."""
        backbones.save(self.averaged, path, "generator", self.generator_init, card)


class SampleQuality(pl.Callback):
    """Logs ``val/frechet_distance`` between the validation images and as many drawn ones.

    Args:
        judge: backbone specification of the attribute classifier whose features are compared. With the demo
            weights the value is no FID in the usual sense, and compares only with values of the same judge.
    """

    def __init__(self, judge: str) -> None:
        self.judge = backbones.load(judge, "attributes")

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts from nothing."""
        self.judge.to(pl_module.device)
        self.distance: FrechetDistance | None = None

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: FaceBatch, *_: Any
    ) -> None:
        """Adds one batch of both sides."""
        for images, real in ((batch.image, True), (outputs, False)):
            features = self.judge.features(images)  # type: ignore[operator]
            if self.distance is None:
                self.distance = FrechetDistance(features.shape[1]).to(pl_module.device)
            self.distance.update(features, real=real)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the distance over all ranks."""
        if self.distance is not None:
            pl_module.log("val/frechet_distance", self.distance.compute().float())
