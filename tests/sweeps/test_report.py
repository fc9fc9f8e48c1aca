import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from datamodules.errors import UserError
from sweeps.leaderboard import leaderboard
from sweeps.report import write_report
from sweeps.results import read_results

CLIPS = [f"subject{s}-sentence{i:02d}" for s in (10, 11) for i in range(12)]
VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """Tags with their attributes; fails where tags are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def of(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture
def page(results_file, tmp_path):
    path = write_report(results_file, tmp_path / "report")
    assert path == tmp_path / "report" / "index.html"
    return Page(path.read_text())


def test_page_needs_nothing_else(page, tmp_path):
    links = [attributes.get(name) for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    outside = {link for link in links if not link.startswith(("#", "data:"))}
    runs = {link for link in outside if link.startswith("../cells/")}
    assert "../cells/voca-1/" in runs
    assert not any("//" in link for link in outside)
    assert all((tmp_path / "report" / link).is_file() for link in outside - runs)
    assert not page.of("link")
    assert "@import" not in "".join(page.text)


def test_media_are_inside(page, tmp_path):
    videos = [attributes["src"] for attributes in page.of("video")]
    images = [attributes["src"] for attributes in page.of("img")]
    assert len(videos) == len(images) == 2
    assert all(source.startswith("data:video/mp4;base64,") for source in videos)
    strip = (tmp_path / "cells" / "adatrans" / "strip.png").read_bytes()
    assert f"data:image/png;base64,{base64.b64encode(strip).decode()}" in images


def test_every_value_and_protocol_is_on_the_page(page, results_file):
    text = " ".join(" ".join(page.text).split())
    for table in leaderboard(read_results(results_file)):
        for row in table.rows:
            assert row.title in text
            for column in table.columns:
                assert column.format(row.entries[column.name].interval.value) in text
        assert f"protocol {table.protocol['id']}" in text
        for column in table.columns:
            assert column.description in text
    assert text.count("demo corpus") > 5


def test_each_column_sorts_and_explains_itself(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [attributes["popovertarget"] for attributes in page.of("button") if "popovertarget" in attributes]
    assert set(targets) <= set(ids)
    sortable = [attributes for attributes in page.of("button") if attributes.get("class") == "sort"]
    assert len(sortable) == (2 + 7 + 5) + (2 + 6 + 4)
    fragments = [attributes["href"][1:] for attributes in page.of("a") if attributes["href"].startswith("#")]
    assert set(fragments) <= set(ids)


def test_names_are_escaped(results_file, tmp_path):
    hostile = r"</script><script>alert(1)</script>\" onfocus=\"alert(2)"
    results_file.write_text(results_file.read_text().replace("FaceFormer", hostile))
    text = write_report(results_file, tmp_path / "report").read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "What was &lt;said&gt;?" in text
    page = Page(text)
    assert not any("onfocus" in attributes for _, attributes in page.tags)
    assert len(page.of("script")) == 3  # two tables' samples and the page's own


def test_each_value_links_to_its_runs_and_protocol(page, results_file):
    ids = {attributes["id"]: number for number, (_, attributes) in enumerate(page.tags) if "id" in attributes}
    for table in leaderboard(read_results(results_file)):
        for row in table.rows:
            for column in table.columns:
                (opener,) = [
                    attributes
                    for attributes in page.of("button")
                    if f": {row.title}, {column.title}; " in attributes.get("aria-label", "")
                ]
                start = ids[opener["popovertarget"]]
                inside = []
                for tag, attributes in page.tags[start + 1 :]:
                    if "popover" in attributes:
                        break
                    inside += [attributes["href"]] if tag == "a" else []
                for result in row.results:
                    assert f"../{result.run}/" in inside
                assert any(link.startswith("#t") and link.endswith("-protocol") for link in inside)


def test_seeds_and_samples_of_each_cell_are_told(page):
    text = " ".join(" ".join(page.text).split())
    assert "3 seeds × 24 clips of 2 subjects" in text
    assert "3 seeds, one value for the whole set" in text


def test_reported_numbers_stand_apart_with_their_source(page):
    text = " ".join(" ".join(page.text).split())
    assert "Reported elsewhere" in text
    assert "UniTalker's table" in text
    assert "Not measured here" in text
    assert "Collaborative Diffusion" not in text  # of a task that this page does not show


def test_samples_are_on_the_page(page, results_file):
    speech = next(json.loads(text) for text in page.text if text.startswith('{"keys"') and "lve_l2" in text)
    assert speech["keys"] == sorted(speech["keys"])
    row = next(row for row in speech["rows"] if row["name"] == "voca")
    runs = [result for result in read_results(results_file) if result.system == "voca"]
    for key, value in zip(speech["keys"], row["scores"]["lve_l2"], strict=True):
        expected = sum(run.metrics["lve_l2"]["per_sample"][key] for run in runs) / len(runs)
        assert value == pytest.approx(expected, abs=1e-4)
    ids = [attributes.get("id") for attributes in page.of("video")]
    assert set(speech["media"][speech["keys"][0]].values()) <= set(ids)


def test_assets_lie_beside_the_page(results_file, tmp_path):
    path = write_report(results_file, tmp_path / "report", assets=True)
    page = Page(path.read_text())
    sources = [attributes["src"] for attributes in page.of("video") + page.of("img")]
    assert len(sources) == 4
    assert {(path.parent / source).read_bytes() for source in sources} == {
        file.read_bytes() for file in (tmp_path / "cells").rglob("*.*")
    }
    assert "data:" not in path.read_text()


def test_a_report_elsewhere_still_finds_the_runs(results_file, tmp_path):
    path = write_report(results_file, tmp_path / "a" / "b")
    assert "../../cells/voca-1/" in [attributes["href"] for attributes in Page(path.read_text()).of("a")]


def test_report_of_one_seed_without_media_or_floors(results_file, tmp_path):
    line = next(line for line in results_file.read_text().splitlines() if '"voca"' in line)
    raw = json.loads(line)
    del raw["media"], raw["costs"]
    results_file.write_text(json.dumps(raw))
    text = write_report(results_file, tmp_path / "report").read_text()
    assert "1 seed" in " ".join("".join(Page(text).text).split())
    assert "<video" not in text


def test_values_not_reached(results_file, tmp_path):
    lines = [json.loads(line) for line in results_file.read_text().splitlines()]
    for line in lines:
        if line["system"] == "interfacegan" and line["seed"] == 2:
            line["metrics"]["identity"] |= {"value": None, "per_sample": {}}
    results_file.write_text("\n".join(map(json.dumps, lines)))
    page = Page(write_report(results_file, tmp_path / "report").read_text())
    assert "in 2 of 3 seeds" in " ".join(page.text)


def test_missing_media(results_file, tmp_path):
    (tmp_path / "cells" / "voca" / "clip.mp4").unlink()
    with pytest.raises(UserError, match=r"clip\.mp4: no such media file"):
        write_report(results_file, tmp_path / "report")


def test_same_results_give_the_same_bytes(results_file, tmp_path):
    first = write_report(results_file, tmp_path / "first")
    second = write_report(results_file, tmp_path / "second")
    assert first.read_bytes() == second.read_bytes()


CLICKS = """
<script>
const out = {};
const titles = () => [...document.querySelectorAll("#t0-board tbody th")].map((cell) => cell.dataset.value);
const shown = () => [...document.querySelectorAll("#t0-board tbody tr")].filter((row) => row.checkVisibility()).length;
const change = (element, value) => {
  if (element.type === "checkbox") element.checked = value; else element.value = value;
  element.dispatchEvent(new Event("input", { bubbles: true }));
  element.dispatchEvent(new Event("change", { bubbles: true }));
};
const board = document.getElementById("t0-board");
out.wide = document.documentElement.scrollWidth > innerWidth;
const sort = board.querySelectorAll(".sort")[3];
sort.click(); sort.click();
out.sorted = titles();
out.order = sort.closest("th").getAttribute("aria-sort");
change(document.querySelector("[data-table=t0-board] .filter"), "floor");
out.filtered = shown();
out.status = document.querySelector(".tools[data-table=t0-board] [role=status]").textContent;
change(document.querySelector("[data-table=t0-board] .filter"), "");
const box = document.querySelector('#t0-columns [data-column="2"]');
change(box, false);
out.hidden = [...board.rows].map((row) => row.cells[2].checkVisibility()).filter(Boolean).length;
document.querySelector("#t0-columns .all").click();
out.back = board.rows[0].cells[2].checkVisibility();
const card = document.querySelector(".compare");
const keys = () => [...card.querySelectorAll(".key")].map((key) => key.firstChild.textContent);
const field = (name) => card.querySelector(`[name=${name}]`);
change(field("left"), [...field("left").options].findIndex((option) => option.text === "VOCA"));
change(field("right"), [...field("right").options].findIndex((option) => option.text === "FaceFormer"));
change(field("order"), 0);
out.worst = keys();
change(field("order"), 2);
out.loses = keys();
change(field("only"), true);
out.only = keys();
out.videos = card.querySelectorAll(".pairs video").length;
const opener = document.querySelector("#t0-board .value button");
opener.focus(); opener.click();
const popover = document.getElementById(opener.getAttribute("popovertarget"));
out.opened = popover.matches(":popover-open");
popover.querySelector("a[href^='#']").click();
out.closed = !popover.matches(":popover-open");
out.protocol = document.getElementById("t0-protocol").open;
document.body.dataset.out = JSON.stringify(out);
</script>
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(results_file, tmp_path, width):
    path = write_report(results_file, tmp_path / "report")
    path.write_text(path.read_text().replace("</body>", CLICKS + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    flags += ["--disable-quic", "--no-first-run", "--disable-component-update", f"--window-size={width},2000"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    run = subprocess.run(["chromium", *flags, path.as_uri()], capture_output=True, text=True, check=True)
    out = json.loads(html.unescape(re.search(r'<body data-out="([^"]*)"', run.stdout)[1]))
    assert not out["wide"]
    # Descending by the second metric: systems first, reference rows below them, in their own order.
    assert out["sorted"] == ["VOCA", "FaceFormer", "Neutral face", "Mean motion", "Ground truth"]
    assert out["order"] == "descending"
    assert (out["filtered"], out["status"]) == (2, "2 of 5 rows")
    assert (out["hidden"], out["back"]) == (0, True)
    runs = {name: [run for run in read_results(results_file) if run.system == name] for name in ("voca", "faceformer")}
    mean = {
        name: {key: sum(run.metrics["lve_l2"]["per_sample"][key] for run in of) / len(of) for key in CLIPS}
        for name, of in runs.items()
    }
    assert out["worst"] == sorted(CLIPS, key=lambda key: -mean["voca"][key])[:5]
    assert out["loses"] == sorted(CLIPS, key=lambda key: mean["faceformer"][key] - mean["voca"][key])[:5]
    assert (out["only"], out["videos"]) == ([CLIPS[0]], 2)
    assert out["opened"]
    assert out["closed"]
    assert out["protocol"]
