"""One LightningCLI for the command line, the suites and the sweeps, and the run folder that it writes.

A run is a folder::

    config.yaml        the resolved configuration
    environment.json   versions, code commit, processor
    checkpoints/       last.ckpt: the state for resuming
    logs/              metrics.csv (metrics-1.csv ... from before a resume), TensorBoard events, wandb files

Running the same command again on the same folder resumes it; nothing in it depends on time or host.
"""

import importlib.util
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentError
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from datamodules.datamodule import ShardDataModule
from datamodules.errors import UserError, parsing_error
from datamodules.shards import write_atomic
from trainers.predictions import PredictionWriter, gather

LAST = Path("checkpoints") / "last.ckpt"


class RunState(pl.Callback):
    """Saves the state for resuming, with what Lightning leaves out: random states and the seconds trained so far.

    ``ModelCheckpoint(train_time_interval=...)`` would never save a system with manual optimisation (Lightning 2.6).

    Args:
        interval: seconds from one checkpoint to the next.
    """

    def __init__(self, interval: float = 30.0) -> None:
        self.interval = interval
        self.saved = 0.0
        self.seconds = 0.0
        self.started = 0.0
        self.restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the random states back when a run resumes, and the place in the epoch where the ranks are others."""
        self.started = self.saved = time.monotonic()
        if self.restored is not None:
            states = self.restored["random"]
            state = states[trainer.global_rank % len(states)]
            torch.set_rng_state(state["torch"])
            layout, internal, gauss = state["python"]
            random.setstate((layout, tuple(internal), gauss))
            name, keys, *rest = state["numpy"]
            np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
            # Lightning counts batches of a rank; another number of ranks has other ones left.
            current = trainer.fit_loop.epoch_loop.batch_progress.current
            moved = trainer.train_dataloader.position - current.ready  # type: ignore[union-attr]
            for name in ("ready", "started", "processed", "completed"):
                setattr(current, name, getattr(current, name) + moved)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Saves on all ranks when the first one's clock says so."""
        if trainer.strategy.broadcast(time.monotonic() - self.saved >= self.interval):
            self.saved = time.monotonic()
            trainer.save_checkpoint(Path(trainer.default_root_dir) / LAST)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The finished state, so that running again finds nothing left to do."""
        trainer.save_checkpoint(Path(trainer.default_root_dir) / LAST)

    def state_dict(self) -> dict[str, Any]:
        """Seconds of training and the state of each rank's random generators, in plain containers."""
        name, keys, *rest = np.random.get_state(legacy=True)
        layout, internal, gauss = random.getstate()
        state = {
            "torch": torch.get_rng_state(),
            "python": [layout, list(internal), gauss],
            "numpy": [name, np.asarray(keys).tolist(), *rest],
        }
        return {"seconds": self.seconds + time.monotonic() - self.started, "random": gather(state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Called by Lightning before training goes on."""
        self.seconds = state["seconds"]
        self.restored = state


class RunCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` of one system on one data set, in one run folder."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            pl.LightningModule,
            ShardDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=1,
            save_config_callback=None,
            trainer_defaults={"use_distributed_sampler": False, "enable_checkpointing": False},
            parser_kwargs={
                "exit_on_error": False,
                **{verb: {"prog": f"facebench {verb}", "exit_on_error": False} for verb in self.subcommands()},
            },
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run folder and the loggers."""
        parser.add_argument("--run", type=str, required=True, help="run folder; an existing one is resumed")
        parser.add_argument(
            "--log",
            type=list[Literal["csv", "tensorboard", "wandb"]],
            default=["csv"],
            help="where metrics go; wandb is offline unless a key is configured",
        )

    def before_instantiate_classes(self) -> None:
        """Sets the run folder up and finds the checkpoint to go on from."""
        config = self.config[self.subcommand]
        run = Path(config.run)
        config.trainer.default_root_dir = str(run)
        last = run / LAST
        if config.ckpt_path is not None and not Path(config.ckpt_path).is_file():
            raise UserError(f"--ckpt_path {config.ckpt_path}: no such checkpoint; 'facebench fit' writes {last}")
        if config.ckpt_path is None and last.is_file():
            config.ckpt_path = str(last)
        if config.ckpt_path is None and self.subcommand != "fit":
            raise UserError(
                f"{last}: no checkpoint to {self.subcommand}; run 'facebench fit' first or give --ckpt_path"
            )
        config.weights_only = True
        if self.subcommand == "predict":
            config.return_predictions = False
        if self.subcommand == "fit":
            run.mkdir(parents=True, exist_ok=True)
            parser = self._parser(self.subcommand)
            write_atomic(run / "config.yaml", parser.dump(config, skip_none=False).encode())
            write_atomic(run / "environment.json", json.dumps(environment(), indent=1).encode())

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses what the caller gave; Lightning would warn that the command line says something too."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise parsing_error(error) from error

    def _parse_ckpt_path(self) -> None:
        """Lightning would put the checkpoint's system in the place of the config's without a word."""

    def instantiate_classes(self) -> None:
        """As Lightning's; but jsonargparse wraps what a data module raises, and the user's mistake is inside."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Adds the run folder's loggers and checkpoints to what the config asks for."""
        config = self.config[self.subcommand]
        run = Path(config.run)
        callbacks: list[pl.Callback] = [RunState()]
        if self.subcommand == "predict":
            callbacks.append(PredictionWriter(run / "predictions"))
        self.trainer_defaults["callbacks"] = callbacks
        return super().instantiate_trainer(logger=loggers(run, config.log), **kwargs)


def loggers(run: Path, names: list[str]) -> list[Logger]:
    """The loggers of a run, all below ``run/logs``."""
    made: list[Logger] = []
    if "csv" in names:
        _keep_earlier_metrics(run / "logs" / "metrics.csv")
        made.append(CSVLogger(run, name="", version="logs"))
    if "tensorboard" in names:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError("--log tensorboard: the package tensorboard is not installed; pip install tensorboard")
        made.append(TensorBoardLogger(run, name="", version="logs"))
    if "wandb" in names:
        # Without a key wandb would ask at a prompt; a job on a cluster has nobody to answer.
        has_key = "WANDB_API_KEY" in os.environ or (Path.home() / ".netrc").is_file()
        (run / "logs").mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE", "online" if has_key else "offline")
        made.append(WandbLogger(name=run.name, id=run.name, save_dir=run / "logs", mode=mode, resume="allow"))
    return made


@rank_zero_only
def _keep_earlier_metrics(metrics: Path) -> None:
    """Lightning would delete what the run logged before it was resumed."""
    if metrics.is_file():
        metrics.rename(metrics.with_stem(f"metrics-{len(list(metrics.parent.glob('metrics*.csv')))}"))


def environment() -> dict[str, Any]:
    """What a reader needs to repeat a run: versions, commit, machine."""
    packages = ("torch", "pytorch-lightning", "transformers", "webdataset", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: version(name) for name in packages},
        "commit": code_commit(),
    }


def code_commit() -> str | None:
    """The commit of the code in use; None outside a checkout."""
    here = Path(__file__).resolve().parent
    found = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def peak_memory_mb() -> float:
    """Most memory this process has held, in megabytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
