"""Any folder of face images, with an optional CSV of attributes and captions.

The CSV has a row for each image and these columns; only the first is required::

    file        relative to the images' folder
    split       train, val, test or another name; by default train
    identity    a name; the same for all images of a person
    age         years
    captions    one or several, separated by |

Every other column is an attribute, 0 or 1 (or -1 or 1). Without a CSV, folders named train, val and test are splits,
and what lies elsewhere are training images.
"""

from pathlib import Path
from typing import Any

from datamodules.errors import UserError
from datamodules.shards import Manifest
from datamodules.sources.layout import need_folder, read_table, split_of
from datamodules.sources.pictures import SUFFIXES, Crop, Picture, build_files

VERSION = 2  # 2 turns photos as their EXIF data say
RESERVED = ("file", "split", "identity", "age", "captions")
SPLITS = ("train", "val", "test")


def build(
    root: Path,
    out: Path,
    table: Path | None = None,
    name: str = "images",
    size: int | None = None,
    crop: Crop = "none",
    limit: int | None = None,
    processes: int | None = None,
) -> Manifest:
    """Any folder of images, with an optional CSV of splits, identities, ages, captions and attributes.

    The CSV has the column file (relative to the root) and, where known, split, identity, age and captions (separated
    by |); every other column is an attribute, 0 or 1. Without it, the folders train/, val/ and test/ are splits.

    Example:
        facebench data image-folder --root photos --table photos.csv --out data/photos --size 256 --crop center

    Args:
        root: folder of images.
        out: folder to write.
        table: the CSV.
        name: of the data set, as printed on a leaderboard.
        size: height and width to store, in pixels; by default that of the images.
        crop: center cuts out the largest square first.
        limit: most images of each split.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: no images, images of several sizes, or a CSV that does not fit them.
    """
    need_folder(root)
    rows = read_table(table, ["file"]) if table else _rows(root)
    attributes = [column for column in (rows[0] if rows else {}) if column not in RESERVED]
    people: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: split_of(row, table or root) != "train"):  # training identities come first
        if row.get("identity"):
            people.setdefault(row["identity"], len(people))
    splits: dict[str, list[Picture]] = {}
    keys: dict[str, str] = {}
    for row in rows:
        file = row["file"]
        if not (root / file).is_file():
            raise UserError(f"{table}: file '{file}' is not in {root}; mend the column or give another --root")
        key = file.rpartition(".")[0].replace("/", "-").replace(".", "-")
        if keys.setdefault(key, file) != file:
            raise UserError(f"{root}: '{file}' and '{keys[key]}' get the same key '{key}'; rename one of them")
        picture = Picture(key, root / file, _labels(row, attributes, people, table or root))
        splits.setdefault(split_of(row, table or root), []).append(picture)
    identities = {
        split: len({picture.labels["identity"] for picture in pictures} - {None}) for split, pictures in splits.items()
    }
    return build_files(
        out,
        splits,
        name=name,
        version=VERSION,
        size=size,
        crop=crop,
        upright=True,
        attributes=attributes,
        fields={"identities": identities},
        limit=limit,
        processes=processes,
    )


def _rows(root: Path) -> list[dict[str, str]]:
    files = [path.relative_to(root) for path in sorted(root.rglob("*")) if path.suffix.lower() in SUFFIXES]
    return [
        {"file": str(file), "split": file.parts[0] if len(file.parts) > 1 and file.parts[0] in SPLITS else "train"}
        for file in files
    ]


def _labels(row: dict[str, str], attributes: list[str], people: dict[str, int], path: Path) -> dict[str, Any]:
    values = [row[name] for name in attributes]
    if not set(values) <= {"0", "1", "-1"}:
        wrong = next(name for name in attributes if row[name] not in ("0", "1", "-1"))
        raise UserError(f"{path}: '{row['file']}' has {wrong} = '{row[wrong]}', expected 0 or 1 (or -1 or 1)")
    try:
        age = float(row["age"]) if row.get("age") else None
    except ValueError as error:
        raise UserError(f"{path}: '{row['file']}' has age = '{row['age']}', expected years as a number") from error
    return {
        "attributes": [int(value == "1") for value in values],
        "identity": people.get(row.get("identity", "")),
        "age": age,
        "captions": [caption.strip() for caption in row.get("captions", "").split("|") if caption.strip()],
    }
