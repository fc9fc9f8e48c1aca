"""Expression meshes drawn from ICT-FaceKit (Li et al., CVPR 2020): identities x expressions with their weights.

Layout, as in its ``FaceXModel/``: ``generic_neutral_mesh.obj``, ``identity000.obj`` and on, ``vertex_indices.json``
with the list ``expressions``, and one ``<expression>.obj`` for each. All meshes share their vertices; a target less the
neutral mesh is a direction, and a face is the neutral mesh plus weighted directions.

An identity draws every identity weight from N(0, 1), as ICT's own script does. An expression draws a few active
weights from [0, 1]; the first expression of an identity is its neutral face. Identities of train, val and test (80, 10
and 10 %) are disjoint.

Members of one sample: ``offsets.npy`` (V, 3) float32 from the identity's neutral mesh, ``weights.npy`` (C,) float32 and
``json`` (subject). Beside the shards lie ``templates.safetensors`` and ``topology.safetensors``, as for talking heads.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from datamodules.errors import UserError
from datamodules.shards import Manifest, Sample, build_shards, npy_bytes
from datamodules.sources.layout import contents_hash, need, need_folder, read_text, shard_jobs
from datamodules.sources.meshes import read_mesh

VERSION = 1
SHARD_BYTES = 256e6
ACTIVE = 6.0  # weights above zero in an expression, on average


def build(
    root: Path,
    out: Path,
    identities: int = 100,
    expressions: int = 50,
    vertices: int | None = None,
    unit: str = "centimetre",
    seed: int = 0,
    limit: int | None = None,
    processes: int | None = None,
) -> Manifest:
    """Expression meshes drawn from ICT-FaceKit's identities and expressions.

    Example:
        facebench data ict --root ICT-FaceKit/FaceXModel --out data/ict --vertices 11248

    Args:
        root: folder with generic_neutral_mesh.obj, identity*.obj and the expressions.
        out: folder to write.
        identities: people to draw, at least 3.
        expressions: meshes of each, the neutral one among them.
        vertices: keeps only the first so many; the face comes first (9409), then head and neck (to 11248).
        unit: of the meshes, for the manifest.
        seed: of everything that is drawn.
        limit: most meshes of each split.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: a mesh is missing or has other vertices, or numbers that cannot be built.
    """
    need_folder(root)
    if identities < 3 or expressions < 1:
        raise UserError(f"--identities {identities} --expressions {expressions}: expected at least 3 and 1")
    model = read_model(root, vertices)
    val = max(1, identities // 10)
    borders = {"train": identities - 2 * val, "val": identities - val, "test": identities}
    people = {f"id{i:04d}": _draw_identity(model, seed, i) for i in range(identities)}
    splits: dict[str, list[Drawn]] = {split: [] for split in borders}
    for i, subject in enumerate(people):
        split = next(name for name, end in borders.items() if i < end)
        splits[split] += [Drawn(f"{subject}-{j:04d}", subject, (seed, 1, i, j)) for j in range(expressions)]
    fields = {
        "unit": unit,
        "topology": "ICT-FaceKit",
        "vertices": len(model.neutral),
        "subjects": list(people),
        "controls": model.names,
        "regions": {},
        "seed": seed,
    }
    files = {
        "templates.safetensors": save(people),
        "topology.safetensors": save({"triangles": model.triangles}),
    }
    plan = {"source": "ict", "version": VERSION, "fields": fields, "expressions": expressions, "limit": limit}
    plan["contents"] = contents_hash(files, model.directions)
    per_shard = max(1, round(SHARD_BYTES / (12 * len(model.neutral) + 2000)))
    return build_shards(
        out,
        shard_jobs(splits, DrawExpressions(model.directions), per_shard, limit),
        kind="expression-meshes",
        name="ICT-FaceKit",
        fields=fields,
        files=files,
        plan=plan,
        processes=processes,
    )


@dataclass(frozen=True)
class Model:
    """The morphable model.

    Attributes:
        neutral: (V, 3).
        triangles: (F, 3).
        identities: (I, V, 3) directions.
        names: of the C expressions, in ICT's order.
        directions: (C, V, 3) float32 directions of the expressions.
    """

    neutral: NDArray[np.float64]
    triangles: NDArray[np.int32]
    identities: NDArray[np.float64]
    names: list[str]
    directions: NDArray[np.float32]


@dataclass(frozen=True)
class Drawn:
    """One mesh to be drawn; ``seed`` decides its weights, and its last number is 0 for the neutral face."""

    key: str
    subject: str
    seed: tuple[int, ...]


def read_model(root: Path, vertices: int | None = None) -> Model:
    """Reads all meshes.

    Raises:
        UserError: one is missing or has other vertices than the neutral mesh.
    """
    path = need(root, "generic_neutral_mesh.obj")
    neutral, triangles = read_mesh(path)
    count = vertices or len(neutral)
    if not 0 < count <= len(neutral):
        raise UserError(f"--vertices {vertices}: expected 1 to {len(neutral)}, the vertices of {path}")
    names = read_names(need(root, "vertex_indices.json"))

    def direction(name: str) -> NDArray[np.float64]:
        target = need(root, f"{name}.obj")
        corners, _ = read_mesh(target)
        if len(corners) != len(neutral):
            raise UserError(f"{target}: {len(corners)} vertices, expected {len(neutral)} as {path.name} has")
        return (corners - neutral)[:count]

    people = sorted(mesh.stem for mesh in root.glob("identity*.obj"))
    if not people:
        raise UserError(f"{root}: no identity000.obj; expected ICT-FaceKit's FaceXModel")
    return Model(
        neutral[:count],
        np.ascontiguousarray(triangles[(triangles < count).all(1)]),
        np.stack([direction(name) for name in people]),
        names,
        np.stack([direction(name) for name in names]).astype(np.float32),
    )


def read_names(path: Path) -> list[str]:
    """The expressions in ICT's order.

    Raises:
        UserError: no list ``expressions``.
    """
    try:
        names: Any = json.loads(read_text(path))["expressions"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no list 'expressions' ({error!r}); copy ICT-FaceKit's file") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: 'expressions' is no list of names; copy ICT-FaceKit's file")
    return list(names)


def _draw_identity(model: Model, seed: int, number: int) -> NDArray[np.float32]:
    weights = np.random.default_rng([seed, 0, number]).standard_normal(len(model.identities))
    return (model.neutral + np.tensordot(weights, model.identities, axes=1)).astype(np.float32)


def draw_weights(seed: tuple[int, ...], count: int) -> NDArray[np.float32]:
    """(C,) in [0, 1], most of them zero; all zero for the neutral face."""
    if seed[-1] == 0:
        return np.zeros(count, np.float32)
    rng = np.random.default_rng(list(seed))
    active = rng.random(count) < min(1.0, ACTIVE / count)
    return (active * rng.random(count)).astype(np.float32)


@dataclass(frozen=True)
class DrawExpressions:
    """Plans -> samples, in a process of the build."""

    directions: NDArray[np.float32]

    def __call__(self, meshes: list[Drawn]) -> Iterator[Sample]:
        """Draws one mesh after the other."""
        for mesh in meshes:
            weights = draw_weights(mesh.seed, len(self.directions))
            members = {
                "offsets.npy": npy_bytes(np.tensordot(weights, self.directions, axes=1)),
                "weights.npy": npy_bytes(weights),
                "json": json.dumps({"subject": mesh.subject}).encode(),
            }
            yield Sample(mesh.key, 1, members)
