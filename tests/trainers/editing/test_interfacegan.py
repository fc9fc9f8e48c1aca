from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from trainers.editing.interfacegan import InterFaceGAN, choose_extremes, move, project_boundary, train_boundary
from trainers.tasks import load_system


@pytest.fixture
def rng() -> np.random.RandomState:
    return np.random.RandomState(0)


def test_boundary_of_a_linear_attribute_is_its_direction(rng):
    direction = rng.randn(16)
    direction /= np.linalg.norm(direction)
    codes = rng.randn(5000, 16).astype(np.float32)
    normal, accuracy = train_boundary(codes, codes @ direction, rng, chosen=0.1)
    assert normal @ direction > 0.98
    assert np.linalg.norm(normal) == pytest.approx(1)
    assert accuracy == 1


def test_extremes_are_the_highest_and_lowest_scores(rng):
    codes = np.arange(100.0)[:, None]
    scores = codes[:, 0].copy()
    scores[99] = -99
    train_x, train_y, val_x, val_y = choose_extremes(codes, scores, 0.1, 0.7, rng, invalid=-99)
    assert train_y.tolist() == [1] * 6 + [0] * 6
    assert val_y.tolist() == [1] * 3 + [0] * 3
    assert sorted(np.concatenate([train_x, val_x])[:, 0]) == [*range(9), *range(90, 99)]


def test_projection_is_orthogonal_and_closest(rng):
    normal, *conditions = rng.randn(5, 12)
    for count in (1, 2, 3, 4):
        kept = np.stack(conditions[:count])
        projected = project_boundary(normal, kept)
        assert np.linalg.norm(projected) == pytest.approx(1)
        assert np.abs(kept @ projected).max() < 1e-9
        basis = np.linalg.svd(kept)[2][count:]
        assert projected @ normal == pytest.approx(np.linalg.norm(basis @ normal))


def test_distance_in_w_and_offset_in_w_plus():
    normal = torch.tensor([0.6, 0.8])
    codes, distance = torch.randn(5, 2), torch.linspace(-2, 2, 5)
    torch.testing.assert_close(move(codes, normal, distance) @ normal, distance)
    w_plus = torch.randn(5, 3, 2)
    shift = move(w_plus, normal, distance) - w_plus
    torch.testing.assert_close(shift, (distance[:, None] * normal)[:, None].expand(5, 3, 2))


def make(tiny: dict[str, str], **changes) -> InterFaceGAN:
    settings = {
        "attributes": ["Eyeglasses", "Male"],
        "strengths": [1.0, 2.0],
        "generator": tiny["generator"],
        "inverter": tiny["inverter"],
        "guide": tiny["attributes"],
        "chosen": 0.2,
    }
    return InterFaceGAN(**{**settings, **changes})


def fit(system: InterFaceGAN, root: Path, folder: Path, epochs: int = 10) -> pl.Trainer:
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder
    )
    trainer.fit(system, datamodule=FaceDataModule(str(root), batch_size=8))
    trainer.save_checkpoint(folder / "last.ckpt")
    return trainer


def test_fit_finds_directions_that_raise_the_guides_score(tiny, faces_root, tmp_path):
    system = make(tiny, conditional=False)
    trainer = fit(system, faces_root, tmp_path)
    w_plus = system.generator.mapping(torch.randn(64, 8))
    for name in system.attributes:
        column = system.guide.attributes.index(name)
        low, high = (
            system.guide(system.synthesise(system.edit(w_plus, name, torch.full((64,), sign), 1.0)))
            for sign in (-1.0, 1.0)
        )
        assert (high - low)[:, column].mean() > 0
        assert trainer.callback_metrics[f"val/boundary_accuracy_{name}"] > 0.7


def test_edit_survives_the_checkpoint_and_keeps_conditions(tiny, faces_root, tmp_path):
    system = make(tiny)
    fit(system, faces_root, tmp_path)
    plain = make(tiny, conditional=False)
    fit(plain, faces_root, tmp_path / "plain")
    assert abs(system.boundaries[0] @ plain.boundaries[1]) < 1e-5

    restored = load_system(tmp_path / "last.ckpt")
    w_plus, target = torch.randn(2, 8, 8), torch.tensor([1.0, -1.0])
    edited = restored.edit(w_plus, "Male", target, 2.0)
    torch.testing.assert_close(edited, system.edit(w_plus, "Male", target, 2.0))
    torch.testing.assert_close((edited - w_plus).norm(dim=2), torch.full((2, 8), 2.0))
    with pytest.raises(UserError, match="edits Eyeglasses, Male"):
        restored.edit(w_plus, "Bald", target, 1.0)


def test_bad_settings_are_clear_errors(tiny, faces_root, tmp_path):
    with pytest.raises(UserError, match="does not know Bald"):
        make(tiny, attributes=["Bald"])
    with pytest.raises(UserError, match=r"model\.chosen: 0\.02 of 17 codes leaves none"):
        fit(make(tiny, chosen=0.02), faces_root, tmp_path, epochs=1)
