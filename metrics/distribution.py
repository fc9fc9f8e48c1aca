"""Distances between two sets of images, on features of any extractor: FID, KID, precision, recall, density, coverage.

The extractor is the caller's (its name and weight hash belong to the protocol), so that one pass of it can feed
every metric. Nothing here is tied to Inception.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from datamodules.errors import UserError

# Rows of a block of pairwise distances, so that memory grows with the number of images and not with its square.
BLOCK = 1024


def frechet_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> Tensor:
    """Fréchet distance of two Gaussians: ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½.

    With Σ₁ = F Fᵀ, the eigenvalues of Σ₁Σ₂ that are not zero are those of the symmetric Fᵀ Σ₂ F, so neither the
    square root of an unsymmetric matrix nor a complex number appears. F is the Cholesky factor, with
    pivots and fewer columns where a covariance has not full rank (fewer samples than dimensions).

    Args:
        mean_1: (d,) mean.
        covariance_1: (d, d) covariance.
        mean_2: (d,) mean.
        covariance_2: (d, d) covariance.

    Returns:
        () float64, at least 0.

    Example:
        >>> frechet_distance(torch.zeros(1), torch.ones(1, 1), torch.tensor([2.0]), 9 * torch.ones(1, 1)).item()
        8.0
    """
    covariance_1, covariance_2 = covariance_1.double(), covariance_2.double()
    factor_1, factor_2 = _square_root_factor(covariance_1), _square_root_factor(covariance_2)
    if factor_1.shape[1] <= factor_2.shape[1]:
        product = factor_1.T @ covariance_2 @ factor_1
    else:
        product = factor_2.T @ covariance_1 @ factor_2
    root_trace = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
    difference = (mean_1.double() - mean_2.double()).square().sum()
    return (difference + covariance_1.trace() + covariance_2.trace() - 2 * root_trace).clamp(min=0)


def _square_root_factor(covariance: Tensor) -> Tensor:
    """F with ``covariance = F @ F.T``, (d, rank) float64."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return factor
    lower, pivots, rank, _ = lapack.dpstrf(covariance.cpu().numpy(), lower=1)
    rows = np.empty((len(lower), rank))
    rows[pivots - 1] = np.tril(lower)[:, :rank]
    return torch.from_numpy(rows).to(covariance.device)


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d), float64, of features (N, d)."""
    return features.double().mean(0), torch.cov(features.double().T).reshape(features.shape[1], features.shape[1])


def check_features(features: Tensor, what: str) -> None:
    """What every metric here asks of the features (N, d) of one side.

    Args:
        features: of any extractor.
        what: the side's name in the message, for instance "real".

    Raises:
        UserError: fewer than two images, or a value that is not finite.
    """
    if len(features) < 2:
        raise UserError(f"{what} images: found {len(features)}, but a distance of two sets needs at least 2 on a side")
    finite = torch.isfinite(features).all(1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise UserError(f"{what} images: features of image {first} are not finite (NaN or infinity); check that image")


class FrechetReference:
    """The real side of many Fréchet distances: its covariance is factored once.

    With Σ_real = F Fᵀ and the generated features projected onto the columns of F, the trace of (Σ_real Σ)^½ is that
    of the square root of the projections' covariance. All distances to one reference share F, and those of subsets of
    one generated set share its projection.

    Args:
        mean: (d,) of the real features.
        covariance: (d, d) of the real features.

    Example:
        >>> reference = FrechetReference(torch.zeros(1), torch.ones(1, 1))
        >>> round(reference.distance(torch.tensor([[1.0], [1.0], [4.0]])).item(), 6)  # mean 2, variance 3
        4.535898
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean = mean.double()
        self.trace = covariance.double().trace()
        self.factor = _square_root_factor(covariance.double())

    @classmethod
    def of(cls, features: Tensor) -> "FrechetReference":
        """The reference of real features (N, d)."""
        check_features(features, "real")
        return cls(*mean_and_covariance(features))

    def distance(self, features: Tensor) -> Tensor:
        """Fréchet distance to generated features (N, d); () float64."""
        check_features(features, "generated")
        features = features.double()
        return self._distance(features, features @ self.factor)

    def _distance(self, features: Tensor, projected: Tensor) -> Tensor:
        """As :meth:`distance`, with ``projected = features @ factor``."""
        mean = features.mean(0)
        trace = (features - mean).square().sum() / (len(features) - 1)
        centred = projected - projected.mean(0)
        # Of the two Gram matrices, which share their eigenvalues other than 0, the smaller.
        gram = centred.T @ centred if len(centred) > centred.shape[1] else centred @ centred.T
        root_trace = torch.linalg.eigvalsh(gram / (len(features) - 1)).clamp(min=0).sqrt().sum()
        return ((mean - self.mean).square().sum() + self.trace + trace - 2 * root_trace).clamp(min=0)

    def at(self, features: Tensor, numbers: Sequence[int], seed: int = 0) -> Tensor:
        """Fréchet distances of random subsets: how much of the value is the number of images.

        FID is biased upward by roughly 1/N, so values at different N do not compare (Chong & Forsyth, CVPR 2020).

        Args:
            features: (N, d) of generated images, in an order that does not matter.
            numbers: sizes of the subsets, each in 2 ... N.
            seed: of the draws without replacement.

        Returns:
            (len(numbers),) float64.

        Raises:
            UserError: a number below 2 or above N.
        """
        check_features(features, "generated")
        wrong = [number for number in numbers if not 2 <= number <= len(features)]
        if wrong:
            raise UserError(f"FID at {wrong[0]} images: {len(features)} were generated; ask for 2 to {len(features)}")
        features = _canonical_order(features).double()
        projected = features @ self.factor
        generator = np.random.default_rng(seed)
        draws = [_draw(generator, features, number) for number in numbers]
        return torch.stack([self._distance(features[draw], projected[draw]) for draw in draws])

    def infinity(self, features: Tensor, smallest: int = 5000, points: int = 15, seed: int = 0) -> Tensor:
        """FID∞: the distance extrapolated to infinitely many generated images.

        Chong & Forsyth, "Effectively Unbiased FID and Inception Score", CVPR 2020: FID at ``points`` evenly spaced
        numbers N of images from ``smallest`` to all, each a random subset, a straight line in 1/N fitted by least
        squares, its value at 1/N = 0. Their code draws 15 points from 5,000 images on.

        Args:
            features: (N, d) of generated images.
            smallest: the smallest N; it must exceed d several times for the line to hold.
            points: how many N.
            seed: of the draws.

        Returns:
            () float64. Can be negative: it is an estimate.

        Raises:
            UserError: fewer than ``smallest + points`` images.
        """
        if len(features) < smallest + points:
            raise UserError(
                f"FID at infinity: {len(features)} images, but the line starts at {smallest} and needs {points} "
                "different numbers of images; generate more or choose a smaller start in the protocol"
            )
        numbers = np.linspace(smallest, len(features), points).round().astype(int).tolist()
        return extrapolate(numbers, self.at(features, numbers, seed))

    def jackknife(self, features: Tensor, groups: Tensor) -> Tensor:
        """Fréchet distances with one group of generated images left out at a time.

        The real side is fixed: it belongs to the protocol. The projection onto its factor is shared, so that a
        group costs one symmetric eigenvalue problem. :func:`metrics.statistics.jackknife` makes a standard error of
        them.

        Args:
            features: (N, d) of generated images.
            groups: (N,) int64, the group of each image, 0 ... G - 1; see :func:`jackknife_groups`.

        Returns:
            (G,) float64.
        """
        check_features(features, "generated")
        features = features.double()
        projected = features @ self.factor
        kept = [groups != group for group in range(int(groups.max()) + 1)]
        return torch.stack([self._distance(features[keep], projected[keep]) for keep in kept])


def extrapolate(numbers: Sequence[int], values: Tensor) -> Tensor:
    """The value at 1/N = 0 of the least-squares line in 1/N.

    Args:
        numbers: N of each value, at least two different ones.
        values: (len(numbers),).

    Returns:
        () float64.

    Example:
        >>> round(extrapolate([10, 20, 40], torch.tensor([4.0, 3.0, 2.5])).item(), 9)  # 2 + 20 / N
        2.0
    """
    inverse = 1 / torch.tensor(numbers, dtype=torch.float64)
    design = torch.stack([torch.ones_like(inverse), inverse], 1)
    return torch.linalg.lstsq(design, values.double()[:, None]).solution[0, 0]


def jackknife_groups(number: int, groups: int, seed: int = 0) -> Tensor:
    """A random group of each of ``number`` images, (number,) int64; sizes differ by at most one.

    Raises:
        UserError: fewer than two groups, or groups so large that fewer than two images would remain.
    """
    if not 2 <= groups <= number or number - -(-number // groups) < 2:
        raise UserError(f"jack-knife: {groups} groups of {number} images; expected 2 to {number} groups, 2 images left")
    return torch.from_numpy(np.random.default_rng(seed).permutation(number) % groups)


class NeighbourScores(NamedTuple):
    """Precision, recall, density and coverage, each () float64; see :func:`neighbour_scores`."""

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def neighbour_scores(real: Tensor, fake: Tensor, k: int) -> NeighbourScores:
    """Precision, recall, density and coverage from k nearest neighbours.

    Around every feature lies a ball that reaches to its k-th nearest other feature of the same side. Precision is
    the share of generated features in some real ball, recall the share of real features in some generated ball
    (Kynkäänniemi et al., NeurIPS 2019, k = 3). Density is the mean number of real balls around a generated feature,
    over k; coverage the share of real balls that hold a generated feature (Naeem et al., ICML 2020, k = 5). Balls
    are open, as in Naeem et al.'s code.

    Args:
        real: (N, d) features.
        fake: (M, d) features.
        k: neighbours; below N and M.

    Returns:
        precision, recall and coverage in [0, 1]; density at least 0, and around 1 where both sides are alike.

    Raises:
        UserError: no more than k images on a side.

    Example:
        >>> scores = neighbour_scores(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [0.6]]), k=1)
        >>> [round(value.item(), 3) for value in scores]
        [1.0, 0.0, 2.0, 0.667]
    """
    check_features(real, "real")
    check_features(fake, "generated")
    if k >= min(len(real), len(fake)):
        raise UserError(f"nearest neighbours: k = {k}, but only {min(len(real), len(fake))} images on a side")
    real, fake = real.double(), fake.double()
    real_radius, fake_radius = _radii(real, k), _radii(fake, k)
    in_fake_ball, holds_fake, balls = [], [], torch.zeros(len(fake), dtype=torch.float64, device=real.device)
    for rows, radius in zip(real.split(BLOCK), real_radius.split(BLOCK), strict=True):
        distances = torch.cdist(rows, fake)
        inside = distances < radius[:, None]
        balls += inside.sum(0)
        holds_fake.append(inside.any(1))
        in_fake_ball.append((distances < fake_radius).any(1))
    return NeighbourScores(
        precision=(balls > 0).double().mean(),
        recall=torch.cat(in_fake_ball).double().mean(),
        density=balls.mean() / k,
        coverage=torch.cat(holds_fake).double().mean(),
    )


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance of every feature to its k-th nearest other one, (N,)."""
    radii = []
    for start in range(0, len(features), BLOCK):
        distances = torch.cdist(features[start : start + BLOCK], features)
        distances[torch.arange(len(distances)), start + torch.arange(len(distances))] = torch.inf
        radii.append(distances.kthvalue(k).values)
    return torch.cat(radii)


def kernel_distance(real: Tensor, fake: Tensor, subsets: Iterable[tuple[Tensor, Tensor]] | None = None) -> Tensor:
    """Kernel distance: the unbiased squared MMD under the cubic kernel (x·y / d + 1)³ (Bińkowski et al. 2018).

    Args:
        real: (N, d) features.
        fake: (M, d) features.
        subsets: pairs of int64 index arrays into ``real`` and ``fake``; by default one pair with everything,
            which is what the mean over random subsets estimates.

    Returns:
        (subsets,) float64, not multiplied by 1,000; the KID is their mean. Can be negative.
    """
    if subsets is None:
        subsets = [(torch.arange(len(real)), torch.arange(len(fake)))]
    return torch.stack([_unbiased_mmd(real[a].double(), fake[b].double()) for a, b in subsets])


def _unbiased_mmd(x: Tensor, y: Tensor) -> Tensor:
    n, m = len(x), len(y)
    within_x, within_y, between = _cubic_kernel(x, x), _cubic_kernel(y, y), _cubic_kernel(x, y)
    within = (within_x.sum() - within_x.trace()) / (n * (n - 1)) + (within_y.sum() - within_y.trace()) / (m * (m - 1))
    return within - 2 * between.mean()


def _cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


class FrechetDistance(Metric):
    """Fréchet distance (FID) between real and fake features.

    The state is a count, a sum and a sum of outer products per side, float64: exact under DDP, and its size
    does not depend on the number of images. Covariances divide by N − 1 (clean-fid, torchmetrics).

    Args:
        dimensions: the extractor's number of features.

    Example:
        >>> metric = FrechetDistance(1)
        >>> metric.update(torch.tensor([[-1.0], [1.0]]), real=True)
        >>> metric.update(torch.tensor([[1.0], [3.0]]), real=False)
        >>> metric.compute()
        tensor(4., dtype=torch.float64)
    """

    higher_is_better = False
    full_state_update = False

    def __init__(self, dimensions: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for side in ("real", "fake"):
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
            self.add_state(f"{side}_sum", torch.zeros(dimensions, dtype=torch.float64), dist_reduce_fx="sum")
            outer = torch.zeros(dimensions, dimensions, dtype=torch.float64)
            self.add_state(f"{side}_outer", outer, dist_reduce_fx="sum")

    def update(self, features: Tensor, real: bool) -> None:
        """Adds features (N, d) of real or fake images."""
        side, features = "real" if real else "fake", features.double()
        setattr(self, f"{side}_count", getattr(self, f"{side}_count") + len(features))
        setattr(self, f"{side}_sum", getattr(self, f"{side}_sum") + features.sum(0))
        setattr(self, f"{side}_outer", getattr(self, f"{side}_outer") + features.T @ features)

    def compute(self) -> Tensor:
        """The distance, () float64.

        Raises:
            UserError: fewer than two images on a side, or features that are not finite.
        """
        return frechet_distance(*self._moments("real"), *self._moments("fake"))

    def _moments(self, side: str) -> tuple[Tensor, Tensor]:
        count = getattr(self, f"{side}_count")
        if count < 2:
            raise UserError(f"{side} images: found {int(count)}, but a distance of two sets needs at least 2 on a side")
        if not torch.isfinite(getattr(self, f"{side}_outer")).all():
            raise UserError(f"{side} images: some features are not finite (NaN or infinity); check those images")
        mean = getattr(self, f"{side}_sum") / count
        return mean, (getattr(self, f"{side}_outer") - count * torch.outer(mean, mean)) / (count - 1)


class _FeatureMetric(Metric):
    """A metric that needs every pair of images, so the features themselves are the state: (N, d) per side."""

    full_state_update = False
    real: list[Tensor]
    fake: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("fake", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool) -> None:
        """Adds features (N, d) of real or fake images."""
        (self.real if real else self.fake).append(features)

    def _sides(self) -> tuple[Tensor, Tensor]:
        sides = []
        for name in ("real", "fake"):
            parts = getattr(self, name)
            sides.append(dim_zero_cat(parts) if len(parts) else torch.zeros(0, 1))
            check_features(sides[-1], name)
        return sides[0], sides[1]


class KernelDistance(_FeatureMetric):
    """Kernel distance (KID) between real and fake features; see :func:`kernel_distance`.

    Features are put in a canonical order before subsets are drawn, so that the value does not depend on how the
    images were dealt to processes.

    Args:
        subsets: number of random subsets; 0 takes all pairs of all images, the estimate of least variance.
        subset_size: images a side in each subset.
        seed: seed of the draw.

    Example:
        >>> metric = KernelDistance()
        >>> metric.update(torch.tensor([[0.0], [1.0]]), real=True)
        >>> metric.update(torch.tensor([[1.0], [1.0]]), real=False)
        >>> metric.compute()
        tensor(0., dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, subsets: int = 0, subset_size: int = 1000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def compute(self) -> Tensor:
        """The distance, () float64.

        Raises:
            UserError: fewer than two images on a side, or features that are not finite.
        """
        return kernel_distance(*(sides := self._sides()), self._draws(*sides)).mean()

    def _draws(self, real: Tensor, fake: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        if not self.subsets:
            return None
        return random_subsets(real, fake, self.subsets, self.subset_size, self.seed)


class NeighbourMetrics(_FeatureMetric):
    """Precision, recall, density and coverage; see :func:`neighbour_scores`.

    Args:
        k: nearest neighbours.

    Example:
        >>> metric = NeighbourMetrics(k=1)
        >>> metric.update(torch.tensor([[0.0], [1.0], [3.0]]), real=True)
        >>> metric.update(torch.tensor([[0.5], [0.6]]), real=False)
        >>> metric.compute().density
        tensor(2., dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = k

    def compute(self) -> NeighbourScores:
        """The four values.

        Raises:
            UserError: no more than k images on a side, or features that are not finite.
        """
        return neighbour_scores(*self._sides(), self.k)


class FrechetInfinity(_FeatureMetric):
    """FID∞; see :meth:`FrechetReference.infinity`.

    Args:
        smallest: the smallest number of images on the line.
        points: how many numbers of images.
        seed: of the draws.

    Example:
        >>> metric = FrechetInfinity(smallest=10, points=3)
        >>> for seed, real in ((0, True), (1, False)):
        ...     metric.update(torch.randn(200, 2, generator=torch.Generator().manual_seed(seed)), real)
        >>> metric.compute().item() < FrechetReference.of(metric.real[0]).distance(metric.fake[0]).item()
        True
    """

    higher_is_better = False

    def __init__(self, smallest: int = 5000, points: int = 15, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.smallest, self.points, self.seed = smallest, points, seed

    def compute(self) -> Tensor:
        """The extrapolated distance, () float64.

        Raises:
            UserError: too few images, or features that are not finite.
        """
        real, fake = self._sides()
        return FrechetReference.of(real).infinity(fake, self.smallest, self.points, self.seed)


def random_subsets(real: Tensor, fake: Tensor, subsets: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Index pairs for :func:`kernel_distance`: random subsets without replacement, the same for any order of images.

    Args:
        real: (N, d) features.
        fake: (M, d) features.
        subsets: how many.
        size: images a side in each; as many as there are where there are fewer.
        seed: of the draws.
    """
    size = min(size, len(real), len(fake))
    generator = np.random.default_rng(seed)
    orders = [_order(side) for side in (real, fake)]
    return [(orders[0][_draw(generator, real, size)], orders[1][_draw(generator, fake, size)]) for _ in range(subsets)]


def _order(features: Tensor) -> Tensor:
    return torch.from_numpy(np.lexsort(features.detach().cpu().numpy().T))


def _canonical_order(features: Tensor) -> Tensor:
    return features[_order(features)]


def _draw(generator: np.random.Generator, features: Tensor, size: int) -> Tensor:
    return torch.from_numpy(generator.choice(len(features), size, replace=False))
