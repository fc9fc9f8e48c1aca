"""What systems measure of themselves on the test split, for the claims of a suite: series of one number for each clip.

See :meth:`trainers.tasks.SpeechToMesh.measurements` and :mod:`sweeps.claims`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from metrics.motion import lip_vertex_error

SPLIT = "test"


def clip_errors(
    predicted: Tensor, batch: SpeechBatch, region: Tensor, over_vertices: str = "max", scale: float = 1e3
) -> dict[str, float]:
    """Distance from the truth, mean over the frames of each real clip.

    Args:
        predicted: (B, T, V, 3) vertices.
        batch: the clips.
        region: vertex indices.
        over_vertices: ``max`` or ``mean`` of the region in a frame.
        scale: of the result; 1000 for millimetres where the data is in metres.
    """
    errors = {}
    for i in batch.real.nonzero()[:, 0].tolist():
        frames = int(batch.lengths[i])
        distances = lip_vertex_error(predicted[i, :frames], batch.vertices[i, :frames], region, "l2", over_vertices)
        errors[batch.key[i]] = distances.mean().item() * scale
    return errors


def split_clips(data: SpeechDataModule, split: str = SPLIT) -> Iterator[SpeechBatch]:
    """Every clip of a split as a batch of its own, in order."""
    for batch in data.loader(split):
        for i in batch.real.nonzero()[:, 0].tolist():
            yield batch.clip(i)


def reference_clips(
    data: SpeechDataModule, seconds: float, split: str = SPLIT
) -> Iterator[tuple[SpeechBatch, SpeechBatch]]:
    """For every subject of a split: its first clips that last so long together, and all its others.

    Raises:
        UserError: a subject has too few clips.
    """
    clips: dict[str, list[SpeechBatch]] = {}
    for clip in split_clips(data, split):
        clips.setdefault(clip.subject[0], []).append(clip)
    for subject, spoken in clips.items():
        lasts, count = 0.0, 0
        while lasts < seconds and count < len(spoken):
            lasts += int(spoken[count].lengths[0]) / data.fps
            count += 1
        if lasts < seconds or count == len(spoken):
            raise UserError(
                f"{data.root}: {seconds:g} s of '{subject}' are to be a reference and others to be scored, "
                f"but it speaks for {lasts:.1f} s in {len(spoken)} clips"
            )
        yield joined(spoken[:count]), joined(spoken[count:])


def adaptation(system: Any, data: SpeechDataModule, seconds: float = 10.0) -> dict[str, dict[str, float]]:
    """Lip-vertex error (L2, maximum, mm) of a system with and without adaptation to each test speaker.

    The speaker's first clips, ``seconds`` long together, are the reference; the others are measured.

    Args:
        system: takes a reference clip.
        data: in metres.
        seconds: of reference.

    Returns:
        the series ``adapted`` and ``unadapted``.
    """
    lips = data.region("lips")
    series: dict[str, dict[str, float]] = {"adapted": {}, "unadapted": {}}
    for reference, others in reference_clips(data, seconds):
        for name, model in (("adapted", system.adapt(reference)), ("unadapted", system)):
            for i in range(len(others)):
                clip = others.clip(i)
                series[name] |= clip_errors(model.animate(clip), clip, lips)
    return series


def joined(clips: list[SpeechBatch]) -> SpeechBatch:
    """One padded batch of single clips: meshes padded by the template, all else by zero."""
    frames, samples = max(int(clip.lengths[0]) for clip in clips), max(clip.audio.shape[1] for clip in clips)

    def padded(name: str, length: int) -> Tensor:
        rows = [getattr(clip, name)[0] for clip in clips]
        return torch.stack([torch.cat([row, row.new_zeros(length - len(row), *row.shape[1:])]) for row in rows])

    vertices = torch.stack(
        [torch.cat([c.vertices[0], c.template.expand(frames - len(c.vertices[0]), -1, -1)]) for c in clips]
    )
    features, counts = {}, {}
    for name in clips[0].features:
        rows = [clip.features[name][0] for clip in clips]
        features[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        counts[name] = torch.cat([clip.feature_lengths[name] for clip in clips])
    images = [clip.prompt_image for clip in clips if clip.prompt_image is not None]
    return SpeechBatch(
        key=[clip.key[0] for clip in clips],
        audio=padded("audio", samples),
        audio_lengths=torch.cat([clip.audio_lengths for clip in clips]),
        vertices=vertices,
        lengths=torch.cat([clip.lengths for clip in clips]),
        template=torch.cat([clip.template for clip in clips]),
        subject=[clip.subject[0] for clip in clips],
        subject_index=torch.cat([clip.subject_index for clip in clips]),
        emotion=torch.cat([clip.emotion for clip in clips]),
        intensity=torch.cat([clip.intensity for clip in clips]),
        weights=padded("weights", frames),
        transcript=[clip.transcript[0] for clip in clips],
        words=[clip.words[0] for clip in clips],
        phonemes=[clip.phonemes[0] for clip in clips],
        pose=padded("pose", frames),
        prompt=[clip.prompt[0] for clip in clips],
        prompt_image=torch.cat(images) if len(images) == len(clips) else None,
        features=features,
        feature_lengths=counts,
        real=torch.cat([clip.real for clip in clips]),
    )
