import lpips
import pytest
import torch
import torch.nn.functional as F

from metrics.perceptual import DistanceToReal, Diversity, layer_distance, pairwise_distance, perceptual_map
from trainers.nets.face_encoders import LPIPS, PerceptualDistance


def images(number, seed, size=64):
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def package():
    torch.manual_seed(0)
    network = lpips.LPIPS(pnet_rand=True, verbose=False).eval()  # random trunk, official heads
    return network.requires_grad_(False)


class Means:
    """One layer of one pixel: the mean colour, and the Euclidean distance of two."""

    def layers(self, image):
        return [image.mean((2, 3))]

    def between(self, first, second):
        return (first[0] - second[0]).norm(dim=1)


def flat(*values):
    return torch.stack([torch.full((3, 2, 2), value / 3**0.5) for value in values])


def test_lpips_equals_the_package(package):
    x, y = images(3, 0), images(3, 1)
    network = LPIPS(package)
    torch.testing.assert_close(network(x, y), package(x, y).flatten(), rtol=1e-6, atol=0)
    layers = network.layers(x), network.layers(y)
    _, expected = package(x, y, retPerLayer=True)
    for first, second, head, value in zip(*layers, network.heads, expected, strict=True):
        torch.testing.assert_close(
            layer_distance(first, second, head).mean((2, 3), keepdim=True), value, rtol=1e-6, atol=1e-9
        )


def test_map_equals_the_package(package):
    x, y = images(2, 2), images(2, 3)
    network = LPIPS(package)
    package.spatial = True
    try:
        expected = package(x, y)
    finally:
        package.spatial = False
    value = perceptual_map(network.layers(x), network.layers(y), (64, 64), network.heads)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def test_perceptual_network_by_its_definition():
    torch.manual_seed(1)
    network = PerceptualDistance("resnet10", 8, 32).eval()
    x, y = images(2, 4, 32), images(2, 5, 32)
    expected, a, b = torch.zeros(2), x, y
    for stage in network.stages:
        a, b = stage(a), stage(b)
        expected += (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2))
    torch.testing.assert_close(network(x, y), expected, rtol=1e-5, atol=1e-7)


def test_distance_to_real_by_hand():
    metric = DistanceToReal(Means())
    metric.update(flat(0.0, 1.0), flat(0.5, 1.0))
    metric.update(flat(3.0), flat(0.0))
    assert metric.compute().item() == pytest.approx((0.5 + 0 + 3) / 3)


def test_diversity_by_hand():
    assert pairwise_distance(Means(), flat(0.0, 1.0, 3.0)).item() == pytest.approx((1 + 3 + 2) / 3)
    metric = Diversity(Means())
    metric.update(flat(0.0, 1.0, 3.0))
    metric.update(flat(0.0, 1.0))
    assert metric.compute().item() == pytest.approx((2 + 1) / 2)  # the mean over prompts, not over pairs


def test_diversity_equals_every_pair_through_the_package(package):
    x = images(4, 6)
    pairs = [package(x[i : i + 1], x[j : j + 1]).item() for i in range(4) for j in range(i + 1, 4)]
    assert pairwise_distance(LPIPS(package), x).item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-6)


def test_diversity_of_one_image_is_refused():
    with pytest.raises(ValueError, match="at least 2 images of a prompt, found 1"):
        Diversity(Means()).update(flat(0.0))
