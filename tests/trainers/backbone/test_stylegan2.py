import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from metrics.distribution import frechet_distance, mean_and_covariance
from trainers import backbones
from trainers.backbone.stylegan2 import (
    SampleQuality,
    StyleGAN2,
    augment_colour,
    augment_translation,
    discriminator_fake_loss,
    discriminator_real_loss,
    generator_loss,
    path_length_penalty,
    r1_penalty,
)
from trainers.callbacks import ExportBackbone
from trainers.cli import LAST, RunState

TINY = {"resolution": 32, "z_dim": 8, "w_dim": 8, "channel_base": 128, "channel_max": 16, "mapping_layers": 2}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def train(module: StyleGAN2, faces_root, run, ckpt_path=None, **options) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=run,
        **options,
    )
    data = FaceDataModule(str(faces_root), batch_size=4)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)


def test_losses_are_binary_cross_entropy():
    logits = torch.randn(5, 1)
    real, fake = torch.ones(5, 1), torch.zeros(5, 1)

    def entropy(target):
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none")

    torch.testing.assert_close(generator_loss(logits), entropy(real))
    torch.testing.assert_close(discriminator_real_loss(logits), entropy(real))
    torch.testing.assert_close(discriminator_fake_loss(logits), entropy(fake))


def test_r1_of_a_quadratic_discriminator():
    image = torch.randn(3, 2, 4, 4, requires_grad=True)
    weight = torch.randn(2, 4, 4, requires_grad=True)
    logits = (weight * image.square()).sum(dim=(1, 2, 3)).unsqueeze(1)
    penalty = r1_penalty(logits, image)
    torch.testing.assert_close(penalty, (2 * weight * image).square().sum(dim=(1, 2, 3)))
    penalty.sum().backward()
    torch.testing.assert_close(weight.grad, (8 * weight * image.square()).sum(dim=0))


def test_path_length_of_a_linear_generator():
    matrix = torch.randn(3 * 4 * 4, 2 * 5, requires_grad=True)
    ws = torch.randn(6, 2, 5, requires_grad=True)
    noise = torch.randn(6, 3, 4, 4)
    image = (ws.flatten(1) @ matrix.t()).view(6, 3, 4, 4)
    penalty, mean = path_length_penalty(image, ws, torch.tensor(2.0), decay=0.1, noise=noise)
    gradient = (noise.flatten(1) / 4) @ matrix
    lengths = gradient.view(6, 2, 5).square().sum(dim=2).mean(dim=1).sqrt()
    torch.testing.assert_close(mean, 0.9 * 2.0 + 0.1 * lengths.mean())
    torch.testing.assert_close(penalty, (lengths - mean).square())


def test_translation_moves_each_image_and_fills_with_black():
    image = torch.randn(8, 3, 16, 16)
    moved = augment_translation(image)
    for before, after in zip(image.numpy(), moved.numpy(), strict=True):
        padded = np.pad(before, ((0, 0), (2, 2), (2, 2)))
        shifts = [padded[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
        assert sum(np.array_equal(after, shift) for shift in shifts) == 1
    assert len({tuple(np.argwhere(m[0] == 0)[:1].flatten()) for m in moved.numpy()}) > 1


def test_colour_changes_keep_the_structure():
    image = torch.rand(8, 3, 4, 4) * 2 - 1
    changed = augment_colour(image)
    # One brightness per image: the mean moves by less than a half; and what was grey stays grey.
    assert (changed - image).mean(dim=(1, 2, 3)).abs().max() <= 0.5
    grey = augment_colour(image[:, :1].expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey[:, 0], grey[:, 2])


@pytest.mark.parametrize("augmentation", [augment_colour, augment_translation])
def test_augmentations_can_be_differentiated_twice(augmentation):
    image = torch.randn(4, 3, 16, 16, requires_grad=True)
    logits = augmentation(image).square().sum(dim=(1, 2, 3)).unsqueeze(1)
    r1_penalty(logits, image).sum().backward()
    assert image.grad.abs().sum() > 0


def test_every_part_learns_and_the_export_is_the_averaged_generator(faces_root, tmp_path):
    module = StyleGAN2(**TINY, pl_interval=2, r1_interval=2, augment=["colour", "translation"], ema_kimg=0.01)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    path = tmp_path / "generator.safetensors"
    train(module, faces_root, tmp_path, callbacks=[ExportBackbone(str(path))])
    for name, tensor in module.state_dict().items():
        constant = name.endswith("noise_const")
        assert torch.equal(before[name], tensor) == constant, name
    z = torch.randn(2, 8)
    expected = module.averaged(z, noise_mode="const")
    loaded = backbones.load(f"path:{path}", "generator")
    torch.testing.assert_close(loaded(z, noise_mode="const"), expected)
    assert not torch.allclose(expected, module.generator(z, noise_mode="const"))


def test_averaged_generator_halves_its_distance_in_one_half_life(faces_root, tmp_path):
    module = StyleGAN2(**TINY, ema_kimg=0.008, sample_every_kimg=1)
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    torch.nn.init.zeros_(module.averaged.synthesis.b4.const)
    module.update_averaged(4)
    module.update_averaged(4)
    torch.testing.assert_close(module.averaged.synthesis.b4.const, module.generator.synthesis.b4.const / 2)
    assert int(module.images_seen) == 8


def test_lazy_regularisation_corrects_adam():
    generator, discriminator = StyleGAN2(**TINY, lr=0.002).configure_optimizers()
    for optimiser, ratio in ((generator, 4 / 5), (discriminator, 16 / 17)):
        group = optimiser.param_groups[0]
        assert math.isclose(group["lr"], 0.002 * ratio)
        assert group["betas"] == (0.0, 0.99**ratio)


def test_regularisers_run_when_their_turn_comes(faces_root, tmp_path, monkeypatch):
    module = StyleGAN2(**TINY, pl_interval=2, r1_interval=3)
    calls = []
    monkeypatch.setattr(module, "regularise_generator", lambda *_: calls.append("path length"))
    monkeypatch.setattr(module, "regularise_discriminator", lambda *_: calls.append("r1"))
    train(module, faces_root, tmp_path, limit_train_batches=4)
    assert calls == ["path length", "r1", "path length", "r1"]


def test_resumed_training_is_the_same_training(faces_root, tmp_path):
    torch.manual_seed(1)
    whole = StyleGAN2(**TINY)
    train(whole, faces_root, tmp_path)

    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("killed")

    torch.manual_seed(1)
    with pytest.raises(RuntimeError, match="killed"):
        train(StyleGAN2(**TINY), faces_root, tmp_path, callbacks=[RunState(interval=0), Kill()])
    resumed = StyleGAN2(**TINY)
    train(resumed, faces_root, tmp_path, ckpt_path=tmp_path / LAST, callbacks=[RunState()])
    assert int(resumed.images_seen) == int(whole.images_seen) == 17
    for (name, first), second in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(first, second), name


def test_sample_quality_is_the_distance_of_features(faces_root, tmp_path, monkeypatch):
    seen = []

    class Judge(torch.nn.Module):
        def features(self, image):
            seen.append(image)
            return F.adaptive_avg_pool2d(image, 1).flatten(1)

    monkeypatch.setattr(backbones, "load", lambda spec, kind: Judge())
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[SampleQuality("demo:judge")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    (scores,) = trainer.validate(StyleGAN2(**TINY), FaceDataModule(str(faces_root), batch_size=2), verbose=False)
    real, fake = (torch.cat(seen[i::2]).mean(dim=(2, 3)) for i in (0, 1))
    assert len(real) == len(fake) == 4
    expected = frechet_distance(*mean_and_covariance(real), *mean_and_covariance(fake))
    assert scores["val/frechet_distance"] == pytest.approx(expected.item(), rel=1e-4)


def test_saves_pictures_of_samples(faces_root, tmp_path):
    train(StyleGAN2(**TINY, sample_every_kimg=0.004), faces_root, tmp_path, limit_train_batches=1)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["000000.png"]


def test_images_of_another_size_are_refused(faces_root, tmp_path):
    with pytest.raises(UserError, match=r"model.resolution: 64, but .* holds images of 32 pixels"):
        train(StyleGAN2(**{**TINY, "resolution": 64}), faces_root, tmp_path)
