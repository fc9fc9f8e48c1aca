"""Scores edited images (task ``face-editing``) and generated ones (task ``text-to-face``) under a protocol.

The judges have looked at every image once; everything here is computed from what they said.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from datamodules.errors import UserError
from metrics import alignment, distribution, editing
from metrics.protocols import Protocol
from metrics.references import Reference
from metrics.scoring import Scores, check_enough, metric_score
from metrics.statistics import jackknife


@dataclass(frozen=True)
class JudgedImages:
    """What the judges say of N images.

    Attributes:
        key: the photo each image comes from, length N.
        probabilities: (N, A) float32 attribute probabilities.
        identity: (N, D) float32 identity embeddings.
        features: (N, F) float32 features for FID and KID.
        perceptual: (N,) float32 perceptual distance to the photo's inversion; None of the photos themselves, and where
            the protocol has no such judge.
    """

    key: Sequence[str]
    probabilities: Tensor
    identity: Tensor
    features: Tensor
    perceptual: Tensor | None = None


@dataclass(frozen=True)
class GeneratedImages:
    """What the judges say of N generated images, one for each caption.

    A judge that the protocol does not name has None.

    Attributes:
        key: the sample each caption is of, length N, in the order of the test set.
        caption: the captions, length N.
        extractor: SHA-256 of the weights that ``features`` come from.
        features: (N, F) float32 features for distances of two sets.
        image_embedding: (N, D) float32 of the images.
        text_embedding: (N, D) float32 of the captions.
        identity: (N,) cosine of identity embeddings with the real image.
        distance_to_real: (N,) perceptual distance to the real image.
        diversity: (N,) mean perceptual distance between all images of the caption.
        landmarks: (N, 2, K, 2) of the generated and the real image, x and y in pixels.
        mask_accuracy: (N,) share of pixels that show the part of the face that the mask says.
    """

    key: Sequence[str]
    caption: Sequence[str]
    extractor: str
    features: Tensor
    image_embedding: Tensor | None = None
    text_embedding: Tensor | None = None
    identity: Tensor | None = None
    distance_to_real: Tensor | None = None
    diversity: Tensor | None = None
    landmarks: Tensor | None = None
    mask_accuracy: Tensor | None = None


def score_generation(reference: Reference, generated: GeneratedImages, protocol: Protocol) -> Scores:
    """Scores generated images against a set of real ones and against their captions.

    Args:
        reference: statistics of the real images.
        generated: what the judges say.
        protocol: of the task ``text-to-face``.

    Raises:
        UserError: another number of images than the protocol says, fewer than two, values that are not finite,
            statistics of another extractor, or a metric that asks for more images or captions than there are.
    """
    spec = protocol.spec
    check_enough(len(generated.key), "images")
    if len(generated.key) != spec["images"]:
        raise UserError(
            f"predictions: {len(generated.key)} images, but protocol '{protocol.name}' scores {spec['images']}"
        )
    reference.check_extractor(generated.extractor)
    for field_name, value in vars(generated).items():
        if isinstance(value, Tensor):
            finite = torch.isfinite(value).reshape(len(value), -1).all(1)
            if not finite.all():
                bad = generated.key[int((~finite).nonzero()[0])]
                raise UserError(f"predictions: {field_name} of image '{bad}' is not finite (NaN or infinity)")

    frechet = distribution.FrechetReference(reference.mean, reference.covariance)
    neighbours: dict[int, distribution.NeighbourScores] = {}
    scores = {}
    for name, choices in protocol.metrics.items():
        left_out = None
        match choices["measure"]:
            case "relative_recognition":  # of one system among others: see sweeps.leaderboard
                continue
            case "frechet_distance":
                value = frechet.distance(generated.features)
                groups = distribution.jackknife_groups(len(generated.key), choices["jackknife_groups"])
                left_out = frechet.jackknife(generated.features, groups)
            case "frechet_distance_at":
                value = frechet.at(generated.features, [choices["images"]], choices["seed"])[0]
            case "frechet_distance_at_infinity":
                value = frechet.infinity(generated.features, choices["smallest"], choices["points"], choices["seed"])
            case "kernel_distance":
                sides, draws = (reference.features, generated.features), None
                if choices["subsets"]:
                    drawn = choices["subsets"], choices["subset_size"], choices["seed"]
                    draws = distribution.random_subsets(*sides, *drawn)
                value = distribution.kernel_distance(*sides, draws).mean() * choices["scale"]
            case "neighbour_score":
                k = choices["k"]
                if k not in neighbours:
                    neighbours[k] = distribution.neighbour_scores(reference.features, generated.features, k)
                value = getattr(neighbours[k], choices["part"])
            case "clip_score":
                value = alignment.clip_score(*_embeddings(generated), choices["variant"])
            case "r_precision":
                embeddings, captions = _embeddings(generated), alignment.caption_numbers(generated.caption)
                if choices["style"] == "batches":
                    value = alignment.batch_r_precision(*embeddings, captions, choices["candidates"])
                else:
                    value = alignment.r_precision(*embeddings, captions, choices["candidates"], choices["seed"])
            case "identity_similarity":
                value = _given(generated.identity, name)
            case "landmark_error":
                found, truth = _given(generated.landmarks, name).unbind(1)
                value = editing.landmark_error(found, truth, choices["eyes"])
            case measure:
                value = _given(getattr(generated, measure), name)
        scores[name] = _image_score(choices, protocol, value, generated.key[: value.numel()], left_out)
    return Scores(scores)


def _embeddings(generated: GeneratedImages) -> tuple[Tensor, Tensor]:
    return _given(generated.image_embedding, "image_embedding"), _given(generated.text_embedding, "text_embedding")


def _given(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"{name}: its judge was not asked")
    return value.double()


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
    first crossing of the mean accuracy, and is None where that accuracy is never reached. Error bars draw ``drawn``
    instead of the values per image, which leave out that another set of images is matched at another strength.

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
    sources = _Sources.of(photos, inversions)
    points = {name: [_judge(name, 0.0, inversions, sources, protocol, columns)] for name in protocol.spec["attributes"]}
    for attribute, strength, edited in edits:
        if attribute not in points:
            raise UserError(f"attribute '{attribute}': protocol '{protocol.name}' scores {', '.join(points)}")
        if strength <= points[attribute][-1].strength:
            raise UserError(f"attribute '{attribute}': strength {strength} does not rise above the one before")
        _check_images(f"edits of '{attribute}' at strength {strength}", edited, photos)
        points[attribute].append(_judge(attribute, strength, edited, sources, protocol, columns))

    grid = [point.strength for point in next(iter(points.values()))]
    for name, curve in points.items():
        if len(curve) == 1:
            raise UserError(f"attribute '{name}': no edits to score")
        if [point.strength for point in curve] != grid:
            raise UserError(f"attribute '{name}': edited at other strengths than '{next(iter(points))}'")
    at_strength = list(zip(*points.values(), strict=True))
    accuracy = [torch.stack([point.accuracy.mean() for point in at]).mean().item() for at in at_strength]

    def over_strengths(kind: str, name: str) -> Tensor:
        """(S, ...) averaged over the attributes."""
        return torch.stack([torch.stack([getattr(point, kind)[name] for point in at]).mean(0) for at in at_strength])

    per_image = torch.stack([torch.stack([point.accuracy for point in at]).mean(0) for at in at_strength])

    scores, target = {}, protocol.spec["matched_accuracy"]
    for name, choices in protocol.metrics.items():
        if choices["measure"] == "editing_accuracy":
            value = over_strengths("values", name)[accuracy.index(max(accuracy))]
            scores[name] = _image_score(choices, protocol, value, photos.key)
            continue
        match = editing.area_under_curve if choices["measure"] == "area_under_curve" else editing.value_at_accuracy
        values = over_strengths("values", choices.get("of", name))
        matched = match(accuracy, values, target)
        left_out = None
        if choices["measure"] == "frechet_distance" and matched is not None:
            groups = distribution.jackknife_groups(len(photos.key), choices["jackknife_groups"])
            left_out = _without_each_group(per_image, over_strengths("left_out", name), groups, target)
        scores[name] = _image_score(choices, protocol, matched, photos.key, left_out)
        if matched is not None and values.ndim == 2:
            drawn = match(accuracy, values, target, per_image)
            assert drawn is not None
            scores[name]["drawn"] = dict(zip(photos.key, drawn.tolist(), strict=True))
    return Scores(scores, [point.row() for curve in points.values() for point in curve])


def _without_each_group(per_image: Tensor, left_out: Tensor, groups: Tensor, target: float) -> Tensor | None:
    """(G,) values at matched accuracy of the photos without each group; None where some do not reach it.

    Args:
        per_image: (S, N) accuracies.
        left_out: (S, G) values without each group.
        groups: (N,) of each photo.
        target: the accuracy to match.
    """
    values = [
        editing.value_at_accuracy(per_image[:, groups != group].mean(1).tolist(), of_group, target)
        for group, of_group in enumerate(left_out.unbind(1))
    ]
    return None if None in values else torch.stack(values)  # type: ignore[arg-type]


def score_inversion(
    photos: JudgedImages, inversions: JudgedImages, protocol: Protocol, attributes: Sequence[str]
) -> Scores:
    """Scores reconstructions that were not edited: what no editor in this latent space can exceed or be worse than.

    Arguments as for :func:`score_editing`.
    """
    _check_photos(photos, inversions, protocol)
    columns = {name: index for index, name in enumerate(attributes)}
    sources = _Sources.of(photos, inversions)
    points = [_judge(name, 0.0, inversions, sources, protocol, columns) for name in protocol.spec["attributes"]]
    scores = {}
    for name, choices in protocol.metrics.items():
        # Without an edit the curve is one point, and its area the value there.
        values = torch.stack([point.values[choices.get("of", name)] for point in points]).mean(0)
        left_out = points[0].left_out.get(name)  # of the inversions, which are the same for every attribute
        scores[name] = _image_score(choices, protocol, values, photos.key, left_out)
    return Scores(scores, [point.row() for point in points])


@dataclass(frozen=True)
class _Sources:
    """What every edit is compared with."""

    photos: JudgedImages
    inversions: JudgedImages
    reference: distribution.FrechetReference

    @classmethod
    def of(cls, photos: JudgedImages, inversions: JudgedImages) -> "_Sources":
        return cls(photos, inversions, distribution.FrechetReference.of(photos.features))

    def named(self, name: str) -> JudgedImages:
        return self.photos if name == "photo" else self.inversions


@dataclass(frozen=True)
class _Point:
    """One attribute at one strength: of every metric the value (), or the values (N,) per image.

    A Fréchet distance also has its values (G,) with one group of photos left out.
    """

    attribute: str
    strength: float
    accuracy: Tensor
    values: dict[str, Tensor]
    left_out: dict[str, Tensor]

    def row(self) -> dict[str, Any]:
        means = {name: value.mean().item() for name, value in self.values.items()}
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
    sources: _Sources,
    protocol: Protocol,
    columns: Mapping[str, int],
) -> _Point:
    probabilities = sources.named(protocol.spec["source"]).probabilities, edited.probabilities
    kept = [columns[name] for name in protocol.spec["preserved"][attribute]]
    threshold = protocol.spec["threshold"]
    accuracy = editing.editing_accuracy(*probabilities, columns[attribute], threshold)
    values: dict[str, Tensor] = {}
    left_out: dict[str, Tensor] = {}
    for name, choices in protocol.metrics.items():
        match choices["measure"]:
            case "editing_accuracy":
                values[name] = accuracy
            case "attribute_preservation":
                values[name] = editing.attribute_preservation(*probabilities, kept, threshold)
            case "identity_similarity":
                reference = sources.named(choices["reference"])
                values[name] = editing.identity_similarity(reference.identity, edited.identity)
            case "perceptual_distance":
                assert edited.perceptual is not None  # a protocol with this measure names the judge
                values[name] = edited.perceptual.double()
            case "frechet_distance":
                values[name] = sources.reference.distance(edited.features)
                groups = distribution.jackknife_groups(len(edited.key), choices["jackknife_groups"])
                left_out[name] = sources.reference.jackknife(edited.features, groups)
            case "kernel_distance":
                distance = distribution.kernel_distance(sources.photos.features, edited.features).mean()
                values[name] = distance * choices["scale"]
    return _Point(attribute, strength, accuracy, values, left_out)


def _image_score(
    choices: Mapping[str, Any],
    protocol: Protocol,
    values: Tensor | None,
    keys: Sequence[str],
    left_out: Tensor | None = None,
) -> dict[str, Any]:
    choices = protocol.metrics[choices["of"]] if choices["measure"] == "area_under_curve" else choices
    if values is not None and values.ndim == 1:
        return metric_score(choices, protocol, dict(zip(keys, values.tolist(), strict=True)), "")
    score = metric_score(choices, protocol, {}, "") | {"value": None if values is None else values.item()}
    return score if left_out is None else score | {"standard_error": jackknife(left_out.numpy())}


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
    for field_name in ("probabilities", "identity", "features", "perceptual"):
        values = getattr(images, field_name)
        if values is None:
            continue
        finite = torch.isfinite(values).flatten(1).all(1) if values.ndim > 1 else torch.isfinite(values)
        if not finite.all():
            bad = images.key[int((~finite).nonzero()[0])]
            raise UserError(f"{what}: {field_name} of image '{bad}' are not finite (NaN or infinity)")
