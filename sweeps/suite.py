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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
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
from sweeps.claims import Claim, write_claims
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
        changes: dotted field of the config -> value, where the suite changes it.
        system: name of the row: the system's, or the suite's for a changed one.
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
    changes: dict[str, Any]
    system: str
    bounds: bool
    seed: int
    root: str
    protocol: str
    media: bool


@dataclass(frozen=True)
class Entry:
    """A system of a suite: a config file, alone or with changes.

    Attributes:
        config: the file.
        name: of a changed one; distinguishes it in every table.
        changes: dotted field -> value, such as ``model.init_args.modality: audio``.
    """

    config: str
    name: str = ""
    changes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, raw: Any, where: str) -> "Entry":
        """A path, or a mapping with ``config``, ``name`` and, where it changes something, ``changes``.

        Raises:
            UserError: something else, or changes without a name.
        """
        if isinstance(raw, str):
            return cls(raw)
        if not isinstance(raw, dict) or {"config", "name"} - set(raw) or set(raw) - {"config", "name", "changes"}:
            raise UserError(f"{where}: expected a config file, or config, name and changes")
        return cls(**raw)


@dataclass(frozen=True)
class Suite:
    """A suite file.

    Attributes:
        name: of the suite.
        seeds: training seeds.
        data: task -> root, protocol.
        systems: what is trained: a list of :class:`Entry`.
        claims: what the papers claim, see :mod:`sweeps.claims`.
    """

    name: str
    seeds: list[int]
    data: dict[str, dict[str, str]]
    systems: list[Entry]
    claims: list[Claim] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | Path) -> "Suite":
        """Reads a suite file.

        Raises:
            UserError: missing, not YAML, or of other fields.
        """
        text = _text(path)
        try:
            raw = {"claims": [], **yaml.safe_load(text)}
            entries = [Entry.parse(entry, f"{path}, system {i}") for i, entry in enumerate(raw.pop("systems"), 1)]
            claims = [Claim.parse(claim, f"{path}, claim {i}") for i, claim in enumerate(raw.pop("claims"), 1)]
            suite = cls(**raw, systems=entries, claims=claims)
        except (yaml.YAMLError, TypeError, KeyError) as error:
            raise UserError(f"{path}: expected the fields name, seeds, data, systems, claims ({error})") from error
        if not suite.seeds or not suite.systems:
            raise UserError(f"{path}: seeds and systems must not be empty")
        return suite

    def cells(self) -> list[Cell]:
        """All cells: each system with each seed, and the floors and ceilings of each task.

        Raises:
            UserError: a config names no registered system, the suite gives its task no data, two systems have one
                name, or a system trains with what will judge it.
        """
        known = {f"{cls.__module__}.{cls.__name__}": cls.info for cls in registry().values()}
        cells: list[Cell] = []
        names: set[str] = set()
        for entry in self.systems:
            class_path = yaml.safe_load(_text(entry.config))["model"]["class_path"]
            if class_path not in known:
                raise UserError(f"{entry.config}: model.class_path '{class_path}' is not a registered system")
            task, system = known[class_path].task, entry.name or known[class_path].name
            if task not in self.data:
                raise UserError(f"suite {self.name}: no data for task '{task}', which {entry.config} needs")
            if system in names:
                raise UserError(f"suite {self.name}: two systems called '{system}'; give one config, name and changes")
            names.add(system)
            check_judges(entry, Protocol.read(self.data[task]["protocol"]))
            if task not in {cell.task for cell in cells}:
                cells.append(self._cell(task, entry, system, 0, bounds=True))
            cells += [self._cell(task, entry, system, seed) for seed in self.seeds]
        return cells

    def _cell(self, task: str, entry: Entry, system: str, seed: int, bounds: bool = False) -> Cell:
        data = self.data[task]
        text = _text(entry.config) + (json.dumps(entry.changes, sort_keys=True) if entry.changes else "")
        label = f"{task}-bounds" if bounds else f"{entry.name or Path(entry.config).stem}-seed{seed}"
        specs = backbones.named_in([yaml.safe_load(_text(entry.config)), entry.changes])
        weights = [backbones.weight_hash(spec) for spec in specs]
        decides = [label, text, *weights, Manifest.read(data["root"]).sha256, source_hash(trainers, datamodules)]
        key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:10]
        media = seed == self.seeds[0]
        return Cell(
            f"{label}-{key}",
            label,
            task,
            entry.config,
            entry.changes,
            system,
            bounds,
            seed,
            data["root"],
            data["protocol"],
            media,
        )


def check_judges(entry: Entry, protocol: Protocol) -> None:
    """Raises a UserError where a system trains with a network that judges it.

    A perceptual distance is left out: it is a formula over features that nobody doubts, and protocols whose systems
    train with it say so.
    """
    for spec in backbones.named_in([yaml.safe_load(_text(entry.config)), entry.changes]):
        for role, judge in protocol.spec.get("judges", {}).items():
            if role != "perceptual" and backbones.weight_hash(spec) == backbones.weight_hash(judge["name"]):
                raise UserError(
                    f"{entry.config}: trains with '{spec}', which judges as {role} under protocol '{protocol.name}'; "
                    "train with another network, or score under a protocol with another judge"
                )


def run_suite(suite: Suite, out: Path, jobs: int) -> Path:
    """Runs what is missing and gathers all results.

    Args:
        suite: what to run.
        out: folder of the suite; gets ``cells/``, ``claims.yaml`` and ``results.jsonl``.
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
    write_claims(out, suite.claims)
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
    """Where a cell's result lines stand; another protocol, other judges or other metrics give another file."""
    protocol = Protocol.read(cell.protocol)
    judges = [backbones.judge_hash(judge["name"], role) for role, judge in protocol.spec.get("judges", {}).items()]
    decides = [protocol.spec, judges, source_hash(metrics, sweeps)]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:10]
    return out / "cells" / cell.name / f"result-{key}.jsonl"


def source_hash(*packages: Any) -> str:
    """A hash of the Python sources of packages."""
    digest = hashlib.sha256()
    for package in packages:
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def _text(path: str | Path) -> str:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    return Path(path).read_text()
