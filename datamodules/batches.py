"""Typed batches: what every data module gives and every system takes.

In evaluation a batch may hold stand-ins, so that every rank gets equally many batches and none waits for another.
They are marked by ``real`` and must not be counted. In training every sample is real.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class FaceBatch:
    """Face images with their labels.

    Attributes:
        key: sample keys, length B.
        image: (B, 3, H, W) float32 in [-1, 1].
        attributes: (B, A) float32, 0 or 1, in the order of the manifest's ``attributes``.
        identity: (B,) int64, the identity's number, unique over all splits; -1 where it is not known.
        age: (B,) float32, years; NaN where it is not known.
        mask: (B, H, W) uint8, index into the manifest's ``mask_classes``; (B, 0, 0) where the data has none.
        landmarks: (B, 68, 2) float32, x and y in pixels; another number of points, or none, where the data has it so.
        captions: B lists of English captions; empty lists where the data has none.
        features: feature column -> (B, ...) float32.
        real: (B,) bool, False for a stand-in; all True where it is not given.
    """

    key: list[str]
    image: Tensor
    attributes: Tensor
    identity: Tensor
    age: Tensor
    mask: Tensor
    landmarks: Tensor
    captions: list[list[str]]
    features: dict[str, Tensor] = field(default_factory=dict)
    real: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.real is None:
            self.real = torch.ones(len(self.key), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.key)


@dataclass
class PromptBatch:
    """Descriptions of expressions.

    Attributes:
        key: sample keys, length B.
        text: B prompts.
        emotion: (B,) int64, index into the manifest's ``emotions``.
        weights: (B, C) float32 rig controls in [0, 1], in the order of the manifest's ``controls``.
        image: (B, 3, H, W) float32 in [-1, 1], somebody with the expression; (B, 3, 0, 0) where the data has none.
        captions: B lists of captions of the images; empty lists where the data has none.
        features: feature column -> (B, ...) float32.
        real: (B,) bool, False for a stand-in; all True where it is not given.
    """

    key: list[str]
    text: list[str]
    emotion: Tensor
    weights: Tensor
    image: Tensor
    captions: list[list[str]]
    features: dict[str, Tensor] = field(default_factory=dict)
    real: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.real is None:
            self.real = torch.ones(len(self.key), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.key)


@dataclass
class SpeechBatch:
    """Talking-head clips, padded at the end to the longest of the batch.

    Attributes:
        key: sample keys, length B.
        audio: (B, S) float32 mono waveform at 16 kHz in [-1, 1], zero where padded.
        audio_lengths: (B,) int64, samples.
        vertices: (B, T, V, 3) float32, metres (or the manifest's ``unit``), without head motion; the template where
            padded. V = 0 where the data has rig controls alone.
        lengths: (B,) int64, frames.
        template: (B, V, 3) float32, the subject's neutral mesh in metres.
        subject: subject names, length B.
        subject_index: (B,) int64, index into the training subjects, -1 for a subject not among them.
        emotion: (B,) int64, index into the manifest's ``emotions``; -1 where it is not known.
        intensity: (B,) int64, 0, 1 or 2; -1 where it is not known.
        weights: (B, T, C) float32 rig controls in [0, 1] (C = 0 where the data has none).
        transcript: B sentences; empty where the data has none.
        words: B lists of (word, start, end) in seconds; empty where the data has none.
        phonemes: B lists of (phoneme, start, end) in seconds; empty where the data has none.
        pose: (B, T, 3) float32, rotation vector of the head in radians, not applied to the vertices; zero where padded
            and where the data has none.
        prompt: B descriptions of how to speak, for systems that take a text prompt; all empty where none is given.
        prompt_image: (B, 3, H, W) in [-1, 1], an expression to speak with; None where none is given.
        features: feature column -> (B, N, D) float32, zero where padded.
        feature_lengths: feature column -> (B,) int64, how many of N are real.
        real: (B,) bool, False for a stand-in; all True where it is not given.
    """

    key: list[str]
    audio: Tensor
    audio_lengths: Tensor
    vertices: Tensor
    lengths: Tensor
    template: Tensor
    subject: list[str]
    subject_index: Tensor
    emotion: Tensor
    intensity: Tensor
    weights: Tensor
    transcript: list[str]
    words: list[list[tuple[str, float, float]]]
    phonemes: list[list[tuple[str, float, float]]]
    pose: Tensor = None  # type: ignore[assignment]
    prompt: list[str] = field(default_factory=list)
    prompt_image: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    feature_lengths: dict[str, Tensor] = field(default_factory=dict)
    real: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.pose is None:
            self.pose = torch.zeros(*self.vertices.shape[:2], 3, device=self.vertices.device)
        self.prompt = self.prompt or [""] * len(self.key)
        if self.real is None:
            self.real = torch.ones(len(self.key), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.key)

    @property
    def frame_mask(self) -> Tensor:
        """(B, T) bool, True where a frame is real."""
        return torch.arange(self.vertices.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def clip(self, i: int) -> "SpeechBatch":
        """A batch of the ``i``-th clip alone, without padding."""
        one = slice(i, i + 1)
        samples, frames = int(self.audio_lengths[i]), int(self.lengths[i])
        return SpeechBatch(
            key=self.key[one],
            audio=self.audio[one, :samples],
            audio_lengths=self.audio_lengths[one],
            vertices=self.vertices[one, :frames],
            lengths=self.lengths[one],
            template=self.template[one],
            subject=self.subject[one],
            subject_index=self.subject_index[one],
            emotion=self.emotion[one],
            intensity=self.intensity[one],
            weights=self.weights[one, :frames],
            transcript=self.transcript[one],
            words=self.words[one],
            phonemes=self.phonemes[one],
            pose=self.pose[one, :frames],
            prompt=self.prompt[one],
            prompt_image=None if self.prompt_image is None else self.prompt_image[one],
            features={name: values[one, : self.feature_lengths[name][i]] for name, values in self.features.items()},
            feature_lengths={name: lengths[one] for name, lengths in self.feature_lengths.items()},
            real=self.real[one],
        )
