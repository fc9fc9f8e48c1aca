"""``results.jsonl``: one line for each (system, seed), the source of truth of every table and page.

A line holds what was scored, under which protocol, on which data, and what it cost; see :class:`Result`.
Everything else (tables, cards, the page) is made from these lines and can be made again.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from datamodules.errors import UserError
from datamodules.shards import is_inside, write_atomic
from metrics.protocols import Protocol

SCHEMA = 1
ROLES = ("system", "floor", "ceiling")


@dataclass(frozen=True)
class Result:
    """One system, trained with one seed, scored on one split under one protocol.

    Attributes:
        task: for instance ``speech-to-mesh``.
        system: the system's name, for instance ``faceformer``.
        title: its name as printed.
        role: ``system``, ``floor`` or ``ceiling``; floors and ceilings are shown and never ranked.
        seed: training seed.
        data: ``name`` as printed and ``sha256`` of the data set.
        split: the scored split.
        protocol: ``name``, ``id`` and the whole ``spec``.
        metrics: name to ``value`` (None where it was not reached), ``unit``, ``higher_is_better``, ``per_sample``
            and, where samples do not count alike, ``weights``; see :mod:`metrics.scoring`, also for ``drawn``.
        curve: for face editing, one row for each attribute and strength.
        costs: ``parameters``, ``train_seconds``, ``throughput``, ``throughput_unit``, ``peak_memory_mb``.
        media: ``videos`` (the truth beside the prediction) and ``strips`` (edits): lists of ``{"key", "file",
            "caption"}`` with the sample's key and the file's path relative to the results.
        people: who is in each sample (subject or identity), by key: what error bars over people draw.
        series: what the system measured of itself for the claims of its paper: series name to sample to number.
        dropped_frames: frames that the protocol's length rule cut off, by clip.
        run: the run's folder, relative to the results.
        code: commit of the code.
    """

    task: str
    system: str
    title: str
    role: str
    seed: int
    data: dict[str, str]
    split: str
    protocol: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    curve: list[dict[str, Any]] = field(default_factory=list)
    costs: dict[str, Any] = field(default_factory=dict)
    media: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    series: dict[str, dict[str, float]] = field(default_factory=dict)
    dropped_frames: dict[str, int] = field(default_factory=dict)
    people: dict[str, str] = field(default_factory=dict)
    run: str = ""
    code: str = ""

    @property
    def identity(self) -> tuple[Any, ...]:
        """What two lines share when one replaces the other."""
        return self.task, self.data["sha256"], self.split, self.protocol["id"], self.system, self.seed


def drawn_of(metric: dict[str, Any]) -> dict[str, float]:
    """What a bootstrap draws of a metric: sample to number; empty for a value of the whole set."""
    return metric.get("drawn", metric.get("per_sample", {}))


def read_results(path: Path) -> list[Result]:
    """Reads and checks every line.

    Raises:
        UserError: no such file, no lines, or a line that is not a result; names the line and the field.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; 'facebench bench' writes it")
    lines = [(number, line) for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: holds no results; 'facebench bench' writes them")
    results = [_parse(line, f"{path}, line {number}") for number, line in lines]
    seen: dict[tuple[Any, ...], int] = {}
    for (number, _), result in zip(lines, results, strict=True):
        first = seen.setdefault(result.identity, number)
        if first != number:
            raise UserError(
                f"{path}, line {number}: {result.system}, seed {result.seed} stands in line {first} already; delete one"
            )
    return results


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Writes all lines atomically."""
    lines = [json.dumps({"schema": SCHEMA, **asdict(result)}, ensure_ascii=False) for result in results]
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def add_result(path: Path, result: Result) -> None:
    """Appends a result, or puts it in the place of an earlier one of the same system, seed, data and protocol."""
    kept = {old.identity: old for old in read_results(path)} if path.is_file() else {}
    write_results(path, {**kept, result.identity: result}.values())


def _parse(line: str, where: str) -> Result:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}); run 'facebench bench' again to rewrite it") from error
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
        raise UserError(f"{where}: field 'schema' is {found!r}, expected {SCHEMA}")
    del raw["schema"]
    known = {spec.name: spec for spec in fields(Result)}
    strange = [name for name in raw if name not in known]
    if strange:
        raise UserError(f"{where}: field '{strange[0]}' is not known; known: {', '.join(known)}")
    _check(
        raw, where, _TYPES, optional={"curve", "costs", "media", "series", "dropped_frames", "people", "run", "code"}
    )
    _check(raw["data"], f"{where}, data", {"name": str, "sha256": str})
    _check(raw["protocol"], f"{where}, protocol", {"name": str, "id": str, "spec": dict})
    protocol = Protocol(raw["protocol"]["name"], raw["task"], raw["protocol"]["spec"])
    if not protocol.bound or protocol.id != raw["protocol"]["id"]:
        raise UserError(
            f"{where}: protocol.id is '{raw['protocol']['id']}', but protocol.spec names other choices; the line was "
            "changed by hand or written by another version: score the predictions again"
        )
    if raw["role"] not in ROLES:
        raise UserError(f"{where}: field 'role' is '{raw['role']}', expected one of {', '.join(ROLES)}")
    for name, metric in raw["metrics"].items():
        place = f"{where}, metrics.{name}"
        if not isinstance(metric, dict):
            raise UserError(f"{place}: expected an object")
        expected = {"value": (int, float, type(None)), "unit": str, "higher_is_better": (bool, type(None))}
        _check(metric, place, {**expected, "per_sample": dict})
        _check(metric, place, {"weights": dict, "drawn": dict}, optional={"weights", "drawn"})
        numbers = [metric["value"], *metric["per_sample"].values(), *metric.get("drawn", {}).values()]
        if any(isinstance(number, float) and number != number for number in numbers):
            raise UserError(f"{place}: holds NaN; score the predictions again")
    for kind, items in raw.get("media", {}).items():
        for item in items:
            _check(item, f"{where}, media.{kind}", {"key": str, "file": str, "caption": str})
    files = [item["file"] for items in raw.get("media", {}).values() for item in items]
    for name in (*files, *([raw["run"]] if raw.get("run") else [])):
        if not is_inside(name):
            raise UserError(f"{where}: '{name}' leads out of the results' folder; the line is damaged or forged")
    return Result(**raw)


_TYPES = {
    "task": str,
    "system": str,
    "title": str,
    "role": str,
    "seed": int,
    "data": dict,
    "split": str,
    "protocol": dict,
    "metrics": dict,
    "curve": list,
    "costs": dict,
    "media": dict,
    "series": dict,
    "dropped_frames": dict,
    "people": dict,
    "run": str,
    "code": str,
}


def _check(raw: dict[str, Any], where: str, types: dict[str, Any], optional: Iterable[str] = ()) -> None:
    for name, expected in types.items():
        if name not in raw:
            if name in optional:
                continue
            raise UserError(f"{where}: field '{name}' is missing")
        if not isinstance(raw[name], expected) or (expected is int and isinstance(raw[name], bool)):
            raise UserError(f"{where}: field '{name}' is {raw[name]!r:.60}, of another type than expected")
