import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import yaml

from datamodules.errors import UserError
from sweeps.claims import judge, read_claims
from sweeps.results import read_results
from sweeps.suite import Entry, Suite, run_suite

PROTOCOL = {
    "name": "test-speech",
    "task": "speech-to-mesh",
    "topology": "test",
    "vertices": 12,
    "coordinates": "m",
    "unit": "mm",
    "fps": 30,
    "head_motion": "none",
    "split": "test",
    "length_mismatch": "cut both to the shorter",
    "unseen_speaker": "fixed:0",
    "samples": 1,
    "sample_axis": "draws",
    "single_sample": 0,
    "regions": {"lips": {"count": None, "sha256": None}},
    "primary": "lve",
    "metrics": {
        "lve": {
            "title": "LVE",
            "description": "",
            "measure": "lip_vertex_error",
            "variant": "l2",
            "over_vertices": "max",
            "region": "lips",
            "pooling": "frames",
        }
    },
}


@pytest.fixture
def suite(voca_config, talking_root, tmp_path) -> Suite:
    protocol = tmp_path / "protocol.yaml"
    protocol.write_text(yaml.safe_dump(PROTOCOL))
    path = tmp_path / "suite.yaml"
    data = {"speech-to-mesh": {"root": str(talking_root), "protocol": str(protocol)}}
    path.write_text(yaml.safe_dump({"name": "t", "seeds": [1], "data": data, "systems": [str(voca_config)]}))
    return Suite.read(path)


def test_a_suite_scores_systems_and_bounds_once(suite, tmp_path):
    out = tmp_path / "out"
    results = {result.system: result for result in read_results(run_suite(suite, out, jobs=1))}
    assert set(results) == {"neutral", "mean-motion", "ground-truth", "voca"}
    assert results["ground-truth"].metrics["lve"]["value"] == 0
    # The mouth of the test clips opens by 10 mm times |sin|: the neutral face errs by the mean of that.
    assert 4 < results["neutral"].metrics["lve"]["value"] < 8
    assert results["voca"].costs["parameters"] > 0
    assert (out / results["voca"].media["videos"][0]["file"]).stat().st_size > 1000

    gathered = (".jsonl", "claims.yaml")  # written anew from the cells
    files = [path for path in out.rglob("*") if path.is_file() and not path.name.endswith(gathered)]
    stamps = {path: path.stat().st_mtime_ns for path in files}
    before = (out / "results.jsonl").read_bytes()
    run_suite(suite, out, jobs=1)
    assert (out / "results.jsonl").read_bytes() == before
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}, "nothing is computed twice"


def test_another_split_is_predicted_and_nothing_trained_again(suite, tmp_path):
    run_suite(suite, tmp_path / "out", jobs=1)
    (checkpoint,) = (tmp_path / "out").rglob("last.ckpt")
    trained = checkpoint.stat().st_mtime_ns
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump({**PROTOCOL, "split": "val"}))
    results = {result.system: result for result in read_results(run_suite(suite, tmp_path / "out", jobs=1))}
    assert {result.split for result in results.values()} == {"val"}
    keys = [set(result.metrics["lve"]["per_sample"]) for result in results.values()]
    assert keys[0] == {"carla-030", "carla-031", "carla-032"}
    assert keys.count(keys[0]) == len(keys)
    assert checkpoint.stat().st_mtime_ns == trained


def test_a_system_must_not_train_with_its_judge(suite, voca_config, tmp_path):
    judged = {**PROTOCOL, "judges": {"motion": {"name": "demo:emotion-judge", "sha256": None}}}
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(judged))
    changes = {"model.init_args.encoder": "demo:emotion-judge"}
    mine = Entry(str(voca_config), "mine", changes)
    with pytest.raises(UserError, match=r"trains with 'demo:emotion-judge', which judges as motion"):
        replace(suite, systems=[mine]).cells()


@pytest.mark.slow
def test_a_killed_suite_run_again_ends_with_the_same_scores(suite, tmp_path):
    whole = read_results(run_suite(suite, tmp_path / "whole", jobs=1))
    command = [sys.executable, "-m", "facebench", "bench", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "cut")]
    for seconds in (3, 5, 7, 9, 11):
        process = subprocess.Popen(command, start_new_session=True)
        time.sleep(seconds)
        if seconds % 4 == 3:  # the suite alone: its cell outlives it for a while
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    again = read_results(run_suite(suite, tmp_path / "cut", jobs=1))
    assert [replace(result, costs={}) for result in again] == [replace(result, costs={}) for result in whole]


def test_a_cell_is_named_by_what_decides_its_result(suite, voca_config):
    first = suite.cells()
    assert [cell.title for cell in first] == ["speech-to-mesh-bounds", "voca-seed1"]
    changed = yaml.safe_load(voca_config.read_text())
    changed["model"]["init_args"]["lr"] = 0.5
    original = voca_config.read_text()
    try:
        voca_config.write_text(yaml.safe_dump(changed))
        assert suite.cells()[1].name != first[1].name
    finally:
        voca_config.write_text(original)
    assert suite.cells() == first


def test_a_changed_system_is_a_row_of_its_own(suite, tmp_path):
    path = tmp_path / "suite.yaml"
    raw = yaml.safe_load(path.read_text())
    config = raw["systems"][0]
    changed = {"config": config, "name": "voca-linear", "changes": {"model.init_args.components": 2}}
    claim = {"text": "More components help", "series": "voca/lve", "lower": "voca-linear/lve"}
    path.write_text(yaml.safe_dump({**raw, "systems": [config, changed], "claims": [claim]}))
    both = Suite.read(path)
    assert [cell.system for cell in both.cells()] == ["voca", "voca", "voca-linear"]
    results = read_results(run_suite(both, tmp_path / "out", jobs=1))
    systems = {result.system: result for result in results if result.role == "system"}
    assert systems["voca-linear"].title == f"{systems['voca'].title} (linear)"
    assert systems["voca"].costs["parameters"] - systems["voca-linear"].costs["parameters"] == 2 * (128 + 1 + 36)
    (verdict,) = judge(read_claims(tmp_path / "out"), results)
    expected = systems["voca"].metrics["lve"]["per_sample"], systems["voca-linear"].metrics["lve"]["per_sample"]
    assert verdict.difference.value == pytest.approx(
        np.mean([expected[0][key] - expected[1][key] for key in expected[0]])
    )


@pytest.mark.parametrize("entry", [{"config": "a.yaml"}, {"config": "a.yaml", "name": "b", "colour": 1}, 3])
def test_a_system_of_another_form_is_refused(suite, tmp_path, entry):
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "systems": [entry]}))
    with pytest.raises(UserError, match="system 1: expected a config file, or config, name and changes"):
        Suite.read(path)


def test_two_systems_of_one_name_are_refused(suite):
    twice = Suite(suite.name, suite.seeds, suite.data, suite.systems * 2)
    with pytest.raises(UserError, match="two systems called 'voca'; give one config, name and changes"):
        twice.cells()


def test_a_failing_cell_is_named_with_its_log(suite, voca_config, tmp_path):
    broken = yaml.safe_load(voca_config.read_text())
    broken["model"]["init_args"]["num_vertices"] = 99
    config = tmp_path / "broken.yaml"
    config.write_text(yaml.safe_dump(broken))
    wrong = Suite(suite.name, suite.seeds, suite.data, [Entry(str(config))])
    with pytest.raises(UserError, match=r"1 of 2 cells failed; .*broken-seed1.*log\.txt"):
        run_suite(wrong, tmp_path / "out", jobs=1)
    (log,) = (tmp_path / "out" / "cells").glob("broken-*/log.txt")
    assert "holds meshes of 12 vertices" in log.read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seeds": []}, "must not be empty"),
        ({"colour": "red"}, "expected the fields name, seeds, data, systems"),
    ],
)
def test_a_suite_file_of_another_form_is_refused(suite, tmp_path, change, says):
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(UserError, match=says):
        Suite.read(path)


def test_a_task_without_data_is_refused(suite):
    with pytest.raises(UserError, match="no data for task 'speech-to-mesh'"):
        Suite(suite.name, suite.seeds, {}, suite.systems).cells()
