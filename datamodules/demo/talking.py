"""The talking heads of the demo corpus: subjects with a face, a voice and a manner, and what they say.

Members of one sample:

===============  ==================================================================================
``offsets.npy``  (T, 3689, 3) float16 or float32, metres: the mesh less the subject's template
``wav``          16-bit mono at 16 kHz, T / 30 seconds
``json``         subject, sentence, transcript, words, phonemes, tags, emotion, intensity, fps
``weights.npy``  (T, 52) float16, the ARKit units that made the offsets
``pose.npy``     (T, 3) float32, rotation of the head in radians; not applied to the mesh
===============  ==================================================================================

Beside the shards lie ``templates.safetensors`` (subject -> (3689, 3) float32, metres) and
``topology.safetensors`` (``triangles`` (7292, 3) int32 and the vertex indices of every region, int32).
"""

import hashlib
import io
import json
import math
import wave
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from datamodules.demo.espeak import SAMPLE_RATE, Interval, Voice, speak
from datamodules.demo.looks import Identity, Look, Mesh, dress, sample_identity
from datamodules.demo.sentences import Sentence, draw_sentences
from datamodules.demo.visemes import EMOTIONS, FPS, INTENSITIES, Style, animate, draw_style
from datamodules.errors import UserError
from datamodules.head import ASSET, TOPOLOGY, Head
from datamodules.shards import Manifest, Sample, ShardJob, build_shards, file_sha256, npy_bytes

VERSION = 1  # raise when the same settings give other clips
LEAD, TAIL = 0.2, 0.25  # seconds of silence before and after the sentence

VOICES = {
    "F": ("f1", "f2", "f3", "f4", "f5", "linda", "steph", "anika"),
    "M": ("m1", "m2", "m3", "m4", "m7", "m8", "adam", "john"),
}
# What an emotion at strength 1 does to the voice: (factor of the rate, pitch, pitch range).
EMOTIONAL_VOICES = {
    "neutral": (1.0, 0, 0),
    "happy": (1.08, 12, 25),
    "sad": (0.82, -10, -30),
    "surprised": (1.0, 18, 35),
    "fear": (1.18, 16, 5),
    "disgusted": (0.88, -8, 5),
    "angry": (1.12, 6, 30),
    "contempt": (0.92, -5, -18),
}


@dataclass(frozen=True)
class Subject:
    """Who speaks: BIWI-like name (F1, M1, F2 ...), face, voice and manner."""

    name: str
    identity: Identity
    voice: Voice
    style: Style


@dataclass(frozen=True)
class Clip:
    """One sentence to be spoken; ``seed`` decides what is left to chance."""

    subject: Subject
    sentence: Sentence
    emotion: str
    intensity: int
    seed: tuple[int, ...]

    @property
    def key(self) -> str:
        """Unique over all splits."""
        return f"{self.subject.name}_{self.sentence.id}_{self.emotion}_{self.intensity}"


def build_talking(
    out: Path,
    subjects: int = 12,
    sentences: int = 24,
    seed: int = 0,
    processes: int | None = None,
    precision: str = "float16",
) -> Manifest:
    """Builds the talking heads; the same bytes for the same arguments, whatever the number of processes.

    The splits are VOCASET's in proportion: of 12 subjects 8 train, 2 val, 2 test, at least one each; a sentence
    belongs to one split. Subjects of a split share sentences, so that what is said can be told from who says it.

    Args:
        out: folder to write.
        subjects: number of subjects, at least 3.
        sentences: clips per subject.
        seed: decides everything.
        processes: parallel processes, by default one per core.
        precision: of the offsets, ``float16`` (steps of 8 micrometres at 10 mm) or ``float32``.

    Raises:
        UserError: an argument out of range, espeak-ng not installed, or ``out`` holds other data.
    """
    if subjects < 3:
        raise UserError(f"--subjects {subjects}: at least 3 are needed, one each for train, val and test")
    if sentences < 1:
        raise UserError(f"--sentences {sentences}: at least 1 is needed")
    if precision not in ("float16", "float32"):
        raise UserError(f"precision '{precision}': expected float16 or float32")
    speak("Hello")  # fails here rather than in a child process when there is no espeak-ng

    head = Head.load()
    people = draw_subjects(subjects, seed)
    clips = plan_clips(people, sentences, seed)
    jobs = []
    for split, planned in clips.items():
        count = len({clip.subject.name for clip in planned})
        for i in range(count):  # every shard has clips of every subject of its split
            make = partial(_make_clips, planned[i::count], precision)
            jobs.append(ShardJob(f"{split}-{i:06d}.tar", split, make))
    regions = named_regions(head)
    fields = {
        "fps": FPS,
        "sample_rate": SAMPLE_RATE,
        "unit": "metre",
        "topology": TOPOLOGY,
        "vertices": head.exterior,
        "subjects": [subject.name for subject in people],
        "train_subjects": list(dict.fromkeys(clip.subject.name for clip in clips["train"])),
        "emotions": list(EMOTIONS),
        "intensities": list(INTENSITIES),
        "controls": head.units,
        "precision": precision,
        "regions": {
            name: {"count": len(indices), "sha256": _region_hash(indices)} for name, indices in regions.items()
        },
        "identities": {subject.name: asdict(subject.identity) for subject in people},
        "voices": {subject.name: asdict(subject.voice) for subject in people},
        "styles": {subject.name: asdict(subject.style) for subject in people},
    }
    files = {
        "templates.safetensors": save({subject.name: _template(subject) for subject in people}),
        "topology.safetensors": save({"triangles": np.ascontiguousarray(head.triangles, dtype=np.int32), **regions}),
    }
    plan = {"version": VERSION, "head": file_sha256(ASSET), "subjects": subjects, "sentences": sentences}
    plan |= {"seed": seed, "precision": precision}
    return build_shards(
        Path(out),
        jobs,
        kind="talking-heads",
        name="demo corpus",
        fields=fields,
        files=files,
        plan=plan,
        processes=processes,
    )


# Who says what


def draw_subjects(count: int, seed: int) -> list[Subject]:
    """Women and men in turn, each with a face, a voice and a manner."""
    subjects = []
    for i in range(count):
        rng = np.random.default_rng([seed, 1, i])
        sex = "FM"[i % 2]
        identity = sample_identity(rng)
        while identity.male != (sex == "M"):
            identity = sample_identity(rng)
        variant = VOICES[sex][i // 2 % len(VOICES[sex])]
        voice = Voice(
            f"en-us+{variant}",
            rate=int(rng.integers(140, 166)),
            pitch=int(rng.integers(38, 63)),
            pitch_range=int(rng.integers(40, 61)),
        )
        subjects.append(Subject(f"{sex}{i // 2 + 1}", identity, voice, draw_style(rng)))
    return subjects


def plan_clips(people: list[Subject], sentences: int, seed: int) -> dict[str, list[Clip]]:
    """Split -> clips. Training draws on three times as many sentences as one subject says."""
    held_out = max(1, round(len(people) / 6))
    members = {
        "train": people[: -2 * held_out],
        "val": people[-2 * held_out : -held_out],
        "test": people[-held_out:],
    }
    counts = {"train": sentences * min(3, len(members["train"])), "val": sentences, "test": sentences}
    pools = draw_sentences(counts, seed)
    clips: dict[str, list[Clip]] = {}
    for split, subjects in members.items():
        clips[split] = []
        for i, subject in enumerate(subjects):
            number = people.index(subject)
            rng = np.random.default_rng([seed, 2, number])
            for j, (emotion, intensity) in enumerate(_emotions(sentences, rng)):
                sentence = pools[split][(i * sentences + j) % len(pools[split])]
                clips[split].append(Clip(subject, sentence, emotion, intensity, (seed, 3, number, j)))
    return clips


def _emotions(count: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    """A quarter is neutral; the rest takes every emotion and intensity in turn, in random order."""
    felt = [(emotion, intensity) for emotion in EMOTIONS[1:] for intensity in range(len(INTENSITIES))]
    turns: list[tuple[str, int]] = []
    while len(turns) < count:
        turns += [felt[i] for i in rng.permutation(len(felt))]
    neutral = math.ceil(count / 4)
    drawn = [("neutral", 0)] * neutral + turns[: count - neutral]
    return [drawn[i] for i in rng.permutation(count)]


# Making a clip


def _make_clips(clips: list[Clip], precision: str) -> Iterator[Sample]:
    for clip in clips:
        yield make_clip(clip, precision)


def make_clip(clip: Clip, precision: str = "float16") -> Sample:
    """Speaks and animates one sentence."""
    said = speak(clip.sentence.text, emotional_voice(clip.subject.voice, clip.emotion, clip.intensity))
    # A multiple of three frames is a whole number of samples.
    frames = 3 * math.ceil((LEAD + len(said.audio) / SAMPLE_RATE + TAIL) * FPS / 3)
    audio = np.zeros(frames * SAMPLE_RATE // FPS, np.int16)
    lead = round(LEAD * SAMPLE_RATE)
    audio[lead : lead + len(said.audio)] = said.audio
    words, phonemes = _later(said.words), _later(said.phonemes)

    motion = animate(
        phonemes,
        words,
        clip.sentence.tags,
        frames,
        clip.emotion,
        clip.intensity,
        clip.subject.style,
        np.random.default_rng(clip.seed),
    )
    weights = motion.weights.astype(np.float16)
    offsets = np.tensordot(weights.astype(np.float32), Head.load().unit_deltas, axes=1)
    labels = {
        "subject": clip.subject.name,
        "sentence": clip.sentence.id,
        "transcript": clip.sentence.text,
        "words": words,
        "phonemes": phonemes,
        "tags": clip.sentence.tags,
        "emotion": clip.emotion,
        "intensity": clip.intensity,
        "fps": FPS,
    }
    members = {
        "offsets.npy": npy_bytes(offsets.astype(precision)),
        "wav": _wav_bytes(audio),
        "json": json.dumps(labels, ensure_ascii=False).encode(),
        "weights.npy": npy_bytes(weights),
        "pose.npy": npy_bytes(motion.pose.astype(np.float32)),
    }
    return Sample(clip.key, frames, members)


def emotional_voice(voice: Voice, emotion: str, intensity: int) -> Voice:
    """A subject's voice in an emotion."""
    faster, higher, wider = EMOTIONAL_VOICES[emotion]
    strength = INTENSITIES[intensity]
    return replace(
        voice,
        rate=round(voice.rate * (1 + (faster - 1) * strength)),
        pitch=int(np.clip(voice.pitch + higher * strength, 0, 99)),
        pitch_range=int(np.clip(voice.pitch_range + wider * strength, 0, 99)),
    )


def _later(intervals: list[Interval]) -> list[Interval]:
    return [(name, round(start + LEAD, 4), round(end + LEAD, 4)) for name, start, end in intervals]


def _wav_bytes(audio: NDArray[np.int16]) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(audio.astype("<i2").tobytes())
    return buffer.getvalue()


# Topology


def named_regions(head: Head) -> dict[str, NDArray[np.int32]]:
    """The head's regions, and the inner edges of both lips without the corners that they share."""
    upper, lower = (np.sort(lip[1:-1]) for lip in head.inner_lips)
    regions = {**head.regions, "upper_lip_inner": upper, "lower_lip_inner": lower}
    return {name: np.ascontiguousarray(indices, dtype=np.int32) for name, indices in regions.items()}


def _region_hash(indices: NDArray[np.int32]) -> str:
    """SHA-256 of the sorted indices as little-endian int64, the form in which protocols state it."""
    return hashlib.sha256(np.unique(indices).astype("<i8").tobytes()).hexdigest()


def _template(subject: Subject) -> NDArray[np.float32]:
    head = Head.load()
    return head.identity(subject.identity.shape)[: head.exterior]


# Appearance


@dataclass(frozen=True)
class Appearance:
    """Draws a subject: gives the demo-head mesh its colours, eyes, teeth, neck and hair.

    Attributes:
        identity: who it is.
    """

    identity: Identity

    def dress(self, vertices: NDArray[np.floating]) -> Mesh:
        """Everything that is drawn in one frame.

        Args:
            vertices: (3689, 3) metres, the subject's demo-head mesh, true or predicted.

        Returns:
            vertices, triangles and colours for :func:`datamodules.render.render`.
        """
        head = Head.load()
        moved = vertices - self._neutral[: head.exterior]
        whole = head.pose(self._neutral, np.clip(_fit_units() @ moved.ravel(), 0, 1))
        whole[: head.exterior] = vertices
        return dress(whole, self.identity, Look())

    @cached_property
    def _neutral(self) -> NDArray[np.float32]:
        return Head.load().identity(self.identity.shape)


@cache
def _fit_units() -> NDArray[np.float32]:
    """(52, 3 * 3689) the units that come closest to an offset: they move what demo-head lacks (teeth, lashes ...)."""
    return np.linalg.pinv(Head.load().unit_deltas.reshape(len(Head.load().units), -1).T)


def appearance(manifest: Manifest, subject: str) -> Appearance:
    """How to draw a subject of built talking heads.

    Raises:
        UserError: no such subject, or data that says nothing (or something outdated) of its subjects' looks.
    """
    identities = manifest.fields.get("identities", {})
    if subject not in identities:
        known = ", ".join(identities) or "none"
        raise UserError(f"{manifest.root}: no appearance of subject '{subject}'; known: {known}")
    try:
        return Appearance(Identity(**identities[subject]))
    except TypeError as error:
        raise UserError(f"{manifest.root}: built by another version of facebench; build it again") from error
