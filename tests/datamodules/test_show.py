import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from PIL import Image
from rich.console import Console

from datamodules.errors import UserError
from datamodules.kinds import open_data, read_sample
from datamodules.show import FACE, MESH, MESHES, Card, Sheet, class_colours, html_page, print_samples, write_sheet
from datamodules.stream import ShardReader


class Page(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, contents: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(contents)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def sources(self, tag: str) -> list[bytes]:
        return [base64.b64decode(attrs["src"].split("base64,")[1]) for name, attrs in self.tags if name == tag]


def test_samples_are_spread_evenly_over_the_split(faces_root, tmp_path):
    sheet = write_sheet(faces_root, "train", 5, tmp_path / "sheet.png")
    assert [card.key for card in sheet.cards] == [f"face-{i:03d}" for i in (0, 4, 8, 12, 16)]
    assert sheet.samples == 17
    assert len(write_sheet(faces_root, "val", 9, tmp_path / "sheet.png").cards) == 4, "no more than there are"


def test_a_face_is_shown_in_its_colours_with_its_labels(faces_root, tmp_path):
    sheet = write_sheet(faces_root, "test", 8, tmp_path / "sheet.png")
    card = next(card for card in sheet.cards if card.key == "face-035")  # 35 = 0b100011: Eyeglasses and Male
    assert card.facts == {"identity": "17", "age": "55", "attributes": "Eyeglasses, Male", "caption": "face 35"}
    assert card.picture.shape == (FACE, 2 * FACE, 3)
    assert (card.picture[:, :FACE] == 35).all()
    with Image.open(tmp_path / "sheet.png") as image:
        pixels = np.asarray(image)
    assert (pixels == 35).all(-1).sum() > 0.9 * FACE**2, "the sheet holds the card"


def test_a_mask_tints_its_classes_and_leaves_the_background(faces_root):
    from datamodules.show import face_card

    data = open_data(faces_root)
    data.manifest.fields["mask_classes"][:] = ["background", "skin"]
    sample = read_sample(data, ShardReader(data.manifest, data.manifest.split("train")[0]), 3)
    sample["mask"][:16] = 1
    sample["landmarks"] = sample["landmarks"][:0]
    overlay = face_card(data, sample).picture[:, FACE:]
    assert (overlay[FACE // 2 + 8 :] == 3).all()
    expected = 0.45 * 3 + 0.55 * class_colours(2)[1].astype(float)
    np.testing.assert_allclose(overlay[10, 10], expected, atol=1)
    colours = class_colours(19).astype(int)
    apart = np.abs(colours[:, None] - colours).sum(-1) + 1000 * np.eye(19, dtype=int)
    assert apart.min() > 40, "no two classes look alike"


def test_a_clip_shows_its_meshes_and_its_loudness_in_time(talking_root, tmp_path):
    sheet = write_sheet(talking_root, "train", 2, tmp_path / "sheet.html")
    card = sheet.cards[0]
    assert card.facts["length"] == "15 frames, 0.50 s"
    assert card.facts["transcript"] == "a hum"
    assert card.picture.shape[1] == MESHES * MESH
    strip = card.picture[MESH + 8 : MESH + 80].astype(int)
    blue = np.abs(strip - [0, 114, 178]).sum(-1) < 10
    # The hum's loudness is sin(t / 5) over frames t, and the loudest fills half the height, 34 pixels. Over windows of
    # two of its periods the highest blue pixel follows it.
    windows = np.arange(0, blue.shape[1] - 26, 26)
    height = np.array([36 - blue[:, x : x + 26].any(1).argmax() for x in windows])
    loudness = np.sin((windows + 13) / blue.shape[1] * 15 / 5)
    np.testing.assert_allclose(height, 34 * loudness, atol=4)


def test_a_page_stands_alone_and_plays_the_sound(talking_root, tmp_path):
    out = tmp_path / "sheet.html"
    sheet = write_sheet(talking_root, "test", 3, out)
    page = Page(out.read_text())
    outside = [attrs for _, attrs in page.tags if re.match("https?:|//", attrs.get("src", attrs.get("href", "")) or "")]
    assert outside == []
    for card, picture, sound in zip(sheet.cards, page.sources("img"), page.sources("audio"), strict=True):
        with Image.open(io.BytesIO(picture)) as image:
            assert np.array_equal(np.asarray(image), card.picture)
        samples, rate = soundfile.read(io.BytesIO(sound))
        assert rate == 16_000
        assert len(samples) / rate == pytest.approx(float(card.facts["length"].split(", ")[1][:-2]), abs=0.01)


def test_names_from_a_data_set_are_text_never_markup():
    nasty = '<script>alert(1)</script>" onload="x'
    card = Card(nasty, {nasty: nasty}, np.zeros((4, 4, 3), np.uint8))
    page = Page(html_page(Sheet(nasty, nasty, 1, [card])).decode())
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not [attrs for _, attrs in page.tags if "onload" in attrs]
    assert page.text.count(nasty) == 7, "title and heading with name and split, key, and a fact's name and text"
    out = io.StringIO()
    print_samples(Sheet("[bold]x", "a", 1, [Card("[red]key", {"a": "[/b]"}, card.picture)]), Console(file=out))
    assert "[red]key" in out.getvalue()


def test_what_cannot_be_shown_is_one_clear_error(faces_root, tmp_path):
    with pytest.raises(UserError, match="no samples in split 'holdout'"):
        write_sheet(faces_root, "holdout", 2, tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
