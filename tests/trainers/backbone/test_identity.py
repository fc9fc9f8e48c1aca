import math

import pytest
import pytorch_lightning as pl
import torch
from scipy.stats import norm

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from trainers import backbones
from trainers.backbone.identity import IdentityTraining, margin_logits, verification
from trainers.callbacks import ExportBackbone

TINY = {"dim": 8, "architecture": "resnet10", "width": 4, "size": 32}


def test_arcface_adds_the_margin_to_the_angle():
    angle = torch.tensor([[0.3, 1.0, 2.0], [2.5, 0.1, 1.2]], dtype=torch.float64)
    identity = torch.tensor([1, 0])
    expected = angle.clone()
    expected[0, 1] += 0.5
    expected[1, 0] += 0.5
    logits = margin_logits(angle.cos(), identity, margin=0.5, scale=64, kind="arcface")
    torch.testing.assert_close(logits, 64 * expected.cos())


def test_arcface_never_rewards_a_larger_angle():
    cosine = torch.cos(torch.linspace(0, math.pi, 200, dtype=torch.float64))[:, None]
    logits = margin_logits(cosine, torch.zeros(200, dtype=torch.int64), margin=0.5, scale=1, kind="arcface")
    assert (logits[:, 0].diff() < 0).all()


def test_cosface_subtracts_the_margin_from_the_cosine():
    cosine = torch.tensor([[0.9, 0.1]])
    logits = margin_logits(cosine, torch.tensor([0]), margin=0.35, scale=10, kind="cosface")
    torch.testing.assert_close(logits, torch.tensor([[5.5, 1.0]]))


def test_verification_of_two_normals():
    generator = torch.Generator().manual_seed(0)
    same = torch.arange(40_000) % 2 == 0
    similarity = torch.randn(40_000, generator=generator) + 2.0 * same
    auc, error = verification(similarity, same)
    assert auc == pytest.approx(norm.cdf(2 / math.sqrt(2)), abs=5e-3)
    assert error == pytest.approx(norm.cdf(-1), abs=5e-3)


def fit(module, root, path):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[ExportBackbone(str(path))],
        default_root_dir=path.parent,
    )
    trainer.fit(module, datamodule=FaceDataModule(str(root), batch_size=8))


def test_trains_and_exports(faces_root, tmp_path):
    module = IdentityTraining(num_identities=9, alike=["Young"], **TINY)
    fit(module, faces_root, tmp_path / "i.safetensors")
    spec = f"path:{tmp_path / 'i.safetensors'}"
    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(backbones.load(spec, "identity")(image), module.network.eval()(image))
    assert {"val/auc", "val/eer", "val/auc_alike"} <= set(backbones.card(spec)["scores"])


def test_wrong_number_of_identities_and_unknown_attribute(faces_root, tmp_path):
    with pytest.raises(UserError, match=r"num_identities: 5, but .* trains on 9"):
        fit(IdentityTraining(num_identities=5, **TINY), faces_root, tmp_path / "i.safetensors")
    with pytest.raises(UserError, match=r"alike.*does not label Wings"):
        fit(IdentityTraining(num_identities=9, alike=["Wings"], **TINY), faces_root, tmp_path / "i.safetensors")
