"""What every speech-to-mesh system promises, checked on its demo config with a second of training in each stage."""

import importlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers.tasks import SpeechToMesh, SpeechToRig, load_system, registry

CONFIGS = Path(__file__).parents[3] / "configs"


def read_config(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["model"]


def system_class(model: dict[str, Any]) -> type:
    module, _, name = model["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def speech_configs(folder: str) -> list[Path]:
    paths = sorted((CONFIGS / folder).glob("*.yaml"))
    return [path for path in paths if read_config(path)["class_path"].startswith("trainers.speech.")]


def weights_of(system: SpeechToMesh) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in system.named_parameters()}


class OneBatch(pl.Callback):
    """Keeps the loss of every epoch, one step long, and the weights before and after it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_fit_start(self, trainer, pl_module) -> None:
        self.weights.append(weights_of(pl_module))

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.weights.append(weights_of(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) and "loss" in outputs else torch.zeros(())
        self.losses.append(float(loss))


def short_trainer(epochs: int, **options: Any) -> pl.Trainer:
    """A trainer of one step an epoch."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        accelerator="cpu", max_epochs=epochs, limit_train_batches=1, enable_checkpointing=False, **quiet, **options
    )


@pytest.fixture(scope="module", params=speech_configs("demo"), ids=lambda path: path.stem)
def trained(request, head_root, prompts_root, tmp_path_factory) -> tuple[SpeechToMesh, Path, OneBatch]:
    """The system of a demo config after one step in each of its stages, and its checkpoint."""
    model = read_config(request.param)
    arguments = dict(model["init_args"])
    stages = len(arguments.get("stage_epochs", []))
    if stages:
        arguments["stage_epochs"] = [1] * stages
    if "prompts" in arguments:
        arguments["prompts"] = str(prompts_root)
    torch.manual_seed(0)
    system = system_class(model)(**arguments)
    seen = OneBatch()
    trainer = short_trainer(stages + 1, limit_val_batches=0, callbacks=[seen])
    trainer.fit(system, datamodule=SpeechDataModule(str(head_root), batch_size=3))
    path = tmp_path_factory.mktemp("checkpoint") / "last.ckpt"
    trainer.save_checkpoint(path)
    return system.eval(), path, seen


@pytest.fixture(scope="module")
def batch(head_root) -> SpeechBatch:
    """Clips of different lengths of a speaker never seen; each system takes from it what its conditions say."""
    found = next(iter(SpeechDataModule(str(head_root), batch_size=4).loader("test")))
    assert len(set(found.lengths.tolist())) > 1
    return found


def animated(system: SpeechToMesh, batch: SpeechBatch) -> torch.Tensor:
    with torch.inference_mode():
        return system.animate(batch)


def test_every_registered_system_has_a_demo_and_a_paper_config() -> None:
    speech = {f"{cls.__module__}.{cls.__name__}" for cls in registry().values() if cls.info.task == "speech-to-mesh"}
    for folder in ("demo", "systems"):
        assert speech <= {read_config(path)["class_path"] for path in speech_configs(folder)}, folder


def test_every_stage_trains(trained) -> None:
    system, _, seen = trained
    assert len(seen.losses) == len(system.hparams.get("stage_epochs", [])) + 1
    assert all(torch.isfinite(torch.tensor(seen.losses)))
    assert all(torch.isfinite(parameter).all() for parameter in system.parameters())


STAGES = {
    "meshtalk": [{"audio_encoder", "expression_encoder", "fusion", "unet"}, {"prior"}],
    "codetalker": [{"autoencoder"}, {"decoder"}],
    "cstalk": [{"correlation"}, {"generator"}],
    "expclip": [{"space"}, {"generator"}],
    "geneface": [{"expert"}, {"vae"}],
    "adamesh": [{"expression", "codec"}, {"gpt"}],
    "probtalk3d": [{"prior"}, {"predictor"}],
}


def test_every_stage_trains_its_own_parts_alone(trained) -> None:
    system, _, seen = trained
    for number, (before, after) in enumerate(pairwise(seen.weights)):
        moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        if system.info.name in STAGES:
            assert moved == STAGES[system.info.name][number]
        else:
            assert moved


def test_every_stage_trains_in_bfloat16_and_after_a_validation(trained, head_root) -> None:
    system, _, seen = trained
    again = type(system)(**dict(system.hparams))
    trainer = short_trainer(len(seen.losses), precision="bf16-mixed", limit_val_batches=1)
    trainer.fit(again, datamodule=SpeechDataModule(str(head_root), batch_size=3))
    assert all(torch.isfinite(parameter).all() for parameter in again.parameters())


def test_a_clip_is_animated_alike_alone_and_in_a_padded_batch(trained, batch) -> None:
    system, _, _ = trained
    together = animated(system, batch)
    assert together.shape == batch.vertices.shape
    for i, length in enumerate(batch.lengths.tolist()):
        alone = animated(system, batch.clip(i))[0]
        torch.testing.assert_close(together[i, :length], alone, rtol=0, atol=1e-5)


def test_animation_follows_the_sound_and_never_looks_at_the_truth(trained, batch) -> None:
    system, _, _ = trained
    clip = batch.clip(0)
    honest = animated(system, clip)
    assert torch.isfinite(honest).all()
    blind = replace(
        clip,
        vertices=torch.full_like(clip.vertices, torch.nan),
        weights=torch.full_like(clip.weights, torch.nan),
        pose=torch.full_like(clip.pose, torch.nan),
    )
    assert torch.equal(animated(system, blind), honest)
    assert torch.equal(animated(system, clip), honest), "the same clip gives the same motion again"
    other = replace(clip, audio=clip.audio.flip(1))
    assert not torch.equal(animated(system, other), honest), "another sound gives another motion"


def test_a_minute_of_speech(trained, batch) -> None:
    system, _, _ = trained
    clip = batch.clip(0)
    frames, words = 1800, [[(f"word{i}", i / 2, i / 2 + 0.5) for i in range(120)]]
    samples = frames * 16_000 // 30
    audio = clip.audio.repeat(1, samples // clip.audio.shape[1] + 1)[:, :samples]
    long = replace(
        clip,
        audio=audio,
        audio_lengths=torch.tensor([samples]),
        vertices=clip.template[:, None].expand(-1, frames, -1, -1),
        lengths=torch.tensor([frames]),
        weights=torch.zeros(1, frames, clip.weights.shape[-1]),
        pose=torch.zeros(1, frames, 3),
        words=words,
        phonemes=[[("m", 0.0, 60.0)]],
    )
    moved = animated(system, long)
    assert moved.shape == (1, frames, *clip.template.shape[1:])
    assert torch.isfinite(moved).all()


def test_a_checkpoint_rebuilds_the_system(trained, batch) -> None:
    system, path, _ = trained
    assert torch.equal(animated(load_system(path), batch), animated(system, batch))


def test_rig_systems_give_the_controls_behind_their_mesh(trained, batch) -> None:
    system, _, _ = trained
    if not isinstance(system, SpeechToRig):
        pytest.skip("not in the space of a rig")
    with torch.inference_mode():
        controls = system.control(batch)
    assert controls.shape == batch.weights.shape
    torch.testing.assert_close(system.rig(batch.template, controls), animated(system, batch))


def test_references_adapt_a_copy_or_are_refused(trained, batch) -> None:
    system, _, _ = trained
    before = animated(system, batch)
    if "reference" in system.conditions:
        adapted = system.adapt(batch)
        assert not torch.equal(animated(adapted, batch), before)
        assert torch.equal(animated(system, batch), before), "the system itself stays as it was"
    else:
        with pytest.raises(UserError, match="takes no reference clip"):
            system.adapt(batch)
