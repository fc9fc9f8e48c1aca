import io
import json
import tarfile

import numpy as np
import pytest

from datamodules.errors import UserError
from datamodules.sources import tead


def line(i: int, **changes) -> str:
    prompt = {
        "text": f"a face like number {i}",
        "emotion": ["happy", "sad"][i % 2],
        "aus": {"AU12": 0.5},
        "blendshapes": [i / 100, 0.5, 1],
    }
    return json.dumps(prompt | changes)


def samples(manifest, split):
    found = {}
    for shard in manifest.split(split):
        with tarfile.open(manifest.root / shard.file) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                contents = tar.extractfile(member).read()
                value = json.loads(contents) if kind == "json" else np.load(io.BytesIO(contents))
                found.setdefault(key, {})[kind] = value
    return found


def test_prompts_and_weights_come_back(tree, tmp_path):
    tree.text("tead.jsonl", *(line(i) for i in range(40)), "")
    manifest = tead.build(tree.root / "tead.jsonl", tmp_path / "out")
    parts = {split: samples(manifest, split) for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in parts.items()} == {"train": 32, "val": 4, "test": 4}
    everything = {key: sample for found in parts.values() for key, sample in found.items()}
    assert len(everything) == 40
    sample = everything["tead-000004"]
    assert sample["json"] == {"text": "a face like number 3", "emotion": "sad", "aus": {"AU12": 0.5}}
    np.testing.assert_allclose(sample["weights.npy"], [0.03, 0.5, 1])
    assert manifest.kind == "expression-prompts"
    assert manifest.fields["emotions"] == ["happy", "sad"]


def test_named_blendshapes_and_splits(tree, tmp_path):
    named = {"jawOpen": 0.1, "mouthSmileLeft": 0.2}
    tree.text("a.jsonl", line(0, blendshapes=named, split="test"), line(1, blendshapes=named, split="train"))
    manifest = tead.build(tree.root, tmp_path / "out")
    assert manifest.fields["controls"] == ["jawOpen", "mouthSmileLeft"]
    assert {split: list(samples(manifest, split)) for split in ("train", "test")} == {
        "train": ["a-000002"],
        "test": ["a-000001"],
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ('{"text": "x"}', "line 2 cannot be read .*'emotion'"),
        ("no json", "line 2 cannot be read"),
        (line(1, blendshapes=[0.1, 0.2, 1.5]), "line 2 has blendshape weights that are not between 0 and 1"),
        (line(1, blendshapes=[0.1]), r"line 2: blendshapes \['blendshape_00'\], expected"),
        (line(1, split="../up"), "split '../up', expected letters"),
    ],
)
def test_wrong_lines_are_named(tree, tmp_path, wrong, message):
    tree.text("tead.jsonl", line(0), wrong)
    with pytest.raises(UserError, match=message):
        tead.build(tree.root / "tead.jsonl", tmp_path / "out")


def test_a_changed_line_is_not_taken_for_the_one_that_was_built(tree, tmp_path):
    tree.text("tead.jsonl", *(line(i) for i in range(10)))
    tead.build(tree.root, tmp_path / "out")
    tree.text("tead.jsonl", *(line(i, aus={"AU12": 0.6}) for i in range(10)))
    with pytest.raises(UserError, match="or of a source that has changed since"):
        tead.build(tree.root, tmp_path / "out")


def test_files_whose_lines_get_the_same_keys_are_refused(tree, tmp_path):
    for name in ("a.b.jsonl", "a-b.jsonl"):
        tree.text(name, *(line(i, split="test") for i in range(2)))
    with pytest.raises(UserError, match="sample 'a-b-000001' comes twice"):
        tead.build(tree.root, tmp_path / "out")
