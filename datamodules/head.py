"""The demo head: a real morphable head model (MakeHuman / MPFB2, CC0) with the 52 ARKit units.

``Head.load()`` reads the packed asset (see ``datamodules.pack_head`` for how it was made). The whole model has
skin, mouth cavity, neck, eyes, teeth, tongue, hair and lashes. Speech and scoring use **demo-head**: the
exterior of the head, its first 3,689 vertices, so that ``vertices[..., : head.exterior, :]`` is always the
demo-head mesh and every region and landmark below indexes both.

Units: metres, y up, z toward the viewer, x to the subject's left; the origin lies between the eyeballs.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from scipy import sparse

Array = np.ndarray

ASSET = Path(__file__).parent / "assets" / "head.npz"
TOPOLOGY = "demo-head"

DELTA_UNIT = 1e-4  # metres: targets are written with three decimals of a decimetre, so integers of 0.1 mm hold them


@dataclass(frozen=True, eq=False)
class Head:
    """The head model.

    Attributes:
        vertices: (N, 3) float32, MakeHuman's base mesh, metres. It is nobody: see :meth:`identity`.
        part_quads: part name -> (Q, 4) vertex indices, counter-clockwise seen from outside. Parts: exterior,
            cavity, neck, eye_left, eye_right, teeth_upper, teeth_lower, tongue, hair, lashes.
        exterior: number of vertices of demo-head, which are the first ones.
        units: names of the 52 ARKit units, sorted.
        identity_names: names of the identity targets, ``folder/name``, ``macrodetails/...`` among them.
        painted: the UV-painted masks as vertex indices: lips, face, ears, eyelids.
        mouth_seam: vertices shared by exterior and cavity: the ring where the lips meet.
        landmarks: (68,) vertices of demo-head in the order of the iBUG 300-W markup (rules: ``pack_head``).
    """

    vertices: Array
    part_quads: dict[str, Array]
    exterior: int
    units: list[str]
    identity_names: list[str]
    painted: dict[str, Array]
    mouth_seam: Array
    landmarks: Array
    _unit_matrix: sparse.csr_array
    _identity_matrix: sparse.csr_array

    @staticmethod
    @lru_cache(maxsize=1)
    def load() -> "Head":
        """Reads the packed head that ships with the package (once per process)."""
        with np.load(ASSET, allow_pickle=False) as asset:
            arrays = {name: asset[name] for name in asset.files}
        quads, part = arrays["quads"].astype(np.int64), arrays["part_of_quad"]
        count = len(arrays["vertices"])
        return Head(
            vertices=arrays["vertices"],
            part_quads={str(name): quads[part == i] for i, name in enumerate(arrays["part_names"])},
            exterior=int(arrays["exterior_count"]),
            units=arrays["units_names"].tolist(),
            identity_names=arrays["identity_names"].tolist(),
            painted={name: arrays[f"painted_{name}"].astype(np.int64) for name in ("lips", "face", "ears", "eyelids")},
            mouth_seam=arrays["mouth_seam"].astype(np.int64),
            landmarks=arrays["landmarks"].astype(np.int64),
            _unit_matrix=_target_matrix(arrays, "units", count),
            _identity_matrix=_target_matrix(arrays, "identity", count),
        )

    # Shape

    def identity(self, weights: dict[str, float]) -> Array:
        """The neutral mesh of an identity.

        Args:
            weights: identity target names -> weight, usually in [0, 1]; unknown names are a KeyError.

        Returns:
            (N, 3) float32, metres, moved so that the origin lies between the eyeballs.
        """
        position = {name: i for i, name in enumerate(self.identity_names)}
        dense = np.zeros(len(position))
        for name, weight in weights.items():
            dense[position[name]] = weight
        neutral = self.vertices + (dense @ self._identity_matrix).reshape(-1, 3)
        return (neutral - neutral[self._eyes].mean(0)).astype(np.float32)

    def pose(self, neutral: Array, units: Array) -> Array:
        """Adds the face units to a neutral mesh.

        Args:
            neutral: (N, 3), or the demo-head part (3689, 3) of it, metres.
            units: (52,) or (T, 52) weights in [0, 1], in the order of ``units``.

        Returns:
            (N, 3) or (T, N, 3) float32, metres.
        """
        units = np.asarray(units, dtype=np.float64)
        offsets = (units @ self._unit_matrix[:, : neutral.size]).reshape(*units.shape[:-1], *neutral.shape)
        return (neutral + offsets).astype(np.float32)

    @cached_property
    def unit_deltas(self) -> Array:
        """(52, 3689, 3) float32, metres: what each unit at 1 moves on demo-head."""
        dense = self._unit_matrix[:, : self.exterior * 3].toarray()
        return dense.reshape(len(self.units), self.exterior, 3).astype(np.float32)

    # Topology

    def triangles_of(self, *parts: str) -> Array:
        """(F, 3) triangles of the named parts, each quad cut along its first diagonal."""
        quads = np.concatenate([self.part_quads[part] for part in parts])
        return np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])

    @cached_property
    def triangles(self) -> Array:
        """(7292, 3) the triangles of demo-head."""
        return self.triangles_of("exterior")

    def part(self, name: str) -> Array:
        """The vertices of a part, sorted."""
        return self._parts[name]

    @cached_property
    def _parts(self) -> dict[str, Array]:
        return {name: np.unique(quads) for name, quads in self.part_quads.items()}

    @cached_property
    def _eyes(self) -> Array:
        return np.concatenate([self.part("eye_left"), self.part("eye_right")])

    # Regions

    @cached_property
    def regions(self) -> dict[str, Array]:
        """Named vertex sets of demo-head, sorted indices.

        Painted by MakeHuman's artists (UV masks; see ``pack_head``): ``lips`` (270), ``face`` (2,045, the
        front of the head from hairline to chin, without ears), ``eyelids``, ``ears``. Derived here:

        - ``nose``: what the target nose/nose-volume-incr moves by over a tenth of its largest displacement.
        - ``eyes``: the eyelids and every face vertex within 25 mm of an eyeball's centre in the frontal view.
        - ``mouth``: the lips and three rings of vertices around them.
        - ``upper_face``: the face above the nostrils (midway between the tip of the nose and the upper lip),
          without the mouth: forehead, brows, eyes, nose and upper cheeks.
        - ``forehead``: the face more than 25 mm above the eyes' centres.
        - ``jaw``: the face below the corners of the mouth, without the mouth region.
        - ``chin``: the jaw within 20 mm of the middle.
        - ``scalp``: everything above or behind the hairline: not face, eyelids, lips or ears, above the ears'
          lower third.
        """
        v = self.vertices[: self.exterior]
        x, y = v[:, 0], v[:, 1]
        region = {name: _mask(indices, self.exterior) for name, indices in self.painted.items()}
        face = region["face"] | region["lips"] | region["eyelids"]
        region["face"] = face

        volume = np.linalg.norm(self.identity_delta("nose/nose-volume-incr")[: self.exterior], axis=1)
        region["nose"] = volume > 0.1 * volume.max()
        eyeballs = [self.vertices[self.part(eye)].mean(0) for eye in ("eye_left", "eye_right")]
        near = np.minimum(*(np.hypot(x - eye[0], y - eye[1]) for eye in eyeballs)) < 0.025
        region["eyes"] = face & near | region["eyelids"]
        region["mouth"] = self.grow(region["lips"], rings=3)

        tip = np.flatnonzero(region["nose"])[v[region["nose"], 2].argmax()]
        upper_lip = y[region["lips"]].max()
        region["upper_face"] = face & (y > (y[tip] + upper_lip) / 2) & ~region["mouth"]
        region["forehead"] = face & (y > 0.025)
        corners = y[self.mouth_seam][np.abs(x[self.mouth_seam]).argmax()]
        region["jaw"] = face & (y < corners) & ~region["mouth"]
        region["chin"] = region["jaw"] & (np.abs(x) < 0.02)
        ears = y[region["ears"]]
        above = y > ears.min() + (ears.max() - ears.min()) / 3
        region["scalp"] = above & ~face & ~region["ears"]
        return {name: np.flatnonzero(mask) for name, mask in region.items()}

    @cached_property
    def _adjacency(self) -> sparse.csr_array:
        edges = np.concatenate([self.triangles[:, [0, 1]], self.triangles[:, [1, 2]], self.triangles[:, [2, 0]]])
        ones = np.ones(len(edges), dtype=bool)
        matrix = sparse.coo_array((ones, tuple(edges.T)), shape=(self.exterior, self.exterior))
        return (matrix + matrix.T).tocsr()

    def grow(self, mask: Array, rings: int) -> Array:
        """A boolean mask (3689,) of demo-head, grown by rings of neighbouring vertices."""
        for _ in range(rings):
            mask = mask | (self._adjacency @ mask.astype(np.int8) > 0)
        return mask

    def identity_delta(self, name: str) -> Array:
        """(N, 3) float64, metres: what an identity target at 1 moves."""
        return self._identity_matrix[[self.identity_names.index(name)]].toarray().reshape(-1, 3)

    # Landmarks

    @cached_property
    def inner_lips(self) -> tuple[Array, Array]:
        """Upper and lower inner-lip vertices, from the subject's right corner to the left, both with corners."""
        right, left, upper, lower = self._seam
        return np.array([right, *upper, left]), np.array([right, *lower, left])

    @cached_property
    def _seam(self) -> tuple[int, int, list[int], list[int]]:
        """The ring where the lips meet: its corners, and the upper and lower vertices from right to left."""
        ring = _ordered_ring(self.mouth_seam, self._adjacency)
        x = self.vertices[ring, 0]
        ring = np.roll(ring, -int(x.argmin()))
        turn = int(self.vertices[ring, 0].argmax())
        one, other = ring[1:turn].tolist(), ring[turn + 1 :][::-1].tolist()
        if self.vertices[one, 1].mean() < self.vertices[other, 1].mean():
            one, other = other, one
        return int(ring[0]), int(ring[turn]), one, other


def _mask(indices: Array, count: int) -> Array:
    mask = np.zeros(count, dtype=bool)
    mask[indices] = True
    return mask


def _ordered_ring(vertices: Array, adjacency: sparse.csr_array) -> Array:
    """The vertices of a closed ring in the order of its edges."""
    inside = set(vertices.tolist())
    ring = [int(vertices[0])]
    while len(ring) < len(vertices):
        neighbours = adjacency.indices[adjacency.indptr[ring[-1]] : adjacency.indptr[ring[-1] + 1]]
        ring.append(next(int(v) for v in neighbours if v in inside and v not in ring))
    return np.array(ring)


def _target_matrix(arrays: dict[str, Array], kind: str, count: int) -> sparse.csr_array:
    """(targets, 3 N) sparse matrix of displacements in metres."""
    starts = arrays[f"{kind}_starts"].astype(np.int64)
    columns = arrays[f"{kind}_index"].astype(np.int64)[:, None] * 3 + np.arange(3)
    values = arrays[f"{kind}_delta"].ravel() * DELTA_UNIT
    return sparse.csr_array((values, columns.ravel(), starts * 3), shape=(len(starts) - 1, count * 3))
