"""FID and KID against clean-fid and torchmetrics, on the same features."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.distribution import FrechetDistance, frechet_distance, kernel_distance, mean_and_covariance

TIGHT = {"rtol": 1e-6, "atol": 1e-9}


def check(golden: Any) -> None:
    """Reproduces Fréchet distances (also of singular covariances) and kernel distances, with their subsets."""
    a, b = golden.io["feats_a"], golden.io["feats_b"]
    mean, covariance = mean_and_covariance(a)
    golden.close("mu_a", mean, **TIGHT)
    golden.close("sigma_a", covariance, **TIGHT)
    golden.close("fid_a_b", _fid(a, b), **TIGHT)
    golden.close("fid_a_a", _fid(a, a))
    doubled = (torch.cat([side, side[:, :4]], 1) for side in (a, b))
    golden.close("fid_singular", _fid(*doubled), **TIGHT)
    golden.close("fid_few", _fid(a[:10], b[:12]), **TIGHT)

    state = np.random.RandomState(5)
    draws = [_cleanfid_draw(state, len(a), len(b), 100) for _ in range(100)]
    golden.close("kid_index_first_two", torch.stack([torch.stack([y, x]) for x, y in draws[:2]]))
    golden.close("kid_100_100", kernel_distance(a, b, draws).mean(), **TIGHT)

    real, fake = (_pooled(golden.io[f"tm_{side}"], golden.io["tm_matrix"]) for side in ("real", "fake"))
    golden.close("tm_fid", _fid(real, fake), rtol=1e-5, atol=0)
    metric = FrechetDistance(real.shape[1])
    metric.update(real, real=True)
    metric.update(fake, real=False)
    golden.close("tm_fid", metric.compute(), rtol=1e-5, atol=0)
    torch.manual_seed(6)
    subsets = [(torch.randperm(len(real))[:20], torch.randperm(len(fake))[:20]) for _ in range(5)]
    distances = kernel_distance(real, fake, subsets)
    golden.close("tm_kid_mean", distances.mean(), rtol=1e-5, atol=0)
    golden.close("tm_kid_std", distances.std(correction=0), rtol=1e-5, atol=0)


def _fid(a: Tensor, b: Tensor) -> Tensor:
    return frechet_distance(*mean_and_covariance(a), *mean_and_covariance(b))


def _cleanfid_draw(state: np.random.RandomState, first: int, second: int, size: int) -> tuple[Tensor, Tensor]:
    """clean-fid draws from the second set first."""
    y = torch.from_numpy(state.choice(second, size, replace=False))
    x = torch.from_numpy(state.choice(first, size, replace=False))
    return x, y


def _pooled(images: Tensor, matrix: Tensor) -> Tensor:
    """The recorded extractor: average pool to 4 x 4 of the image in [0, 1], times a matrix."""
    return F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1) @ matrix
