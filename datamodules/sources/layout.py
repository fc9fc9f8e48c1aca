"""What all sources share: looking for files, taking a part, spreading samples over shards, saying what is absent."""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from rich.console import Console

from datamodules.errors import UserError
from datamodules.shards import Sample, ShardJob, file_sha256, file_size


class Keyed(Protocol):
    """What a source plans: anything with a key."""

    @property
    def key(self) -> str:
        """Unique over all splits; no dots, no slashes."""


K = TypeVar("K", bound=Keyed)


def need(root: Path, *names: str) -> Path:
    """The first of several places under ``root`` that exists.

    Raises:
        UserError: none does; names all of them.
    """
    for name in names:
        if (root / name).exists():
            return root / name
    raise UserError(f"{root}: holds no {' or '.join(names)}; point --root at the folder of the official release")


def need_folder(root: Path) -> Path:
    """``root`` itself.

    Raises:
        UserError: no such folder.
    """
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder; give the folder of the official release")
    return root


def shard_jobs(
    splits: dict[str, list[K]],
    make: Callable[[list[K]], Iterable[Sample]],
    per_shard: int,
    limit: int | None = None,
    in_order: bool = False,
) -> list[ShardJob]:
    """Deals the items of each split over shards of equal size, so that each shard is a cross-section of its split.

    Args:
        splits: split -> items; what an item is, is the source's own.
        make: items -> samples; runs in another process, one shard at a time.
        per_shard: most items in a shard.
        limit: takes only the first so many items of each split.
        in_order: cuts the list instead, for items that lie together in large files.

    Raises:
        UserError: ``limit`` is not positive, or a key comes twice.
    """
    _refuse_twice(splits)
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: expected at least 1, the number of samples to take of each split")
    jobs = []
    for split, items in splits.items():
        taken = items[:limit]
        count = -(-len(taken) // per_shard)
        size = -(-len(taken) // max(count, 1))
        for i in range(count):
            part = taken[i * size : (i + 1) * size] if in_order else taken[i::count]
            jobs.append(ShardJob(f"{split}-{i:06d}.tar", split, partial(make, part)))
    return jobs


def _refuse_twice(splits: dict[str, list[K]]) -> None:
    """Two samples of one key would be mixed up, and one sample in two splits would be tested after training on it."""
    seen: dict[str, str] = {}
    for split, items in splits.items():
        for item in items:
            if item.key in seen:
                raise UserError(
                    f"sample '{item.key}' comes twice, in split '{seen[item.key]}' and in split '{split}'; list each "
                    "file once, or rename one of two"
                )
            seen[item.key] = split


def contents_hash(*planned: Any) -> str:
    """A hash of all that decides the contents of shards: what was planned, with its labels, arrays and files.

    A file counts by its name and its size: to read a whole release would take as long as to build it, and it may lie
    in another folder next time.
    """
    return hashlib.sha256(json.dumps(planned, default=_describe, sort_keys=True).encode()).hexdigest()


def _describe(item: Any) -> Any:
    if isinstance(item, Path):
        if item.suffix == ".TextGrid" and item.is_file():  # its times are often corrected without a change of size
            return file_sha256(item)
        return [item.name, file_size(item)] if item.is_file() else None  # nor does a folder's name count
    if isinstance(item, bytes):
        return hashlib.sha256(item).hexdigest()
    if isinstance(item, np.ndarray | np.generic):
        return [str(item.dtype), item.shape, item.tobytes()]
    if callable(item) and hasattr(item, "__qualname__"):
        return item.__qualname__
    return [type(item).__name__, *(getattr(item, field.name) for field in fields(item))]


def report_absent(name: str, absent: Sequence[str], total: int, reason: str) -> None:
    """One line on standard error: how much of a data set is not there, and what."""
    if absent:
        listed = ", ".join(absent[:6]) + (" ..." if len(absent) > 6 else "")
        message = f"{name}: {len(absent)} of {total} {reason}: {listed}"
        Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


def npy_shape(path: Path, floats: bool = True) -> tuple[int, ...]:
    """Shape of a ``.npy`` file, from its header alone.

    Raises:
        UserError: not such a file, or not of numbers that are ``floats``.
    """
    array = open_npy(path)
    if floats and not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"{path}: holds {array.dtype}, expected floating-point numbers; convert it again")
    return array.shape


def open_npy(path: Path) -> np.ndarray:
    """A ``.npy`` file, memory-mapped: only what is indexed is read.

    Raises:
        UserError: no such file, or one that is damaged or holds Python objects.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected an array of the official release")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a readable npy file of numbers ({error}); copy or convert it again") from error


def read_text(path: Path) -> str:
    """A text file, without the mark that some programs put before UTF-8.

    Raises:
        UserError: no such file, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); copy it again") from error


def read_table(path: Path, required: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file with a heading.

    Raises:
        UserError: no such file, a column of ``required`` is missing, or a row has more or fewer values than columns.
    """
    reader = csv.DictReader(io.StringIO(read_text(path)), restkey="", restval=None)
    columns = reader.fieldnames or []
    missing = [name for name in required if name not in columns]
    if missing:
        raise UserError(f"{path}: no column '{missing[0]}', columns are {', '.join(columns) or 'none'}; add it")
    rows = []
    for row in reader:
        if None in row.values() or "" in row:
            raise UserError(f"{path}: line {reader.line_num} has another number of values than the heading; mend it")
        rows.append(row)
    return rows


def split_of(row: dict[str, Any], path: Path, default: str = "train") -> str:
    """The split that a row names.

    Raises:
        UserError: a name that cannot begin the name of a file.
    """
    split = str(row.get("split") or default)
    if not split.replace("_", "").isalnum():
        raise UserError(f"{path}: split '{split}', expected letters, digits and _; for instance train, val or test")
    return split
