"""Speech with exact phoneme and word times, from espeak-ng.

espeak-ng is GPL-3: it is an optional extra (``pip install 'facebench[corpus]'``) that builds the demo
corpus, reached through its C interface (``speak_lib.h``) and imported by nothing else.
"""

import _ctypes
import ctypes
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from datamodules.errors import UserError

SAMPLE_RATE = 16_000
ENGINE_RATE = 22_050
SILENCE = "sil"
PUNCTUATION = ",.;:!?"

# Values of speak_lib.h.
_SYNCHRONOUS, _PHONEME_EVENTS, _PHONEME_IPA = 2, 1, 2
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_WORD, _END, _PHONEME = 1, 5, 7
_UTF8 = 1

_UNCLIPPED = 60  # volume at which no voice reaches the largest sample; the default of 100 does

_SHORTEST_PAUSE = 0.06  # seconds; shorter events without a symbol are links between words, not pauses

Interval = tuple[str, float, float]


@dataclass(frozen=True)
class Voice:
    """How a sentence is spoken.

    Attributes:
        name: an espeak-ng voice, with or without a variant ("en-us+f3").
        rate: words per minute, 80 to 450.
        pitch: 0 to 99, 50 is the voice's own.
        pitch_range: 0 (monotone) to 99, 50 is the voice's own.
    """

    name: str = "en-us"
    rate: int = 165
    pitch: int = 50
    pitch_range: int = 50


@dataclass(frozen=True)
class Utterance:
    """Spoken text.

    Attributes:
        audio: (S,) int16, mono, 16 kHz.
        words: (word without punctuation, start, end) in seconds, one per blank-separated word of the text; a
            word lasts until the next one starts, pauses included.
        phonemes: (IPA symbol without stress and length marks, start, end) in seconds, gapless from the first
            to the last; ``sil`` is a pause.
    """

    audio: NDArray[np.int16]
    words: list[Interval]
    phonemes: list[Interval]


class _Id(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_void_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def speak(text: str, voice: Voice | None = None) -> Utterance:
    """Speaks a text; a pure function of its arguments, in any order and in any process.

    Args:
        text: plain text; words are separated by blanks.
        voice: the speaker, by default American English.

    Raises:
        UserError: espeak-ng is not installed, or knows no such voice.
    """
    voice = voice or Voice()
    chunks: list[bytes] = []
    words: list[tuple[int, int]] = []  # (sample, offset in the text)
    phonemes: list[tuple[int, str]] = []  # (sample, symbol)

    @_Callback
    def collect(samples: Any, count: int, events: Any) -> int:
        if samples and count:
            chunks.append(ctypes.string_at(samples, 2 * count))
        for event in _until_end(events):
            if event.type == _WORD:
                words.append((event.sample, event.text_position - 1))
            elif event.type == _PHONEME:
                phonemes.append((event.sample, _symbol(event.id.string)))
        return 0

    with _engine() as engine:
        engine.espeak_SetSynthCallback(collect)
        if engine.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise UserError(f"voice '{voice.name}': unknown to espeak-ng; try 'en-us' or 'en-us+f3'")
        settings = {_RATE: voice.rate, _VOLUME: _UNCLIPPED, _PITCH: voice.pitch, _RANGE: voice.pitch_range}
        for parameter, value in settings.items():
            engine.espeak_SetParameter(parameter, value, 0)
        data = text.encode() + b"\0"
        engine.espeak_Synth(data, len(data), 0, 1, 0, _UTF8, None, None)

    audio = np.frombuffer(b"".join(chunks), np.int16)
    return Utterance(
        _to_16_khz(audio), _word_times(text, words, len(audio)), _phoneme_times(phonemes, words, len(audio))
    )


@contextmanager
def _engine() -> Iterator[Any]:
    """A freshly loaded engine.

    The engine keeps its random numbers and pitch flutter in static variables, so that what it has said
    before changes what it says next; only a new copy of the library starts from the same state (2 ms).
    """
    try:
        import espeakng_loader
    except ImportError as error:
        raise UserError(
            "espeak-ng is not installed; the talking heads of the demo corpus need it: pip install 'facebench[corpus]'"
        ) from error
    engine = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        options = _PHONEME_EVENTS | _PHONEME_IPA
        rate = engine.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), options)
        if rate != ENGINE_RATE:
            raise UserError(f"espeak-ng: could not start (sample rate {rate}); reinstall 'facebench[corpus]'")
        engine.espeak_ng_SetRandSeed(ctypes.c_long(1))
        yield engine
        engine.espeak_Terminate()
    finally:
        _ctypes.dlclose(engine._handle)


def _until_end(events: Any) -> Iterator[_Event]:
    index = 0
    while events[index].type != 0:
        yield events[index]
        index += 1


def _symbol(raw: bytes) -> str:
    """IPA without stress, length and liaison marks; empty for a pause or a link."""
    return "".join(mark for mark in raw.decode(errors="ignore") if mark not in "ˈˌː‍ ")


def _to_16_khz(audio: NDArray[np.int16]) -> NDArray[np.int16]:
    resampled = resample_poly(audio.astype(np.float64), 320, 441)  # 22,050 * 320 / 441 = 16,000
    return np.clip(np.rint(resampled), -32768, 32767).astype(np.int16)


def _word_times(text: str, events: list[tuple[int, int]], samples: int) -> list[Interval]:
    """The interval of every written word, up to the next word.

    espeak-ng speaks some pairs ("of the") as one: they share its interval in proportion to their letters.
    """
    written = text.split()
    offsets, position = [], 0
    for word in written:
        offsets.append(text.index(word, position))
        position = offsets[-1] + len(word)
    starts: dict[int, int] = {}
    for sample, position in events:
        starts.setdefault(bisect_right(offsets, position) - 1, sample)
    times: list[Interval] = []
    for first, last in pairwise([*sorted(starts), len(written)]):
        letters = np.cumsum([0] + [len(word) for word in written[first:last]])
        begin, end = starts[first], starts.get(last, samples)
        edges = (begin + (end - begin) * letters / letters[-1]) / ENGINE_RATE
        for word, (start, stop) in zip(written[first:last], pairwise(edges.tolist()), strict=True):
            times.append((word.strip(PUNCTUATION), round(start, 4), round(stop, 4)))
    return times


def _phoneme_times(events: list[tuple[int, str]], words: list[tuple[int, int]], samples: int) -> list[Interval]:
    """Gapless intervals; the closure of a word's first stop belongs to that stop."""
    reported = [sample for sample, _ in events]
    starts = list(reported)
    for word_start, _ in words:  # a word is reported before its first phoneme by the length of the closure
        starts[bisect_left(reported, word_start)] = word_start
    times: list[Interval] = []
    for (_, symbol), (begin, end) in zip(events, pairwise([*starts, samples]), strict=True):
        start, stop = round(begin / ENGINE_RATE, 4), round(end / ENGINE_RATE, 4)
        if not symbol and stop - start < _SHORTEST_PAUSE and times:
            times[-1] = (times[-1][0], times[-1][1], stop)
        elif stop > start:
            times.append((symbol or SILENCE, start, stop))
    return times
