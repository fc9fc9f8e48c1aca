"""CelebAText-HQ (Sun et al., ACM MM 2021): 15,010 images of CelebA-HQ with ten captions each, written by people.

Layout, as SEA-T2F's ``code/datasets.py`` reads it: ``CelebAimg/<n>.jpg``, ``captions/<n>.txt`` (one caption a line),
``data_flist/train.flist`` and ``data_flist/test.flist`` (one path a line), ``CelebAMask-HQ-attribute-anno.txt``.
"""

from pathlib import Path

from datamodules.shards import Manifest
from datamodules.sources.celebahq import numbered_images
from datamodules.sources.layout import need, need_folder, read_text
from datamodules.sources.mm_celebahq import build_captioned, number_of
from datamodules.sources.pictures import Crop

VERSION = 1


def build(
    root: Path,
    out: Path,
    celebamask: Path | None = None,
    size: int | None = None,
    crop: Crop = "none",
    limit: int | None = None,
    processes: int | None = None,
) -> Manifest:
    """CelebAText-HQ: ten captions by people for each image, attributes, and CelebAMask-HQ's masks if it is given.

    Example:
        facebench data celebatext-hq --root CelebAText-HQ --out data/celebatext --size 256

    Args:
        root: folder of the release.
        out: folder to write.
        celebamask: folder of CelebAMask-HQ, whose images have the same numbers, for masks.
        size: height and width to store, in pixels; by default that of the images.
        crop: center cuts out the largest square first.
        limit: most images of each split.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: a file is missing, or captions do not fit the images.
    """
    need_folder(root)
    lists = {split: need(root, f"data_flist/{split}.flist") for split in ("train", "test")}
    return build_captioned(
        out,
        {split: [number_of(line, path) for line in read_text(path).split()] for split, path in lists.items()},
        numbered_images(need(root, "CelebAimg", "images")),
        need(root, "captions"),
        name="CelebAText-HQ",
        version=VERSION,
        attributes=root if (root / "CelebAMask-HQ-attribute-anno.txt").is_file() else celebamask,
        masks=celebamask,
        size=size,
        crop=crop,
        split_from="lists",
        limit=limit,
        processes=processes,
    )
