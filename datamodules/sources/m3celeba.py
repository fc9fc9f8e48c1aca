"""M3CelebA (Mofayezi et al., 2024): 173,314 faces with captions in five languages, masks and landmarks, as parquet.

Layout: ``train-*.parquet`` and ``test-*.parquet`` (in the root or in ``data/``) with the columns ``id``, ``image`` and
``mask`` (structs with the encoded image in ``bytes``), ``landmark`` (list of int32: x and y of each point) and
``captions_eng``, ``captions_fra``, ``captions_deu``, ``captions_ita``, ``captions_spa``.

The masks' classes are not documented; maps of indices are taken as CelebAMask-HQ's, maps of colours are refused.
Needs pyarrow (the extra ``data``).
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.errors import UserError
from datamodules.shards import Manifest, Sample
from datamodules.sources.layout import need_folder
from datamodules.sources.pictures import MASK_CLASSES, Crop, Format, build_pictures, face_sample, open_image

VERSION = 1
LANGUAGES = {"fra": "fr", "deu": "de", "ita": "it", "spa": "es"}


def build(
    root: Path,
    out: Path,
    masks: bool = True,
    size: int | None = None,
    crop: Crop = "none",
    limit: int | None = None,
    processes: int | None = None,
) -> Manifest:
    """M3CelebA: captions in five languages, masks and landmarks, from parquet files.

    Example:
        facebench data m3celeba --root M3CelebA --out data/m3celeba --size 256

    Args:
        root: folder of the parquet files, or the one above its data/.
        out: folder to write.
        masks: whether to store the masks.
        size: height and width to store, in pixels; by default that of the images.
        crop: center cuts out the largest square first.
        limit: most images of each split.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: no such files, a column is missing, masks that are not maps of indices, or pyarrow is not installed.
    """
    folder = need_folder(root) / "data" if (root / "data").is_dir() else root
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    for split, rows in splits.items():
        for path in sorted(folder.glob(f"{split}*.parquet")):
            rows += plan_file(path, masks)
    first = next((rows[0] for rows in splits.values() if rows), None)
    if first is None:
        raise UserError(f"{folder}: no train*.parquet or test*.parquet; point --root at the folder of M3CelebA")
    row = next(read_rows([first], masks))[1]
    name = f"{first.file}: row '{first.key}'"
    how = Format.of(open_image(io.BytesIO(row["image"]["bytes"]), name), name, size, crop)
    return build_pictures(
        out,
        splits,
        ReadRows(how, masks),
        name="M3CelebA",
        version=VERSION,
        how=how,
        mask_classes=MASK_CLASSES if masks else [],
        landmarks=f"M3CelebA, {len(row['landmark']) // 2} points",
        limit=limit,
        in_order=True,
        processes=processes,
    )


@dataclass(frozen=True)
class Row:
    """One image: which row of which group of which file."""

    key: str
    file: Path
    group: int
    number: int


def plan_file(path: Path, masks: bool) -> list[Row]:
    """The rows of a file, from its column ``id`` alone.

    Raises:
        UserError: not parquet, or a column is missing.
    """
    file = _open(path)
    missing = [name for name in _columns(masks) if name not in file.schema_arrow.names]
    if missing:
        raise UserError(f"{path}: no column '{missing[0]}', columns are {', '.join(file.schema_arrow.names)}")
    rows = []
    for group in range(file.num_row_groups):
        for number, value in enumerate(file.read_row_group(group, ["id"])["id"].to_pylist()):
            rows.append(Row(str(value).replace(".", "-").replace("/", "-"), path, group, number))
    return rows


def read_rows(rows: list[Row], masks: bool) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Rows with their contents; one row group is in memory at a time."""
    for (path, group), wanted in groupby(rows, key=lambda row: (row.file, row.group)):
        table = _open(path).read_row_group(group, _columns(masks))
        for row in wanted:
            yield row, table.slice(row.number, 1).to_pylist()[0]


@dataclass(frozen=True)
class ReadRows:
    """Rows -> samples, in a process of the build."""

    how: Format
    masks: bool

    def __call__(self, rows: list[Row]) -> Iterator[Sample]:
        """Reads one row after the other."""
        for row, values in read_rows(rows, self.masks):
            name = f"{row.file}: row '{row.key}'"
            points = values["landmark"] or []
            if len(points) % 2:
                raise UserError(f"{name} has {len(points)} numbers in 'landmark', expected pairs x, y")
            labels: dict[str, Any] = {
                "landmarks": np.array(points).reshape(-1, 2).tolist(),
                "captions": _captions(values["captions_eng"]),
            }
            labels |= {
                f"captions_{ours}": _captions(values[f"captions_{theirs}"]) for theirs, ours in LANGUAGES.items()
            }
            image = open_image(io.BytesIO(values["image"]["bytes"]), name)
            mask = self._mask(values["mask"]["bytes"], name) if self.masks else None
            yield face_sample(row.key, image, name, self.how, labels, mask)

    def _mask(self, contents: bytes, name: str) -> np.ndarray:
        image = open_image(io.BytesIO(contents), name)
        indices = np.array(image)
        if image.mode not in ("L", "P") or indices.max() >= len(MASK_CLASSES):
            raise UserError(
                f"{name} has a mask of mode {image.mode} with values up to {indices.max()}, expected class indices "
                f"below {len(MASK_CLASSES)}; add --masks false"
            )
        return indices


def _captions(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _columns(masks: bool) -> list[str]:
    captions = [f"captions_{language}" for language in ("eng", *LANGUAGES)]
    return ["id", "image", *(["mask"] if masks else []), "landmark", *captions]


def _open(path: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError("m3celeba: pyarrow is not installed; run: pip install 'facebench[data]'") from error
    try:
        return ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error}); copy it again") from error
