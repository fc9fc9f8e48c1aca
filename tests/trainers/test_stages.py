import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from datamodules.errors import UserError
from trainers.stages import Staged


class TwoStages(Staged):
    """Both parts are used in every step; only the stage decides which moves."""

    def __init__(self, epochs: list[int]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 1)
        self.plan_stages(epochs, [[self.first], [self.second]])
        self.seen: list[tuple[int, float, float]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.stage, self.first.weight.norm().item(), self.second.weight.norm().item()))
        return self.second(self.first(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam([{"params": self.stage_parameters(i)} for i in range(2)], lr=0.1)


class SaveWithin(pl.Callback):
    """Saves after the first of the two batches of an epoch."""

    def __init__(self, epoch: int, path) -> None:
        self.epoch, self.path = epoch, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, 0):
            trainer.save_checkpoint(self.path)


def fit(model: pl.LightningModule, epochs: int, callbacks: list[pl.Callback] | None = None, **options) -> pl.Trainer:
    trainer = pl.Trainer(
        callbacks=callbacks,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, DataLoader(torch.ones(4, 2), batch_size=2), **options)
    return trainer


def test_each_stage_moves_its_own_part_alone() -> None:
    torch.manual_seed(0)
    model = TwoStages([2])
    fit(model, 4)
    stages, first, second = zip(*model.seen, strict=True)
    assert stages == (0, 0, 0, 0, 1, 1, 1, 1)
    assert len(set(second[:5])) == 1, "the second part waits for its stage"
    assert len(set(first[:5])) == 5
    assert len(set(first[4:])) == 1, "the first part stays as its stage left it"
    assert len(set(second[4:])) == 4


def test_a_resumed_run_is_in_the_stage_it_was_in(tmp_path) -> None:
    torch.manual_seed(0)
    whole = TwoStages([1])
    fit(whole, 3)
    torch.manual_seed(0)
    fit(half := TwoStages([1]), 2).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed := TwoStages([1]), 3, ckpt_path=tmp_path / "half.ckpt")
    assert half.seen + resumed.seen == whole.seen


def test_a_run_that_resumes_within_an_epoch_freezes_what_it_froze(tmp_path) -> None:
    torch.manual_seed(0)
    whole = TwoStages([1])
    fit(whole, 3, [SaveWithin(1, tmp_path / "within.ckpt")])
    fit(resumed := TwoStages([1]), 3, ckpt_path=tmp_path / "within.ckpt")
    assert resumed.seen == whole.seen[3:]
    assert torch.equal(resumed.first.weight, whole.first.weight)


def test_what_a_system_froze_itself_stays_frozen() -> None:
    model = TwoStages([1])
    model.second.bias.requires_grad_(False)
    model.plan_stages([1], [[model.first], [model.second]])
    before = model.second.bias.clone()
    fit(model, 2)
    assert model.second.weight.requires_grad
    assert torch.equal(model.second.bias, before)
    assert not model.second.bias.requires_grad


def test_parts_shared_by_stages_stand_in_one_parameter_group() -> None:
    model = TwoStages([1])
    model.plan_stages([1], [[model.first], [model.first, model.second]])
    assert model.stage_parameters(1) == list(model.second.parameters())


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(UserError, match="expected 1 numbers above 0"):
        TwoStages([1, 1])
    with pytest.raises(UserError, match="max_epochs: 2, but the last stage of TwoStages starts after epoch 2"):
        fit(TwoStages([2]), 2)
