"""People for the demo corpus: who somebody is (identity), how they look today (look), and the mesh that shows it.

An :class:`Identity` is a shape (weights of the head's identity targets) with an age, a skin tone, eyes and hair.
A :class:`Look` is what changes from picture to picture: glasses, lipstick, facial hair. :func:`dress` takes the
posed vertices of a head and gives everything that is drawn: skin coloured per vertex, irises, brows, wrinkles
and beards as thin patches that ride on the skin, hair, and the frame of the glasses.

Sizes are metres on MakeHuman's base mesh, whose face is about 0.15 m wide; colours are in [0, 1].
"""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import ArrayLike

from datamodules.head import Head
from datamodules.render import vertex_normals

Array = np.ndarray

# The classes of CelebAMask-HQ in its order; l_ and r_ are the subject's left and right here.
MASK_CLASSES = ["background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear"]
MASK_CLASSES += ["mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"]
LABEL = {name: i for i, name in enumerate(MASK_CLASSES)}

SKIN_TONES = np.array(
    [
        [0.97, 0.85, 0.79],
        [0.92, 0.74, 0.63],
        [0.82, 0.61, 0.48],
        [0.68, 0.47, 0.34],
        [0.50, 0.33, 0.24],
        [0.36, 0.23, 0.17],
    ]
)
HAIR_COLOURS = {
    "black": (0.06, 0.05, 0.05),
    "blond": (0.87, 0.71, 0.40),
    "brown": (0.36, 0.20, 0.10),
    "gray": (0.70, 0.70, 0.71),
}
EYE_COLOURS = {"brown": (0.30, 0.17, 0.08), "blue": (0.28, 0.48, 0.70), "green": (0.33, 0.47, 0.28)}
EYE_COLOURS |= {"dark": (0.14, 0.08, 0.05)}
LIPSTICKS = {"red": (0.78, 0.06, 0.12), "pink": (0.92, 0.22, 0.45), "plum": (0.52, 0.07, 0.28)}
FRAMES = {
    "black": (0.04, 0.04, 0.05),
    "brown": (0.28, 0.13, 0.06),
    "blue": (0.08, 0.12, 0.35),
    "red": (0.48, 0.06, 0.08),
}
NECKLINE = -0.175
UNDRAWN = ("hair", "tongue", "teeth_lower")  # strips of hair that cover the face, and what fills the mouth
CLOTHES = [
    (0.20, 0.25, 0.40),
    (0.75, 0.75, 0.78),
    (0.45, 0.15, 0.18),
    (0.18, 0.18, 0.20),
    (0.25, 0.42, 0.32),
    (0.80, 0.62, 0.35),
]


@dataclass(frozen=True)
class Identity:
    """Somebody.

    Attributes:
        shape: identity target -> weight.
        male, age: as drawn (years).
        skin: tone from 0 (pale) to 1 (dark).
        eyes, hair: names in ``EYE_COLOURS`` and ``HAIR_COLOURS``.
        bald, long_hair: hair style.
        volume: thickness of the hair, metres.
        fringe: how many rings of vertices the hair reaches into the forehead.
        bushy_brows: thick and dark brows.
        traits: CelebA attribute -> whether the shape was drawn to show it (Big_Nose, Chubby ...).
    """

    shape: dict[str, float]
    male: bool
    age: float
    skin: float
    eyes: str
    hair: str
    bald: bool
    long_hair: bool
    volume: float
    fringe: int
    bushy_brows: bool
    traits: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Look:
    """What somebody wears in one picture.

    Attributes:
        glasses, lipstick: names in ``FRAMES`` and ``LIPSTICKS``, or none.
        squareness: exponent of the superellipse of the glasses: 2 is round.
        mustache, goatee: facial hair.
        clothes: index in ``CLOTHES``.
    """

    glasses: str | None = None
    squareness: float = 3.0
    lipstick: str | None = None
    mustache: bool = False
    goatee: bool = False
    clothes: int = 0


@dataclass(frozen=True)
class Mesh:
    """What is drawn: vertices (N, 3) metres, triangles (F, 3), colours (N, 3), labels (F,) in ``MASK_CLASSES``."""

    vertices: Array
    triangles: Array
    colours: Array
    labels: Array


# Identities

# Attributes of the shape: the targets that show it, and the probability of having it.
TRAITS: dict[str, tuple[float, list[str]]] = {
    "Big_Nose": (0.3, ["nose/nose-scale-horiz-incr", "nose/nose-volume-incr", "nose/nose-flaring-incr",
                       "nose/nose-scale-vert-incr", "nose/nose-nostrils-width-incr"]),
    "Pointy_Nose": (0.3, ["nose/nose-point-width-decr", "nose/nose-nostrils-width-decr",
                          "nose/nose-scale-depth-incr", "nose/nose-width3-decr", "nose/nose-point-up"]),
    "Big_Lips": (0.3, ["mouth/mouth-upperlip-height-incr", "mouth/mouth-lowerlip-height-incr",
                       "mouth/mouth-upperlip-volume-incr", "mouth/mouth-lowerlip-volume-incr"]),
    "Chubby": (0.25, ["head/head-fat-incr", "head/head-round", "cheek/l-cheek-volume-incr",
                      "cheek/r-cheek-volume-incr", "neck/neck-double-incr"]),
    "Narrow_Eyes": (0.25, [f"eyes/{s}-eye-height{i}-decr" for s in "lr" for i in (1, 2, 3)]),
}  # fmt: skip
# Variation that no attribute names: pairs of opposite targets (both sides of the face together) and its size.
VARIATION: list[tuple[list[str], list[str], float]] = [
    (["head/head-scale-vert-decr"], ["head/head-scale-vert-incr"], 0.5),
    (["head/head-scale-horiz-decr"], ["head/head-scale-horiz-incr"], 0.4),
    (["head/head-square"], ["head/head-oval"], 0.6),
    (["head/head-triangular"], ["head/head-invertedtriangular"], 0.5),
    (["forehead/forehead-scale-vert-decr"], ["forehead/forehead-scale-vert-incr"], 0.5),
    (["eyebrows/eyebrows-angle-down"], ["eyebrows/eyebrows-angle-up"], 0.6),
    (["eyebrows/eyebrows-trans-down"], ["eyebrows/eyebrows-trans-up"], 0.5),
    (["nose/nose-scale-vert-decr"], ["nose/nose-scale-vert-incr"], 0.3),
    (["nose/nose-hump-decr"], ["nose/nose-hump-incr"], 0.5),
    (["nose/nose-trans-up"], ["nose/nose-trans-down"], 0.4),
    (["mouth/mouth-scale-horiz-decr"], ["mouth/mouth-scale-horiz-incr"], 0.5),
    (["mouth/mouth-trans-up"], ["mouth/mouth-trans-down"], 0.4),
    (["mouth/mouth-angles-down"], ["mouth/mouth-angles-up"], 0.2),
    (["chin/chin-width-decr"], ["chin/chin-width-incr"], 0.6),
    (["chin/chin-height-decr"], ["chin/chin-height-incr"], 0.5),
    (["chin/chin-prominent-decr"], ["chin/chin-prominent-incr"], 0.5),
    (["chin/chin-bones-decr"], ["chin/chin-bones-incr"], 0.5),
    (["cheek/l-cheek-bones-decr", "cheek/r-cheek-bones-decr"],
     ["cheek/l-cheek-bones-incr", "cheek/r-cheek-bones-incr"], 0.6),
    (["eyes/l-eye-trans-in", "eyes/r-eye-trans-in"], ["eyes/l-eye-trans-out", "eyes/r-eye-trans-out"], 0.5),
    (["eyes/l-eye-scale-decr", "eyes/r-eye-scale-decr"], ["eyes/l-eye-scale-incr", "eyes/r-eye-scale-incr"], 0.25),
    (["eyes/l-eye-corner2-down", "eyes/r-eye-corner2-down"], ["eyes/l-eye-corner2-up", "eyes/r-eye-corner2-up"], 0.6),
    (["ears/l-ear-scale-decr", "ears/r-ear-scale-decr"], ["ears/l-ear-scale-incr", "ears/r-ear-scale-incr"], 0.5),
    (["ears/l-ear-wing-decr", "ears/r-ear-wing-decr"], ["ears/l-ear-wing-incr", "ears/r-ear-wing-incr"], 0.5),
]  # fmt: skip


def sample_identity(rng: np.random.Generator) -> Identity:
    """Draws somebody. Attributes are clear-cut: a trait is drawn strongly or hardly at all."""
    male = bool(rng.random() < 0.5)
    young = bool(rng.random() < 0.6)
    age = float(rng.uniform(18, 34) if young else rng.uniform(50, 80))
    ancestry = str(rng.choice(["caucasian", "african", "asian"], p=[0.55, 0.2, 0.25]))
    pale = ancestry != "african" and rng.random() < 0.32
    tones = {"caucasian": (0.22, 0.45), "asian": (0.25, 0.45), "african": (0.62, 1.0)}[ancestry]
    tones = (0.0, 0.06) if pale else tones

    traits = {name: bool(rng.random() < chance) for name, (chance, _) in TRAITS.items()}
    if traits["Big_Nose"] and traits["Pointy_Nose"]:
        traits[str(rng.choice(["Big_Nose", "Pointy_Nose"]))] = False
    shape = macro_shape(male, age, ancestry, float(rng.uniform(0.75, 1)), 0.8 if traits["Chubby"] else 0.0)
    for name, (_, targets) in TRAITS.items():
        strength = rng.uniform(0.8, 1) if traits[name] else rng.uniform(0, 0.08)
        strength *= 0.55 if name == "Chubby" else 1
        shape |= {target: float(strength) for target in targets}
    for low, high, size in VARIATION:
        weight = float(np.clip(rng.normal(0, 0.6), -1, 1) * size)
        for target in low if weight < 0 else high:
            shape[target] = max(shape.get(target, 0.0), abs(weight))

    bald = bool(rng.random() < (0.22 if male else 0.02))
    gray = rng.random() < (0.04 if young else 0.55)
    natural = {"caucasian": [0.2, 0.42, 0.38], "african": [0.75, 0.05, 0.2], "asian": [0.65, 0.1, 0.25]}[ancestry]
    hair = "gray" if gray else str(rng.choice(["black", "blond", "brown"], p=natural))
    common = [0.35, 0.35, 0.2, 0.1] if ancestry == "caucasian" else [0.5, 0, 0, 0.5]
    eyes = str(rng.choice(list(EYE_COLOURS), p=common))
    return Identity(
        shape=shape,
        male=male,
        age=age,
        skin=float(rng.uniform(*tones)),
        eyes=eyes,
        hair=hair,
        bald=bald,
        long_hair=bool(not bald and rng.random() < (0.06 if male else 0.85)),
        volume=float(rng.uniform(0.006, 0.016)),
        fringe=int(rng.integers(1, 4)),
        bushy_brows=bool(rng.random() < (0.42 if male else 0.25)),
        traits=traits | {"Pale_Skin": bool(pale), "Young": young},
    )


def macro_shape(male: bool, age: float, ancestry: str, purity: float, fat: float) -> dict[str, float]:
    """Weights of the macro targets for a sex, an age from 11 to 90, an ancestry and a weight in [0, 1].

    Ages are blended as MakeHuman does, linearly between 11, 25 and 90 years. ``purity`` is the share of the named
    ancestry; the rest is divided evenly between the other two.
    """
    sex = "male" if male else "female"
    if age < 25:
        ages = {"child": (25 - age) / 14, "young": (age - 11) / 14}
    else:
        ages = {"young": (90 - age) / 65, "old": (age - 25) / 65}
    weights = {}
    for stage, share in ages.items():
        for name in ("caucasian", "african", "asian"):
            part = purity if name == ancestry else (1 - purity) / 2
            weights[f"macrodetails/{name}-{sex}-{stage}"] = share * part
        weights[f"macrodetails/universal-{sex}-{stage}-averagemuscle-maxweight"] = share * fat
    return weights


# Colours of the head itself


def skin_colour(identity: Identity) -> Array:
    """(3,) the colour of somebody's skin."""
    at = identity.skin * (len(SKIN_TONES) - 1)
    return np.array([np.interp(at, np.arange(len(SKIN_TONES)), SKIN_TONES[:, i]) for i in range(3)])


def hair_colour(identity: Identity) -> Array:
    """(3,) the colour of somebody's hair."""
    return np.array(HAIR_COLOURS[identity.hair])


def vertex_colours(identity: Identity, look: Look) -> Array:
    """(N, 3) colours of all vertices of the head model: skin, lips, scalp, eyes, teeth, lashes."""
    head = Head.load()
    skin = skin_colour(identity)
    colours = np.tile(skin, (len(head.vertices), 1))
    blush = np.clip(skin * [1.0, 0.93, 0.92], 0, 1)
    colours[: head.exterior] += _cheeks()[:, None] * (blush - skin)
    colours[head.regions["eyelids"]] *= [0.93, 0.88, 0.88]
    lips = np.array(LIPSTICKS[look.lipstick]) if look.lipstick else skin * [0.86, 0.66, 0.64]
    colours[head.part("cavity")] = [0.25, 0.06, 0.06]
    colours[head.regions["lips"]] = lips
    for part, colour in (("eye_left", 0.93), ("eye_right", 0.93), ("teeth_upper", 0.95), ("teeth_lower", 0.90)):
        colours[head.part(part)] = colour
    colours[head.part("tongue")] = [0.72, 0.30, 0.30]
    colours[head.part("lashes")] = [0.07, 0.05, 0.05]
    if not identity.bald:
        colours[: head.exterior][_haired(identity.fringe)] = hair_colour(identity) * 0.8
    neck = head.part("neck")
    colours[neck[head.vertices[neck, 1] < NECKLINE]] = CLOTHES[look.clothes]
    return colours


@cache
def _cheeks() -> Array:
    """(3689,) how rosy each vertex is: two soft spots."""
    head = Head.load()
    x, y, z = head.vertices[: head.exterior].T
    return np.exp(-(((np.abs(x) - 0.045) / 0.018) ** 2) - ((y + 0.038) / 0.018) ** 2) * (z > -0.03)


@cache
def _head_triangles() -> tuple[Array, Array]:
    """Triangles of everything of the head that is drawn, and their labels."""
    head = Head.load()
    drawn = [part for part in head.part_quads if part not in UNDRAWN]
    triangles = head.triangles_of(*drawn)
    label = np.full(len(head.vertices), LABEL["skin"])
    label[head.part("neck")] = LABEL["neck"]
    label[np.flatnonzero(head.vertices[:, 1] < NECKLINE)] = LABEL["cloth"]
    label[head.regions["nose"]] = LABEL["nose"]
    left = head.vertices[:, 0] > 0
    ears, lips = head.regions["ears"], head.regions["lips"]
    label[ears] = np.where(left[ears], LABEL["l_ear"], LABEL["r_ear"])
    middle = head.vertices[head.mouth_seam, 1].mean()
    label[lips] = np.where(head.vertices[lips, 1] > middle, LABEL["u_lip"], LABEL["l_lip"])
    for part in ("cavity", "teeth_upper", "teeth_lower", "tongue"):
        label[np.setdiff1d(head.part(part), head.mouth_seam)] = LABEL["mouth"]
    label[head.part("eye_left")] = LABEL["l_eye"]
    label[head.part("eye_right")] = LABEL["r_eye"]
    corners = label[triangles]
    # Where the corners of a triangle differ, skin gives way to the smaller part.
    return triangles, np.where(corners[:, 1] == corners[:, 2], corners[:, 1], corners.max(1))


# Patches that ride on the skin


@dataclass(frozen=True)
class Patch:
    """A grid of points fixed to triangles of the exterior, lifted off it.

    Attributes:
        corners: (P, 3) vertices of the triangle that carries each point.
        weights: (P, 3) barycentric.
        lift: metres along the normal.
        triangles: (F, 3) of the patch itself.
        edge: (P, 1) 1 on the rim of the grid, 0 inside.
    """

    corners: Array
    weights: Array
    lift: float
    triangles: Array
    edge: Array

    def place(self, vertices: Array, normals: Array) -> Array:
        """(P, 3) the points on a posed head."""
        weights = self.weights[..., None]
        return (vertices[self.corners] * weights).sum(1) + self.lift * (normals[self.corners] * weights).sum(1)


def grid_triangles(rows: int, columns: int) -> Array:
    """Triangles of a rows x columns grid of points."""
    first = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).ravel()
    a, b, c, d = first, first + 1, first + columns, first + columns + 1
    return np.concatenate([np.stack([a, c, b], 1), np.stack([b, c, d], 1)])


def patch(upper: Array, lower: Array, lift: float, rows: int = 4) -> Patch:
    """Spans a grid between two curves (n, 2) in the frontal view of the base mesh and fixes it to the skin."""
    head = Head.load()
    share = np.linspace(0, 1, rows)[:, None, None]
    points = (upper * (1 - share) + lower * share).reshape(-1, 2)
    a, b, c = np.moveaxis(head.vertices[head.triangles].astype(np.float64), 1, 0)
    area = _cross(b - a, c - a)
    sides = ((b, c), (c, a), (a, b))
    weights = np.stack([_cross(to - at, points[:, None] - at[:, :2]) for at, to in sides], axis=-1)
    weights /= np.where(area == 0, np.inf, area)[:, None]
    depth = (weights * np.stack([a[:, 2], b[:, 2], c[:, 2]], -1)).sum(-1)
    inside = (weights >= -1e-6).all(-1) & (area > 0)
    chosen = np.where(inside, depth, -np.inf).argmax(1)
    triangles = grid_triangles(rows, len(upper))
    if _cross(*np.diff(points[triangles[0]], axis=0)) < 0:
        triangles = triangles[:, ::-1]
    edge = np.pad(np.zeros((rows - 2, len(upper) - 2)), 1, constant_values=1).reshape(-1, 1)
    return Patch(head.triangles[chosen], weights[np.arange(len(points)), chosen], lift, triangles, edge)


def _cross(a: Array, b: Array) -> Array:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _stroke(points: list[tuple[float, float]], widths: list[float], count: int) -> tuple[Array, Array]:
    """Upper and lower edge (count, 2), in metres, of a brush stroke through points given in millimetres."""
    knots = np.array(points) / 1000
    along = np.linspace(0, len(knots) - 1, count)
    curve = np.stack([np.interp(along, np.arange(len(knots)), knots[:, i]) for i in range(2)], axis=1)
    width = np.interp(np.linspace(0, 1, count), np.linspace(0, 1, len(widths)), np.array(widths) * 1e-3)
    tangent = np.gradient(curve, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], 1) / np.linalg.norm(tangent, axis=1, keepdims=True)
    return curve + normal * width[:, None] / 2, curve - normal * width[:, None] / 2


# Strokes on the subject's left side, mirrored to the right: points (x, y) in mm and widths in mm along them.
Stroke = tuple[list[tuple[float, float]], list[float]]
BROW: list[tuple[float, float]] = [(12.5, 16.5), (22, 20), (33, 21.5), (43, 19), (51.5, 13)]
BROWS: dict[str, Stroke] = {"brow": (BROW, [3.5, 4.2, 4.2, 3.2, 1.2]), "bushy": (BROW, [7.5, 8.5, 8.2, 6.5, 3.0])}
WRINKLES: dict[str, Stroke] = {
    "nasolabial": ([(19.5, -40.5), (25.5, -50), (30.5, -62), (32, -73)], [1.0, 2.6, 2.2, 0.8]),
    "eye_bag": ([(17, -13), (26, -18.5), (36, -18.5), (45, -13.5)], [0.6, 2.2, 2.2, 0.6]),
    "crow_1": ([(52, 3), (62, 8)], [1.6, 0.6]),
    "crow_2": ([(52, -2), (62, -3)], [1.6, 0.6]),
    "crow_3": ([(51, -7), (60, -13)], [1.6, 0.6]),
    "marionette": ([(27, -74), (28, -83), (26, -90)], [1.8, 2.0, 0.6]),
}
FOREHEAD: dict[str, Stroke] = {
    f"forehead_{i}": ([(-36 + 4 * i, y - 3), (-20, y), (0, y - 1.5), (20, y), (36 - 4 * i, y - 3)], [0.6, 2, 2, 2, 0.6])
    for i, y in enumerate((46, 57, 68))
}


@cache
def patches() -> dict[str, Patch]:
    """All patches, by name; ``l_`` and ``r_`` are the subject's left and right."""
    made: dict[str, Patch] = {}
    for name, stroke in BROWS.items():
        made |= _both_sides(name, *_stroke(*stroke, count=14), lift=0.0012)
    for name, stroke in WRINKLES.items():
        made |= _both_sides(name, *_stroke(*stroke, count=8), lift=0.0006)
    for name, stroke in FOREHEAD.items():
        made[name] = patch(*_stroke(*stroke, count=16), lift=0.0008)
    across = np.linspace(-1, 1, 17)
    upper = np.stack([across * 0.026, -0.0475 - 0.0135 * np.abs(across) ** 1.8], 1)
    lower = np.stack([across * 0.0285, -0.0575 - 0.0115 * np.abs(across) ** 1.8], 1)
    made["mustache"] = patch(upper, lower, lift=0.0028)
    upper = np.stack([across * 0.021, -0.0810 - 0.004 * across**2], 1)
    lower = np.stack([across * 0.018, -0.1085 + 0.013 * across**2], 1)
    made["goatee"] = patch(upper, lower, lift=0.0035, rows=6)
    return made


def _both_sides(name: str, upper: Array, lower: Array, lift: float) -> dict[str, Patch]:
    mirror = np.array([-1, 1])
    return {f"l_{name}": patch(upper, lower, lift), f"r_{name}": patch(upper * mirror, lower * mirror, lift)}


# Everything together


class _Builder:
    """Collects pieces of a mesh."""

    def __init__(self, vertices: Array, triangles: Array, colours: Array, labels: Array):
        self.pieces = [(vertices, triangles, colours, labels)]
        self.count = len(vertices)

    def add(self, vertices: Array, triangles: Array, colour: ArrayLike, label: int) -> None:
        colours = np.broadcast_to(colour, vertices.shape)
        self.pieces.append((vertices, triangles + self.count, colours, np.full(len(triangles), label)))
        self.count += len(vertices)

    def mesh(self) -> Mesh:
        return Mesh(*(np.concatenate(column) for column in zip(*self.pieces, strict=True)))


def dress(vertices: Array, identity: Identity, look: Look) -> Mesh:
    """Everything that is drawn of somebody: the posed head with eyes, brows, wrinkles, hair, beard and glasses.

    Args:
        vertices: (N, 3) the whole head model, posed (``Head.pose``), before any rotation of the head, metres.
        identity: who.
        look: what they wear.
    """
    triangles, labels = _head_triangles()
    builder = _Builder(vertices, triangles, vertex_colours(identity, look), labels)
    normals = vertex_normals(vertices, triangles)
    _add_irises(builder, vertices, identity)
    _add_patches(builder, vertices, normals, identity, look)
    if not identity.bald:
        _add_hair(builder, vertices, normals, identity)
    if look.glasses:
        _add_glasses(builder, vertices, look)
    return builder.mesh()


def _add_irises(builder: _Builder, vertices: Array, identity: Identity) -> None:
    head = Head.load()
    turn = np.linspace(0, 2 * np.pi, 17)
    iris = np.array(EYE_COLOURS[identity.eyes])
    for part, label in (("eye_left", LABEL["l_eye"]), ("eye_right", LABEL["r_eye"])):
        ball = vertices[head.part(part)]
        centre = ball.mean(0)
        radius = np.linalg.norm(ball - centre, axis=1).max()
        front = ball[_front_ring(part)].mean(0) - centre
        front /= np.linalg.norm(front)
        side = np.cross([0, 1, 0], front)
        side /= np.linalg.norm(side)
        above = np.cross(front, side)
        rings = (0.0003, 0.0066, iris * 0.45), (0.0005, 0.0058, iris), (0.0007, 0.0027, np.full(3, 0.02))
        for lift, size, colour in rings:  # the iris' dark rim, the iris, the pupil
            reach = np.array([0, size])[:, None, None]
            ring = reach * (np.cos(turn)[:, None] * side + np.sin(turn)[:, None] * above)
            depth = np.sqrt(radius**2 - reach**2) + lift
            builder.add((centre + ring + depth * front).reshape(-1, 3), grid_triangles(2, 17), colour, label)
        glint = np.array([[-1, 1], [-1, -1], [1, 1], [1, -1]]) * 0.0011 + [0.0016, 0.0022]
        corner = centre + (radius + 0.001) * front + glint[:, :1] * side + glint[:, 1:] * above
        builder.add(corner, grid_triangles(2, 2), np.ones(3), label)


@cache
def _front_ring(part: str) -> Array:
    """Positions within an eye's vertices of the ring around its front pole."""
    head = Head.load()
    z = head.vertices[head.part(part), 2]
    return np.flatnonzero(z > z.max() - 1e-4)


def _add_patches(builder: _Builder, vertices: Array, normals: Array, identity: Identity, look: Look) -> None:
    skin, hair = skin_colour(identity), hair_colour(identity)
    placed = patches()

    def add(name: str, colour: Array, label: str) -> None:
        # The rim is half skin: hair and wrinkles have no hard edge.
        colours = colour + 0.5 * placed[name].edge * (skin - colour)
        builder.add(placed[name].place(vertices, normals), placed[name].triangles, colours, LABEL[label])

    # Light hair would vanish on light skin: brows and beards are darker, as they are in life.
    brow = hair * {"gray": 0.75, "blond": 0.62}.get(identity.hair, 0.9)
    thin = 0.75 * brow + 0.25 * skin
    for side in "lr":
        if identity.bushy_brows:
            add(f"{side}_bushy", brow * 0.8, f"{side}_brow")
        else:
            add(f"{side}_brow", thin, f"{side}_brow")
    depth = np.clip((identity.age - 42) / 30, 0, 1)
    if depth > 0:
        shadow = skin * (1 - depth * np.array([0.24, 0.30, 0.32]))
        for name in (*(f"{side}_{name}" for name in WRINKLES for side in "lr"), *FOREHEAD):
            add(name, shadow, "skin")
    for name in ("mustache", "goatee"):
        if getattr(look, name):
            add(name, brow, "skin")


@cache
def _haired(fringe: int) -> Array:
    """(3689,) bool: where hair grows: the scalp, and some rings of vertices into the forehead."""
    head = Head.load()
    scalp = np.zeros(head.exterior, dtype=bool)
    scalp[head.regions["scalp"]] = True
    return scalp | (head.grow(scalp, fringe) & (head.vertices[: head.exterior, 1] > 0.03))


@cache
def _scalp(fringe: int) -> tuple[Array, Array, Array]:
    """The haired vertices, the triangles among them, and how far (0 to 1) each lies from the hairline."""
    head = Head.load()
    inside = _haired(fringe)
    triangles = head.triangles[inside[head.triangles].all(1)]
    depth = np.zeros(head.exterior)
    eroded = inside.copy()
    for _ in range(4):
        eroded &= ~head.grow(~eroded, rings=1)
        depth += eroded / 4
    used = np.unique(triangles)
    position = np.full(head.exterior, -1)
    position[used] = np.arange(len(used))
    return used, position[triangles], depth[used]


@cache
def _strands(count: int) -> Array:
    """(count, 1) brightness of single strands."""
    return np.random.default_rng(7).uniform(0.8, 1.12, (count, 1))


def _add_hair(builder: _Builder, vertices: Array, normals: Array, identity: Identity) -> None:
    """A shell over the scalp, and for long hair a curtain around back and sides."""
    colour = hair_colour(identity)
    scalp, triangles, depth = _scalp(identity.fringe)
    above = np.clip((vertices[scalp, 1] - 0.02) / 0.08, 0.35, 1)
    thickness = 0.0015 + identity.volume * depth * above
    shell = vertices[scalp] + thickness[:, None] * normals[scalp]
    builder.add(shell, triangles, np.clip(colour * _strands(len(scalp)), 0, 1), LABEL["hair"])
    if identity.long_hair:
        curtain = _curtain(vertices[: Head.load().exterior], identity.volume)
        rows, columns, _ = curtain.shape
        strands = np.tile(_strands(columns), (rows, 1))
        builder.add(
            curtain.reshape(-1, 3), grid_triangles(rows, columns), np.clip(colour * strands, 0, 1), LABEL["hair"]
        )


def _curtain(skull: Array, volume: float) -> Array:
    """(16, 41, 3) a dome around the head above the ears' height, hanging and widening below, open in front."""
    level, bottom, steep = 0.03, -0.22, 1.45
    low, high = skull.min(0), skull.max(0)
    half = (high - low) / 2 * [1.02, 1, 1]
    middle = (low + high) / 2 - [0, 0, 0.015]
    turn = np.linspace(1, -1, 41) * np.radians(122)
    rise = np.linspace(0, 1, 7)[:0:-1] * steep
    top = high[1] + 0.7 * volume - level
    height = np.concatenate([level + top * np.sin(rise), np.linspace(level, bottom, 10)])[:, None]
    narrow = np.concatenate([np.cos(rise), np.ones(10)])[:, None]
    flare = narrow * (1 + 0.16 * np.clip((level - height) / 0.2, 0, 1) + 0.02 * np.sin(9 * turn + 2))
    x = middle[0] + half[0] * flare * np.sin(turn)
    z = middle[2] - half[2] * flare * np.cos(turn)
    return np.stack([x, np.broadcast_to(height, x.shape), z], axis=-1)


def _add_glasses(builder: _Builder, vertices: Array, look: Look) -> None:
    """Two superelliptic rims before the eyes, a bridge between them and temples that end behind the ears."""
    head = Head.load()
    colour = np.array(FRAMES[str(look.glasses)])
    front = vertices[head.regions["eyes"], 2].max() + 0.004
    half_width, half_height, half_rim, wrap = 0.0255, 0.0205, 0.0017, 0.04
    turn = np.linspace(0, 2 * np.pi, 33)
    outline = np.stack([np.sign(f) * np.abs(f) ** (2 / look.squareness) for f in (np.cos(turn), np.sin(turn))], axis=1)
    inner_edges = []
    for part, sign in (("eye_left", 1), ("eye_right", -1)):
        centre = vertices[head.part(part)].mean(0)
        x, y = centre[0] + sign * 0.001, centre[1] - 0.003
        half = np.array([half_width, half_height])
        rings = np.stack([outline * (half + half_rim), outline * (half - half_rim)]) + np.array([x, y])
        rim = np.concatenate([rings, front - wrap * np.abs(rings[..., :1])], axis=-1)
        builder.add(rim.reshape(-1, 3), grid_triangles(2, len(turn)), colour, LABEL["eye_g"])
        hinge, ear = x + sign * (half_width + 0.001), sign * 0.079
        depth = front - wrap * abs(hinge)
        temple = [[hinge, y + rise, depth] for rise in (0.010, 0.005)]
        temple += [[ear, y + rise, -0.07] for rise in (0.008, 0.004)]
        builder.add(np.array(temple), grid_triangles(2, 2), colour, LABEL["eye_g"])
        inner_edges.append(centre[0] - sign * (half_width - 0.001))
    bridge_y = vertices[head.part("eye_left"), 1].mean() + 0.004
    bridge = [[edge, bridge_y + side * 0.002, front] for side in (1, -1) for edge in reversed(inner_edges)]
    builder.add(np.array(bridge), grid_triangles(2, 2), colour, LABEL["eye_g"])
