import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from datamodules.errors import UserError
from datamodules.shards import Manifest, Sample, ShardJob, build_shards, write_shard


def make(number: int) -> list[Sample]:
    return [Sample(f"{number}-{i}", i + 1, {"txt": f"{number} {i}".encode()}) for i in range(3)]


def refuse(number: int) -> list[Sample]:
    raise RuntimeError("killed")


def build(root: Path, plan=None, make_last=make, processes=2) -> Manifest:
    jobs = [ShardJob(f"train-{i:06d}.tar", "train", partial(make, i)) for i in range(2)]
    jobs.append(ShardJob("test-000000.tar", "test", partial(make_last, 9)))
    return build_shards(
        root,
        jobs,
        kind="words",
        name="test",
        fields={"a": 1},
        files={"extra": b"x"},
        plan=plan or {},
        processes=processes,
    )


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.iterdir())}


def test_the_same_plan_gives_the_same_bytes_on_any_number_of_processes(tmp_path):
    build(tmp_path / "one", processes=1)
    build(tmp_path / "two", processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_killed_build_goes_on_and_ends_alike(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        build(tmp_path / "killed", make_last=refuse, processes=1)
    first = tmp_path / "killed" / "train-000000.tar"
    written = first.stat().st_mtime_ns
    with pytest.raises(UserError, match=r"no manifest\.json"):
        Manifest.read(tmp_path / "killed")
    build(tmp_path / "killed")
    build(tmp_path / "whole")
    assert first.stat().st_mtime_ns == written, "a finished shard is kept"
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_finished_folder_is_left_alone_and_another_plan_refused(tmp_path, capsys):
    manifest = build(tmp_path / "a")
    capsys.readouterr()
    assert build(tmp_path / "a", make_last=refuse) == manifest
    assert capsys.readouterr().out == f"{tmp_path / 'a'}: already built, left as it is\n"
    with pytest.raises(UserError, match="other settings"):
        build(tmp_path / "a", plan={"seed": 1})


def test_a_shard_that_went_missing_from_a_killed_build_is_built_again(tmp_path):
    root = tmp_path / "killed"
    with pytest.raises(RuntimeError, match="killed"):
        build(root, make_last=refuse, processes=1)
    (root / "train-000000.tar").unlink()
    (root / "train-000001.tar").write_bytes(b"cut off")
    build(root)
    build(tmp_path / "whole")
    assert contents(root) == contents(tmp_path / "whole")


def test_processes_below_one_are_refused(tmp_path):
    for processes in (0, -1):
        with pytest.raises(UserError, match=rf"--processes {processes}: expected at least 1"):
            build(tmp_path / "a", processes=processes)


def linger(folder: Path) -> list[Sample]:
    (folder / str(os.getpid())).touch()
    time.sleep(600)
    return []


def build_and_linger(folder: Path) -> None:
    jobs = [ShardJob(f"train-{i:06d}.tar", "train", partial(linger, folder)) for i in range(2)]
    build_shards(folder / "out", jobs, kind="words", name="test", fields={}, plan={}, processes=2)


def test_the_workers_of_a_killed_build_end_with_it(tmp_path):
    builder = multiprocessing.get_context("spawn").Process(target=build_and_linger, args=(tmp_path,))
    builder.start()

    def workers() -> list[int]:
        return [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]

    wait_until(lambda: len(workers()) == 2)
    builder.kill()
    builder.join()
    wait_until(lambda: not any(is_running(worker) for worker in workers()))


def is_running(process: int) -> bool:
    """Whether it is more than an entry that nobody has collected yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_manifest_counts_what_the_shards_hold(tmp_path):
    manifest = build(tmp_path / "a")
    train = manifest.split("train")
    assert [key for shard in train for key in shard.keys] == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
    assert train[0].lengths == [1, 2, 3]
    assert train[0].bytes == (tmp_path / "a" / "train-000000.tar").stat().st_size


def test_the_hash_follows_the_contents_not_the_place(tmp_path):
    manifest = build(tmp_path / "a", plan={"seed": 0})
    assert build(tmp_path / "b", plan={"seed": 1}).sha256 == manifest.sha256
    swapped = [replace(shard, split={"train": "test", "test": "train"}[shard.split]) for shard in manifest.shards]
    for other in (
        replace(manifest, fields={"a": 2}),
        replace(manifest, kind="letters"),
        replace(manifest, shards=swapped),
        replace(manifest, files={}),
    ):
        assert other.sha256 != manifest.sha256
    assert replace(manifest, shards=manifest.shards[::-1], name="other").sha256 == manifest.sha256


def test_shards_are_written_under_a_temporary_name(tmp_path):
    def broken():
        yield Sample("0", 1, {"txt": b"0"})
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_shard(tmp_path / "a.tar", "train", broken())
    assert not (tmp_path / "a.tar").exists()
