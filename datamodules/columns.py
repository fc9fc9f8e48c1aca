"""Feature columns: what a frozen network makes of every sample, computed once and stored beside the shards.

A column adds to a folder of shards, and changes nothing in it::

    columns.json                   all columns: which network made them, how, and their tars with checksums
    train-000000.tar
    train-000000.<column>.tar      the same keys in the same order, one ``npy`` each

The manifest does not know of columns, so that the identity of the data set stays what it is. A column knows the
SHA-256 of every shard it was made from: shards that were built anew make it stale, and a stale column is refused.

In a batch a column is an entry of ``features``; to the stream it is one more member of a sample.
"""

import hashlib
import json
import multiprocessing
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules import remote
from datamodules.errors import BadSample, UserError
from datamodules.shards import (
    Manifest,
    Sample,
    Shard,
    end_with_parent,
    file_size,
    is_inside,
    npy_bytes,
    read_npy,
    worker_count,
    write_atomic,
    write_shard,
)

SCHEMA = 1
COLUMNS = "columns.json"

Make = Callable[[Shard], Iterable[np.ndarray]]
T = TypeVar("T")


@dataclass(frozen=True)
class SideTar:
    """One tar of a column: as a :class:`Shard` its file, bytes, SHA-256, and sizes and checksums of its samples; and
    the shard (file, SHA-256) that it was made from."""

    file: str
    bytes: int
    sha256: str
    sizes: list[int]
    checksums: list[int]
    shard: str
    shard_sha256: str


@dataclass(frozen=True)
class Column:
    """What a column holds.

    Attributes:
        name: of letters, digits, ``-`` and ``_``.
        kind: of the backbone: ``speech``, ``identity`` ...
        backbone: its specification when the column was made, for people to read.
        weights: hash of its weights, see :func:`trainers.backbones.weight_hash`; what counts.
        alignment: how features meet the frames of a clip (see :mod:`trainers.nets.speech_encoder`); such an array is
            (N, *dims). None for one array (*dims) per sample, as for an image.
        fps: frame rate they were aligned to; None where no frame rate matters (``native``, images).
        dtype: ``float16`` or ``float32``, as stored.
        dims: the array's shape, without the leading N of a clip.
        tars: one for each shard.
    """

    name: str
    kind: str
    backbone: str
    weights: str
    alignment: str | None
    fps: float | None
    dtype: str
    dims: list[int] = field(default_factory=list)
    tars: list[SideTar] = field(default_factory=list)

    @property
    def member(self) -> str:
        """The name under which the stream gives it to a decoder."""
        return f"{self.name}.column.npy"

    def beside(self, shard: Shard) -> Shard:
        """The tar beside a shard, as a shard with the same keys."""
        tar = next(tar for tar in self.tars if tar.shard_sha256 == shard.sha256)
        return Shard(tar.file, shard.split, tar.bytes, tar.sha256, shard.keys, shard.lengths, tar.sizes, tar.checksums)


def read_columns(manifest: Manifest) -> dict[str, Column]:
    """All columns of a data set by name; none where there is no ``columns.json``.

    Raises:
        UserError: a file that cannot be read.
    """
    path = manifest.root / COLUMNS if manifest.url is None else f"{manifest.url}/{COLUMNS}"
    if isinstance(path, Path) and not path.is_file():
        return {}
    try:
        text = path.read_text() if isinstance(path, Path) else remote.read_json(path)
        if text is None:
            return {}
        raw = json.loads(text)
        if raw["schema"] != SCHEMA:
            raise UserError(f"{path}: schema {raw['schema']}, expected {SCHEMA}; make the columns again")
        columns = {
            name: Column(**{**column, "name": name, "tars": [SideTar(**tar) for tar in column["tars"]]})
            for name, column in raw["columns"].items()
        }
        for tar in (tar for column in columns.values() for tar in column.tars):
            if not is_inside(tar.file) or "/" in tar.file:
                raise UserError(f"{path}: '{tar.file}' is not a file of this folder; the list is damaged or forged")
            if not remote.is_sha256(tar.sha256) or type(tar.bytes) is not int or tar.bytes < 0:
                raise UserError(
                    f"{path}: {tar.file} has sha256 '{tar.sha256}' and {tar.bytes!r} bytes, expected 64 hexadecimal "
                    "digits and a size; the list is damaged or forged"
                )
        return columns
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error!r}); delete it and make the columns again") from error


def select_columns(manifests: list[Manifest], names: list[str]) -> dict[str, Column]:
    """The columns of these names, ready to be read; the data sets of a mix must all have them.

    Raises:
        UserError: no such column, one that does not fit the shards (see :func:`column_problems`), or another one
            under the same name in each data set of a mix.
    """
    selected: dict[str, Column] = {}
    for manifest in manifests if names else []:
        known = read_columns(manifest)
        for name in names:
            if name not in known:
                listed = ", ".join(known) or "none"
                raise UserError(
                    f"data.columns: {manifest.place} has no column '{name}' (columns: {listed}); "
                    "make it with 'facebench data features'"
                )
            column = known[name]
            for problem in column_problems(manifest, column):
                raise UserError(problem)
            first = selected.setdefault(name, column)
            if _identity(first) != _identity(column):
                raise UserError(
                    f"data.columns: column '{name}' of {manifest.place} is another than that of {manifests[0].place} "
                    f"({_difference(first, column)}); make one of them again"
                )
            if first is not column:
                selected[name] = replace(first, tars=first.tars + column.tars)
    return selected


def column_problems(manifest: Manifest, column: Column) -> list[str]:
    """Why a column cannot be used with the shards it lies beside, one line each; checks sizes, reads no tar."""
    problems = []
    fps = manifest.fields.get("fps")
    if column.fps is not None and column.fps != fps:
        problems.append(
            f"{manifest.root / COLUMNS}: column '{column.name}' is aligned to {column.fps:g} fps, but the clips have "
            f"{fps:g}; make it again with 'facebench data features' under another name"
        )
    made = {tar.shard: tar for tar in column.tars}
    for shard in manifest.shards:
        tar = made.get(shard.file)
        if tar is None or tar.shard_sha256 != shard.sha256:
            found = "has no tar for" if tar is None else "was made from another"
            problems.append(
                f"{manifest.root / COLUMNS}: column '{column.name}' {found} {shard.file}; "
                "run 'facebench data features' again"
            )
            continue
        size = file_size(manifest.root / tar.file)
        if size != tar.bytes and manifest.url is None:
            what = "missing" if size is None else f"{size} bytes, expected {tar.bytes}"
            problems.append(f"{manifest.root / tar.file}: {what}; copy it again or run 'facebench data features' again")
    return problems


def build_column(manifest: Manifest, column: Column, make: Make, processes: int | None = None) -> Column:
    """Makes the tars of a column in parallel processes, then lists it in ``columns.json``.

    A killed build, run again, keeps the tars that were finished; so does one on a folder where some shards changed.

    Args:
        manifest: of the folder.
        column: its description, without ``dims`` and ``tars``.
        make: picklable; gives the array of each sample of a shard, in order.
        processes: by default one per core.

    Raises:
        UserError: a name that cannot be a file's, the folder has another column of that name, or processes below 1.
    """
    workers = worker_count(processes)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", column.name):
        raise UserError(f"column '{column.name}': a name has letters, digits, - and _ only; give --name")
    if manifest.url is not None:
        raise UserError(f"{manifest.url}: columns are written beside shards in a folder; copy the data set first")
    identity = _identity(column)
    old = read_columns(manifest).get(column.name)
    if old is not None and _identity(old) != identity:
        raise UserError(
            f"{manifest.root / COLUMNS}: has another column '{column.name}' ({_difference(old, column)}); "
            "give this one another --name"
        )

    state = manifest.root / ".columns" / column.name
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    plan = state / "plan"
    if state.is_dir() and not (plan.is_file() and plan.read_text() == fingerprint):
        shutil.rmtree(state)
    for stale in [*manifest.root.glob(f"*.{column.name}.tar.*.tmp"), *state.glob("*.tmp")]:
        stale.unlink(missing_ok=True)
    write_atomic(plan, fingerprint.encode())
    results = [json.loads(path.read_text()) for path in state.glob("*.json")]
    if old is not None:
        results += [{"tar": asdict(tar), "dims": old.dims} for tar in old.tars]
    wanted = {shard.file: shard.sha256 for shard in manifest.shards}
    done = {
        result["tar"]["shard"]: (SideTar(**result["tar"]), result["dims"])
        for result in results
        if wanted.get(result["tar"]["shard"]) == result["tar"]["shard_sha256"]
        and file_size(manifest.root / result["tar"]["file"]) == result["tar"]["bytes"]
    }

    todo = [shard for shard in manifest.shards if shard.file not in done]
    bar_columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bar_columns) as progress:
        bar = progress.add_task(f"column {column.name}", total=len(wanted), completed=len(done))
        run = partial(_make_tar, manifest, column, make)
        for tar, dims in _in_parallel(run, todo, min(workers, len(todo))):
            done[tar.shard] = (tar, dims)
            progress.advance(bar)

    shapes = sorted({tuple(dims) for _, dims in done.values()})
    if len(shapes) != 1:
        raise UserError(
            f"column '{column.name}': arrays of shapes {shapes}; a backbone must give one shape for all samples"
        )
    whole = replace(column, dims=list(shapes[0]), tars=[done[shard.file][0] for shard in manifest.shards])
    columns = {**read_columns(manifest), column.name: whole}
    raw = {name: {key: value for key, value in asdict(c).items() if key != "name"} for name, c in columns.items()}
    write_atomic(manifest.root / COLUMNS, json.dumps({"schema": SCHEMA, "columns": raw}, indent=1).encode())
    shutil.rmtree(state)
    if not any(state.parent.iterdir()):
        state.parent.rmdir()
    return whole


def _identity(column: Column) -> dict[str, Any]:
    """What decides the contents; the same weights under another path are the same column."""
    names = ("kind", "weights", "alignment", "fps", "dtype")
    return {name: getattr(column, name) for name in names}


def _difference(old: Column, new: Column) -> str:
    before, now = _identity(old), _identity(new)
    return ", ".join(f"{name} {before[name]}, here {now[name]}" for name in now if now[name] != before[name])


def _in_parallel(run: Callable[[Shard], T], shards: list[Shard], processes: int) -> Iterator[T]:
    """Results as they come; one process is this one."""
    if processes <= 1:
        yield from map(run, shards)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=end_with_parent) as pool:
        try:
            for future in as_completed([pool.submit(run, shard) for shard in shards]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _make_tar(manifest: Manifest, column: Column, make: Make, shard: Shard) -> tuple[SideTar, list[int]]:
    shapes = set()

    def samples() -> Iterable[Sample]:
        for key, array in zip(shard.keys, make(shard), strict=True):
            stored = np.ascontiguousarray(array, dtype=column.dtype)
            if not np.isfinite(stored).all():
                raise UserError(
                    f"{manifest.root / shard.file}: the features of sample '{key}' are not finite in {column.dtype}; "
                    "store them as --precision float32"
                )
            shapes.add(stored.shape if column.alignment is None else stored.shape[1:])
            yield Sample(key, 1, {"npy": npy_bytes(stored)})

    file = f"{shard.file.removesuffix('.tar')}.{column.name}.tar"
    written = write_shard(manifest.root / file, shard.split, samples())
    if len(shapes) != 1:
        raise UserError(f"{manifest.root / shard.file}: features of shapes {sorted(shapes)}, expected one shape")
    tar = SideTar(file, written.bytes, written.sha256, written.sizes, written.checksums, shard.file, shard.sha256)
    dims = list(shapes.pop())
    state = manifest.root / ".columns" / column.name / f"{file}.json"
    write_atomic(state, json.dumps({"tar": asdict(tar), "dims": dims}).encode())
    return tar, dims


def decode_columns(
    columns: dict[str, Column], members: dict[str, bytes], frames: int | None = None
) -> dict[str, Tensor]:
    """Column name -> array of one sample, float32.

    Args:
        columns: those to decode.
        members: the sample's, with the columns' among them.
        frames: length of the clip.

    Raises:
        BadSample: an array of another shape than its column says, or of another number of frames than the clip.
    """
    features = {}
    for name, column in columns.items():
        array = read_npy(members[column.member])
        shape = array.shape if column.alignment is None else array.shape[1:]
        if list(shape) != column.dims:
            raise BadSample("wrong features", f"column '{name}' of shape {array.shape}, expected {column.dims}")
        if column.alignment == "interpolate" and len(array) != frames:
            raise BadSample("wrong features", f"column '{name}' of {len(array)} frames, the clip has {frames}")
        features[name] = torch.from_numpy(array.astype(np.float32))
    return features


def collate_columns(
    columns: dict[str, Column], samples: list[dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Stacks the features of samples, those of clips padded by zeros at the end.

    Returns:
        Column name -> (B, N, *dims) or (B, *dims), and for those of clips how many of N are real, (B,) int64.
    """
    features, lengths = {}, {}
    for name, column in columns.items():
        arrays = [sample[name] for sample in samples]
        if column.alignment is None:
            features[name] = torch.stack(arrays)
        else:
            features[name] = pad_sequence(arrays, batch_first=True)
            lengths[name] = torch.tensor([len(array) for array in arrays])
    return features, lengths
