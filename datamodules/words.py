"""When words are said: read from files of a forced aligner, or spread over a clip, and brought to frames."""

import csv
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from praatio import textgrid
from praatio.utilities.errors import PraatioException

from datamodules.errors import UserError

Word = tuple[str, float, float]


def read_words(path: str | Path) -> list[Word]:
    """Words and their times from a file.

    Args:
        path: a Praat TextGrid, whose interval tier is called ``words`` (the Montreal Forced Aligner's name, also with
            the speaker's before it) or is its only one; or a CSV file with the columns ``word``, ``start`` and ``end``.

    Returns:
        (word, start, end) in seconds, in order; silences are left out.

    Raises:
        UserError: no such file, another format, no words, or times that are no order of words.
    """
    path = Path(path)
    readers = {".textgrid": _read_textgrid, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: word times are read from .TextGrid and .csv files; convert it to one of them")
    if not path.is_file():
        raise UserError(f"{path}: no such file of word times")
    words = readers[path.suffix.lower()](path)
    if not words:
        raise UserError(f"{path}: holds no words; align the recording with its transcript")
    before = 0.0
    for word, start, end in words:
        if not (before <= start < end and math.isfinite(end)):
            raise UserError(
                f"{path}: '{word}' from {start:g} to {end:g} s, expected to start at {before:g} s or later and to end "
                "after that; correct its times"
            )
        before = end
    return words


def spread_words(transcript: str, seconds: float) -> list[Word]:
    """The words of a transcript, each as long as any other, over a whole clip: for want of their times.

    Args:
        transcript: words between blanks.
        seconds: length of the clip.
    """
    words = transcript.split()
    edges = np.linspace(0.0, seconds, len(words) + 1).tolist()
    return list(zip(words, edges[:-1], edges[1:], strict=True))


def words_at_frames(words: list[Word], frames: int, fps: float) -> NDArray[np.int64]:
    """Which word is being said in the middle of each frame: (frames,), -1 where none is.

    Args:
        words: in order.
        frames: how many.
        fps: frames per second.
    """
    middle = (np.arange(frames) + 0.5) / fps
    said = np.full(frames, -1, dtype=np.int64)
    for number, (_, start, end) in enumerate(words):
        said[(middle >= start) & (middle < end)] = number
    return said


def _read_textgrid(path: Path) -> list[Word]:
    try:
        grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=False, reportingMode="silence")
    except (PraatioException, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not a TextGrid that can be read ({type(error).__name__})") from error
    tiers = [tier for tier in grid.tiers if isinstance(tier, textgrid.IntervalTier)]
    named = [tier for tier in tiers if tier.name.lower().rpartition(" - ")[2] in ("words", "word")] or tiers
    if len(named) != 1:
        found = ", ".join(f"'{tier.name}'" for tier in tiers) or "none"
        raise UserError(f"{path}: interval tiers {found}, expected one of the name 'words'; rename or remove tiers")
    return [(entry.label.strip(), entry.start, entry.end) for entry in named[0].entries if entry.label.strip()]


def _read_csv(path: Path) -> list[Word]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            missing = [name for name in ("word", "start", "end") if name not in (rows.fieldnames or [])]
            if missing:
                raise UserError(f"{path}: no column '{missing[0]}', expected a first line 'word,start,end'")
            words = [(row["word"].strip(), float(row["start"]), float(row["end"])) for row in rows]
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{path}: not a table of word,start,end with times in seconds ({error})") from error
    return [entry for entry in words if entry[0]]
