"""Scorers: predictions and a protocol in, scores with their values per sample out.

Scores are plain dictionaries, ready for a line of ``results.jsonl``: for each metric its ``value``, ``unit``,
``higher_is_better`` and, where the metric has a value for each clip or image, ``per_sample`` and the ``weights``
(frames) of a metric that pools frames. The value is the (weighted) mean of the values per sample. Where a sample acts
on the value in another way besides, ``drawn`` holds what a bootstrap draws; its mean is the value too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from datamodules.errors import UserError
from metrics.protocols import MEASURES, Protocol


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


def check_enough(number: int, what: str) -> None:
    """Raises:
    UserError: fewer than two clips or images.
    """
    if number < 2:
        raise UserError(f"scoring needs at least 2 {what}, found {number}")


def metric_score(
    choices: Mapping[str, Any],
    protocol: Protocol,
    per_sample: dict[str, float],
    unit: str,
    weights: dict[str, int] | None = None,
) -> dict[str, Any]:
    """One metric's line: its value is the weighted mean of the values per sample."""
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
