import csv
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load, parse_eval_result_entries

from sweeps.exports import model_card, slug, to_csv, to_eval_results, to_latex, to_markdown, write_exports
from sweeps.leaderboard import leaderboard
from sweeps.reported import BASES, Reported, read_reported
from sweeps.results import read_results
from tests.sweeps.conftest import EDITING, SPEECH
from trainers.tasks import SystemInfo

INFO = SystemInfo("voca", "VOCA", "speech-to-mesh", "Cudeiro et al., Title, CVPR", 2019, "https://x", "official code")
HOSTILE = r"""A|B <img src=x onerror=alert(1)> [a](javascript:x) $x_1$ 100% & {\\evil} #1 `c` ~^"""


@pytest.fixture
def results(results_file):
    return read_results(results_file)


@pytest.fixture
def tables(results):
    return leaderboard(results)


@pytest.fixture
def hostile(results):
    return leaderboard([replace(run, title=HOSTILE) if run.system == "voca" else run for run in results])


@pytest.fixture
def two_protocols(results):
    """VOCA scored under one protocol, FaceFormer under another, on the same data."""
    speech = [result for result in results if result.system in ("voca", "faceformer")]
    return leaderboard(
        [
            replace(result, protocol={**result.protocol, "id": "other-1"}) if result.system == "voca" else result
            for result in speech
        ]
    )


def mean_of(results, system, metric):
    return np.mean([result.metrics[metric]["value"] for result in results if result.system == system])


def test_csv_holds_every_value(results, tables):
    rows = list(csv.DictReader(io.StringIO(to_csv(tables))))
    (cell,) = [row for row in rows if (row["system"], row["metric"]) == ("voca", "lve_l2")]
    assert float(cell["value"]) == pytest.approx(mean_of(results, "voca", "lve_l2"))
    assert float(cell["low"]) < float(cell["value"]) < float(cell["high"])
    assert (cell["unit"], cell["rank"], cell["place_low"], cell["place_high"]) == ("mm", "2", "2", "2")
    assert (cell["seeds"], cell["samples"], cell["people"], cell["error_bars_over"]) == ("3", "24", "2", "samples")
    assert [row["value"] for row in rows if (row["system"], row["metric"]) == ("voca", "parameters")] == ["4800000.0"]
    assert [row["value"] for row in rows if (row["system"], row["metric"]) == ("voca", "real_time_factor")] == ["40.0"]


def test_markdown(tables):
    text = to_markdown(tables)
    assert f"## speech-to-mesh, demo corpus, test split, protocol {SPEECH.id}" in text
    assert "| Neutral face (floor) |" in text
    assert "Lip vertex error (mm) ↓" in text
    assert "3 seeds × 24 clips of 2 subjects" in text
    assert "3 seeds, one value for the whole set" in text  # FID
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_markdown_of_hostile_titles(hostile):
    text = to_markdown(hostile)
    assert "<img" not in text.replace("\\<", "")
    assert "](javascript" not in text.replace("\\](", "")
    (line,) = [line for line in text.splitlines() if line.startswith("| 2 ") and "A\\|B" in line]
    assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", text.splitlines()[2]))


def test_reported_numbers_stand_apart(tables):
    number = Reported("speech-to-mesh", "FaceFormer", "VOCASET", "LVE", "1.1696", "UniTalker's table", "third party")
    text = to_markdown(tables, [number])
    scores, reported = text.split("## Reported elsewhere")
    assert "1.1696" not in scores
    assert "| FaceFormer | VOCASET | LVE | 1.1696 | UniTalker's table | another paper or repository |" in reported
    assert "Not measured here" in reported


def rows_of(latex):
    return [line.strip() for line in latex.splitlines() if line.strip().endswith(r"\\")]


def test_latex(results, tables):
    text = to_latex(tables)
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\begin{table}") == 2
    assert text.count(r"\midrule") == 4  # below the head, and between systems and references
    for table in text.split(r"\begin{table}")[1:]:
        (columns,) = re.findall(r"\\begin\{tabular\}\{(lr*)\}", table)
        assert {len(re.split(r"(?<!\\)&", row)) for row in rows_of(table)} == {len(columns)}
    (row,) = [row for row in rows_of(text) if row.startswith("FaceFormer")]
    best = mean_of(results, "faceformer", "lve_l2")
    assert row.split(" & ")[3].startswith(rf"\textbf{{{best:.2f}}} {{\scriptsize [")
    assert r"\textbf" not in next(row for row in rows_of(text) if row.startswith("VOCA")).split(" & ")[3]
    assert "mm$^2$" in text
    assert r"$\downarrow$" in text


def test_latex_is_escaped(hostile):
    (row,) = [row for row in rows_of(to_latex(hostile)) if row.startswith("A|B")]
    name = row.split(" & ")[0] if r"\&" not in row else row[: row.index(" & 2")]
    assert r"\$x\_1\$ 100\% \& \{" in name
    assert r"\#1" in name
    assert r"\textbackslash{}" in name
    assert r"\textless{}img" in name
    # What is left is text: no command but those that print a character, no open group, no maths.
    bare = re.sub(r"\\(text\w+\{\}|[&%$#_{}])", "", name)
    assert not re.search(r"[\\&%$#_{}~^]", bare)


def test_model_index_is_read_by_hugging_face(results, tables, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(model_card("voca", tables, INFO))
    card = ModelCard.load(path)
    assert metadata_load(path)["model-index"][0]["name"] == "VOCA"
    assert card.data.library_name == "facebench"
    read = {result.metric_type: result for result in card.data.eval_results}
    assert set(read) == {"lve_l2", "lve_squared", "lve_centred", "mve", "mod", "fdd_abs", "fdd_signed"}
    lve = read["lve_l2"]
    assert lve.metric_value == pytest.approx(mean_of(results, "voca", "lve_l2"))
    assert (lve.task_type, lve.dataset_name, lve.dataset_split) == ("speech-to-mesh", "demo corpus", "test")
    assert lve.dataset_config == SPEECH.id
    assert lve.metric_args["seeds"] == 3


def test_eval_results_are_read_by_hugging_face(results, tables):
    entries = parse_eval_result_entries(yaml.safe_load(to_eval_results("adatrans", tables)))
    read = {entry.task_id: entry for entry in entries}
    assert len(read) == len(entries) == 6
    identity = read[f"{EDITING.id}/identity"]
    assert identity.value == pytest.approx(mean_of(results, "adatrans", "identity"))
    assert identity.dataset_id == "demo-corpus"
    assert "3 seeds × 60 images" in identity.notes


def test_no_exporter_mixes_protocols(two_protocols):
    assert len(two_protocols) == 2
    markdown = to_markdown(two_protocols)
    for part in markdown.split("## ")[1:]:
        assert ("VOCA" in part) != ("FaceFormer" in part)
    for part in to_latex(two_protocols).split(r"\begin{table}")[1:]:
        assert ("VOCA" in part) != ("FaceFormer" in part)
    for row in csv.DictReader(io.StringIO(to_csv(two_protocols))):
        assert row["protocol"] == ("other-1" if row["system"] == "voca" else SPEECH.id)
        assert row["rank"] in ("", "1")
    assert "other-1" in model_card("voca", two_protocols, None)
    assert "other-1" not in model_card("faceformer", two_protocols, None)
    ids = {entry["dataset"]["task_id"] for entry in yaml.safe_load(to_eval_results("voca", two_protocols))}
    assert {name.split("/")[0] for name in ids} == {"other-1"}


def test_one_system_under_two_protocols_keeps_them_apart(results, tmp_path):
    voca = [result for result in results if result.system == "voca"]
    other = [replace(result, protocol={**result.protocol, "id": "other-1"}) for result in voca]
    tables = leaderboard([*voca, *other])
    path = tmp_path / "README.md"
    path.write_text(model_card("voca", tables, None))
    (index,) = metadata_load(path)["model-index"]
    assert [entry["dataset"]["config"] for entry in index["results"]] == [SPEECH.id, "other-1"]
    assert all(len(entry["metrics"]) == 7 for entry in index["results"])


def test_card_says_what_it_is(tables):
    text = model_card("voca", tables, INFO)
    for words in (
        "Cudeiro et al., Title, CVPR, 2019, <https://x>",
        "re-implemented after the official code",
        "- Data: demo corpus",
        f"`{SPEECH.id}`",
        "- Real-time factor: 40 ×",
        "- Mean motion (floor): ",
        "do not stand in for those on a paper's data",
        "3 training seeds",
    ):
        assert words in text
    reconstruction = model_card("voca", tables, replace(INFO, basis="reconstruction"))
    assert "a reconstruction from the paper's description" in reconstruction
    assert "not known to this installation" in model_card("voca", tables, None)


def test_card_of_a_hostile_title(hostile, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(model_card("voca", hostile, None))
    assert metadata_load(path)["model-index"][0]["name"] == HOSTILE
    body = path.read_text().split("---", 2)[2]
    assert "<img" not in body.replace("\\<", "")


def test_files_written(tables, tmp_path):
    out = tmp_path / "out"
    write_exports(tables, [], [], {"voca": INFO}, out)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    systems = ("voca", "faceformer", "adatrans", "interfacegan")
    cards = {f"cards/{name}/{file}" for name in systems for file in ("README.md", ".eval_results/facebench.yaml")}
    assert files == {"leaderboard.csv", "leaderboard.md", "leaderboard.tex", *cards}


def test_slug():
    assert slug("Demo Corpus, v2.1") == "demo-corpus-v2.1"
    assert slug("../../etc") == "etc"
    assert slug("∅") == "unnamed"


def test_every_reported_number_has_a_checked_source():
    numbers = read_reported()
    assert {number.basis for number in numbers} <= set(BASES)
    assert {number.task for number in numbers} <= {"speech-to-mesh", "face-editing", "text-to-face", "mesh-retargeting"}
    assert len({(number.system, number.data, number.metric, number.source) for number in numbers}) == len(numbers)
