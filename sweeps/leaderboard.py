"""From results to tables: one for each task, data set, split and protocol id, never across them.

A cell of a table is a mean over training seeds with a bootstrap interval over seeds and samples, or over seeds and
the people in the samples. A rank is one more than the number of systems that are better beyond a tie; its interval is
that of the place by the mean alone. Floors and ceilings are shown and compared, never ranked.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table as ConsoleTable

from datamodules.errors import UserError
from metrics.editing import relative_recognition
from metrics.statistics import Comparison, Interval, bootstrap_mean, paired_bootstrap, rank_intervals, ranks
from sweeps.results import ROLES, Result, drawn_of

COSTS = {
    "parameters": ("Parameters", ""),
    "train_seconds": ("Training", "s"),
    "throughput": ("Throughput", ""),
    "real_time_factor": ("Real-time factor", "x"),
    "peak_memory_mb": ("Peak memory", "MB"),
}
TASKS = {
    "speech-to-mesh": "Speech to mesh",
    "face-editing": "Face editing",
    "text-to-face": "Text to face",
    "mesh-retargeting": "Mesh retargeting",
}
# Training seeds that systems need to be compared by a value of the whole set, such as the Fréchet distance: the
# bootstrap of fewer is far too sure.
LEAST_SEEDS = 5
OVER = ("samples", "people")  # what error bars draw, beside training seeds
_WORDS = {"speech-to-mesh": ("clips", "subjects"), "mesh-retargeting": ("clips", "identities")}


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
        return {True: "↑", False: "↓", None: "→ truth"}[self.higher_is_better]

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
        people: how many people are in these samples; 0 where that is not known.
        rank: 1 is best; None for floors, ceilings, metrics without a direction and values not reached.
        place: the place by the mean alone, with its bootstrap interval; None where there is no rank.
    """

    interval: Interval | None
    seeds: list[float | None]
    samples: int
    people: int = 0
    rank: int | None = None
    place: Interval | None = None

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
        over: what error bars draw beside seeds, ``samples`` or ``people``.

    Raises:
        UserError: rows of different protocol ids, tasks, data or splits, however they got here.
    """

    task: str
    data: str
    split: str
    protocol: dict[str, Any]
    columns: list[Column]
    rows: list[Row]
    comparisons: dict[str, list[Comparison]]
    over: str = "samples"

    def __post_init__(self) -> None:
        results = [result for row in self.rows for result in row.results]
        check_comparable(results)
        if results[0].protocol["id"] != self.protocol["id"]:
            raise UserError(f"leaderboard: rows of {results[0].protocol['id']} under the head of {self.protocol['id']}")

    @property
    def drawn(self) -> str:
        """What error bars draw beside seeds, as printed: clips, images, subjects or identities."""
        return self.words[OVER.index(self.over)]

    @property
    def words(self) -> tuple[str, str]:
        """What samples and people are called in this task."""
        return _WORDS.get(self.task, ("images", "identities"))

    def counts(self, entry: Entry) -> str:
        """What stands behind an entry: ``3 seeds × 48 clips of 2 subjects``."""
        seeds = f"{len(entry.seeds)} {'seed' if len(entry.seeds) == 1 else 'seeds'}"
        if entry.interval is None:
            return f"reached in {entry.reached} of {seeds}"
        if not entry.samples:
            return f"{seeds}, one value for the whole set"
        people = f" of {entry.people} {self.words[1]}" if entry.people else ""
        return f"{seeds} × {entry.samples} {self.words[0]}{people}"

    @property
    def primary(self) -> str:
        """The metric that orders the table."""
        return _primary(self.rows[0].results[0])

    @property
    def primary_column(self) -> Column:
        """Its column."""
        return next(column for column in self.columns if column.name == self.primary)

    @property
    def sha256(self) -> str:
        """Of the data."""
        return self.rows[0].results[0].data["sha256"]

    def title_of(self, system: str) -> str:
        """A system's name as printed."""
        return next(row.title for row in self.rows if row.system == system)


def leaderboard(results: Iterable[Result], over: str | None = None) -> list[Table]:
    """One table for each task, data set, split and protocol id, in order of appearance.

    Args:
        results: of any tasks and protocols.
        over: see :func:`rank`.
    """
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        key = (result.task, result.data["sha256"], result.split, result.protocol["id"])
        groups.setdefault(key, []).append(result)
    return [rank(group, over) for group in groups.values()]


def rank(results: Sequence[Result], over: str | None = None) -> Table:
    """Ranks results that are comparable.

    Args:
        results: of one task, data set, split and protocol id.
        over: what error bars draw beside training seeds: ``samples`` (clips, images) or ``people`` (the subjects or
            identities in them, drawn whole); by default what the protocol's ``error_bars_over`` says, else samples.

    Raises:
        UserError: results of different tasks, data, splits or protocol ids, or of different samples; error bars over
            people where the results do not say who is in each sample.
    """
    check_comparable(results)
    results = with_recognition(results)
    first = results[0]
    over = over or first.protocol["spec"].get("error_bars_over", "samples")
    if over not in OVER:
        raise UserError(f"leaderboard: error bars over '{over}', expected one of {', '.join(OVER)}")
    systems: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.seed):
        systems.setdefault(result.system, []).append(result)
    systems = dict(sorted(systems.items(), key=lambda item: _order(item[1])))
    columns, entries, comparisons = [], {}, {}
    for metric in first.metrics:
        scored = {name: [_metric(run, metric) for run in runs] for name, runs in systems.items()}
        roles = {name: runs[0].role for name, runs in systems.items()}
        entries[metric], comparisons[metric] = _compare(metric, scored, roles, first.people, over)
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
    return Table(first.task, first.data["name"], first.split, first.protocol, columns, rows, comparisons, over)


def with_recognition(results: Sequence[Result]) -> list[Result]:
    """Adds the relative recognition rates that the protocol asks for, which only a set of systems has.

    The first seed of a system competes with the first seeds of the others, and so on, as far as the system with the
    fewest goes. Floors, ceilings and further seeds have no rate.
    """
    asked = {
        name: choices
        for name, choices in results[0].protocol["spec"].get("metrics", {}).items()
        if choices.get("measure") == "relative_recognition"
    }
    if not asked:
        return list(results)
    runs: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.seed):
        if result.role == "system":
            runs.setdefault(result.system, []).append(result)
    added: dict[tuple[Any, ...], dict[str, Any]] = {result.identity: {} for result in results}
    for name, choices in asked.items():
        for entry in added.values():
            entry[name] = {"value": None, "unit": "", "higher_is_better": True, "per_sample": {}}
        for rivals in zip(*runs.values(), strict=False) if len(runs) > 1 else ():
            cosines = [_metric(run, choices["of"])["per_sample"] for run in rivals]
            keys = list(cosines[0])
            matrix = [[each[key] for key in keys] for each in cosines]
            points = relative_recognition(torch.tensor(matrix, dtype=torch.float64))
            for run, row in zip(rivals, points, strict=True):
                entry = added[run.identity][name]
                entry |= {"value": row.mean().item(), "per_sample": dict(zip(keys, row.tolist(), strict=True))}
    order = [*results[0].protocol["spec"]["metrics"], *results[0].metrics]
    merged = [(result, result.metrics | added[result.identity]) for result in results]
    return [
        replace(result, metrics={name: scores[name] for name in order if name in scores}) for result, scores in merged
    ]


def check_comparable(results: Sequence[Result]) -> None:
    """Raises a UserError unless all results are of one task, data set, split and protocol id."""
    for what, values in (
        ("protocol ids", {result.protocol["id"] for result in results}),
        ("tasks", {result.task for result in results}),
        ("data sets", {result.data["sha256"] for result in results}),
        ("splits", {result.split for result in results}),
    ):
        if len(values) != 1:
            raise UserError(f"leaderboard: cannot rank results of different {what}: {', '.join(sorted(values))}")


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
    metric: str, scored: dict[str, list[dict[str, Any]]], roles: dict[str, str], people: dict[str, str], over: str
) -> tuple[dict[str, Entry], list[Comparison]]:
    """Each system's entry under one metric, and the comparisons of systems and floors."""
    reached = {name: runs for name, runs in scored.items() if all(run["value"] is not None for run in runs)}
    example = next(iter(reached.values()), next(iter(scored.values())))[0]
    keys = sorted(example["per_sample"])
    for name, runs in reached.items():
        if any(sorted(run["per_sample"]) != keys for run in runs):
            raise UserError(f"leaderboard: {name}, {metric}: scored on other samples than the rest; score it again")
    # Where a clip was cut to a shorter prediction, runs differ in its frames; the longest speaks for the truth.
    weights = (
        [max(run["weights"][key] for runs in reached.values() for run in runs) for key in keys]
        if "weights" in example
        else None
    )
    persons = [people[key] for key in keys if key in people]
    groups = persons if keys and over == "people" else None
    if groups is not None and len(groups) < len(keys):
        raise UserError(
            f"leaderboard: {metric}: error bars over people, but the results do not say who is in "
            f"{len(keys) - len(groups)} of {len(keys)} samples; draw samples, or run 'facebench bench' again"
        )
    if groups is not None and len(set(groups)) < 2:
        raise UserError(f"leaderboard: {metric}: error bars over people need at least two; draw samples")
    matrices = {
        name: np.array([[drawn_of(run)[key] for key in keys] or [run["value"]] for run in runs])
        for name, runs in reached.items()
    }

    direction = example["higher_is_better"]
    compared = {name: matrix for name, matrix in matrices.items() if roles[name] != "ceiling"}
    ranked = [name for name in compared if roles[name] == "system"]
    # A value of the whole set is one number a seed, and few of them say little of chance.
    if not keys:
        compared = {name: matrix for name, matrix in compared.items() if len(matrix) >= LEAST_SEEDS}
    comparisons = [] if direction is None else paired_bootstrap(compared, direction, weights, groups)
    between = [pair for pair in comparisons if pair.first in ranked and pair.second in ranked]
    placed, places = {}, {}
    if direction is not None and all(name in compared for name in ranked):
        placed = ranks(ranked, between)
        places = rank_intervals({name: compared[name] for name in ranked}, direction, weights, groups)

    entries = {}
    for name, runs in scored.items():
        entries[name] = Entry(
            interval=bootstrap_mean(matrices[name], weights, groups) if name in matrices else None,
            seeds=[run["value"] for run in runs],
            samples=len(keys),
            people=len(set(persons)) if len(persons) == len(keys) else 0,
            rank=placed.get(name),
            place=places.get(name),
        )
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
    """Mean of each cost over seeds; for animation also how many seconds of motion a second of computing makes."""
    costs = {
        name: float(np.mean([run.costs[name] for run in runs if name in run.costs]))
        for name in COSTS
        if any(name in run.costs for run in runs)
    }
    fps = runs[0].protocol["spec"].get("fps")
    if fps and "throughput" in costs:
        costs["real_time_factor"] = costs["throughput"] / fps
    return costs


def format_entry(entry: Entry, column: Column) -> str:
    """``4.12 [3.90, 4.35]``; says in how many seeds a value was reached where it was not in all."""
    if entry.interval is None:
        return f"not reached ({entry.reached} of {len(entry.seeds)} seeds)"
    low, value, high = (column.format(number) for number in entry.interval.bounds)
    return f"{value} [{low}, {high}]" if entry.interval.width > 0 else value


def format_cost(name: str, row: Row) -> str:
    """A cost with its unit: ``1.2 M``, ``3.4 min``, ``210 frames/s``, ``7 ×`` real time, ``512 MB``."""
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
    if name == "real_time_factor":
        return f"{value:,.0f} ×" if value >= 10 else f"{value:.2g} ×"
    return f"{value:,.0f} MB"


def format_place(place: Interval) -> str:
    """``1`` or ``1–2``: the interval of a place."""
    return f"{place.low:.0f}–{place.high:.0f}" if place.high > place.low else f"{place.low:.0f}"


def heading_of(table: Table) -> str:
    """What a table is of, in one line."""
    return f"{table.task}, {table.data}, {table.split} split, protocol {table.protocol['id']}"


def label(row: Row) -> str:
    """A system's name; marked where it is a floor or a ceiling."""
    return row.title if row.role == "system" else f"{row.title} ({row.role})"


def note_of(table: Table) -> str:
    """What the numbers of a table are, and whose clips were cut to be scored."""
    note = (
        f"Mean over training seeds [95 % bootstrap interval over seeds and {table.drawn}]. "
        "Bold: not beaten beyond a tie. Floors and ceilings are not ranked."
    )
    cut = {row.title: sum(sum(result.dropped_frames.values()) for result in row.results) for row in table.rows}
    shorter = ", ".join(f"{frames} of {title}" for title, frames in cut.items() if frames)
    return f"{note} Frames without a counterpart, left out: {shorter}." if shorter else note


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


def print_tables(tables: Iterable[Table], console: Console | None = None) -> None:
    """Prints every table, a metric a row: value with rank, interval below; floors and ceilings dim."""
    console = console or Console()
    for table in tables:
        shown = ConsoleTable(
            title=escape(heading_of(table)), caption=note_of(table), title_justify="left", caption_justify="left"
        )
        shown.add_column("", overflow="fold")
        for row in table.rows:
            about = f"{len(row.seeds)} seeds" if row.role == "system" else row.role
            shown.add_column(
                f"{escape(row.title)}\n[dim]{about}[/]", justify="right", style=_STYLES[row.role], overflow="fold"
            )
        for column in table.columns:
            shown.add_row(
                escape(column.heading), *(_console_entry(row.entries[column.name], column) for row in table.rows)
            )
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
