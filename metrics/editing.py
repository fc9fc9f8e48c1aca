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


def value_at_accuracy(
    accuracy: Sequence[float], values: Tensor, target: float, per_image: Tensor | None = None
) -> Tensor | None:
    """A value at the strength where the accuracy first reaches the target, interpolated linearly between strengths.

    Args:
        accuracy: editing accuracy at S rising strengths.
        values: (S, ...) the values at these strengths, for instance per image.
        target: the accuracy to match, for instance 0.9.
        per_image: (S, N) the accuracies whose means are ``accuracy``. With them the values (S, N) of images also hold
            what each image does to the strength at which the target is reached; see :func:`_at_level`.

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
            return values[0] if step == 0 else _at_level(accuracy, values, step, target, per_image)
    return None


def area_under_curve(
    accuracy: Sequence[float], values: Tensor, target: float, per_image: Tensor | None = None
) -> Tensor | None:
    """The mean of a value over all editing accuracies from 0 to the target: the area of the trade-off curve.

    The curve gives each accuracy the value at the strength where it is first reached, as :func:`value_at_accuracy`
    does, and the area under it is divided by the target, so that it has the value's own unit and range. Accuracies
    below that of the weakest strength have that strength's value.

    Args:
        accuracy: editing accuracy at S rising strengths.
        values: (S, ...) the values at these strengths, for instance per image.
        target: the largest accuracy, for instance 0.9.
        per_image: as in :func:`value_at_accuracy`.

    Returns:
        (...) float64; None where the target is never reached, since areas over other ranges do not compare.

    Example:
        >>> area_under_curve([0.0, 0.5, 1.0], torch.tensor([1.0, 1.0, 0.5]), 1.0).item()  # 0.5 · 1 + 0.5 · 0.75
        0.875
    """
    values = values.double()
    reached, area = min(accuracy[0], target), min(accuracy[0], target) * values[0]
    for step in range(1, len(accuracy)):
        if reached >= target:
            break
        if accuracy[step] <= reached:
            continue
        end = min(accuracy[step], target)
        ends = [_at_level(accuracy, values, step, level, per_image) for level in (reached, end)]
        area = area + (end - reached) * (ends[0] + ends[1]) / 2
        reached = end
    return area / target if reached >= target else None


def _at_level(accuracy: Sequence[float], values: Tensor, step: int, level: float, per_image: Tensor | None) -> Tensor:
    """The values where the accuracy is ``level``, between the strengths ``step`` - 1 and ``step``.

    The mean value V at a matched accuracy A depends on the images twice: by their values v, and by their accuracies a,
    which decide the strength. To first order an image's part in it is v − (dV / dA) (a − A) there. Its mean is V, and
    it varies between images as V does between sets of images, which is what a bootstrap has to draw.
    """
    before, after = accuracy[step - 1], accuracy[step]
    fraction = (level - before) / (after - before)
    value = values[step - 1].lerp(values[step], fraction)
    if per_image is None:
        return value
    slope = (values[step] - values[step - 1]).mean() / (after - before)
    return value - slope * (per_image[step - 1].lerp(per_image[step], fraction) - level)


def mask_accuracy(parsed: Tensor, condition: Tensor) -> Tensor:
    """Share of pixels whose class, parsed from the generated image, is that of the mask it was made from.

    Collaborative Diffusion (CVPR 2023) and M3Face report it; the parser is a judge and belongs to the protocol.

    Args:
        parsed: (N, H, W) integer classes.
        condition: (N, H, W) the classes asked for.

    Returns:
        (N,) float64 in [0, 1].

    Example:
        >>> mask_accuracy(torch.tensor([[[0, 1], [2, 2]]]), torch.tensor([[[0, 1], [2, 0]]])).tolist()
        [0.75]
    """
    return (parsed == condition).flatten(1).double().mean(1)


def landmark_error(predicted: Tensor, truth: Tensor, eyes: tuple[int, int] = (36, 45)) -> Tensor:
    """Mean distance of landmarks, over the distance between the outer corners of the eyes.

    mean_k ‖p_k − t_k‖ / ‖t_left − t_right‖, the inter-ocular normalisation of the 300-W challenge (Sagonas et al.,
    ICCV Workshops 2013).

    Args:
        predicted: (N, K, 2) landmarks of the generated images.
        truth: (N, K, 2) landmarks asked for, in the same unit.
        eyes: the two outer eye corners; the default is that of the 68 points.

    Returns:
        (N,) float64, 0 at best.

    Example:
        >>> truth = torch.tensor([[[0.0, 0.0], [4.0, 0.0]]])
        >>> landmark_error(truth + torch.tensor([3.0, 4.0]), truth, eyes=(0, 1)).tolist()
        [1.25]
    """
    predicted, truth = predicted.double(), truth.double()
    scale = (truth[:, eyes[0]] - truth[:, eyes[1]]).norm(dim=1)
    return (predicted - truth).norm(dim=2).mean(1) / scale


def relative_recognition(similarity: Tensor) -> Tensor:
    """Relative face recognition rate: how often each system comes closest to the real person.

    For each caption a recognition network compares every system's face with the real photo; the system of the
    largest cosine gets the point, and systems that tie share it. Over all systems the rates sum to 1, so they say
    nothing without the list of systems compared. AnyFace (CVPR 2022) reports it; its exact definition is not
    published, this is the one its description implies.

    Args:
        similarity: (S, N) cosines to the photo, of S systems on N captions.

    Returns:
        (S, N) float64, the points; their mean over captions is the rate.

    Example:
        >>> relative_recognition(torch.tensor([[0.9, 0.5], [0.1, 0.5]])).mean(1).tolist()
        [0.75, 0.25]
    """
    best = similarity == similarity.amax(0)
    return best.double() / best.sum(0)


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

    Example:
        >>> metric = EditingAccuracy(0)
        >>> metric.update(torch.tensor([[0.9], [0.1]]), torch.tensor([[0.2], [0.3]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
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

    Example:
        >>> metric = AttributePreservation([0, 1])
        >>> metric.update(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.8, 0.7]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(self, kept: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kept = list(kept)

    def update(self, source: Tensor, edited: Tensor) -> None:
        """Adds the judge's probabilities (N, A) of source and edited images."""
        self.add(attribute_preservation(source, edited, self.kept))


class IdentitySimilarity(MeanOverImages):
    """:func:`identity_similarity` over a test set.

    Example:
        >>> metric = IdentitySimilarity()
        >>> metric.update(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]))
        >>> round(metric.compute().item(), 6)
        0.8
    """

    def update(self, reference: Tensor, edited: Tensor) -> None:
        """Adds identity embeddings (N, D) of reference and edited images."""
        self.add(identity_similarity(reference, edited))


class MaskAccuracy(MeanOverImages):
    """:func:`mask_accuracy` over a test set.

    Example:
        >>> metric = MaskAccuracy()
        >>> metric.update(torch.tensor([[[0, 1], [2, 2]]]), torch.tensor([[[0, 1], [2, 0]]]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    def update(self, parsed: Tensor, condition: Tensor) -> None:
        """Adds the parsed and the asked-for classes (N, H, W)."""
        self.add(mask_accuracy(parsed, condition))


class LandmarkError(MeanOverImages):
    """:func:`landmark_error` over a test set.

    Args:
        eyes: the two outer eye corners.

    Example:
        >>> metric = LandmarkError(eyes=(0, 1))
        >>> metric.update(torch.tensor([[[0.0, 1.0], [4.0, 1.0]]]), torch.tensor([[[0.0, 0.0], [4.0, 0.0]]]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, eyes: tuple[int, int] = (36, 45), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.eyes = eyes

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        """Adds landmarks (N, K, 2) of generated images and those asked for."""
        self.add(landmark_error(predicted, truth, self.eyes))


class RelativeRecognition(Metric):
    """:func:`relative_recognition` over a test set; the state is a float64 sum for each system and a count.

    Args:
        systems: how many are compared.

    Example:
        >>> metric = RelativeRecognition(2)
        >>> metric.update(torch.tensor([[0.9, 0.5], [0.1, 0.5]]))
        >>> metric.compute()
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """

    higher_is_better = True
    full_state_update = False
    points: Tensor
    count: Tensor

    def __init__(self, systems: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("points", torch.zeros(systems, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, similarity: Tensor) -> None:
        """Adds cosines (S, N) to the photos, a row for each system."""
        self.points += relative_recognition(similarity).sum(1)
        self.count += similarity.shape[1]

    def compute(self) -> Tensor:
        """The rates, (S,) float64."""
        return self.points / self.count
