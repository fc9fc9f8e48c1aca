import fcntl
import multiprocessing
import random
import signal
import time
import warnings
from collections import Counter
from itertools import chain, pairwise
from types import SimpleNamespace

import pytest
import torch
import webdataset as wds

from datamodules import stream
from datamodules.errors import BadSample, UserError
from datamodules.faces import FaceDataModule
from datamodules.shards import Manifest, Sample, Shard, write_shard
from datamodules.speech import SpeechDataModule
from datamodules.stream import BatchPlan, ShardDataset


def shards(*sizes: int) -> list[Shard]:
    return [
        Shard(f"{i}.tar", "train", 0, "", [f"{i}-{k}" for k in range(size)], [10 * i + k for k in range(size)])
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(7,), (5, 3, 9), (1, 30, 2, 4)])
def test_every_rank_gets_equally_many_training_batches(world, sizes):
    plans = [BatchPlan(shards(*sizes), 3, shuffle=True, rank=rank, world=world) for rank in range(world)]
    batches = [list(plan) for plan in plans]
    assert {len(rank) for rank in batches} == {len(plans[0])}
    given = [number for rank in batches for batch in rank for number in batch]
    assert len(given) == len(set(given))


def test_training_gives_every_sample_once_and_reshuffles():
    plan = BatchPlan(shards(5, 3, 9), 3, shuffle=True, seed=1)
    first = list(plan)
    assert sorted(number for batch in first for number in batch) == list(range(17))
    assert list(plan) == first, "the same epoch is the same"
    plan.set_epoch(1)
    assert list(plan) != first


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_gives_every_sample_once_over_all_ranks(world):
    plans = [BatchPlan(shards(5, 3, 9), 4, shuffle=False, rank=rank, world=world) for rank in range(world)]
    assert {len(list(plan)) for plan in plans} == {len(plans[0])}, "no rank waits for another"
    given = sorted(number for plan in plans for batch in plan for number in batch if number >= 0)
    assert given == list(range(17))


def test_batches_hold_clips_of_similar_length():
    lengths = torch.randint(20, 200, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    shard = Shard("a.tar", "train", 0, "", [str(i) for i in range(400)], lengths)
    plan = BatchPlan([shard], 8, shuffle=True)
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in plan)
    assert padded < 1.1 * sum(lengths)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_budget_of_frames_is_kept(world):
    lengths = torch.randint(1, 300, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    cut = [0, 10, 400, 430, 700]
    parts = [Shard(f"{a}.tar", "train", 0, "", [str(i) for i in range(a, b)], lengths[a:b]) for a, b in pairwise(cut)]
    plans = [BatchPlan(parts, shuffle=True, frames_per_batch=1000, rank=r, world=world) for r in range(world)]
    for epoch in range(3):
        for plan in plans:
            plan.set_epoch(epoch)
        assert sorted(n for batch in plans[0].all_batches() for n in batch) == list(range(700))
        batches = [list(plan) for plan in plans]
        assert {len(rank) for rank in batches} == {len(plans[0])}, "the same on every rank and in every epoch"
        padded = [len(batch) * max(lengths[n] for n in batch) for rank in batches for batch in rank]
        assert max(padded) <= 1000
        assert sum(padded) / len(padded) > 750
    evaluation = BatchPlan(parts, shuffle=False, frames_per_batch=250)
    assert [n for batch in evaluation for n in batch] == list(range(700))
    assert all(len(batch) * max(lengths[n] for n in batch) <= 250 or len(batch) == 1 for batch in evaluation)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (1.0, 5.0)])
def test_a_mix_within_a_budget_of_frames_trains_on_rare_lengths_too(weights):
    """Some clips are so rare that an epoch does not fill a batch with them."""
    drawn = random.Random(0)
    lengths = [20 + i % 3 if i % 10 == 0 else drawn.randint(100, 200) for i in range(600)]
    cuts = range(0, 601, 100)
    parts = [Shard(f"{a}.tar", "train", 0, "", [str(i) for i in range(a, b)], lengths[a:b]) for a, b in pairwise(cuts)]
    mix, epochs = [(2, weights[0]), (4, weights[1])], 40

    def plan(rank=0, world=1):
        return BatchPlan(parts, shuffle=True, seed=1, frames_per_batch=1600, mix=mix, rank=rank, world=world)

    alone, ranks, counts = plan(), [plan(rank, 9) for rank in range(9)], Counter()
    shared: Counter[int] = Counter()
    for epoch in range(epochs):
        for each in (alone, *ranks):
            each.set_epoch(epoch)
        batches = list(alone)
        assert len(batches) == len(alone) == plan().total
        assert {len(list(each)) for each in ranks} == {len(alone) // 9} == {len(ranks[0])}
        shared.update(n for each in ranks for batch in each for n in batch)
        assert max(len(batch) * max(lengths[n] for n in batch) for batch in batches) <= 1600
        given = [n for batch in batches for n in batch]
        assert 570 <= len(given) <= 600, "at most a few batches are left out"
        counts.update(given)
    for source, numbers in enumerate((range(200), range(200, 600))):
        expected = epochs * 600 * weights[source] / sum(weights) / len(numbers)
        for rare in (True, False):
            found = [counts[n] for n in numbers if (lengths[n] < 50) == rare]
            assert sum(found) / len(found) == pytest.approx(expected, rel=0.05)
            by_all = [shared[n] for n in numbers if (lengths[n] < 50) == rare]
            assert sum(by_all) / len(by_all) > 0.7 * expected, "what ranks cannot share is not always the same"
    resumed = plan()
    alone.done = 7
    resumed.load_state_dict(alone.state_dict())
    assert list(resumed) == batches[7:]


def test_a_batch_that_is_bad_as_a_whole_stays_within_its_budget(tmp_path):
    def dataset(lengths: list[int], bad: set[int]) -> ShardDataset:
        samples = [Sample(str(i), length, {"txt": b"x"}) for i, length in enumerate(lengths)]
        shard = write_shard(tmp_path / "train-000000.tar", "train", samples)

        def decode(key, _):
            if int(key) in bad:
                raise BadSample("bad")
            return int(key)

        manifest = Manifest(tmp_path, "words", "test", {}, [shard])
        return ShardDataset(manifest, "train", decode, lambda s: SimpleNamespace(numbers=s), (), "skip", training=True)

    short = dataset([200, 10, 10, 200, 9, 10], {1, 2})[[1, 2]]
    assert short.batch.numbers == [4, 4], "the next that is as short"
    assert short.batch.real.tolist() == [True, True]
    alone = dataset([200, 10, 10, 200, 150, 30], {1, 2, 5})[[1, 2]]
    assert alone.batch.numbers == [4], "no other is as short: the shortest, which may be a batch of its own"
    assert alone.batch.real.tolist() == [True]
    assert {sample.number for sample in alone.bad} == {1, 2, 5}


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_killed_anywhere_the_rest_is_what_it_would_have_been(faces_root, world, num_workers):
    """Ranks that resume one by one, within an epoch and at its border; the last one also on other workers."""

    def loader(rank, workers=num_workers):
        data = FaceDataModule(str(faces_root), batch_size=2, num_workers=workers, seed=5)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
        return data.train_dataloader()

    for rank in range(world):
        whole = loader(rank, 0)
        expected = [batch.key for _ in range(2) for batch in whole]
        length = len(whole)
        assert len(expected) == 2 * length == 2 * (9 // world)
        for given in {1, length, length + 1} if rank == world - 1 else {length - 1}:
            killed = loader(rank)
            stream = chain.from_iterable(killed for _ in range(2))
            before = [next(stream).key for _ in range(given)]
            state = killed.state_dict()
            assert state["epoch"] * length + state["given"] // world == given
            resumed = loader(rank)
            resumed.load_state_dict(state)
            after = [batch.key for batch in resumed]
            if len(before) + len(after) < 2 * length:
                after += [batch.key for batch in resumed]
            assert before + after == expected


@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 3), (2, 1), (2, 3), (3, 2)])
def test_on_another_number_of_ranks_nothing_comes_twice(before, after):
    parts, given = shards(40, 3, 29), 4

    def plans(world):
        return [BatchPlan(parts, 3, shuffle=True, seed=2, rank=rank, world=world) for rank in range(world)]

    old = plans(before)
    seen = [n for plan in old for batch in list(plan)[:given] for n in batch]
    old[0].done = given
    resumed = plans(after)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for plan in resumed:
            plan.load_state_dict(old[0].state_dict())
    rest = [list(plan) for plan in resumed]
    assert {len(batches) for batches in rest} == {resumed[0].left}
    seen += [n for batches in rest for batch in batches for n in batch]
    assert len(seen) == len(set(seen))
    total = 24  # batches of 72 samples
    lost = (total - given * before) % after
    assert len(seen) == 3 * (total - lost)
    assert len(said) == (after if lost else 0)
    if lost:
        assert f"{lost} batches at its end are left out" in str(said[0].message)
    for plan in resumed:
        plan.set_epoch(1)
        assert len(list(plan)) == len(plan) == total // after


def test_a_finished_epoch_stays_finished_on_other_ranks():
    old = BatchPlan(shards(20), 3, shuffle=True, rank=0, world=3)  # 7 batches, of which one is left out
    old.done = 2
    resumed = BatchPlan(shards(20), 3, shuffle=True)
    resumed.load_state_dict(old.state_dict())
    assert list(resumed) == []
    assert resumed.left == 0


def test_a_resumed_run_with_other_batches_says_that_the_epoch_starts_over():
    old = BatchPlan(shards(20), 3, shuffle=True)
    old.done = 2
    resumed = BatchPlan(shards(20), 4, shuffle=True)
    with pytest.warns(UserWarning, match="the epoch starts over"):
        resumed.load_state_dict(old.state_dict())
    assert sorted(n for batch in resumed for n in batch) == list(range(20))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_resumes_behind_the_batches_it_gave(faces_root, num_workers):
    def loader():
        return FaceDataModule(str(faces_root), batch_size=3, num_workers=num_workers, seed=7).train_dataloader()

    whole = [batch.key for batch in loader()]
    interrupted = loader()
    stream = iter(interrupted)
    before = [next(stream).key for _ in range(2)]
    state = interrupted.state_dict()

    resumed = loader()
    resumed.load_state_dict(state)
    resumed.plan.set_epoch(state["epoch"])
    assert before + [batch.key for batch in resumed] == whole
    assert len(resumed) == len(whole), "the length stays that of the epoch: Lightning counts by it"


@pytest.fixture
def hanging_workers(monkeypatch, tmp_path):
    """Hangs the first workers that are forked, deaf to polite signals like one that hangs in the fork itself."""
    report, forked = stream._report, tmp_path / "forked"

    def hang(times: int) -> None:
        def report_or_hang(started, worker):
            with forked.open("a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write("x")
                file.flush()
                number = file.tell()
            if number <= times:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(600)
            report(started, worker)

        monkeypatch.setattr(stream, "_report", report_or_hang)
        monkeypatch.setattr(stream, "START_SECONDS", 1.0)
        monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # PyTorch's wait for each

    return hang


def test_workers_that_hang_in_the_fork_are_forked_again(faces_root, hanging_workers):
    data = FaceDataModule(str(faces_root), batch_size=3, seed=7)
    expected = [batch.key for batch in data.train_dataloader()]
    hanging_workers(3)
    data.num_workers = 2
    loader, before = data.train_dataloader(), set(multiprocessing.active_children())
    assert [batch.key for batch in loader] == expected
    assert len(set(multiprocessing.active_children()) - before) == 2, "the hung ones are gone"
    assert len([batch.key for batch in loader]) == len(expected), "the next epoch uses the same workers"


def test_workers_that_never_start_are_one_clear_error(faces_root, hanging_workers, monkeypatch):
    hanging_workers(99)
    monkeypatch.setattr(stream, "STARTS", 2)
    loader = FaceDataModule(str(faces_root), batch_size=3, num_workers=1).train_dataloader()
    before = set(multiprocessing.active_children())
    with pytest.raises(UserError, match=r"workers did not start within 1 seconds, 2 times.*data.num_workers is 1"):
        next(iter(loader))
    assert not set(multiprocessing.active_children()) - before


def test_batches_hold_what_webdataset_reads(faces_root):
    module = FaceDataModule(str(faces_root), batch_size=8)
    ours = {key: image for batch in module.loader("test") for key, image in zip(batch.key, batch.image, strict=True)}
    urls = [str(faces_root / shard.file) for shard in Manifest.read(faces_root).split("test")]
    theirs = list(wds.WebDataset(urls, shardshuffle=False).decode("torchrgb"))
    assert len(theirs) == len(ours) == 8
    for sample in theirs:
        torch.testing.assert_close(ours[sample["__key__"]], sample["png"] * 2 - 1)


def test_clips_are_padded_by_their_template(talking_root):
    batch = next(iter(SpeechDataModule(str(talking_root), batch_size=3).loader("train")))
    assert batch.lengths.tolist() == [15, 19, 23]
    assert batch.frame_mask.sum(1).tolist() == [15, 19, 23]
    torch.testing.assert_close(batch.vertices[0, 15:], batch.template[0].expand(8, -1, -1))
    assert (batch.audio[0, batch.audio_lengths[0] :] == 0).all()
    assert batch.audio_lengths.tolist() == [length * 16_000 // 30 for length in (15, 19, 23)]


def test_subjects_are_numbered_by_the_training_order(talking_root):
    module = SpeechDataModule(str(talking_root), batch_size=6)
    assert next(iter(module.loader("train"))).subject_index.tolist() == [0, 0, 0, 1, 1, 1]
    assert next(iter(module.loader("test"))).subject_index.tolist() == [-1, -1, -1]


def test_a_truncated_shard_is_refused_before_reading(faces_root, tmp_path):
    import shutil

    root = shutil.copytree(faces_root, tmp_path / "faces")
    shard = root / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"train-000001.tar: \d+ bytes, expected \d+"):
        FaceDataModule(str(root), batch_size=2).train_dataloader()


def test_a_damaged_image_names_shard_and_sample(faces_root, tmp_path):
    import shutil

    root = shutil.copytree(faces_root, tmp_path / "faces")
    shard = root / "test-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"IHDR", b"XXXX"))
    with pytest.raises(UserError, match=r"test-000000.tar: sample 'face-030': damaged bytes"):
        next(iter(FaceDataModule(str(root), batch_size=2).loader("test")))


def test_missing_things_are_named(faces_root, talking_root, tmp_path):
    with pytest.raises(UserError, match="no such data folder"):
        FaceDataModule(str(tmp_path / "nowhere"), batch_size=2)
    with pytest.raises(UserError, match=r"no manifest\.json"):
        FaceDataModule(str(tmp_path), batch_size=2)
    with pytest.raises(UserError, match="holds 'talking-heads', expected 'faces'"):
        FaceDataModule(str(talking_root), batch_size=2)
    with pytest.raises(UserError, match="no samples in split 'holdout'"):
        FaceDataModule(str(faces_root), batch_size=2).loader("holdout")
