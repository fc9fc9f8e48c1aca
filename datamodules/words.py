"""When words are said: read from files of a forced aligner, or spread over a clip, and brought to frames."""

import csv
import math
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from praatio import textgrid
from praatio.utilities.errors import PraatioException

from datamodules.errors import UserError

Word = tuple[str, float, float]
# How forced aligners mark silence.
SILENT = ("", "sil", "sp", "<eps>")


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
    return _in_order(path, words)


def read_alignment(path: Path) -> tuple[list[Word], list[Word]]:
    """Words and phonemes of a forced aligner's TextGrid, with their times in seconds, in order; maybe none.

    Args:
        path: interval tiers called ``words`` as for :func:`read_words`, and ``phones``. Silences are left out, and so
            are the digits by which ARPAbet marks stress: ``AH0`` is ``AH``.

    Raises:
        UserError: no such file, another format, no such tiers, or times that are no order.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such TextGrid; align the recording with its transcript or leave out alignments")
    tiers = _tiers(path)
    phonemes = [(name.rstrip("012"), start, end) for name, start, end in _entries(path, tiers, "phones", "phone")]
    return _in_order(path, _entries(path, tiers, "words", "word")), _in_order(path, phonemes)


def spread_words(transcript: str, seconds: float) -> list[Word]:
    """The words of a transcript, each as long as any other, over a whole clip: for want of their times.

    Args:
        transcript: words between blanks.
        seconds: length of the clip.
    """
    words = transcript.split()
    edges = np.linspace(0.0, seconds, len(words) + 1).tolist()
    return list(zip(words, edges[:-1], edges[1:], strict=True))


def timed_words(timed: list[Word], transcript: str, seconds: float) -> list[Word]:
    """Words with their times, written as in the transcript where that has as many.

    Without times they are spread evenly, and a warning says so.

    Args:
        timed: words with their times; none where not known.
        transcript: what is said, with its punctuation.
        seconds: how long the sound lasts.
    """
    if not timed:
        warnings.warn("transcript without word times: its words are spread evenly over the clip", stacklevel=2)
        return spread_words(transcript, seconds)
    written = transcript.split()
    if len(timed) != len(written):
        return timed
    return [(word, start, end) for word, (_, start, end) in zip(written, timed, strict=True)]


def words_within(words: list[Word], start: float, end: float) -> list[Word]:
    """What is said in a part of a recording, timed from the part's start; words across its borders are cut there.

    Args:
        words: of the recording, in order.
        start, end: of the part, in seconds.
    """
    return [(word, max(a, start) - start, min(b, end) - start) for word, a, b in words if a < end and b > start]


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


def _in_order(path: Path, words: list[Word]) -> list[Word]:
    before = 0.0
    for word, start, end in words:
        if not (before <= start < end and math.isfinite(end)):
            raise UserError(
                f"{path}: '{word}' from {start:g} to {end:g} s, expected to start at {before:g} s or later and to end "
                "after that; correct its times"
            )
        before = end
    return words


def _read_textgrid(path: Path) -> list[Word]:
    tiers = _tiers(path)
    return _entries(path, tiers, "words", "word", *(tier.name for tier in tiers if len(tiers) == 1))


def _tiers(path: Path) -> list[textgrid.IntervalTier]:
    try:
        grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=False, reportingMode="silence")
    except (PraatioException, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not a TextGrid that can be read ({type(error).__name__})") from error
    return [tier for tier in grid.tiers if isinstance(tier, textgrid.IntervalTier)]


def _entries(path: Path, tiers: list[textgrid.IntervalTier], *names: str) -> list[Word]:
    """What stands in the one tier of such a name, in whatever case and with or without a speaker's before it."""
    named = [tier for tier in tiers if tier.name in names or tier.name.lower().rpartition(" - ")[2] in names]
    if len(named) != 1:
        found = ", ".join(f"'{tier.name}'" for tier in tiers) or "none"
        raise UserError(f"{path}: interval tiers {found}, expected one named '{names[0]}'; rename or remove tiers")
    entries = [(entry.label.strip(), entry.start, entry.end) for entry in named[0].entries]
    return [entry for entry in entries if entry[0].lower() not in SILENT]


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
