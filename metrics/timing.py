"""Metrics of time: do lips close when they must, does the mouth move when the sound does, how does the head move.

Formulas without a named source are ours; their choices (windows, tolerances, largest offsets) are arguments and part
of a protocol. Read them beside the truth's own value: a real mouth neither closes on every m, b and p nor moves
exactly with the sound.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from metrics.motion import MotionMetric

BILABIALS = ("m", "b", "p")

Interval = tuple[str, float, float]


class Closures(NamedTuple):
    """What :func:`lip_closures` finds, one value for each of N bilabials.

    Attributes:
        closed: (N,) float64, 1 where the predicted lips close, 0 where not.
        offset: (N,) float64, seconds by which they are closed later than the true lips.
    """

    closed: Tensor
    offset: Tensor


def lip_closures(
    predicted: Tensor,
    truth: Tensor,
    rest: Tensor | float,
    phonemes: Sequence[Interval],
    fps: float,
    tolerance: float,
    window: float,
) -> Closures:
    """Lip closure on each bilabial (m, b, p): whether the lips close, and how much later than the true ones.

    Lips count as closed in a frame whose mouth opening is at most ``rest + tolerance``; a bilabial is closed if any
    frame is, from ``window`` before its start to ``window`` after its end. The moment of closure is the mean time of
    the frames of that span whose opening is within ``tolerance`` of the span's least, in prediction and truth alike:
    it exists also where the lips only come near. A mouth that never opens is closed on every bilabial: read the share
    beside a metric that such a mouth fails, for instance the mouth opening difference.

    Args:
        predicted: (T,) mouth opening, see :func:`metrics.motion.mouth_opening`.
        truth: (T,) mouth opening.
        rest: opening of the closed mouth, that of the template.
        phonemes: (symbol, start, end) in seconds; a symbol's first letter says whether it is a bilabial.
        fps: frames per second.
        tolerance: in the unit of the opening.
        window: seconds.

    Returns:
        :class:`Closures` of the bilabials that lie within the clip.

    Example:
        >>> opening = torch.tensor([4.0, 4.0, 0.2, 4.0, 4.0])
        >>> late = torch.tensor([4.0, 4.0, 4.0, 0.4, 4.0])
        >>> found = lip_closures(late, opening, 0.0, [("b", 0.2, 0.3)], fps=10, tolerance=0.5, window=0.1)
        >>> found.closed.tolist(), found.offset.round(decimals=3).tolist()
        ([1.0], [0.1])
    """
    closed, offset = [], []
    for symbol, start, end in phonemes:
        if symbol[:1].lower() not in BILABIALS:
            continue
        first = max(0, round((start - window) * fps))
        span = slice(first, max(first + 1, round((end + window) * fps)))
        if first >= len(predicted):
            continue
        closed.append((predicted[span] <= rest + tolerance).any().double())
        offset.append((_closing(predicted[span], tolerance) - _closing(truth[span], tolerance)) / fps)
    if not closed:
        return Closures(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))
    return Closures(torch.stack(closed), torch.stack(offset))


def _closing(opening: Tensor, tolerance: float) -> Tensor:
    return torch.nonzero(opening <= opening.min() + tolerance).double().mean()


class BilabialClosure(MotionMetric):
    """Share of bilabials with closed lips by :func:`lip_closures`; every bilabial of a test set counts alike.

    Args:
        tolerance: in the unit of the opening.
        window: seconds.
        scale: multiplied into the result.
    """

    higher_is_better = True

    def __init__(self, tolerance: float = 0.001, window: float = 0.05, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__("frames", scale, **kwargs)
        self.tolerance, self.window = tolerance, window

    def update(
        self, predicted: Tensor, truth: Tensor, rest: Tensor | float, phonemes: Sequence[Interval], fps: float
    ) -> None:
        """Adds one clip: mouth openings (T,) twice, the closed mouth's, its phonemes and frame rate."""
        self.add(lip_closures(predicted, truth, rest, phonemes, fps, self.tolerance, self.window).closed)


class ClosureOffset(BilabialClosure):
    """Mean absolute offset of the lips' closure from the true one, by :func:`lip_closures`, in seconds.

    Args:
        tolerance, window: as in :class:`BilabialClosure`.
        scale: multiplied into the result: 1000 from seconds to milliseconds.
    """

    higher_is_better = False

    def update(
        self, predicted: Tensor, truth: Tensor, rest: Tensor | float, phonemes: Sequence[Interval], fps: float
    ) -> None:
        """Adds one clip: mouth openings (T,) twice, the closed mouth's, its phonemes and frame rate."""
        self.add(lip_closures(predicted, truth, rest, phonemes, fps, self.tolerance, self.window).offset.abs())


def sound_energy(audio: Tensor, sample_rate: int, fps: float, frames: int) -> Tensor:
    """Root mean square of the sound of each frame.

    Args:
        audio: (S,) waveform; silence is added where it ends early.
        sample_rate: samples per second.
        fps: frames per second.
        frames: T.

    Returns:
        (T,) float64.

    Example:
        >>> sound_energy(torch.tensor([3.0, -3.0, 4.0, 4.0]), 4, 2, 3).tolist()
        [3.0, 4.0, 0.0]
    """
    edges = (torch.arange(frames + 1, dtype=torch.float64) * sample_rate / fps).round().long()
    power = torch.zeros(max(len(audio), int(edges[-1])) + 1, dtype=torch.float64)
    power[1 : len(audio) + 1] = audio.double().square().cumsum(0)
    power[len(audio) + 1 :] = power[len(audio)]
    return ((power[edges[1:]] - power[edges[:-1]]) / (edges[1:] - edges[:-1])).clamp(min=0).sqrt()


class Sync(NamedTuple):
    """What :func:`audio_motion_sync` finds.

    Attributes:
        offset: () float64, seconds by which the mouth moves after the sound (negative: before).
        correlation: () float64 in [-1, 1], the correlation at that offset.
    """

    offset: Tensor
    correlation: Tensor


def audio_motion_sync(opening: Tensor, energy: Tensor, fps: float, largest: float) -> Sync:
    """Offset at which mouth opening and sound energy correlate best, in whole frames.

    At a lag of l frames, r_l is Pearson's correlation of opening_{t+l} and energy_t over the frames both have. Real
    mouths do not move exactly with the sound, so compare with the truth's own offset. A clip where one of the two
    stands still correlates with nothing: correlation 0, at the largest offset.

    Args:
        opening: (T,) mouth opening.
        energy: (T,) see :func:`sound_energy`.
        fps: frames per second.
        largest: seconds, of the offsets that are tried.

    Raises:
        ValueError: fewer than three frames are left at the largest offset.

    Example:
        >>> energy = torch.tensor([0.0, 1, 5, 2, 0, 3, 1, 0, 0])
        >>> found = audio_motion_sync(energy.roll(1), energy, fps=10, largest=0.2)
        >>> round(found.offset.item(), 3), round(found.correlation.item(), 3)
        (0.1, 1.0)
    """
    lags = int(largest * fps + 1e-9)
    if len(opening) - lags < 3:
        raise ValueError(f"{len(opening)} frames are too few for offsets up to {largest} s at {fps} frames per second")
    opening, energy = opening.double(), energy.double()
    best = Sync(torch.tensor(lags / fps, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    for lag in sorted(range(-lags, lags + 1), key=abs):
        stop = len(opening) - abs(lag)
        correlation = _correlation(opening[max(lag, 0) :][:stop], energy[max(-lag, 0) :][:stop])
        if correlation > best.correlation:
            best = Sync(torch.tensor(lag / fps, dtype=torch.float64), correlation)
    return best


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    deviations = [signal - signal.mean() for signal in (x, y)]
    # What rounding leaves of a constant signal is no motion.
    if any(d.abs().max() <= 1e-9 * s.abs().max() for d, s in zip(deviations, (x, y), strict=True)):
        return torch.zeros((), dtype=torch.float64)
    x, y = (deviation / deviation.norm() for deviation in deviations)
    return (x @ y).clamp(-1, 1)


class SyncOffset(MotionMetric):
    """Mean absolute offset by :func:`audio_motion_sync` over the clips, in seconds; best near the truth's.

    Args:
        largest: seconds, of the offsets that are tried.
        scale: multiplied into the result: 1000 from seconds to milliseconds.
    """

    higher_is_better: bool | None = None

    def __init__(self, largest: float = 0.5, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__("clips", scale, **kwargs)
        self.largest = largest

    def update(self, opening: Tensor, energy: Tensor, fps: float) -> None:
        """Adds one clip: mouth opening (T,), sound energy (T,) and the frame rate."""
        self.add(audio_motion_sync(opening, energy, fps, self.largest).offset.abs()[None])


class SyncCorrelation(SyncOffset):
    """Mean correlation at the best offset by :func:`audio_motion_sync` over the clips of a test set.

    Args:
        largest: seconds, of the offsets that are tried.
        scale: multiplied into the result.
    """

    higher_is_better = True

    def update(self, opening: Tensor, energy: Tensor, fps: float) -> None:
        """Adds one clip: mouth opening (T,), sound energy (T,) and the frame rate."""
        self.add(audio_motion_sync(opening, energy, fps, self.largest).correlation[None])


class LipSync(NamedTuple):
    """What :func:`lip_sync_error` finds.

    Attributes:
        distance: () float64, LSE-D: the least over the offsets of the mean distance; lower is better.
        confidence: () float64, LSE-C: the median over the offsets minus the least; higher is better.
    """

    distance: Tensor
    confidence: Tensor


def lip_sync_error(video: Tensor, audio: Tensor, largest: int = 15) -> LipSync:
    """LSE-D and LSE-C on embeddings of a SyncNet (Chung & Zisserman 2016), as lip-sync papers use them.

    D_l is the mean over frames of ‖video_t − audio_{t+l}‖₂, for offsets l from −largest to largest. As in the authors'
    script (``calc_pdist`` of github.com/joonson/syncnet_python), an audio_{t+l} beyond the clip's ends is zero.

    Args:
        video: (T, D) embeddings of the rendered mouth.
        audio: (T, D) embeddings of the sound, at the same rate.
        largest: frames.

    Raises:
        ValueError: not more frames than the largest offset.

    Example:
        >>> audio = torch.eye(4)
        >>> found = lip_sync_error(audio.roll(1, 0), audio, largest=1)
        >>> found.distance.item(), round(found.confidence.item(), 3)
        (0.25, 1.061)
    """
    if len(video) <= largest:
        raise ValueError(f"{len(video)} frames are too few for offsets up to {largest} frames")
    padded = F.pad(audio.double(), (0, 0, largest, largest))
    partners = (padded[first : first + len(video)] for first in range(2 * largest + 1))
    distances = torch.stack([(video.double() - partner).norm(dim=1).mean() for partner in partners])
    return LipSync(distances.min(), distances.quantile(0.5) - distances.min())


class LipSyncDistance(MotionMetric):
    """LSE-D by :func:`lip_sync_error`, the mean over the clips of a test set.

    Args:
        largest: frames, of the offsets that are tried.
    """

    def __init__(self, largest: int = 15, **kwargs: Any) -> None:
        super().__init__("clips", **kwargs)
        self.largest = largest

    def update(self, video: Tensor, audio: Tensor) -> None:
        """Adds one clip: embeddings (T, D) of its frames and of its sound."""
        self.add(lip_sync_error(video, audio, self.largest).distance[None])


class LipSyncConfidence(LipSyncDistance):
    """LSE-C by :func:`lip_sync_error`, the mean over the clips of a test set; see :class:`LipSyncDistance`."""

    higher_is_better = True

    def update(self, video: Tensor, audio: Tensor) -> None:
        """Adds one clip: embeddings (T, D) of its frames and of its sound."""
        self.add(lip_sync_error(video, audio, self.largest).confidence[None])


def beats(speed: Tensor) -> Tensor:
    """Frames (N,) int64 where a motion's speed (T,) has a local minimum: its beats (Siyao et al. 2022).

    Example:
        >>> beats(torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0, 1.0])).tolist()
        [1, 4]
    """
    return 1 + torch.nonzero((speed[1:-1] < speed[:-2]) & (speed[1:-1] < speed[2:])).flatten()


def onsets(energy: Tensor) -> Tensor:
    """Frames (N,) int64 where the sound's energy (T,) rises fastest: local maxima of its rise that are above the mean.

    Example:
        >>> onsets(torch.tensor([0.0, 0.0, 4.0, 5.0, 5.0, 9.0, 9.0])).tolist()
        [2, 5]
    """
    rise = energy.diff(prepend=energy[:1]).clamp(min=0)
    return 1 + torch.nonzero((rise[1:-1] > rise[:-2]) & (rise[1:-1] >= rise[2:]) & (rise[1:-1] > rise.mean())).flatten()


def beat_alignment(motion_beats: Tensor, sound_beats: Tensor, fps: float, sigma: float = 0.1) -> Tensor:
    """Beat alignment of one clip: mean over sound beats of exp(−min_m (t_m − t_s)² / 2σ²) (Li et al. 2021).

    Args:
        motion_beats: (M,) frames, see :func:`beats`.
        sound_beats: (N,) frames, see :func:`onsets`.
        fps: frames per second.
        sigma: seconds.

    Returns:
        () float64 in [0, 1]; 0 where the motion has no beat.

    Raises:
        ValueError: the sound has no beat.

    Example:
        >>> beat_alignment(torch.tensor([10]), torch.tensor([10, 13]), fps=30, sigma=0.1).item()
        0.8032653298563167
    """
    if not len(sound_beats):
        raise ValueError("the sound has no beat")
    if not len(motion_beats):
        return torch.zeros((), dtype=torch.float64)
    distance = (sound_beats[:, None] - motion_beats[None]).abs().amin(1).double() / fps
    return (-(distance**2) / (2 * sigma**2)).exp().mean()


class BeatAlignment(MotionMetric):
    """:func:`beat_alignment` of a head's motion with the sound, the mean over the clips that have a sound beat.

    Args:
        sigma: seconds.
    """

    higher_is_better = True

    def __init__(self, sigma: float = 0.1, **kwargs: Any) -> None:
        super().__init__("clips", **kwargs)
        self.sigma = sigma

    def update(self, rotations: Tensor, energy: Tensor, fps: float) -> None:
        """Adds one clip: head rotations (T, 3) in radians, sound energy (T,) and the frame rate."""
        sound = onsets(energy)
        if len(sound):
            self.add(beat_alignment(beats(rotation_speed(rotations, fps)), sound, fps, self.sigma)[None])


def rotation_speed(rotations: Tensor, fps: float) -> Tensor:
    """Speed ‖r_{t+1} − r_t‖ · fps of head rotations (T, 3) in radians: (T − 1,) float64, radians per second.

    Example:
        >>> rotation_speed(torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.4, 0.0]]), 10).round(decimals=6).tolist()
        [5.0]
    """
    return rotations.double().diff(dim=0).norm(dim=1) * fps


class RotationSpeed(MotionMetric):
    """Mean :func:`rotation_speed` of the head over a test set: neither high nor low is good; near the truth is."""

    higher_is_better = None

    def update(self, rotations: Tensor, fps: float) -> None:
        """Adds one clip: head rotations (T, 3) in radians, and the frame rate."""
        self.add(rotation_speed(rotations, fps))


class RotationDeviation(Metric):
    """AdaMesh's LSD: mean over the three axes of the standard deviation of the head's rotation.

    As in its script the deviation is the population's, over the frames of all clips together, so it also holds how
    far clips differ from each other. Best near the truth's.

    Example:
        >>> metric = RotationDeviation()
        >>> metric.update(torch.tensor([[0.0, 1.0, 0.0]]))
        >>> metric.update(torch.tensor([[6.0, 1.0, 0.0]]))
        >>> metric.compute().item()
        1.0
    """

    higher_is_better = None
    full_state_update = False
    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rotations: Tensor) -> None:
        """Adds one clip: head rotations (T, 3), axis-angle in radians."""
        self.count += len(rotations)
        self.total += rotations.double().sum(0)
        self.squares += rotations.double().square().sum(0)

    def compute(self) -> Tensor:
        """The deviation, () float64, radians."""
        variance = self.squares / self.count - (self.total / self.count).square()
        return variance.clamp(min=0).sqrt().mean()
