import json
import re

import numpy as np
import pytest
import yaml

from datamodules.shards import Manifest
from datamodules.speech import SpeechDataModule
from facebench.__main__ import main
from metrics.protocols import Protocol, available, region_hash
from sweeps.score import truths

OFF = 0.003  # metres by which the first lip vertex of every prediction is too high


@pytest.fixture(scope="module")
def predictions(talking_root, tmp_path_factory):
    """The truth of the test split, one lip vertex in every second frame moved; the first clip in two samples."""
    folder = tmp_path_factory.mktemp("predictions")
    clips = list(truths(SpeechDataModule(str(talking_root), batch_size=1), "test"))
    for i, clip in enumerate(clips):
        predicted = clip.truth.numpy().copy()
        predicted[::2, 0, 1] += OFF
        np.save(folder / f"{clip.key}.npy", np.stack([predicted, predicted + 1]) if i == 0 else predicted)
    description = {
        "task": "speech-to-mesh",
        "system": "moved truth",
        "data": Manifest.read(talking_root, "talking-heads").sha256,
        "split": "test",
        "keys": [clip.key for clip in clips],
        "unseen": "fixed:0",
    }
    (folder / "predictions.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="module")
def protocol_file(tmp_path_factory):
    """The demo protocol's lip vertex error for the test data."""
    spec = Protocol.read("demo-speech").spec
    metrics = {"metrics": {"lve_l2": spec["metrics"]["lve_l2"]}, "regions": {"lips": {"count": None, "sha256": None}}}
    path = tmp_path_factory.mktemp("protocols") / "mine.yaml"
    here = {"topology": "test", "vertices": 12, "unseen_speaker": "fixed:0", "judges": {}}
    path.write_text(yaml.safe_dump({**spec, **here, **metrics}))
    return path


def test_list_names_every_protocol(capsys):
    assert main(["protocols"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in available())
    assert "bound when" in printed
    assert main(["protocols", "list", "--task", "speech-to-mesh"]) == 0
    printed = capsys.readouterr().out
    assert "codetalker-biwi" in printed
    assert "demo-editing" not in printed


def test_list_refuses_an_unknown_task(capsys):
    assert main(["protocols", "--task", "cooking"]) == 2
    assert "no protocols of task 'cooking'; there are those of speech-to-mesh, face-editing" in capsys.readouterr().err


def test_show_prints_the_whole_protocol(capsys):
    assert main(["protocols", "show", "codetalker-biwi"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == Protocol.read("codetalker-biwi").spec


def test_diff_in_words(capsys):
    assert main(["protocols", "diff", "codetalker-biwi", "facediffuser-biwi"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "the rule for clips of another length: codetalker-biwi says cut the prediction, "
        "facediffuser-biwi says cut both to the shorter",
        "mean vertex error (mve): facediffuser-biwi has it, codetalker-biwi does not",
        "face dynamics deviation (fdd_abs): facediffuser-biwi has it, codetalker-biwi does not",
    ]


def test_diff_of_formulas_regions_and_equal_protocols(capsys, tmp_path):
    spec = Protocol.read("demo-speech").spec
    spec["name"] = "mine"
    spec["description"] = "other words"
    spec["metrics"]["lve_l2"].update(variant="squared", pooling="clips")
    spec["regions"]["lips"]["count"] = 270
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(spec))
    assert main(["protocols", "diff", "demo-speech", str(tmp_path / "mine.yaml")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "region lips: demo-speech takes the region that is given, mine takes 270 vertices",
        "lip vertex error (lve_l2): demo-speech takes the distance as it is, mine squares the distance",
        "lip vertex error (lve_l2): demo-speech weighs every frame of the test set alike, "
        "mine weighs every clip alike, whatever its length",
    ]
    assert main(["protocols", "diff", "meshtalk", "meshtalk"]) == 0
    assert capsys.readouterr().out == "meshtalk and meshtalk measure the same\n"


def converted(capsys):
    """Rows of the printed table: distance to its numbers and unit."""
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in re.split("[│|]", line)[1:-1]]
        if cells and cells[0] in ("squared", "l2", "centred"):
            rows[cells[0]] = ([float(cell) for cell in cells[1:5]], cells[5])
    return rows


def test_convert_by_hand(capsys, talking_root, predictions):
    """Clips of 15, 19 and 23 frames, of which 8, 10 and 12 are off; one of three lip vertices."""
    assert main(["protocols", "convert", "--predictions", str(predictions), "--data", str(talking_root)]) == 0
    rows = converted(capsys)
    frames, clips = 30 / 57, (8 / 15 + 10 / 19 + 12 / 23) / 3
    millimetres = 1000 * OFF
    for variant, factor, unit in (("squared", millimetres**2, "mm²"), ("l2", millimetres, "mm")):
        expected = [factor * frames, factor * clips, factor * frames / 3, factor * clips / 3]
        assert rows[variant][0] == pytest.approx(expected, rel=1e-3)
        assert rows[variant][1] == unit
    # The centroid of the lips moves by a third: the vertex is off by two thirds, the others by one.
    centred = [2 / 3 * frames, 2 / 3 * clips, 4 / 9 * frames, 4 / 9 * clips]
    assert rows["centred"][0] == pytest.approx([millimetres * value for value in centred], rel=1e-3)


def test_convert_takes_a_region_file(capsys, talking_root, predictions, tmp_path):
    (tmp_path / "lve.txt").write_text("1, 2")  # without the vertex that is off
    lips = f"{{lips: {tmp_path / 'lve.txt'}}}"
    assert (
        main(
            ["protocols", "convert", "--predictions", str(predictions), "--data", str(talking_root), "--regions", lips]
        )
        == 0
    )
    assert all(max(values) < 1e-3 for values, _ in converted(capsys).values())


def score(predictions, data, protocol, *more):
    command = ["score", "--predictions", str(predictions), "--data", str(data), "--protocol", str(protocol)]
    return main([*command, *more])


def test_score_takes_region_files(capsys, talking_root, predictions, protocol_file, tmp_path):
    np.save(tmp_path / "lips.npy", np.array([0, 4]))
    out = tmp_path / "scores.json"
    regions = f"{{lips: {tmp_path / 'lips.npy'}}}"
    assert score(predictions, talking_root, protocol_file, "--regions", regions, "--out", str(out)) == 0
    stored = json.loads(out.read_text())
    assert stored["metrics"]["lve_l2"]["value"] == pytest.approx(1000 * OFF * 30 / 57, rel=1e-3)
    lips = {"lips": [0, 4]}
    assert stored["protocol"] == Protocol.read(protocol_file).bind_regions(lips).id
    assert region_hash([0, 4]) != region_hash([0, 1, 2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "gives no vertex indices"),
        ("0, 12", "region 'lips': index 12, but the mesh has 12 vertices"),
        ("0, lips", "gives no vertex indices"),
    ],
)
def test_a_bad_region_file_is_one_line(capsys, talking_root, predictions, protocol_file, tmp_path, text, message):
    (tmp_path / "lve.txt").write_text(text)
    assert score(predictions, talking_root, protocol_file, "--regions", f"{{lips: {tmp_path / 'lve.txt'}}}") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_region_of_another_count_is_refused(capsys, talking_root, predictions, protocol_file, tmp_path):
    spec = yaml.safe_load(protocol_file.read_text())
    spec["regions"]["lips"]["count"] = 428
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(spec))
    assert score(predictions, talking_root, tmp_path / "mine.yaml") == 2
    assert "regions.lips.count is 428, but 3 was used" in capsys.readouterr().err


def test_data_of_another_mesh_is_refused(capsys, talking_root, predictions):
    assert score(predictions, talking_root, "codetalker-biwi") == 2
    assert "topology test, but protocol 'codetalker-biwi' is for BIWI" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["diff", "demo-speech"], ["show"], ["sing"], ["show", "songs"]])
def test_mistakes_are_one_line(capsys, args):
    assert main(["protocols", *args]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("action", ["list", "show", "diff", "convert"])
def test_every_action_explains_itself(capsys, action):
    with pytest.raises(SystemExit) as left:
        main(["protocols", action, "--help"])
    assert left.value.code == 0
    assert "Example:" in capsys.readouterr().out
