import sys

import numpy as np
import pytest

from datamodules.demo.espeak import SAMPLE_RATE, Voice, speak
from datamodules.errors import UserError

pytest.importorskip("espeakng_loader")

TEXT = "Did Bob really bring my umbrella?"


def loudness(audio: np.ndarray, start: float, end: float) -> float:
    part = audio[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)].astype(float)
    return float(np.sqrt((part**2).mean()))


def fundamental(audio: np.ndarray, start: float, end: float) -> float:
    """The pitch in Hz by autocorrelation."""
    part = audio[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)].astype(float)
    correlation = np.correlate(part, part, "full")[len(part) - 1 :]
    lags = slice(SAMPLE_RATE // 400, SAMPLE_RATE // 60)
    return SAMPLE_RATE / (lags.start + int(correlation[lags].argmax()))


def test_words_are_those_of_the_text_in_order_and_within_the_audio():
    said = speak(TEXT)
    assert [word for word, _, _ in said.words] == ["Did", "Bob", "really", "bring", "my", "umbrella"]
    times = [time for _, start, end in said.words for time in (start, end)]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] == pytest.approx(len(said.audio) / SAMPLE_RATE, abs=0.01)


def test_phonemes_are_gapless_and_lie_in_their_words():
    said = speak(TEXT)
    for (_, _, end), (_, start, _) in zip(said.phonemes[:-1], said.phonemes[1:], strict=True):
        assert end == start
    _, start, end = said.words[1]
    assert [p for p, s, e in said.phonemes if start <= (s + e) / 2 < end] == ["b", "ɑ", "b"]


def test_sound_follows_the_phonemes():
    said = speak("A papa. A baba. A mama.")
    stops = [loudness(said.audio, s, e) for p, s, e in said.phonemes if p == "p"]
    vowels = [loudness(said.audio, s, e) for p, s, e in said.phonemes if p == "ɑ"]
    assert len(stops) == 2
    assert max(stops) < 0.5 * min(vowels)


def test_words_spoken_as_one_share_its_time():
    said = speak("The end of the day.")
    assert [word for word, _, _ in said.words] == ["The", "end", "of", "the", "day"]
    assert all(end > start for _, start, end in said.words)


def test_a_pause_is_silence():
    said = speak("On the boat, people sleep.")
    pauses = [(start, end) for symbol, start, end in said.phonemes if symbol == "sil" and end - start > 0.1]
    assert len(pauses) == 1
    assert loudness(said.audio, *pauses[0]) < 0.1 * loudness(said.audio, 0, len(said.audio) / SAMPLE_RATE)


def test_what_was_said_before_changes_nothing():
    first = speak(TEXT, Voice("en-us+f3"))
    speak("Something else altogether.", Voice("en-us+m2", rate=220, pitch=80))
    again = speak(TEXT, Voice("en-us+f3"))
    np.testing.assert_array_equal(first.audio, again.audio)
    assert first.phonemes == again.phonemes


def test_a_voice_has_its_rate_and_pitch():
    text = "Mama, mama."
    slow, fast = speak(text, Voice(rate=110)), speak(text, Voice(rate=220))
    assert len(slow.audio) > 1.5 * len(fast.audio)
    pitches = []
    for pitch in (20, 80):
        said = speak(text, Voice(pitch=pitch, pitch_range=0))
        _, start, end = next(p for p in said.phonemes if p[0] == "ɑ")
        pitches.append(fundamental(said.audio, start, end))
    assert pitches[1] > 1.3 * pitches[0]


def test_unknown_voice():
    with pytest.raises(UserError, match="'martian'"):
        speak("Hello", Voice("martian"))


def test_missing_engine_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"facebench\[corpus\]"):
        speak("Hello")
