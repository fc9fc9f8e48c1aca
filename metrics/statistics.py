"""Error bars and comparisons: bootstrap over training seeds and over clips or subjects, never over frames.

Scores of one system are a matrix (S, N): S training seeds, N test samples (clips, images), the same samples for
every seed. Frames of one clip are correlated, so a clip is the smallest thing that is drawn; where subjects are
few and alike within themselves, draw subjects (``groups``). Seeds and samples are drawn independently of each
other, because every seed is tested on the same samples. With two or three seeds the between-seed part is
itself a rough estimate, and rather too narrow: read the number of seeds beside the interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its bootstrap percentile interval."""

    value: float
    low: float
    high: float

    @property
    def bounds(self) -> tuple[float, float, float]:
        """Low, value, high."""
        return self.low, self.value, self.high

    @property
    def width(self) -> float:
        """High minus low; 0 for an interval that is rounding alone."""
        width = self.high - self.low
        return 0.0 if width <= 1e-12 * abs(self.value) else width

    def covers(self, value: float) -> bool:
        """Whether ``value`` lies within the interval."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two systems on the same samples.

    Attributes:
        first, second: the systems' names.
        difference: the first's mean minus the second's.
        p_value: two-sided, corrected by Holm for the number of comparisons made together.
        better: the name of the better system, or None: a tie, where the interval covers zero or the corrected
            p-value is above 1 − confidence.
    """

    first: str
    second: str
    difference: Interval
    p_value: float
    better: str | None


def bootstrap_mean(
    scores: ArrayLike,
    weights: ArrayLike | None = None,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Mean score of one system with its bootstrap interval.

    Args:
        scores: (N,) of one seed, or (S, N) of several.
        weights: (N,) weight of each sample, for instance its frames where frames are pooled; by default equal.
        groups: N names, for instance of subjects, that are drawn whole; by default each sample by itself.
        resamples: number of bootstrap resamples.
        confidence: coverage of the interval.
        seed: seed of the draw.

    Raises:
        ValueError: no scores, or a score that is not finite.
    """
    sums, counts = _grouped(scores, weights, groups)
    means = _resampled_means(sums, counts, resamples, np.random.default_rng(seed))
    return _interval(sums.mean(0).sum() / counts.sum(), means, confidence)


def paired_bootstrap(
    systems: Mapping[str, ArrayLike],
    higher_is_better: bool,
    weights: ArrayLike | None = None,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> list[Comparison]:
    """Compares every two systems on the same samples, correcting for the number of comparisons (Holm 1979).

    Args:
        systems: name to (N,) or (S, N) scores; N and its order are the same for all, S may differ.
        higher_is_better: direction of the metric.
        weights, groups, resamples, confidence, seed: see :func:`bootstrap_mean`.

    Returns:
        One comparison for each pair, in the order of ``systems``; none for fewer than two systems.
    """
    if len(systems) < 2:
        return []
    generator = np.random.default_rng(seed)
    grouped = {name: _grouped(scores, weights, groups) for name, scores in systems.items()}
    counts = {len(count) for _, count in grouped.values()}
    if len(counts) > 1:
        raise ValueError(f"paired systems need the same samples, found {sorted(counts)} samples")
    samples = counts.pop()
    # One draw of samples for all systems: this is what makes the comparison paired.
    drawn = _multinomial(generator, samples, resamples)
    means = {
        name: _means(sums, count, _multinomial(generator, len(sums), resamples), drawn)
        for name, (sums, count) in grouped.items()
    }
    value = {name: sums.mean(0).sum() / count.sum() for name, (sums, count) in grouped.items()}
    pairs = list(combinations(systems, 2))
    intervals = [_interval(value[a] - value[b], means[a] - means[b], confidence) for a, b in pairs]
    p_values = holm([_two_sided_p(means[a] - means[b]) for a, b in pairs])
    comparisons = []
    for (first, second), interval, p_value in zip(pairs, intervals, p_values, strict=True):
        better = None
        if not interval.covers(0) and p_value <= 1 - confidence:
            better = first if (interval.value > 0) == higher_is_better else second
        comparisons.append(Comparison(first, second, interval, p_value, better))
    return comparisons


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p-values.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def ranks(systems: Sequence[str], comparisons: Sequence[Comparison]) -> dict[str, int]:
    """Rank of each system: 1 + the number of systems that are better than it beyond a tie.

    Example:
        >>> worse = Comparison("a", "b", Interval(1.0, 0.5, 1.5), 0.01, better="b")
        >>> ranks(["a", "b"], [worse])
        {'a': 2, 'b': 1}
    """
    losses = [c.second if c.better == c.first else c.first for c in comparisons if c.better is not None]
    return {name: 1 + losses.count(name) for name in systems}


def _grouped(
    scores: ArrayLike, weights: ArrayLike | None, groups: Sequence[str] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weighted sums (S, G) and summed weights (G,) of the units that are drawn."""
    matrix = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    if matrix.size == 0 or not np.isfinite(matrix).all():
        raise ValueError(f"scores must be finite and not empty, found shape {matrix.shape}")
    weight = np.ones(matrix.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    if groups is None:
        return matrix * weight, weight
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    membership = np.eye(len(names))[member]
    return (matrix * weight) @ membership, weight @ membership


def _multinomial(generator: np.random.Generator, size: int, resamples: int) -> NDArray[np.float64]:
    """(resamples, size): how often each of ``size`` units was drawn."""
    return generator.multinomial(size, np.full(size, 1 / size), size=resamples).astype(np.float64)


def _resampled_means(
    sums: NDArray[np.float64], counts: NDArray[np.float64], resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    drawn = _multinomial(generator, len(counts), resamples)
    return _means(sums, counts, _multinomial(generator, len(sums), resamples), drawn)


def _means(
    sums: NDArray[np.float64],
    counts: NDArray[np.float64],
    drawn_seeds: NDArray[np.float64],
    drawn_samples: NDArray[np.float64],
) -> NDArray[np.float64]:
    over_seeds = (drawn_seeds / drawn_seeds.shape[1]) @ sums
    return (over_seeds * drawn_samples).sum(1) / (drawn_samples @ counts)


def _interval(value: float, resampled: NDArray[np.float64], confidence: float) -> Interval:
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(value), float(low), float(high))


def _two_sided_p(differences: NDArray[np.float64]) -> float:
    """Share of resampled differences on the far side of zero, doubled; never 0 for a finite number of draws."""
    below, above = (differences <= 0).sum(), (differences >= 0).sum()
    return float(min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1)))
