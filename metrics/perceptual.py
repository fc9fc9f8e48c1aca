"""Perceptual distances between images: LPIPS to the real image, and LPIPS diversity. They are two metrics.

The network is the caller's (its name and weight hash belong to the protocol): anything that gives the layers of an
image and the distance between two images' layers. Layers are computed once an image, however many pairs it is in.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric


class PerceptualNetwork(Protocol):
    """What the metrics here need of a network."""

    def layers(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> a list of (B, C, h, w)."""

    def between(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        """The layers of two batches of images -> (B,) distances."""


def layer_distance(first: Tensor, second: Tensor, head: Tensor | None = None) -> Tensor:
    """One layer's distance at every position: Σ_c w_c (x̂_c − ŷ_c)², with x̂ = x / (‖x‖ + 10⁻¹⁰) over channels.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (LPIPS), CVPR 2018,
    equation 1, as the ``lpips`` package computes it.

    Args:
        first: (B, C, h, w) activations of one image.
        second: (B, C, h, w) of the other.
        head: (C,) weights of the channels; all 1 by default, the package's "baseline".

    Returns:
        (B, 1, h, w).

    Example:
        >>> x, y = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
        >>> round(layer_distance(x, y).item(), 6)  # (0.6 - 1)² + 0.8²
        0.8
    """
    difference = (_normalised(first) - _normalised(second)).square()
    if head is not None:
        difference = difference * head.view(1, -1, 1, 1)
    return difference.sum(1, keepdim=True)


def perceptual_distance(
    first: Sequence[Tensor], second: Sequence[Tensor], heads: Sequence[Tensor] | None = None
) -> Tensor:
    """LPIPS: the mean over positions of :func:`layer_distance`, summed over layers.

    Args:
        first: the layers (B, C, h, w) of one image.
        second: the layers of the other.
        heads: (C,) weights of each layer's channels; all 1 by default.

    Returns:
        (B,) distances.
    """
    weights = [None] * len(first) if heads is None else heads
    maps = [layer_distance(x, y, head) for x, y, head in zip(first, second, weights, strict=True)]
    return torch.stack([layer.mean((1, 2, 3)) for layer in maps]).sum(0)


def perceptual_map(
    first: Sequence[Tensor], second: Sequence[Tensor], size: tuple[int, int], heads: Sequence[Tensor] | None = None
) -> Tensor:
    """LPIPS by position: each layer's distances enlarged to the image (bilinear), summed over layers.

    Args:
        first, second, heads: as for :func:`perceptual_distance`.
        size: height and width of the image.

    Returns:
        (B, 1, H, W).
    """
    weights = [None] * len(first) if heads is None else heads
    maps = [layer_distance(x, y, head) for x, y, head in zip(first, second, weights, strict=True)]
    enlarged = [F.interpolate(layer, size, mode="bilinear", align_corners=False) for layer in maps]
    return torch.stack(enlarged).sum(0)


def pairwise_distance(network: PerceptualNetwork, images: Tensor) -> Tensor:
    """Mean distance over all pairs of k images of one prompt.

    Args:
        network: gives layers and distances.
        images: (k, 3, H, W) in [-1, 1], k at least 2.

    Returns:
        () float64.

    Raises:
        ValueError: fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"diversity needs at least 2 images of a prompt, found {len(images)}")
    layers = network.layers(images)
    first, second = torch.triu_indices(len(images), len(images), 1)
    return network.between([x[first] for x in layers], [x[second] for x in layers]).double().mean()


class _MeanDistance(Metric):
    """Mean of distances; the state is a float64 sum and a count."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, network: PerceptualNetwork, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.network = network
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The mean, () float64; NaN before the first image."""
        return self.total / self.count


class DistanceToReal(_MeanDistance):
    """Mean perceptual distance of each generated image to the real image of the same sample; lower is better.

    AnyFace and TediGAN report it, and some papers call it "diversity", which it is not: see :class:`Diversity`.

    Args:
        network: gives layers and distances.

    Example:
        >>> class Brightness:
        ...     def layers(self, image):
        ...         return [image.mean((1, 2, 3))]
        ...
        ...     def between(self, first, second):
        ...         return (first[0] - second[0]).abs()
        >>> metric = DistanceToReal(Brightness())
        >>> metric.update(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False

    @torch.inference_mode()
    def update(self, generated: Tensor, real: Tensor) -> None:
        """Adds pairs of images (N, 3, H, W) in [-1, 1]."""
        distances = self.network.between(self.network.layers(generated), self.network.layers(real))
        self.total += distances.double().sum()
        self.count += len(distances)


class Diversity(_MeanDistance):
    """Mean perceptual distance between the images of one prompt, averaged over prompts; higher is more diverse.

    Args:
        network: gives layers and distances.

    Example:
        >>> class Brightness:
        ...     def layers(self, image):
        ...         return [image.mean((1, 2, 3))]
        ...
        ...     def between(self, first, second):
        ...         return (first[0] - second[0]).abs()
        >>> metric = Diversity(Brightness())
        >>> metric.update(torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 0.5, 1.0)]))
        >>> round(metric.compute().item(), 6)  # (0.5 + 1 + 0.5) / 3
        0.666667
    """

    higher_is_better = True

    @torch.inference_mode()
    def update(self, images: Tensor) -> None:
        """Adds the images (k, 3, H, W) of one prompt, in [-1, 1]."""
        self.total += pairwise_distance(self.network, images)
        self.count += 1


def _normalised(layer: Tensor) -> Tensor:
    """Unit length over channels; the small number is added to the length, not under the root."""
    return layer / (layer.square().sum(1, keepdim=True).sqrt() + 1e-10)
