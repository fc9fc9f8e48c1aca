"""BEAT (Liu et al., ECCV 2022): blendshape weights of speaking people, 60 fps; rig controls, no vertices.

Layout: ``<speaker>/<speaker>_<name>_<type>_<take>_<take>.json`` (``names``, and ``frames`` with ``weights``) and the
``.wav`` of the same name; with a ``.TextGrid`` of that name, clips have the times of words and phonemes.

Prepared as FaceDiffuser does (``data/beat/beat_split.py`` and ``data_loader.py``): English takes (type 0) of speakers
2, 4, 6 and 8, every second frame, pieces of 10 seconds (the rest of a take is dropped), emotion by take number, and a
stratified split of 80, 10 and 10 %. Its script mistakes the last take of each emotion for a neutral one and reads the
takes in no certain order; here the ranges include their ends and takes are read in the order of their numbers.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from datamodules.audio import mono_16khz
from datamodules.errors import UserError
from datamodules.shards import Manifest, Sample
from datamodules.sources.clips import build_clips, check_length, clip_sample, spoken
from datamodules.sources.layout import need_folder, read_text
from datamodules.words import read_alignment, words_within

VERSION = 1
CAPTURE_FPS, FPS = 60, 30
SECONDS = 10
ENGLISH = "0"
# Last take of each emotion.
EMOTIONS = {"neutral": 64, "happiness": 72, "anger": 80, "sadness": 86, "contempt": 94, "surprise": 102}
EMOTIONS |= {"fear": 110, "disgust": 118}


def build(
    root: Path,
    out: Path,
    speakers: list[str] | None = None,
    seed: int = 42,
    limit: int | None = None,
    processes: int | None = None,
) -> Manifest:
    """BEAT: blendshape weights and sound in pieces of ten seconds, with emotions.

    Example:
        facebench data beat --root beat_english_v0.2.1 --out data/beat

    Args:
        root: folder with one folder for each speaker.
        out: folder to write.
        speakers: folders to take; by default 2, 4, 6 and 8, as FaceDiffuser does.
        seed: of the stratified split; 42 is FaceDiffuser's.
        limit: most pieces of each split.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: a speaker or a sound is missing, frames without weights, or too few pieces to split.
    """
    need_folder(root)
    speakers = speakers or ["2", "4", "6", "8"]
    pieces: list[Piece] = []
    names: list[str] | None = None
    for speaker in speakers:
        if not (root / speaker).is_dir():
            raise UserError(f"{root}: holds no folder '{speaker}' of that speaker; give --speakers that are there")
        for take in sorted((root / speaker).glob("*.json"), key=_take):
            if take.stem.split("_")[2] != ENGLISH:
                continue
            weights, here = read_take(take)
            if names is not None and here != names:
                raise UserError(f"{take}: blendshapes {here}, expected those of the first take {names}")
            names = here
            check_length(take.with_suffix(".wav"), len(weights), CAPTURE_FPS, take)
            emotion = emotion_of(_take(take), take)
            first = sum(piece.speaker == speaker for piece in pieces) + 1
            count = len(weights) // (CAPTURE_FPS * SECONDS)
            pieces += [Piece(speaker, emotion, first + i, take, i) for i in range(count)]
    if names is None:
        raise UserError(f"{root}: no English take (<speaker>_<name>_0_<take>_<take>.json) of {', '.join(speakers)}")
    return build_clips(
        out,
        split_pieces(pieces, seed, root),
        read_pieces,
        name="BEAT",
        version=VERSION,
        fps=FPS,
        unit="blendshape weight",
        topology="BEAT blendshapes",
        templates={speaker: np.zeros((0, 3)) for speaker in speakers},
        train_subjects=speakers,
        controls=names,
        emotions=list(EMOTIONS),
        fields={"seed": seed},
        sources=[
            take.with_suffix(ending)
            for take in dict.fromkeys(piece.take for piece in pieces)
            for ending in (".wav", ".TextGrid")
        ],
        limit=limit,
        in_order=True,
        processes=processes,
    )


@dataclass(frozen=True)
class Piece:
    """Ten seconds of a take."""

    speaker: str
    emotion: str
    number: int
    take: Path
    index: int

    @property
    def key(self) -> str:
        """FaceDiffuser's name: speaker, number of the emotion, number of the piece among the speaker's."""
        return f"{self.speaker}_{list(EMOTIONS).index(self.emotion)}_{self.number:02d}"


def emotion_of(take: int, path: Path) -> str:
    """The emotion of a take number.

    Raises:
        UserError: a number that BEAT does not have.
    """
    emotion = next((name for name, last in EMOTIONS.items() if take <= last), None)
    if emotion is None:
        raise UserError(f"{path}: take {take}, expected 0 to {max(EMOTIONS.values())}; remove it from the folder")
    return emotion


def _take(path: Path) -> int:
    parts = path.stem.split("_")
    if len(parts) != 5 or not parts[3].isdigit():
        raise UserError(f"{path}: expected a name like 2_scott_0_65_65.json: speaker, name, type, take, take")
    return int(parts[3])


@lru_cache(maxsize=1)
def read_take(path: Path) -> tuple[NDArray[np.float64], list[str]]:
    """(T, C) weights at 60 fps, and the names of the blendshapes.

    Raises:
        UserError: not such a file, or frames of different length.
    """
    try:
        raw: Any = json.loads(read_text(path))
        weights = np.array([frame["weights"] for frame in raw["frames"]], np.float64)
        names = [str(name) for name in raw["names"]]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not BEAT's 'names' and 'frames' with 'weights' ({error!r}); copy it again") from error
    if weights.ndim != 2 or not 0 < weights.shape[1] <= len(names):
        raise UserError(f"{path}: weights of shape {weights.shape} for {len(names)} names; copy it again")
    # Some files name a 52nd blendshape (the tongue) that their frames lack.
    return weights, names[: weights.shape[1]]


def split_pieces(pieces: list[Piece], seed: int, root: Path) -> dict[str, list[Piece]]:
    """80, 10 and 10 %, stratified by emotion and speaker.

    Raises:
        UserError: a speaker has fewer than three pieces of an emotion.
    """
    from sklearn.model_selection import train_test_split

    def cut(part: list[Piece], share: float) -> tuple[list[Piece], list[Piece]]:
        groups = [f"{piece.emotion} {piece.speaker}" for piece in part]
        return train_test_split(part, test_size=share, stratify=groups, random_state=seed)

    try:
        rest, test = cut(pieces, 0.1)
        train, val = cut(rest, 1 / 9)
    except ValueError as error:
        raise UserError(f"{root}: {len(pieces)} pieces of {SECONDS} s cannot be split by emotion ({error})") from error
    place = {piece.key: i for i, piece in enumerate(pieces)}
    parts = {"train": train, "val": val, "test": test}
    return {name: sorted(part, key=lambda piece: place[piece.key]) for name, part in parts.items()}


def read_pieces(pieces: list[Piece]) -> Iterator[Sample]:
    """Pieces -> samples, in a process of the build."""
    for piece in pieces:
        weights, _ = read_take(piece.take)
        start = piece.index * CAPTURE_FPS * SECONDS
        sound = piece.take.with_suffix(".wav")
        rate = soundfile.info(sound).samplerate
        span = {"start": piece.index * SECONDS * rate, "frames": SECONDS * rate}
        samples, _ = soundfile.read(sound, dtype="float32", always_2d=True, **span)
        yield clip_sample(
            piece.key,
            mono_16khz(samples, rate),
            piece.speaker,
            FPS,
            weights=weights[start : start + CAPTURE_FPS * SECONDS : CAPTURE_FPS // FPS],
            labels={"emotion": piece.emotion, "sentence": piece.take.stem, **_spoken(piece)},
        )


def _spoken(piece: Piece) -> dict[str, Any]:
    grid = piece.take.with_suffix(".TextGrid")
    if not grid.is_file():
        return {}
    start = piece.index * SECONDS
    words, phonemes = (words_within(entries, start, start + SECONDS) for entries in _read_grid(grid))
    return spoken(words, phonemes)


_read_grid = lru_cache(maxsize=1)(read_alignment)  # the pieces of a take follow each other
