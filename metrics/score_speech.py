"""Scores predicted motion under a protocol of the task ``speech-to-mesh``."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from datamodules.audio import SAMPLE_RATE
from datamodules.errors import UserError
from metrics import motion, rig, samples, timing
from metrics.distribution import frechet_distance, mean_and_covariance
from metrics.protocols import MEASURES, MILLIMETRES, OF_SAMPLES, Protocol
from metrics.scoring import Scores, check_enough, metric_score

log = logging.getLogger(__name__)

SQUARED = ("face_dynamics_deviation",)
UNITS = {
    "control_error": "control",
    "control_dynamics_deviation": "control²",
    "rotation_speed": "rad/s",
    "rotation_deviation": "rad",
    "beat_alignment": "share",
    "emotion_accuracy": "share",
    "motion_frechet_distance": "squared distance",
    "lip_sync_distance": "distance",
    "lip_sync_confidence": "distance",
    "bilabial_closure": "share",
    "closure_offset": "ms",
    "sync_offset": "ms",
    "sync_correlation": "correlation",
}


@dataclass(frozen=True)
class Clip:
    """What is scored of one clip.

    Attributes:
        key: its name.
        predicted: (T, V, 3) vertices, or (S, T, V, 3) of S samples.
        truth: (T', V, 3) vertices.
        template: (V, 3), the subject's neutral mesh.
        audio: (N,) float32 waveform at 16 kHz, for metrics of the sound.
        phonemes: (symbol, start, end) in seconds, for metrics of lip closure.
        fps: frames per second, to be checked against the protocol's.
        emotion: the one that was asked for, for metrics of emotions.
        controls: (T, C) or (S, T, C) predicted rig controls; None of a system without.
        true_controls: (T', C).
        pose: (T, 3) or (S, T, 3) predicted rotation vectors of the head in radians; None of a system without.
        subject: who speaks, for judges that look at pictures.
    """

    key: str
    predicted: Tensor
    truth: Tensor
    template: Tensor
    audio: Tensor | None = None
    phonemes: Sequence[tuple[str, float, float]] | None = None
    fps: float | None = None
    emotion: str | None = None
    controls: Tensor | None = None
    true_controls: Tensor | None = None
    pose: Tensor | None = None
    subject: str | None = None


@dataclass(frozen=True)
class Judges:
    """The networks that a protocol names; None where it names none.

    Attributes:
        emotion: clip and vertices (T, V, 3) -> name of the emotion that they show.
        features: clip and vertices (T, V, 3) -> (d,) features of the motion.
        lip_sync: clip and vertices (T, V, 3) -> embeddings (N, d) of what is seen and of what is heard, N moments.
    """

    emotion: Callable[[Clip, Tensor], str] | None = None
    features: Callable[[Clip, Tensor], Tensor] | None = None
    lip_sync: Callable[[Clip, Tensor], tuple[Tensor, Tensor]] | None = None


def score_speech(
    clips: Iterable[Clip],
    protocol: Protocol,
    regions: Mapping[str, ArrayLike],
    triangles: ArrayLike | None = None,
    judges: Judges | None = None,
) -> Scores:
    """Scores predicted motion; holds one clip at a time, and one number per clip and metric.

    Metrics of a single prediction take the sample that the protocol names, those of several its first ``samples``. For
    speakers never seen, a protocol can ask for one prediction in every training subject's style instead: their mean
    (``unseen_speaker: all-mean``), or for each clip the style whose primary metric is lowest (``best``), which is told
    from the truth and so a bound, not a score.

    Args:
        clips: in the protocol's coordinates.
        protocol: of the task ``speech-to-mesh``.
        regions: name to vertex indices.
        triangles: (F, 3) vertex indices, for the distance to the true surface.
        judges: as the protocol names them.

    Raises:
        UserError: a prediction that is not finite, another topology or frame rate, a length that the protocol refuses,
            fewer samples than it asks for, an empty or other region, fewer than two clips, the same key twice, or
            a clip without what a metric needs.
    """
    protocol = protocol.bind_regions(regions)
    indices = {name: torch.as_tensor(regions[name]).long() for name in protocol.spec["regions"]}
    faces = None if triangles is None else torch.as_tensor(triangles).long()
    values: dict[str, dict[str, float]] = {name: {} for name in protocol.metrics}
    weights: dict[str, dict[str, int]] = {name: {} for name in protocol.metrics}
    seen: set[str] = set()
    dropped: dict[str, int] = {}
    features: dict[str, list[Tensor]] = {"predicted": [], "true": []}
    judges = judges or Judges()
    context = _Context(protocol, indices, faces, judges)
    for clip in clips:
        if clip.key in seen:
            raise UserError(f"clip '{clip.key}': predicted twice")
        seen.add(clip.key)
        clip, cut = _same_length(_checked(clip, protocol), protocol)
        if cut:
            dropped[clip.key] = cut
        name = protocol.spec["primary"]
        try:
            chosen = context.chosen(clip)
        except ValueError as error:
            raise UserError(f"clip '{clip.key}': metric '{name}' {error}") from error
        if judges.features is not None:
            of_samples = [judges.features(clip, clip.predicted[number]) for number in chosen]
            features["predicted"].append(torch.stack(of_samples))
            features["true"].append(judges.features(clip, clip.truth))
        for name, choices in protocol.metrics.items():
            if choices["measure"] == "motion_frechet_distance":
                continue
            try:
                numbers = chosen[:1] if choices["measure"] in OF_SAMPLES else chosen
                errors = torch.stack([context.values(choices, clip, number) for number in numbers]).mean(0)
            except ValueError as error:
                raise UserError(f"clip '{clip.key}': metric '{name}' {error}") from error
            if errors.numel():
                values[name][clip.key], weights[name][clip.key] = errors.mean().item(), errors.numel()
    check_enough(len(seen), "clips")
    if dropped:
        log.warning(
            "%d of %d clips had another length than the truth; %d frames cut off (%s)",
            *(len(dropped), len(seen), sum(dropped.values()), protocol.spec["length_mismatch"]),
        )

    scores = {}
    for name, choices in protocol.metrics.items():
        if choices["measure"] == "motion_frechet_distance":
            true = mean_and_covariance(torch.stack(features["true"]))
            sets = torch.stack(features["predicted"], 1)  # one of each chosen sample; their distances are averaged
            distances = [frechet_distance(*mean_and_covariance(predicted), *true) for predicted in sets]
            scores[name] = metric_score(choices, protocol, {}, _scale(choices, protocol)[1])
            scores[name]["value"] = torch.stack(distances).mean().item()
            continue
        if not values[name]:
            raise UserError(f"metric '{name}': no clip has what it counts ({choices['pooling']})")
        scale, unit = _scale(choices, protocol)
        per_sample = {key: value * scale for key, value in values[name].items()}
        scores[name] = metric_score(
            choices, protocol, per_sample, unit, None if choices["pooling"] == "clips" else weights[name]
        )
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


def _checked(clip: Clip, protocol: Protocol) -> Clip:
    """The clip with its samples as (S, T, V, 3), S as the protocol says."""
    expected = (protocol.spec["vertices"], 3)
    predicted = clip.predicted if clip.predicted.ndim == 4 else clip.predicted[None]
    shapes = {"prediction": (clip.predicted, predicted.shape[1:]), "truth": (clip.truth, clip.truth.shape)}
    shapes["template"] = (clip.template, clip.template[None].shape)
    for what, (vertices, shape) in shapes.items():
        if len(shape) != 3 or tuple(shape[1:]) != expected:
            raise UserError(
                f"clip '{clip.key}': {what} has shape {tuple(vertices.shape)}, but protocol '{protocol.name}' is for "
                f"{protocol.spec['topology']}, (T, {expected[0]}, 3); score with a protocol of this topology"
            )
        if what != "template" and not vertices.shape[-3]:
            raise UserError(f"clip '{clip.key}': {what} has no frames")
        if not torch.isfinite(vertices).all():
            raise UserError(f"clip '{clip.key}': {what} holds values that are not finite (NaN or infinity)")
    if clip.fps is not None and clip.fps != protocol.spec["fps"]:
        raise UserError(
            f"clip '{clip.key}': {clip.fps:g} frames per second, protocol '{protocol.name}' is for "
            f"{protocol.spec['fps']}; score with a protocol of this rate"
        )
    for what, curves in (("controls", clip.controls), ("head pose", clip.pose)):
        if curves is not None and not torch.isfinite(curves).all():
            raise UserError(f"clip '{clip.key}': {what} hold values that are not finite (NaN or infinity)")
    number = protocol.spec["samples"]
    if len(predicted) < number:
        raise UserError(
            f"clip '{clip.key}': {len(predicted)} samples predicted, protocol '{protocol.name}' takes {number}; "
            "predict as many and store them as (S, T, V, 3)"
        )
    return replace(clip, predicted=predicted[:number])


def _same_length(clip: Clip, protocol: Protocol) -> tuple[Clip, int]:
    """Prediction and truth cut by the protocol's rule, and how many frames fell away."""
    predicted, true = clip.predicted.shape[1], len(clip.truth)
    rule = protocol.spec["length_mismatch"]
    refused = {"cut the prediction": predicted < true, "cut the truth": predicted > true, "refuse": predicted != true}
    if refused.get(rule, False):
        raise UserError(
            f"clip '{clip.key}': {predicted} frames predicted, expected {true}; protocol '{protocol.name}' says: {rule}"
        )
    shorter = min(predicted, true)
    return replace(clip, predicted=clip.predicted[:, :shorter], truth=clip.truth[:shorter]), abs(predicted - true)


def _scale(choices: Mapping[str, Any], protocol: Protocol) -> tuple[float, str]:
    """Factor from what a formula gives to the unit it is told in, and that unit."""
    if choices["measure"] in UNITS:
        unit = UNITS[choices["measure"]]
        return 1000.0 if unit == "ms" else 1.0, unit
    unit = protocol.spec["unit"]
    given, told = MILLIMETRES[protocol.spec["coordinates"]], MILLIMETRES[unit]
    scale = 1.0 if given is None or told is None else given / told
    if choices.get("variant") == "squared" or choices["measure"] in SQUARED:
        return scale**2, f"{unit}²"
    return scale, unit


@dataclass(frozen=True)
class _Context:
    """What every clip is scored with."""

    protocol: Protocol
    regions: Mapping[str, Tensor]
    triangles: Tensor | None
    judges: Judges

    def values(self, choices: Mapping[str, Any], clip: Clip, number: int) -> Tensor:
        """One value for each frame or bilabial of the clip's sample ``number``, or one of the clip."""
        if choices["measure"] in OF_CURVES:
            return _curve_values(choices, clip, self.protocol, number)
        if MEASURES[self.protocol.task][choices["measure"]].judge is not None:
            return _judged_values(choices, clip, clip.predicted[number], self.judges)
        return _clip_values(choices, clip, self.protocol, self.regions, self.triangles, number)

    def chosen(self, clip: Clip) -> list[int]:
        """The samples whose values are averaged, by the protocol's rule."""
        spec = self.protocol.spec
        everyone = range(len(clip.predicted))
        match spec["unseen_speaker"]:
            case "all-mean":
                return list(everyone)
            case "best":
                primary = self.protocol.metrics[spec["primary"]]
                choose = max if MEASURES[self.protocol.task][primary["measure"]].higher_is_better else min
                return [choose(everyone, key=lambda number: self.values(primary, clip, number).mean().item())]
        return [spec["single_sample"]]


OF_CURVES = ("control_error", "control_dynamics_deviation", "rotation_speed", "rotation_deviation", "beat_alignment")


def _curve_values(choices: Mapping[str, Any], clip: Clip, protocol: Protocol, number: int) -> Tensor:
    """As :func:`_clip_values`, of rig controls or of the head's pose."""
    frames, fps = len(clip.truth), protocol.spec["fps"]
    if choices["measure"].startswith("control"):
        if clip.controls is None or clip.true_controls is None or not clip.true_controls.shape[-1]:
            raise ValueError("needs rig controls, which the system or the data does not have")
        several = clip.controls if clip.controls.ndim == 3 else clip.controls[None]
        predicted, true = several[number, :frames], clip.true_controls[:frames]
        if predicted.shape != true.shape:
            raise ValueError(f"got controls of shape {tuple(predicted.shape)}, expected {tuple(true.shape)}")
        wanted = range(true.shape[1]) if choices["controls"] == "all" else choices["controls"]
        chosen = torch.tensor(list(wanted))
        if choices["measure"] == "control_error":
            return rig.control_error(predicted, true, chosen)
        deviation = rig.control_dynamics(true, chosen) - rig.control_dynamics(predicted, chosen)
        return (deviation if choices["signed"] else deviation.abs())[None]
    if clip.pose is None:
        raise ValueError("needs the pose of the head, which the system does not predict")
    pose = (clip.pose if clip.pose.ndim == 3 else clip.pose[None])[number, :frames]
    match choices["measure"]:
        case "rotation_speed":
            return timing.rotation_speed(pose, fps)
        case "rotation_deviation":
            return pose.double().std(0, correction=0).mean()[None]
    if clip.audio is None:
        raise ValueError("needs the sound, which the data does not have")
    energy = timing.sound_energy(clip.audio, SAMPLE_RATE, fps, frames)
    moved = timing.beats(timing.rotation_speed(pose, fps))
    return timing.beat_alignment(moved, timing.onsets(energy), fps, choices["sigma"])[None]


def _judged_values(choices: Mapping[str, Any], clip: Clip, predicted: Tensor, judges: Judges) -> Tensor:
    """As :func:`_clip_values`, by a judge."""
    if choices["measure"] == "emotion_accuracy":
        if clip.emotion is None:
            raise ValueError("needs the clip's emotion, which the data does not have")
        assert judges.emotion is not None
        return torch.tensor([float(judges.emotion(clip, predicted) == clip.emotion)], dtype=torch.float64)
    assert judges.lip_sync is not None
    found = timing.lip_sync_error(*judges.lip_sync(clip, predicted), choices["largest_offset"])
    return (found.distance if choices["measure"] == "lip_sync_distance" else found.confidence)[None]


def _clip_values(
    choices: Mapping[str, Any],
    clip: Clip,
    protocol: Protocol,
    regions: Mapping[str, Tensor],
    triangles: Tensor | None,
    number: int,
) -> Tensor:
    """One value for each frame or bilabial of the clip, or one of the clip; ``number`` is the sample's."""
    several, truth, template = clip.predicted, clip.truth, clip.template
    predicted, fps = several[number], protocol.spec["fps"]
    match choices["measure"]:
        case "lip_vertex_error":
            lips, variant, over = regions[choices["region"]], choices["variant"], choices["over_vertices"]
            return motion.lip_vertex_error(predicted, truth, lips, variant, over)
        case "upper_face_error":
            return motion.upper_face_error(predicted, truth, regions[choices["region"]], choices["over_vertices"])
        case "mean_vertex_error":
            return motion.mean_vertex_error(predicted, truth)
        case "surface_distance":
            if triangles is None:
                raise ValueError("needs the triangles of the mesh, which the data does not have")
            return motion.surface_distance(predicted, truth, triangles)
        case "face_dynamics_deviation":
            region, signed = regions[choices["region"]], choices["signed"]
            return motion.face_dynamics_deviation(predicted, truth, template, region, signed)[None]
        case "mouth_opening_difference":
            upper, lower = regions[choices["upper_lip"]], regions[choices["lower_lip"]]
            return motion.mouth_opening_difference(predicted, truth, upper, lower)
        case "mean_estimate_error" | "coverage_error" as measure:
            function = samples.mean_estimate_error if measure == "mean_estimate_error" else samples.coverage_error
            return function(several, truth, regions[choices["region"]], choices["variant"], choices["over_vertices"])
        case "sample_diversity":
            order = None
            if choices["pairing"] == "halves":
                order = samples.shuffled(len(several), choices["shuffle_seed"], clip.key)
            return samples.sample_diversity(several, choices["pairing"], order)[None]
        case "style_diversity":
            return samples.sample_diversity(several)[None]
        case "multimodality":
            return samples.multimodality(several)[None]
    upper, lower = regions[choices["upper_lip"]], regions[choices["lower_lip"]]
    opening = motion.mouth_opening(predicted, upper, lower)
    match choices["measure"]:
        case "bilabial_closure" | "closure_offset" as measure:
            if clip.phonemes is None:
                raise ValueError("needs phonemes with their times, which the data does not have")
            of_truth, rest = (motion.mouth_opening(v, upper, lower) for v in (truth, template[None]))
            tolerance = choices["tolerance_mm"] / (MILLIMETRES[protocol.spec["coordinates"]] or 1)
            found = timing.lip_closures(opening, of_truth, rest[0], clip.phonemes, fps, tolerance, choices["window"])
            return found.closed if measure == "bilabial_closure" else found.offset.abs()
        case "sync_offset" | "sync_correlation" as measure:
            if clip.audio is None:
                raise ValueError("needs the sound, which the data does not have")
            energy = timing.sound_energy(clip.audio, SAMPLE_RATE, fps, len(opening))
            found_sync = timing.audio_motion_sync(opening, energy, fps, choices["largest_offset"])
            return (found_sync.offset.abs() if measure == "sync_offset" else found_sync.correlation)[None]
    raise AssertionError(f"measure {choices['measure']} is not scored")
