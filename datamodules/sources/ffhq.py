"""FFHQ (Karras et al., CVPR 2019): 70,000 images, with the labels of FFHQ-Aging (Or-El et al., ECCV 2020) if wanted.

Layout: ``images1024x1024/00000/00000.png`` (or any folder of ``NNNNN.png``), ``ffhq_aging_labels.csv`` with the columns
image_number, age_group, age_group_confidence, gender, gender_confidence, head_pitch, head_roll, head_yaw,
left_eye_occluded, right_eye_occluded, glasses.
"""

import csv
import io
from pathlib import Path
from typing import Any, Literal

from datamodules.errors import UserError
from datamodules.shards import Manifest
from datamodules.sources.layout import need_folder, read_text
from datamodules.sources.pictures import Crop, Picture, build_files

VERSION = 1
ATTRIBUTES = ["Male", "Eyeglasses"]
OFFICIAL_TRAIN = 60_000  # ids below are training images in FFHQ's own split, the others validation
ADATRANS_TRAIN = 69_000

Splits = Literal["official", "adatrans"]


def build(
    root: Path,
    out: Path,
    images: Path | None = None,
    labels: Path | None = None,
    splits: Splits = "official",
    size: int | None = None,
    crop: Crop = "none",
    limit: int | None = None,
    processes: int | None = None,
) -> Manifest:
    """FFHQ, with FFHQ-Aging's labels if they are there.

    With labels, the attributes are Male and Eyeglasses, and the age is the lower bound of the age group in years.

    Example:
        facebench data ffhq --root FFHQ --out data/ffhq256 --splits adatrans --size 256

    Args:
        root: folder of the release.
        out: folder to write.
        images: folder of NNNNN.png; by default images1024x1024/ of the root, or the root itself.
        labels: FFHQ-Aging's csv; by default ffhq_aging_labels.csv of the root if it is there.
        splits: official (ids below 60000 train, the others val) or adatrans (ids below 69000 train, the others test;
            confident labels, near-frontal heads, visible eyes, no dark glasses).
        size: height and width to store, in pixels; by default that of the images.
        crop: center cuts out the largest square first.
        limit: most images of each split.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: no images, or labels that do not fit them.
    """
    need_folder(root)
    if images is None:
        images = root / "images1024x1024" if (root / "images1024x1024").is_dir() else root
    found = {int(path.stem): path for path in need_folder(images).rglob("*.png") if path.stem.isdigit()}
    if labels is None and (root / "ffhq_aging_labels.csv").is_file():
        labels = root / "ffhq_aging_labels.csv"
    if labels is None and splits == "adatrans":
        raise UserError(f"{root}: no ffhq_aging_labels.csv, which --splits adatrans needs; give --labels FILE")
    rows = read_labels(labels) if labels is not None else None
    if rows is not None and found.keys() - rows.keys():
        raise UserError(f"{labels}: no row for image {min(found.keys() - rows.keys()):05d}, which is in {images}")

    border, rest = (OFFICIAL_TRAIN, "val") if splits == "official" else (ADATRANS_TRAIN, "test")
    planned: dict[str, list[Picture]] = {"train": [], rest: []}
    for number in sorted(found):
        row = rows[number] if rows is not None else None
        if splits == "official" or (row is not None and is_clear(row)):
            picture = Picture(f"{number:05d}", found[number], {} if row is None else _labels(row))
            planned["train" if number < border else rest].append(picture)
    return build_files(
        out,
        planned,
        name="FFHQ" if rows is None else "FFHQ-Aging",
        version=VERSION,
        size=size,
        crop=crop,
        attributes=ATTRIBUTES if rows is not None else [],
        fields={"splits": splits},
        limit=limit,
        processes=processes,
    )


def read_labels(path: Path) -> dict[int, dict[str, Any]]:
    """Image number -> row of ``ffhq_aging_labels.csv``, numbers as floats.

    Raises:
        UserError: a column is missing or not a number.
    """
    words = ("age_group", "gender", "glasses")
    numbers = ["age_group_confidence", "gender_confidence", "head_pitch", "head_yaw"]
    numbers += ["left_eye_occluded", "right_eye_occluded"]
    rows: dict[int, dict[str, Any]] = {}
    for line, row in enumerate(csv.DictReader(io.StringIO(read_text(path))), start=2):
        try:
            values = {name: row[name] for name in words} | {name: float(row[name]) for name in numbers}
            rows[int(row["image_number"])] = values
            _age(values)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: line {line} cannot be read ({error!r}); give FFHQ-Aging's csv") from error
    return rows


def is_clear(row: dict[str, Any]) -> bool:
    """AdaTrans' choice of images, from its ``create_FFHQ_AGING``."""
    eyes = sorted((row["left_eye_occluded"], row["right_eye_occluded"]))
    return (
        row["age_group_confidence"] > 0.6
        and row["gender_confidence"] > 0.66
        and abs(row["head_pitch"]) < 30
        and abs(row["head_yaw"]) < 40
        and eyes[0] < 50
        and eyes[1] < 90
        and row["glasses"] != "Dark"
    )


def _age(row: dict[str, Any]) -> int:
    return int(row["age_group"].split("-")[0])


def _labels(row: dict[str, Any]) -> dict[str, Any]:
    attributes = [int(row["gender"] == "male"), int(row["glasses"] != "None")]
    return {"attributes": attributes, "age": _age(row), "age_group": row["age_group"]}
