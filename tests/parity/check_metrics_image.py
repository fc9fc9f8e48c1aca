"""FID, KID, clean resizing and LPIPS against clean-fid, torchmetrics and lpips, on recorded features and images."""

import math
import re
from typing import Any

import lpips
import numpy as np
import torch
import torch.nn.functional as F
from cleanfid.resize import make_resizer
from torch import Tensor, nn

from metrics.distribution import FrechetDistance, FrechetReference, frechet_distance, kernel_distance
from metrics.distribution import mean_and_covariance as moments
from metrics.perceptual import layer_distance, perceptual_distance, perceptual_map
from trainers.nets.face_encoders import LPIPS

TIGHT = {"rtol": 1e-6, "atol": 1e-9}
# float32 sums that the official code adds in another order.
SINGLE = {"rtol": 2e-6, "atol": 1e-8}
EPS = torch.finfo(torch.float32).eps


def check(golden: Any) -> None:
    """Reproduces every recorded value."""
    check_frechet(golden)
    check_kernel(golden)
    check_resizing(golden)
    check_torchmetrics(golden)
    check_lpips(golden)


def check_frechet(golden: Any) -> None:
    """By both routes, also where covariances are singular."""
    a, b = golden.io["feats_a"], golden.io["feats_b"]
    mean, covariance = moments(a)
    golden.close("mu_a", mean, **TIGHT)
    golden.close("sigma_a", covariance, **TIGHT)
    doubled = [torch.cat([side, side[:, :4]], 1) for side in (a, b)]
    for name, x, y in (
        ("fid_a_b", a, b),
        ("fid_a_a", a, a),
        ("fid_singular", *doubled),
        ("fid_few", a[:10], b[:12]),
    ):
        golden.close(name, frechet_distance(*moments(x), *moments(y)), **TIGHT)
        golden.close(name, FrechetReference.of(x).distance(y), **TIGHT)


def check_kernel(golden: Any) -> None:
    """With clean-fid's draws, from the seed it was recorded with: the second set's indices come first."""
    a, b = golden.io["feats_a"], golden.io["feats_b"]
    for name in sorted(golden.io):
        if (found := re.fullmatch(r"kid_(\d+)_(\d+|full)", name)) is None:
            continue
        subsets, size = int(found[1]), min(len(a), len(b))
        if found[2] != "full":
            size = min(size, int(found[2]))
        state = np.random.RandomState(5)
        draws = []
        for _ in range(subsets):
            y = torch.from_numpy(state.choice(len(b), size, replace=False))
            x = torch.from_numpy(state.choice(len(a), size, replace=False))
            draws.append((x, y))
        golden.close(name, kernel_distance(a, b, draws).mean(), **TIGHT)
        if size == golden.io["kid_index_first_two"].shape[-1]:
            golden.close("kid_index_first_two", torch.stack([torch.stack([y, x]) for x, y in draws[:2]]))


def check_resizing(golden: Any) -> None:
    """clean-fid's resizer, called as our extractors call it; the size in a name is what the resizer was given."""
    image = golden.io["resize_in"].numpy()
    for name in sorted(golden.io):
        if found := re.fullmatch(r"resize_(PIL|PyTorch)_(\w+)_(float|quant)_(\d+)x(\d+)", name):
            library, kernel, kind, first, second = found.groups()
            resized = make_resizer(library, kind == "quant", kernel, (int(first), int(second)))(image)
            golden.close(name, torch.from_numpy(np.ascontiguousarray(resized)), **SINGLE)


def check_torchmetrics(golden: Any) -> None:
    """FID from sums and from features, of uint8 images and of float ones, and KID on its subsets."""
    matrix = golden.io["tm_matrix"]
    sides = [_pooled(golden.io[f"tm_{side}"].float(), matrix) for side in ("real", "fake")]
    float_sides = [_pooled(golden.io[f"tm_{side}"].float() / 255, matrix) for side in ("real", "fake")]
    for name, (real, fake) in (("tm_fid", sides), ("tm_fid_normalize", float_sides)):
        metric = FrechetDistance(real.shape[1])
        metric.update(real, real=True)
        metric.update(fake, real=False)
        precision = EPS * real.square().sum(1).mean().item()
        golden.close(name, metric.compute(), rtol=1e-6, atol=precision)
        golden.close(name, FrechetReference.of(real).distance(fake), rtol=1e-6, atol=precision)
    torch.manual_seed(6)
    real, fake = sides
    subsets = [(torch.randperm(len(real))[:20], torch.randperm(len(fake))[:20]) for _ in range(5)]
    distances = kernel_distance(real, fake, subsets)
    # torchmetrics takes differences of kernel values in float32.
    precision = 2 * EPS * _kernel(real, fake).mean().item()
    golden.close("tm_kid_mean", distances.mean(), rtol=1e-6, atol=precision)
    golden.close("tm_kid_std", distances.std(correction=0), rtol=1e-6, atol=precision)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _pooled(images: Tensor, matrix: Tensor) -> Tensor:
    """The recorded extractor: average pool of image / 255 to a square grid, times a matrix."""
    return F.adaptive_avg_pool2d(images / 255, math.isqrt(len(matrix) // images.shape[1])).flatten(1) @ matrix


class Convolutions(nn.Module):
    """The recorded trunk: 3 x 3 convolutions with ReLU, whose outputs are the layers."""

    def __init__(self, weights: dict[str, Tensor], strides: list[int]) -> None:
        super().__init__()
        shapes = [weights[f"net.c.{i}.weight"].shape for i in range(len(strides))]
        self.c = nn.ModuleList(
            nn.Conv2d(before, after, size, stride, size // 2)
            for (after, before, size, _), stride in zip(shapes, strides, strict=True)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        layers = []
        for convolution in self.c:
            image = convolution(image).relu()
            layers.append(image)
        return layers


@torch.no_grad()
def check_lpips(golden: Any) -> None:
    """Layers, their sum, the map and the variant without heads."""
    written = re.findall(r"\d+->\d+(?: stride (\d+))?", golden.config["lpips_backbone"])
    strides = [int(stride or 1) for stride in written]
    package = lpips.LPIPS(pretrained=False, pnet_rand=True, verbose=False)
    package.net = Convolutions(golden.weights, strides)
    package.lins = nn.ModuleList(
        lpips.NetLinLayer(golden.weights[f"lins.{i}.model.1.weight"].shape[1], use_dropout=True)
        for i in range(len(strides))
    )
    for i in range(5):
        delattr(package, f"lin{i}")
    package.load_state_dict(golden.weights)
    network = LPIPS(package).eval()

    x, y = golden.io["lpips_x"], golden.io["lpips_y"]
    layers = network.layers(x), network.layers(y)
    heads = network.heads
    golden.close("lpips_mean", network(x, y).view(-1, 1, 1, 1), **SINGLE)
    golden.close("lpips_mean", perceptual_distance(*layers, heads).view(-1, 1, 1, 1), **SINGLE)
    for i, (first, second, head) in enumerate(zip(*layers, heads, strict=True)):
        golden.close(f"lpips_layer{i}", layer_distance(first, second, head).mean((2, 3), keepdim=True), **SINGLE)
    unit = [(image + 1) / 2 for image in (x, y)]
    golden.close("lpips_normalize01", network(*(2 * image - 1 for image in unit)).view(-1, 1, 1, 1), **SINGLE)
    golden.close("lpips_spatial", perceptual_map(*layers, x.shape[-2:], heads), **SINGLE)
    golden.close("lpips_baseline_spatial", perceptual_map(*layers, x.shape[-2:]), **SINGLE)
