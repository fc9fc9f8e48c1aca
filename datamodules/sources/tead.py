"""Text prompts with blendshape weights, in the manner of ExpCLIP's TEAD (Zhong et al., AAAI 2024), which is not public.

JSON lines with the keys ``text``, ``emotion``, ``aus`` (action unit -> 0 to 1) and ``blendshapes`` (a list of weights,
or name -> weight), and optionally ``split``. Lines without a split are dealt at random: 80 % train, 10 % val and 10 %
test.

Members of one sample: ``json`` (text, emotion, aus) and ``weights.npy`` (C,) float32.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.errors import UserError
from datamodules.shards import Manifest, Sample, build_shards, npy_bytes
from datamodules.sources.layout import contents_hash, read_text, shard_jobs, split_of

VERSION = 1
SHARD = 5000  # prompts


def build(
    root: Path,
    out: Path,
    seed: int = 0,
    limit: int | None = None,
    processes: int | None = None,
) -> Manifest:
    """Text prompts with emotion, action units and blendshape weights, from JSON lines.

    Example:
        facebench data tead --root tead.jsonl --out data/tead

    Args:
        root: the file, or a folder of .jsonl files.
        out: folder to write.
        seed: of the split of lines that name none.
        limit: most prompts of each split.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: no such file, or a line that lacks a key or has other blendshapes than the first.
    """
    files = sorted(root.glob("*.jsonl")) if root.is_dir() else [root]
    prompts = [prompt for path in files for prompt in read_prompts(path)]
    if not prompts:
        raise UserError(f"--root {root}: no prompt; expected JSON lines with text, emotion, aus and blendshapes")
    names = list(prompts[0].blendshapes)
    wrong = next((prompt for prompt in prompts if list(prompt.blendshapes) != names), None)
    if wrong is not None:
        raise UserError(f"{wrong.where}: blendshapes {list(wrong.blendshapes)}, expected {names} as in the first line")
    order = np.random.default_rng(seed).permutation(len(prompts))
    splits: dict[str, list[Prompt]] = {"train": [], "val": [], "test": []}
    for prompt, place in zip(prompts, order, strict=True):
        tenth = 10 * place // len(prompts)
        splits.setdefault(prompt.split or {8: "val", 9: "test"}.get(tenth, "train"), []).append(prompt)
    fields = {
        "controls": names,
        "emotions": sorted({prompt.labels["emotion"] for prompt in prompts}),
        "seed": seed,
    }
    contents = contents_hash(
        {split: [[p.key, p.labels, p.blendshapes] for p in taken[:limit]] for split, taken in splits.items()}
    )
    return build_shards(
        out,
        shard_jobs(splits, make_samples, SHARD, limit),
        kind="expression-prompts",
        name="TEAD-like prompts",
        fields=fields,
        plan={"source": "tead", "version": VERSION, "fields": fields, "contents": contents},
        processes=processes,
    )


@dataclass(frozen=True)
class Prompt:
    """One line."""

    key: str
    where: str
    split: str | None
    labels: dict[str, Any]
    blendshapes: dict[str, float]


def read_prompts(path: Path) -> list[Prompt]:
    """The lines of a file.

    Raises:
        UserError: not JSON, a key is missing, or a weight that is not between 0 and 1.
    """
    prompts = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            raw = json.loads(line)
            labels = {"text": str(raw["text"]), "emotion": str(raw["emotion"]), "aus": dict(raw["aus"])}
            weights = raw["blendshapes"]
            if isinstance(weights, list):
                weights = {f"blendshape_{i:02d}": weight for i, weight in enumerate(weights)}
            weights = {str(name): float(weight) for name, weight in weights.items()}
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{where} cannot be read ({error!r}), expected text, emotion, aus and blendshapes"
            ) from error
        if not all(0 <= weight <= 1 for weight in weights.values()):
            raise UserError(f"{where} has blendshape weights that are not between 0 and 1; mend or remove it")
        split = split_of(raw, path, default="") if raw.get("split") else None
        prompts.append(Prompt(f"{path.stem.replace('.', '-')}-{number:06d}", where, split, labels, weights))
    return prompts


def make_samples(prompts: list[Prompt]) -> Iterator[Sample]:
    """Lines -> samples, in a process of the build."""
    for prompt in prompts:
        members = {
            "json": json.dumps(prompt.labels, ensure_ascii=False).encode(),
            "weights.npy": npy_bytes(np.array(list(prompt.blendshapes.values()), np.float32)),
        }
        yield Sample(prompt.key, 1, members)
