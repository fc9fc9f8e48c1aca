import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from datamodules.errors import UserError
from sweeps.exports import to_markdown
from sweeps.leaderboard import format_cost, leaderboard, print_tables, rank
from sweeps.results import read_results
from tests.sweeps.conftest import SPEECH


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
    with pytest.raises(UserError, match=f"different protocol ids: {SPEECH.id}, demo-speech-fff"):
        rank([*speech[:-1], other])
    tables = leaderboard([*speech[:-1], other])
    assert [table.protocol["id"] for table in tables] == [SPEECH.id, "demo-speech-fff"]
    with pytest.raises(UserError, match="different data sets"):
        rank([*speech[:-1], replace(speech[-1], data={"name": "mine", "sha256": "x"})])
    with pytest.raises(UserError, match="different splits"):
        rank([*speech[:-1], replace(speech[-1], split="val")])


def test_relative_recognition_is_of_the_systems_in_the_table(results):
    editing = of_task(results, "face-editing")
    spec = editing[0].protocol["spec"]
    metrics = {**spec["metrics"], "recognition": {"measure": "relative_recognition", "of": "identity"}}
    protocol = {**editing[0].protocol, "spec": {**spec, "metrics": metrics}}
    editing = [replace(result, protocol=protocol) for result in editing]
    table = rank(editing)
    rows = {row.system: row for row in table.rows}
    systems = [row for row in table.rows if row.role == "system"]
    assert len(systems) == 2
    for seed in range(len(systems[0].seeds)):
        first, second = (row.results[seed].metrics["identity"]["per_sample"] for row in systems)
        won = np.mean([np.heaviside(first[key] - second[key], 0.5) for key in first])
        assert systems[0].entries["recognition"].seeds[seed] == pytest.approx(won)
        assert systems[1].entries["recognition"].seeds[seed] == pytest.approx(1 - won)
    assert systems[0].entries["recognition"].rank == 1
    others = [row for row in rows.values() if row.role != "system"]
    assert all(row.entries["recognition"].interval is None for row in others)
    (alone,) = rank([r for r in editing if r.system == systems[0].system]).rows
    assert alone.entries["recognition"].interval is None, "one system has no rivals"


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


def test_ranks_have_intervals(results):
    table = rank(of_task(results, "speech-to-mesh"))
    places = {row.system: row.entries["lve_l2"].place for row in table.rows}
    assert places["faceformer"].bounds == (1, 1, 1)
    assert places["voca"].bounds == (2, 2, 2)
    assert places["neutral"] is None
    assert all(row.entries["fdd_signed"].place is None for row in table.rows)


def test_error_bars_over_people_are_drawn_whole(results):
    speech = of_task(results, "speech-to-mesh")
    # Within a subject all clips get the same error: 24 clips then say no more than 2 subjects do.
    errors = {"subject10": 2.0, "subject11": 4.0}
    alike = [
        replace(
            result,
            metrics={
                name: metric | {"value": 3.0, "per_sample": {key: errors[key[:9]] for key in metric["per_sample"]}}
                for name, metric in result.metrics.items()
                if name == "fdd_abs"
            },
            protocol={**result.protocol, "spec": {**result.protocol["spec"], "primary": "fdd_abs"}},
        )
        for result in speech
    ]
    clips, subjects = rank(alike), rank(alike, over="people")
    assert (clips.drawn, subjects.drawn) == ("clips", "subjects")
    entry = subjects.rows[0].entries["fdd_abs"]
    assert (entry.interval.low, entry.interval.high) == (2, 4)
    assert clips.rows[0].entries["fdd_abs"].interval.low > 2.4
    assert (entry.samples, entry.people) == (24, 2)
    assert subjects.counts(entry) == "3 seeds × 24 clips of 2 subjects"


def test_the_protocol_can_name_what_error_bars_draw(results):
    speech = [
        replace(
            result,
            protocol={**result.protocol, "spec": {**result.protocol["spec"], "error_bars_over": "people"}},
        )
        for result in of_task(results, "speech-to-mesh")
    ]
    assert rank(speech).over == "people"
    assert rank(speech, over="samples").over == "samples"
    with pytest.raises(UserError, match="error bars over 'frames', expected one of samples, people"):
        rank(speech, over="frames")
    nobody = [replace(result, people={}) for result in speech]
    with pytest.raises(UserError, match="do not say who is in 24 of 24 samples"):
        rank(nobody)


def test_real_time_factor_is_throughput_over_fps(results):
    table = rank(of_task(results, "speech-to-mesh"))
    row = next(row for row in table.rows if row.system == "voca")
    assert row.costs["real_time_factor"] == pytest.approx(300 * 4 / 30)
    assert format_cost("real_time_factor", row) == "40 ×"
    editing = rank(of_task(results, "face-editing"))
    assert not any("real_time_factor" in row.costs for row in editing.rows)


def test_a_table_mixing_protocols_cannot_be_made(results):
    table = rank(of_task(results, "speech-to-mesh"))
    strange = [replace(result, protocol={**result.protocol, "id": "other-1"}) for result in table.rows[1].results]
    mixed = [table.rows[0], replace(table.rows[1], results=strange)]
    with pytest.raises(UserError, match="different protocol ids"):
        replace(table, rows=mixed)
    with pytest.raises(UserError, match="different protocol ids"):
        replace(table, rows=[replace(table.rows[0], results=[*table.rows[0].results, *strange])])
    with pytest.raises(UserError, match="under the head of other-2"):
        replace(table, protocol={**table.protocol, "id": "other-2"})
    elsewhere = [replace(result, data={"name": "mine", "sha256": "x"}) for result in table.rows[0].results]
    with pytest.raises(UserError, match="different data sets"):
        replace(table, rows=[replace(table.rows[0], results=elsewhere), *table.rows[1:]])


def test_console(results):
    hostile = [replace(result, title="[/] [bold]x") if result.system == "voca" else result for result in results]
    console = Console(width=400, record=True, file=io.StringIO())
    print_tables(leaderboard(hostile), console)
    text = console.export_text()
    assert "FaceFormer" in text
    assert "[/] [bold]x" in text
