import pytest
import pytorch_lightning as pl
import torch

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from trainers import backbones
from trainers.backbone.inversion import InversionTraining
from trainers.callbacks import ExportBackbone
from trainers.nets.face_encoders import AttributeClassifier, IdentityEncoder, PerceptualDistance
from trainers.nets.stylegan2 import Generator

TINY = {"architecture": "resnet10", "width": 4, "head_width": 8}


@pytest.fixture
def parts(tmp_path):
    """Untrained frozen networks on disk: specification of each."""
    torch.manual_seed(0)
    trunk = {"architecture": "resnet10", "width": 4, "size": 32}
    made = {
        "generator": ("generator", Generator, {"z_dim": 8, "w_dim": 8, "resolution": 32, "channel_base": 128}),
        "perceptual": ("perceptual", PerceptualDistance, trunk),
        "identity": ("identity", IdentityEncoder, {"dim": 8, **trunk}),
        "identity_judge": ("identity", IdentityEncoder, {"dim": 6, **trunk}),
        "attributes": ("attributes", AttributeClassifier, {"attributes": ["Young"], "head_layers": 0, **trunk}),
        "attributes_judge": ("attributes", AttributeClassifier, {"attributes": ["Male"], "head_layers": 0, **trunk}),
    }
    for name, (kind, network, init) in made.items():
        backbones.save(network(**init), tmp_path / f"{name}.safetensors", kind, init, {})
    return {name: f"path:{tmp_path / name}.safetensors" for name in made}


def test_trains_exports_and_leaves_the_frozen_alone(parts, faces_root, tmp_path):
    module = InversionTraining(**parts, **TINY)
    frozen = {name: [t.clone() for t in getattr(module, name).state_dict().values()] for name in module.frozen}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[ExportBackbone(str(tmp_path / "inverter.safetensors"))],
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=FaceDataModule(str(faces_root), batch_size=4))
    for name, before in frozen.items():
        after = getattr(module, name).state_dict().values()
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), name

    spec = f"path:{tmp_path / 'inverter.safetensors'}"
    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(backbones.load(spec, "inverter")(image), module.network.eval()(image))
    card = backbones.card(spec)
    assert card["generator"] == backbones.weight_hash(parts["generator"])
    assert {"val/mse", "val/identity", "val/identity_others", "val/accuracy/Male"} <= set(card["scores"])


def test_drawn_images_are_those_of_their_codes(parts):
    module = InversionTraining(**parts, **TINY)
    image, codes = module.draw(3)
    again = module.generator.synthesis(codes, noise_mode="const").clamp(-1, 1)
    torch.testing.assert_close(image, again)
    assert codes.shape == (3, module.generator.num_ws, 8)


def test_starts_from_the_generators_mean_code(parts):
    module = InversionTraining(**parts, **TINY)
    torch.testing.assert_close(module.network.w_avg, module.generator.mapping.w_avg)


def test_the_guide_may_not_judge(parts):
    with pytest.raises(UserError, match="judge with another one"):
        InversionTraining(**{**parts, "identity_judge": parts["identity"]}, **TINY)
    with pytest.raises(UserError, match="judge with another one"):
        InversionTraining(**{**parts, "attributes_judge": parts["attributes"]}, **TINY)


def test_starts_from_another_inverter_but_keeps_its_generators_mean(parts, tmp_path):
    first = InversionTraining(**parts, **TINY)
    first.network.w_avg.fill_(7)
    first.export(tmp_path / "first.safetensors", {})
    second = InversionTraining(**parts, **TINY, start=f"path:{tmp_path / 'first.safetensors'}")
    for ours, theirs in zip(second.network.parameters(), first.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(second.network.w_avg, second.generator.mapping.w_avg)


def test_a_resumed_training_keeps_the_frozen_as_given(parts):
    first, second = InversionTraining(**parts, **TINY), InversionTraining(**parts, **TINY)
    checkpoint = {"state_dict": first.state_dict()}
    first.on_save_checkpoint(checkpoint)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"network"}
    second.on_load_checkpoint(checkpoint)
    second.load_state_dict(checkpoint["state_dict"])
    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(second.network.eval()(image), first.network.eval()(image))
