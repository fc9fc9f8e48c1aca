"""Contact sheets: a few samples of a data set as a person would want to see them.

A face is shown as it is and with its mask and landmarks over it; a clip as meshes along its time, above the waveform
and what is said when. A sheet is one PNG, or one HTML page that holds everything, with sound.
"""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from jinja2 import Environment, PackageLoader
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from datamodules.draw import drawer, png_bytes
from datamodules.faces import FaceDataModule
from datamodules.kinds import open_data, read_sample
from datamodules.prompts import PromptDataModule
from datamodules.shards import write_atomic
from datamodules.speech import SpeechDataModule
from datamodules.stream import ShardReader

INK, SOFT, LINE, BLUE, PAPER, DESK = "#1f2328", "#5b636d", "#d9d6cf", "#0072b2", "#ffffff", "#f3f1ec"
MESHES, MESH, WAVE, ROW = 6, 164, 72, 20  # meshes of a clip and their pixels; height of waveform and of a line of marks
FACE = 208  # pixels of a face and of its mask
GAP, MARGIN, LEADING = 20, 24, 19


@dataclass(frozen=True)
class Card:
    """One sample: its key, what is known of it, its picture (H, W, 3) uint8, and its sound as a WAV file."""

    key: str
    facts: dict[str, str]
    picture: np.ndarray
    sound: bytes | None = None


@dataclass(frozen=True)
class Sheet:
    """What a sheet shows: data set, split, how many samples there are, and cards of some of them."""

    name: str
    split: str
    samples: int
    cards: list[Card] = field(default_factory=list)


def write_sheet(root: str | Path, split: str, samples: int, out: Path) -> Sheet:
    """Draws samples that are evenly spread over a split.

    Args:
        root: folder of shards.
        split: whose samples.
        samples: how many.
        out: ends in ``.png`` or ``.html``.

    Raises:
        UserError: no such data or split, or a sample that cannot be used.
    """
    data = open_data(root)
    where = [(shard, number) for shard in data.manifest.split(split) for number in range(len(shard.keys))]
    chosen = np.linspace(0, len(where) - 1, min(samples, len(where))).round().astype(int)
    drawings: dict[str, Any] = {"talking-heads": clip_card, "faces": face_card, "expression-prompts": prompt_card}
    draw = drawings[data.kind]
    cards = []
    for index in chosen.tolist():
        shard, number = where[index]
        cards.append(draw(data, read_sample(data, ShardReader(data.manifest, shard), number)))
    sheet = Sheet(data.manifest.name, split, len(where), cards)
    write_atomic(out, html_page(sheet) if out.suffix == ".html" else png_bytes(png_sheet(sheet)))
    return sheet


def print_samples(sheet: Sheet, console: Console | None = None) -> None:
    """Prints the samples of a sheet with what is known of them."""
    table = Table(
        title=f"{sheet.name}, split {sheet.split}: {len(sheet.cards)} of {sheet.samples} samples", title_justify="left"
    )
    names = list(dict.fromkeys(name for card in sheet.cards for name in card.facts))
    for name in ("key", *names):
        table.add_column(name)
    for card in sheet.cards:
        table.add_row(escape(card.key), *(escape(card.facts.get(name, "")) for name in names))
    (console or Console()).print(table)


def face_card(data: FaceDataModule, sample: dict[str, Any]) -> Card:
    """A face, and the same with its mask in colours and its landmarks as dots."""
    pixels = ((sample["image"].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
    views = [pixels]
    mask = sample["mask"].numpy()
    if mask.size:
        colours = class_colours(len(data.manifest.fields["mask_classes"]))
        share = 0.55 * (mask > 0)[..., None]
        views.append(((1 - share) * pixels + share * colours[mask]).round().astype(np.uint8))
    elif len(sample["landmarks"]):
        views.append(pixels)
    zoom = Image.Resampling.NEAREST if 2 * data.size <= FACE else Image.Resampling.LANCZOS
    images = [Image.fromarray(view).resize((FACE, FACE), zoom) for view in views]
    dots = ImageDraw.Draw(images[-1])
    for x, y in (sample["landmarks"] * (FACE / data.size)).tolist() if len(images) > 1 else []:
        dots.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill="white", outline=INK)
    given = [name for name, on in zip(data.attributes, sample["attributes"].tolist(), strict=True) if on]
    facts = {"identity": str(sample["identity"])} if sample["identity"] >= 0 else {}
    if np.isfinite(sample["age"]):
        facts["age"] = f"{sample['age']:.0f}"
    facts["attributes"] = ", ".join(given) or "none"
    if sample["captions"]:
        facts["caption"] = sample["captions"][0]
    return Card(sample["key"], facts, np.concatenate([np.asarray(image) for image in images], axis=1))


def prompt_card(data: PromptDataModule, sample: dict[str, Any]) -> Card:
    """A prompt with its strongest controls, and its picture or a bar for each control."""
    weights = sample["weights"].numpy()
    strongest = [i for i in np.argsort(-weights, kind="stable")[:4] if weights[i] > 0]
    facts = {"prompt": sample["text"], "emotion": data.emotions[sample["emotion"]]}
    facts["controls"] = ", ".join(f"{data.controls[i]} {weights[i]:.2f}" for i in strongest) or "none"
    if data.size:
        pixels = ((sample["image"].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
        return Card(sample["key"], facts, np.asarray(Image.fromarray(pixels).resize((FACE, FACE))))
    return Card(sample["key"], facts, _draw_controls(weights[None], FACE, FACE))


def class_colours(count: int) -> np.ndarray:
    """(count, 3) uint8, well apart; the first, the background, is black."""
    # Once around the hues, light and dark in turn: neighbours in hue differ in lightness.
    hsv = [(255 * number // count, 190, (150, 240)[number % 2]) for number in range(1, count)]
    rgb = [np.asarray(Image.new("HSV", (1, 1), colour).convert("RGB"))[0, 0] for colour in hsv]
    return np.array([np.zeros(3, np.uint8), *rgb])


def clip_card(data: SpeechDataModule, sample: dict[str, Any]) -> Card:
    """Meshes along the clip, each above its place in the waveform; below it words and phonemes."""
    vertices, audio, fps = sample["vertices"].numpy(), sample["audio"].numpy(), data.fps
    seconds = max(len(vertices) / fps, len(audio) / data.manifest.fields["sample_rate"])
    width = MESHES * MESH
    centres = (np.arange(MESHES) + 0.5) / MESHES
    frames = np.minimum((centres * seconds * fps).astype(int), len(vertices) - 1)
    if vertices.shape[1] and len(data.topology["triangles"]):
        draw_mesh = drawer(data, sample["subject"], MESH)
        meshes = np.concatenate([draw_mesh(vertices[frame]) for frame in frames], axis=1)
    else:
        meshes = _draw_controls(sample["weights"].numpy(), round(width * len(vertices) / fps / seconds), width)

    words, phonemes = sample["words"], sample["phonemes"]
    strip = Image.new("RGB", (width, 8 + WAVE + ROW * bool(words) + ROW * bool(phonemes)), PAPER)
    draw = ImageDraw.Draw(strip)
    for centre in centres * width:  # points from each mesh down to its moment
        draw.polygon([(centre - 5, 0), (centre + 5, 0), (centre, 6)], fill=SOFT)
    for start, end in ((start, end) for _, start, end in words):
        for at in (start, end):
            draw.line([(at / seconds * width, 8), (at / seconds * width, 8 + WAVE + ROW)], fill=LINE)
    _draw_waveform(draw, audio, len(audio) / data.manifest.fields["sample_rate"] / seconds * width, 8 + WAVE / 2)
    _draw_marks(draw, words, 8 + WAVE, width / seconds, 13, INK)
    _draw_marks(draw, phonemes, 8 + WAVE + ROW * bool(words), width / seconds, 11, SOFT)

    facts = {"subject": sample["subject"]}
    if sample["emotion"] is not None:
        facts["emotion"] = sample["emotion"]
    if sample["emotion"] not in (None, "neutral") and sample["intensity"] is not None:
        facts["intensity"] = str(sample["intensity"])
    facts["length"] = f"{len(vertices)} frames, {len(vertices) / fps:.2f} s"
    if sample["transcript"]:
        facts["transcript"] = sample["transcript"]
    sound = io.BytesIO()
    soundfile.write(sound, audio, data.manifest.fields["sample_rate"], format="WAV", subtype="PCM_16")
    return Card(sample["key"], facts, np.concatenate([meshes, np.asarray(strip)]), sound.getvalue())


def _draw_controls(weights: np.ndarray, right: int, width: int) -> np.ndarray:
    """What is drawn where there is no mesh: a row for each rig control, along the clip's time up to ``right``."""
    picture = Image.new("RGB", (width, MESH), PAPER)
    if weights.size:
        low, high = weights.min(), weights.max()
        grey = (255 * (weights.T - low) / max(high - low, 1e-9)).astype(np.uint8)
        picture.paste(Image.fromarray(grey).resize((max(right, 1), MESH), Image.Resampling.NEAREST))
    return np.asarray(picture)


def _draw_waveform(draw: ImageDraw.ImageDraw, audio: np.ndarray, width: float, middle: float) -> None:
    """Lowest and highest sample of every column of pixels; the loudest fills the height."""
    peak = max(float(np.abs(audio).max()), 1e-6)
    for x, part in enumerate(np.array_split(audio, int(width))):
        if len(part):
            low, high = (float(value) / peak * (WAVE / 2 - 2) for value in (part.min(), part.max()))
            draw.line([(x, middle - high), (x, middle - low + 1)], fill=BLUE)


def _draw_marks(
    draw: ImageDraw.ImageDraw, marks: Iterable[tuple[str, float, float]], top: float, scale: float, size: int, ink: str
) -> None:
    """Texts in the middle of their intervals, where they fit; a tick at every start."""
    for text, start, end in marks:
        draw.line([(start * scale, top), (start * scale, top + 4)], fill=SOFT)
        if _font(size).getlength(text) <= (end - start) * scale and (text.isascii() or _has_all_letters()):
            draw.text(((start + end) / 2 * scale, top + ROW / 2), text, fill=ink, font=_font(size), anchor="mm")


@cache
def _font(size: int) -> Any:
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def _has_all_letters() -> bool:
    """Whether the font has phonetic letters; Pillow's own has not."""
    return "DejaVu" in str(_font(13).getname()[0])


def png_sheet(sheet: Sheet) -> np.ndarray:
    """(H, W, 3) uint8: a title, then cards, faces two in a row."""
    cards = [_draw_card(card) for card in sheet.cards]
    columns = 2 if cards[0].width < 600 and len(cards) > 1 else 1
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    width = columns * cards[0].width + (columns - 1) * GAP + 2 * MARGIN
    heights = [max(card.height for card in row) for row in rows]
    image = Image.new("RGB", (width, 84 + sum(heights) + GAP * (len(rows) - 1) + MARGIN), DESK)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 20), sheet.name, fill=INK, font=_font(24))
    subtitle = f"split {sheet.split}: {len(cards)} of {sheet.samples} samples"
    draw.text((MARGIN, 52), subtitle, fill=SOFT, font=_font(14))
    top = 84
    for row, height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            image.paste(card, (MARGIN + column * (card.width + GAP), top))
        top += height + GAP
    return np.asarray(image)


def _draw_card(card: Card) -> Image.Image:
    height, width = card.picture.shape[:2]
    inner = 14
    long = [name for name, text in card.facts.items() if _font(14).getlength(text) > width / 2 or name == "transcript"]
    short = "   ".join(f"{name} {text}" for name, text in card.facts.items() if name not in long)
    lines = [line for text in (short, *(card.facts[name] for name in long)) for line in _wrapped(text, width)]
    image = Image.new("RGB", (width + 2 * inner, height + 2 * inner + 30 + LEADING * len(lines)), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((inner, inner), card.key, fill=INK, font=_font(16))
    for number, line in enumerate(lines):
        draw.text((inner, inner + 24 + LEADING * number), line, fill=SOFT, font=_font(14))
    image.paste(Image.fromarray(card.picture), (inner, inner + 30 + LEADING * len(lines)))
    return image


def _wrapped(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split(" "):
        if lines and _font(14).getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def html_page(sheet: Sheet) -> bytes:
    """One page that needs no other file; whatever a data set calls its things is text, never markup."""
    environment = Environment(
        loader=PackageLoader("datamodules", "assets"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["data_uri"] = lambda contents, kind: f"data:{kind};base64,{base64.b64encode(contents).decode()}"
    environment.filters["png"] = png_bytes
    return environment.get_template("show.html").render(sheet=sheet).encode()
