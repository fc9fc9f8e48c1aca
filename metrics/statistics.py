"""Error bars and comparisons: bootstrap over training seeds and over clips or subjects, never over frames.

Scores of one system are a matrix (S, N): S training seeds, N test samples (clips, images), the same samples for
every seed. Frames of one clip are correlated, so a clip is the smallest thing that is drawn; where subjects are
few and alike within themselves, draw subjects or identities whole (``groups``). Seeds and samples are drawn
independently of each other, because every seed is tested on the same samples. With two or three seeds, or subjects,
that part is itself a rough estimate, and rather too narrow: read their numbers beside the interval.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

RESAMPLES = 4000
CONFIDENCE = 0.95
_BLOCK = 250  # resamples drawn at a time, so that memory does not grow with their number


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
    grouped = {"": _grouped(scores, weights, groups)}
    return _interval(_mean(*grouped[""]), _resample(grouped, resamples, seed)[""], confidence)


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
        weights, groups, resamples, confidence, seed: see :func:`bootstrap_mean`; many systems get more resamples, so
            that a corrected p-value can still be small.

    Returns:
        One comparison for each pair, in the order of ``systems``; none for fewer than two systems.
    """
    if len(systems) < 2:
        return []
    grouped = {name: _grouped(scores, weights, groups) for name, scores in systems.items()}
    pairs = list(combinations(systems, 2))
    # The smallest p-value of R resamples is 2 / (R + 1); times the number of pairs it must still be well below 0.05.
    means = _resample(grouped, max(resamples, math.ceil(20 * len(pairs) / (1 - confidence))), seed)
    value = {name: _mean(sums, counts) for name, (sums, counts) in grouped.items()}
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


def rank_intervals(
    systems: Mapping[str, ArrayLike],
    higher_is_better: bool,
    weights: ArrayLike | None = None,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, Interval]:
    """Place of each system by its mean alone, with the bootstrap interval of that place.

    In every resample the systems are placed by their means; equal means share the better place. All systems see the
    same draw of samples, as in :func:`paired_bootstrap`. The bounds are whole numbers.

    Args:
        systems, higher_is_better, weights, groups, resamples, confidence, seed: see :func:`paired_bootstrap`.
    """
    if not systems:
        return {}
    grouped = {name: _grouped(scores, weights, groups) for name, scores in systems.items()}
    sign = -1 if higher_is_better else 1
    means = np.stack(list(_resample(grouped, resamples, seed).values()))
    places = rankdata(sign * means, method="min", axis=0)
    value = rankdata([sign * _mean(sums, counts) for sums, counts in grouped.values()], method="min")
    return {
        name: _interval(place, drawn, confidence, whole=True)
        for name, place, drawn in zip(grouped, value, places, strict=True)
    }


def jackknife(leave_one_out: ArrayLike) -> float:
    """Jack-knife standard error of any statistic: sqrt((n − 1) / n · Σ (θ_i − mean θ)²) (Efron & Tibshirani 1993).

    For statistics that a bootstrap biases because a resample holds duplicates, such as the Fréchet distance.

    Args:
        leave_one_out: (n,) the statistic of the samples without the i-th sample, or without the i-th of n equal blocks.

    Raises:
        ValueError: fewer than two values, or one that is not finite.

    Example:
        >>> jackknife([2.5, 2.0, 1.5])  # of the mean of 1, 2, 3; its standard error is 1 / sqrt(3)
        0.5773502691896257
    """
    values = np.asarray(leave_one_out, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"jackknife needs at least two finite values, found shape {values.shape}")
    return float(np.sqrt((len(values) - 1) / len(values) * ((values - values.mean()) ** 2).sum()))


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
    if len(groups) != matrix.shape[1]:
        raise ValueError(f"{matrix.shape[1]} scores, but {len(groups)} groups")
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.stack([np.bincount(member, row, len(names)) for row in matrix * weight]).astype(np.float64)
    return sums, np.bincount(member, weight, len(names)).astype(np.float64)


def _mean(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
    return float(sums.mean(0).sum() / counts.sum())


def _resample(
    systems: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]], resamples: int, seed: int
) -> dict[str, NDArray[np.float64]]:
    """The means (resamples,) of each system; one draw of samples for all of them is what makes comparisons paired."""
    units = {len(counts) for _, counts in systems.values()}
    if len(units) > 1:
        raise ValueError(f"paired systems need the same samples, found {sorted(units)} samples")
    size = units.pop()
    generator = np.random.default_rng(seed)
    means: dict[str, list[NDArray[np.float64]]] = {name: [] for name in systems}
    for start in range(0, resamples, _BLOCK):
        block = min(_BLOCK, resamples - start)
        drawn = _multinomial(generator, size, block)
        for name, (sums, counts) in systems.items():
            over_seeds = (_multinomial(generator, len(sums), block) / len(sums)) @ sums
            means[name].append((over_seeds * drawn).sum(1) / (drawn @ counts))
    return {name: np.concatenate(blocks) for name, blocks in means.items()}


def _multinomial(generator: np.random.Generator, size: int, resamples: int) -> NDArray[np.float64]:
    """(resamples, size): how often each of ``size`` units was drawn."""
    return generator.multinomial(size, np.full(size, 1 / size), size=resamples).astype(np.float64)


def _interval(value: float, resampled: NDArray[np.float64], confidence: float, whole: bool = False) -> Interval:
    """Percentile interval; ``whole``: its bounds are values that were drawn, not numbers between them."""
    bounds = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(resampled, bounds, method="inverted_cdf" if whole else "linear")
    return Interval(float(value), float(low), float(high))


def _two_sided_p(differences: NDArray[np.float64]) -> float:
    """Share of resampled differences on the far side of zero, doubled; never 0 for a finite number of draws."""
    below, above = (differences <= 0).sum(), (differences >= 0).sum()
    return float(min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1)))
