"""CelebA (Liu et al., ICCV 2015): 202,599 aligned images of 10,177 people with 40 attributes and 5 landmarks.

Layout: ``Img/img_align_celeba/NNNNNN.jpg``, ``Anno/list_attr_celeba.txt``, ``Anno/identity_CelebA.txt``,
``Anno/list_landmarks_align_celeba.txt``, ``Eval/list_eval_partition.txt``; all of them may also lie in the root.
"""

from pathlib import Path

from datamodules.errors import UserError
from datamodules.shards import Manifest
from datamodules.sources.layout import need, need_folder, read_text, report_absent
from datamodules.sources.pictures import Crop, Picture, build_files

VERSION = 1
SPLITS = {"0": "train", "1": "val", "2": "test"}


def build(
    root: Path,
    out: Path,
    images: Path | None = None,
    size: int | None = None,
    crop: Crop = "none",
    limit: int | None = None,
    processes: int | None = None,
) -> Manifest:
    """CelebA with attributes, identities and the official partition.

    The released images are 178 x 218 pixels: add --crop center, or give a folder of images that were aligned to a
    square (AdaTrans aligns them as FFHQ is).

    Example:
        facebench data celeba --root CelebA --out data/celeba --crop center --size 128

    Args:
        root: folder of the release.
        out: folder to write.
        images: folder of NNNNNN.jpg or .png; by default img_align_celeba/. Landmarks are kept only with the default.
        size: height and width to store, in pixels; by default that of the images.
        crop: center cuts out the largest square first.
        limit: most images of each split.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: a file is missing, or the lists do not fit each other.
    """
    need_folder(root)
    names, attributes = read_attributes(_find(root, "Anno", "list_attr_celeba.txt"))
    partition_file = _find(root, "Eval", "list_eval_partition.txt")
    partition = _pairs(partition_file)
    identity = _pairs(_find(root, "Anno", "identity_CelebA.txt"))
    released = images is None
    folder = need_folder(images or _find(root, "Img", "img_align_celeba"))
    points = read_points(root) if released else {}
    found = {path.stem: path for path in sorted(folder.iterdir())}

    splits: dict[str, list[str]] = {split: [] for split in SPLITS.values()}
    for file, number in partition.items():
        if number not in SPLITS or file not in attributes or file not in identity:
            raise UserError(
                f"{partition_file}: '{file} {number}', expected 0, 1 or 2 and the same files in the lists of "
                "attributes and identities"
            )
        splits[SPLITS[number]].append(file)
    absent = [file for file in partition if Path(file).stem not in found]
    report_absent("CelebA", absent, len(partition), f"images are not in {folder}")

    people = number_people(identity, splits)
    planned = {
        split: [
            Picture(
                Path(file).stem,
                found[Path(file).stem],
                {
                    "attributes": attributes[file],
                    "identity": people[identity[file]],
                    "landmarks": points.get(file, []),
                },
            )
            for file in files
            if Path(file).stem in found
        ]
        for split, files in splits.items()
    }
    return build_files(
        out,
        planned,
        name="CelebA",
        version=VERSION,
        size=size,
        crop=crop,
        attributes=names,
        landmarks="CelebA, 5 points" if points else None,
        fields={"identities": {split: len({identity[file] for file in files}) for split, files in splits.items()}},
        limit=limit,
        processes=processes,
    )


def _find(root: Path, folder: str, name: str) -> Path:
    return need(root, f"{folder}/{name}", name)


def _pairs(path: Path) -> dict[str, str]:
    """First word -> second word of every line."""
    words = [line.split() for line in read_text(path).splitlines() if line.strip()]
    wrong = next((line for line in words if len(line) != 2), None)
    if wrong is not None:
        raise UserError(f"{path}: line '{' '.join(wrong)}', expected a file name and a number")
    return dict(words)


def number_people(identity: dict[str, str], splits: dict[str, list[str]]) -> dict[str, int]:
    """Official identity -> a number without gaps; those of the first split come first, as a classifier needs it."""
    seen = dict.fromkeys(
        person for files in splits.values() for person in sorted({identity[file] for file in files}, key=int)
    )
    return {person: number for number, person in enumerate(seen)}


def read_attributes(path: Path) -> tuple[list[str], dict[str, list[int]]]:
    """Names, and file -> values as 0 and 1, of a list in CelebA's format (-1 and 1 behind two lines of heading).

    Raises:
        UserError: another number of values than names, or a value that is neither.
    """
    _, heading, *lines = [*read_text(path).splitlines(), "", ""]
    names = heading.split()
    rows = {}
    for line in lines:
        file, *values = line.split() or [""]
        if not file:
            continue
        if len(values) != len(names) or not set(values) <= {"-1", "1"}:
            raise UserError(f"{path}: line of '{file}' holds {len(values)} values, expected {len(names)} of -1 or 1")
        rows[file] = [int(value == "1") for value in values]
    if not rows:
        raise UserError(
            f"{path}: no rows; expected the number of images, the attribute names, and a row for each image"
        )
    return names, rows


def read_points(root: Path) -> dict[str, list[list[int]]]:
    """File -> 5 points (x, y) in pixels of the aligned image; none where the list is not there.

    Raises:
        UserError: a row that is not ten numbers.
    """
    path = root / "Anno" / "list_landmarks_align_celeba.txt"
    path = path if path.is_file() else root / path.name
    if not path.is_file():
        return {}
    points = {}
    for line in read_text(path).splitlines()[2:]:
        file, *values = line.split()
        if len(values) != 10:
            raise UserError(f"{path}: line of '{file}' holds {len(values)} numbers, expected 5 points x y")
        points[file] = [[int(x), int(y)] for x, y in zip(values[::2], values[1::2], strict=True)]
    return points
