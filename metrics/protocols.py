"""Protocols: everything that must be equal for two scores to be comparable, and the id that says so.

A protocol is a YAML file whose every choice is spelled out: formulas, reductions, regions, unit, frame rate, what
happens to clips of another length and to speakers never seen; for images the judges, the image size, the accuracy
to match. What is known only where the scores are made, such as the hash of a judge's weights, is ``null`` in the
file and is bound then. The id is the name and a hash of it all; scores of different ids are never ranked together.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from datamodules.errors import UserError
from metrics import motion
from metrics.samples import PAIRINGS

FOLDER = Path(__file__).parent / "protocols"

# Words for readers: changing them does not change what is measured.
PROSE = {"title", "description"}

GENERAL = {
    "speech-to-mesh": (
        *("split", "topology", "vertices", "coordinates", "unit", "fps", "head_motion"),
        *("length_mismatch", "unseen_speaker", "samples", "sample_axis", "single_sample", "regions"),
    ),
    "face-editing": (
        *("image_size", "split", "images", "attributes", "preserved", "source", "threshold"),
        *("matched_accuracy", "matching", "judges"),
    ),
    "text-to-face": (
        *("image_size", "resizer", "split", "images", "reference_images", "samples", "caption", "judges"),
    ),
}
# Fields that a protocol may have besides.
OPTIONAL = {"judges", "error_bars_over"}
# Judges that a task cannot do without.
JUDGES = {"face-editing": ("attributes", "identity", "features"), "text-to-face": ("features",)}
SOURCES = ("photo", "inversion")
# How editors are brought to one accuracy. Strength 0 is the inversion.
MATCHING = "first crossing of the mean accuracy over the attributes, linear between strengths"
LENGTH_RULES = ("cut both to the shorter", "cut the prediction", "cut the truth", "refuse")
# What the S predictions (S, T, V, 3) of one clip are: draws under one condition, or one for each speaking style.
SAMPLE_AXES = ("draws", "styles")
RESIZERS = ("PIL bicubic", "PIL bilinear", "PIL lanczos", "PIL box")
# What an edited image can be compared with.
REFERENCES = {"identity_similarity": ("photo", "inversion"), "perceptual_distance": ("inversion",)}
# Units of coordinates; "normalised" ones have no unit and are not converted.
MILLIMETRES = {"m": 1000.0, "mm": 1.0, "normalised": None}
CHOICES: dict[str, tuple[Any, ...]] = {
    "variant": motion.VARIANTS,
    "over_vertices": motion.REDUCTIONS,
    "signed": (True, False),
    "pairing": PAIRINGS,
}
OF_SAMPLES = ("mean_estimate_error", "coverage_error", "sample_diversity", "style_diversity", "multimodality")
POOLINGS = {"bilabial_closure": ("bilabials",), "closure_offset": ("bilabials",)} | dict.fromkeys(
    (
        *("face_dynamics_deviation", "sample_diversity", "style_diversity", "multimodality"),
        *("sync_offset", "sync_correlation", "control_dynamics_deviation", "rotation_deviation", "beat_alignment"),
        *("emotion_accuracy", "lip_sync_distance", "lip_sync_confidence"),
    ),
    ("clips",),
)


@dataclass(frozen=True)
class Measure:
    """A formula that a protocol's metric can name.

    Attributes:
        choices: the fields a metric must spell out.
        higher_is_better: direction; None where the best value lies in between, or is another metric's.
        judge: the network it needs, a key of the protocol's ``judges``.
    """

    choices: tuple[str, ...]
    higher_is_better: bool | None
    judge: str | None = None


MEASURES = {
    "speech-to-mesh": {
        "lip_vertex_error": Measure(("variant", "over_vertices", "region", "pooling"), False),
        "upper_face_error": Measure(("over_vertices", "region", "pooling"), False),
        "mean_vertex_error": Measure(("pooling",), False),
        "surface_distance": Measure(("pooling",), False),
        "face_dynamics_deviation": Measure(("signed", "region", "pooling"), False),
        "mouth_opening_difference": Measure(("upper_lip", "lower_lip", "pooling"), False),
        "mean_estimate_error": Measure(("variant", "over_vertices", "region", "pooling"), False),
        "coverage_error": Measure(("variant", "over_vertices", "region", "pooling"), False),
        "sample_diversity": Measure(("pairing", "shuffle_seed", "pooling"), None),
        "style_diversity": Measure(("pooling",), None),
        "multimodality": Measure(("pooling",), None),
        "bilabial_closure": Measure(("upper_lip", "lower_lip", "tolerance_mm", "window", "pooling"), True),
        "closure_offset": Measure(("upper_lip", "lower_lip", "tolerance_mm", "window", "pooling"), False),
        "sync_offset": Measure(("upper_lip", "lower_lip", "largest_offset", "pooling"), None),
        "sync_correlation": Measure(("upper_lip", "lower_lip", "largest_offset", "pooling"), True),
        "control_error": Measure(("controls", "pooling"), False),
        "control_dynamics_deviation": Measure(("controls", "signed", "pooling"), False),
        "rotation_speed": Measure(("pooling",), None),
        "rotation_deviation": Measure(("pooling",), None),
        "beat_alignment": Measure(("sigma", "pooling"), None),
        "emotion_accuracy": Measure(("pooling",), True, "motion"),
        "motion_frechet_distance": Measure((), False, "motion"),
        "lip_sync_distance": Measure(("largest_offset", "pooling"), False, "lip_sync"),
        "lip_sync_confidence": Measure(("largest_offset", "pooling"), True, "lip_sync"),
    },
    "face-editing": {
        "editing_accuracy": Measure((), True, "attributes"),
        "attribute_preservation": Measure((), True, "attributes"),
        "identity_similarity": Measure(("reference",), True, "identity"),
        "perceptual_distance": Measure(("reference",), False, "perceptual"),
        "frechet_distance": Measure(("jackknife_groups",), False, "features"),
        "kernel_distance": Measure(("scale",), False, "features"),
        "area_under_curve": Measure(("of",), None),
    },
    "text-to-face": {
        "frechet_distance": Measure(("jackknife_groups",), False, "features"),
        "frechet_distance_at": Measure(("images", "seed"), False, "features"),
        "frechet_distance_at_infinity": Measure(("smallest", "points", "seed"), False, "features"),
        "kernel_distance": Measure(("subsets", "subset_size", "seed", "scale"), False, "features"),
        "neighbour_score": Measure(("part", "k"), True, "features"),
        "clip_score": Measure(("variant",), True, "clip"),
        "r_precision": Measure(("style", "candidates", "seed"), True, "clip"),
        "identity_similarity": Measure(("reference",), True, "identity"),
        "distance_to_real": Measure((), False, "perceptual"),
        "diversity": Measure((), True, "perceptual"),
        "landmark_error": Measure(("eyes",), False, "landmarks"),
        "mask_accuracy": Measure((), True, "parser"),
        "relative_recognition": Measure(("of",), True),
    },
}


@dataclass(frozen=True)
class Protocol:
    """How one task's predictions are scored.

    Attributes:
        name: for instance ``demo-speech``.
        task: for instance ``speech-to-mesh``.
        spec: the file's whole contents, with what was bound.
    """

    name: str
    task: str
    spec: dict[str, Any]

    @classmethod
    def read(cls, name: str | Path) -> "Protocol":
        """Reads a protocol by its name in ``metrics/protocols``, or by the path of a YAML file.

        Raises:
            UserError: no such protocol, or one that leaves a choice open.
        """
        path = FOLDER / f"{name}.yaml" if str(name) in available() else Path(name)
        if not path.is_file():
            raise UserError(f"protocol '{name}': not known and not a file; known: {', '.join(available())}")
        try:
            spec = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not readable YAML ({str(error).splitlines()[0]})") from error
        _check(spec, path)
        return cls(spec["name"], spec["task"], spec)

    @property
    def id(self) -> str:
        """The name and the first 12 digits of the SHA-256 of every choice.

        Raises:
            UserError: a choice is still to be bound.
        """
        open_fields = list(_open_fields(self.spec))
        if open_fields:
            raise UserError(f"protocol '{self.name}': {', '.join(open_fields)} not bound; bind it before scoring")
        text = json.dumps(_without_prose(self.spec), sort_keys=True, ensure_ascii=False)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def bound(self) -> bool:
        """Whether no choice is left to be bound, so that there is an id."""
        return not list(_open_fields(self.spec))

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Name to choices of each metric, in the order of the table's columns."""
        return self.spec["metrics"]

    def bind(self, values: Mapping[str, Any]) -> "Protocol":
        """Fills in what the file leaves ``null``.

        Args:
            values: dotted field name to value, for instance ``{"judges.identity.sha256": "3f..."}``.

        Raises:
            UserError: no such field, or it is set to another value.
        """
        spec = copy.deepcopy(self.spec)
        for field, value in values.items():
            *parents, last = field.split(".")
            place = spec
            for parent in parents:
                place = place.get(parent, {})
            if last not in place:
                raise UserError(f"protocol '{self.name}': has no field '{field}'")
            if place[last] not in (None, value):
                raise UserError(
                    f"protocol '{self.name}': {field} is {place[last]}, but {value} was used; "
                    "score with what the protocol names, or write a protocol of another name"
                )
            place[last] = value
        return Protocol(self.name, self.task, spec)

    def bind_regions(self, regions: Mapping[str, ArrayLike]) -> "Protocol":
        """Binds the number of vertices and the hash of every region the protocol names.

        Args:
            regions: name to vertex indices.

        Raises:
            UserError: a region is missing, empty, or another than the protocol's.
        """
        bound: dict[str, Any] = {}
        for name in self.spec["regions"]:
            if name not in regions:
                raise UserError(
                    f"protocol '{self.name}': needs region '{name}', the data has {', '.join(sorted(regions))}"
                )
            indices = np.asarray(regions[name])
            if indices.size == 0:
                raise UserError(f"region '{name}': empty, expected vertex indices")
            wrong = indices.min() if indices.min() < 0 else indices.max()
            if not 0 <= wrong < self.spec["vertices"]:
                raise UserError(f"region '{name}': index {wrong}, but the mesh has {self.spec['vertices']} vertices")
            bound[f"regions.{name}.count"] = len(np.unique(indices))
            bound[f"regions.{name}.sha256"] = region_hash(indices)
        return self.bind(bound)


def lip_error_variants(general: Mapping[str, Any]) -> Protocol:
    """A protocol of every variant of the lip vertex error, named like ``squared-max-frames``.

    Args:
        general: the fields that the data and the predictions decide: ``topology``, ``vertices``, ``coordinates``,
            ``unit``, ``fps``, ``split``, ``unseen_speaker``.
    """
    metrics = {
        f"{variant}-{over}-{pooling}": {
            "measure": "lip_vertex_error",
            "variant": variant,
            "over_vertices": over,
            "region": "lips",
            "pooling": pooling,
        }
        for variant, over, pooling in product(motion.VARIANTS, motion.REDUCTIONS, motion.POOLINGS)
    }
    spec = {
        "name": "lip-error-variants",
        "task": "speech-to-mesh",
        **general,
        "head_motion": "none",
        "length_mismatch": "cut both to the shorter",
        "samples": 1,
        "sample_axis": "draws",
        "single_sample": 0,
        "regions": {"lips": {"count": None, "sha256": None}},
        "primary": next(iter(metrics)),
        "metrics": metrics,
    }
    _check(spec, Path("lip-error-variants"))
    return Protocol(spec["name"], spec["task"], spec)


def available() -> list[str]:
    """Names of the protocols that ship with facebench."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_region(name: str, path: str | Path) -> NDArray[np.int64]:
    """Reads a region's vertex indices: integers separated by commas as official repositories have them, or ``.npy``.

    Raises:
        UserError: no such file, or something else in it.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            indices = np.load(path, allow_pickle=False)
        else:
            indices = np.array([int(number) for number in path.read_text().split(",")])
    except (OSError, ValueError) as error:
        raise UserError(f"region '{name}': {path} gives no vertex indices ({error})") from error
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise UserError(
            f"region '{name}': {path} holds {indices.dtype} of shape {indices.shape}, expected a list of vertex indices"
        )
    return indices.astype(np.int64)


def region_hash(indices: ArrayLike) -> str:
    """SHA-256 of a region's vertex indices, whatever their order."""
    return hashlib.sha256(np.unique(np.asarray(indices)).astype("<i8").tobytes()).hexdigest()


def _check(spec: Any, path: Path) -> None:
    if not isinstance(spec, dict) or spec.get("task") not in GENERAL:
        raise UserError(f"{path}: task must be one of {', '.join(GENERAL)}")
    task = spec["task"]
    missing = [field for field in ("name", *GENERAL[task], "primary", "metrics") if field not in spec]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing; a protocol spells out every choice")
    _check_fields(spec, {"name", "task", "primary", "metrics", *GENERAL[task], *OPTIONAL}, str(path))
    for name, metric in spec["metrics"].items():
        measure = MEASURES[task].get(metric.get("measure"))
        if measure is None:
            raise UserError(f"{path}: metrics.{name}.measure must be one of {', '.join(MEASURES[task])}")
        for choice in measure.choices:
            if choice not in metric:
                raise UserError(f"{path}: metrics.{name}.{choice} missing; a protocol spells out every choice")
        _check_fields(metric, {"measure", *measure.choices}, f"{path}: metrics.{name}")
    if spec["primary"] not in spec["metrics"]:
        raise UserError(f"{path}: primary is '{spec['primary']}', expected one of {', '.join(spec['metrics'])}")
    if task == "speech-to-mesh":
        _check_speech(spec, path)
    else:
        _check_faces(spec, path)


def _check_fields(given: Mapping[str, Any], known: set[str], where: str) -> None:
    strange = sorted(set(given) - known - PROSE)
    if strange:
        raise UserError(
            f"{where}: '{strange[0]}' is not known and would change nothing; known: {', '.join(sorted(known))}"
        )


def _check_speech(spec: dict[str, Any], path: Path) -> None:
    general = {
        "coordinates": MILLIMETRES,
        "unit": MILLIMETRES,
        "length_mismatch": LENGTH_RULES,
        "sample_axis": SAMPLE_AXES,
    }
    for field, choices in general.items():
        if spec[field] not in choices:
            raise UserError(f"{path}: {field} is '{spec[field]}', expected one of {', '.join(choices)}")
    if (spec["coordinates"] == "normalised") != (spec["unit"] == "normalised"):
        raise UserError(f"{path}: coordinates {spec['coordinates']} can't be given in {spec['unit']}")
    policy = str(spec["unseen_speaker"])
    if policy not in ("none", "all-mean", "best") and not policy.removeprefix("fixed:").isdigit():
        raise UserError(f"{path}: unseen_speaker is '{policy}', expected none, fixed:k, all-mean or best")
    if policy in ("all-mean", "best") and (spec["sample_axis"] != "styles" or spec["samples"] < 2):
        raise UserError(f"{path}: unseen_speaker {policy} needs sample_axis styles, and as many samples as styles")
    if policy == "best" and spec["metrics"][spec["primary"]]["measure"] in (*OF_SAMPLES, "motion_frechet_distance"):
        raise UserError(f"{path}: unseen_speaker best chooses by primary, which must be a metric of one prediction")
    if not 0 <= spec["single_sample"] < spec["samples"]:
        raise UserError(f"{path}: single_sample is {spec['single_sample']}, expected less than samples")
    for name, region in spec["regions"].items():
        if not isinstance(region, dict) or set(region) != {"count", "sha256"}:
            raise UserError(f"{path}: regions.{name} must give count and sha256, null where any will do")
    for name, metric in spec["metrics"].items():
        judge = MEASURES["speech-to-mesh"][metric["measure"]].judge
        if judge is not None and judge not in spec.get("judges", {}):
            raise UserError(f"{path}: metrics.{name} needs judges.{judge}, a network that the protocol names")
        if metric["measure"] in OF_SAMPLES and spec["samples"] < 2:
            raise UserError(f"{path}: metrics.{name} needs several samples a clip, but samples is {spec['samples']}")
        if metric.get("pairing") == "halves" and spec["samples"] % 2:
            raise UserError(f"{path}: metrics.{name} pairs two halves, but samples is {spec['samples']}, not even")
        for field in ("region", "upper_lip", "lower_lip"):
            if field in metric and metric[field] not in spec["regions"]:
                raise UserError(f"{path}: metrics.{name}.{field} is '{metric[field]}', not among regions")
        poolings = {"pooling": POOLINGS.get(metric["measure"], motion.POOLINGS)}
        for field, choices in (CHOICES | poolings).items():
            if field in metric and metric[field] not in choices:
                known = ", ".join(str(choice) for choice in choices)
                raise UserError(f"{path}: metrics.{name}.{field} is '{metric[field]}', expected one of {known}")


def _check_faces(spec: dict[str, Any], path: Path) -> None:
    for judge in JUDGES[spec["task"]]:
        if judge not in spec["judges"]:
            raise UserError(f"{path}: judges.{judge} missing, a network that the protocol names")
    if spec["task"] == "face-editing":
        for field, choices in (("matching", (MATCHING,)), ("source", SOURCES)):
            if spec[field] not in choices:
                raise UserError(f"{path}: {field} is '{spec[field]}', expected {' or '.join(choices)}")
        if set(spec["preserved"]) != set(spec["attributes"]):
            raise UserError(f"{path}: preserved names {', '.join(spec['preserved'])}, expected the attributes")
    if spec["task"] == "text-to-face":
        if spec["resizer"] not in RESIZERS:
            raise UserError(f"{path}: resizer is '{spec['resizer']}', expected one of {', '.join(RESIZERS)}")
        if spec["samples"] < 2 and any(metric["measure"] == "diversity" for metric in spec["metrics"].values()):
            raise UserError(f"{path}: samples is {spec['samples']}, but diversity needs at least 2 images of a caption")
    fixed = {
        "variant": ("x100-clipped", "raw"),
        "style": ("drawn", "batches"),
        "part": ("precision", "recall", "density", "coverage"),
    }
    for name, metric in spec["metrics"].items():
        measure = MEASURES[spec["task"]][metric["measure"]]
        if measure.judge is not None and measure.judge not in spec["judges"]:
            raise UserError(f"{path}: metrics.{name} needs judges.{measure.judge}, a network that the protocol names")
        if metric["measure"] == "relative_recognition":
            of = spec["metrics"].get(metric["of"], {}).get("measure")
            if of != "identity_similarity":
                raise UserError(f"{path}: metrics.{name}.of is '{metric['of']}', expected an identity similarity")
        if metric["measure"] == "area_under_curve":
            of = spec["metrics"].get(metric["of"], {}).get("measure", "area_under_curve")
            if of in ("area_under_curve", "editing_accuracy"):
                raise UserError(f"{path}: metrics.{name}.of is '{metric['of']}', expected a metric with a curve")
        for choice, allowed in fixed.items():
            if choice in measure.choices and metric[choice] not in allowed:
                raise UserError(
                    f"{path}: metrics.{name}.{choice} is '{metric[choice]}', expected one of {', '.join(allowed)}"
                )
        references = REFERENCES.get(metric["measure"])
        if references and metric["reference"] not in references:
            raise UserError(
                f"{path}: metrics.{name}.reference is '{metric['reference']}', expected {' or '.join(references)}"
            )


def _open_fields(spec: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in spec.items():
        if isinstance(value, Mapping):
            yield from _open_fields(value, f"{prefix}{key}.")
        elif value is None:
            yield prefix + key


def _without_prose(spec: Any) -> Any:
    if isinstance(spec, Mapping):
        return {key: _without_prose(value) for key, value in spec.items() if key not in PROSE}
    return spec
