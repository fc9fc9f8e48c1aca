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
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike

from datamodules.errors import UserError

FOLDER = Path(__file__).parent / "protocols"

# Words for readers: changing them does not change what is measured.
PROSE = {"title", "description"}

GENERAL = {
    "speech-to-mesh": (
        *("topology", "vertices", "coordinates", "unit", "fps", "head_motion"),
        *("length_mismatch", "unseen_speaker", "regions"),
    ),
    "face-editing": (
        *("image_size", "images", "attributes", "preserved", "source", "threshold"),
        *("matched_accuracy", "matching", "judges"),
    ),
}
LENGTH_RULES = ("cut both to the shorter", "cut the prediction", "refuse")
MILLIMETRES = {"m": 1000.0, "mm": 1.0}


@dataclass(frozen=True)
class Measure:
    """A formula that a protocol's metric can name.

    Attributes:
        choices: the fields a metric must spell out.
        higher_is_better: direction; None where the best value lies in between.
    """

    choices: tuple[str, ...]
    higher_is_better: bool | None


MEASURES = {
    "speech-to-mesh": {
        "lip_vertex_error": Measure(("variant", "over_vertices", "region", "pooling"), False),
        "mean_vertex_error": Measure(("pooling",), False),
        "face_dynamics_deviation": Measure(("signed", "region", "pooling"), False),
        "mouth_opening_difference": Measure(("upper_lip", "lower_lip", "pooling"), False),
    },
    "face-editing": {
        "editing_accuracy": Measure((), True),
        "attribute_preservation": Measure((), True),
        "identity_similarity": Measure(("reference",), True),
        "frechet_distance": Measure((), False),
        "kernel_distance": Measure(("scale",), False),
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
        """Binds the hash of every region the protocol names.

        Args:
            regions: name to vertex indices.

        Raises:
            UserError: a region is missing, empty, or another than the protocol's.
        """
        hashes = {}
        for name in self.spec["regions"]:
            if name not in regions:
                raise UserError(
                    f"protocol '{self.name}': needs region '{name}', the data has {', '.join(sorted(regions))}"
                )
            indices = np.asarray(regions[name])
            if indices.size == 0:
                raise UserError(f"region '{name}': empty, expected vertex indices")
            if indices.min() < 0 or indices.max() >= self.spec["vertices"]:
                raise UserError(
                    f"region '{name}': index {indices.max()}, but the mesh has {self.spec['vertices']} vertices"
                )
            hashes[f"regions.{name}.sha256"] = region_hash(indices)
        return self.bind(hashes)


def available() -> list[str]:
    """Names of the protocols that ship with facebench."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


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
    for name, metric in spec["metrics"].items():
        measure = MEASURES[task].get(metric.get("measure"))
        if measure is None:
            raise UserError(f"{path}: metrics.{name}.measure must be one of {', '.join(MEASURES[task])}")
        for choice in measure.choices:
            if choice not in metric:
                raise UserError(f"{path}: metrics.{name}.{choice} missing; a protocol spells out every choice")
    if spec["primary"] not in spec["metrics"]:
        raise UserError(f"{path}: primary is '{spec['primary']}', expected one of {', '.join(spec['metrics'])}")
    if task == "speech-to-mesh":
        _check_speech(spec, path)


def _check_speech(spec: dict[str, Any], path: Path) -> None:
    for field, choices in (("coordinates", MILLIMETRES), ("unit", MILLIMETRES), ("length_mismatch", LENGTH_RULES)):
        if spec[field] not in choices:
            raise UserError(f"{path}: {field} is '{spec[field]}', expected one of {', '.join(choices)}")
    for name, metric in spec["metrics"].items():
        for field in ("region", "upper_lip", "lower_lip"):
            if metric.get(field, next(iter(spec["regions"]))) not in spec["regions"]:
                raise UserError(f"{path}: metrics.{name}.{field} is '{metric[field]}', not among regions")


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
