"""Where two protocols differ, in words: why their scores must not be compared."""

from collections.abc import Iterator, Mapping
from typing import Any

from metrics.protocols import PROSE, Protocol

Metrics = dict[str, dict[str, Any]]

# Said of a metric: "FIRST squares the distance, SECOND takes the distance as it is".
PHRASES: dict[tuple[str, Any], str] = {
    ("variant", "squared"): "squares the distance",
    ("variant", "l2"): "takes the distance as it is",
    ("variant", "centred"): "takes the distance after moving the region's centroid to the origin in both meshes",
    ("over_vertices", "max"): "takes the worst vertex of each frame",
    ("over_vertices", "mean"): "averages over the vertices of each frame",
    ("pooling", "frames"): "weighs every frame of the test set alike",
    ("pooling", "clips"): "weighs every clip alike, whatever its length",
    ("pooling", "bilabials"): "weighs every m, b and p alike",
    ("signed", True): "keeps the sign, so that opposite errors cancel",
    ("signed", False): "takes the absolute value of each clip",
    ("pairing", "halves"): "pairs the samples of two shuffled halves",
    ("pairing", "all"): "pairs every sample with every other",
}
# Said of a protocol: "FIRST is for 25 frames per second, SECOND for ...".
NAMES = {
    "task": "the task",
    "topology": "the mesh",
    "vertices": "the number of vertices",
    "coordinates": "the unit of the coordinates",
    "unit": "the unit of the scores",
    "fps": "the frame rate",
    "head_motion": "head motion",
    "split": "the split",
    "length_mismatch": "the rule for clips of another length",
    "unseen_speaker": "the style of a speaker never seen",
    "samples": "the number of samples",
    "sample_axis": "what the samples of a clip are",
    "single_sample": "the sample that metrics of one prediction take",
    "primary": "the metric that ranks",
}


def differences(first: Protocol, second: Protocol) -> list[str]:
    """One sentence for each choice in which two protocols differ; none for protocols that measure the same.

    Metrics are compared where they have the same name and formula; of the others, each with the one of the same formula
    that is most like it.
    """
    names = _names(first, second)
    return [
        *_general(first, second, *names),
        *_regions(first.spec.get("regions", {}), second.spec.get("regions", {}), *names),
        *_metrics(first.metrics, second.metrics, *names),
    ]


def _names(first: Protocol, second: Protocol) -> tuple[str, str]:
    same = first.name == second.name
    return (f"the first {first.name}", f"the second {second.name}") if same else (first.name, second.name)


def _general(first: Protocol, second: Protocol, a: str, b: str) -> Iterator[str]:
    left, right = _flat(first.spec), _flat(second.spec)
    for field in [*left, *(field for field in right if field not in left)]:
        if left.get(field, ...) != right.get(field, ...):
            name = NAMES.get(field, field.replace(".", " "))
            yield f"{name}: {a} {_says(left, field)}, {b} {_says(right, field)}"


def _regions(first: Metrics, second: Metrics, a: str, b: str) -> Iterator[str]:
    for region in [*first, *(region for region in second if region not in first)]:
        if region not in first or region not in second:
            uses, does_not = (a, b) if region in first else (b, a)
            yield f"region {region}: {uses} uses it, {does_not} does not"
        elif first[region]["count"] != second[region]["count"]:
            yield f"region {region}: {a} {_counts(first[region])}, {b} {_counts(second[region])}"
        elif first[region]["sha256"] != second[region]["sha256"]:
            yield f"region {region}: {a} and {b} take other vertices"


def _counts(region: Mapping[str, Any]) -> str:
    return "takes the region that is given" if region["count"] is None else f"takes {region['count']} vertices"


def _flat(spec: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted field to value, without metrics, regions, words and the protocol's name."""
    flat: dict[str, Any] = {}
    for key, value in spec.items():
        if (prefix == "" and key in ("name", "metrics", "regions")) or key in PROSE:
            continue
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _says(fields: Mapping[str, Any], field: str) -> str:
    if field not in fields:
        return "has none"
    return "leaves it to whoever scores" if fields[field] is None else f"says {fields[field]}"


def _metrics(first: Metrics, second: Metrics, a: str, b: str) -> Iterator[str]:
    pairs = _paired(first, second)
    for left, right in pairs:
        one, other = first[left], second[right]
        label = left if left == right else f"{left} and {right}"
        formula = one["measure"].replace("_", " ")
        for choice in one:
            if choice not in PROSE and one[choice] != other.get(choice):
                yield f"{formula} ({label}): {a} {_does(choice, one)}, {b} {_does(choice, other)}"
    for metrics, taken, who, whom in (
        (first, {left for left, _ in pairs}, a, b),
        (second, {right for _, right in pairs}, b, a),
    ):
        for name, metric in metrics.items():
            if name not in taken:
                yield f"{metric['measure'].replace('_', ' ')} ({name}): {who} has it, {whom} does not"


def _does(choice: str, metric: Mapping[str, Any]) -> str:
    value = metric.get(choice, "nothing")
    return PHRASES.get((choice, value)) or f"takes {value} as {choice.replace('_', ' ')}"


def _paired(first: Metrics, second: Metrics) -> list[tuple[str, str]]:
    def unlike(left: str, right: str) -> int:
        one, other = first[left], second[right]
        return sum(one[choice] != other.get(choice) for choice in one if choice not in PROSE)

    pairs = [
        (left, right)
        for left, one in first.items()
        for right, other in second.items()
        if one["measure"] == other["measure"]
    ]
    chosen: list[tuple[str, str]] = []
    for left, right in sorted(pairs, key=lambda pair: (pair[0] != pair[1], unlike(*pair))):
        if all(left != one and right != other for one, other in chosen):
            chosen.append((left, right))
    return sorted(chosen, key=lambda pair: list(first).index(pair[0]))
