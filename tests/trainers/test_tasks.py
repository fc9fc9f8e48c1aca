import pytest
import torch
from torch import nn

from datamodules.errors import UserError
from trainers.tasks import System, SystemInfo, load_system, registry


class Toy(System):
    info = SystemInfo("toy", "Toy", "speech-to-mesh", "nobody", 2026, "", "reconstruction")
    frozen = ("borrowed",)

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.borrowed = nn.Dropout()
        self.borrowed_norm = nn.Linear(width, width)
        self.own = nn.Linear(width, width)


class ToyWithWeights(Toy):
    def __init__(self, width: int = 2) -> None:
        super().__init__(width)
        self.borrowed = nn.BatchNorm1d(width)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.tasks.registry", lambda: {"toy": ToyWithWeights})
    system = ToyWithWeights(3)
    stored = {"state_dict": system.state_dict()}
    system.on_save_checkpoint(stored)
    path = tmp_path / "toy.ckpt"
    torch.save(stored, path)
    return path, system, stored


def test_every_registered_system_says_what_it_is():
    for name, system in registry().items():
        assert system.info.name == name
        assert system.info.url.startswith("https://")
        assert system.__module__.endswith(name)


def test_frozen_parts_are_not_stored_and_stay_in_evaluation_mode():
    system = ToyWithWeights()
    assert not any(key.startswith("borrowed.") for key in system.state_dict())
    assert {"own.weight", "borrowed_norm.weight"} <= set(system.state_dict()), "a prefix of a name is another name"
    assert not system.train().borrowed.training
    assert system.own.training


def test_a_checkpoint_rebuilds_its_system(checkpoint):
    path, system, _ = checkpoint
    loaded = load_system(path)
    assert not loaded.training
    torch.testing.assert_close(loaded.own.weight, system.own.weight)


def test_checkpoints_that_are_none_or_of_others_are_refused(checkpoint, tmp_path):
    path, _, stored = checkpoint
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(UserError, match=r"text\.ckpt: not a readable facebench checkpoint"):
        load_system(tmp_path / "text.ckpt")
    torch.save({**stored, "facebench": {"system": "strange", "init": {}}}, path)
    with pytest.raises(UserError, match="system 'strange' is not installed; known: toy"):
        load_system(path)


def test_missing_weights_are_an_error_and_never_random(checkpoint):
    path, _, stored = checkpoint
    del stored["state_dict"]["own.weight"]
    torch.save(stored, path)
    with pytest.raises(UserError, match=r"weights do not fit Toy \(1 missing, 0 unexpected, first 'own.weight'\)"):
        load_system(path)


def test_a_checkpoint_cannot_run_code(checkpoint, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    path, _, stored = checkpoint
    torch.save({**stored, "extra": Trap()}, path)
    with pytest.raises(UserError, match="not a readable facebench checkpoint"):
        load_system(path)
    assert not (tmp_path / "trapped").exists()
