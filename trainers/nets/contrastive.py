"""Embeddings of two kinds that shall agree: losses and comparisons."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize


def contrastive_loss(one: Tensor, other: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric cross-entropy of which rows belong together (Radford et al. 2021; InfoNCE in both directions).

    Args:
        one: (B, D) embeddings.
        other: (B, D), row by row their partners.
        scale: of the cosines, inverse of the temperature.
    """
    logits = scale * cosines(one, other)
    own = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Cosines between all rows of (A, D) and of (B, D): (A, B)."""
    return normalize(one, dim=1) @ normalize(other, dim=1).T


def class_means(embedding: Tensor, label: Tensor, classes: int) -> Tensor:
    """(classes, D) mean unit vectors of the embeddings (N, D) with each label (N,); zero where there is none."""
    unit = normalize(embedding, dim=1)
    sums = unit.new_zeros(classes, unit.shape[1]).index_add(0, label, unit)
    return sums / torch.bincount(label, minlength=classes).clamp(min=1)[:, None]
