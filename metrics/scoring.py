"""Scorers: predictions and a protocol in, scores with their values per sample out.

Scores are plain dictionaries, ready for a line of ``results.jsonl``: for each metric its ``value``, ``unit``,
``higher_is_better`` and, where the metric has a value for each clip or image, ``per_sample`` and the ``weights``
(frames) of a metric that pools frames. The value is the (weighted) mean of the values per sample.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from datamodules.errors import UserError
from metrics import distribution, editing, motion
from metrics.protocols import MEASURES, MILLIMETRES, Protocol

log = logging.getLogger(__name__)

Clip = tuple[str, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Scores:
    """What a scorer gives.

    Attributes:
        metrics: name to value, unit, direction, values per sample.
        curve: for face editing, one row for each attribute and strength.
        dropped_frames: for speech, frames cut off by the protocol's rule for clips of another length, by key.
    """

    metrics: dict[str, dict[str, Any]]
    curve: list[dict[str, Any]] = field(default_factory=list)
    dropped_frames: dict[str, int] = field(default_factory=dict)


def score_speech(clips: Iterable[Clip], protocol: Protocol, regions: Mapping[str, ArrayLike]) -> Scores:
    """Scores predicted motion; holds one clip at a time, and one number per clip and metric.

    Args:
        clips: (key, predicted (T, V, 3), truth (T', V, 3), template (V, 3)), in the protocol's coordinates.
        protocol: of the task ``speech-to-mesh``.
        regions: name to vertex indices.

    Raises:
        UserError: a prediction that is not finite, another topology, a length that the protocol refuses, an empty
            or other region, fewer than two clips, the same key twice.
    """
    protocol = protocol.bind_regions(regions)
    indices = {name: torch.as_tensor(regions[name]).long() for name in protocol.spec["regions"]}
    values: dict[str, dict[str, float]] = {name: {} for name in protocol.metrics}
    frames: dict[str, int] = {}
    dropped: dict[str, int] = {}
    for key, predicted, truth, template in clips:
        if key in frames:
            raise UserError(f"clip '{key}': predicted twice")
        _check_clip(key, predicted, truth, template, protocol)
        predicted, truth, cut = _same_length(key, predicted, truth, protocol)
        if cut:
            dropped[key] = cut
        frames[key] = len(truth)
        for name, choices in protocol.metrics.items():
            values[name][key] = _clip_error(choices, predicted, truth, template, indices).mean().item()
    _enough(len(frames), "clips")
    if dropped:
        log.warning(
            "%d of %d clips had another length than the truth; %d frames cut off (%s)",
            *(len(dropped), len(frames), sum(dropped.values()), protocol.spec["length_mismatch"]),
        )

    scale = MILLIMETRES[protocol.spec["coordinates"]] / MILLIMETRES[protocol.spec["unit"]]
    scores = {}
    for name, choices in protocol.metrics.items():
        power = 2 if choices.get("variant") == "squared" or "signed" in choices else 1
        unit = protocol.spec["unit"] + ("²" if power == 2 else "")
        per_sample = {key: value * scale**power for key, value in values[name].items()}
        weights = frames if choices["pooling"] == "frames" else None
        scores[name] = _score(choices, protocol, per_sample, unit, weights)
    return Scores(scores, dropped_frames=dropped)


def neutral_motion(truth: Tensor, template: Tensor) -> Tensor:
    """The floor of every animation: the template, held for the truth's frames. (T, V, 3)."""
    return template.expand(len(truth), -1, -1)


def mean_motion(truth: Tensor, template: Tensor, mean_offset: Tensor) -> Tensor:
    """The floor of every trained animation: template plus the training set's :func:`mean_offset`, held."""
    return (template + mean_offset).expand(len(truth), -1, -1)


def mean_offset(clips: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean offset from the template over all frames of (vertices (T, V, 3), template (V, 3)): (V, 3) float32."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for vertices, template in clips:
        total = total + (vertices.double() - template.double()).sum(0)
        count += len(vertices)
    if count == 0:
        raise UserError("mean motion: no training clips")
    return (total / count).float()


def _check_clip(key: str, predicted: Tensor, truth: Tensor, template: Tensor, protocol: Protocol) -> None:
    expected = (protocol.spec["vertices"], 3)
    for what, vertices in (("prediction", predicted), ("truth", truth), ("template", template[None])):
        if vertices.ndim != 3 or tuple(vertices.shape[1:]) != expected:
            raise UserError(
                f"clip '{key}': {what} has shape {tuple(vertices.shape)}, but protocol '{protocol.name}' is for "
                f"{protocol.spec['topology']}, (T, {expected[0]}, 3); score with a protocol of this topology"
            )
        if len(vertices) == 0:
            raise UserError(f"clip '{key}': {what} has no frames")
        if not torch.isfinite(vertices).all():
            raise UserError(f"clip '{key}': {what} holds values that are not finite (NaN or infinity)")


def _same_length(key: str, predicted: Tensor, truth: Tensor, protocol: Protocol) -> tuple[Tensor, Tensor, int]:
    """Both cut by the protocol's rule, and how many frames fell away."""
    difference = abs(len(predicted) - len(truth))
    rule = protocol.spec["length_mismatch"]
    too_short = rule == "cut the prediction" and len(predicted) < len(truth)
    if too_short or (rule == "refuse" and difference):
        raise UserError(
            f"clip '{key}': {len(predicted)} frames predicted, expected {len(truth)}; "
            f"protocol '{protocol.name}' says: {rule}"
        )
    shorter = min(len(predicted), len(truth))
    return predicted[:shorter], truth[:shorter], difference


def _clip_error(
    choices: Mapping[str, Any], predicted: Tensor, truth: Tensor, template: Tensor, regions: Mapping[str, Tensor]
) -> Tensor:
    match choices["measure"]:
        case "lip_vertex_error":
            lips, variant, over = regions[choices["region"]], choices["variant"], choices["over_vertices"]
            return motion.lip_vertex_error(predicted, truth, lips, variant, over)
        case "mean_vertex_error":
            return motion.mean_vertex_error(predicted, truth)
        case "face_dynamics_deviation":
            region = regions[choices["region"]]
            return motion.face_dynamics_deviation(predicted, truth, template, region, choices["signed"])
        case "mouth_opening_difference":
            upper, lower = regions[choices["upper_lip"]], regions[choices["lower_lip"]]
            return motion.mouth_opening_difference(predicted, truth, upper, lower)
    raise ValueError(f"unknown measure {choices['measure']}")


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

    The curve of an attribute starts with the inversion, at strength 0. A value at matched accuracy is interpolated
    between the two strengths around the first crossing, attribute by attribute, then averaged over attributes; it
    is None where an attribute never reaches that accuracy.

    Args:
        photos: the originals, in an order that the others keep.
        inversions: their reconstructions without an edit.
        edits: (attribute, strength, edited images), the strengths of an attribute rising.
        protocol: of the task ``face-editing``.
        attributes: names of the judge's attribute probabilities, length A.

    Raises:
        UserError: an attribute that the judge or the protocol does not know, images of other keys, values that
            are not finite, fewer than two images, an attribute without edits.
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

    without = [name for name, curve in points.items() if len(curve) == 1]
    if without:
        raise UserError(f"attribute '{without[0]}': no edits to score")
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
    matched: list[Tensor | None] = []
    for curve in points.values():
        accuracy = [point.accuracy.mean().item() for point in curve]
        values = torch.stack([point.values[name] for point in curve])
        if choices["measure"] == "editing_accuracy":
            matched.append(values[max(range(len(curve)), key=accuracy.__getitem__)])
        else:
            matched.append(editing.value_at_accuracy(accuracy, values, protocol.spec["matched_accuracy"]))
    reached = [value for value in matched if value is not None]
    mean = torch.stack(reached).mean(0) if len(reached) == len(matched) else None
    return _image_score(choices, protocol, mean, keys)


def _image_score(
    choices: Mapping[str, Any], protocol: Protocol, values: Tensor | None, keys: Sequence[str]
) -> dict[str, Any]:
    if values is not None and values.ndim == 1:
        return _score(choices, protocol, dict(zip(keys, values.tolist(), strict=True)), "")
    score = _score(choices, protocol, {}, "")
    return score | {"value": None if values is None else values.item()}


def _check_photos(photos: JudgedImages, inversions: JudgedImages, protocol: Protocol) -> None:
    _enough(len(photos.key), "images")
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


def _enough(number: int, what: str) -> None:
    if number < 2:
        raise UserError(f"scoring needs at least 2 {what}, found {number}")


def _score(
    choices: Mapping[str, Any],
    protocol: Protocol,
    per_sample: dict[str, float],
    unit: str,
    weights: dict[str, int] | None = None,
) -> dict[str, Any]:
    direction = MEASURES[protocol.task][choices["measure"]].higher_is_better
    score: dict[str, Any] = {
        "value": None,
        "unit": unit,
        "higher_is_better": None if choices.get("signed") else direction,
        "per_sample": per_sample,
    }
    if per_sample:
        weight = weights or dict.fromkeys(per_sample, 1)
        total = sum(weight[key] * value for key, value in per_sample.items())
        score["value"] = total / sum(weight[key] for key in per_sample)
    if weights is not None:
        score["weights"] = weights
    return score
