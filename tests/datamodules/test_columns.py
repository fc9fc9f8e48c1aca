import io
import json
import shutil
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.columns import Column, build_column, read_columns
from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from datamodules.shards import Manifest, Shard
from datamodules.speech import SpeechDataModule

FRAMES = Column("loud", "speech", "path:a", "abc", "interpolate", 30, "float32")
WHOLE = Column("colour", "identity", "path:b", "abc", None, None, "float32")


def ramps(shard: Shard, width: int = 2, refuse: str = "") -> list[np.ndarray]:
    """For a clip of T frames the numbers 0 ... T - 1, in columns of 1, 2, ... times that."""
    if shard.file == refuse:
        raise RuntimeError("killed")
    return [np.arange(length)[:, None] * np.arange(1, width + 1) for length in shard.lengths]


def colours(shard: Shard) -> list[np.ndarray]:
    return [np.array([int(key.removeprefix("face-")), -1.0]) for key in shard.keys]


@pytest.fixture
def talking(talking_root, tmp_path) -> Path:
    return shutil.copytree(talking_root, tmp_path / "talking")


@pytest.fixture
def with_column(talking) -> Path:
    build_column(Manifest.read(talking), FRAMES, ramps, processes=1)
    return talking


def test_a_batch_holds_the_columns_padded_with_zeros(with_column):
    batch = next(iter(SpeechDataModule(str(with_column), batch_size=3, columns=["loud"]).loader("train")))
    assert batch.lengths.tolist() == batch.feature_lengths["loud"].tolist() == [15, 19, 23]
    assert batch.features["loud"].shape == (3, 23, 2)
    for clip, length in zip(batch.features["loud"], [15, 19, 23], strict=True):
        assert clip[:length, 1].tolist() == [2.0 * t for t in range(length)]
        assert not clip[length:].any()


def test_features_follow_their_samples_through_the_shuffle_and_workers(faces_root, tmp_path):
    root = shutil.copytree(faces_root, tmp_path / "faces")
    build_column(Manifest.read(root), WHOLE, colours, processes=1)
    data = FaceDataModule(str(root), batch_size=4, num_workers=1, columns=["colour"])
    seen = {}
    for batch in data.train_dataloader():
        seen |= dict(zip(batch.key, batch.features["colour"][:, 0].tolist(), strict=True))
    assert seen == {f"face-{i:03d}": float(i) for i in range(17)}


def test_the_tars_are_plain_npy_in_the_order_of_the_shard(with_column):
    with tarfile.open(with_column / "train-000000.loud.tar") as tar:
        names = tar.getnames()
        first = np.load(io.BytesIO(tar.extractfile(names[0]).read()))
    assert names == [f"{key}.npy" for key in Manifest.read(with_column).split("train")[0].keys]
    assert first.dtype == np.float32
    assert first.shape == (15, 2)


def test_the_data_set_stays_what_it_was(talking_root, with_column):
    assert Manifest.read(with_column).sha256 == Manifest.read(talking_root).sha256
    assert next(iter(SpeechDataModule(str(with_column), batch_size=3).loader("train"))).features == {}
    left = sorted(path.name for path in with_column.iterdir() if "loud" in path.name or path.name.startswith("."))
    assert left == ["test-000000.loud.tar", "train-000000.loud.tar", "val-000000.loud.tar"]


def test_a_killed_build_goes_on_and_a_finished_one_is_left_alone(talking):
    manifest = Manifest.read(talking)
    with pytest.raises(RuntimeError, match="killed"):
        build_column(manifest, FRAMES, partial(ramps, refuse="test-000000.tar"), processes=1)
    assert read_columns(manifest) == {}, "listed only when it is complete"
    written = (talking / "train-000000.loud.tar").stat().st_mtime_ns
    made = build_column(manifest, FRAMES, partial(ramps, refuse="train-000000.tar"), processes=1)
    assert (talking / "train-000000.loud.tar").stat().st_mtime_ns == written
    assert build_column(manifest, FRAMES, partial(ramps, refuse="train-000000.tar"), processes=1) == made


def test_leftovers_of_a_build_that_was_killed_early_do_no_harm(talking):
    manifest = Manifest.read(talking)
    state = talking / ".columns" / "loud"
    state.mkdir(parents=True)
    (state / "plan.7.tmp").touch()
    for name in ("train-000000.loud.tar.7.tmp", "train-000000.other.tar.7.tmp"):
        (talking / name).touch()
    build_column(manifest, FRAMES, ramps, processes=1)
    assert [path.name for path in talking.glob("*.tmp")] == ["train-000000.other.tar.7.tmp"], "of another build"
    assert not (talking / ".columns").exists()


def test_two_processes_write_the_same_bytes_as_one(with_column, talking_root, tmp_path):
    other = shutil.copytree(talking_root, tmp_path / "other")
    build_column(Manifest.read(other), FRAMES, ramps, processes=2)
    for name in ("columns.json", "train-000000.loud.tar", "test-000000.loud.tar"):
        assert (other / name).read_bytes() == (with_column / name).read_bytes()


def test_a_missing_tar_is_named_and_made_again(with_column):
    tar = with_column / "val-000000.loud.tar"
    contents = tar.read_bytes()
    tar.unlink()
    with pytest.raises(UserError, match=r"val-000000\.loud\.tar: missing"):
        SpeechDataModule(str(with_column), batch_size=2, columns=["loud"])
    build_column(Manifest.read(with_column), FRAMES, partial(ramps, refuse="train-000000.tar"), processes=1)
    assert tar.read_bytes() == contents


def test_a_column_of_other_shards_or_another_frame_rate_is_refused(with_column):
    path = with_column / "columns.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw).replace('"fps": 30', '"fps": 25'))
    with pytest.raises(UserError, match="aligned to 25 fps, but the clips have 30"):
        SpeechDataModule(str(with_column), batch_size=2, columns=["loud"])
    raw["columns"]["loud"]["tars"][0]["shard_sha256"] = "of another build"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"'loud' was made from another train-000000\.tar"):
        SpeechDataModule(str(with_column), batch_size=2, columns=["loud"])


def test_a_list_whose_tars_have_no_checksum_or_size_is_refused(with_column):
    path = with_column / "columns.json"
    for wrong in ({"sha256": "aa/../x"}, {"bytes": -1}):
        raw = json.loads(path.read_text())
        raw["columns"]["loud"]["tars"][0] |= wrong
        (with_column / "columns.json").write_text(json.dumps(raw))
        with pytest.raises(UserError, match=r"train-000000\.loud\.tar has sha256 .* expected 64 hexadecimal digits"):
            read_columns(Manifest.read(with_column))


def test_an_unknown_column_and_a_second_one_of_the_name_are_refused(with_column):
    with pytest.raises(UserError, match=r"no column 'quiet' \(columns: loud\)"):
        SpeechDataModule(str(with_column), batch_size=2, columns=["quiet"])
    other = Column("loud", "speech", "path:c", "def", "interpolate", 30, "float32")
    with pytest.raises(UserError, match=r"another column 'loud' \(weights abc, here def\)"):
        build_column(Manifest.read(with_column), other, ramps, processes=1)
    with pytest.raises(UserError, match="letters, digits"):
        build_column(
            Manifest.read(with_column), Column("../x", "speech", "", "", None, None, "float32"), ramps, processes=1
        )


def test_features_that_do_not_fit_are_refused(talking):
    manifest = Manifest.read(talking)

    def huge(shard: Shard) -> list[np.ndarray]:
        return [np.full((length, 1), 1e6) for length in shard.lengths]

    half = Column("half", "speech", "path:a", "abc", "native", None, "float16")
    with np.errstate(over="ignore"), pytest.raises(UserError, match="not finite in float16"):
        build_column(manifest, half, huge, processes=1)

    def short(shard: Shard) -> list[np.ndarray]:
        return [np.zeros((length - 1, 1)) for length in shard.lengths]

    build_column(manifest, FRAMES, short, processes=1)
    with pytest.raises(UserError, match=r"column 'loud' of 14 frames, the clip has 15"):
        next(iter(SpeechDataModule(str(talking), batch_size=2, columns=["loud"]).loader("train")))


def test_a_flipped_bit_in_a_column_is_noticed(with_column):
    tar = with_column / "train-000000.loud.tar"
    contents = bytearray(tar.read_bytes())
    contents[700] ^= 1
    tar.write_bytes(contents)
    with pytest.raises(UserError, match=r"damaged"):
        next(iter(SpeechDataModule(str(with_column), batch_size=6, columns=["loud"]).loader("train")))


def test_a_mix_needs_the_column_in_every_data_set(with_column, faces_root, tmp_path):
    one, two = (shutil.copytree(faces_root, tmp_path / name) for name in ("one", "two"))
    manifests = [Manifest.read(root) for root in (one, two)]
    for manifest in manifests:
        build_column(manifest, WHOLE, colours, processes=1)
    from datamodules.columns import select_columns

    merged = select_columns(manifests, ["colour"])["colour"]
    assert len(merged.tars) == 2 * len(manifests[0].shards)
    (two / "columns.json").unlink()
    with pytest.raises(UserError, match=r"two has no column 'colour'"):
        select_columns(manifests, ["colour"])


def test_features_are_float32_whatever_is_stored(talking):
    build_column(
        Manifest.read(talking), Column("h", "speech", "", "", "interpolate", 30, "float16"), ramps, processes=1
    )
    batch = next(iter(SpeechDataModule(str(talking), batch_size=3, columns=["h"]).loader("train")))
    assert batch.features["h"].dtype == torch.float32
