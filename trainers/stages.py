"""Training in stages within one run: first this part, then, with that frozen, the next."""

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
from torch import nn

from datamodules.errors import UserError


class Staged(pl.LightningModule):
    """Mixin of a system that trains in stages; each has its epochs and its modules, all others are frozen meanwhile.

    The stage follows from the epoch alone, so a resumed run is in the stage it was in. One optimiser holds all modules:
    what is frozen has no gradient and is not moved. Several GPUs need ``ddp_find_unused_parameters_true``.

    A system calls :meth:`plan_stages` at the end of its constructor and looks at :attr:`stage` in its training step.
    """

    def plan_stages(self, epochs: list[int], modules: list[list[nn.Module]]) -> None:
        """Says what is trained when.

        Args:
            epochs: of every stage but the last, which lasts to the end of the run.
            modules: those that each stage trains; what of them the system has frozen stays so.

        Raises:
            UserError: another number of stages, or one without epochs.
        """
        if len(epochs) != len(modules) - 1 or any(count < 1 for count in epochs):
            raise UserError(
                f"model.stage_epochs: {epochs}, expected {len(modules) - 1} numbers above 0, one for each stage but "
                "the last"
            )
        self._borders = [sum(epochs[: i + 1]) for i in range(len(epochs))]
        # Not what the system froze itself, such as the lower part of its speech encoder.
        self._stage_parameters = [[p for p in _parameters(stage) if p.requires_grad] for stage in modules]

    @property
    def stage(self) -> int:
        """Number of the current stage, from 0."""
        return sum(self.current_epoch >= border for border in self._borders)

    def enter_stage(self) -> None:
        """Freezes what the current stage does not train."""
        trained = {id(parameter) for parameter in self._stage_parameters[self.stage]}
        for parameters in self._stage_parameters:
            for parameter in parameters:
                parameter.requires_grad_(id(parameter) in trained)

    def on_train_start(self) -> None:
        """Enters the stage; a run that resumes within an epoch starts no epoch here.

        Raises:
            UserError: the run would end before its last stage.
        """
        limit = self.trainer.max_epochs
        if limit is not None and 0 <= limit <= self._borders[-1]:
            raise UserError(
                f"trainer.max_epochs: {limit}, but the last stage of {type(self).__name__} starts after epoch "
                f"{self._borders[-1]}; set it higher or model.stage_epochs lower"
            )
        self.enter_stage()

    def on_train_epoch_start(self) -> None:
        """Enters the stage."""
        self.enter_stage()
        self.log("train/stage", float(self.stage))

    def stage_parameters(self, stage: int) -> list[nn.Parameter]:
        """What a stage trains and no earlier one did: a parameter group for the optimiser."""
        earlier = {id(parameter) for parameters in self._stage_parameters[:stage] for parameter in parameters}
        return [p for p in self._stage_parameters[stage] if id(p) not in earlier]


def _parameters(modules: Iterable[nn.Module]) -> list[Any]:
    return [parameter for module in modules for parameter in module.parameters()]
