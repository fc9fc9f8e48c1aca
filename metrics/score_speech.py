"""Scores predicted motion under a protocol of the task ``speech-to-mesh``."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from datamodules.errors import UserError
from metrics import motion
from metrics.protocols import MILLIMETRES, Protocol
from metrics.scoring import Scores, check_enough, metric_score

log = logging.getLogger(__name__)

Clip = tuple[str, Tensor, Tensor, Tensor]


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
    check_enough(len(frames), "clips")
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
        scores[name] = metric_score(choices, protocol, per_sample, unit, weights)
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
