"""Metrics of systems that answer one audio with several motions: error of the mean and of the best, and diversity.

Samples are S predictions (S, T, V, 3) of one clip under the same condition. Two different things are called
"diversity" in the literature: how far *samples* of one condition lie apart (ProbTalk3D), and how far predictions
under different *styles* do (FaceDiffuser). They are two metrics here.
"""

import hashlib
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metrics.motion import REDUCTIONS, VARIANTS, MotionMetric, choice, lip_vertex_error

PAIRINGS = ("halves", "all")


def mean_estimate_error(
    samples: Tensor, truth: Tensor, lips: Tensor, variant: str = "squared", over_vertices: str = "max"
) -> Tensor:
    """Mean estimate error (MEE) of each frame: the lip vertex error of the mean of the samples (ProbTalk3D).

    Args:
        samples: (S, T, V, 3) vertices.
        truth: (T, V, 3) vertices.
        lips: (L,) int64 indices of the lip vertices.
        variant: as in :func:`metrics.motion.lip_vertex_error`; ``squared`` in ProbTalk3D's script.
        over_vertices: ``max`` or ``mean``.

    Returns:
        (T,) float64, in the unit of the vertices, squared for ``squared``.

    Example:
        >>> samples = torch.tensor([1.0, 5.0])[:, None, None, None].expand(2, 1, 1, 3)
        >>> mean_estimate_error(samples, torch.zeros(1, 1, 3), torch.tensor([0])).tolist()
        [27.0]
    """
    return lip_vertex_error(_several(samples).double().mean(0), truth, lips, variant, over_vertices)


def coverage_error(
    samples: Tensor, truth: Tensor, lips: Tensor, variant: str = "squared", over_vertices: str = "max"
) -> Tensor:
    """Coverage error (CE) of each frame: the lip vertex error of the best sample of the clip (ProbTalk3D).

    The best is the one whose error, summed over the clip's frames, is least; not another one in every frame.

    Args:
        samples, truth, lips, variant, over_vertices: as in :func:`mean_estimate_error`.

    Returns:
        (T,) float64, in the unit of the vertices, squared for ``squared``.

    Example:
        >>> samples = torch.tensor([1.0, 5.0])[:, None, None, None].expand(2, 1, 1, 3)
        >>> coverage_error(samples, torch.zeros(1, 1, 3), torch.tensor([0])).tolist()
        [3.0]
    """
    errors = [lip_vertex_error(sample, truth, lips, variant, over_vertices) for sample in _several(samples)]
    return min(errors, key=lambda error: error.sum())


def sample_diversity(samples: Tensor, pairing: str = "all", order: Tensor | None = None) -> Tensor:
    """Diversity of one clip: mean over pairs of samples of the distance of a vertex, mean over vertices and frames.

    Args:
        samples: (S, T, V, 3) vertices, or (S, T, C) rig controls as vertices of C coordinates.
        pairing: ``halves`` takes the samples in ``order``, and pairs the i-th of the first half with the i-th of the
            second (ProbTalk3D: 10 samples, 5 pairs); ``all`` takes every pair: the same quantity, less noisy.
        order: (S,) int64 permutation, for ``halves`` only; by default as they come. See :func:`shuffled`.

    Returns:
        () float64, in the unit of the vertices.

    Raises:
        ValueError: fewer than two samples, or an odd number for ``halves``.

    Example:
        >>> samples = torch.tensor([0.0, 1.0, 3.0, 6.0])[:, None, None, None] * torch.tensor([1.0, 0.0, 0.0])
        >>> sample_diversity(samples, "halves").item()  # |0 - 3| and |1 - 6|
        4.0
        >>> sample_diversity(samples, "halves", torch.tensor([0, 2, 1, 3])).item()  # |0 - 1| and |3 - 6|
        2.0
    """
    choice("pairing", pairing, PAIRINGS)
    samples = _several(samples)
    pairs = list(combinations(range(len(samples)), 2))
    if pairing == "halves":
        half, odd = divmod(len(samples), 2)
        if odd:
            raise ValueError(f"diversity of halves needs an even number of samples, found {len(samples)}")
        ordered = list(range(len(samples))) if order is None else order.tolist()
        pairs = list(zip(ordered[:half], ordered[half:], strict=True))
    distances = [(samples[i].double() - samples[j].double()).norm(dim=-1).mean() for i, j in pairs]
    return torch.stack(distances).mean()


def shuffled(number: int, seed: int, key: str) -> Tensor:
    """The order (S,) int64 in which ``halves`` takes the samples of the clip ``key``.

    It depends on the seed and the clip alone, so that a clip gets the same pairs on any number of processes.
    ProbTalk3D's script draws from one global generator instead, so its pairs depend on all that was drawn before.
    """
    entropy = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return torch.from_numpy(np.random.default_rng([seed, entropy]).permutation(number))


def multimodality(samples: Tensor) -> Tensor:
    """Multimodality of one clip as FaceDiffuser's script takes it: sqrt(Σ_{i≠j} ‖s_i − s_j‖²) over ordered pairs.

    One Frobenius norm over all pairs at once, so it grows with the number of samples, frames and vertices; the paper
    does not report it. Here by Σ_{i,j} ‖s_i − s_j‖² = 2 S Σ_i ‖s_i − s̄‖², without holding the pairs.

    Args:
        samples: (S, ...) predictions of one clip.

    Returns:
        () float64, in the unit of the predictions.

    Example:
        >>> multimodality(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).item()  # 25 twice
        7.0710678118654755
    """
    samples = _several(samples).double()
    return (2 * len(samples) * (samples - samples.mean(0)).square().sum()).sqrt()


class MeanEstimateError(MotionMetric):
    """:func:`mean_estimate_error` over a test set.

    Args:
        variant: ``squared``, ``l2`` or ``centred``.
        over_vertices: ``max`` or ``mean``.
        pooling: ``frames`` or ``clips``.
        scale: multiplied into the result.
    """

    def __init__(
        self,
        variant: str = "squared",
        over_vertices: str = "max",
        pooling: str = "frames",
        scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(pooling, scale, **kwargs)
        self.variant = choice("variant", variant, VARIANTS)
        self.over_vertices = choice("over_vertices", over_vertices, REDUCTIONS)

    def update(self, samples: Tensor, truth: Tensor, lips: Tensor) -> None:
        """Adds one clip: samples (S, T, V, 3), truth (T, V, 3) and the (L,) lip indices."""
        self.add(mean_estimate_error(samples, truth, lips, self.variant, self.over_vertices))


class CoverageError(MeanEstimateError):
    """:func:`coverage_error` over a test set; arguments as in :class:`MeanEstimateError`."""

    def update(self, samples: Tensor, truth: Tensor, lips: Tensor) -> None:
        """Adds one clip: samples (S, T, V, 3), truth (T, V, 3) and the (L,) lip indices."""
        self.add(coverage_error(samples, truth, lips, self.variant, self.over_vertices))


class SampleDiversity(MotionMetric):
    """:func:`sample_diversity`, the mean over the clips of a test set.

    Args:
        pairing: ``halves`` or ``all``.
        scale: multiplied into the result.
    """

    higher_is_better = None

    def __init__(self, pairing: str = "all", scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__("clips", scale, **kwargs)
        self.pairing = choice("pairing", pairing, PAIRINGS)

    def update(self, samples: Tensor, order: Tensor | None = None) -> None:
        """Adds one clip: samples (S, T, V, 3), and for ``halves`` their order (S,)."""
        self.add(sample_diversity(samples, self.pairing, order)[None])


class StyleDiversity(MotionMetric):
    """Style diversity: one audio under every style, all pairs as in :func:`sample_diversity`; mean over clips.

    FaceDiffuser's "Diversity". A clip that was predicted under fewer than two styles says nothing and is left out,
    as in its script.

    Args:
        scale: multiplied into the result.
    """

    higher_is_better = None

    def __init__(self, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__("clips", scale, **kwargs)

    def update(self, styles: Tensor) -> None:
        """Adds one clip: its predictions (S, T, V, 3) under S styles."""
        if len(styles) > 1:
            self.add(sample_diversity(styles)[None])


class Multimodality(MotionMetric):
    """:func:`multimodality`, the mean over the clips of a test set.

    Args:
        scale: multiplied into the result.
    """

    higher_is_better = None

    def __init__(self, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__("clips", scale, **kwargs)

    def update(self, samples: Tensor) -> None:
        """Adds one clip: its samples (S, ...)."""
        self.add(multimodality(samples)[None])


def _several(samples: Tensor) -> Tensor:
    if len(samples) < 2:
        raise ValueError(f"needs at least 2 samples a clip, found {len(samples)}")
    return samples
