"""From results to tables: one for each task, data set, split and protocol id, never across them.

A cell of a table is a mean over training seeds with a bootstrap interval over seeds and samples. A rank is one more
than the number of systems that are better beyond a tie. Floors and ceilings are shown and compared, never ranked.
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as ConsoleTable

from datamodules.errors import UserError
from metrics.statistics import Comparison, Interval, bootstrap_mean, paired_bootstrap, ranks
from sweeps.results import ROLES, Result

COSTS = {
    "parameters": ("Parameters", ""),
    "train_seconds": ("Training", "s"),
    "throughput": ("Throughput", ""),
    "peak_memory_mb": ("Peak memory", "MB"),
}


@dataclass(frozen=True)
class Column:
    """A metric as the table prints it."""

    name: str
    title: str
    description: str
    unit: str
    higher_is_better: bool | None
    decimals: int

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return {True: "↑", False: "↓", None: "→ 0"}[self.higher_is_better]

    @property
    def heading(self) -> str:
        """Title, unit and direction."""
        return f"{self.title} ({self.unit}) {self.arrow}" if self.unit else f"{self.title} {self.arrow}"

    def format(self, value: float) -> str:
        """A number with this column's decimals."""
        return f"{value:.{self.decimals}f}"


@dataclass(frozen=True)
class Entry:
    """One system under one metric.

    Attributes:
        interval: mean over seeds with its bootstrap interval; None where a seed did not reach the value.
        seeds: the value of each seed, None where it was not reached.
        samples: test samples behind it; 0 where the metric has no value per sample.
        rank: 1 is best; None for floors, ceilings, metrics without a direction and values not reached.
    """

    interval: Interval | None
    seeds: list[float | None]
    samples: int
    rank: int | None = None

    @property
    def reached(self) -> int:
        """In how many seeds the value was reached."""
        return sum(value is not None for value in self.seeds)


@dataclass(frozen=True)
class Row:
    """One system of a table."""

    system: str
    title: str
    role: str
    seeds: list[int]
    entries: dict[str, Entry]
    costs: dict[str, float]
    throughput_unit: str
    results: list[Result]


@dataclass(frozen=True)
class Table:
    """All systems of one task, on one data set and split, under one protocol.

    Attributes:
        task, data, split: what was scored, ``data`` as printed.
        protocol: name, id and spec.
        columns: the protocol's metrics in its order.
        rows: systems by rank of the primary metric, then floors, then ceilings.
        comparisons: metric to the comparison of every two systems and floors.
    """

    task: str
    data: str
    split: str
    protocol: dict[str, Any]
    columns: list[Column]
    rows: list[Row]
    comparisons: dict[str, list[Comparison]]

    @property
    def primary(self) -> str:
        """The metric that orders the table."""
        return _primary(self.rows[0].results[0])

    def title_of(self, system: str) -> str:
        """A system's name as printed."""
        return next(row.title for row in self.rows if row.system == system)


def leaderboard(results: Iterable[Result]) -> list[Table]:
    """One table for each task, data set, split and protocol id, in order of appearance."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        key = (result.task, result.data["sha256"], result.split, result.protocol["id"])
        groups.setdefault(key, []).append(result)
    return [rank(group) for group in groups.values()]


def rank(results: Sequence[Result]) -> Table:
    """Ranks results that are comparable.

    Raises:
        UserError: results of different tasks, data, splits or protocol ids, or of different samples.
    """
    first = results[0]
    for what, values in (
        ("protocol ids", {result.protocol["id"] for result in results}),
        ("tasks", {result.task for result in results}),
        ("data sets", {result.data["sha256"] for result in results}),
        ("splits", {result.split for result in results}),
    ):
        if len(values) > 1:
            raise UserError(f"leaderboard: cannot rank results of different {what}: {', '.join(sorted(values))}")

    systems: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.seed):
        systems.setdefault(result.system, []).append(result)
    systems = dict(sorted(systems.items(), key=lambda item: _order(item[1])))
    columns, entries, comparisons = [], {}, {}
    for metric in first.metrics:
        scored = {name: [_metric(run, metric) for run in runs] for name, runs in systems.items()}
        roles = {name: runs[0].role for name, runs in systems.items()}
        entries[metric], comparisons[metric] = _compare(metric, scored, roles)
        columns.append(_column(metric, first, entries[metric].values()))
    rows = [
        Row(
            system=name,
            title=runs[0].title,
            role=runs[0].role,
            seeds=[run.seed for run in runs],
            entries={metric: entries[metric][name] for metric in first.metrics},
            costs=_costs(runs),
            throughput_unit=next((run.costs["throughput_unit"] for run in runs if "throughput_unit" in run.costs), ""),
            results=runs,
        )
        for name, runs in systems.items()
    ]
    rows.sort(key=lambda row: (ROLES.index(row.role), row.entries[_primary(first)].rank or math.inf))
    return Table(first.task, first.data["name"], first.split, first.protocol, columns, rows, comparisons)


def _order(runs: list[Result]) -> tuple[int, float]:
    """Systems, floors, ceilings; within these the best mean of the primary metric first."""
    scored = _metric(runs[0], _primary(runs[0]))
    values = [_metric(run, _primary(run))["value"] for run in runs]
    if any(value is None for value in values):
        return ROLES.index(runs[0].role), math.inf
    return ROLES.index(runs[0].role), float(np.mean(values)) * (-1 if scored["higher_is_better"] else 1)


def _primary(result: Result) -> str:
    return result.protocol["spec"].get("primary", next(iter(result.metrics)))


def _compare(
    metric: str, scored: dict[str, list[dict[str, Any]]], roles: dict[str, str]
) -> tuple[dict[str, Entry], list[Comparison]]:
    """Each system's entry under one metric, and the comparisons of systems and floors."""
    reached = {name: runs for name, runs in scored.items() if all(run["value"] is not None for run in runs)}
    example = next(iter(reached.values()), next(iter(scored.values())))[0]
    keys = sorted(example["per_sample"])
    for name, runs in reached.items():
        if any(sorted(run["per_sample"]) != keys for run in runs):
            raise UserError(f"leaderboard: {name}, {metric}: scored on other samples than the rest; score it again")
    weights = [example["weights"][key] for key in keys] if "weights" in example else None
    matrices = {
        name: np.array([[run["per_sample"][key] for key in keys] or [run["value"]] for run in runs])
        for name, runs in reached.items()
    }

    direction = example["higher_is_better"]
    compared = {name: matrix for name, matrix in matrices.items() if roles[name] != "ceiling"}
    ranked = [name for name in compared if roles[name] == "system"]
    # One number for each system, of one seed and one set of images, says nothing of chance.
    if not keys:
        compared = {name: matrix for name, matrix in compared.items() if len(matrix) > 1}
    comparisons = [] if direction is None else paired_bootstrap(compared, direction, weights)
    can_rank = direction is not None and all(name in compared for name in ranked)
    between = [pair for pair in comparisons if pair.first in ranked and pair.second in ranked]
    places = ranks(ranked, between) if can_rank else {}

    entries = {}
    for name, runs in scored.items():
        interval = bootstrap_mean(matrices[name], weights) if name in matrices else None
        entries[name] = Entry(interval, [run["value"] for run in runs], len(keys), places.get(name))
    return entries, comparisons


def _metric(run: Result, metric: str) -> dict[str, Any]:
    if metric not in run.metrics:
        raise UserError(f"leaderboard: {run.system}, seed {run.seed}: no value of '{metric}'; score it again")
    return run.metrics[metric]


def _column(metric: str, result: Result, entries: Iterable[Entry]) -> Column:
    words = result.protocol["spec"].get("metrics", {}).get(metric, {})
    scored = result.metrics[metric]
    sizes = [abs(entry.interval.value) for entry in entries if entry.interval and entry.interval.value]
    decimals = 2 - math.floor(math.log10(float(np.median(sizes)))) if sizes else 3
    return Column(
        metric,
        words.get("title", metric),
        words.get("description", ""),
        scored["unit"],
        scored["higher_is_better"],
        min(max(decimals, 0), 6),
    )


def _costs(runs: list[Result]) -> dict[str, float]:
    """Mean of each cost over seeds."""
    return {
        name: float(np.mean([run.costs[name] for run in runs if name in run.costs]))
        for name in COSTS
        if any(name in run.costs for run in runs)
    }


def format_entry(entry: Entry, column: Column) -> str:
    """``4.12 [3.90, 4.35]``; says in how many seeds a value was reached where it was not in all."""
    if entry.interval is None:
        return f"not reached ({entry.reached} of {len(entry.seeds)} seeds)"
    low, value, high = (column.format(number) for number in entry.interval.bounds)
    return f"{value} [{low}, {high}]" if entry.interval.width > 0 else value


def format_cost(name: str, row: Row) -> str:
    """A cost with its unit: ``1.2 M``, ``3.4 min``, ``210 frames/s``, ``512 MB``."""
    if name not in row.costs:
        return ""
    value = row.costs[name]
    if name == "parameters":
        scale, unit = next(((s, u) for s, u in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if value >= s), (1, ""))
        return f"{value / scale:.3g}{unit}"
    if name == "train_seconds":
        return f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
    if name == "throughput":
        return f"{value:,.0f} {row.throughput_unit}" if value >= 10 else f"{value:.2g} {row.throughput_unit}"
    return f"{value:,.0f} MB"


def heading_of(table: Table) -> str:
    """What a table is of, in one line."""
    return f"{table.task}, {table.data}, {table.split} split, protocol {table.protocol['id']}"


def label(row: Row) -> str:
    """A system's name; marked where it is a floor or a ceiling."""
    return row.title if row.role == "system" else f"{row.title} ({row.role})"


def to_csv(tables: Iterable[Table]) -> str:
    """Every value as a row of its own: long form, easy to filter and to plot."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            *("task", "data", "split", "protocol", "system", "title", "role", "seeds", "samples"),
            *("metric", "unit", "value", "low", "high", "rank"),
        ]
    )
    for table in tables:
        for row in table.rows:
            about = [table.task, table.data, table.split, table.protocol["id"], row.system, row.title, row.role]
            for column in table.columns:
                entry = row.entries[column.name]
                interval = entry.interval
                bounds = [interval.value, interval.low, interval.high] if interval else ["", "", ""]
                counts = [len(row.seeds), entry.samples]
                writer.writerow([*about, *counts, column.name, column.unit, *bounds, entry.rank or ""])
            for name, value in row.costs.items():
                unit = row.throughput_unit if name == "throughput" else COSTS[name][1]
                writer.writerow([*about, len(row.seeds), "", name, unit, value, "", "", ""])
    return buffer.getvalue()


def to_markdown(tables: Iterable[Table]) -> str:
    """One Markdown table for each table, with its comparisons under the primary metric."""
    parts = []
    for table in tables:
        costs = [name for name in COSTS if any(name in row.costs for row in table.rows)]
        headings = ["", "System", "Seeds", *(column.heading for column in table.columns)]
        headings += [COSTS[name][0] for name in costs]
        lines = [f"## {heading_of(table)}", "", _markdown_row(headings), _markdown_row(["---"] * len(headings))]
        for row in table.rows:
            place = row.entries[table.primary].rank
            cells = [str(place or ""), label(row), str(len(row.seeds))]
            for column in table.columns:
                entry = row.entries[column.name]
                text = format_entry(entry, column)
                cells.append(f"**{text}**" if entry.rank == 1 else text)
            lines.append(_markdown_row([*cells, *(format_cost(name, row) for name in costs)]))
        lines += ["", NOTE, ""]
        pairs = table.comparisons[table.primary]
        if pairs:
            column = next(column for column in table.columns if column.name == table.primary)
            lines += [f"{column.title}, paired comparisons (Holm-corrected):", ""]
            lines += [f"- {describe(pair, table, column)}" for pair in pairs] + [""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


NOTE = (
    "Mean over training seeds [95 % bootstrap interval over seeds and samples]. Bold: not beaten beyond a tie. "
    "Floors and ceilings are not ranked."
)


def describe(pair: Comparison, table: Table, column: Column) -> str:
    """A comparison in words: ``FaceFormer vs VOCA: -0.41 [-0.52, -0.30], p < 0.001: FaceFormer is better``."""
    verdict = f"{table.title_of(pair.better)} is better" if pair.better else "tie"
    return (
        f"{table.title_of(pair.first)} vs {table.title_of(pair.second)}: {format_difference(pair.difference, column)}, "
        f"p {format_p(pair.p_value)}: {verdict}"
    )


def format_difference(difference: Interval, column: Column) -> str:
    """``-0.41 [-0.52, -0.30]``."""
    low, value, high = (f"{number:+.{column.decimals}f}" for number in difference.bounds)
    return f"{value} [{low}, {high}]"


def format_p(p_value: float) -> str:
    """``= 0.012`` or ``< 0.001``."""
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def print_tables(tables: Iterable[Table], console: Console | None = None) -> None:
    """Prints every table, a metric a row: value with rank, interval below; floors and ceilings dim."""
    console = console or Console()
    for table in tables:
        shown = ConsoleTable(title=heading_of(table), caption=NOTE, title_justify="left", caption_justify="left")
        shown.add_column("", overflow="fold")
        for row in table.rows:
            about = f"{len(row.seeds)} seeds" if row.role == "system" else row.role
            shown.add_column(f"{row.title}\n[dim]{about}[/]", justify="right", style=_STYLES[row.role], overflow="fold")
        for column in table.columns:
            shown.add_row(column.heading, *(_console_entry(row.entries[column.name], column) for row in table.rows))
        shown.add_section()
        for name, (title, _) in COSTS.items():
            if any(name in row.costs for row in table.rows):
                shown.add_row(title, *(format_cost(name, row) for row in table.rows))
        console.print(shown)


_STYLES = {"system": "", "floor": "dim", "ceiling": "dim"}


def _console_entry(entry: Entry, column: Column) -> str:
    value, _, bounds = format_entry(entry, column).partition(" [")
    first = f"[bold]{value}[/]" if entry.rank == 1 else value
    lines = [first if entry.rank is None else f"{first} #{entry.rank}"]
    return "\n".join([*lines, f"[dim]{bounds.removesuffix(']').replace(', ', '..')}[/]"] if bounds else lines)
