"""Face images from files: reading, resizing, samples and shards that every image source shares."""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from datamodules.errors import UserError
from datamodules.shards import Manifest, Sample, build_shards
from datamodules.sources.layout import K, contents_hash, shard_jobs

Crop = Literal["none", "center"]
SHARD_BYTES = 256e6
MOST_PICTURES = 2000  # in a shard
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# CelebAMask-HQ's parts in the order in which its script paints them; later ones cover earlier ones.
PARTS = ["skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip", "l_lip"]
PARTS += ["hair", "hat", "ear_r", "neck_l", "neck", "cloth"]
MASK_CLASSES = ["background", *PARTS]


@dataclass(frozen=True)
class Picture:
    """One image and what is known about it.

    Attributes:
        key: the sample's key; no dots.
        image: the file.
        labels: entries of the sample's ``json``, see :func:`face_sample`.
        masks: part -> file of a mask, as CelebAMask-HQ has them.
    """

    key: str
    image: Path
    labels: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """How images are stored.

    Attributes:
        size: height and width in pixels.
        resize: whether images of another size are resized (LANCZOS, masks by nearest neighbour) or refused.
        crop: ``center`` cuts out the largest square in the middle first.
    """

    size: int
    resize: bool
    crop: Crop

    @classmethod
    def of(cls, first: Image.Image, name: str, size: int | None, crop: Crop) -> "Format":
        """What the options say, and where they leave the size open, the first image.

        Raises:
            UserError: a size below 1, or an image that is not square.
        """
        if size is not None and size < 1:
            raise UserError(f"--size {size}: expected at least 1 pixel")
        side = cls(0, False, crop).square(first, name).width
        return cls(size or side, size is not None, crop)

    def square(self, image: Image.Image, name: str) -> Image.Image:
        """The image, cropped if it shall be.

        Raises:
            UserError: not square.
        """
        width, height = image.size
        if self.crop == "center" and width != height:
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            return image.crop((left, top, left + side, top + side))
        if width != height:
            raise UserError(
                f"{name}: {width} x {height} pixels, expected a square; align the faces first, or add --crop center"
            )
        return image

    def fit(self, image: Image.Image, name: str, resample: Image.Resampling) -> Image.Image:
        """The image in this size.

        Raises:
            UserError: not square, or of another size where that shall not be.
        """
        image = self.square(image, name)
        if image.width == self.size:
            return image
        if not self.resize:
            raise UserError(
                f"{name}: {image.width} pixels square, but the first image has {self.size}; give --size to resize all"
            )
        return image.resize((self.size, self.size), resample)


def open_image(path: Path | io.BytesIO, name: str, upright: bool = False) -> Image.Image:
    """A decoded image; ``upright`` turns it as its EXIF data say.

    Raises:
        UserError: no such file, or not an image.
    """
    try:
        image = Image.open(path)
        image.load()
        return ImageOps.exif_transpose(image) if upright else image
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise UserError(f"{name}: not an image that can be read ({error}); copy it again or remove it") from error


def face_sample(
    key: str,
    image: Image.Image,
    name: str,
    how: Format,
    labels: dict[str, Any],
    mask: NDArray[np.uint8] | None = None,
) -> Sample:
    """A sample of kind ``faces``, re-encoded as PNG.

    Args:
        key: of the sample.
        image: of any mode; stored as RGB.
        name: of the file, for errors.
        how: size and crop.
        labels: entries of the ``json``: ``attributes`` (0 or 1), ``identity``, ``age``, ``landmarks`` (N, 2) in the
            image's pixels, ``captions`` and what else is known; empty or null where not given.
        mask: (H', W') class indices of the whole image, in any size.

    Raises:
        UserError: see :meth:`Format.fit`.
    """
    everything = {"attributes": [], "identity": None, "age": None, "landmarks": [], "captions": [], **labels}
    if everything["landmarks"]:
        everything["landmarks"] = _move(np.array(everything["landmarks"], np.float64), image, how).tolist()
    if mask is not None:
        # As large as the image, so that both are cropped alike.
        mask_image = Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST)
        mask_image = how.fit(mask_image, name, Image.Resampling.NEAREST)
    members = {"png": png(how.fit(image.convert("RGB"), name, Image.Resampling.LANCZOS))}
    if mask is not None:
        members["mask.png"] = png(mask_image)
    members["json"] = json.dumps(everything, ensure_ascii=False).encode()
    return Sample(key, 1, members)


def _move(landmarks: NDArray[np.float64], image: Image.Image, how: Format) -> NDArray[np.float64]:
    side = min(image.size)
    corner = np.array([(image.width - side) // 2, (image.height - side) // 2])
    return np.round((landmarks - corner) * how.size / side, 3)


def png(image: Image.Image) -> bytes:
    """Lossless PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def merge_masks(parts: dict[str, Path]) -> NDArray[np.uint8]:
    """One map of class indices from one mask for each part, as CelebAMask-HQ's ``g_mask.py`` paints it.

    Raises:
        UserError: a mask that cannot be read, or masks of several sizes.
    """
    merged: NDArray[np.uint8] | None = None
    for index, part in enumerate(PARTS, start=1):
        if part not in parts:
            continue
        painted = np.array(open_image(parts[part], str(parts[part])).convert("RGB"))[..., 2] != 0
        if merged is None:
            merged = np.zeros(painted.shape, np.uint8)
        if painted.shape != merged.shape:
            raise UserError(f"{parts[part]}: {painted.shape}, expected {merged.shape} as the other parts have it")
        merged[painted] = index
    if merged is None:
        raise UserError(f"no mask of any known part among {', '.join(parts) or 'none'}; expected {', '.join(PARTS)}")
    return merged


@dataclass(frozen=True)
class ReadPictures:
    """Image files -> samples, in a process of the build.

    Attributes:
        how: size and crop.
        upright: whether images are turned as their EXIF data say.
    """

    how: Format
    upright: bool = False

    def __call__(self, pictures: list[Picture]) -> Iterator[Sample]:
        """Reads one picture after the other."""
        for picture in pictures:
            mask = merge_masks(picture.masks) if picture.masks else None
            image = open_image(picture.image, str(picture.image), self.upright)
            yield face_sample(picture.key, image, str(picture.image), self.how, picture.labels, mask)


def build_files(
    out: Path,
    splits: dict[str, list[Picture]],
    *,
    name: str,
    size: int | None,
    crop: Crop,
    upright: bool = False,
    **settings: Any,
) -> Manifest:
    """:func:`build_pictures` of image files; the first decides the size where ``size`` does not.

    ``upright`` is for photos as cameras write them: releases are aligned by their stored pixels.
    """
    first = next((pictures[0] for pictures in splits.values() if pictures), None)
    if first is None:
        raise UserError(f"{name}: no image of any split was found; point --root at the folder of the official release")
    how = Format.of(open_image(first.image, str(first.image), upright), str(first.image), size, crop)
    return build_pictures(out, splits, ReadPictures(how, upright), name=name, how=how, **settings)


def build_pictures(
    out: Path,
    splits: dict[str, list[K]],
    make: Callable[[list[K]], Iterable[Sample]],
    *,
    name: str,
    version: int,
    how: Format,
    attributes: list[str] | None = None,
    mask_classes: list[str] | None = None,
    landmarks: str | None = None,
    fields: dict[str, Any] | None = None,
    limit: int | None = None,
    in_order: bool = False,
    processes: int | None = None,
) -> Manifest:
    """Builds shards of kind ``faces``.

    Args:
        out: folder to write.
        splits: split -> planned pictures.
        make: planned pictures -> samples; picklable.
        name: the data set's, as printed on a leaderboard.
        version: of the source; another one makes other shards of the same files.
        how: size and crop.
        attributes, mask_classes: names; empty where the data has none.
        landmarks: what the points are; None where the data has none.
        fields: further fields of the manifest.
        limit: most pictures of each split.
        in_order: see :func:`datamodules.sources.layout.shard_jobs`.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: no pictures, pictures that do not decode or fit, or what :func:`build_shards` refuses.
    """
    if not any(splits.values()):
        raise UserError(f"{name}: no image of any split was found; point --root at the folder of the official release")
    described = {
        "size": how.size,
        "crop": how.crop,
        "resize": "LANCZOS" if how.resize else None,
        "attributes": attributes or [],
        "mask_classes": mask_classes or [],
        "landmarks": landmarks,
        "identities": {},
        **(fields or {}),
    }
    per_shard = int(np.clip(round(SHARD_BYTES / (1.5 * how.size**2 + 1000)), 1, MOST_PICTURES))
    jobs = shard_jobs(splits, make, per_shard, limit, in_order)
    taken = {split: pictures[:limit] for split, pictures in splits.items()}
    plan = {"source": name, "version": version, "fields": described, "contents": contents_hash(taken, make)}
    return build_shards(out, jobs, kind="faces", name=name, fields=described, plan=plan, processes=processes)
