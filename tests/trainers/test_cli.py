import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from datamodules.errors import UserError
from facebench.__main__ import main
from trainers.cli import LAST, RunCLI, loggers

# Kills its own process, as an operator or a power cut would, after a given number of batches.
KILLER = """
import os, signal
import pytorch_lightning as pl

class Killer(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        trainer.save_checkpoint(os.path.join(trainer.default_root_dir, "checkpoints", "last.ckpt"))
        if trainer.global_step == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
"""


def fit(config, run, *more):
    return RunCLI(["fit", "--config", str(config), "--run", str(run), *more])


def weights(run):
    return torch.load(run / LAST, weights_only=True)["state_dict"]


def test_a_run_folder_holds_what_repeats_it(voca_config, tmp_path):
    fit(voca_config, tmp_path / "run")
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["seed_everything"] == 1
    assert written["model"]["init_args"]["components"] == 4
    assert (tmp_path / "run" / "environment.json").is_file()
    rows = list(csv.DictReader((tmp_path / "run" / "logs" / "metrics.csv").open()))
    assert any(row.get("val/lve_l2_mm") for row in rows)


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(voca_config, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        fit(voca_config, tmp_path / name, "--seed_everything", seed)
    first, same, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("kill_at", [2, 3, 7])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(voca_config, tmp_path, kill_at):
    (tmp_path / "killer.py").write_text(KILLER)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}", "KILL_AT": str(kill_at)}
    command = ["fit", "--config", str(voca_config), "--run", str(tmp_path / "killed")]
    killer = [sys.executable, "-m", "facebench", *command, "--trainer.callbacks+", "killer.Killer"]
    killed = subprocess.run(killer, env=environment, capture_output=True, check=False)
    assert killed.returncode == -9
    assert torch.load(tmp_path / "killed" / LAST, weights_only=True)["global_step"] == kill_at

    fit(voca_config, tmp_path / "killed")
    fit(voca_config, tmp_path / "whole")
    resumed, whole = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_what_was_logged_before_a_resume_is_kept(voca_config, tmp_path):
    fit(voca_config, tmp_path / "run", "--trainer.max_epochs", "1")
    before = (tmp_path / "run" / "logs" / "metrics.csv").read_text()
    fit(voca_config, tmp_path / "run")
    assert (tmp_path / "run" / "logs" / "metrics-1.csv").read_text() == before


def test_predicting_needs_a_checkpoint(voca_config, tmp_path):
    with pytest.raises(UserError, match=r"last\.ckpt: no checkpoint to predict"):
        RunCLI(["predict", "--config", str(voca_config), "--run", str(tmp_path)])


def test_a_typo_in_a_config_is_named_before_work_starts(voca_config, tmp_path, capsys):
    config = tmp_path / "typo.yaml"
    config.write_text(voca_config.read_text().replace("components:", "componets:"))
    assert main(["fit", "--config", str(config), "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "option 'componets': trainers.speech.voca.VOCA has none of that name" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--model.init_args.num_vertices", "99", r"model.num_vertices: 99, but .* holds meshes of 12 vertices"),
        ("--model.init_args.subjects", "[x]", r"model.subjects: \['x'\], but .* trains on"),
        ("--data.init_args.root", "nowhere", "nowhere: no such data folder"),
        ("--model.init_args.encoder", "demo:nothing", "backbone 'demo:nothing': no such weights"),
        ("--model.init_args.unseen", "fixed:9", "model.unseen: 'fixed:9'"),
    ],
)
def test_what_does_not_fit_is_one_error_before_training(voca_config, tmp_path, option, value, says):
    with pytest.raises(UserError, match=says):
        fit(voca_config, tmp_path / "run", option, value)


def test_the_checkpoint_of_another_system_is_refused(voca_config, tmp_path):
    fit(voca_config, tmp_path / "run", "--trainer.max_epochs", "1")
    config = yaml.safe_load(voca_config.read_text())
    config["model"]["class_path"] = "trainers.speech.faceformer.FaceFormer"
    del config["model"]["init_args"]["components"]
    (tmp_path / "faceformer.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="is one of 'voca', expected 'faceformer'"):
        fit(tmp_path / "faceformer.yaml", tmp_path / "again", "--ckpt_path", str(tmp_path / "run" / LAST))


def test_a_checkpoint_that_is_not_there_is_refused(voca_config, tmp_path):
    with pytest.raises(UserError, match=r"--ckpt_path nowhere.ckpt: no such checkpoint"):
        fit(voca_config, tmp_path / "run", "--ckpt_path", "nowhere.ckpt")


def test_wandb_stays_offline_and_asks_nothing_without_a_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (logger,) = loggers(tmp_path / "run", ["wandb"])
    logger.log_metrics({"a": 1.0})
    logger.experiment.finish()
    assert list((tmp_path / "run" / "logs").rglob("*.wandb"))
