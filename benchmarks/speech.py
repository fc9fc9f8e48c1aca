"""Every speech-to-mesh system at the size of its demo recipe: speed at 5, 20 and 60 seconds, memory, a training step.

Needs the demo corpus (``facebench data demo --out data/demo``). Each system trains one step in each of its stages, so
that what it fits to data is there, in a process of its own. The rows:

- "N s of speech": the seconds that ``animate`` takes, beside those of its speech encoder alone; the ratio is the
  real-time factor, seconds of motion made in a second.
- "60 s / 20 s": growth of the cost, the encoder's left out. Three is linear. Self-attention over the whole clip, the
  encoder's too, grows faster; ``facebench animate`` cuts recordings longer than a minute into pieces.
- "memory": the most that the process ever held at 60 s and at 5 s.
- "training step": a step with 8 clips against 8 steps with one, in the last stage.
"""

import importlib
import multiprocessing
import resource
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml

from benchmarks.table import Row, growth, median_seconds, run, speedup
from datamodules.batches import SpeechBatch
from datamodules.speech import SpeechDataModule
from trainers.measuring import joined, split_clips
from trainers.tasks import SpeechToMesh

ROOT = "data/demo/talking"
RECIPES = Path("configs") / "demo"
LENGTHS = (5, 20, 60)
RATE = 16_000


def recipes() -> list[Path]:
    """Demo recipes of speech-to-mesh systems."""
    paths = sorted(RECIPES.glob("*.yaml"))
    return [path for path in paths if _model(path)["class_path"].startswith("trainers.speech.")]


def build(recipe: Path) -> SpeechToMesh:
    """The recipe's system after one training step in each stage."""
    model = _model(recipe)
    module, _, name = model["class_path"].rpartition(".")
    arguments = dict(model["init_args"])
    stages = len(arguments.get("stage_epochs", []))
    if stages:
        arguments["stage_epochs"] = [1] * stages
    torch.manual_seed(0)
    system = getattr(importlib.import_module(module), name)(**arguments)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=stages + 1,
        limit_train_batches=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(system, datamodule=SpeechDataModule(ROOT, batch_size=2))
    return system.eval()


def clip_of(seconds: int) -> SpeechBatch:
    """A test clip said over and over until it lasts so long."""
    clip = next(split_clips(SpeechDataModule(ROOT, batch_size=1)))
    frames, samples = seconds * 30, seconds * RATE
    once = clip.audio.shape[1] / RATE
    turns = range(int(seconds / once) + 1)

    def again(spoken: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
        return [(w, s + once * i, e + once * i) for i in turns for w, s, e in spoken if e + once * i <= seconds]

    return replace(
        clip,
        audio=clip.audio.repeat(1, len(turns))[:, :samples],
        audio_lengths=torch.tensor([samples]),
        vertices=clip.template[:, None].expand(-1, frames, -1, -1),
        lengths=torch.tensor([frames]),
        weights=torch.zeros(1, frames, clip.weights.shape[-1]),
        words=[again(clip.words[0])],
        phonemes=[again(clip.phonemes[0])],
        pose=torch.zeros(1, frames, 3),
    )


def rows(recipe: Path) -> list[Row]:
    """What one system takes."""
    system, name, found = build(recipe), recipe.stem, []
    network, memory = {}, {}
    with torch.inference_mode():
        for seconds in LENGTHS:
            clip = clip_of(seconds)
            whole, heard = median_seconds(partial(system.animate, clip), partial(system.encode, clip), repeats=3)
            network[seconds], memory[seconds] = whole - heard, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            found.append(Row(f"{name}: {seconds} s of speech, all / encoder", whole, heard, seconds / whole, "s"))
    found.append(growth(f"{name}: 60 s / 20 s, without encoder", network[60], network[20]))
    found.append(growth(f"{name}: memory at 60 s / at 5 s", memory[60], memory[5], unit="MB"))
    found.append(training_step(name, system))
    return found


def training_step(name: str, system: SpeechToMesh) -> Row:
    """Forward and backward pass; systems that step their own optimisers do that too."""
    system.log = system.log_dict = lambda *args, **kwargs: None  # type: ignore[assignment]  # no trainer to log to
    clips = [
        clip for clip, _ in zip(split_clips(SpeechDataModule(ROOT, batch_size=1), "train"), range(8), strict=False)
    ]
    together = joined(clips)
    system.train()

    def step(batch: SpeechBatch) -> None:
        system.zero_grad()
        loss = system.training_step(batch, 0)
        if isinstance(loss, torch.Tensor):
            loss.backward()

    def one_by_one() -> None:
        for clip in clips:
            step(clip)

    eight, one = median_seconds(partial(step, together), one_by_one, repeats=3)
    return speedup(f"{name}: training step, 8 x batch 1 / batch 8", eight, one)


def measure() -> Iterator[Row]:
    """All systems, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    for recipe in recipes():
        with context.Pool(1) as pool:
            yield from pool.apply(rows, (recipe,))


def _model(recipe: Path) -> dict[str, Any]:
    return yaml.safe_load(recipe.read_text())["model"]


if __name__ == "__main__":
    run("Speech to mesh", measure)
