import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from torchmetrics.image.fid import FrechetInceptionDistance

from metrics.distribution import (
    FrechetDistance,
    KernelDistance,
    frechet_distance,
    kernel_distance,
    mean_and_covariance,
)


def features(number, dimensions, seed, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, 1, size=(number, dimensions)))


def distance(a, b):
    return frechet_distance(*mean_and_covariance(a), *mean_and_covariance(b)).item()


def test_frechet_distance_of_diagonal_gaussians():
    # Closed form: the sum of (difference of means)² + (difference of standard deviations)².
    mean, deviation = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5])
    value = frechet_distance(torch.zeros(2), torch.eye(2), mean, torch.diag(deviation**2))
    assert value.item() == pytest.approx(1 + 4 + (3 - 1) ** 2 + 0.5**2, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(300, 250), (10, 12), (12, 300), (300, 12), (17, 17)])
def test_frechet_distance_equals_cleanfid(n, m):
    a, b = features(n, 16, 0), features(m, 16, 1, shift=0.3)
    expected = cleanfid.fid_from_feats(a.numpy(), b.numpy())
    assert distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_degenerate_covariances():
    assert frechet_distance(torch.zeros(3), torch.zeros(3, 3), torch.ones(3), torch.eye(3)).item() == 6
    flat = features(50, 4, 0)
    flat[:, 3] = flat[:, 2]
    root = linalg.sqrtm(np.cov(flat.T)).real  # the distance to a point at the origin is |mean|² + trace
    expected = flat.mean(0).square().sum().item() + np.trace(root @ root)
    value = frechet_distance(*mean_and_covariance(flat), torch.zeros(4), torch.zeros(4, 4))
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_metric_equals_torchmetrics():
    class Flat(torch.nn.Module):
        num_features = 6

        def forward(self, images):
            return images.reshape(len(images), -1)[:, :6].double()

    theirs = FrechetInceptionDistance(feature=Flat(), normalize=True)
    theirs.set_dtype(torch.float64)
    ours = FrechetDistance(6)
    for seed, real in ((0, True), (1, True), (2, False), (3, False)):
        batch = features(20, 6, seed, shift=float(not real))
        ours.update(batch, real=real)
        theirs.update(batch.reshape(20, 1, 2, 3), real=real)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_kernel_distance_by_hand():
    # d = 1: kernel (xy + 1)³. Real {0, 1}: pair 1. Fake {1, 1}: pair 8. Between: 1, 1, 8, 8.
    value = kernel_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [1.0]]))
    assert value.tolist() == [1 + 8 - 2 * 4.5]


def test_kernel_distance_is_unbiased():
    values = [kernel_distance(features(20, 4, 2 * i), features(20, 4, 2 * i + 1)).item() for i in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


@pytest.mark.parametrize("metric", [FrechetDistance(4), KernelDistance()], ids=str)
def test_one_image_is_refused(metric):
    metric.update(features(5, 4, 0), real=True)
    metric.update(features(1, 4, 0), real=False)
    with pytest.raises(ValueError, match="at least 2"):
        metric.compute()


@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_properties_of_frechet_distance(n, m, dimensions, seed):
    a, b = features(n, dimensions, seed), features(m, dimensions, seed + 1, shift=1.0)
    assert distance(a, b) >= 0
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-6, abs=1e-9)
    assert distance(a, a) == pytest.approx(0, abs=1e-9)
