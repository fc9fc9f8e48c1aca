"""Multi-Modal-CelebA-HQ (Xia et al., CVPR 2021): 30,000 images of CelebA-HQ with ten captions each from a grammar.

Layout: ``images/<n>.jpg`` (512 pixels), ``text/<n>.txt`` (or ``text/celeba-caption/``), one caption a line, and the
split as pickled lists of names, ``train/filenames.pickle`` and ``test/filenames.pickle`` (or
``filenames_train.pickle``). Where no list is there, images below 24,000 train and the other 6,000 are the test.
"""

from pathlib import Path

from datamodules.errors import UserError
from datamodules.shards import Manifest
from datamodules.sources.celebahq import numbered_attributes, numbered_images, numbered_masks
from datamodules.sources.layout import need, need_folder, read_text, report_absent
from datamodules.sources.pickles import read_pickle
from datamodules.sources.pictures import MASK_CLASSES, Crop, Picture, build_files

VERSION = 1
LAST_TRAIN = 23_999


def build(
    root: Path,
    out: Path,
    celebamask: Path | None = None,
    size: int | None = None,
    crop: Crop = "none",
    limit: int | None = None,
    processes: int | None = None,
) -> Manifest:
    """Multi-Modal-CelebA-HQ: ten captions for each image, and CelebAMask-HQ's attributes and masks if it is given.

    Example:
        facebench data mm-celebahq --root multi_modal_celeba_hq --celebamask CelebAMask-HQ --out data/mm --size 256

    Args:
        root: folder of the release.
        out: folder to write.
        celebamask: folder of CelebAMask-HQ, whose images have the same numbers, for attributes and masks.
        size: height and width to store, in pixels; by default that of the images.
        crop: center cuts out the largest square first.
        limit: most images of each split.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: a file is missing, or captions do not fit the images.
    """
    need_folder(root)
    images = numbered_images(need(root, "images", "image"))
    lists = {split: _list(root, split) for split in ("train", "test")}
    if all(lists.values()):
        splits = {split: read_names(path) for split, path in lists.items() if path}
    elif any(lists.values()):
        raise UserError(f"{root}: holds filenames.pickle of one split only, expected train/ and test/; add the other")
    else:
        splits = {
            "train": [number for number in images if number <= LAST_TRAIN],
            "test": [number for number in images if number > LAST_TRAIN],
        }
    return build_captioned(
        out,
        splits,
        images,
        need(root, "text/celeba-caption", "text"),
        name="MM-CelebA-HQ",
        version=VERSION,
        attributes=celebamask,
        masks=celebamask,
        size=size,
        crop=crop,
        split_from="lists" if all(lists.values()) else f"numbers up to {LAST_TRAIN} train",
        limit=limit,
        processes=processes,
    )


def _list(root: Path, split: str) -> Path | None:
    names = [f"{split}/filenames.pickle", f"{split}/filenames_{split}.pickle", f"filenames_{split}.pickle"]
    return next((root / name for name in names if (root / name).is_file()), None)


def read_names(path: Path) -> list[int]:
    """Numbers from a pickled list of names (``"0"``, ``"0.jpg"``).

    Raises:
        UserError: anything else.
    """
    names = read_pickle(path)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str | int) for name in names):
        raise UserError(f"{path}: holds a {type(names).__name__}, expected a list of image names")
    return [number_of(str(name), path) for name in names]


def number_of(name: str, path: Path) -> int:
    """The number of an image's name.

    Raises:
        UserError: it has none.
    """
    stem = Path(name).stem
    if not stem.isdigit():
        raise UserError(f"{path}: name '{name}', expected the number of a CelebA-HQ image")
    return int(stem)


def build_captioned(
    out: Path,
    splits: dict[str, list[int]],
    images: dict[int, Path],
    captions: Path,
    *,
    name: str,
    version: int,
    attributes: Path | None,
    masks: Path | None,
    size: int | None,
    crop: Crop,
    split_from: str,
    limit: int | None,
    processes: int | None,
) -> Manifest:
    """Images of CelebA-HQ with captions, and attributes and masks of folders that hold CelebAMask-HQ's files.

    Raises:
        UserError: an image without captions, attributes or masks.
    """
    names, values = numbered_attributes(attributes) if attributes else ([], {})
    parts = numbered_masks(masks) if masks else {}
    planned: dict[str, list[Picture]] = {}
    absent = []
    for split, numbers in splits.items():
        planned[split] = []
        for number in numbers:
            if number not in images:
                absent.append(str(number))
                continue
            for kind, folder, known in (("attributes", attributes, values), ("masks", masks, parts)):
                if folder and number not in known:
                    raise UserError(f"{folder}: no {kind} of image {number}, which is in {images[number].parent}")
            lines = [line.strip() for line in read_text(captions / f"{number}.txt").splitlines() if line.strip()]
            if not lines:
                raise UserError(f"{captions / f'{number}.txt'}: holds no caption, expected one on each line")
            labels = {"captions": lines, "attributes": values.get(number, [])}
            planned[split].append(Picture(f"{number:05d}", images[number], labels, parts.get(number, {})))
    report_absent(name, absent, sum(map(len, splits.values())), "images of the split are absent")
    return build_files(
        out,
        planned,
        name=name,
        version=version,
        size=size,
        crop=crop,
        attributes=names,
        mask_classes=MASK_CLASSES if masks else [],
        fields={"split_from": split_from},
        limit=limit,
        processes=processes,
    )
