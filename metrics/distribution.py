"""Distances between two sets of images, on features of any extractor: FID and KID.

The extractor is the caller's (its name and weight hash belong to the protocol), so that one pass of it can feed
every metric. Nothing here is tied to Inception.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat


def frechet_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> Tensor:
    """Fréchet distance of two Gaussians: ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½.

    With Σ₁ = F Fᵀ, the eigenvalues of Σ₁Σ₂ that are not zero are those of the symmetric Fᵀ Σ₂ F, so neither the
    square root of an unsymmetric matrix nor a complex number appears. F is the Cholesky factor, or the scaled
    eigenvectors of the range where a covariance has not full rank (fewer samples than dimensions).

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
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d), float64, of features (N, d)."""
    return features.double().mean(0), torch.cov(features.double().T).reshape(features.shape[1], features.shape[1])


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
            ValueError: fewer than two images on a side.
        """
        return frechet_distance(*self._moments("real"), *self._moments("fake"))

    def _moments(self, side: str) -> tuple[Tensor, Tensor]:
        count = getattr(self, f"{side}_count")
        if count < 2:
            raise ValueError(f"the Fréchet distance needs at least 2 {side} images, found {int(count)}")
        mean = getattr(self, f"{side}_sum") / count
        return mean, (getattr(self, f"{side}_outer") - count * torch.outer(mean, mean)) / (count - 1)


class KernelDistance(Metric):
    """Kernel distance (KID) between real and fake features.

    The estimate needs every pair of images, so the features themselves are the state: (N, d) per side.
    Features are put in a canonical order before subsets are drawn, so that the value does not depend on how the
    images were dealt to processes.

    Args:
        subsets: number of random subsets; 0 takes all pairs of all images, the estimate of least variance.
        subset_size: images a side in each subset.
        seed: seed of the draw.
    """

    higher_is_better = False
    full_state_update = False
    real: list[Tensor]
    fake: list[Tensor]

    def __init__(self, subsets: int = 0, subset_size: int = 1000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("fake", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool) -> None:
        """Adds features (N, d) of real or fake images."""
        (self.real if real else self.fake).append(features)

    def compute(self) -> Tensor:
        """The distance, () float64.

        Raises:
            ValueError: fewer than two images on a side.
        """
        real, fake = dim_zero_cat(self.real), dim_zero_cat(self.fake)
        if min(len(real), len(fake)) < 2:
            raise ValueError(
                f"the kernel distance needs at least 2 images a side, found {len(real)} real, {len(fake)} fake"
            )
        if not self.subsets:
            return kernel_distance(real, fake).mean()
        size = min(self.subset_size, len(real), len(fake))
        generator = np.random.default_rng(self.seed)
        real, fake = _canonical_order(real), _canonical_order(fake)
        draws = [(_draw(generator, real, size), _draw(generator, fake, size)) for _ in range(self.subsets)]
        return kernel_distance(real, fake, draws).mean()


def _canonical_order(features: Tensor) -> Tensor:
    return features[torch.from_numpy(np.lexsort(features.detach().cpu().numpy().T))]


def _draw(generator: np.random.Generator, features: Tensor, size: int) -> Tensor:
    return torch.from_numpy(generator.choice(len(features), size, replace=False))
