import numpy as np
import pytest
from sklearn.preprocessing import MinMaxScaler

from datamodules.errors import UserError
from datamodules.sources import mead3d
from datamodules.sources.affine import Affine
from datamodules.speech import SpeechDataModule

EMOTIONS = ["neutral", "happy", "sad", "surprised", "fear", "disgusted", "angry", "contempt"]


def coefficients(tree, frames: int) -> np.ndarray:
    return tree.rng.uniform(-3, 3, (1, frames, 403)).astype(np.float32)


def write_npy(tree, *names) -> dict[str, np.ndarray]:
    clips = {}
    for name in names:
        clips[name] = tree.npy(f"param/{name}.npy", coefficients(tree, 10))
        tree.wav(f"wav/{name}.wav", 0.4)
    return clips


def scaled(clip: np.ndarray) -> np.ndarray:
    """As ``framework/data/mead.py`` scales, with scikit-learn."""
    exp = MinMaxScaler().fit(np.repeat([[-3.0], [3.0]], 50, axis=1))
    jaw = MinMaxScaler().fit(np.repeat([[-0.1], [0.5]], 3, axis=1))
    return np.concatenate([exp.transform(clip[0, :, 300:350]), jaw.transform(clip[0, :, 400:])], axis=1)


def test_probtalk3d_second_stage(tree, tmp_path, read_back):
    splits = {
        "train": ["M003_001_0_0", "M003_032_0_0", "W029_024_7_2"],
        "val": ["M003_033_0_0", "M003_036_0_0", "M003_025_1_0", "M003_027_1_1"],
        "test": ["M003_037_0_0", "M003_040_0_0", "M003_028_6_0", "M003_030_6_2"],
    }
    nowhere = ["M003_031_1_0", "M032_001_0_0", "M037_001_0_0"]
    clips = write_npy(tree, *(name for names in splits.values() for name in names), *nowhere)
    manifest = mead3d.build(tree.root, tmp_path / "out")
    module = SpeechDataModule(str(tmp_path / "out"), batch_size=1)
    for split, names in splits.items():
        batches = read_back(module, split)
        assert sorted(batches) == sorted(names)
        for name, batch in batches.items():
            np.testing.assert_allclose(batch.weights[0], scaled(clips[name]), atol=1e-6)
            assert batch.vertices.shape == (1, 10, 0, 3)
            subject, _, emotion, intensity = name.split("_")
            assert (batch.subject, batch.emotion.tolist()) == ([subject], [int(emotion)])
            assert batch.intensity.tolist() == [int(intensity)]
            recorded = Affine.described(manifest.fields["normalisation"])
            raw = np.concatenate([clips[name][0, :, 300:350], clips[name][0, :, 400:]], axis=1)
            np.testing.assert_allclose(recorded.invert(batch.weights[0].numpy()), raw, atol=1e-5)
    assert manifest.fields["vertices"] == 0
    assert manifest.fields["emotions"] == EMOTIONS
    assert len(module.train_subjects) == 32
    assert module.train_subjects[:2] + module.train_subjects[-1:] == ["M003", "M005", "W029"]
    assert len(manifest.fields["controls"]) == 53


def test_the_first_stage_splits_by_subject(tree, tmp_path):
    names = {"train": "W009_040_0_0", "val": "M035_001_1_1", "test": "W040_002_2_2"}
    write_npy(tree, *names.values(), "M999_001_0_0")
    manifest = mead3d.build(tree.root, tmp_path / "out", splits="stage1")
    assert {shard.split: shard.keys for shard in manifest.shards} == {split: [name] for split, name in names.items()}


def test_hdf5_gives_the_same(tree, tmp_path, read_back):
    import h5py

    whole = coefficients(tree, 12)
    path = tree.path("EMICA-MEAD_flame2020/M003/front/angry/level_3/007/shape_pose_cam.hdf5")
    with h5py.File(path, "w") as file:
        file["shape"], file["exp"], file["jaw"] = whole[..., :300], whole[..., 300:400], whole[..., 400:]
        file["global_pose"] = np.zeros((1, 12, 3))
    tree.wav("wav/M003_007_6_2.wav", 12 / 25)
    mead3d.build(tree.root, tmp_path / "out", normalisation="none")
    module = SpeechDataModule(str(tmp_path / "out"), batch_size=1)
    batch = read_back(module, "train")["M003_007_6_2"]
    np.testing.assert_array_equal(batch.weights[0], np.concatenate([whole[0, :, 300:350], whole[0, :, 400:]], axis=1))

    with h5py.File(path, "a") as file:
        del file["jaw"]
        file["jaw"] = whole[:, :5, 400:]
    with pytest.raises(UserError, match=r"shape_pose_cam\.hdf5: data sets .* expected exp \(1, T, 100\)"):
        mead3d.build(tree.root, tmp_path / "other")


def test_clips_without_fitting_sound_are_left_out_and_named(tree, tmp_path, capsys):
    write_npy(tree, "M003_001_0_0", "M003_002_0_0", "M003_003_0_0")
    (tree.root / "wav/M003_001_0_0.wav").unlink()
    tree.wav("wav/M003_002_0_0.wav", 4.0)
    manifest = mead3d.build(tree.root, tmp_path / "out")
    assert manifest.split("train")[0].keys == ["M003_003_0_0"]
    assert manifest.fields["without_sound"] == ["M003_001_0_0", "M003_002_0_0"]
    assert "2 of 3 clips have no sound" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("M003_001_0_0", (10, 403), r"expected \(1, T, 403\)"),
        ("M003_001_0", (1, 10, 403), "expected a name like M003_001_0_0"),
        ("M003_001_8_0", (1, 10, 403), "emotion 8 and intensity 0, expected 0 to 7"),
    ],
)
def test_other_files_are_refused(tree, tmp_path, name, shape, message):
    tree.npy(f"param/{name}.npy", np.zeros(shape))
    tree.wav(f"wav/{name}.wav", 0.4)
    with pytest.raises(UserError, match=message):
        mead3d.build(tree.root, tmp_path / "out")


def test_the_tools_take_data_without_vertices(tree, tmp_path):
    from datamodules.doctor import examine
    from datamodules.show import write_sheet

    write_npy(tree, "M003_001_0_0", "M003_033_0_0", "M003_037_0_0")
    mead3d.build(tree.root, tmp_path / "out")
    assert not examine(str(tmp_path / "out"), batch_size=1, processes=1).problems
    write_sheet(str(tmp_path / "out"), "train", 1, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 1000
