"""CelebA-HQ (Karras et al., ICLR 2018) with CelebAMask-HQ's attributes and masks (Lee et al., CVPR 2020).

Layout of CelebAMask-HQ: ``CelebA-HQ-img/<n>.jpg`` (1024 pixels), ``CelebAMask-HQ-attribute-anno.txt``,
``CelebAMask-HQ-mask-anno/<n // 2000>/<nnnnn>_<part>.png`` (512 pixels), ``CelebA-HQ-to-CelebA-mapping.txt``.

The split is CelebA's, through the mapping: 24,183 train, 2,993 val, 2,824 test.
"""

from pathlib import Path

from datamodules.errors import UserError
from datamodules.shards import Manifest
from datamodules.sources.celeba import read_attributes
from datamodules.sources.layout import need, need_folder, read_text, report_absent
from datamodules.sources.pictures import MASK_CLASSES, Crop, Picture, build_files

VERSION = 1
# CelebA's official partition by file number.
LAST_TRAIN, LAST_VAL = 162_770, 182_637


def build(
    root: Path,
    out: Path,
    masks: bool = True,
    size: int | None = None,
    crop: Crop = "none",
    limit: int | None = None,
    processes: int | None = None,
) -> Manifest:
    """CelebA-HQ / CelebAMask-HQ: attributes, and the masks of all parts as one map of class indices.

    Example:
        facebench data celebahq --root CelebAMask-HQ --out data/celebahq --size 256

    Args:
        root: folder of CelebAMask-HQ.
        out: folder to write.
        masks: whether to store the masks; at the images' size, by nearest neighbour.
        size: height and width to store, in pixels; by default that of the images.
        crop: center cuts out the largest square first.
        limit: most images of each split.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: a file is missing, or the lists do not fit the images.
    """
    need_folder(root)
    found = numbered_images(need(root, "CelebA-HQ-img"))
    names, attributes = numbered_attributes(root)
    parts = numbered_masks(root) if masks else {}
    path = need(root, "CelebA-HQ-to-CelebA-mapping.txt")
    splits: dict[str, list[Picture]] = {"train": [], "val": [], "test": []}
    absent = []
    for number, split in read_splits(path).items():
        if number not in found:
            absent.append(f"{number}.jpg")
            continue
        if number not in attributes or (masks and number not in parts):
            what = "attributes" if number not in attributes else "masks"
            raise UserError(f"{found[number]}: no {what} of this image in {root}; copy the release again")
        labels = {"attributes": attributes[number]}
        splits[split].append(Picture(f"{number:05d}", found[number], labels, parts.get(number, {})))
    report_absent("CelebA-HQ", absent, sum(map(len, splits.values())) + len(absent), "images are absent")
    return build_files(
        out,
        splits,
        name="CelebA-HQ",
        version=VERSION,
        size=size,
        crop=crop,
        attributes=names,
        mask_classes=MASK_CLASSES if masks else [],
        limit=limit,
        processes=processes,
    )


def numbered_images(folder: Path) -> dict[int, Path]:
    """Number -> ``<number>.jpg`` (or png), in the order of the numbers."""
    found = {int(path.stem): path for path in folder.iterdir() if path.stem.isdigit()}
    return dict(sorted(found.items()))


def numbered_attributes(root: Path) -> tuple[list[str], dict[int, list[int]]]:
    """Names of the attributes, and number -> 0 or 1 of each."""
    names, rows = read_attributes(need(root, "CelebAMask-HQ-attribute-anno.txt"))
    return names, {int(Path(file).stem): values for file, values in rows.items()}


def numbered_masks(root: Path) -> dict[int, dict[str, Path]]:
    """Number -> part -> file."""
    masks: dict[int, dict[str, Path]] = {}
    for path in sorted(need(root, "CelebAMask-HQ-mask-anno").rglob("*.png")):
        number, _, part = path.stem.partition("_")
        if number.isdigit() and part:
            masks.setdefault(int(number), {})[part] = path
    return masks


def read_splits(path: Path) -> dict[int, str]:
    """Number -> split of its original in CelebA, from lines ``idx orig_idx orig_file`` behind a heading.

    Raises:
        UserError: another format.
    """
    splits = {}
    for line in read_text(path).splitlines()[1:]:
        if not line.strip():
            continue
        try:
            number, _, file = line.split()
            original = int(Path(file).stem)
        except ValueError as error:
            raise UserError(f"{path}: line '{line}', expected 'idx orig_idx orig_file'") from error
        splits[int(number)] = "train" if original <= LAST_TRAIN else "val" if original <= LAST_VAL else "test"
    return splits
