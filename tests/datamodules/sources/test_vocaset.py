import pickle

import numpy as np
import pytest
from scipy.signal import resample_poly

from datamodules.errors import UserError
from datamodules.sources import vocaset
from datamodules.speech import SpeechDataModule

V = 5
TRAIN, VAL, TEST = "FaceTalk_170725_00137_TA", "FaceTalk_170811_03275_TA", "FaceTalk_170731_00024_TA"
# Subject, sentence, frames at 60 fps; the first sentences of val and test subjects belong to no split.
CLIPS = [(TRAIN, 1, 61), (TRAIN, 40, 30), (VAL, 20, 30), (VAL, 21, 42), (TEST, 20, 30), (TEST, 40, 31)]
# FaceFormer's main.py
ORDER = "170728_03272 170904_00128 170725_00137 170915_00223 170811_03274 170913_03279 170904_03276 170912_03278"


def templates(tree) -> dict[str, np.ndarray]:
    return {subject: tree.vertices(1, V)[0] for subject in (TRAIN, VAL, TEST, "FaceTalk_nobody_TA")}


def faceformer_layout(tree):
    meshes, sounds = {}, {}
    neutral = templates(tree)
    tree.path("templates.pkl").write_bytes(pickle.dumps(neutral))
    for subject, sentence, frames in CLIPS:
        name = f"{subject}_sentence{sentence:02d}"
        meshes[name] = tree.npy(f"vertices_npy/{name}.npy", tree.vertices(frames, V).reshape(frames, 3 * V))
        sounds[name] = tree.wav(f"wav/{name}.wav", frames / 60)
    return neutral, meshes, sounds


def release(tree):
    """As preprocessed by VOCA: rows of all clips in one array, not in the order of the frames."""
    neutral, verts, index, raw, meshes, sounds = templates(tree), [], {}, {}, {}, {}
    row = 0
    for subject, sentence, frames in CLIPS:
        sequence = f"sentence{sentence:02d}"
        mesh = tree.vertices(frames, V, np.float32)
        order = tree.rng.permutation(frames)
        verts.append(mesh[order])
        rows = {int(frame): row + i for i, frame in enumerate(order)}
        index.setdefault(subject, {})[sequence] = rows
        row += frames
        audio = tree.rng.integers(-20000, 20000, round(frames / 60 * 22000)).astype(np.int16)
        raw.setdefault(subject, {})[sequence] = {"audio": audio, "sample_rate": 22000}
        meshes[f"{subject}_{sequence}"], sounds[f"{subject}_{sequence}"] = mesh, audio
    tree.npy("data_verts.npy", np.concatenate(verts))
    for name, value in (("templates", neutral), ("subj_seq_to_idx", index), ("raw_audio_fixed", raw)):
        old = pickle.dumps(value, protocol=2).replace(b"numpy._core", b"numpy.core")
        tree.path(f"{name}.pkl").write_bytes(old)
    return neutral, meshes, sounds


def test_faceformer_layout_gives_what_its_loader_gives(tree, tmp_path, read_back):
    neutral, meshes, sounds = faceformer_layout(tree)
    vocaset.build(tree.root, tmp_path / "out")
    module = SpeechDataModule(str(tmp_path / "out"), batch_size=1)
    expected = {"train": [(TRAIN, 1), (TRAIN, 40)], "val": [(VAL, 21)], "test": [(TEST, 40)]}
    for split, clips in expected.items():
        batches = read_back(module, split)
        assert sorted(batches) == [f"{subject}_sentence{sentence:02d}" for subject, sentence in clips]
        for name, batch in batches.items():
            subject = name.rsplit("_", 1)[0]
            loaded = meshes[name][::2].astype(np.float32).reshape(-1, V, 3)  # the loader's [::2, :]
            assert batch.vertices.shape[1:] == loaded.shape
            np.testing.assert_allclose(batch.vertices[0], loaded, rtol=0, atol=1e-7)
            np.testing.assert_array_equal(batch.audio[0], sounds[name].astype(np.float32) / 32768)
            np.testing.assert_array_equal(batch.template[0], neutral[subject].astype(np.float32))
            assert batch.subject == [subject]
            # The one-hot code is the place in the list of training subjects; others have none.
            assert batch.subject_index.tolist() == [2 if subject == TRAIN else -1]
            assert batch.emotion.tolist() == batch.intensity.tolist() == [-1]
            assert batch.weights.shape[2] == 0
            assert batch.transcript == [""]
            assert batch.words == batch.phonemes == [[]]
    assert module.train_subjects == [f"FaceTalk_{number}_TA" for number in ORDER.split()]
    assert module.fps == 30
    assert module.num_vertices == V
    assert module.regions == {}


def test_the_release_gives_the_same_frames_at_30_and_60_fps(tree, tmp_path, read_back):
    _, meshes, sounds = release(tree)
    for fps, step in ((30, 2), (60, 1)):
        vocaset.build(tree.root, tmp_path / str(fps), fps=fps)
        module = SpeechDataModule(str(tmp_path / str(fps)), batch_size=1)
        assert module.fps == fps
        for split, count in (("train", 2), ("val", 1), ("test", 1)):
            batches = read_back(module, split)
            assert len(batches) == count
            for name, batch in batches.items():
                np.testing.assert_allclose(batch.vertices[0], meshes[name][::step], rtol=0, atol=1e-7)
                sound = resample_poly(sounds[name] / 32768, 8, 11)  # 22 kHz -> 16 kHz
                np.testing.assert_allclose(batch.audio[0], np.clip(sound, -1, 1), atol=2 / 32768)


@pytest.mark.parametrize("fps", [0, -30, 20, 25])
def test_other_frame_rates_are_refused(tree, tmp_path, fps):
    faceformer_layout(tree)
    with pytest.raises(UserError, match=rf"--fps {fps}: expected 30 or 60"):
        vocaset.build(tree.root, tmp_path / "out", fps=fps)


def test_another_sound_of_the_release_is_not_taken_for_the_one_that_was_built(tree, tmp_path):
    release(tree)
    vocaset.build(tree.root, tmp_path / "out")
    path = tree.root / "raw_audio_fixed.pkl"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(UserError, match="or of a source that has changed since"):
        vocaset.build(tree.root, tmp_path / "out")


def test_what_the_release_lacks_is_reported_not_refused(tree, tmp_path, capsys):
    faceformer_layout(tree)
    manifest = vocaset.build(tree.root, tmp_path / "out")
    absent = manifest.fields["absent"]
    assert len(absent) == 8 * 40 + 2 * 20 + 2 * 20 - 4
    assert {"FaceTalk_170811_03274_TA_sentence24", "FaceTalk_170809_00138_TA_sentence32"} <= set(absent)
    assert "396 of 400 sequences" in capsys.readouterr().err


def test_regions_and_triangles_come_from_files(tree, tmp_path):
    faceformer_layout(tree)
    ply = ["ply", "format ascii 1.0", f"element vertex {V}", *(f"property float {axis}" for axis in "xyz")]
    ply += ["element face 1", "property list uchar int vertex_indices", "end_header"]
    tree.text("templates/FLAME_sample.ply", *ply, *["0 0 0"] * V, "3 0 1 4")
    tree.text("lve.txt", "3, 1, 1,4")
    tree.path("FLAME_masks.pkl").write_bytes(pickle.dumps({"forehead": np.array([2, 0])}, protocol=2))
    files = {"lips": tree.root / "lve.txt", "forehead": tree.root / "FLAME_masks.pkl"}
    vocaset.build(tree.root, tmp_path / "out", regions=files)
    module = SpeechDataModule(str(tmp_path / "out"), batch_size=1)
    assert module.topology["triangles"].tolist() == [[0, 1, 4]]
    assert {name: indices.tolist() for name, indices in module.regions.items()} == {
        "lips": [1, 3, 4],
        "forehead": [0, 2],
    }
    tree.text("lve.txt", "1,9")
    with pytest.raises(UserError, match=r"lve\.txt: region 'lips' names vertices 1 to 9, but the mesh has 5"):
        vocaset.build(tree.root, tmp_path / "other", regions=files)


def test_limit_takes_the_first_clips_of_each_split(tree, tmp_path):
    faceformer_layout(tree)
    manifest = vocaset.build(tree.root, tmp_path / "out", limit=1)
    assert {shard.split: shard.keys for shard in manifest.shards} == {
        "train": [f"{TRAIN}_sentence01"],
        "val": [f"{VAL}_sentence21"],
        "test": [f"{TEST}_sentence40"],
    }


def break_wav(tree):
    (tree.root / f"wav/{TRAIN}_sentence01.wav").unlink()


def break_length(tree):
    tree.wav(f"wav/{TRAIN}_sentence01.wav", 3.0)


def break_shape(tree):
    tree.npy(f"vertices_npy/{TRAIN}_sentence01.npy", np.zeros((61, 14)))


def break_dtype(tree):
    tree.npy(f"vertices_npy/{TRAIN}_sentence01.npy", np.zeros((61, 15), int))


def break_objects(tree):
    np.save(tree.root / f"vertices_npy/{TRAIN}_sentence01.npy", np.array([{}, None], object), allow_pickle=True)


def break_template(tree):
    tree.path("templates.pkl").write_bytes(pickle.dumps({VAL: np.zeros((V, 3))}))


def break_templates(tree):
    (tree.root / "templates.pkl").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_wav, "sentence01.wav: no such sound file, but there is"),
        (break_length, r"3\.00 s of sound, but .* has 31 frames, 1\.03 s at 30 fps"),
        (break_shape, r"shape \(61, 14\), expected \(T, 15\)"),
        (break_dtype, "holds int64, expected floating-point"),
        (break_objects, "not a readable npy file of numbers"),
        (break_template, f"no template of subject '{TRAIN}'"),
        (break_templates, r"holds no templates\.pkl"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(tree, tmp_path, damage, message):
    faceformer_layout(tree)
    damage(tree)
    with pytest.raises(UserError, match=message):
        vocaset.build(tree.root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        vocaset.build(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no vertices_npy or data_verts\.npy"):
        vocaset.build(tmp_path / "empty", tmp_path / "out")


def test_a_release_whose_parts_do_not_fit_is_refused(tree, tmp_path):
    release(tree)
    tree.npy("data_verts.npy", np.zeros((20, V, 3), np.float32))
    with pytest.raises(UserError, match=r"names rows up to .*, but .* has 20"):
        vocaset.build(tree.root, tmp_path / "out")
    tree.npy("data_verts.npy", np.zeros((500, V + 1, 3), np.float32))
    with pytest.raises(UserError, match=r"expected \(frames, 5, 3\)"):
        vocaset.build(tree.root, tmp_path / "out")
