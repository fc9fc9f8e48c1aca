"""Data sets at an address: whole shards are fetched once into a cache on this machine, and verified.

An address is anything that fsspec knows: ``https://host/data``, ``s3://bucket/data`` (with the package s3fs) ...
Two variables of the environment say where the cache lies and how large it may grow, because that is a property of
the machine and not of a run: ``FACEBENCH_CACHE`` (a folder, by default ``~/.cache/facebench``) and
``FACEBENCH_CACHE_GB`` (by default 100)::

    manifests/<sha256 of it>/   a manifest and the extra files beside it
    shards/<sha256>.tar         named by its content, so that data sets share and a rebuilt one is fetched anew
    locks/                      one process fetches, the others on the machine wait for it

Nothing is used before its checksum was verified, and a reader never sees half a file. A copy that was damaged later is
fetched once more. The shards that were not used for longest make room for new ones.
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec

from datamodules.errors import UserError

ATTEMPTS = 6
FIRST_WAIT = 0.5  # seconds before the second attempt; each further wait is twice as long
BLOCK = 4 << 20
LARGEST_FILE = 1 << 30  # of a manifest or an extra file; they are held in memory
STALE = 3600.0  # seconds after which an unfinished file is taken for that of a killed process

T = TypeVar("T")


def is_remote(root: str | Path) -> bool:
    """Whether a data root is an address."""
    return "://" in str(root)


def cache_folder() -> Path:
    """Where what was fetched is kept."""
    return Path(os.environ.get("FACEBENCH_CACHE", "~/.cache/facebench")).expanduser()


def cache_limit() -> int:
    """Bytes that the cached shards may take together.

    Raises:
        UserError: the variable does not hold a number above 0.
    """
    text = os.environ.get("FACEBENCH_CACHE_GB", "100")
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise UserError(f"FACEBENCH_CACHE_GB: '{text}', expected a number of gigabytes above 0")
    return limit


def fetch_manifest(url: str) -> Path:
    """Fetches ``url/manifest.json``, always anew, into a folder named by its content.

    Raises:
        UserError: it cannot be fetched.
    """
    contents = _persistently(f"{url}/manifest.json", _read_json)
    folder = cache_folder() / "manifests" / hashlib.sha256(contents).hexdigest()
    with _usable_cache():
        _write(folder / "manifest.json", contents)
    return folder


def read_json(url: str) -> bytes | None:
    """Fetches a small JSON file, always anew; None where there is none.

    Raises:
        UserError: it cannot be fetched.
    """
    try:
        return _persistently(url, _read_json)
    except _MissingError:
        return None


def fetch_file(url: str, path: Path, sha256: str) -> None:
    """Fetches a file that lies beside the manifest, unless it is there.

    Raises:
        UserError: it cannot be fetched, or arrives with another checksum.
    """

    def read(file: IO[bytes]) -> bytes:
        contents = _read(file)
        _expect(sha256, hashlib.sha256(contents).hexdigest())
        return contents

    with _usable_cache():
        if not path.is_file():
            _write(path, _persistently(url, read))


def fetch_shard(url: str, sha256: str, size: int) -> Path:
    """The cached copy of a shard; fetches it where there is none of that size.

    Raises:
        UserError: it cannot be fetched, arrives with another size or checksum, or is larger than the cache; a checksum
            that is none, and so no name of a file; a cache that cannot be written.
    """
    if not is_sha256(sha256):
        raise UserError(f"{url}: sha256 '{sha256}', expected 64 hexadecimal digits; the manifest is damaged or forged")
    path = cache_folder() / "shards" / f"{sha256}.tar"
    with _usable_cache():
        if not _is_cached(path, size):
            with _locked(sha256[:2]):
                if not _is_cached(path, size):
                    partial = _make_room(path, size)
                    _persistently(url, lambda file: _copy(file, partial, sha256, size))
                    partial.replace(path)
    return path


def forget_shard(sha256: str) -> None:
    """Deletes the cached copy of a shard, which turned out to be damaged."""
    with _usable_cache():
        (cache_folder() / "shards" / f"{sha256}.tar").unlink(missing_ok=True)


def is_sha256(text: object) -> bool:
    """Whether this is a SHA-256 as it stands in manifests, 64 hexadecimal digits."""
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) is not None


def _is_cached(path: Path, size: int) -> bool:
    """Whether the whole file is there; notes the time, as that of its last use."""
    try:
        if path.stat().st_size != size:
            return False
        os.utime(path)
    except FileNotFoundError:  # never fetched, or deleted by another process for want of room
        return False
    return True


def _copy(file: IO[bytes], partial: Path, sha256: str, size: int) -> None:
    digest, left = hashlib.sha256(), size
    with partial.open("r+b") as copy:
        while block := file.read(min(BLOCK, left + 1)):  # never more than one byte too many
            left -= len(block)
            if left < 0:
                break
            digest.update(block)
            with _usable_cache():
                copy.write(block)
    if left:
        raise _DamagedError(f"{'more' if left < 0 else size - left} bytes, expected {size}")
    _expect(sha256, digest.hexdigest())


def _make_room(path: Path, size: int) -> Path:
    """Deletes what was not used for longest, and reserves ``size`` bytes under a temporary name beside ``path``.

    A shard that another process reads stays readable to it: its file has lost only its name.
    """
    limit = cache_limit()
    if size > limit:
        raise UserError(f"FACEBENCH_CACHE_GB: {limit / 1e9:g}, but one shard takes {size / 1e9:g}; raise it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    with _locked("room"):
        partial.unlink(missing_ok=True)
        now, found = time.time(), []
        for entry in os.scandir(path.parent):
            if not re.fullmatch(r"[0-9a-f]{64}\.(tar|tmp)", entry.name):  # not ours
                continue
            try:
                used = entry.stat()
            except FileNotFoundError:  # renamed meanwhile: another process finished
                continue
            if not entry.name.endswith(".tmp") or now - used.st_mtime > STALE:
                found.append((used.st_mtime, used.st_size, entry.path))
            else:
                size += used.st_size
        used_bytes = sum(bytes_ for _, bytes_, _ in found)
        for _, bytes_, oldest in sorted(found):
            if used_bytes + size <= limit:
                break
            Path(oldest).unlink(missing_ok=True)
            used_bytes -= bytes_
        with partial.open("wb") as file:
            file.truncate(size)
    return partial


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """Keeps other processes on this machine out; the system opens the lock of a process that was killed."""
    path = cache_folder() / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _usable_cache() -> Iterator[None]:
    """What fails on the disk in here is the cache's fault: that of an address arrives as an error of the user's."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"FACEBENCH_CACHE: {cache_folder()} cannot be used ({error}); name a folder with room that can be written"
        ) from error


class _DamagedError(Exception):
    """What arrived is not what was stored."""


class _MissingError(UserError):
    """There is no such file."""


def _expect(expected: str, found: str) -> None:
    if found != expected:
        raise _DamagedError(f"SHA-256 {found[:12]}..., expected {expected[:12]}...")


def _persistently(url: str, use: Callable[[IO[bytes]], T]) -> T:
    """Opens an address and uses the file, again and again with growing pauses while that fails.

    Raises:
        UserError: it kept failing, or trying again would not help.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
        try:
            with fsspec.open(url, "rb", **_options(url)) as file:
                return use(file)
        except UserError:  # of the cache
            raise
        except FileNotFoundError as error:
            raise _MissingError(f"{url}: no such file; check data.root") from error
        except PermissionError as error:
            raise UserError(f"{url}: access denied; check the credentials ({error})") from error
        except (ImportError, ValueError) as error:  # a package that is missing, or no address
            raise UserError(f"{url}: {error}; install what is missing or correct data.root") from error
        except Exception as error:
            last = error
    raise UserError(f"{url}: failed {ATTEMPTS} times, last by {type(last).__name__}: {last}; try again later") from last


def _options(url: str) -> dict[str, Any]:
    # One request that streams the file from its start; fsspec's HTTP files would ask for ranges, and not every server
    # has them.
    return {"block_size": 0} if url.startswith("http") else {}


def _read(file: IO[bytes]) -> bytes:
    contents = bytearray()
    # A stream gives what has arrived, which is not all.
    while block := file.read(BLOCK):
        contents += block
        if len(contents) >= LARGEST_FILE:
            raise _DamagedError(f"{LARGEST_FILE} bytes or more")
    return bytes(contents)


def _read_json(file: IO[bytes]) -> bytes:
    """The checksum of such a file is known to nobody; that it is whole shows when it is parsed."""
    contents = _read(file)
    try:
        json.loads(contents)
    except ValueError as error:
        raise _DamagedError(f"not JSON ({error})") from error
    return contents


def _write(path: Path, contents: bytes) -> None:
    """Several processes may do this at once, with the same contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(contents)
    partial.replace(path)
