import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from torchmetrics.image.fid import FrechetInceptionDistance

from datamodules.errors import UserError
from metrics.distribution import (
    FrechetDistance,
    FrechetInfinity,
    FrechetReference,
    KernelDistance,
    NeighbourMetrics,
    extrapolate,
    frechet_distance,
    jackknife_groups,
    kernel_distance,
    mean_and_covariance,
    neighbour_scores,
    random_subsets,
)
from metrics.statistics import jackknife


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
    assert FrechetReference.of(a).distance(b).item() == pytest.approx(expected, rel=1e-6)


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


def test_kernel_distance_equals_cleanfid_on_its_subsets():
    a, b = features(60, 8, 0), features(50, 8, 1, shift=0.2)
    np.random.seed(3)
    expected = cleanfid.kernel_distance(a.numpy(), b.numpy(), num_subsets=7, max_subset_size=20)
    state = np.random.RandomState(3)
    draws = [(state.choice(50, 20, replace=False), state.choice(60, 20, replace=False)) for _ in range(7)]
    value = kernel_distance(a, b, [(torch.from_numpy(y), torch.from_numpy(x)) for x, y in draws]).mean()
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_random_subsets_are_distinct_images_and_the_same_in_any_order():
    a, b = features(30, 3, 0), features(20, 3, 1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    for (x, y), (u, v) in zip(random_subsets(a, b, 4, 25, 7), random_subsets(a[order], b, 4, 25, 7), strict=True):
        assert len(x.unique()) == len(y.unique()) == 20  # as many as there are
        assert torch.equal(a[x], a[order][u])
        assert torch.equal(y, v)


def test_distances_of_subsets():
    real, fake = features(200, 6, 0), features(80, 6, 1, shift=0.5)
    reference = FrechetReference.of(real)
    assert reference.at(fake, [80]).item() == pytest.approx(distance(real, fake), rel=1e-9)
    few = [reference.at(fake, [10], seed).item() for seed in range(20)]
    assert np.mean(few) > distance(real, fake)  # fewer images, larger value
    assert len(set(few)) == 20
    with pytest.raises(UserError, match="FID at 81 images: 80 were generated"):
        reference.at(fake, [81])


def test_extrapolation_is_numpy_s_line():
    numbers, values = [50, 70, 100, 300], torch.tensor([9.0, 8.0, 7.5, 6.0])
    expected = np.polyfit(1 / np.array(numbers), values.numpy(), 1)[1]
    assert extrapolate(numbers, values).item() == pytest.approx(expected, rel=1e-6)


def test_infinity_removes_the_bias_of_few_images():
    # One distribution on both sides: the distance is 0, and few images make it positive. The reference is exact.
    reference = FrechetReference(torch.zeros(8), torch.eye(8))
    samples = [features(400, 8, seed) for seed in range(30)]
    at_all = np.mean([reference.distance(sample).item() for sample in samples])
    at_infinity = np.mean([reference.infinity(sample, smallest=100).item() for sample in samples])
    assert at_all > 0.02
    assert abs(at_infinity) < at_all / 4
    with pytest.raises(UserError, match="FID at infinity: 400 images, but the line starts at 5000"):
        reference.infinity(samples[0])


def test_infinity_class_is_the_function():
    real, fake = features(90, 3, 0), features(60, 3, 1)
    metric = FrechetInfinity(smallest=20, points=5, seed=2)
    for part in fake.split(25):
        metric.update(part, real=False)
    metric.update(real, real=True)
    assert metric.compute() == FrechetReference.of(real).infinity(fake.flip(0), 20, 5, 2)


@pytest.mark.parametrize(("number", "dimensions"), [(60, 5), (12, 20)])
def test_jackknife_equals_every_distance_from_scratch(number, dimensions):
    real, fake = features(90, dimensions, 0), features(number, dimensions, 1, shift=0.3)
    groups = jackknife_groups(number, 6)
    assert groups.bincount().tolist() == [number // 6] * 6
    expected = [distance(real, fake[groups != group]) for group in range(6)]
    assert FrechetReference.of(real).jackknife(fake, groups).tolist() == pytest.approx(expected, rel=1e-7)


def test_jackknife_error_is_the_spread_over_draws():
    real = features(2000, 4, 0)
    reference = FrechetReference.of(real)
    draws = [features(200, 4, seed, shift=0.5) for seed in range(1, 61)]
    spread = np.std([reference.distance(draw).item() for draw in draws])
    errors = [jackknife(reference.jackknife(draw, jackknife_groups(200, 20))) for draw in draws]
    assert np.mean(errors) == pytest.approx(spread, rel=0.25)


def test_groups_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match="jack-knife: 9 groups of 8 images"):
        jackknife_groups(8, 9)
    with pytest.raises(UserError, match="jack-knife: 2 groups of 3 images"):
        jackknife_groups(3, 2)


def brute_force(real, fake, k):
    """Precision, recall, density and coverage as the papers define them, one pair at a time."""

    def far(a, b):
        return float(((a - b) ** 2).sum() ** 0.5)

    def radius(side, i):
        return sorted(far(side[i], side[j]) for j in range(len(side)) if j != i)[k - 1]

    real_radii = [radius(real, i) for i in range(len(real))]
    fake_radii = [radius(fake, j) for j in range(len(fake))]
    balls = [sum(far(x, y) < r for x, r in zip(real, real_radii, strict=True)) for y in fake]
    return (
        np.mean([count > 0 for count in balls]),
        np.mean([any(far(x, y) < r for y, r in zip(fake, fake_radii, strict=True)) for x in real]),
        sum(balls) / (k * len(fake)),
        np.mean([any(far(x, y) < r for y in fake) for x, r in zip(real, real_radii, strict=True)]),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbour_scores_equal_their_definition(k, monkeypatch):
    monkeypatch.setattr("metrics.distribution.BLOCK", 7)
    real, fake = features(30, 3, 0), features(22, 3, 1, shift=0.8)
    expected = brute_force(real.numpy(), fake.numpy(), k)
    assert list(map(float, neighbour_scores(real, fake, k))) == pytest.approx(expected)
    metric = NeighbourMetrics(k)
    for batch, is_real in ((real[:9], True), (fake, False), (real[9:], True)):
        metric.update(batch, real=is_real)
    assert list(map(float, metric.compute())) == pytest.approx(expected)


def test_neighbour_scores_of_equal_and_of_distant_sets():
    real = features(50, 4, 0)
    same = neighbour_scores(real, real, 3)
    assert same.precision == same.recall == same.coverage == 1
    assert [float(value) for value in neighbour_scores(real, real + 100, 3)] == [0, 0, 0, 0]
    with pytest.raises(UserError, match="k = 5, but only 5 images on a side"):
        neighbour_scores(real, real[:5], 5)


METRICS = [FrechetDistance(4), KernelDistance(), KernelDistance(5, 20), NeighbourMetrics(1), FrechetInfinity()]


@pytest.mark.parametrize("metric", METRICS, ids=str)
def test_bad_features_are_refused(metric):
    metric.reset()
    metric.update(features(5, 4, 0), real=True)
    with pytest.raises(UserError, match=r"fake images: found 0, but .* at least 2"):
        metric.compute()
    metric.update(features(1, 4, 0), real=False)
    with pytest.raises(UserError, match=r"fake images: found 1, but .* at least 2"):
        metric.compute()
    broken = features(6, 4, 1)
    broken[2, 1] = torch.nan
    metric.update(broken, real=False)
    with pytest.raises(UserError, match=r"fake images: .* not finite"):
        metric.compute()


@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_properties_of_frechet_distance(n, m, dimensions, seed):
    a, b = features(n, dimensions, seed), features(m, dimensions, seed + 1, shift=1.0)
    assert distance(a, b) >= 0
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-6, abs=1e-9)
    assert distance(a, a) == pytest.approx(0, abs=1e-9)
