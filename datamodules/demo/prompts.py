"""Descriptions of expressions with what they do to a face: the demo corpus' stand-in for ExpCLIP's TEAD.

TEAD (Zhong et al., AAAI 2024) has text prompts with an emotion tag, action units and blendshape weights, and is not
public. Here an emotion's prototype of FACS action units (Ekman & Friesen 1978; the emotional ones of their EMFACS) is
drawn at one of three strengths and with some variation, mapped to the 52 ARKit units, described by a template, and
shown by a rendered person.

What is held out is the wording: templates, words for an emotion, words for its strength and names of facial actions
that occur in the prompts of val or test occur in no other split's. As a large CLIP knows such words from captions of
the web, they do occur in ``captions``, plain photo captions of the pictures of every split: a CLIP is trained on those
(:mod:`trainers.backbone.clip`), whoever learns from the prompts never sees them.

Members of one sample:

===============  =====================================================================================
``json``         text, emotion, aus (action unit -> 0 to 1; ``L`` and ``R`` are one side's), captions
``weights.npy``  (52,) float32, the ARKit units in the order of ``Head.units``
``png``          somebody who makes the face
===============  =====================================================================================
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from datamodules.demo.faces import SPLITS, draw_look, draw_view, png, take_picture
from datamodules.demo.looks import Identity, sample_identity
from datamodules.demo.visemes import EMOTIONS, INTENSITIES
from datamodules.errors import UserError
from datamodules.head import Head
from datamodules.shards import Manifest, Sample, ShardJob, build_shards, npy_bytes

Array = np.ndarray

VERSION = 1
SHARD = 250  # prompts
SUPERSAMPLE = 2

# Action unit -> the ARKit units that show it, without their side.
ACTION_UNITS = {
    "AU1": "browInnerUp",
    "AU2": "browOuterUp",
    "AU4": "browDown",
    "AU5": "eyeWide",
    "AU6": "cheekSquint",
    "AU7": "eyeSquint",
    "AU9": "noseSneer",
    "AU10": "mouthUpperUp",
    "AU12": "mouthSmile",
    "AU14": "mouthDimple",
    "AU15": "mouthFrown",
    "AU17": "mouthShrugLower",
    "AU20": "mouthStretch",
    "AU23": "mouthPress",
    "AU26": "jawOpen",
    "AU64": "eyeLookDown",
}

# The face of each emotion at strength 1. Contempt's brow is the corpus': EMFACS has the unilateral smile alone.
PROTOTYPES: dict[str, dict[str, float]] = {
    "neutral": {},
    "happy": {"AU6": 0.7, "AU7": 0.2, "AU12": 0.8},
    "sad": {"AU1": 0.8, "AU4": 0.25, "AU15": 0.6, "AU17": 0.25, "AU64": 0.3},
    "surprised": {"AU1": 0.8, "AU2": 0.8, "AU5": 0.6, "AU26": 0.35},
    "fear": {"AU1": 0.8, "AU4": 0.35, "AU5": 0.75, "AU20": 0.5, "AU26": 0.15},
    "disgusted": {"AU4": 0.35, "AU6": 0.35, "AU9": 0.8, "AU10": 0.35, "AU15": 0.2},
    "angry": {"AU4": 0.9, "AU5": 0.2, "AU7": 0.5, "AU9": 0.2, "AU23": 0.4},
    "contempt": {"AU7": 0.3, "AU12L": 0.5, "AU14L": 0.5, "AU2R": 0.5},
}

# Emotion -> words of train, val and test.
WORDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "neutral": (("neutral", "calm", "expressionless", "relaxed"), ("impassive",), ("blank", "composed")),
    "happy": (("happy", "joyful", "cheerful", "pleased"), ("glad",), ("delighted", "merry", "elated")),
    "sad": (("sad", "unhappy", "sorrowful", "gloomy"), ("downcast",), ("miserable", "mournful", "dejected")),
    "surprised": (("surprised", "amazed", "startled", "puzzled"), ("stunned",), ("astonished", "astounded")),
    "fear": (("afraid", "scared", "frightened", "fearful"), ("terrified",), ("panicked", "horrified")),
    "disgusted": (("disgusted", "repelled", "revolted", "queasy"), ("nauseated",), ("sickened", "repulsed")),
    "angry": (("angry", "furious", "mad", "irritated"), ("enraged",), ("irate", "outraged", "wrathful")),
    "contempt": (("contemptuous", "scornful", "disdainful", "smug"), ("derisive",), ("haughty", "condescending")),
}

# Words of train, val and test for the strengths of ``INTENSITIES``, weak to strong.
DEGREES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("slightly", "somewhat"), ("",), ("very", "extremely")),
    (("faintly",), ("",), ("intensely",)),
    (("mildly", "barely"), ("",), ("deeply", "utterly")),
)

# Action unit -> how train, val and test name it.
ACTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "AU1": (
        ("raised inner brows", "inner brows drawn up"),
        ("inner brows pulled up",),
        ("brows lifted in the middle",),
    ),
    "AU2": (("raised outer brows", "high brows"), ("outer brows pulled up",), ("brows lifted at the ends",)),
    "AU4": (("lowered brows", "a frown"), ("knitted brows",), ("brows drawn together",)),
    "AU5": (("wide eyes", "raised upper lids"), ("widened eyes",), ("staring eyes",)),
    "AU6": (("raised cheeks", "bunched cheeks"), ("cheeks pushed up",), ("lifted cheeks",)),
    "AU7": (("narrowed eyes", "tight lids"), ("squinting eyes",), ("tensed eyelids",)),
    "AU9": (("a wrinkled nose", "a nose drawn up"), ("a scrunched nose",), ("a crinkled nose",)),
    "AU12": (("a smile", "lip corners pulled up"), ("a grin",), ("a beaming mouth",)),
    "AU15": (("lip corners pulled down", "a mouth turned down"), ("drooping lip corners",), ("a sagging mouth",)),
    "AU20": (("stretched lips", "lips drawn wide"), ("lips pulled sideways",), ("lips pulled flat",)),
    "AU23": (("pressed lips", "tight lips"), ("lips squeezed shut",), ("clenched lips",)),
    "AU26": (("an open mouth", "parted lips"), ("a dropped jaw",), ("a gaping mouth",)),
    "AU12L": (("a smile on one side", "a crooked smile"), ("a lopsided grin",), ("a smirk",)),
    "AU2R": (("one raised brow", "one brow higher"), ("one brow pulled up",), ("a single lifted brow",)),
}

# Prompts of train, val and test. {a} has an article: "a very sad", {adjective} has none.
TEMPLATES: tuple[tuple[str, ...], ...] = (
    (
        "{A} face.",
        "Look {adjective}.",
        "Be {adjective} when you speak.",
        "The speaker looks {adjective}.",
        "Talk as if you were {adjective}.",
        "She seems {adjective} while she talks.",
        "He tells it with {a} expression.",
        "Make {a} face.",
        "Someone who feels {adjective}.",
        "I want you to look {adjective}.",
        "Speak in {a} way.",
        "The character is {adjective} about the news.",
    ),
    ("Read this aloud like {a} person.", "They sound {adjective} today.", "Your mood is {adjective}."),
    (
        "Say it the way {a} narrator would.",
        "Show us that you have become {adjective}.",
        "The line is delivered by {a} actor.",
        "Everything in your face should say: {adjective}.",
        "An avatar that appears {adjective} throughout.",
    ),
)
CAPTIONS = ("A photo of {a}.", "A portrait of {a}.", "{A}.", "A close-up of {a}.", "We see {a}.", "There is {a}.")


def build_prompts(
    out: Path,
    train: int = 2400,
    val: int = 300,
    test: int = 600,
    size: int = 64,
    seed: int = 0,
    processes: int | None = None,
) -> Manifest:
    """Builds the prompts as shards; equal arguments give equal bytes.

    Args:
        out: folder to write.
        train, val, test: prompts in each split; emotions take turns.
        size: pixels per side of the pictures.
        seed: of everything that is drawn.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: a size or count that cannot be built, or a folder that holds other data.
    """
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    if size < 16 or min(counts.values()) < 0:
        raise UserError(f"size {size}, counts {counts}: expected at least 16 pixels and no negative count")
    jobs = [
        ShardJob(
            f"{split}-{start // SHARD:06d}.tar",
            split,
            partial(make_samples, split, range(start, min(start + SHARD, count)), size, seed),
        )
        for split, count in counts.items()
        for start in range(0, count, SHARD)
    ]
    fields = {"controls": Head.load().units, "emotions": list(EMOTIONS), "size": size, "seed": seed}
    plan = {"corpus": "demo prompts", "version": VERSION, "counts": counts, "size": size, "seed": seed}
    return build_shards(
        Path(out), jobs, kind="expression-prompts", name="demo corpus", fields=fields, plan=plan, processes=processes
    )


def make_samples(split: str, numbers: range, size: int, seed: int) -> Iterator[Sample]:
    """The prompts ``numbers`` of a split."""
    for number in numbers:
        rng = np.random.default_rng([seed, 4, SPLITS.index(split), number])
        yield make_sample(f"{split}-{number:06d}", SPLITS.index(split), EMOTIONS[number % len(EMOTIONS)], size, rng)


def make_sample(key: str, split: int, emotion: str, size: int, rng: np.random.Generator) -> Sample:
    """Draws strength, variation and wording of one prompt, and somebody who shows it."""
    level = int(rng.integers(len(INTENSITIES)))
    aus = draw_action_units(emotion, INTENSITIES[level], rng)
    weights = control_weights(aus)
    identity = sample_identity(rng)
    image, _, _ = take_picture(identity, draw_look(identity, rng), weights, draw_view(rng), size, SUPERSAMPLE)
    labels = {
        "text": describe(emotion, level, split, rng),
        "emotion": emotion,
        "aus": aus,
        "captions": caption(emotion, level, identity, rng),
    }
    members = {"json": json.dumps(labels).encode(), "weights.npy": npy_bytes(weights), "png": png(image)}
    return Sample(key, 1, members)


def draw_action_units(emotion: str, strength: float, rng: np.random.Generator) -> dict[str, float]:
    """An emotion's action units at a strength, each up to 15 % stronger or weaker."""
    prototype = PROTOTYPES[emotion]
    values = np.array(list(prototype.values())) * strength * rng.uniform(0.85, 1.15, len(prototype))
    return dict(zip(prototype, np.round(np.clip(values, 0, 1), 3).tolist(), strict=True))


def control_weights(aus: dict[str, float]) -> Array:
    """(52,) float32: action units as ARKit units; ``AU12L`` is AU12 on the subject's left side alone."""
    units = Head.load().units
    weights = np.zeros(len(units), np.float32)
    for action, value in aus.items():
        stem, sides = ACTION_UNITS[action.rstrip("LR")], {"L": ("Left",), "R": ("Right",)}.get(action[-1])
        for name in [stem] if stem in units else [f"{stem}{side}" for side in sides or ("Left", "Right")]:
            weights[units.index(name)] = value
    return weights


def describe(emotion: str, level: int, split: int, rng: np.random.Generator) -> str:
    """A prompt in the wording of a split: an emotion at a strength, in half of them with one or two of its actions."""
    word, degree = _pick(WORDS[emotion][split], rng), _pick(DEGREES[split][level], rng)
    text = _fill(_pick(TEMPLATES[split], rng), emotion, degree, word)
    actions = [_pick(ACTIONS[action][split], rng) for action in _some_actions(emotion, rng)]
    return f"{text[:-1]}, with {' and '.join(actions)}." if actions and rng.random() < 0.5 else text


def caption(emotion: str, level: int, identity: Identity, rng: np.random.Generator) -> list[str]:
    """Captions of a picture, one with each word that any split has for the emotion."""
    person = f"{'young' if identity.traits['Young'] else 'older'} {'man' if identity.male else 'woman'}"
    captions = []
    for word in (word for words in WORDS[emotion] for word in words):
        degree = _pick([degree for degrees in DEGREES for degree in degrees[level]], rng)
        actions = [_pick([name for names in ACTIONS[a] for name in names], rng) for a in _some_actions(emotion, rng)]
        text = _fill(_pick(CAPTIONS, rng), emotion, degree, f"{word} {person}")
        captions.append(f"{text[:-1]} with {' and '.join(actions)}." if actions and rng.random() < 0.5 else text)
    return captions


def _some_actions(emotion: str, rng: np.random.Generator) -> list[str]:
    """One or two of an emotion's actions that have a name."""
    named = [action for action in PROTOTYPES[emotion] if action in ACTIONS]
    return [str(action) for action in rng.permutation(named)[: rng.integers(1, 3)]]


def _fill(template: str, emotion: str, degree: str, word: str) -> str:
    """Neither "slightly neutral" nor "a angry face"."""
    adjective = f"{degree} {word}" if degree and emotion != "neutral" else word
    article = "an" if adjective[0] in "aeiou" else "a"
    return template.format(adjective=adjective, a=f"{article} {adjective}", A=f"{article.capitalize()} {adjective}")


def _pick(choices: tuple[str, ...] | list[str], rng: np.random.Generator) -> str:
    return choices[rng.integers(len(choices))]
