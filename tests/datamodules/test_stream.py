import pytest
import torch
import webdataset as wds

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from datamodules.shards import Manifest, Shard
from datamodules.speech import SpeechDataModule
from datamodules.stream import BatchPlan


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
