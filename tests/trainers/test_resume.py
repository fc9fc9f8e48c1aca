"""Real processes: two ranks over gloo, killed and started again, against two that were left alone."""

import csv
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from trainers.cli import LAST, RunCLI
from trainers.predictions import read_description, read_vertices

# Kills both ranks at once, as a node that loses power would. The first one says what every step was trained on.
KILLER = """
import os, signal
import pytorch_lightning as pl
import torch.distributed

class Killer(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        keys = [batch.key]
        if trainer.world_size > 1:
            keys = [None] * trainer.world_size
            torch.distributed.all_gather_object(keys, batch.key)
        if trainer.is_global_zero:
            with open(os.path.join(trainer.default_root_dir, "keys.txt"), "a") as file:
                print(trainer.current_epoch, *[key for of_rank in keys for key in of_rank], file=file)
        trainer.save_checkpoint(os.path.join(trainer.default_root_dir, "checkpoints", "last.ckpt"))
        if trainer.global_step == int(os.environ["KILL_AT"]) and trainer.is_global_zero:
            os.killpg(0, signal.SIGKILL)
"""
TWO_RANKS = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
# Six clips, one by one: three steps of two ranks are an epoch. A worker reads ahead of what was trained on.
BATCHES = ["--data.init_args.batch_size", "1", "--data.init_args.num_workers", "1"]
KILLED_AT = 4  # one step into the second epoch


class Runs:
    """Starts facebench in a session of its own."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.config, self.folder = config, folder
        (folder / "killer.py").write_text(KILLER)

    def __call__(self, verb: str, run: str, *more: str, kill_at: int = 0) -> int:
        environment = {
            **os.environ,
            "PYTHONPATH": f"{self.folder}:{Path.cwd()}",
            "KILL_AT": str(kill_at),
            "OMP_NUM_THREADS": "1",
        }
        command = [
            sys.executable,
            "-m",
            "facebench",
            verb,
            "--config",
            str(self.config),
            "--run",
            str(self.folder / run),
        ]
        done = subprocess.run(
            [*command, *more], env=environment, capture_output=True, check=False, start_new_session=True, timeout=300
        )
        self.said = done.stderr.decode()
        return done.returncode

    def fit(self, run: str, *more: str, kill_at: int = 0) -> int:
        return self("fit", run, *more, *BATCHES, "--trainer.callbacks+", "killer.Killer", kill_at=kill_at)

    def keys(self, run: str) -> list[list[str]]:
        """Of every step its epoch and the keys it was trained on."""
        return [line.split() for line in (self.folder / run / "keys.txt").read_text().splitlines()]

    def state(self, run: str) -> dict:
        return torch.load(self.folder / run / LAST, weights_only=True)


@pytest.fixture(scope="module")
def runs(voca_config, tmp_path_factory) -> Runs:
    """Two ranks: one run that was left alone, and one that was killed."""
    runs = Runs(voca_config, tmp_path_factory.mktemp("ddp"))
    assert runs.fit("whole", *TWO_RANKS) == 0, runs.said
    assert runs.fit("killed", *TWO_RANKS, kill_at=KILLED_AT) == -9
    assert runs.state("killed")["global_step"] == KILLED_AT
    shutil.copytree(runs.folder / "killed", runs.folder / "on-one-rank")
    return runs


def test_two_killed_ranks_end_with_the_weights_of_two_that_were_not(runs):
    assert runs.fit("killed", *TWO_RANKS) == 0, runs.said
    assert runs.keys("killed") == runs.keys("whole")
    assert len(runs.keys("whole")) == 9
    expected, found = (runs.state(run)["state_dict"] for run in ("whole", "killed"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_one_rank_goes_on_where_two_were_killed(runs, voca_config, monkeypatch):
    monkeypatch.syspath_prepend(runs.folder)
    monkeypatch.setenv("KILL_AT", "0")
    run = runs.folder / "on-one-rank"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="resumed in the middle")  # nothing is lost, so nothing is said
        RunCLI(
            ["fit", "--config", str(voca_config), "--run", str(run), *BATCHES, "--trainer.callbacks+", "killer.Killer"]
        )
    clips = sorted(key for step in runs.keys("whole")[:3] for key in step[1:])
    assert len(clips) == 6
    steps = runs.keys("on-one-rank")
    assert steps[: KILLED_AT - 1] == runs.keys("whole")[: KILLED_AT - 1]
    assert [step[0] for step in steps[KILLED_AT:]] == ["1"] * 4 + ["2"] * 6
    for epoch in ("1", "2"):
        assert sorted(key for step in steps if step[0] == epoch for key in step[1:]) == clips


@pytest.mark.slow
def test_evaluation_on_two_ranks_gives_what_one_gives(runs, voca_config, talking_root):
    """Three clips on two ranks: one of them gets a stand-in, which is neither counted nor written."""
    assert runs("predict", "whole", *TWO_RANKS, *BATCHES) == 0, runs.said
    (runs.folder / "whole" / "predictions").rename(runs.folder / "both")
    both = runs.folder / "both"
    cli = RunCLI(["predict", "--config", str(voca_config), "--run", str(runs.folder / "whole"), *BATCHES])
    alone = runs.folder / "whole" / "predictions"
    keys = [key for shard in cli.datamodule.manifest.split("test") for key in shard.keys]
    assert read_description(both)["keys"] == read_description(alone)["keys"] == keys
    assert sorted(path.name for path in both.iterdir()) == sorted([*(f"{key}.npy" for key in keys), "predictions.json"])
    for key in keys:
        assert (read_vertices(both, key) == read_vertices(alone, key)).all()

    rows = list(csv.DictReader((runs.folder / "whole" / "logs" / "metrics-1.csv").open()))
    logged = [float(row["val/lve_l2_mm"]) for row in rows if row.get("val/lve_l2_mm")]
    cli = RunCLI(["validate", "--config", str(voca_config), "--run", str(runs.folder / "whole"), *BATCHES])
    assert cli.trainer.callback_metrics["val/lve_l2_mm"].item() == pytest.approx(logged[-1], rel=1e-5)
