"""Random changes that leave a face's attributes and identity as they are.

Classifiers that see only clean pictures misjudge generated and inverted ones, which are blurred, noisy and off in
colour: those are the changes made here, one draw per image. Images are (B, 3, H, W) in [-1, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(image: Tensor) -> Tensor:
    """Mirrors, shifts, changes colours, blurs and adds noise."""
    for change in (mirror, shift, change_colours, blur, add_noise):
        image = change(image)
    return image.clamp(-1, 1)


def mirror(image: Tensor) -> Tensor:
    """Left becomes right in half of the images."""
    return torch.where(_uniform(image, 0, 1) < 0.5, image.flip(3), image)


def shift(image: Tensor, reach: float = 0.04) -> Tensor:
    """Moves by up to ``reach`` of the side and scales by as much; the border is repeated."""
    B = len(image)
    transform = torch.zeros(B, 2, 3, device=image.device)
    transform[:, 0, 0] = transform[:, 1, 1] = _uniform(image, 1 - 2 * reach, 1 + 2 * reach).flatten()
    transform[:, 0, 2] = _uniform(image, -2 * reach, 2 * reach).flatten()
    transform[:, 1, 2] = _uniform(image, -2 * reach, 2 * reach).flatten()
    grid = F.affine_grid(transform, list(image.shape), align_corners=False)
    return F.grid_sample(image, grid.to(image.dtype), padding_mode="border", align_corners=False)


def change_colours(image: Tensor, strength: float = 0.15) -> Tensor:
    """Changes brightness, contrast and saturation, each by up to ``strength``."""
    image = image + _uniform(image, -strength, strength)
    mean = image.mean((1, 2, 3), keepdim=True)
    image = mean + (image - mean) * _uniform(image, 1 - strength, 1 + strength)
    grey = image.mean(1, keepdim=True)
    return grey + (image - grey) * _uniform(image, 1 - strength, 1 + strength)


def blur(image: Tensor, most: float = 0.6) -> Tensor:
    """Mixes each image with itself at half the resolution."""
    half = F.interpolate(F.avg_pool2d(image, 2), image.shape[-2:], mode="bilinear")
    return torch.lerp(image, half, (_uniform(image, -most, most)).clamp(min=0))


def add_noise(image: Tensor, most: float = 0.04) -> Tensor:
    """Adds normal noise of a standard deviation up to ``most``."""
    return image + torch.randn_like(image) * _uniform(image, 0, most)


def _uniform(image: Tensor, low: float, high: float) -> Tensor:
    """(B, 1, 1, 1) one draw per image."""
    return torch.empty(len(image), 1, 1, 1, device=image.device).uniform_(low, high)
