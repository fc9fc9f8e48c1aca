"""What a data module adds to the stream: settings, bad samples and mixes."""

import json
import shutil
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import webdataset as wds

from datamodules.datamodule import Source
from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from datamodules.shards import Manifest, Sample, npy_bytes, write_shard
from datamodules.speech import SpeechDataModule


def rewritten(root: Path, out: Path, edit=lambda sample: sample, **fields) -> str:
    """A copy of a data set whose samples were changed before they were written, so that all checksums hold."""
    raw = json.loads((root / "manifest.json").read_text())
    raw["fields"] |= fields
    out.mkdir()
    for name in raw["files"]:
        shutil.copy(root / name, out / name)
    for i, shard in enumerate(raw["shards"]):
        stored = wds.WebDataset(str(root / shard["file"]), shardshuffle=False)
        samples = [
            edit(Sample(members["__key__"], length, {k: v for k, v in members.items() if not k.startswith("__")}))
            for members, length in zip(stored, shard["lengths"], strict=True)
        ]
        raw["shards"][i] = asdict(write_shard(out / shard["file"], shard["split"], samples))
    (out / "manifest.json").write_text(json.dumps(raw))
    return str(out)


def spoilt(bad: dict[str, dict[str, bytes]]):
    """An edit that replaces members of some samples."""
    return lambda sample: sample._replace(members={**sample.members, **bad.get(sample.key, {})})


def on_rank(module, rank: int, world: int):
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    return module


NOT_FINITE = npy_bytes(np.full((15, 12, 3), np.nan, np.float16))
OTHER_MESH = npy_bytes(np.zeros((15, 11, 3), np.float16))
PICKLED = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n."


@pytest.mark.parametrize(
    ("member", "contents", "says"),
    [
        ("offsets.npy", NOT_FINITE, "vertices are not finite"),
        ("offsets.npy", OTHER_MESH, "wrong topology"),
        ("offsets.npy", PICKLED, "npy header and data differ"),
        ("offsets.npy", b"noise", "not an npy array"),
        ("wav", b"noise", "not decodable"),
        ("json", b"[" * 10_000, "not decodable"),
        ("json", b'{"subject": "nobody"}', "unknown subject"),
    ],
)
def test_a_bad_clip_is_an_error_that_names_it(talking_root, tmp_path, member, contents, says):
    root = rewritten(talking_root, tmp_path / "bad", spoilt({"anna-001": {member: contents}}))
    for workers in (0, 1):
        with pytest.raises(UserError, match=rf"train-000000.tar: sample 'anna-001': {says}") as error:
            list(SpeechDataModule(root, batch_size=3, num_workers=workers).loader("train"))
        assert "\n" not in str(error.value)


@pytest.fixture
def bad_faces(faces_root, tmp_path) -> str:
    """Of 17 training images two are no images, one is too large; of 8 test images one is none."""
    large = tmp_path / "large.png"
    from PIL import Image

    Image.new("RGB", (33, 32)).save(large)
    noise, other = {"png": b"noise"}, {"png": large.read_bytes()}
    bad = {"face-003": noise, "face-012": noise, "face-013": other, "face-035": noise}
    return rewritten(faces_root, tmp_path / "bad", spoilt(bad))


BAD = {"face-003", "face-012", "face-013"}


def test_skipped_samples_are_counted_by_shard_and_kind_and_said_once(bad_faces):
    loader = FaceDataModule(bad_faces, batch_size=4, on_bad_sample="skip", max_bad_share=0.2).train_dataloader()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        list(loader)
    kinds = Counter({kind for _, kind in loader.bad})
    assert loader.bad["train-000000.tar", "not decodable: UnidentifiedImageError"] == 1
    assert loader.bad["train-000001.tar", "not decodable: UnidentifiedImageError"] == 1
    assert loader.bad["train-000001.tar", "image of another size"] == 1
    assert len(said) == len(kinds) == 2


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("world", [1, 2, 3])
def test_skipping_keeps_the_batches_of_training(faces_root, bad_faces, world):
    """In the place of a bad sample stands another of its batch; all else is as it would be."""
    for rank in range(world):
        runs = [
            on_rank(FaceDataModule(root, 3, workers, on_bad_sample="skip", max_bad_share=1.0), rank, world)
            for root, workers in ((str(faces_root), 0), (bad_faces, 0), (bad_faces, 2))
        ]
        good, skipped, again = [[batch.key for batch in module.train_dataloader()] for module in runs]
        assert skipped == again
        assert len(skipped) == len(good) == 6 // world
        for intact, found in zip(good, skipped, strict=True):
            assert len(found) == len(intact)
            for key, stands in zip(intact, found, strict=True):
                assert stands == key if key not in BAD else stands not in BAD
            if set(intact) - BAD:
                assert set(found) == set(intact) - BAD


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("world", [1, 2, 3])
def test_skipping_masks_in_evaluation(bad_faces, world):
    keys, counts = [], set()
    for rank in range(world):
        data = FaceDataModule(bad_faces, batch_size=3, on_bad_sample="skip", max_bad_share=1.0)
        batches = list(on_rank(data, rank, world).test_dataloader())
        counts.add(len(batches))
        keys += [key for batch in batches for key, real in zip(batch.key, batch.real, strict=True) if real]
    assert len(counts) == 1
    assert sorted(keys) == [f"face-{i:03d}" for i in range(30, 38) if i != 35]


@pytest.mark.filterwarnings("ignore:skipped")
def test_too_many_bad_samples_are_an_error(bad_faces):
    with pytest.raises(UserError, match=r"1 samples skipped, data.max_bad_share 0.01 allows 0 in an epoch.*repair"):
        list(FaceDataModule(bad_faces, batch_size=4, on_bad_sample="skip").train_dataloader())
    assert len(list(FaceDataModule(bad_faces, 4, on_bad_sample="skip", max_bad_share=0.2).train_dataloader())) == 5


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_rank_may_skip_as_many_as_the_whole_epoch(bad_faces):
    for rank in range(8):
        data = FaceDataModule(bad_faces, batch_size=1, on_bad_sample="skip", max_bad_share=0.18)  # 3 of 17
        list(on_rank(data, rank, 8).train_dataloader())


def test_settings_that_make_no_sense_are_named(faces_root):
    root = str(faces_root)
    for settings, says in (
        ({}, "data.batch_size, data.frames_per_batch: expected one of them"),
        ({"batch_size": 2, "frames_per_batch": 2}, "expected one of them"),
        ({"frames_per_batch": 0}, "data.frames_per_batch: 0"),
        ({"batch_size": 2, "max_bad_share": 2.0}, "data.max_bad_share: 2.0"),
    ):
        with pytest.raises(UserError, match=says):
            FaceDataModule(root, **settings)
    with pytest.raises(UserError, match=r"data.root: weight 0 of"):
        FaceDataModule([Source(root, 0)], batch_size=2)


@pytest.fixture
def two(faces_root, tmp_path) -> list[str]:
    """The faces, and the same images with their colours under other keys."""
    other = rewritten(faces_root, tmp_path / "b", lambda sample: sample._replace(key=sample.key.replace("face", "b")))
    return [str(faces_root), other]


def mixed(two, weights, seed=0, **settings):
    sources = [Source(root, weight) for root, weight in zip(two, weights, strict=True)]
    return FaceDataModule(sources, batch_size=4, seed=seed, **settings)


def test_a_mix_gives_each_data_set_its_weight(two):
    counts: Counter[str] = Counter()
    loader = mixed(two, [3, 1]).train_dataloader()
    for _ in range(40):
        counts.update(key.split("-")[0] for batch in loader for key in batch.key)
    assert counts.total() == pytest.approx(40 * 34, abs=40 * 3)  # an epoch is as long as both together
    assert counts["face"] / counts["b"] == pytest.approx(3, rel=0.15)


def test_a_mix_uses_each_data_set_evenly(two):
    loader = mixed(two, [3, 1]).train_dataloader()
    counts = Counter(key for _ in range(20) for batch in loader for key in batch.key)
    for name in ("face", "b"):
        used = [number for key, number in counts.items() if key.startswith(name)]
        assert len(used) == 17
        assert max(used) - min(used) <= 4


@pytest.mark.parametrize("world", [1, 2])
def test_a_mix_resumes_and_gives_ranks_equal_counts(two, world):
    def loader(rank, **settings):
        return on_rank(mixed(two, [2, 1], seed=3, **settings), rank, world).train_dataloader()

    runs = []
    for rank in range(world):
        whole = loader(rank)
        epochs = [[batch.key for batch in whole] for _ in range(2)]
        killed = loader(rank)
        list(killed)
        stream = iter(killed)
        before = [next(stream).key for _ in range(2)]
        resumed = loader(rank, num_workers=1)
        resumed.load_state_dict(killed.state_dict())
        assert before + [batch.key for batch in resumed] == epochs[1]
        runs.append(epochs)
    assert {len(epoch) for epochs in runs for epoch in epochs} == {len(loader(0))}
    assert runs[0][0] != runs[0][1]


def test_a_mix_is_evaluated_whole(two):
    keys = [key for batch in mixed(two, [5, 1]).test_dataloader() for key in batch.key]
    assert keys == [f"{name}-{i:03d}" for name in ("face", "b") for i in range(30, 38)]


def test_data_sets_that_do_not_agree_are_not_mixed(two, faces_root, tmp_path):
    other = rewritten(faces_root, tmp_path / "other", attributes=["Male"])
    with pytest.raises(UserError, match=r"data.root: field 'attributes' is \['Male'\] in .*other, but \['Eyeglasses'"):
        mixed([two[0], other], [1, 1])
    with pytest.raises(UserError, match=r"data.root: key 'face-000' is in .* and in"):
        mixed([two[0], two[0]], [1, 1])


def test_a_mix_of_clips_knows_all_subjects(talking_root, tmp_path):
    def rename(sample: Sample) -> Sample:
        return sample._replace(key=f"x{sample.key}")

    other = rewritten(talking_root, tmp_path / "more", rename, train_subjects=["bert", "carla"])
    data = SpeechDataModule([Source(str(talking_root)), Source(other, 2.0)], batch_size=2)
    assert data.train_subjects == ["anna", "bert", "carla"]
    batch = next(iter(data.val_dataloader()))
    assert batch.subject_index.tolist() == [2, 2]
    assert data.manifest.sha256 != Manifest.read(talking_root).sha256
    assert data.manifest.name == "test data + test data"
