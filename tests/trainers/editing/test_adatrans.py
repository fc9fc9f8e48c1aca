import copy
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from trainers.editing.adatrans import AdaTrans, LatentTransformer, RealNVP
from trainers.tasks import load_system

GROUPS = [{"change": ["Eyeglasses"], "keep": ["Male"]}, {"change": ["Male", "Young"], "keep": ["Eyeglasses"]}]


def test_paper_scale_has_20_5_million_parameters():
    network = LatentTransformer(num_layers=18, dim=512, condition_dim=1)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(20.5, abs=0.05)


def test_carried_state_equals_encoding_the_whole_history():
    torch.manual_seed(0)
    network = LatentTransformer(num_layers=3, dim=6, condition_dim=2, width=16, blocks=2)
    for _ in range(5):
        network(torch.randn(8, 3, 6), torch.ones(8, 2), steps=3)
    network.eval()
    w_plus, condition = torch.randn(4, 3, 6), torch.randn(4, 2).sign()
    trajectory, sizes = network(w_plus, condition, steps=6)
    for step in range(6):
        features, _ = network.encode(trajectory[: step + 1])
        direction, size = network.step(features[-1], condition)
        torch.testing.assert_close(trajectory[step + 1], trajectory[step] + (size * direction)[:, None])
        torch.testing.assert_close(sizes[:, step], size[:, 0])


def test_every_layer_moves_by_the_step_sizes():
    network = LatentTransformer(num_layers=3, dim=6, condition_dim=1, width=16, blocks=2).eval()
    trajectory, sizes = network(torch.randn(4, 3, 6), torch.ones(4, 1), steps=5)
    lengths = trajectory.diff(dim=0).norm(dim=3)
    torch.testing.assert_close(lengths, sizes.T[:, :, None].expand(5, 4, 3))
    assert ((sizes > 0) & (sizes < 1)).all()


def trained_density(dim: int = 6) -> RealNVP:
    torch.manual_seed(0)
    density = RealNVP(dim, pairs=3)
    for _ in range(20):
        density(2 * torch.randn(64, dim) + 1)
    return density.eval()


def test_density_is_the_change_of_variables_formula():
    density = trained_density()
    w = torch.randn(5, 6)
    result = density(w)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(result.z).sum(1)
    jacobians = [torch.autograd.functional.jacobian(lambda x: density(x[None]).z[0], row) for row in w]
    log_det = torch.linalg.slogdet(torch.stack(jacobians)).logabsdet
    torch.testing.assert_close(result.log_det, log_det, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.nll, -(prior + log_det).mean() / 6, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(density.inverse(result.z), w, rtol=1e-4, atol=1e-4)


def test_density_learns_a_gaussian():
    torch.manual_seed(0)
    density = RealNVP(4, pairs=2)
    optimizer = torch.optim.AdamW(density.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(300):
        loss = density(3 * torch.randn(256, 4) + 5).nll
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = torch.distributions.Normal(5.0, 3.0).entropy()
    with torch.no_grad():
        nll = density.eval()(3 * torch.randn(4096, 4) + 5).nll
    assert float(nll) == pytest.approx(float(entropy), abs=0.05)


def make(tiny: dict[str, str], **changes) -> AdaTrans:
    settings = {
        "groups": GROUPS,
        "strengths": [1, 3],
        "generator": tiny["generator"],
        "inverter": tiny["inverter"],
        "guide": tiny["attributes"],
        "identity": tiny["identity"],
        "perceptual": tiny["perceptual"],
        "steps": 2,
        "width": 16,
        "blocks": 2,
        "density_pairs": 2,
        "density_epochs": 1,
        "render_batch": 4,
        "learning_rate": 1e-2,
    }
    return AdaTrans(**{**settings, **changes})


def fit(system: AdaTrans, root: Path, folder: Path, epochs: int) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder
    )
    trainer.fit(system, datamodule=FaceDataModule(str(root), batch_size=8))
    trainer.save_checkpoint(folder / "last.ckpt")
    return trainer


class Recorder(pl.Callback):
    """Weights at the end of each epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.states.append(copy.deepcopy(pl_module.state_dict()))


def test_density_is_trained_first_and_fixed_then(tiny, faces_root, tmp_path):
    torch.manual_seed(0)
    system, recorder = make(tiny), Recorder()
    before = copy.deepcopy(system.state_dict())
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=[recorder],
    )
    trainer.fit(system, datamodule=FaceDataModule(str(faces_root), batch_size=8))

    def changed(first: dict, second: dict) -> set[str]:
        return {key.split(".")[0] for key in first if not torch.equal(first[key], second[key])}

    assert changed(before, recorder.states[0]) == {"density"}
    assert changed(recorder.states[0], recorder.states[1]) == {"transformers"}
    assert changed(recorder.states[1], recorder.states[2]) == {"transformers"}
    assert not any(key.startswith(("generator", "guide", "identity")) for key in before)
    assert len(system.encoded) >= 16  # a last batch of one is left out
    for loss in ("recon", "attribute", "nll", "identity", "perceptual"):
        assert f"train/{loss}_Male_Young" in trainer.callback_metrics


def test_edit_survives_the_checkpoint(tiny, faces_root, tmp_path):
    torch.manual_seed(0)
    system = make(tiny)
    fit(system, faces_root, tmp_path, epochs=2)
    restored, system = load_system(tmp_path / "last.ckpt"), system.eval()
    w_plus, target = torch.randn(3, 8, 8), torch.tensor([1.0, -1.0, 1.0])
    for name in ("Eyeglasses", "Male", "Young"):
        edited = restored.edit(w_plus, name, target, 3)
        torch.testing.assert_close(edited, system.edit(w_plus, name, target, 3))
        assert edited.shape == w_plus.shape
    with pytest.raises(UserError, match="edits Eyeglasses, Male, Young"):
        restored.edit(w_plus, "Bald", target, 1)


def test_other_attributes_of_the_group_are_told_as_they_are(tiny):
    torch.manual_seed(0)
    system = make(tiny).eval()
    w_plus = system.generator.mapping(torch.randn(6, 8))
    seen = system.guide(system.synthesise(w_plus))[:, [0, 1]].sign()
    target = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    condition = torch.stack([seen[:, 0], target], 1)
    expected, _ = system.transformers[1](w_plus, condition, 2)
    torch.testing.assert_close(system.edit(w_plus, "Young", target, 2), expected[-1])


def test_bad_settings_are_clear_errors(tiny, faces_root, tmp_path):
    with pytest.raises(UserError, match="expected numbers of steps"):
        make(tiny, strengths=[0.5])
    with pytest.raises(UserError, match="does not know 'Bald'"):
        make(tiny, groups=[{"change": ["Male"], "keep": ["Bald"]}])
    with pytest.raises(UserError, match="'Male' appears twice"):
        make(tiny, groups=[{"change": ["Male"], "keep": []}, {"change": ["Male"], "keep": []}])
    with pytest.raises(UserError, match=r"expected \{change"):
        make(tiny, groups=[{"edit": ["Male"]}])
    with pytest.raises(UserError, match="first 1 epochs only train the density"):
        fit(make(tiny), faces_root, tmp_path, epochs=1)
