"""Editing metrics: did the edit do what was asked, leave the rest alone and keep the person?

The definitions are AdaTrans' (ICCV 2023, evaluation). A judge network, never the one that guided a training,
gives attribute probabilities and identity embeddings. One number of an editor says little, because strength
trades accuracy against the rest: report the curve over strengths, and compare editors at matched accuracy.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric


def editing_accuracy(source: Tensor, edited: Tensor, target: int, threshold: float = 0.5) -> Tensor:
    """Whether the judge sees the asked attribute flipped.

    Args:
        source: (N, A) judge's attribute probabilities of the source images.
        edited: (N, A) the same of the edited images.
        target: index of the edited attribute.
        threshold: a probability above it counts as present.

    Returns:
        (N,) float64, 1 where the thresholded prediction is the opposite of the source's.

    Example:
        >>> editing_accuracy(torch.tensor([[0.9], [0.1]]), torch.tensor([[0.2], [0.3]]), 0).tolist()
        [1.0, 0.0]
    """
    return ((source[:, target] > threshold) != (edited[:, target] > threshold)).double()


def attribute_preservation(source: Tensor, edited: Tensor, kept: Sequence[int], threshold: float = 0.5) -> Tensor:
    """Share of the other attributes on which the judge agrees before and after.

    Args:
        source: (N, A) judge's attribute probabilities of the source images.
        edited: (N, A) the same of the edited images.
        kept: indices of the attributes to be kept.
        threshold: a probability above it counts as present.

    Returns:
        (N,) float64 in [0, 1].

    Example:
        >>> attribute_preservation(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.8, 0.7]]), [0, 1]).tolist()
        [0.5]
    """
    kept = list(kept)
    return ((source[:, kept] > threshold) == (edited[:, kept] > threshold)).double().mean(1)


def identity_similarity(reference: Tensor, edited: Tensor) -> Tensor:
    """Cosine of identity embeddings, of the photo (AdaTrans) or of its inversion, and of the edit.

    Args:
        reference: (N, D) embeddings.
        edited: (N, D) embeddings.

    Returns:
        (N,) float64 in [-1, 1].
    """
    return F.cosine_similarity(reference.double(), edited.double())


def value_at_accuracy(accuracy: Sequence[float], values: Tensor, target: float) -> Tensor | None:
    """A value at the strength where the accuracy first reaches the target, interpolated linearly between strengths.

    Args:
        accuracy: editing accuracy at S rising strengths.
        values: (S, ...) the values at these strengths, for instance per image.
        target: the accuracy to match, for instance 0.9.

    Returns:
        (...) float64; None where the target is never reached.

    Example:
        >>> value_at_accuracy([0.0, 0.8, 1.0], torch.tensor([1.0, 0.75, 0.25]), 0.9).item()
        0.5
        >>> value_at_accuracy([0.0, 0.8], torch.tensor([1.0, 0.9]), 0.9) is None
        True
    """
    values = values.double()
    for step, reached in enumerate(accuracy):
        if reached >= target:
            if step == 0:
                return values[0]
            before = accuracy[step - 1]
            fraction = (target - before) / (reached - before)
            return values[step - 1].lerp(values[step], fraction)
    return None


class MeanOverImages(Metric):
    """Mean of a value per image; the state is a float64 sum and a count."""

    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Adds one value per image, (N,)."""
        self.total += values.double().sum()
        self.count += len(values)

    def compute(self) -> Tensor:
        """The mean, () float64; NaN before the first image."""
        return self.total / self.count


class EditingAccuracy(MeanOverImages):
    """:func:`editing_accuracy` over a test set.

    Args:
        target: index of the edited attribute.
    """

    def __init__(self, target: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.target = target

    def update(self, source: Tensor, edited: Tensor) -> None:
        """Adds the judge's probabilities (N, A) of source and edited images."""
        self.add(editing_accuracy(source, edited, self.target))


class AttributePreservation(MeanOverImages):
    """:func:`attribute_preservation` over a test set.

    Args:
        kept: indices of the attributes to be kept.
    """

    def __init__(self, kept: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kept = list(kept)

    def update(self, source: Tensor, edited: Tensor) -> None:
        """Adds the judge's probabilities (N, A) of source and edited images."""
        self.add(attribute_preservation(source, edited, self.kept))


class IdentitySimilarity(MeanOverImages):
    """:func:`identity_similarity` over a test set."""

    def update(self, reference: Tensor, edited: Tensor) -> None:
        """Adds identity embeddings (N, D) of reference and edited images."""
        self.add(identity_similarity(reference, edited))
