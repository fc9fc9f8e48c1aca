"""What every benchmark shares: rows, the printed table and the JSON file.

A benchmark measures ours and the other in turn in one run, and states its target in the row::

    python -m benchmarks.NAME [--json FILE]
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One measured comparison.

    Attributes:
        case: what was measured.
        ours: our value, in ``unit``.
        other: the value it is held against, in ``unit``; None where there is only ours.
        ratio: the number that the target speaks about; None where there is no other.
        unit: unit of ``ours`` and ``other``.
        target: the target in words, for instance ">= 4"; empty where there is none.
        holds: whether the target is met; None without a target.
    """

    case: str
    ours: float
    other: float | None
    ratio: float | None
    unit: str
    target: str = ""
    holds: bool | None = None


def speedup(case: str, ours: float, other: float, target: float | None = None, *, unit: str = "s") -> Row:
    """A row whose ratio is ``other / ours``: how many times less of ``unit`` ours takes (at least ``target``)."""
    ratio = other / ours
    if target is None:
        return Row(case, ours, other, ratio, unit)
    return Row(case, ours, other, ratio, unit, f">= {target:g}", ratio >= target)


def growth(case: str, ours: float, other: float, target: float | None = None, *, unit: str = "s") -> Row:
    """A row whose ratio is ``ours / other``: how much more of ``unit`` ours takes (at most ``target``)."""
    ratio = ours / other
    if target is None:
        return Row(case, ours, other, ratio, unit)
    return Row(case, ours, other, ratio, unit, f"<= {target:g}", ratio <= target)


def median_seconds(*functions: Callable[[], object], repeats: int = 5, warm_up: int = 1) -> list[float]:
    """Median wall-clock seconds of each function; the functions take turns, so that a busy machine hits all."""
    for _ in range(warm_up):
        for function in functions:
            function()
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def run(title: str, measure: Callable[[], Iterable[Row]]) -> None:
    """The command line of a benchmark: measures, prints the table, writes ``--json FILE``."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as a JSON list")
    arguments = parser.parse_args()
    rows = list(measure())
    show(title, rows)
    if arguments.json:
        partial = arguments.json.with_name(arguments.json.name + ".tmp")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        partial.replace(arguments.json)


def show(title: str, rows: Iterable[Row]) -> None:
    """Prints the rows as a table, with the machine they were measured on."""
    table = Table(title=title, caption=environment())
    table.add_column("case")
    for heading in ("ours", "other", "ratio", "target"):
        table.add_column(heading, justify="right")
    table.add_column("holds")
    for row in rows:
        holds = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[row.holds]
        table.add_row(
            row.case, _number(row.ours, row.unit), _number(row.other, row.unit), _number(row.ratio), row.target, holds
        )
    Console().print(table)


def environment() -> str:
    """Processor, cores used by PyTorch and versions, in one line."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def _number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.4g} {unit}".rstrip()
