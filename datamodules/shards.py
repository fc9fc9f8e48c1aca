"""Shards on disk: WebDataset tars with deterministic bytes, and the manifest that describes them.

A data set is a folder::

    manifest.json            schema, kind, name, counts, checksums, keys and lengths of every sample
    train-000000.tar ...     WebDataset tars: members of one sample share a key and lie side by side
    <extra files>            named in the manifest (templates, topology ...)

A build is a list of shard jobs that run in parallel. A killed build, run again with the same plan, keeps
the shards that were finished; the manifest is written last, so a folder with a manifest is complete.
"""

import hashlib
import io
import json
import math
import multiprocessing
import os
import shutil
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from multiprocessing import connection
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import webdataset as wds
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from webdataset.tariterators import base_plus_ext

from datamodules import remote
from datamodules.errors import BadSample, UserError

SCHEMA = 1
MANIFEST = "manifest.json"


class Sample(NamedTuple):
    """One sample to be written: its key, its length (frames; 1 for an image) and its encoded members."""

    key: str
    length: int
    members: dict[str, bytes]


@dataclass(frozen=True)
class Shard:
    """One tar: file name, size in bytes, SHA-256, and of each sample in stored order its key and length.

    ``sizes`` are the bytes that each sample takes in the tar, headers and padding included, and ``checksums`` the
    CRC-32 of these bytes: a sample is found without a look at the others, and a flipped bit is noticed. Both are
    empty in manifests written before facebench recorded them.
    """

    file: str
    split: str
    bytes: int
    sha256: str
    keys: list[str]
    lengths: list[int]
    sizes: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds.

    Attributes:
        root: the folder.
        kind: ``faces`` or ``talking-heads``.
        name: the data set's name as printed on a leaderboard, for instance "demo corpus".
        fields: everything particular to the kind (attributes, subjects, fps, unit, topology ...).
        shards: all shards of all splits.
        files: SHA-256 of every extra file.
        url: where the shards are fetched from; None where they lie in ``root``.
    """

    root: Path
    kind: str
    name: str
    fields: dict[str, Any]
    shards: list[Shard]
    files: dict[str, str] = field(default_factory=dict)
    url: str | None = None

    @classmethod
    def read(cls, root: str | Path, kind: str | None = None) -> "Manifest":
        """Reads ``root/manifest.json``.

        Args:
            root: a folder or an address such as ``https://host/data`` or ``s3://bucket/data``
                (see :mod:`datamodules.remote`).
            kind: the kind that is expected.

        Raises:
            UserError: no such folder, no manifest, another schema or another kind of data; an address that cannot
                be reached.
        """
        url = str(root).rstrip("/") if remote.is_remote(root) else None
        path = (remote.fetch_manifest(url) if url else Path(root)) / MANIFEST
        if not path.parent.is_dir():
            raise UserError(
                f"{path.parent}: no such data folder; build one with 'facebench data demo --out DIR' "
                "or point data.root at a folder of shards"
            )
        if not path.is_file():
            raise UserError(f"{path.parent}: no {MANIFEST}; not a folder of finished shards (run the build again)")
        try:
            raw = json.loads(path.read_text())
            if raw["schema"] != SCHEMA:
                raise UserError(f"{path}: schema {raw['schema']}, expected {SCHEMA}; build the shards again")
            shards = [Shard(**shard) for shard in raw["shards"]]
            manifest = cls(path.parent, raw["kind"], raw["name"], raw["fields"], shards, raw["files"], url)
            manifest._check(path)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path}: not a readable manifest ({error!r}); build the shards again") from error
        if kind is not None and manifest.kind != kind:
            raise UserError(f"{path}: holds '{manifest.kind}', expected '{kind}'; point data.root at another folder")
        if url is not None:
            for name, sha256 in manifest.files.items():
                remote.fetch_file(f"{url}/{name}", manifest.root / name, sha256)
        return manifest

    def _check(self, path: Path) -> None:
        """No name leads out of a folder, neither ours nor one where predictions are written; all counts agree."""
        for sha256 in [shard.sha256 for shard in self.shards] + list(self.files.values()):
            if not remote.is_sha256(sha256):  # it names a file of the cache
                raise UserError(
                    f"{path}: sha256 '{sha256}', expected 64 hexadecimal digits; the manifest is damaged or forged"
                )
        for name in [shard.file for shard in self.shards] + list(self.files):
            if not is_inside(name) or "/" in name:
                raise UserError(f"{path}: '{name}' is not a file of this folder; the manifest is damaged or forged")
        for shard in self.shards:
            for key in shard.keys:
                if not is_inside(key):
                    raise UserError(f"{path}: key '{key}' of {shard.file} leads out of the folder; rename the sample")
            if type(shard.bytes) is not int or shard.bytes < 0:
                raise ValueError(f"{shard.file}: {shard.bytes!r} bytes")
            count = len(shard.keys)
            if len(shard.lengths) != count or len(shard.sizes) != len(shard.checksums):
                raise ValueError(f"{shard.file}: keys, lengths, sizes and checksums of different counts")
            if shard.sizes and (len(shard.sizes) != count or min(shard.sizes) < 0 or sum(shard.sizes) > shard.bytes):
                raise ValueError(f"{shard.file}: sizes that do not fit its {count} samples and {shard.bytes} bytes")
            if min(shard.lengths, default=1) < 1:
                raise ValueError(f"{shard.file}: a sample of length {min(shard.lengths)}")

    @property
    def place(self) -> str:
        """Folder or address, for messages."""
        return self.url or str(self.root)

    @property
    def sha256(self) -> str:
        """A hash of all contents and of what they mean, the same on every machine that holds the same data.

        The bytes alone do not tell metres from millimetres, nor which of two splits is for training.
        """
        fields = {name: value for name, value in self.fields.items() if name != "plan"}
        shards = sorted([shard.split, shard.sha256, shard.keys, shard.lengths] for shard in self.shards)
        contents = [self.kind, fields, shards, sorted(self.files.items())]
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()

    def split(self, split: str) -> list[Shard]:
        """The shards of one split, in order.

        Raises:
            UserError: no such split, an empty one, a missing shard, or a shard of another size (truncated); shards
                at an address are checked when they are fetched.
        """
        shards = [shard for shard in self.shards if shard.split == split]
        if not any(shard.keys for shard in shards):
            known = sorted({shard.split for shard in self.shards})
            raise UserError(f"{self.root}: no samples in split '{split}'; splits with samples: {', '.join(known)}")
        for shard in shards if self.url is None else []:
            path = self.root / shard.file
            size = file_size(path)
            if size != shard.bytes:
                found = "missing" if size is None else f"{size} bytes, expected {shard.bytes}"
                raise UserError(f"{path}: {found}; copy the file again or build the shards again")
        return shards

    def locate(self, shard: Shard) -> Path:
        """Where a shard lies on this machine; one at an address is fetched first, unless the cache holds it.

        Raises:
            UserError: it cannot be fetched, or arrives with another checksum.
        """
        if self.url is None:
            return self.root / shard.file
        return remote.fetch_shard(f"{self.url}/{shard.file}", shard.sha256, shard.bytes)


def is_inside(name: str) -> bool:
    """Whether a name, joined to a folder, stays in it."""
    return bool(name) and not name.startswith("/") and ".." not in name.split("/") and not set(name) & {"\0", "\\"}


def write_shard(path: Path, split: str, samples: Iterable[Sample]) -> Shard:
    """Writes one tar atomically; equal samples give equal bytes.

    Raises:
        UserError: keys that WebDataset would not read back (with a dot, or twice the same).
    """
    partial = _partial(path)
    keys, lengths = [], []
    with wds.TarWriter(str(partial), mtime=0, user="facebench", group="facebench", encoder=False) as tar:
        for sample in samples:
            tar.write({"__key__": sample.key, **sample.members})
            keys.append(sample.key)
            lengths.append(sample.length)
    with partial.open("rb") as file:
        spans = sample_spans(file)
        file.seek(0)
        sizes = [size for _, size in spans]
        checksums = [zlib.crc32(file.read(size)) for size in sizes]
    if [key for key, _ in spans] != keys:
        raise UserError(f"{path}: keys must be unique and without a dot after the last slash; rename the samples")
    shard = Shard(path.name, split, partial.stat().st_size, file_sha256(partial), keys, lengths, sizes, checksums)
    partial.replace(path)
    return shard


def sample_spans(file: BinaryIO) -> list[tuple[str, int]]:
    """Key and size in bytes of each sample of a tar, which follow each other from its start.

    Raises:
        tarfile.TarError: not a tar.
        ValueError: members of one sample do not lie side by side.
    """
    starts: dict[str, int] = {}
    last, end = "", 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            key, _ = base_plus_ext(member.name)
            if key != last and key in starts:
                raise ValueError(f"members of sample '{key}' do not lie side by side")
            starts.setdefault(key, member.offset)
            last, end = key, member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    edges = [*starts.values(), end]
    return [(key, after - start) for key, (start, after) in zip(starts, pairwise(edges), strict=True)]


@dataclass(frozen=True)
class ShardJob:
    """One shard to be built: file name, split, and a picklable function that makes its samples."""

    file: str
    split: str
    make: Callable[[], Iterable[Sample]]


def build_shards(
    root: Path,
    jobs: list[ShardJob],
    *,
    kind: str,
    name: str,
    fields: dict[str, Any],
    files: dict[str, bytes] | None = None,
    plan: dict[str, Any],
    processes: int | None = None,
) -> Manifest:
    """Builds all shards in parallel processes, then writes the manifest.

    Args:
        root: folder to write; a finished one of the same plan is left as it is.
        jobs: the shards; each is built whole by one process.
        kind, name, fields: see :class:`Manifest`.
        files: extra files to write beside the shards.
        plan: everything that decides the contents (sizes, seed, version, state of the source); a folder that was
            built from another plan is refused.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: the folder holds data of another plan, or processes below 1.
    """
    workers = worker_count(processes)
    fingerprint = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    state = root / ".build"
    if (root / MANIFEST).is_file():
        manifest = Manifest.read(root)
        if manifest.fields.get("plan") == fingerprint:
            print(f"{root}: already built, left as it is")
            return manifest
        raise UserError(
            f"{root}: holds data of other settings, or of a source that has changed since; give another --out or "
            "delete the folder"
        )
    if state.is_dir() and (state / "plan").is_file() and (state / "plan").read_text() != fingerprint:
        shutil.rmtree(state)
    state.mkdir(parents=True, exist_ok=True)
    for stale in [*root.glob("*.tmp"), *state.glob("*.tmp")]:
        stale.unlink(missing_ok=True)
    write_atomic(state / "plan", fingerprint.encode())

    listed = [Shard(**json.loads(path.read_text())) for path in state.glob("*.json")]
    done = {shard.file: shard for shard in listed if file_size(root / shard.file) == shard.bytes}
    todo = [job for job in jobs if job.file not in done]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _reproducible_arithmetic(), Progress(*columns) as progress:
        bar = progress.add_task(f"{name}: {kind}", total=len(jobs), completed=len(done))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
            try:
                for future in as_completed([pool.submit(_run_job, root, job) for job in todo]):
                    shard = future.result()
                    done[shard.file] = shard
                    progress.advance(bar)
            except BaseException:  # a mistake in one shard is told now, not when all others are built
                pool.shutdown(cancel_futures=True)
                raise

    checksums = {}
    for filename, contents in (files or {}).items():
        write_atomic(root / filename, contents)
        checksums[filename] = hashlib.sha256(contents).hexdigest()
    raw = {
        "schema": SCHEMA,
        "kind": kind,
        "name": name,
        "fields": {**fields, "plan": fingerprint},
        "files": checksums,
        "shards": [asdict(done[job.file]) for job in jobs],
    }
    write_atomic(root / MANIFEST, json.dumps(raw, indent=1).encode())
    shutil.rmtree(state)
    return Manifest.read(root)


def worker_count(processes: int | None) -> int:
    """The processes that were asked for, by default one per core.

    Raises:
        UserError: fewer than one.
    """
    if processes is not None and processes < 1:
        raise UserError(f"--processes {processes}: expected at least 1, or none for one per core")
    return processes or os.cpu_count() or 1


def end_with_parent() -> None:
    """In a worker: ends it when the process that started it is gone.

    One that was killed (SIGKILL, out of memory) cannot tell its workers, which would wait for work for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_job(root: Path, job: ShardJob) -> Shard:
    shard = write_shard(root / job.file, job.split, job.make())
    write_atomic(root / ".build" / f"{job.file}.json", json.dumps(asdict(shard)).encode())
    return shard


@contextmanager
def _reproducible_arithmetic() -> Iterator[None]:
    """Child processes use the same arithmetic kernels on every x86-64 machine, so that bytes do not differ.

    NumPy and OpenBLAS choose kernels by the processor they find, and those differ in the last bit.
    """
    settings = {
        "OPENBLAS_CORETYPE": "Haswell",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
        "PYTHONWARNINGS": "ignore::ImportWarning",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def write_atomic(path: Path, contents: bytes) -> None:
    """Writes a file under a temporary name, then renames it: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.write_bytes(contents)
    partial.replace(path)


def _partial(path: Path) -> Path:
    """The temporary name of a file; of this process alone, because one whose parent was killed may still write."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def file_size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    return path.stat().st_size if path.is_file() else None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def npy_bytes(array: Any) -> bytes:
    """An array as the bytes of a ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_npy(contents: bytes) -> np.ndarray:
    """An array from the bytes of a ``.npy`` file, as a view of them.

    Nothing is unpickled and nothing allocated: the header must describe exactly the bytes that follow.

    Raises:
        BadSample: it does not, or is no such file.
    """
    file = io.BytesIO(contents)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            version
        ]
        shape, fortran, dtype = read_header(file)
    except (KeyError, ValueError) as error:
        raise BadSample("not an npy array", str(error)) from error
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or min(shape, default=0) < 0 or size != len(contents) - file.tell():
        raise BadSample("npy header and data differ", f"{dtype} {shape} in {len(contents) - file.tell()} bytes")
    return np.frombuffer(contents, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
