"""One recording and what else a system takes, to motion of any length: what ``facebench animate`` does."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from datamodules.words import Word, timed_words
from trainers.measuring import joined
from trainers.nets.speech_encoder import SAMPLE_RATE
from trainers.tasks import Condition, SpeechToMesh, SpeechToRig

NEUTRAL = "neutral"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Conditions:
    """What goes with a recording; None where it is not given.

    Attributes:
        subject: the training subject whose style to speak in.
        emotion: its name.
        intensity: 0, 1 or 2.
        transcript: what is said.
        words: with their times in seconds.
        prompt: a description of how to speak.
        prompt_image: file of a picture of the expression to speak with.
    """

    subject: str | None = None
    emotion: str | None = None
    intensity: int | None = None
    transcript: str | None = None
    words: list[Word] | None = None
    prompt: str | None = None
    prompt_image: Path | None = None


@dataclass(frozen=True)
class Motion:
    """A clip's motion.

    Attributes:
        vertices: (T, V, 3) float32, metres, without head motion.
        controls: (T, C) of a system in the space of a rig.
        pose: (T, 3) rotation vectors of the head in radians, of a system that turns it.
    """

    vertices: np.ndarray
    controls: np.ndarray | None = None
    pose: np.ndarray | None = None


def check_conditions(system: SpeechToMesh, given: Conditions, reference: bool = False) -> None:
    """Refuses what the system does not take or does not know, and what would go unheard beside something else.

    Raises:
        UserError: names the option.
    """
    options: dict[Condition, Any] = {
        "subject": given.subject,
        "emotion": given.emotion,
        "intensity": given.intensity,
        "words": given.words,
        "prompt": given.prompt,
        "prompt image": given.prompt_image,
        "reference": reference or None,
    }
    # A transcript is what a system that reads words falls back to.
    if "words" not in system.conditions:
        options["transcript"] = given.transcript
    names = {"subject": "style", "prompt image": "prompt_image"}
    for condition, value in options.items():
        if value is not None and condition not in system.conditions:
            takes = ", ".join(f"--{names.get(taken, taken)}" for taken in system.conditions) or "nothing but sound"
            raise UserError(
                f"--{names.get(condition, condition)}: {system.info.title} does not take it; it takes {takes}"
            )
    if given.subject is not None and given.subject not in system.subjects:
        raise UserError(
            f"--style {given.subject}: unknown; this {system.info.title} knows {', '.join(system.subjects)}"
        )
    for condition in ("emotion", "intensity"):
        if getattr(given, condition) is not None and not system.emotions:
            raise UserError(f"--{condition}: this {system.info.title} was trained without emotions; leave it out")
    if given.emotion is None and system.emotions and NEUTRAL not in system.emotions:
        raise UserError(f"--emotion: this {system.info.title} needs one of {', '.join(system.emotions)}")
    if given.emotion is not None and given.emotion not in system.emotions:
        raise UserError(
            f"--emotion {given.emotion}: unknown; this {system.info.title} knows {', '.join(system.emotions)}"
        )
    if given.intensity not in (None, 0, 1, 2):
        raise UserError(f"--intensity {given.intensity}: expected 0, 1 or 2")
    if given.intensity and given.emotion is None:
        raise UserError(f"--intensity {given.intensity}: of which --emotion? one of {', '.join(system.emotions)}")
    if given.prompt is not None and given.prompt_image is not None:
        raise UserError("--prompt_image: an expression comes from a picture or from --prompt; leave one out")
    if given.subject is not None and reference:
        raise UserError("--style: the style comes from --reference; leave one out")


def request(
    system: SpeechToMesh, name: str, audio: np.ndarray, template: Tensor, fps: float, given: Conditions
) -> SpeechBatch:
    """A batch of one clip to be animated.

    Args:
        system: that will animate it.
        name: of the clip; a stochastic system draws the same for the same name.
        audio: (S,) float32 at 16 kHz.
        template: (V, 3) neutral mesh.
        fps: frames per second.
        given: what goes with it, checked by :func:`check_conditions`. Without an emotion it is neutral, at intensity 0.

    Raises:
        UserError: a picture that cannot be read, words after the end of the sound, or no style where the system has
            no single one for a stranger.
    """
    frames = max(1, round(len(audio) / SAMPLE_RATE * fps))
    subject = given.subject
    emotion = given.emotion or (NEUTRAL if system.emotions else None)
    if subject is None and system.every_style and "subject" in system.conditions:
        raise UserError(
            f"--style: this {system.info.title} has no single style for a stranger (unseen: {system.unseen}); name one "
            f"of {', '.join(system.subjects)}"
        )
    words, seconds = given.words or [], len(audio) / SAMPLE_RATE
    for word, start, _ in words:
        if start >= seconds:
            raise UserError(f"--words: '{word}' begins at {start:g} s, but the recording ends at {seconds:.1f} s")
    controls = len(system.rig.controls) if isinstance(system, SpeechToRig) else 0
    return SpeechBatch(
        key=[name],
        audio=torch.from_numpy(audio)[None],
        audio_lengths=torch.tensor([len(audio)]),
        vertices=template.expand(1, frames, -1, -1),
        lengths=torch.tensor([frames]),
        template=template[None],
        subject=[subject or "unknown"],
        subject_index=torch.tensor([-1 if subject is None else system.subjects.index(subject)]),
        emotion=torch.tensor([-1 if emotion is None else system.emotions.index(emotion)]),
        intensity=torch.tensor([given.intensity or 0]),
        weights=torch.zeros(1, frames, controls),
        transcript=[given.transcript or " ".join(word for word, _, _ in words)],
        words=[words],
        phonemes=[[]],
        prompt=[given.prompt or ""],
        prompt_image=None if given.prompt_image is None else read_image(given.prompt_image)[None],
    )


def read_image(path: Path) -> Tensor:
    """(3, H, W) float32 in [-1, 1].

    Raises:
        UserError: not a picture.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), np.float32)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--prompt_image {path}: not a picture that can be read ({type(error).__name__})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def reference_of(system: SpeechToMesh, data: SpeechDataModule, keys: list[str]) -> SpeechBatch:
    """Clips of one subject by their keys, from any split, with their motion; the system's training subjects numbered.

    Raises:
        UserError: a key that the data does not have, or clips of several subjects.
    """
    found: dict[str, SpeechBatch] = {}
    for split in SPLITS:
        wanted = {key for shard in data.manifest.split(split) for key in shard.keys} & set(keys)
        for batch in data.loader(split) if wanted else ():
            found |= {key: batch.clip(i) for i, key in enumerate(batch.key) if key in wanted}
            if wanted <= set(found):
                break
    missing = [key for key in keys if key not in found]
    if missing:
        raise UserError(
            f"--reference {missing[0]}: {data.root} holds no clip of this key ('facebench data show' lists them)"
        )
    subjects = {clip.subject[0] for clip in found.values()}
    if len(subjects) > 1:
        raise UserError(f"--reference: clips of {' and '.join(sorted(subjects))}, expected those of one person")
    reference = joined([found[key] for key in keys])
    numbers = {name: number for number, name in enumerate(system.subjects)}
    reference.subject_index = torch.tensor([numbers.get(name, -1) for name in reference.subject])
    return reference


@torch.inference_mode()
def move(system: SpeechToMesh, clip: SpeechBatch, fps: float, seconds: float = 60.0, overlap: float = 2.0) -> Motion:
    """Animates one clip, long ones in pieces that overlap and are faded into each other.

    Args:
        system: in evaluation mode.
        clip: a batch of one.
        fps: frames per second.
        seconds: length of a piece; a shorter clip is animated whole.
        overlap: of two pieces, in seconds.
    """
    if clip.transcript[0].strip() and int(clip.lengths[0]) > round(seconds * fps):
        # Each piece must get its own share of the text.
        clip = replace(clip, words=[timed_words(clip.words[0], clip.transcript[0], int(clip.lengths[0]) / fps)])
    controls = None
    if isinstance(system, SpeechToRig):
        controls = in_pieces(system.control, clip, fps, seconds, overlap)
        # Without a mesh there are the controls alone.
        vertices = system.rig(clip.template, controls) if system.num_vertices else clip.vertices
    else:
        vertices = in_pieces(system.animate, clip, fps, seconds, overlap)
    turns = getattr(system, "head_pose", None)
    pose = None if turns is None else in_pieces(turns, clip, fps, seconds, overlap)[0].numpy()
    return Motion(vertices[0].numpy(), None if controls is None else controls[0].numpy(), pose)


def in_pieces(
    function: Callable[[SpeechBatch], Tensor], clip: SpeechBatch, fps: float, seconds: float, overlap: float
) -> Tensor:
    """What ``function`` gives for a clip, (1, T, ...), computed in overlapping pieces and cross-faded linearly."""
    frames, size, shared = int(clip.lengths[0]), round(seconds * fps), round(overlap * fps)
    if frames <= size:
        return function(clip)
    step = size - shared
    starts = range(0, max(1, frames - shared), step)
    whole, weight = None, torch.zeros(frames)
    for start in starts:
        end = min(start + size, frames)
        values = function(piece(clip, start, end, fps))
        fade = torch.ones(end - start)
        if start:
            fade[:shared] = torch.linspace(0, 1, shared + 2)[1:-1][: len(fade)]
        if end < frames:
            fade[-shared:] = torch.linspace(1, 0, shared + 2)[1:-1]
        if whole is None:
            whole = torch.zeros(1, frames, *values.shape[2:])
        whole[:, start:end] += values * fade.view(1, -1, *[1] * (values.ndim - 2))
        weight[start:end] += fade
    assert whole is not None
    return whole / weight.view(1, -1, *[1] * (whole.ndim - 2))


def piece(clip: SpeechBatch, start: int, end: int, fps: float) -> SpeechBatch:
    """The frames from ``start`` to before ``end`` of a batch of one, with their sound, words and phonemes."""
    first, last = (round(frame / fps * SAMPLE_RATE) for frame in (start, end))
    audio = clip.audio[:, first:last]

    def within(spoken: list[Word]) -> list[Word]:
        begin, finish = start / fps, end / fps
        return [(w, max(s, begin) - begin, min(e, finish) - begin) for w, s, e in spoken if s < finish and e > begin]

    words = within(clip.words[0])
    # Where nothing is said in a piece of what is known, a blank says so; without any text it is not known.
    transcript = (" ".join(word for word, _, _ in words) or " ") if clip.transcript[0] else ""
    return replace(
        clip,
        key=[f"{clip.key[0]}@{start}"],
        audio=audio,
        audio_lengths=torch.tensor([audio.shape[1]]),
        vertices=clip.vertices[:, start:end],
        lengths=torch.tensor([end - start]),
        weights=clip.weights[:, start:end],
        words=[words],
        transcript=[transcript],
        phonemes=[within(clip.phonemes[0])],
        pose=clip.pose[:, start:end],
        features={},
        feature_lengths={},
    )
