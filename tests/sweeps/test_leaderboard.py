import csv
import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from datamodules.errors import UserError
from sweeps.leaderboard import leaderboard, print_tables, rank, to_csv, to_markdown
from sweeps.results import read_results


@pytest.fixture
def results(results_file):
    return read_results(results_file)


def of_task(results, task):
    return [result for result in results if result.task == task]


def test_one_table_for_each_task(results):
    tables = leaderboard(results)
    assert {table.task for table in tables} == {"speech-to-mesh", "face-editing"}
    speech = next(table for table in tables if table.task == "speech-to-mesh")
    assert [row.title for row in speech.rows] == ["FaceFormer", "VOCA", "Mean motion", "Neutral face", "Ground truth"]
    assert [row.entries["lve_l2"].rank for row in speech.rows] == [1, 2, None, None, None]
    assert speech.rows[0].seeds == [1, 2, 3]


def test_value_is_the_mean_over_seeds(results):
    table = rank(of_task(results, "speech-to-mesh"))
    for row in table.rows:
        for name, entry in row.entries.items():
            values = [result.metrics[name]["value"] for result in results if result.system == row.system]
            assert entry.interval.value == pytest.approx(np.mean(values), abs=1e-12)
            assert entry.interval.low <= entry.interval.value <= entry.interval.high


def test_other_protocols_are_not_ranked_together(results):
    speech = of_task(results, "speech-to-mesh")
    other = replace(speech[-1], protocol={**speech[-1].protocol, "id": "demo-speech-fff"})
    with pytest.raises(UserError, match="different protocol ids: demo-speech-0123456789ab, demo-speech-fff"):
        rank([*speech[:-1], other])
    tables = leaderboard([*speech[:-1], other])
    assert [table.protocol["id"] for table in tables] == ["demo-speech-0123456789ab", "demo-speech-fff"]
    with pytest.raises(UserError, match="different data sets"):
        rank([*speech[:-1], replace(speech[-1], data={"name": "mine", "sha256": "x"})])
    with pytest.raises(UserError, match="different splits"):
        rank([*speech[:-1], replace(speech[-1], split="val")])


def test_systems_are_compared_with_floors_but_not_with_ceilings(results):
    table = rank(of_task(results, "speech-to-mesh"))
    pairs = {frozenset((pair.first, pair.second)): pair.better for pair in table.comparisons["lve_l2"]}
    assert pairs[frozenset(("voca", "neutral"))] == "voca"
    assert pairs[frozenset(("voca", "faceformer"))] == "faceformer"
    assert not any("ground-truth" in pair for pair in pairs)
    assert table.comparisons["fdd_signed"] == []


def test_equal_systems_share_a_rank(results):
    speech = of_task(results, "speech-to-mesh")
    twins = [replace(result, system="twin", title="Twin") for result in speech if result.system == "faceformer"]
    table = rank([*speech, *twins])
    places = {row.system: row.entries["lve_l2"].rank for row in table.rows}
    assert places["faceformer"] == places["twin"] == 1
    assert places["voca"] == 3


def test_value_not_reached_has_no_rank(results):
    editing = of_task(results, "face-editing")
    missing = {"value": None, "per_sample": {}}
    changed = [
        replace(result, metrics={**result.metrics, "identity": result.metrics["identity"] | missing})
        if (result.system, result.seed) == ("interfacegan", 2)
        else result
        for result in editing
    ]
    row = next(row for row in rank(changed).rows if row.system == "interfacegan")
    assert row.entries["identity"].interval is None
    assert row.entries["identity"].reached == 2
    assert row.entries["identity"].rank is None
    assert "not reached (2 of 3 seeds)" in to_markdown([rank(changed)])


def test_one_number_a_system_is_not_ranked(results):
    first_seeds = [result for result in of_task(results, "face-editing") if result.seed < 2]
    table = rank(first_seeds)
    assert all(row.entries["fid"].rank is None for row in table.rows)
    assert table.rows[0].entries["identity"].rank == 1


def test_other_samples_are_refused(results):
    speech = of_task(results, "speech-to-mesh")
    mve = speech[-1].metrics["mve"]
    fewer = {"per_sample": dict(list(mve["per_sample"].items())[1:])}
    with pytest.raises(UserError, match="mve: scored on other samples"):
        rank([*speech[:-1], replace(speech[-1], metrics={**speech[-1].metrics, "mve": mve | fewer})])


def test_csv_holds_every_value(results):
    tables = leaderboard(results)
    rows = list(csv.DictReader(io.StringIO(to_csv(tables))))
    (cell,) = [row for row in rows if (row["system"], row["metric"]) == ("voca", "lve_l2")]
    values = [result.metrics["lve_l2"]["value"] for result in results if result.system == "voca"]
    assert float(cell["value"]) == pytest.approx(np.mean(values))
    assert (cell["unit"], cell["rank"], cell["seeds"], cell["samples"]) == ("mm", "2", "3", "24")
    assert [row["value"] for row in rows if (row["system"], row["metric"]) == ("voca", "parameters")] == ["4800000.0"]


def test_markdown_and_console(results):
    tables = leaderboard(results)
    text = to_markdown(tables)
    assert "## speech-to-mesh, demo corpus, test split, protocol demo-speech-0123456789ab" in text
    assert "| Neutral face (floor) |" in text
    assert "Lip vertex error (mm) ↓" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 2  # one width for each table
    console = Console(width=400, record=True, file=io.StringIO())
    print_tables(tables, console)
    assert "FaceFormer" in console.export_text()
