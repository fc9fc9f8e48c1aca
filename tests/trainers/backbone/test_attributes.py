import pytest
import pytorch_lightning as pl
import torch

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from trainers import backbones
from trainers.backbone.attributes import AttributeTraining, PerceptualTraining
from trainers.callbacks import ExportBackbone

TINY = {"architecture": "resnet10", "width": 4, "head_layers": 0, "size": 32, "lr": 1e-2}


def train(module, root, path):
    data = FaceDataModule(str(root), batch_size=8)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[ExportBackbone(str(path))],
        default_root_dir=path.parent,
    )
    trainer.fit(module, datamodule=data)
    return data


def test_trains_and_exports_with_a_card(faces_root, tmp_path):
    module = AttributeTraining(["Young", "Eyeglasses"], **TINY)
    before = module.network.heads[0][0].weight.detach().clone()
    data = train(module, faces_root, tmp_path / "a.safetensors")
    assert not torch.equal(module.network.heads[0][0].weight, before)

    spec = f"path:{tmp_path / 'a.safetensors'}"
    loaded = backbones.load(spec, "attributes")
    assert loaded.attributes == ["Young", "Eyeglasses"]
    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded(image), module.network.eval()(image))

    card = backbones.card(spec)
    assert card["data"] == {"name": "test data", "sha256": data.manifest.sha256}
    assert card["model"]["class"] == "trainers.backbone.attributes.AttributeTraining"
    assert card["model"]["width"] == 4
    assert card["training"] == {"epochs": 2, "steps": 6, "batch_size": 8, "precision": "32-true"}
    assert 0 <= card["scores"]["val/accuracy/Young"] <= 1


def test_perceptual_keeps_the_stages(faces_root, tmp_path):
    module = PerceptualTraining(["Male"], **TINY)
    train(module, faces_root, tmp_path / "p.safetensors")
    loaded = backbones.load(f"path:{tmp_path / 'p.safetensors'}", "perceptual")
    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded.stages(image), module.network.eval().stages(image))


def test_targets_follow_the_networks_order_and_age_is_ordinal(faces_root):
    module = AttributeTraining(["Young", "Age>=22", "Eyeglasses"], **TINY)
    data = FaceDataModule(str(faces_root), batch_size=6)
    module.labelled = data.attributes
    batch = next(iter(data.loader("train")))  # face i: bits of i are Eyeglasses, Male, Young; age 20 + i
    expected = [[float(i >> 2 & 1), float(i >= 2), float(i & 1)] for i in range(6)]
    assert module.targets(batch).tolist() == expected


def test_unknown_attribute_is_refused_before_training(faces_root, tmp_path):
    with pytest.raises(UserError, match="does not label Wings"):
        train(AttributeTraining(["Male", "Wings"], **TINY), faces_root, tmp_path / "x.safetensors")
