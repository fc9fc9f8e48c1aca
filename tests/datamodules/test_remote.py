"""A web server in this process, and fsspec's file system in memory in the place of a bucket."""

import json
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
import torch

from datamodules import remote
from datamodules.columns import Column, build_column, read_columns
from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from datamodules.shards import Manifest
from datamodules.speech import SpeechDataModule

PAUSE = time.sleep  # also where a test makes no pauses


class Server(ThreadingHTTPServer):
    """Serves a folder; ``failures`` says how often each file fails first, ``damage`` changes what is sent.

    With ``dripping``, what was changed comes in pieces, with pauses between them.
    """

    def __init__(self, root) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(root)))
        self.asked: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.damage = {}
        self.dripping = False
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.server.asked[name] += 1
        if self.server.failures[name] > 0:
            self.server.failures[name] -= 1
            self.send_error(503)
            return
        if name in self.server.damage:
            contents = self.server.damage[name]()
            self.send_response(200)
            self.send_header("Content-Length", str(len(contents)))
            self.end_headers()
            step = len(contents) // 4 + 1 if self.server.dripping else len(contents) + 1
            for start in range(0, len(contents), step):
                self.wfile.write(contents[start : start + step])
                if self.server.dripping:
                    PAUSE(0.05)
            return
        super().do_GET()

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FACEBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FACEBENCH_CACHE_GB", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The pauses between attempts, which are not made."""
    seconds: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", seconds.append)
    return seconds


@pytest.fixture
def server(faces_root, cache):
    with Server(faces_root) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def shard_of(faces_root, file: str):
    return next(shard for shard in Manifest.read(faces_root).shards if shard.file == file)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_address_gives_what_the_folder_gives(faces_root, server, num_workers):
    for split in ("train", "test"):
        near = FaceDataModule(str(faces_root), batch_size=3).loader(split, shuffle=split == "train")
        far = FaceDataModule(server.url + "/", batch_size=3, num_workers=num_workers).loader(split, split == "train")
        for ours, theirs in zip(far, near, strict=True):
            assert ours.key == theirs.key
            assert torch.equal(ours.image, theirs.image)
    assert max(server.asked[name] for name in server.asked if name.endswith(".tar")) == 1, "each shard is fetched once"


def test_a_bucket_gives_the_extra_files_too(talking_root, cache):
    bucket = fsspec.filesystem("memory")
    bucket.put(str(talking_root), "/bucket/talking", recursive=True)
    far, near = SpeechDataModule("memory://bucket/talking", batch_size=2), SpeechDataModule(str(talking_root), 2)
    assert far.manifest.sha256 == near.manifest.sha256
    assert list(far.templates) == list(near.templates)
    for ours, theirs in zip(far.loader("train"), near.loader("train"), strict=True):
        assert torch.equal(ours.vertices, theirs.vertices)


def test_columns_come_from_the_address_as_from_the_folder(talking_root, cache, tmp_path):
    near = shutil.copytree(talking_root, tmp_path / "talking")
    column = Column("loud", "speech", "path:a", "abc", "interpolate", 30, "float32")

    def make(shard):
        return [np.arange(2.0 * length).reshape(length, 2) for length in shard.lengths]

    build_column(Manifest.read(near), column, make, processes=1)
    fsspec.filesystem("memory").put(str(near), "/bucket/columns", recursive=True)
    loaders = [
        SpeechDataModule(root, batch_size=2, columns=["loud"], num_workers=1).loader("train")
        for root in ("memory://bucket/columns", str(near))
    ]
    for ours, theirs in zip(*loaders, strict=True):
        assert ours.features["loud"].numel()
        assert torch.equal(ours.features["loud"], theirs.features["loud"])


def test_a_column_that_the_address_lacks_is_named(server):
    assert read_columns(Manifest.read(server.url)) == {}
    with pytest.raises(UserError, match=r"data.columns: http://\S+ has no column 'loud' \(columns: none\)"):
        FaceDataModule(server.url, batch_size=2, columns=["loud"])


def test_failures_are_tried_again_with_growing_pauses(server, waits):
    server.failures = Counter({"manifest.json": 2, "val-000000.tar": 4})
    keys = [key for batch in FaceDataModule(server.url, batch_size=4).loader("val") for key in batch.key]
    assert len(keys) == 4
    assert waits == [0.5, 1, 0.5, 1, 2, 4]


def test_what_keeps_failing_or_is_missing_is_an_error(server, waits):
    server.failures["manifest.json"] = 99
    with pytest.raises(UserError, match=r"manifest.json: failed 6 times, last by .*503"):
        FaceDataModule(server.url, batch_size=4)
    assert len(waits) == 5
    with pytest.raises(UserError, match=r"nothing/manifest.json: no such file; check data.root"):
        FaceDataModule(server.url + "/nothing", batch_size=4)
    assert len(waits) == 5, "trying again would not help"
    with pytest.raises(UserError, match=r"nosuch://a/manifest.json: .*correct data.root"):
        FaceDataModule("nosuch://a", batch_size=4)


def test_a_large_manifest_that_arrives_in_pieces_is_read_whole(faces_root, server, waits):
    contents = (faces_root / "manifest.json").read_bytes() + b" " * 1_500_000
    server.damage["manifest.json"] = lambda: contents
    server.dripping = True
    manifest = Manifest.read(server.url)
    assert (manifest.root / "manifest.json").read_bytes() == contents
    assert waits == []


def test_a_manifest_that_is_cut_off_is_fetched_again(faces_root, server, waits):
    good = (faces_root / "manifest.json").read_bytes()
    sent = iter([good[:500], good])
    server.damage["manifest.json"] = lambda: next(sent)
    assert Manifest.read(server.url).sha256 == Manifest.read(faces_root).sha256
    assert waits == [0.5]


@pytest.mark.parametrize("name", ["aa/../../../victim/x", "A" * 64, "ab", 7, None])
def test_a_checksum_that_would_name_a_file_elsewhere_is_refused(faces_root, talking_root, server, cache, name):
    raw = json.loads((faces_root / "manifest.json").read_text())
    raw["shards"][0]["sha256"] = name
    server.damage["manifest.json"] = json.dumps(raw).encode
    with pytest.raises(UserError, match=r"manifest.json: sha256 '.*', expected 64 hexadecimal digits"):
        Manifest.read(server.url)
    with pytest.raises(UserError, match="expected 64 hexadecimal digits"):
        remote.fetch_shard(f"{server.url}/train-000000.tar", name, 10)


@pytest.mark.parametrize("size", [-1, 1.5, "9", True, None])
def test_a_shard_of_no_size_is_refused(faces_root, tmp_path, size):
    raw = json.loads((faces_root / "manifest.json").read_text())
    raw["shards"][0]["bytes"] = size
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="not a readable manifest"):
        Manifest.read(tmp_path)


def test_only_files_of_the_cache_make_room(faces_root, server, cache, monkeypatch):
    manifest = Manifest.read(server.url)
    shard = manifest.shards[0]
    monkeypatch.setenv("FACEBENCH_CACHE_GB", str(shard.bytes / 1e9))
    (cache / "shards").mkdir(parents=True)
    others = [cache / "shards" / name for name in ("thesis.txt", "x.tmp", "thesis.tar", "a" * 64)]
    old = cache / "shards" / f"{'a' * 64}.tar"
    for path in (*others, old):
        path.write_bytes(b"precious")
        remote.os.utime(path, (1, 1))
    manifest.locate(shard)
    assert all(path.is_file() for path in others)
    assert not old.exists()


def test_damage_on_the_way_is_noticed_and_fetched_again(faces_root, server, waits, cache):
    shard = shard_of(faces_root, "val-000000.tar")
    good = (faces_root / shard.file).read_bytes()
    sent = iter([bytes(1000) + good[1000:], good[:-5], good + b"more", good[::-1], good])
    server.damage[shard.file] = lambda: next(sent)
    path = Manifest.read(server.url).locate(shard)
    assert path.read_bytes() == good
    assert len(waits) == 4

    path.unlink()
    server.damage[shard.file] = lambda: good[::-1]
    with pytest.raises(UserError, match=r"val-000000.tar: failed 6 times, last by .*SHA-256"):
        Manifest.read(server.url).locate(shard)
    assert not [path for path in (cache / "shards").iterdir() if path.suffix == ".tar"]


def test_the_cache_stays_below_its_limit_and_drops_what_was_not_used_for_longest(
    faces_root, server, cache, monkeypatch
):
    manifest = Manifest.read(server.url)
    first, second, third = manifest.shards[:3]
    limit = max(first.bytes + second.bytes, first.bytes + third.bytes, second.bytes + third.bytes)
    monkeypatch.setenv("FACEBENCH_CACHE_GB", str(limit / 1e9))

    def cached() -> set[str]:
        paths = list((cache / "shards").iterdir())
        assert sum(path.stat().st_size for path in paths) <= limit
        return {path.stem for path in paths}

    paths = [manifest.locate(shard) for shard in (first, second)]
    for i, path in enumerate(paths):
        remote.os.utime(path, (i, i))  # used one after the other, long ago
    manifest.locate(first)
    manifest.locate(third)
    assert cached() == {first.sha256, third.sha256}
    monkeypatch.setenv("FACEBENCH_CACHE_GB", "0.000001")
    with pytest.raises(UserError, match=r"FACEBENCH_CACHE_GB: 1e-06, but one shard takes"):
        manifest.locate(second)
    monkeypatch.setenv("FACEBENCH_CACHE_GB", "much")
    with pytest.raises(UserError, match="FACEBENCH_CACHE_GB: 'much', expected a number"):
        manifest.locate(second)


def test_every_sample_is_read_through_a_cache_that_holds_one_shard(faces_root, server, cache, monkeypatch):
    largest = max(shard.bytes for shard in Manifest.read(faces_root).shards)
    monkeypatch.setenv("FACEBENCH_CACHE_GB", str(largest / 1e9))
    data = FaceDataModule(server.url, batch_size=4, num_workers=2)
    for split, count in (("train", 17), ("test", 8), ("val", 4)):
        assert sum(len(batch) for batch in data.loader(split)) == count


def test_many_processes_fetch_a_shard_once_and_leftovers_do_no_harm(faces_root, server, cache):
    shard = shard_of(faces_root, "test-000000.tar")
    (cache / "shards").mkdir(parents=True)
    (cache / "shards" / f"{shard.sha256}.tmp").write_bytes(b"of a process that was killed")
    manifest = Manifest.read(server.url)
    with ThreadPoolExecutor(8) as pool:  # a lock belongs to an open file, so that threads do for processes
        paths = set(pool.map(manifest.locate, [shard] * 8))
    assert server.asked[shard.file] == 1
    assert paths.pop().read_bytes() == (faces_root / shard.file).read_bytes()
    assert [path.suffix for path in (cache / "shards").iterdir()] == [".tar"]


def test_a_data_set_that_was_built_anew_is_fetched_anew(faces_root, server, cache):
    old = Manifest.read(server.url)
    contents = (faces_root / "manifest.json").read_text().replace('"name": "test data"', '"name": "newer"')
    server.damage["manifest.json"] = contents.encode
    new = Manifest.read(server.url)
    assert (old.name, new.name) == ("test data", "newer")
    assert old.root != new.root


def keys_of(server, **settings) -> list[str]:
    return [key for batch in FaceDataModule(server.url, batch_size=4, **settings).loader("train") for key in batch.key]


@pytest.mark.parametrize("recorded", [True, False])
def test_a_cached_shard_that_was_damaged_is_fetched_once_more(faces_root, server, cache, recorded):
    if not recorded:
        raw = json.loads((faces_root / "manifest.json").read_text())
        for shard in raw["shards"]:
            del shard["sizes"], shard["checksums"]
        server.damage["manifest.json"] = json.dumps(raw).encode
    good = keys_of(server)
    for damage in (lambda contents: contents[:600] + bytes(100) + contents[700:], lambda contents: contents[:-1000]):
        for path in (cache / "shards").iterdir():
            path.write_bytes(damage(path.read_bytes()))
        assert keys_of(server) == good
    assert server.asked["train-000000.tar"] == 3


def test_what_the_address_itself_gives_damaged_is_a_bad_sample(faces_root, server):
    raw = json.loads((faces_root / "manifest.json").read_text())
    raw["shards"][0]["checksums"][0] ^= 1
    server.damage["manifest.json"] = json.dumps(raw).encode
    with pytest.raises(UserError, match=rf"^{server.url}/train-000000.tar: sample 'face-000': damaged bytes"):
        keys_of(server)
    assert server.asked["train-000000.tar"] == 2


def test_a_shard_that_makes_room_while_it_is_looked_for_is_fetched_again(server, monkeypatch):
    good, utime, evicted = keys_of(server), remote.os.utime, []

    def evict_first(path):
        if not evicted:
            evicted.append(path)
            path.unlink()
        utime(path)

    monkeypatch.setattr(remote.os, "utime", evict_first)
    assert keys_of(server, on_bad_sample="skip") == good
    assert evicted


def test_a_cache_that_cannot_be_used_is_named(server, cache, monkeypatch):
    manifest = Manifest.read(server.url)
    (cache / "shards").write_text("a file in the folder's place")
    with pytest.raises(UserError, match=r"^FACEBENCH_CACHE: \S+/cache cannot be used .*; name a folder"):
        manifest.locate(manifest.shards[0])
    (cache / "shards").unlink()
    path = manifest.locate(manifest.shards[0])
    monkeypatch.setattr(remote, "_is_cached", lambda *_: True)
    path.unlink()
    path.symlink_to(path)  # the user of the tests may open everything but this
    with pytest.raises(UserError, match=r"tar: Too many levels of symbolic links; .* FACEBENCH_CACHE"):
        keys_of(server, on_bad_sample="skip")
    monkeypatch.setenv("FACEBENCH_CACHE", "/proc/nope")
    with pytest.raises(UserError, match=r"^FACEBENCH_CACHE: /proc/nope cannot be used"):
        Manifest.read(server.url)
