"""From phonemes, words and an emotion to the 52 ARKit units: the ground truth of the talking heads.

The mouth follows the dominance functions of Cohen & Massaro (1993), "Modeling Coarticulation in Synthetic
Visual Speech": every phoneme asks for a value of each mouth parameter with a weight that fades with the
distance in time, and the mouth takes the weighted mean. A phoneme that does not care (the lips' rounding during
a ``t``) asks weakly and is shaped by its neighbours.

Three more sources move the face, and systems under test can be told apart by what they catch of them:

- emotion: a pose of the whole face, scaled by an intensity;
- meaning: words tagged as question, negation or emphasis move brows and head (the text knows, the sound hardly);
- chance: blinks, brows, gaze and head wander independently of the words (only a distribution can be learned).

Curves are kept by name: ``mouthSmile`` stands for ``mouthSmileLeft`` and ``mouthSmileRight`` until
the subject's asymmetry parts them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from datamodules.demo.espeak import SILENCE, Interval
from datamodules.demo.sentences import EMPHASIS, NEGATION, QUESTION
from datamodules.head import Head

Curve = NDArray[np.float64]
Curves = dict[str, Curve]

FPS = 30
EMOTIONS = ("neutral", "happy", "sad", "surprised", "fear", "disgusted", "angry", "contempt")
INTENSITIES = (0.4, 0.7, 1.0)  # strength of the emotion at intensity 0, 1 and 2

# Mouth parameters. ``closure`` is no unit: at 1 the lips meet whatever the jaw does.
PARAMETERS = (
    "closure",
    "jawOpen",
    "jawForward",
    "mouthFunnel",
    "mouthPucker",
    "mouthStretch",
    "mouthSmile",
    "mouthUpperUp",
    "mouthLowerDown",
    "mouthRollLower",
    "mouthRollUpper",
    "mouthPress",
    "tongueOut",
)
_ROUNDING = ("mouthFunnel", "mouthPucker")
# Units that part the lips; a closure silences them.
PARTING = ("mouthFunnel", "mouthUpperUp", "mouthLowerDown", "mouthStretch", "noseSneer", "tongueOut")


def _viseme(jaw: float, **targets: float) -> dict[str, float]:
    """Targets of one viseme: every phoneme has an opinion on closure and jaw, the rest as named."""
    return {"closure": 0.0, "jawOpen": jaw, **{f"mouth{name}": value for name, value in targets.items()}}


_CLOSED = _viseme(0.08, Press=0.3, RollLower=0.15, RollUpper=0.1, Funnel=0.0) | {"closure": 1.0}
_LABIODENTAL = _viseme(0.06, RollLower=0.45, UpperUp=0.15, LowerDown=0.0, Funnel=0.0) | {"closure": 0.6}
_DENTAL = _viseme(0.12, LowerDown=0.15) | {"tongueOut": 0.25}
_ALVEOLAR = _viseme(0.11, LowerDown=0.1)
_SIBILANT = _viseme(0.05, Stretch=0.25, LowerDown=0.2, UpperUp=0.08)
_POSTALVEOLAR = _viseme(0.07, Funnel=0.35, Pucker=0.15) | {"jawForward": 0.15}
_VELAR = _viseme(0.17)
_RHOTIC = _viseme(0.13, Funnel=0.18, Pucker=0.15)

# IPA symbol -> targets. Diphthongs and syllabic or rhotic pairs are spelled out mark by mark.
VISEMES: dict[str, dict[str, float]] = {
    SILENCE: dict.fromkeys(PARAMETERS, 0.0),
    **dict.fromkeys("mbp", _CLOSED),
    **dict.fromkeys("fv", _LABIODENTAL),
    **dict.fromkeys("θð", _DENTAL),
    **dict.fromkeys("tdnlɾ", _ALVEOLAR),
    **dict.fromkeys("sz", _SIBILANT),
    **dict.fromkeys(("ʃ", "ʒ", "tʃ", "dʒ"), _POSTALVEOLAR),
    **dict.fromkeys("kɡŋxʔ", _VELAR),
    **dict.fromkeys("ɹɚɜ", _RHOTIC),
    "h": _viseme(0.2),
    "j": _viseme(0.1, Stretch=0.25, Smile=0.15),
    "w": _viseme(0.08, Funnel=0.2, Pucker=0.5),
    "i": _viseme(0.1, Stretch=0.3, Smile=0.25, UpperUp=0.1, LowerDown=0.15, Funnel=0.0, Pucker=0.0),
    **dict.fromkeys("ɪᵻ", _viseme(0.16, Stretch=0.2, Smile=0.1, LowerDown=0.12, Pucker=0.0)),
    **dict.fromkeys("eɛ", _viseme(0.24, Stretch=0.25, Smile=0.08, UpperUp=0.1, LowerDown=0.18, Pucker=0.0)),
    "æ": _viseme(0.34, Stretch=0.28, UpperUp=0.1, LowerDown=0.18, Pucker=0.0),
    "a": _viseme(0.36, Stretch=0.1, LowerDown=0.1, Pucker=0.0),
    "ɑ": _viseme(0.4, LowerDown=0.1, Pucker=0.0),
    **dict.fromkeys("ʌɐ", _viseme(0.26, LowerDown=0.08)),
    "ə": _viseme(0.17, LowerDown=0.05),
    "ɔ": _viseme(0.3, Funnel=0.3, Pucker=0.15),
    "o": _viseme(0.22, Funnel=0.35, Pucker=0.25),
    "ʊ": _viseme(0.14, Funnel=0.25, Pucker=0.3),
    "u": _viseme(0.1, Funnel=0.2, Pucker=0.5),
}

# How strongly a phoneme asks for what it names and for what it does not, and how fast that fades (1/s).
_NAMED, _UNNAMED, _CLOSING = 1.0, 0.15, 25.0
_FADE = 16.0
_FADE_ROUNDING = 12.0  # rounding is prepared well ahead
_FADE_CLOSURE = 100.0  # lips meet and part within two frames

# The face of each emotion at strength 1; EMFACS-like prototypes.
EMOTION_POSES: dict[str, dict[str, float]] = {
    "neutral": {},
    "happy": {"mouthSmile": 0.55, "cheekSquint": 0.35, "eyeSquint": 0.25, "mouthDimple": 0.15, "browOuterUp": 0.1},
    "sad": {"browInnerUp": 0.75, "mouthFrown": 0.5, "mouthShrugLower": 0.2, "eyeLookDown": 0.25, "eyeBlink": 0.12},
    "surprised": {"browInnerUp": 0.7, "browOuterUp": 0.75, "eyeWide": 0.5, "jawOpen": 0.06, "mouthFunnel": 0.06},
    "fear": {"browInnerUp": 0.8, "browDown": 0.2, "eyeWide": 0.6, "mouthStretch": 0.35},
    "disgusted": {"noseSneer": 0.75, "browDown": 0.4, "cheekSquint": 0.35, "mouthUpperUp": 0.2, "mouthFrown": 0.2},
    "angry": {"browDown": 0.9, "eyeSquint": 0.3, "noseSneer": 0.3, "mouthFrown": 0.25, "jawForward": 0.2},
    "contempt": {"mouthSmileLeft": 0.45, "mouthDimpleLeft": 0.4, "browOuterUpRight": 0.45, "eyeSquint": 0.3},
}

# Muscles that move together: (mover, moved, gain).
LINKS = (
    ("mouthSmile", "cheekSquint", 0.35),
    ("browOuterUp", "eyeWide", 0.3),
    ("browDown", "eyeSquint", 0.25),
    ("mouthPucker", "cheekPuff", 0.1),
)


@dataclass(frozen=True)
class Style:
    """How one subject moves.

    Attributes:
        opening, rounding, spreading: gains of jaw, of funnel and pucker, and of the other mouth units; 1 is average.
        asymmetry: share by which the left of the mouth moves more than the right, -0.35 to 0.35.
        smile: constant smile (positive) or frown (negative), -0.15 to 0.15.
        blinks: per minute.
        brow_raise, brow_frown: gains of what words and chance do to the brows.
        brow_rest: constant height of the brows, -0.2 (lowered) to 0.2 (raised).
        brow_asymmetry: as ``asymmetry``, for the brows.
        head: gain of the head's motion.
    """

    opening: float = 1.0
    rounding: float = 1.0
    spreading: float = 1.0
    asymmetry: float = 0.0
    smile: float = 0.0
    blinks: float = 15.0
    brow_raise: float = 1.0
    brow_frown: float = 1.0
    brow_rest: float = 0.0
    brow_asymmetry: float = 0.0
    head: float = 1.0


def draw_style(rng: np.random.Generator) -> Style:
    """A subject's style."""
    return Style(
        opening=rng.uniform(0.7, 1.3),
        rounding=rng.uniform(0.7, 1.3),
        spreading=rng.uniform(0.6, 1.4),
        asymmetry=rng.uniform(-0.35, 0.35),
        smile=rng.uniform(-0.15, 0.15),
        blinks=rng.uniform(8.0, 28.0),
        brow_raise=rng.uniform(0.7, 1.2),
        brow_frown=rng.uniform(0.7, 1.2),
        brow_rest=rng.uniform(-0.2, 0.2),
        brow_asymmetry=rng.uniform(-0.3, 0.3),
        head=rng.uniform(0.5, 1.5),
    )


@dataclass(frozen=True)
class Motion:
    """What moves the mesh.

    Attributes:
        weights: (T, 52) float64 in [0, 1], in the order of ``Head.units``.
        pose: (T, 3) float64, rotation of the head about x (nod), y (turn), z (tilt) in radians.
    """

    weights: Curve
    pose: Curve


def animate(
    phonemes: list[Interval],
    words: list[Interval],
    tags: tuple[str, ...],
    frames: int,
    emotion: str,
    intensity: int,
    style: Style,
    rng: np.random.Generator,
) -> Motion:
    """Animates one clip.

    Args:
        phonemes, words: (symbol, start, end) in seconds; frame k is the instant k / 30 s.
        tags: one per word, see :mod:`datamodules.demo.sentences`.
        frames: T.
        emotion: one of :data:`EMOTIONS`.
        intensity: 0, 1 or 2.
        style: the subject's.
        rng: decides what is left to chance; nothing else does.
    """
    time = np.arange(frames) / FPS
    speech = articulate(phonemes, time)
    face = _styled(speech, style)
    strength = INTENSITIES[intensity] * (0.9 + 0.1 * _wander(rng, frames, seconds=0.8))
    rest = np.zeros(frames)
    for name, value in EMOTION_POSES[emotion].items():
        face[name] = face.get(name, rest) + value * strength

    raised, lowered, meant_pose = gestures(words, tags, time)
    raised = style.brow_raise * (raised + 0.12 * _wander(rng, frames, seconds=0.5)) + style.brow_rest
    lowered = style.brow_frown * (lowered + 0.08 * _wander(rng, frames, seconds=0.5)) - style.brow_rest
    raised = np.maximum(raised, 0.0) * (1 - np.clip(lowered, 0.0, 1.0))
    for name, curve in (("browInnerUp", 0.8 * raised), ("browOuterUp", raised), ("browDown", lowered)):
        face[name] = face.get(name, rest) + np.maximum(curve, 0.0)
    for mover, moved, gain in LINKS:
        face[moved] = face.get(moved, rest) + gain * face[mover]

    blink = _blinks(rng, frames, style.blinks)
    gaze = {name: 0.25 * np.maximum(_wander(rng, frames, seconds=0.3), 0) for name in ("eyeLookUp", "eyeLookDown")}
    for name, curve in (("eyeBlink", blink), *gaze.items()):
        face[name] = np.maximum(face.get(name, rest), curve)
    face["eyeWide"] = face["eyeWide"] * (1 - blink)

    wandering = np.stack([_wander(rng, frames, seconds=0.6) for _ in range(3)], axis=1)
    pose = style.head * (meant_pose + [0.03, 0.05, 0.02] * wandering)
    return Motion(_close_lips(_two_sided(face, style, frames), speech["closure"]), pose)


def articulate(phonemes: list[Interval], time: Curve) -> Curves:
    """Mouth parameters by dominance functions.

    Parameter p at time t is sum_s D_sp(t) T_sp / sum_s D_sp(t), with D_sp(t) = a_sp exp(-f_p d_s(t)), where d_s is
    the distance to the segment's core (Cohen & Massaro 1993, section 3, measure it from the centre alone).

    Args:
        phonemes: (IPA symbol, start, end) in seconds.
        time: (T,) instants in seconds.

    Returns:
        parameter -> (T,) in [0, 1].
    """
    segments = _segments(phonemes, float(time[-1]) if len(time) else 0.0)
    centre = np.array([(start + end) / 2 for _, start, end in segments])
    half = np.array([(end - start) / 2 for _, start, end in segments])
    away = np.abs(time[:, None] - centre)
    curves: Curves = {}
    for parameter in PARAMETERS:
        wanted = [VISEMES[symbol] for symbol, _, _ in segments]
        target = np.array([viseme.get(parameter, 0.0) for viseme in wanted])
        strength = np.array([_NAMED if parameter in viseme else _UNNAMED for viseme in wanted])
        core, fade = 0.3 * half, (_FADE_ROUNDING if parameter in _ROUNDING else _FADE)
        if parameter == "closure":
            core, fade = 0.5 * half, _FADE_CLOSURE
            strength = np.where(target > 0, _CLOSING, _NAMED)
        # The nearest segment is subtracted so that long silences do not underflow to 0 / 0.
        distance = np.maximum(away - core, 0.0)
        dominance = strength * np.exp(-fade * (distance - distance.min(1, keepdims=True)))
        curves[parameter] = dominance @ target / dominance.sum(1)
    return curves


def _segments(phonemes: list[Interval], end: float) -> list[Interval]:
    """One viseme each: compounds are split in equal parts, silence surrounds the whole; a rare symbol is a schwa."""
    first, last = (phonemes[0][1], phonemes[-1][2]) if phonemes else (end, end)
    segments = [(SILENCE, min(0.0, first), first)]
    for symbol, start, stop in phonemes:
        marks = [symbol] if symbol in VISEMES else [mark for mark in symbol if mark in VISEMES] or ["ə"]
        edges = np.linspace(start, stop, len(marks) + 1).tolist()
        segments += zip(marks, edges[:-1], edges[1:], strict=True)
    return [*segments, (SILENCE, last, max(end, last))]


def gestures(words: list[Interval], tags: tuple[str, ...], time: Curve) -> tuple[Curve, Curve, Curve]:
    """What the meaning of words does: a question raises the brows to its end, stress raises them for a moment
    and nods, negation lowers them and shakes the head.

    Returns:
        brows raised (T,), brows lowered (T,), head rotation (T, 3) in radians.
    """
    raised: Curve = np.zeros_like(time)
    lowered: Curve = np.zeros_like(time)
    pose: Curve = np.zeros((len(time), 3))
    for (_, start, end), tag in zip(words, tags, strict=True):
        if tag == QUESTION:
            raised = np.maximum(raised, 0.6 * _bump(time, start - 0.1, words[-1][2]))
        elif tag == EMPHASIS:
            raised = np.maximum(raised, 0.85 * _bump(time, start - 0.05, end + 0.1))
            pose[:, 0] += 0.08 * _bump(time, start - 0.05, end + 0.1)
        elif tag == NEGATION:
            shaken = _bump(time, start - 0.1, end + 0.4)
            lowered = np.maximum(lowered, 0.8 * _bump(time, start - 0.05, end + 0.25))
            pose[:, 1] += 0.08 * shaken * np.sin(2 * np.pi * 2.5 * (time - start))
    return raised, lowered, pose


def _bump(time: Curve, start: float, end: float, ramp: float = 0.12) -> Curve:
    """1 from start to end with smooth ramps outside."""
    rise = np.clip((time - (start - ramp)) / ramp, 0, 1)
    fall = np.clip(((end + ramp) - time) / ramp, 0, 1)
    edge = np.minimum(rise, fall)
    return edge * edge * (3 - 2 * edge)


def _wander(rng: np.random.Generator, frames: int, seconds: float) -> Curve:
    """Smooth noise of unit variance with this correlation time, (T,)."""
    sigma = seconds * FPS / 2
    margin = int(4 * sigma) + 1
    noise = gaussian_filter1d(rng.standard_normal(frames + 2 * margin), sigma)[margin:-margin]
    return noise * np.sqrt(2 * np.sqrt(np.pi) * sigma)


def _blinks(rng: np.random.Generator, frames: int, per_minute: float) -> Curve:
    """Eyes shut at random moments, at least half a second apart, (T,) in [0, 1]."""
    time = np.arange(frames) / FPS
    shut: Curve = np.zeros(frames)
    at = 0.0
    while (at := at + 0.5 + rng.exponential(max(60 / per_minute - 0.5, 0.1))) < frames / FPS:
        shut = np.maximum(shut, _bump(time, at, at + 0.04, ramp=0.09))
    return shut


def _styled(speech: Curves, style: Style) -> Curves:
    """Mouth parameters at the subject's amplitude and rest."""
    gain = dict.fromkeys(PARAMETERS, style.spreading)
    gain |= dict.fromkeys(_ROUNDING, style.rounding) | {"jawOpen": style.opening, "jawForward": 1.0}
    face = {name: gain[name] * curve for name, curve in speech.items() if name != "closure"}
    face["mouthSmile"] = face["mouthSmile"] + max(style.smile, 0.0)
    face["mouthFrown"] = np.full_like(face["mouthSmile"], max(-style.smile, 0.0))
    return face


def _two_sided(face: Curves, style: Style, frames: int) -> Curve:
    """Curves by name to (T, 52), each side with the subject's gain."""
    units = Head.load().units
    column = {name: i for i, name in enumerate(units)}
    lean = {"mouth": style.asymmetry, "browO": style.brow_asymmetry, "browD": style.brow_asymmetry}
    weights = np.zeros((frames, len(units)))
    for name, curve in face.items():
        if name in column:
            weights[:, column[name]] += curve
        else:
            share = lean.get(name[:5], 0.0)
            weights[:, column[f"{name}Left"]] += curve * (1 + share)
            weights[:, column[f"{name}Right"]] += curve * (1 - share)
    # A mouth that opens more on one side also slides there.
    side = "mouthLeft" if style.asymmetry > 0 else "mouthRight"
    weights[:, column[side]] += 0.8 * abs(style.asymmetry) * weights[:, column["jawOpen"]]
    return np.clip(weights, 0.0, 1.0)


def _close_lips(weights: Curve, closure: Curve) -> Curve:
    """Makes the lips meet: what parts them is held back, then ``mouthClose`` undoes the opening that is left.

    Vertices are linear in the weights, and so is the height of the opening in the middle of the lips.
    """
    head = Head.load()
    upper, lower = (lip[len(lip) // 2] for lip in head.inner_lips)
    opening = head.unit_deltas[:, upper, 1] - head.unit_deltas[:, lower, 1]
    shut = np.clip(1.1 * closure, 0.0, 1.0)  # a weighted mean comes close to 1 but never reaches it
    closed = weights.copy()
    for i, unit in enumerate(head.units):
        if unit.startswith(PARTING):
            closed[:, i] *= 1 - shut
    close = head.units.index("mouthClose")
    closed[:, close] = np.clip(shut * (closed @ opening) / -opening[close], 0.0, 1.0)
    return closed
