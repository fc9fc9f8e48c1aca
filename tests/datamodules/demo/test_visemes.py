import numpy as np
import pytest

from datamodules.demo.visemes import EMOTION_POSES, EMOTIONS, FPS, Style, animate, articulate, draw_style
from datamodules.head import Head

UNITS = Head.load().units
BROWS = [i for i, unit in enumerate(UNITS) if unit.startswith("brow")]
MOUTH = [i for i, unit in enumerate(UNITS) if unit.startswith(("mouth", "jaw"))]
BLINK = [i for i, unit in enumerate(UNITS) if unit.startswith("eyeBlink")]


def spell(symbols: str, each: float = 0.1, start: float = 0.2) -> list[tuple[str, float, float]]:
    """Phonemes of equal length."""
    return [(symbol, start + i * each, start + (i + 1) * each) for i, symbol in enumerate(symbols.split())]


def move(phonemes, words=(), tags=(), frames=60, emotion="neutral", intensity=0, style=None, seed=0):
    rng = np.random.default_rng(seed)
    return animate(phonemes, list(words), tags, frames, emotion, intensity, style or Style(), rng)


def opening(weights: np.ndarray) -> np.ndarray:
    """(T,) millimetres by which the middle of the lips is further open than at rest, on the mesh."""
    head = Head.load()
    vertices = head.pose(head.vertices[: head.exterior], weights)
    upper, lower = (lip[len(lip) // 2] for lip in head.inner_lips)
    gap = vertices[:, upper, 1] - vertices[:, lower, 1]
    return 1000 * (gap - (head.vertices[upper, 1] - head.vertices[lower, 1]))


def frame(interval: tuple[str, float, float]) -> int:
    return round((interval[1] + interval[2]) / 2 * FPS)


def column(weights: np.ndarray, unit: str) -> np.ndarray:
    return weights[:, UNITS.index(unit)]


@pytest.mark.parametrize("emotion", EMOTIONS)
def test_lips_meet_on_m_b_p_and_open_on_vowels_in_every_emotion(emotion):
    phonemes = spell("ɑ m ɑ b ɑ p ɑ f ɑ")
    gap = opening(move(phonemes, emotion=emotion, intensity=2).weights)
    for phoneme in phonemes:
        if phoneme[0] in "mbp":
            assert gap[frame(phoneme)] < 0.3
        elif phoneme[0] == "f":
            assert gap[frame(phoneme)] < 3
        else:
            assert gap[frame(phoneme)] > 5


def test_lips_meet_whatever_the_style():
    phonemes = spell("æ b i m u p ʃ m", each=0.07)
    for seed in range(20):
        gap = opening(move(phonemes, style=draw_style(np.random.default_rng(seed))).weights)
        assert all(gap[frame(p)] < 0.3 for p in phonemes if p[0] in "mbp")


def test_a_consonant_takes_the_rounding_of_its_vowel():
    time = np.arange(30) / FPS
    rounded, spread = (articulate(spell(f"t {vowel}"), time)["mouthPucker"] for vowel in "ui")
    during = frame(spell("t")[0])
    assert rounded[during] > spread[during] + 0.1


def test_dominance_is_a_weighted_mean():
    """Two phonemes alone: between them lies the mean of their targets, weighted by their dominance."""
    phonemes = [("ɑ", 0.0, 0.4), ("i", 0.4, 0.8)]
    jaw = articulate(phonemes, np.array([0.4]))["jawOpen"][0]
    assert jaw == pytest.approx((0.4 + 0.1) / 2, abs=0.01)  # midway, equal strengths; surrounding silence is far


def test_silence_is_the_face_at_rest():
    curves = articulate(spell("ɑ b ɑ"), np.array([0.0, 5.0]))
    assert all(np.abs(curve[1]) < 1e-6 for curve in curves.values())
    motion = move([], frames=3)
    assert motion.weights.shape == (3, 52)
    assert motion.weights[:, MOUTH].max() == 0


def test_meaning_moves_brows_and_head_but_not_the_mouth():
    phonemes, words = spell("ɑ t ɑ t ɑ t"), [("one", 0.2, 0.5), ("two", 0.5, 0.8)]
    plain, asked, denied, stressed = (
        move(phonemes, words, tags) for tags in (("", ""), ("question", ""), ("", "negation"), ("", "emphasis"))
    )
    said = slice(round(0.5 * FPS), round(0.8 * FPS))
    for other in (asked, denied, stressed):
        np.testing.assert_array_equal(other.weights[:, MOUTH], plain.weights[:, MOUTH])
        np.testing.assert_array_equal(other.weights[:, BLINK], plain.weights[:, BLINK])
    for raised in (asked, stressed):
        difference = column(raised.weights, "browOuterUpLeft") - column(plain.weights, "browOuterUpLeft")
        assert difference[said].mean() > 0.3
    assert (column(denied.weights, "browDownLeft") - column(plain.weights, "browDownLeft"))[said].mean() > 0.4
    assert np.abs(denied.pose[:, 1] - plain.pose[:, 1]).max() > 0.05  # shakes
    assert np.abs(stressed.pose[:, 0] - plain.pose[:, 0]).max() > 0.05  # nods


def test_chance_does_not_listen_to_the_words():
    """Other words with the same random numbers: the same blinks and head; other numbers: others."""
    one, other = move(spell("ɑ t ɑ"), frames=300), move(spell("u m i p"), frames=300)
    np.testing.assert_array_equal(one.weights[:, BLINK], other.weights[:, BLINK])
    np.testing.assert_array_equal(one.pose, other.pose)
    np.testing.assert_array_equal(one.weights[:, BROWS], other.weights[:, BROWS])
    again = move(spell("ɑ t ɑ"), frames=300, seed=1)
    assert np.abs(again.weights[:, BROWS] - one.weights[:, BROWS]).mean() > 0.01
    assert np.abs(again.pose - one.pose).mean() > 0.01


def test_emotions_look_different_and_grow_with_intensity():
    faces = {e: move([], frames=90, emotion=e, intensity=2).weights.mean(0) for e in EMOTIONS}
    for i, one in enumerate(EMOTIONS):
        for other in EMOTIONS[i + 1 :]:
            assert np.abs(faces[one] - faces[other]).max() > 0.2, (one, other)
    strength = [move([], frames=90, emotion="happy", intensity=i).weights.mean(0) for i in range(3)]
    smile = [weights[UNITS.index("mouthSmileLeft")] for weights in strength]
    assert smile[0] < smile[1] < smile[2]


def test_emotions_name_units_that_exist():
    for pose in EMOTION_POSES.values():
        assert all(name in UNITS or f"{name}Left" in UNITS for name in pose)


def test_a_subject_blinks_at_its_rate():
    minutes = 20
    weights = move([], frames=minutes * 60 * FPS, style=Style(blinks=20)).weights
    shut = column(weights, "eyeBlinkLeft") > 0.7
    blinks = np.count_nonzero(shut[1:] & ~shut[:-1])
    assert blinks / minutes == pytest.approx(20, rel=0.2)


def test_a_subject_has_its_amplitude_and_asymmetry():
    phonemes = spell("i ɑ i ɑ i")
    small, large = (opening(move(phonemes, style=Style(opening=gain)).weights).max() for gain in (0.7, 1.3))
    assert large > 1.5 * small
    leaning = move(phonemes, style=Style(asymmetry=0.3)).weights
    assert column(leaning, "mouthStretchLeft").sum() == pytest.approx(
        1.3 / 0.7 * column(leaning, "mouthStretchRight").sum()
    )


def test_weights_are_weights():
    for seed, emotion in enumerate(EMOTIONS):
        style = draw_style(np.random.default_rng(seed))
        weights = move(spell("ɑ m u s i ð ɔɪ p"), emotion=emotion, intensity=2, style=style, seed=seed).weights
        assert weights.shape == (60, 52)
        assert weights.min() >= 0
        assert weights.max() <= 1
