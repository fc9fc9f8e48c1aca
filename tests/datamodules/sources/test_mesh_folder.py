import pickle

import numpy as np
import pytest
from praatio import textgrid

from datamodules.errors import UserError
from datamodules.sources import clips, mesh_folder
from datamodules.speech import SpeechDataModule

V = 4


def folder(tree) -> dict[str, np.ndarray]:
    tree.path("templates.pkl").write_bytes(pickle.dumps({"anna_b": np.zeros((V, 3)), "carl": np.ones((V, 3))}))
    meshes = {}
    for name, shape in (("anna_b_1", (25, 3 * V)), ("carl_1", (30, V, 3)), ("carl_2", (20, V, 3))):
        meshes[name] = tree.npy(f"vertices_npy/{name}.npy", tree.rng.normal(0, 1, shape).astype(np.float32))
        tree.wav(f"wav/{name}.wav", shape[0] / 25)
    return meshes


def test_names_say_who_speaks(tree, tmp_path, read_back):
    meshes = folder(tree)
    mesh_folder.build(tree.root, tmp_path / "out", fps=25, unit="metre")
    module = SpeechDataModule(str(tmp_path / "out"), batch_size=1)
    batches = read_back(module, "train")
    assert {name: batch.subject[0] for name, batch in batches.items()} == {
        "anna_b_1": "anna_b",
        "carl_1": "carl",
        "carl_2": "carl",
    }
    for name, batch in batches.items():
        np.testing.assert_allclose(batch.vertices[0], meshes[name].reshape(-1, V, 3), atol=1e-6)
    assert module.train_subjects == ["anna_b", "carl"]


def test_a_table_says_the_rest(tree, tmp_path, read_back):
    folder(tree)
    tree.text(
        "clips.csv",
        "name,split,subject,transcript,emotion,intensity",
        "carl_2,test,,,,",
        "anna_b_1,train,carl,hello there,happy,2",
        "carl_1,train,,,sad,0",
    )
    manifest = mesh_folder.build(
        tree.root, tmp_path / "out", fps=25, unit="millimetre", table=tree.root / "clips.csv", precision="float16"
    )
    module = SpeechDataModule(str(tmp_path / "out"), batch_size=1)
    batch = read_back(module, "train")["anna_b_1"]
    assert batch.subject == ["carl"]
    assert batch.transcript == ["hello there"]
    assert manifest.fields["emotions"] == ["happy", "sad"]
    assert (batch.emotion.tolist(), batch.intensity.tolist()) == ([0], [2])
    assert read_back(module, "test")["carl_2"].emotion.tolist() == [-1]
    assert manifest.fields["unit"] == "millimetre"


def grid(tree, name: str, **tiers: list) -> None:
    written = textgrid.Textgrid()
    for tier, entries in tiers.items():
        written.addTier(textgrid.IntervalTier(tier, entries, 0, 2))
    written.save(str(tree.path(f"aligned/{name}.TextGrid")), format="short_textgrid", includeBlankSpaces=True)


def test_a_forced_aligners_times_become_labels(tree, tmp_path, read_back):
    folder(tree)
    tree.text("clips.csv", "name,transcript", "carl_1,Hi Bo!", "carl_2,")
    for name in ("carl_1", "carl_2"):
        grid(tree, name, words=[(0, 0.2, "hi"), (0.25, 0.5, "bo")], phones=[(0, 0.2, "AY1"), (0.25, 0.3, "B")])
    settings = {"fps": 25, "unit": "metre", "table": tree.root / "clips.csv", "alignments": tree.root / "aligned"}
    mesh_folder.build(tree.root, tmp_path / "out", **settings)
    batches = read_back(SpeechDataModule(str(tmp_path / "out"), batch_size=1), "train")
    for name, transcript in (("carl_1", "Hi Bo!"), ("carl_2", "hi bo")):
        assert batches[name].transcript == [transcript]
        assert batches[name].words == [[("hi", 0, 0.2), ("bo", 0.25, 0.5)]]
        assert batches[name].phonemes == [[("AY", 0, 0.2), ("B", 0.25, 0.3)]]
    (tree.root / "aligned/carl_2.TextGrid").unlink()
    with pytest.raises(UserError, match=r"aligned: no carl_2.TextGrid, nor of 0 other clips of 2"):
        mesh_folder.build(tree.root, tmp_path / "other", **settings)


def test_templates_may_be_mesh_files(tree, tmp_path):
    meshes = folder(tree)
    (tree.root / "templates.pkl").unlink()
    corners = tree.rng.normal(0, 1, (V, 3)).round(4)
    tree.obj("templates/carl.obj", corners, [[0, 1, 2, 3]])
    tree.npy("templates/anna_b.npy", corners.ravel() + 1)
    mesh_folder.build(tree.root, tmp_path / "out", fps=25, unit="metre")
    module = SpeechDataModule(str(tmp_path / "out"), batch_size=1)
    np.testing.assert_allclose(module.templates["carl"], corners, atol=1e-6)
    np.testing.assert_allclose(module.templates["anna_b"], corners + 1, atol=1e-6)
    assert module.topology["triangles"].tolist() == [[0, 1, 2], [0, 2, 3]]
    assert meshes


def test_mistakes_are_named(tree, tmp_path):
    folder(tree)
    with pytest.raises(UserError, match="--unit cm: expected metre"):
        mesh_folder.build(tree.root, tmp_path / "out", fps=25, unit="cm")
    with pytest.raises(UserError, match=r"carl_1\.wav: 1\.20 s of sound, .* 5\.00 s at 6 fps"):
        mesh_folder.build(tree.root, tmp_path / "out", fps=6, unit="metre", table=table(tree, "name", "carl_1"))
    wrong = table(tree, "name,intensity", "carl_1,much")
    with pytest.raises(UserError, match="intensity = 'much'"):
        mesh_folder.build(tree.root, tmp_path / "out", fps=25, unit="metre", table=wrong)
    tree.npy("vertices_npy/carl_1.npy", np.full((30, V, 3), np.nan))
    with pytest.raises(UserError, match="clip 'carl_1': no frames, or values that are not finite"):
        mesh_folder.build(tree.root, tmp_path / "out", fps=25, unit="metre")


@pytest.mark.parametrize("fps", [0, -25, float("nan"), float("inf")])
def test_a_frame_rate_that_is_none_is_refused(tree, tmp_path, fps):
    folder(tree)
    with pytest.raises(UserError, match=r"--fps \S+: expected a number of frames per second above 0"):
        mesh_folder.build(tree.root, tmp_path / "out", fps=fps, unit="metre")


def test_a_clip_that_is_listed_twice_is_refused(tree, tmp_path):
    folder(tree)
    rows = table(tree, "name,split", "carl_1,train", "carl_2,train", "carl_1,val")
    with pytest.raises(UserError, match="sample 'carl_1' comes twice, in split 'train' and in split 'val'"):
        mesh_folder.build(tree.root, tmp_path / "out", fps=25, unit="metre", table=rows)


@pytest.mark.parametrize("change", ["transcript", "template", "alignment", "vertices"])
def test_a_changed_source_is_not_taken_for_the_one_that_was_built(tree, tmp_path, capsys, change):
    folder(tree)
    grid(tree, "carl_1", words=[(0, 0.2, "hi")], phones=[(0, 0.2, "AY1")])
    settings = {"fps": 25, "unit": "metre", "alignments": tree.root / "aligned"}
    rows = ("name,transcript", "carl_1,Hi!")
    mesh_folder.build(tree.root, tmp_path / "out", table=table(tree, *rows), **settings)
    mesh_folder.build(tree.root, tmp_path / "out", table=table(tree, *rows), **settings)
    assert "already built, left as it is" in capsys.readouterr().out
    if change == "transcript":
        rows = ("name,transcript", "carl_1,Ho!")
    elif change == "template":
        tree.path("templates.pkl").write_bytes(pickle.dumps({"carl": np.full((V, 3), 2.0)}))
    elif change == "alignment":
        grid(tree, "carl_1", words=[(0, 0.3, "hi")], phones=[(0, 0.2, "AY1")])
    else:
        tree.npy("vertices_npy/carl_1.npy", np.ones((31, V, 3), np.float32))
    with pytest.raises(UserError, match="or of a source that has changed since"):
        mesh_folder.build(tree.root, tmp_path / "out", table=table(tree, *rows), **settings)


def test_a_killed_build_of_a_source_that_changed_since_starts_over(tree, tmp_path, monkeypatch):
    folder(tree)
    monkeypatch.setattr(clips, "SHARD_BYTES", 1)  # a shard for each clip
    rows = ("name,transcript", "carl_1,Hi!", "carl_2,Hi!")
    real = clips.read_audio

    def fail(path):
        if path.stem == "carl_2":
            raise RuntimeError("killed")
        return real(path)

    monkeypatch.setattr(clips, "read_audio", fail)
    with pytest.raises(RuntimeError, match="killed"):
        mesh_folder.build(tree.root, tmp_path / "out", fps=25, unit="metre", table=table(tree, *rows))
    monkeypatch.setattr(clips, "read_audio", real)
    rows = ("name,transcript", "carl_1,Ho!", "carl_2,Ho!")
    mesh_folder.build(tree.root, tmp_path / "out", fps=25, unit="metre", table=table(tree, *rows))
    batches = SpeechDataModule(str(tmp_path / "out"), batch_size=1).loader("train")
    assert [batch.transcript for batch in batches] == [["Ho!"], ["Ho!"]]


def table(tree, *lines):
    tree.text("clips.csv", *lines)
    return tree.root / "clips.csv"
