import pickle

import numpy as np
import pytest

from datamodules.errors import UserError
from datamodules.sources import multiface
from datamodules.sources.affine import Affine
from datamodules.speech import SpeechDataModule

V = 7
# FaceDiffuser's preprocess.py
LOW, HIGH = np.array([-117.798, -213.735, -177.091]), np.array([125.922, 185.79601, 75.365097])
# Names around the traps of the order: an underscore comes after letters, upper case counts as lower case.
ORDER = ["SEN_all_your", "SEN_as_she", "SEN_a_voice", "SEN_by_eating", "SEN_cliff", "SEN_did_Shawn", "SEN_do_they"]
ORDER += [f"SEN_e{i:02d}" for i in range(33)] + ["SEN_they", "SEN_they_all", "SEN_the_small", "SEN_when", "SEN_why"]
ORDER += [f"SEN_x{i}" for i in range(5)]
NAMES = dict(enumerate(ORDER, start=1))
IDENTITIES = {"02": "m--20180105--0000--002539136--GHS", "01": "m--20171024--0000--002757580--GHS"}


def write_bin(tree, name: str, mesh: np.ndarray) -> None:
    mesh.astype("<f4").tofile(tree.path(name))


def release(tree):
    assert len(ORDER) == 50
    meshes, neutral = {}, {}
    for who, folder in IDENTITIES.items():
        neutral[who] = tree.rng.uniform(-100, 70, (V, 3)).astype(np.float32)
        write_bin(tree, f"{folder}/tracked_mesh/E001_Neutral_Eyes_Open/000102.bin", neutral[who])
        write_bin(tree, f"{folder}/tracked_mesh/E001_Neutral_Eyes_Open/000105.bin", neutral[who] + 1)
        for number, name in NAMES.items():
            tree.path(f"{folder}/tracked_mesh/{name}/000102_transform.txt").write_text("head pose")
            if number not in (1, 3, 41, 50):
                continue
            mesh = (neutral[who] + tree.rng.normal(0, 2, (3, V, 3))).astype(np.float32)
            for i, frame in enumerate(mesh):
                write_bin(tree, f"{folder}/tracked_mesh/{name}/{102 + 3 * i:06d}.bin", frame)
            tree.wav(f"{folder}/audio/{name}.wav", 0.1)
            meshes[f"{who}_{number:02d}"] = mesh
    return meshes, neutral


def test_the_release_is_scaled_and_split_as_facediffuser_does(tree, tmp_path, read_back):
    meshes, neutral = release(tree)
    tree.text("ignore.txt", "0, 4")
    kept = [1, 2, 3, 5, 6]
    manifest = multiface.build(tree.root, tmp_path / "out", ignore=tree.root / "ignore.txt")
    module = SpeechDataModule(str(tmp_path / "out"), batch_size=1)
    expected = {"train": ["02_01", "02_03"], "val": ["02_41"], "test": ["02_50"], "test_unseen": ["01_50"]}
    for split, names in expected.items():
        batches = read_back(module, split)
        assert sorted(batches) == names
        for name, batch in batches.items():
            scaled = 2 * (meshes[name][:, kept] - LOW) / (HIGH - LOW) - 1
            np.testing.assert_allclose(batch.vertices[0], scaled, atol=1e-6)
            template = 2 * (neutral[name[:2]][kept] - LOW) / (HIGH - LOW) - 1
            np.testing.assert_allclose(batch.template[0], template, atol=1e-6)
            undone = Affine.described(manifest.fields["normalisation"]).invert(batch.vertices[0].numpy())
            np.testing.assert_allclose(undone, meshes[name][:, kept], atol=1e-4)
    assert module.train_subjects == ["02", "03", "06", "07", "09", "10", "11", "12", "13"]
    assert read_back(module, "train")["02_03"].subject_index.tolist() == [0]
    assert module.num_vertices == 5
    assert module.fps == 30


@pytest.mark.parametrize(("normalisation", "factor"), [("metre", 0.001), ("none", 1)])
def test_other_units(tree, tmp_path, read_back, normalisation, factor):
    meshes, _ = release(tree)
    manifest = multiface.build(tree.root, tmp_path / "out", normalisation=normalisation)
    batch = read_back(SpeechDataModule(str(tmp_path / "out"), batch_size=1), "val")["02_41"]
    np.testing.assert_allclose(batch.vertices[0], factor * meshes["02_41"], rtol=1e-5)
    assert manifest.fields["unit"] == {"metre": "metre", "none": "millimetre"}[normalisation]


def test_facediffusers_layout_is_taken_as_it_is(tree, tmp_path, read_back):
    meshes = {}
    for name in ("2_01", "13_41", "3_46", "8_50", "8_01"):
        meshes[name] = tree.npy(f"vertices_npy/{name}.npy", tree.vertices(6, V).reshape(6, -1))
        tree.wav(f"wav/{name}.wav", 0.2)
    tree.path("templates.pkl").write_bytes(pickle.dumps({who: np.zeros(3 * V) for who in ("2", "13", "3", "8")}))
    multiface.build(tree.root, tmp_path / "out")
    module = SpeechDataModule(str(tmp_path / "out"), batch_size=1)
    for split, name in (("train", "2_01"), ("val", "13_41"), ("test", "3_46"), ("test_unseen", "8_50")):
        batches = read_back(module, split)
        assert list(batches) == [name]
        np.testing.assert_allclose(batches[name].vertices[0].reshape(6, -1), meshes[name], atol=1e-6)
        assert batches[name].subject == [f"{int(name.split('_')[0]):02d}"]


def test_mistakes_are_named(tree, tmp_path):
    release(tree)
    frame = tree.root / IDENTITIES["02"] / "tracked_mesh/SEN_all_your/000102.bin"
    np.zeros(20, "<f4").tofile(frame)
    with pytest.raises(UserError, match=r"000102\.bin: 20 float32 numbers, expected 21"):
        multiface.build(tree.root, tmp_path / "out")
    np.zeros(3 * V, "<f4").tofile(frame)
    (tree.root / IDENTITIES["02"] / "audio/SEN_all_your.wav").unlink()
    with pytest.raises(UserError, match=r"SEN_all_your\.wav: no such sound file"):
        multiface.build(tree.root, tmp_path / "out")
    for folder in IDENTITIES.values():
        for path in (tree.root / folder / "tracked_mesh/SEN_cliff").iterdir():
            path.unlink()
        (tree.root / folder / "tracked_mesh/SEN_cliff").rmdir()
    with pytest.raises(UserError, match="49 different SEN_ segments, expected 50"):
        multiface.build(tree.root, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no m--"):
        multiface.build(tmp_path / "empty", tmp_path / "out")
