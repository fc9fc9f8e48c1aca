import base64
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
    outside = [link for link in links if not link.startswith(("#", "data:"))]
    assert sorted(set(outside)) == ["leaderboard.csv", "leaderboard.md"]
    assert not page.of("link")
    assert "@import" not in "".join(page.text)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "index.html",
        "leaderboard.csv",
        "leaderboard.md",
    }


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
    assert len(sortable) == (2 + 7 + 4) + (2 + 6 + 4)
    fragments = [attributes["href"][1:] for attributes in page.of("a") if attributes["href"].startswith("#")]
    assert set(fragments) <= set(ids)


def test_names_are_escaped(results_file, tmp_path):
    text = results_file.read_text().replace("FaceFormer", "<script>alert(1)</script>")
    results_file.write_text(text)
    html = write_report(results_file, tmp_path / "report").read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "What was &lt;said&gt;?" in html


def test_report_of_one_seed_without_media_or_floors(results_file, tmp_path):
    line = next(line for line in results_file.read_text().splitlines() if '"voca"' in line)
    raw = json.loads(line)
    del raw["media"], raw["costs"]
    results_file.write_text(json.dumps(raw))
    html = write_report(results_file, tmp_path / "report").read_text()
    assert "1 seed" in " ".join("".join(Page(html).text).split())
    assert "<video" not in html


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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_sorting_in_a_browser(results_file, tmp_path):
    path = write_report(results_file, tmp_path / "report")
    click = (
        "<script>document.querySelectorAll('.sort')[3].click();document.querySelectorAll('.sort')[3].click()</script>"
    )
    path.write_text(path.read_text().replace("</body>", click + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    flags += ["--no-first-run", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"]
    run = subprocess.run(["chromium", *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, check=True)
    body = run.stdout[run.stdout.index("<tbody") :]
    titles = re.findall(r'class="name" data-value="([^"]+)"', body)
    # Descending by the third metric: systems first, reference rows below them, in their own order.
    assert titles[:5] == ["VOCA", "FaceFormer", "Neutral face", "Mean motion", "Ground truth"]
    assert 'aria-sort="descending"' in run.stdout
