"""A suite: systems x seeds on their data, run as independent cells in parallel processes, each computed once.

A cell's folder is named by what decides its result (config, seed, data, code, weights), so that a suite run
again computes only what is missing or has changed, however it was interrupted.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

import datamodules
import metrics
import sweeps
import trainers
from datamodules.errors import UserError
from datamodules.shards import Manifest, write_atomic
from metrics.protocols import Protocol
from sweeps.results import read_results, write_results
from trainers import backbones
from trainers.tasks import registry

PROGRESS = "@progress "  # a cell's line "@progress 0.4 fit" moves its bar


@dataclass(frozen=True)
class Cell:
    """One run of a suite.

    Attributes:
        name: folder name below ``cells/``.
        title: what the progress bar says.
        task: its task.
        config: config file of the system.
        bounds: scores the floors and ceilings of the task instead of training the system.
        seed: training seed.
        root: data folder.
        protocol: name of the protocol to score under.
        media: whether it makes pictures and videos for the report.
    """

    name: str
    title: str
    task: str
    config: str
    bounds: bool
    seed: int
    root: str
    protocol: str
    media: bool


@dataclass(frozen=True)
class Suite:
    """A suite file: ``name``, ``seeds``, ``data`` (task -> root, protocol) and ``systems`` (config files)."""

    name: str
    seeds: list[int]
    data: dict[str, dict[str, str]]
    systems: list[str]

    @classmethod
    def read(cls, path: str | Path) -> "Suite":
        """Reads a suite file.

        Raises:
            UserError: missing, not YAML, or of other fields.
        """
        text = _text(path)
        try:
            suite = cls(**yaml.safe_load(text))
        except (yaml.YAMLError, TypeError) as error:
            raise UserError(f"{path}: expected the fields name, seeds, data, systems ({error})") from error
        if not suite.seeds or not suite.systems:
            raise UserError(f"{path}: seeds and systems must not be empty")
        return suite

    def cells(self) -> list[Cell]:
        """All cells: each system with each seed, and the floors and ceilings of each task.

        Raises:
            UserError: a config names no registered system, or the suite gives its task no data.
        """
        tasks = {f"{cls.__module__}.{cls.__name__}": cls.info.task for cls in registry().values()}
        cells: list[Cell] = []
        for config in self.systems:
            class_path = yaml.safe_load(_text(config))["model"]["class_path"]
            if class_path not in tasks:
                raise UserError(f"{config}: model.class_path '{class_path}' is not a registered system")
            task = tasks[class_path]
            if task not in self.data:
                raise UserError(f"suite {self.name}: no data for task '{task}', which {config} needs")
            if task not in {cell.task for cell in cells}:
                cells.append(self._cell(task, config, 0, bounds=True))
            cells += [self._cell(task, config, seed) for seed in self.seeds]
        return cells

    def _cell(self, task: str, config: str, seed: int, bounds: bool = False) -> Cell:
        data = self.data[task]
        text = _text(config)
        label = f"{task}-bounds" if bounds else f"{Path(config).stem}-seed{seed}"
        weights = [backbones.weight_hash(spec) for spec in _backbones(yaml.safe_load(text))]
        decides = [label, text, *weights, Manifest.read(data["root"]).sha256, source_hash(trainers, datamodules)]
        key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:10]
        media = seed == self.seeds[0]
        return Cell(f"{label}-{key}", label, task, config, bounds, seed, data["root"], data["protocol"], media)


def run_suite(suite: Suite, out: Path, jobs: int) -> Path:
    """Runs what is missing and gathers all results.

    Args:
        suite: what to run.
        out: folder of the suite; gets ``cells/`` and ``results.jsonl``.
        jobs: cells at a time; the cores are shared out among them.

    Returns:
        the path of ``results.jsonl``.

    Raises:
        UserError: a cell failed; names its log. The others are finished first.
    """
    cells = suite.cells()
    failed: list[Cell] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console()) as progress, ThreadPoolExecutor(jobs) as pool:
        whole = progress.add_task(f"suite {suite.name}: {len(cells)} cells", total=len(cells))
        lock = threading.Lock()

        def run(cell: Cell) -> None:
            bar = progress.add_task(cell.title, total=1.0)
            ok = result_path(out, cell).is_file() or _run_cell(out, cell, jobs, progress, bar)
            progress.remove_task(bar)
            progress.advance(whole)
            if not progress.console.is_terminal:  # a log file shows no bars
                progress.console.print(f"{cell.title}: {'done' if ok else 'failed'}")
            if not ok:
                with lock:
                    failed.append(cell)

        list(pool.map(run, cells))
    if failed:
        logs = ", ".join(str(out / "cells" / cell.name / "log.txt") for cell in failed)
        raise UserError(f"{len(failed)} of {len(cells)} cells failed; the reason stands at the end of {logs}")
    results = out / "results.jsonl"
    write_results(results, [result for cell in cells for result in read_results(result_path(out, cell))])
    return results


def _run_cell(out: Path, cell: Cell, jobs: int, progress: Progress, bar: Any) -> bool:
    """One cell in a process of its own, so that its peak memory and its threads are its own."""
    folder = out / "cells" / cell.name
    write_atomic(folder / "cell.json", json.dumps(asdict(cell)).encode())
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "sweeps.cell", str(folder), str(result_path(out, cell))]
    with (folder / "log.txt").open("a") as log:
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(PROGRESS):
                fraction, what = line.removeprefix(PROGRESS).strip().split(" ", 1)
                progress.update(bar, completed=float(fraction), description=f"{cell.title}: {what}")
            else:
                log.write(line)
        return child.wait() == 0


def result_path(out: Path, cell: Cell) -> Path:
    """Where a cell's result lines stand; another protocol or other metrics give another file."""
    protocol = Protocol.read(cell.protocol)
    key = hashlib.sha256(json.dumps([protocol.spec, source_hash(metrics, sweeps)]).encode()).hexdigest()[:10]
    return out / "cells" / cell.name / f"result-{key}.jsonl"


def source_hash(*packages: Any) -> str:
    """A hash of the Python sources of packages."""
    digest = hashlib.sha256()
    for package in packages:
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def _backbones(config: Any) -> Iterator[str]:
    """All backbone specifications in a config."""
    if isinstance(config, dict):
        for value in config.values():
            yield from _backbones(value)
    elif isinstance(config, list):
        for value in config:
            yield from _backbones(value)
    elif isinstance(config, str) and config.startswith(("demo:", "path:", "hub:")):
        yield config


def _text(path: str | Path) -> str:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    return Path(path).read_text()
