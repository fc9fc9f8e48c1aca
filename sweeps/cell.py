"""One cell of a suite, in a process of its own: fit, predict, score, make media. ``python -m sweeps.cell``.

Every step is skipped when it was done, and ``fit`` resumes from its last checkpoint.
"""

import fcntl
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch

from datamodules.shards import Manifest, write_atomic
from datamodules.speech import SpeechDataModule
from metrics.protocols import Protocol
from metrics.scoring import Scores
from sweeps.bounds import bounds
from sweeps.media import write_media
from sweeps.people import people
from sweeps.results import Result, write_results
from sweeps.score import score
from sweeps.suite import PROGRESS, Cell
from trainers.cli import LAST, RunCLI, code_commit, peak_memory_mb
from trainers.predictions import read_description
from trainers.tasks import SpeechToMesh, load_system

SERIES = "series.json"
COSTS = "costs.json"


class ProgressLines(pl.Callback):
    """Prints how far training and prediction are, for the suite's progress bars."""

    def __init__(self) -> None:
        self.printed = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Share of the steps, or of the time where that is the limit."""
        self._print(trainer.global_step / trainer.estimated_stepping_batches, "fit")

    def on_predict_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Share of the batches."""
        self._print((args[3] + 1) / trainer.num_predict_batches[0], "predict")

    def _print(self, fraction: float, what: str) -> None:
        if time.monotonic() - self.printed > 1:
            self.printed = time.monotonic()
            print(f"{PROGRESS}{fraction:.3f} {what}", flush=True)


def main() -> None:
    """Arguments: the cell's folder, and the file to write its result lines to."""
    folder, result = Path(sys.argv[1]), Path(sys.argv[2])
    cell = Cell(**json.loads((folder / "cell.json").read_text()))
    lock = (folder / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # the process of a suite that was killed may still be at work here
    if result.is_file():
        return
    protocol = Protocol.read(cell.protocol)
    rows = bounds(cell.task, cell.root, protocol, cell.config) if cell.bounds else [run_system(cell, protocol, folder)]
    manifest = Manifest.read(cell.root)
    who = people(manifest, protocol.spec["split"])
    results = [
        Result(
            task=cell.task,
            **row,
            seed=cell.seed,
            data={"name": manifest.name, "sha256": manifest.sha256},
            split=bound.spec["split"],
            protocol={"name": bound.name, "id": bound.id, "spec": bound.spec},
            metrics=scores.metrics,
            curve=scores.curve,
            dropped_frames=scores.dropped_frames,
            people={
                key: name
                for key, name in who.items()
                if any(key in metric["per_sample"] for metric in scores.metrics.values())
            },
            run=f"cells/{cell.name}",
            code=code_commit() or "",
        )
        for row, scores, bound in rows
    ]
    write_results(result, results)


def run_system(cell: Cell, protocol: Protocol, folder: Path) -> tuple[dict[str, Any], Scores, Protocol]:
    """Trains, predicts and scores one system."""
    run = folder / "run"
    predictions = run / "predictions"
    common = ["--config", cell.config, "--run", str(run), "--data.init_args.root", cell.root]
    for name, value in cell.changes.items():
        common += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    common += ["--seed_everything", str(cell.seed), "--trainer.enable_progress_bar", "false"]
    common += ["--trainer.callbacks+", "sweeps.cell.ProgressLines"]
    complete = (run / COSTS).is_file()  # written when the predictions are
    if not complete:
        RunCLI(["fit", *common, "--data.init_args.seed", str(cell.seed)])
    # The protocol may have come to score another split since.
    if not complete or read_description(predictions)["split"] != protocol.spec["split"]:
        predict = ["--data.init_args.predict_split", protocol.spec["split"]]
        if images := protocol.spec.get("images"):  # the first of the split
            size = math.gcd(images, 64)
            predict += ["--data.init_args.batch_size", str(size)]
            predict += ["--trainer.limit_predict_batches", str(images // size)]
        model = RunCLI(["predict", *common, *predict]).model
        parameters = sum(parameter.numel() for parameter in model.parameters())
        write_atomic(run / COSTS, json.dumps({"parameters": parameters, "memory": peak_memory_mb()}).encode())
    if not (run / SERIES).is_file():
        print(f"{PROGRESS}1.0 measure", flush=True)
        write_atomic(run / SERIES, json.dumps(measure(cell, run / LAST)).encode())
    print(f"{PROGRESS}1.0 score", flush=True)
    scores, bound = score(predictions, cell.root, protocol)
    description = read_description(predictions)
    costs = json.loads((run / COSTS).read_text())
    state = torch.load(run / LAST, map_location="cpu", weights_only=True)
    row = {
        "system": cell.system,
        "title": title_of(cell.system, description),
        "role": "system",
        "costs": {
            "parameters": costs["parameters"],
            "train_seconds": state["callbacks"]["RunState"]["seconds"],
            "throughput": description["throughput"],
            "throughput_unit": "frames/s" if cell.task == "speech-to-mesh" else "images/s",
            "peak_memory_mb": costs["memory"],
        },
        "media": write_media(cell.task, predictions, cell.root, folder) if cell.media else {},
    }
    row["series"] = json.loads((run / SERIES).read_text())
    return row, scores, bound


def title_of(name: str, description: dict[str, Any]) -> str:
    """``after CSTalk``; of a changed system, which a suite calls ``cstalk-plain``, ``after CSTalk (plain)``."""
    if name == description["system"]:
        return description["title"]
    return f"{description['title']} ({name.removeprefix(description['system']).lstrip('-_')})"


def measure(cell: Cell, checkpoint: Path) -> dict[str, dict[str, float]]:
    """What the trained system measures of itself for the claims of its paper; nothing for most tasks."""
    if cell.task != "speech-to-mesh":
        return {}
    system = cast("SpeechToMesh", load_system(checkpoint))
    return system.measurements(SpeechDataModule(cell.root, batch_size=8))


if __name__ == "__main__":
    main()
