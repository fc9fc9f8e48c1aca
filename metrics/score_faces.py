"""Scores edited images under a protocol of the task ``face-editing``."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from datamodules.errors import UserError
from metrics import distribution, editing
from metrics.protocols import Protocol
from metrics.scoring import Scores, check_enough, metric_score


@dataclass(frozen=True)
class JudgedImages:
    """What the judges say of N images.

    Attributes:
        key: the photo each image comes from, length N.
        probabilities: (N, A) float32 attribute probabilities.
        identity: (N, D) float32 identity embeddings.
        features: (N, F) float32 features for FID and KID.
    """

    key: Sequence[str]
    probabilities: Tensor
    identity: Tensor
    features: Tensor


def score_editing(
    photos: JudgedImages,
    inversions: JudgedImages,
    edits: Iterable[tuple[str, float, JudgedImages]],
    protocol: Protocol,
    attributes: Sequence[str],
) -> Scores:
    """Scores edits at every strength, and at matched editing accuracy.

    The curve of an attribute starts with the inversion, at strength 0. Accuracy and values are averaged over the
    attributes at each strength; a value at matched accuracy is interpolated between the two strengths around the
    first crossing of the mean accuracy, and is None where that accuracy is never reached.

    Args:
        photos: the originals, in an order that the others keep.
        inversions: their reconstructions without an edit.
        edits: (attribute, strength, edited images), the strengths of an attribute rising.
        protocol: of the task ``face-editing``.
        attributes: names of the judge's attribute probabilities, length A.

    Raises:
        UserError: an attribute that the judge or the protocol does not know, images of other keys, values that
            are not finite, fewer than two images, an attribute without edits or with other strengths than the rest.
    """
    columns = {name: index for index, name in enumerate(attributes)}
    unknown = [name for name in protocol.spec["attributes"] if name not in columns]
    if unknown:
        raise UserError(f"protocol '{protocol.name}': the judge does not know {', '.join(unknown)}")
    _check_photos(photos, inversions, protocol)
    points = {
        name: [_judge(name, 0.0, inversions, photos, inversions, protocol, columns)]
        for name in protocol.spec["attributes"]
    }
    for attribute, strength, edited in edits:
        if attribute not in points:
            raise UserError(f"attribute '{attribute}': protocol '{protocol.name}' scores {', '.join(points)}")
        if strength <= points[attribute][-1].strength:
            raise UserError(f"attribute '{attribute}': strength {strength} does not rise above the one before")
        _check_images(f"edits of '{attribute}' at strength {strength}", edited, photos)
        points[attribute].append(_judge(attribute, strength, edited, photos, inversions, protocol, columns))

    grid = [point.strength for point in next(iter(points.values()))]
    for name, curve in points.items():
        if len(curve) == 1:
            raise UserError(f"attribute '{name}': no edits to score")
        if [point.strength for point in curve] != grid:
            raise UserError(f"attribute '{name}': edited at other strengths than '{next(iter(points))}'")
    return Scores(
        {
            name: _at_matched_accuracy(name, choices, points, photos.key, protocol)
            for name, choices in protocol.metrics.items()
        },
        [point.row(protocol) for curve in points.values() for point in curve],
    )


def score_inversion(
    photos: JudgedImages, inversions: JudgedImages, protocol: Protocol, attributes: Sequence[str]
) -> Scores:
    """Scores reconstructions that were not edited: what no editor in this latent space can exceed or be worse than.

    Arguments as for :func:`score_editing`.
    """
    _check_photos(photos, inversions, protocol)
    columns = {name: index for index, name in enumerate(attributes)}
    points = [
        _judge(name, 0.0, inversions, photos, inversions, protocol, columns) for name in protocol.spec["attributes"]
    ]
    scores = {}
    for name, choices in protocol.metrics.items():
        values = torch.stack([point.values[name] for point in points]).mean(0)
        scores[name] = _image_score(choices, protocol, values, photos.key)
    return Scores(scores, [point.row(protocol) for point in points])


@dataclass(frozen=True)
class _Point:
    """One attribute at one strength: of every metric the value (), or the values (N,) per image."""

    attribute: str
    strength: float
    accuracy: Tensor
    values: dict[str, Tensor]

    def row(self, protocol: Protocol) -> dict[str, Any]:
        means = {name: self.values[name].mean().item() for name in protocol.metrics}
        return {
            "attribute": self.attribute,
            "strength": self.strength,
            "accuracy": self.accuracy.mean().item(),
            **means,
        }


def _judge(
    attribute: str,
    strength: float,
    edited: JudgedImages,
    photos: JudgedImages,
    inversions: JudgedImages,
    protocol: Protocol,
    columns: Mapping[str, int],
) -> _Point:
    source = photos if protocol.spec["source"] == "photo" else inversions
    probabilities = source.probabilities, edited.probabilities
    kept = [columns[name] for name in protocol.spec["preserved"][attribute]]
    threshold = protocol.spec["threshold"]
    accuracy = editing.editing_accuracy(*probabilities, columns[attribute], threshold)
    values: dict[str, Tensor] = {}
    for name, choices in protocol.metrics.items():
        match choices["measure"]:
            case "editing_accuracy":
                values[name] = accuracy
            case "attribute_preservation":
                values[name] = editing.attribute_preservation(*probabilities, kept, threshold)
            case "identity_similarity":
                reference = photos if choices["reference"] == "photo" else inversions
                values[name] = editing.identity_similarity(reference.identity, edited.identity)
            case "frechet_distance":
                moments = [distribution.mean_and_covariance(side.features) for side in (photos, edited)]
                values[name] = distribution.frechet_distance(*moments[0], *moments[1])
            case "kernel_distance":
                distance = distribution.kernel_distance(photos.features, edited.features).mean()
                values[name] = distance * choices["scale"]
    return _Point(attribute, strength, accuracy, values)


def _at_matched_accuracy(
    name: str,
    choices: Mapping[str, Any],
    points: Mapping[str, list[_Point]],
    keys: Sequence[str],
    protocol: Protocol,
) -> dict[str, Any]:
    at_strength = list(zip(*points.values(), strict=True))
    accuracy = [torch.stack([point.accuracy.mean() for point in at]).mean().item() for at in at_strength]
    values = torch.stack([torch.stack([point.values[name] for point in at]).mean(0) for at in at_strength])
    if choices["measure"] == "editing_accuracy":
        return _image_score(choices, protocol, values[max(range(len(accuracy)), key=accuracy.__getitem__)], keys)
    matched = editing.value_at_accuracy(accuracy, values, protocol.spec["matched_accuracy"])
    return _image_score(choices, protocol, matched, keys)


def _image_score(
    choices: Mapping[str, Any], protocol: Protocol, values: Tensor | None, keys: Sequence[str]
) -> dict[str, Any]:
    if values is not None and values.ndim == 1:
        return metric_score(choices, protocol, dict(zip(keys, values.tolist(), strict=True)), "")
    score = metric_score(choices, protocol, {}, "")
    return score | {"value": None if values is None else values.item()}


def _check_photos(photos: JudgedImages, inversions: JudgedImages, protocol: Protocol) -> None:
    check_enough(len(photos.key), "images")
    if len(photos.key) != protocol.spec["images"]:
        raise UserError(
            f"photos: {len(photos.key)} images, but protocol '{protocol.name}' scores {protocol.spec['images']}"
        )
    _check_images("inversions", inversions, photos)


def _check_images(what: str, images: JudgedImages, photos: JudgedImages) -> None:
    if list(images.key) != list(photos.key):
        raise UserError(f"{what}: {len(images.key)} images with other keys than the {len(photos.key)} photos")
    for field_name in ("probabilities", "identity", "features"):
        finite = torch.isfinite(getattr(images, field_name)).all(1)
        if not finite.all():
            bad = images.key[int((~finite).nonzero()[0])]
            raise UserError(f"{what}: {field_name} of image '{bad}' are not finite (NaN or infinity)")
