import pickle
import struct

import numpy as np
import pytest
import trimesh

from datamodules.errors import UserError
from datamodules.sources import biwi
from datamodules.speech import SpeechDataModule

V = 6
FACES = [[0, 1, 2], [0, 2, 3], [2, 3, 4], [3, 4, 5]]
SEEN = ["F2", "F3", "F4", "M3", "M4", "M5"]


def write_vl(path, vertices: np.ndarray) -> None:
    path.write_bytes(struct.pack(f"<I{vertices.size}f", len(vertices), *vertices.ravel().tolist()))


def release(tree, clips):
    """Frames as 100 times unit-sized meshes, which is roughly millimetres."""
    templates, meshes, sounds = {}, {}, {}
    for subject, sequence, frames in clips:
        templates[subject] = templates.get(subject, tree.rng.normal(0, 100, (V, 3)).round(3))
        tree.obj(f"rigid_scans/{subject}.obj", templates[subject], FACES)
        mesh = (templates[subject] + tree.rng.normal(0, 5, (frames, V, 3))).astype(np.float32)
        for i, frame in enumerate(mesh):
            write_vl(tree.path(f"faces/{subject}/{sequence}/frame_{i + 1:03d}.vl"), frame)
        meshes[subject, sequence] = mesh
        sounds[subject, sequence] = tree.wav(f"audio/{subject}_{sequence}_cut.wav", frames / 25)
        tree.wav(f"audio/{subject}_{sequence}.wav", 30.0 if sequence == "e01" else 0.1)  # the uncut recording
    return templates, meshes, sounds


def codetalker(mesh: np.ndarray) -> np.ndarray:
    """``main_preprocess.m``: turned by pi about x, centred, divided by the root of the surface area (from trimesh)."""
    turn = np.array([[1, 0, 0], [0, np.cos(np.pi), -np.sin(np.pi)], [0, np.sin(np.pi), np.cos(np.pi)]])
    turned = mesh.astype(np.float64) @ turn
    centred = turned - turned.mean(0)
    return centred / np.sqrt(trimesh.Trimesh(centred, FACES, process=False).area)


def test_the_release_is_normalised_as_codetalker_does_and_back(tree, tmp_path, read_back):
    clips = [("F2", "e01", 4), ("M5", "e36", 3), ("F2", "e37", 5), ("M6", "e40", 2), ("F2", "01", 3), ("F1", "e01", 3)]
    templates, meshes, sounds = release(tree, clips)
    manifest = biwi.build(tree.root, tmp_path / "out")
    module = SpeechDataModule(str(tmp_path / "out"), batch_size=1)
    expected = {"train": ("F2", "e01"), "val": ("M5", "e36"), "test": ("F2", "e37"), "test_unseen": ("M6", "e40")}
    for split, (subject, sequence) in expected.items():
        batches = read_back(module, split)
        assert list(batches) == [f"{subject}_{sequence}"]
        batch = batches[f"{subject}_{sequence}"]
        mesh = meshes[subject, sequence]
        np.testing.assert_allclose(batch.vertices[0], [codetalker(frame) for frame in mesh], atol=1e-6)
        np.testing.assert_allclose(batch.template[0], codetalker(templates[subject]), atol=1e-6)
        np.testing.assert_array_equal(batch.audio[0], sounds[subject, sequence].astype(np.float32) / 32768)
        assert batch.subject_index.tolist() == [SEEN.index(subject) if subject in SEEN else -1]
        assert batch.emotion.tolist() == [1]

        members = {"normalisation.npy": member(manifest, split, batch.key[0], "normalisation.npy")}
        undone = biwi.clip_map(members, manifest.fields, subject).invert(batch.vertices[0].numpy())
        np.testing.assert_allclose(undone, mesh, atol=1e-3)
    assert module.train_subjects == SEEN
    assert module.fps == 25
    assert manifest.fields["unit"] == "dimensionless"
    assert module.topology["triangles"].tolist() == FACES


def member(manifest, split, key, name):
    import io
    import tarfile

    for shard in manifest.split(split):
        with tarfile.open(manifest.root / shard.file) as tar:
            for each in tar:
                if each.name == f"{key}.{name}":
                    return np.load(io.BytesIO(tar.extractfile(each).read()))
    raise KeyError(key)


def test_facexhubert_scales_by_the_template_and_renumbers_the_emotional_half(tree, tmp_path, read_back):
    clips = [("F1", "01", 3), ("F1", "e36", 3), ("M6", "37", 3), ("M6", "e38", 3), ("F2", "40", 3), ("F2", "e40", 3)]
    templates, meshes, _ = release(tree, clips)
    manifest = biwi.build(tree.root, tmp_path / "out", normalisation="facexhubert", splits="facexhubert")
    module = SpeechDataModule(str(tmp_path / "out"), batch_size=1)
    expected = {
        "train": {"F1_01": ("F1", "01"), "F1_76": ("F1", "e36")},
        "val": {"M6_37": ("M6", "37"), "M6_78": ("M6", "e38")},
        "test": {"F2_40": ("F2", "40"), "F2_80": ("F2", "e40")},
    }
    for split, names in expected.items():
        batches = read_back(module, split)
        assert set(batches) == set(names)
        for name, (subject, sequence) in names.items():
            template, mesh = templates[subject], meshes[subject, sequence]
            shift = [template[:, axis].mean() for axis in range(3)]
            extent = [template[:, axis].max() - template[:, axis].min() for axis in range(3)]
            np.testing.assert_allclose(batches[name].vertices[0], (mesh - shift) / extent, atol=1e-6)
            np.testing.assert_allclose(batches[name].template[0], (template - shift) / extent, atol=1e-6)
            assert batches[name].emotion.tolist() == [int(sequence.startswith("e"))]
            undone = biwi.clip_map({}, manifest.fields, subject).invert(batches[name].vertices[0].numpy())
            np.testing.assert_allclose(undone, mesh, atol=1e-3)
    assert module.train_subjects == [*(f"F{i}" for i in range(1, 9)), *(f"M{i}" for i in range(1, 7))]


def test_without_normalisation_the_unit_is_the_releases(tree, tmp_path, read_back):
    templates, meshes, _ = release(tree, [("F2", "e01", 4)])
    manifest = biwi.build(tree.root, tmp_path / "out", normalisation="none")
    batch = read_back(SpeechDataModule(str(tmp_path / "out"), batch_size=1), "train")["F2_e01"]
    np.testing.assert_allclose(batch.vertices[0], meshes["F2", "e01"], atol=1e-4)
    np.testing.assert_allclose(batch.template[0], templates["F2"], atol=1e-4)
    assert manifest.fields["unit"] == "millimetre"


def test_faceformer_layout_is_taken_as_it_is(tree, tmp_path, read_back):
    meshes = {}
    for name, frames in (("F2_e32", 5), ("F2_e33", 4), ("M3_e40", 3), ("F5_e37", 3), ("F5_e01", 3)):
        meshes[name] = tree.npy(f"vertices_npy/{name}.npy", tree.vertices(frames, V).reshape(frames, -1))
        tree.wav(f"wav/{name}.wav", frames / 25)
    templates = {who: tree.vertices(1, V)[0] for who in ("F2", "M3", "F5")}
    tree.path("templates.pkl").write_bytes(pickle.dumps(templates))
    manifest = biwi.build(tree.root, tmp_path / "out")
    module = SpeechDataModule(str(tmp_path / "out"), batch_size=1)
    for split, name in (("train", "F2_e32"), ("val", "F2_e33"), ("test", "M3_e40"), ("test_unseen", "F5_e37")):
        batches = read_back(module, split)
        assert list(batches) == [name]
        np.testing.assert_allclose(batches[name].vertices[0].reshape(-1, 3 * V), meshes[name], atol=1e-6)
    assert manifest.fields["normalisation"]["applied"] == "before"
    with pytest.raises(UserError, match="was applied elsewhere"):
        biwi.clip_map({}, manifest.fields, "F2")


def test_facexhubert_layout_has_numbers_up_to_80(tree, tmp_path):
    for number in (1, 76, 77, 80):
        tree.npy(f"vertices_npy/F1_{number:02d}.npy", tree.vertices(5, V).reshape(5, -1))
        tree.wav(f"wav/F1_{number:02d}.wav", 0.2)
    tree.path("templates_scaled.pkl").write_bytes(pickle.dumps({"F1": tree.vertices(1, V)[0]}))
    manifest = biwi.build(tree.root, tmp_path / "out", normalisation="facexhubert", splits="facexhubert")
    keys = {shard.split: sorted(shard.keys) for shard in manifest.shards}
    assert keys == {"train": ["F1_01", "F1_76"], "val": ["F1_77"], "test": ["F1_80"]}


def test_damaged_frames_are_refused(tree, tmp_path):
    release(tree, [("F2", "e01", 4)])
    frame = tree.root / "faces/F2/e01/frame_001.vl"
    frame.write_bytes(frame.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"frame_001\.vl: 6 vertices in 72 bytes, expected 6 in 76"):
        biwi.build(tree.root, tmp_path / "out")
    (tree.root / "audio/F2_e01_cut.wav").unlink()
    write_vl(frame, np.zeros((V, 3)))
    with pytest.raises(UserError, match=r"F2_e01\.wav: 30\.00 s of sound"):
        biwi.build(tree.root, tmp_path / "out")
