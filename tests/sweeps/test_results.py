import json

import pytest

from datamodules.errors import UserError
from sweeps.results import add_result, read_results, write_results


def test_written_results_read_back(results_file):
    results = read_results(results_file)
    copy = results_file.with_name("copy.jsonl")
    write_results(copy, results)
    assert read_results(copy) == results
    assert copy.read_bytes() == results_file.read_bytes()
    assert not list(copy.parent.glob("*.tmp"))


def test_add_replaces_the_same_system_and_seed(results_file):
    results = read_results(results_file)
    again = results[4].__class__(**{**vars(results[4]), "code": "new"})
    add_result(results_file, again)
    assert [result.code for result in read_results(results_file)].count("new") == 1
    assert len(read_results(results_file)) == len(results)
    other = again.__class__(**{**vars(again), "seed": 9})
    add_result(results_file, other)
    assert read_results(results_file)[-1] == other


def test_add_starts_a_file(results_file, tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    add_result(path, read_results(results_file)[0])
    assert len(read_results(path)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, r"line 2: field 'schema' is 2, expected 1"),
        ({"seed": "one"}, r"line 2: field 'seed' is 'one', of another type"),
        ({"seed": True}, r"line 2: field 'seed' is True"),
        ({"role": "winner"}, r"line 2: field 'role' is 'winner', expected one of system, floor, ceiling"),
        ({"smell": 1}, r"line 2: field 'smell' is not known"),
        ({"data": {"name": "x"}}, r"line 2, data: field 'sha256' is missing"),
        ({"protocol": {"name": "x", "id": "y", "spec": 1}}, r"line 2, protocol: field 'spec'"),
        (
            {"protocol": {"name": "x", "id": "x-123456789abc", "spec": {"fps": 30}}},
            r"line 2: protocol.id is 'x-123456789abc', but protocol.spec names other choices",
        ),
        ({"metrics": {"mve": {"value": 1.0}}}, r"line 2, metrics.mve: field 'unit' is missing"),
        ({"media": {"videos": [{"key": "a", "file": 1}]}}, r"line 2, media.videos: field 'file' is 1"),
        (
            {"media": {"videos": [{"key": "a", "file": "../../secret", "caption": ""}]}},
            r"line 2: '../../secret' leads out of the results' folder",
        ),
        ({"run": "/root"}, r"line 2: '/root' leads out"),
        ({"metrics": {"mve": 3}}, r"line 2, metrics.mve: expected an object"),
        (
            {"metrics": {"mve": {"value": float("nan"), "unit": "", "higher_is_better": None, "per_sample": {}}}},
            r"line 2, metrics.mve: holds NaN",
        ),
    ],
)
def test_bad_lines_are_named(results_file, change, message):
    lines = results_file.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | change)
    results_file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        read_results(results_file)


def test_missing_field_and_broken_json(results_file):
    lines = results_file.read_text().splitlines()
    raw = json.loads(lines[0])
    del raw["task"]
    results_file.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="line 1: field 'task' is missing"):
        read_results(results_file)
    results_file.write_text(lines[0] + "\n" + lines[1][:50])
    with pytest.raises(UserError, match="line 2: not JSON"):
        read_results(results_file)
    results_file.write_text(lines[0] + "\n\n" + lines[0])
    with pytest.raises(UserError, match="line 3: neutral, seed 0 stands in line 1 already"):
        read_results(results_file)


def test_no_results(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_results(tmp_path / "results.jsonl")
    (tmp_path / "results.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no results"):
        read_results(tmp_path / "results.jsonl")
