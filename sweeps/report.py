"""The report: one HTML page that opens from disk, with every table, curve, strip and video, and what goes with it.

The page needs no network and no framework. Images and videos are data URIs, or files in a folder beside the page where
there are many; every metric's definition and every protocol stand on the page, and each number links to its runs.
"""

import base64
import hashlib
import mimetypes
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader

from datamodules.errors import UserError
from datamodules.shards import write_atomic
from metrics.statistics import Interval
from sweeps import leaderboard as board
from sweeps.claims import format_difference as format_claim
from sweeps.claims import judge, read_claims
from sweeps.exports import slug, systems_of, write_exports
from sweeps.leaderboard import Column, Row, Table
from sweeps.reported import BASES, read_reported
from sweeps.results import Result, read_results
from trainers.tasks import registry

MARKERS = ("circle", "square", "triangle", "diamond", "cross")
MEDIA = ("videos", "strips")

Source = Callable[[str], str]  # a media file as the results name it -> what the page loads


def write_report(results: Path, out: Path, assets: bool = False, over: str | None = None) -> Path:
    """Writes ``index.html`` and, beside it, what :func:`sweeps.exports.write_exports` writes.

    Args:
        results: ``results.jsonl``; media and runs are found relative to its folder.
        out: folder to write.
        assets: puts images and videos into ``assets/`` beside the page instead of into it.
        over: what error bars draw beside seeds, see :func:`sweeps.leaderboard.rank`.

    Returns:
        the path of ``index.html``.

    Raises:
        UserError: a line that is not a result, or a media file that is missing.
    """
    lines = read_results(results)
    tables = board.leaderboard(lines, over)
    tasks = {table.task for table in tables}
    reported = [number for number in read_reported() if number.task in tasks]
    verdicts = judge(read_claims(results.parent), lines)
    write_exports(tables, reported, verdicts, {name: system.info for name, system in registry().items()}, out)

    def source(file: str) -> str:
        return media_source(results.parent / file, out / "assets" if assets else None)

    environment = Environment(
        loader=PackageLoader("sweeps", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(
        sections=[section(table, number, source) for number, table in enumerate(tables)],
        verdicts=verdicts,
        format_claim=format_claim,
        reported={task: [number for number in reported if number.task == task] for task in tasks},
        bases=BASES,
        data_names=sorted({line.data["name"] for line in lines}),
        commits=sorted({line.code[:10] for line in lines if line.code}),
        systems=len({line.system for line in lines if line.role == "system"}),
        runs=len([line for line in lines if line.role == "system"]),
        seeds=max(len(row.seeds) for table in tables for row in table.rows),
        cards=[(system, slug(system)) for system in systems_of(tables)],
        costs=board.COSTS,
        format_cost=board.format_cost,
        format_difference=board.format_difference,
        format_p=board.format_p,
        format_place=board.format_place,
        run_link=lambda result: run_link(results.parent, out, result),
    )
    write_atomic(out / "index.html", page.encode())
    return out / "index.html"


def section(table: Table, number: int, source: Source) -> dict[str, Any]:
    """What the template shows of one table."""
    systems = [row for row in table.rows if row.role == "system"]
    style = {row.system: (index % 6 + 1, MARKERS[index % len(MARKERS)]) for index, row in enumerate(systems)}
    name = f"t{number}"
    cost_names = [name for name in board.COSTS if any(name in row.costs for row in table.rows)]
    shown = {kind: media(table.rows, kind, source, f"{name}-{kind}") for kind in MEDIA}
    return {
        "id": name,
        "title": board.TASKS.get(table.task, table.task),
        "table": table,
        "primary": table.primary_column,
        "style": style,
        "ranked": systems,
        "references": [row for row in table.rows if row.role != "system"],
        "cost_names": cost_names,
        "headings": [column.heading for column in table.columns] + [board.COSTS[name][0] for name in cost_names],
        "cells": {
            (row.system, column.name): cell(row, column, table) for row in table.rows for column in table.columns
        },
        "columns": {column.name: column for column in table.columns},
        "forest": forest(table, table.primary_column),
        "curves": curves(table),
        "protocol": yaml.safe_dump(table.protocol["spec"], sort_keys=False, allow_unicode=True, width=100),
        "samples": samples(table, [group for kind in MEDIA for group in shown[kind]]),
        **shown,
    }


@dataclass(frozen=True)
class Whisker:
    """A dot with its error bar, in percent of the width; None where there is nothing to draw."""

    dot: float
    low: float
    high: float


def cell(row: Row, column: Column, table: Table) -> dict[str, Any]:
    """A table cell: its text, the number to sort by, its error bar and the value and run of each seed."""
    entry = row.entries[column.name]
    seeds = [
        (result, "not reached" if value is None else column.format(value))
        for result, value in zip(row.results, entry.seeds, strict=True)
    ]
    if entry.interval is None:
        return {"text": "not reached", "entry": entry, "seeds": seeds}
    interval = entry.interval
    shown = interval.width > 0
    return {
        "entry": entry,
        "text": column.format(interval.value),
        "bounds": [column.format(interval.low), column.format(interval.high)] if shown else [],
        "sort": interval.value,
        "whisker": whisker(interval, _range(table, column)) if shown else None,
        "seeds": seeds,
    }


def whisker(interval: Interval, scale: tuple[float, float]) -> Whisker:
    """Places an interval on a scale from ``scale[0]`` (0 %) to ``scale[1]`` (100 %)."""
    low, high = scale
    width = (high - low) or 1.0
    dot, left, right = (100 * (value - low) / width for value in (interval.value, interval.low, interval.high))
    return Whisker(dot, max(left, 0.0), min(right, 100.0))


def _range(table: Table, column: Column, roles: Sequence[str] = ("system",)) -> tuple[float, float]:
    """The span of the intervals of rows of some roles, with a margin."""
    intervals = [row.entries[column.name].interval for row in table.rows if row.role in roles]
    bounds = [bound for interval in intervals if interval for bound in (interval.low, interval.high)]
    if not bounds:
        return 0.0, 1.0
    margin = 0.06 * (max(bounds) - min(bounds))
    return min(bounds) - margin, max(bounds) + margin


def forest(table: Table, column: Column) -> dict[str, Any]:
    """The primary metric of all rows on one axis."""
    scale = _range(table, column, ("system", "floor", "ceiling"))
    ticks = [tick for tick in _ticks(*scale) if scale[0] <= tick <= scale[1]]
    return {
        "rows": [
            {"row": row, "entry": entry, "whisker": whisker(entry.interval, scale)}
            for row in table.rows
            if (entry := row.entries[column.name]).interval is not None
        ],
        "ticks": [(100 * (tick - scale[0]) / ((scale[1] - scale[0]) or 1), f"{tick:g}") for tick in ticks],
    }


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two bounds."""
    step = (high - low) / 5 or 1.0
    magnitude = 10.0 ** np.floor(np.log10(step))
    step = next(magnitude * factor for factor in (1, 2, 5, 10) if magnitude * factor >= step)
    return [round(float(index * step), 10) for index in range(int(np.ceil(low / step)), int(high / step) + 1)]


WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 460, 300, 52, 44, 14, 26


def curves(table: Table) -> list[dict[str, Any]]:
    """Preservation and identity over editing accuracy, a point for each strength: mean over attributes and seeds."""
    with_curve = [row for row in table.rows if any(result.curve for result in row.results)]
    if not with_curve:
        return []
    wanted = [column for column in table.columns if column.name in ("identity", "preservation")]
    return [_chart(table, column, with_curve) for column in wanted]


def _chart(table: Table, column: Column, rows: Iterable[Row]) -> dict[str, Any]:
    lines = {row.system: (row, _mean_curve(row.results, column.name)) for row in rows}
    values = [value for _, points in lines.values() for _, _, value in points]
    low, high = min(values), max(values)
    margin = 0.08 * ((high - low) or 1)
    low, high = low - margin, high + margin

    def x(accuracy: float) -> float:
        return round(LEFT + accuracy * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    return {
        "column": column,
        "matched": table.protocol["spec"].get("matched_accuracy"),
        "x": x,
        "frame": (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
        "size": (WIDTH, HEIGHT),
        "x_ticks": [(x(share / 100), f"{share} %") for share in (0, 25, 50, 75, 100)],
        "y_ticks": [(y(tick), f"{tick:g}") for tick in _ticks(low, high)],
        "lines": [
            {
                "row": row,
                "points": [
                    {"x": x(accuracy), "y": y(value), "strength": strength, "accuracy": accuracy, "value": value}
                    for strength, accuracy, value in points
                ],
            }
            for row, points in lines.values()
        ],
    }


def _mean_curve(results: Iterable[Result], metric: str) -> list[tuple[float, float, float]]:
    """(strength, accuracy, value) by rising strength."""
    rows = [row for result in results for row in result.curve if row.get(metric) is not None]
    strengths = sorted({row["strength"] for row in rows})
    points = []
    for strength in strengths:
        at = [row for row in rows if row["strength"] == strength]
        accuracy, value = (float(np.mean([row[name] for row in at])) for name in ("accuracy", metric))
        points.append((strength, accuracy, value))
    return points


def samples(table: Table, groups: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """What the sample-by-sample comparison needs, as JSON: each row's mean over seeds for each sample and metric.

    Args:
        table: with values per sample, else None is given.
        groups: media by sample, see :func:`media`.
    """
    columns = [column for column in table.columns if sum(bool(_per_sample(row, column)) for row in table.rows) > 1]
    first = table.rows[0].results[0]
    keys = sorted({key for row in table.rows for column in columns for key in _per_sample(row, column)})
    if not keys:
        return None
    rows = []
    for row in table.rows:
        scores = {}
        for column in columns:
            mean = _per_sample(row, column)
            if mean:
                scores[column.name] = [round(mean[key], column.decimals + 2) for key in keys]
        rows.append({"name": row.system, "title": row.title, "scores": scores})
    shown: dict[str, dict[str, str]] = {}
    for group in groups:
        for item in group["items"]:
            shown.setdefault(group["key"], {}).setdefault(item["row"].system, item["id"])
    return {
        "metrics": [
            {
                "name": column.name,
                "title": column.title,
                "unit": column.unit,
                "better": {True: 1, False: -1, None: 0}[column.higher_is_better],
                "decimals": column.decimals,
            }
            for column in columns
        ],
        "rows": rows,
        "keys": keys,
        "people": [first.people.get(key, "") for key in keys],
        "media": shown,
    }


def _per_sample(row: Row, column: Column) -> dict[str, float]:
    """Mean over seeds by sample; nothing where a seed did not reach the value."""
    scored = [result.metrics[column.name]["per_sample"] for result in row.results]
    if row.entries[column.name].interval is None or not scored[0]:
        return {}
    return {key: float(np.mean([values[key] for values in scored])) for key in scored[0]}


def media(rows: Iterable[Row], kind: str, source: Source, prefix: str) -> list[dict[str, Any]]:
    """Videos or strips grouped by sample: for each, what every system made of it."""
    groups: dict[str, list[dict[str, Any]]] = {}
    number = 0
    for row in rows:
        for result in row.results:
            for item in result.media.get(kind, []):
                shown = {
                    "id": f"{prefix}-{number}",
                    "row": row,
                    "seed": result.seed,
                    "caption": item["caption"],
                    "uri": source(item["file"]),
                }
                groups.setdefault(item["key"], []).append(shown)
                number += 1
    return [{"key": key, "items": items} for key, items in groups.items()]


def media_source(path: Path, assets: Path | None) -> str:
    """A file as a data URI; or, with ``assets``, its copy there, named by its contents, relative to the page.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such media file, but the results name it; run 'facebench bench' again")
    contents = path.read_bytes()
    if assets is not None:
        name = hashlib.sha256(contents).hexdigest()[:16] + path.suffix
        write_atomic(assets / name, contents)
        return f"{assets.name}/{quote(name)}"
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(contents).decode()}"


def run_link(root: Path, out: Path, result: Result) -> str:
    """The run's folder relative to the page; empty where the results do not name one."""
    if not result.run:
        return ""
    return quote(Path(os.path.relpath(root / result.run, out)).as_posix()) + "/"
