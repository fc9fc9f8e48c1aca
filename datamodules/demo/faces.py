"""The demo corpus of faces: rendered people with labels that are exact by construction.

Every identity appears in several pictures with its own pose, expression, light and look. With a picture come
CelebA's attribute names, the age, a segmentation mask with CelebAMask-HQ's classes, 68 landmarks, head pose, the 52
ARKit units, and captions in five languages. Attributes are clear-cut: a smile is drawn strongly or hardly at all,
and nobody is between 34 and 50 years old.

Identities of train, val and test are disjoint. The attribute compositions in ``HELD_OUT`` occur in test only, where
``unseen_composition`` marks them.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.demo import captions, looks
from datamodules.demo.looks import Identity, Look, Mesh
from datamodules.errors import UserError
from datamodules.head import Head
from datamodules.render import Camera, Light, Raster, interpolate, rasterise, shade, to_image, to_labels
from datamodules.shards import Manifest, Sample, ShardJob, build_shards

Array = np.ndarray

VERSION = 1
ATTRIBUTES = ["Male", "Young", "Smiling", "Mouth_Slightly_Open", "Eyeglasses", "Black_Hair", "Blond_Hair", "Brown_Hair"]
ATTRIBUTES += ["Gray_Hair", "Bald", "Mustache", "Goatee", "No_Beard", "Wearing_Lipstick", "Pale_Skin", "Bushy_Eyebrows"]
ATTRIBUTES += ["Big_Nose", "Pointy_Nose", "Big_Lips", "Chubby", "Narrow_Eyes"]
HELD_OUT = [("Blond_Hair", "Eyeglasses"), ("Bald", "Goatee"), ("Chubby", "Mustache"), ("Gray_Hair", "Wearing_Lipstick")]

PICTURES = 4  # of every identity
SHARD = 250  # pictures
MIN_DISTANCE = 1.0e-3  # metres, root mean square over the 68 landmarks of two identities' neutral faces
SPLITS = ("train", "val", "test")
# As in FFHQ, the eyes lie a little above the middle and the face fills the picture.
CAMERA = Camera(centre=(0.0, -0.010, 0.0), distance=1.2, frame=0.245)


@dataclass(frozen=True)
class View:
    """How one picture is taken.

    Attributes:
        yaw, pitch, roll: degrees; positive turns toward the subject's left, down, and to the subject's right
            shoulder.
        light: direction and strength.
        background: (2, 3) colours at the upper and lower edge.
    """

    yaw: float
    pitch: float
    roll: float
    light: Light
    background: Array


def build_faces(
    out: Path,
    train: int = 4000,
    val: int = 500,
    test: int = 1000,
    size: int = 64,
    seed: int = 0,
    processes: int | None = None,
) -> Manifest:
    """Builds the corpus as shards of about 250 pictures; equal arguments give equal bytes.

    Args:
        out: folder to write.
        train, val, test: pictures in each split.
        size: pixels per side.
        seed: of everything that is drawn.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: a size or count that cannot be built, or a folder that holds other data.
    """
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    if size < 16 or min(counts.values()) < 0:
        raise UserError(f"size {size}, counts {counts}: expected at least 16 pixels and no negative count")
    needed = {split: -(-count // PICTURES) for split, count in counts.items()}
    people = draw_identities(sum(needed.values()), seed)
    jobs, first = [], 0
    for split, count in counts.items():
        for shard, start in enumerate(range(0, count, SHARD)):
            numbers = range(start, min(start + SHARD, count))
            shown = {i: people[i] for i in range(first + numbers[0] // PICTURES, first + numbers[-1] // PICTURES + 1)}
            make = partial(make_samples, split, numbers, first, shown, size, seed)
            jobs.append(ShardJob(f"{split}-{shard:06d}.tar", split, make))
        first += needed[split]
    fields = {
        "size": size,
        "attributes": ATTRIBUTES,
        "mask_classes": looks.MASK_CLASSES,
        "units": Head.load().units,
        "landmarks": "iBUG 300-W, 68 points",
        "seed": seed,
        "identities": needed,
        "held_out_compositions": HELD_OUT,
    }
    plan = {"corpus": "demo faces", "version": VERSION, "counts": counts, "size": size, "seed": seed}
    return build_shards(
        Path(out), jobs, kind="faces", name="demo corpus", fields=fields, plan=plan, processes=processes
    )


def draw_identities(count: int, seed: int) -> list[Identity]:
    """Draws people who differ from each other by at least ``MIN_DISTANCE``."""
    head = Head.load()
    people: list[Identity] = []
    faces = np.empty((count, len(head.landmarks), 3))
    rng = np.random.default_rng([seed, len(SPLITS)])
    while len(people) < count:
        candidate = looks.sample_identity(rng)
        face = head.identity(candidate.shape)[head.landmarks]
        distance = np.sqrt(((faces[: len(people)] - face) ** 2).sum(-1).mean(-1))
        if distance.min(initial=np.inf) >= MIN_DISTANCE:
            faces[len(people)] = face
            people.append(candidate)
    return people


def make_samples(
    split: str, numbers: range, first: int, people: dict[int, Identity], size: int, seed: int
) -> Iterator[Sample]:
    """The pictures ``numbers`` of a split, whose first identity is ``first``."""
    for number in numbers:
        rng = np.random.default_rng([seed, SPLITS.index(split), number])
        who = first + number // PICTURES
        yield make_sample(f"{split}-{number:06d}", who, people[who], split == "test", size, rng)


def make_sample(
    key: str, number: int, identity: Identity, any_composition: bool, size: int, rng: np.random.Generator
) -> Sample:
    """Draws look, expression and view of one picture, renders it and writes down all that is known about it."""
    while True:
        look, expression = draw_look(identity, rng), draw_expression(rng)
        attributes = label_attributes(identity, look, expression)
        unseen = any(all(attributes[name] for name in names) for names in HELD_OUT)
        if any_composition or not unseen:
            break
    view = draw_view(rng)
    image, mask, landmarks = take_picture(identity, look, expression, view, size)
    labels = {
        "identity": number,
        "age": round(identity.age, 1),
        "attributes": [int(attributes[name]) for name in ATTRIBUTES],
        "unseen_composition": unseen,
        "landmarks": np.round(landmarks, 2).tolist(),
        "pose": {"yaw": round(view.yaw, 2), "pitch": round(view.pitch, 2), "roll": round(view.roll, 2)},
        "expression": np.round(expression, 4).tolist(),
        "captions": captions.english(attributes, rng),
        **captions.translated(attributes, rng),
    }
    members = {"png": png(image), "mask.png": png(mask), "json": json.dumps(labels, ensure_ascii=False).encode()}
    return Sample(key, 1, members)


# What is drawn for one picture


def draw_look(identity: Identity, rng: np.random.Generator) -> Look:
    """Glasses are more frequent in old age, lipstick is for women, beards are for men."""
    young = identity.traits["Young"]
    return Look(
        glasses=_some(rng, looks.FRAMES, 0.25 if young else 0.42),
        squareness=float(rng.uniform(2, 4.5)),
        lipstick=None if identity.male else _some(rng, looks.LIPSTICKS, 0.5),
        mustache=bool(identity.male and rng.random() < 0.3),
        goatee=bool(identity.male and rng.random() < 0.28),
        clothes=int(rng.integers(len(looks.CLOTHES))),
    )


def _some(rng: np.random.Generator, choices: dict, chance: float) -> str | None:
    return str(rng.choice(list(choices))) if rng.random() < chance else None


def draw_expression(rng: np.random.Generator) -> Array:
    """(52,) unit weights: smiling or not and open-mouthed or not, clearly, and small motion elsewhere."""
    weights = dict.fromkeys(Head.load().units, 0.0)

    def both(name: str, weight: float) -> None:
        weights[f"{name}Left"] = weights[f"{name}Right"] = weight

    if rng.random() < 0.45:
        smile = rng.uniform(0.6, 0.95)
        both("mouthSmile", smile)
        both("cheekSquint", 0.6 * smile)
        both("mouthDimple", 0.3 * smile)
    elif rng.random() < 0.3:
        both("mouthFrown", rng.uniform(0.1, 0.5))
    if rng.random() < 0.42:
        opening = rng.uniform(0.3, 0.55)
        weights["jawOpen"] = opening
        both("mouthUpperUp", 0.9 * opening)
        both("mouthLowerDown", 0.3 * opening)
    weights["browInnerUp"] = max(0.0, rng.normal(0, 0.25))
    both("browDown", max(0.0, rng.normal(-0.1, 0.25)))
    both("eyeBlink", rng.uniform(0, 0.12))
    gaze = rng.uniform(-0.35, 0.35)
    weights["eyeLookOutLeft" if gaze > 0 else "eyeLookInLeft"] = abs(gaze)
    weights["eyeLookInRight" if gaze > 0 else "eyeLookOutRight"] = abs(gaze)
    return np.round(np.clip(list(weights.values()), 0, 1), 4)


def draw_view(rng: np.random.Generator) -> View:
    """Yaw within 25, pitch within 10 and roll within 4 degrees; soft light from above; a plain background."""
    light = Light((rng.uniform(-0.6, 0.6), rng.uniform(0.1, 0.6), 1.0), rng.uniform(0.42, 0.55), 0.06)
    base = rng.uniform(0.35, 0.9) + rng.uniform(-0.09, 0.09, 3)
    background = np.clip(np.stack([base + 0.05, base - 0.05]), 0, 1)
    yaw, pitch, roll = (float(rng.uniform(-most, most)) for most in (25, 10, 4))
    return View(yaw, pitch, roll, light, background)


def label_attributes(identity: Identity, look: Look, expression: Array) -> dict[str, bool]:
    """The attributes of ``ATTRIBUTES``, from what was drawn."""
    unit = dict(zip(Head.load().units, expression, strict=True))
    hair = {f"{name.capitalize()}_Hair": not identity.bald and identity.hair == name for name in looks.HAIR_COLOURS}
    return {
        **identity.traits,
        **hair,
        "Male": identity.male,
        "Smiling": bool(unit["mouthSmileLeft"] > 0.3),
        "Mouth_Slightly_Open": bool(unit["jawOpen"] > 0.15),
        "Eyeglasses": look.glasses is not None,
        "Bald": identity.bald,
        "Mustache": look.mustache,
        "Goatee": look.goatee,
        "No_Beard": not (look.mustache or look.goatee),
        "Wearing_Lipstick": look.lipstick is not None,
        "Bushy_Eyebrows": identity.bushy_brows,
    }


# The picture


def take_picture(
    identity: Identity, look: Look, expression: Array, view: View, size: int, supersample: int = 4
) -> tuple[Array, Array, Array]:
    """Image (size, size, 3) uint8, mask (size, size) uint8 and landmarks (68, 2) in pixels."""
    head = Head.load()
    mesh = looks.dress(head.pose(head.identity(identity.shape), expression), identity, look)
    vertices = mesh.vertices @ rotation(view.yaw, view.pitch, view.roll).T
    raster = rasterise(CAMERA.project(vertices, size * supersample), mesh.triangles, size * supersample)
    image = paint(raster, mesh, vertices, view, supersample)
    mask = to_labels(raster, mesh.labels[raster.triangle], supersample)
    return image, mask, CAMERA.project(vertices[head.landmarks], size)[:, :2]


def paint(raster: Raster, mesh: Mesh, vertices: Array, view: View, supersample: int) -> Array:
    """Lights the mesh and puts it before the background."""
    lit = shade(vertices, mesh.triangles, mesh.colours, view.light)
    rows = np.linspace(0, 1, raster.size // supersample)[:, None, None]
    background = view.background[0] * (1 - rows) + view.background[1] * rows
    return to_image(raster, interpolate(raster, mesh.triangles, lit), supersample, background)


def rotation(yaw: float, pitch: float, roll: float) -> Array:
    """(3, 3) rotation of the head about the point between the eyes: roll, then pitch, then yaw; degrees."""
    (cy, cp, cr), (sy, sp, sr) = (f(np.radians([yaw, pitch, roll])) for f in (np.cos, np.sin))
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return about_y @ about_x @ about_z


def png(image: Array) -> bytes:
    """Lossless PNG bytes of an image or a label map."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
