import numpy as np
import pytest

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from datamodules.sources import celeba

# file, partition, identity, attributes, the five points
PICTURES = [
    ("000001.jpg", 0, 2880, "-1  1", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ("000002.jpg", 0, 17, " 1 -1", [2] * 10),
    ("162771.jpg", 1, 9, "-1 -1", [3] * 10),
    ("182638.jpg", 2, 5, " 1  1", [4] * 10),
]


def release(tree, folders=("Img/", "Anno/", "Eval/")) -> dict[str, np.ndarray]:
    img, anno, evaluation = folders
    pixels = {file: tree.image(f"{img}img_align_celeba/{file}", (6, 10)) for file, *_ in PICTURES}
    heading = [str(len(PICTURES)), "5_o_Clock_Shadow Smiling "]
    tree.text(f"{anno}list_attr_celeba.txt", *heading, *(f"{file} {values}" for file, _, _, values, _ in PICTURES))
    tree.text(f"{anno}identity_CelebA.txt", *(f"{file} {person}" for file, _, person, _, _ in PICTURES))
    tree.text(f"{evaluation}list_eval_partition.txt", *(f"{file} {part}" for file, part, *_ in PICTURES))
    points = (f"{file} " + " ".join(map(str, values)) for file, _, _, _, values in PICTURES)
    tree.text(f"{anno}list_landmarks_align_celeba.txt", str(len(PICTURES)), "lefteye_x lefteye_y ...", *points)
    return pixels


@pytest.mark.parametrize("folders", [("Img/", "Anno/", "Eval/"), ("", "", "")])
def test_partition_attributes_identities_and_points(tree, tmp_path, read_back, folders):
    pixels = release(tree, folders)
    manifest = celeba.build(tree.root, tmp_path / "out", crop="center")
    module = FaceDataModule(str(tmp_path / "out"), batch_size=1)
    assert module.attributes == ["5_o_Clock_Shadow", "Smiling"]
    batches = {split: read_back(module, split) for split in ("train", "val", "test")}
    assert {split: sorted(found) for split, found in batches.items()} == {
        "train": ["000001", "000002"],
        "val": ["162771"],
        "test": ["182638"],
    }
    first = batches["train"]["000001"]
    assert first.attributes.tolist() == [[0, 1]]
    # 6 x 10 pixels: the square begins two pixels below the upper edge, and the points move with it.
    np.testing.assert_allclose((first.image[0].permute(1, 2, 0) + 1) * 127.5, pixels["000001.jpg"][2:8], atol=1e-3)
    assert first.landmarks[0].tolist() == [[1, 0], [3, 2], [5, 4], [7, 6], [9, 8]]
    # A classifier of the training identities needs the numbers from 0 on.
    assert {int(batch.identity[0]) for batch in batches["train"].values()} == {0, 1}
    assert {int(batches[split][key].identity[0]) for split, key in (("val", "162771"), ("test", "182638"))} == {2, 3}
    assert manifest.fields["identities"] == {"train": 2, "val": 1, "test": 1}


def test_mistakes_are_named(tree, tmp_path):
    release(tree)
    with pytest.raises(UserError, match=r"000001\.jpg: 6 x 10 pixels, .* --crop center"):
        celeba.build(tree.root, tmp_path / "out")
    tree.text("Anno/list_attr_celeba.txt", "1", "A B", "000001.jpg 1")
    with pytest.raises(UserError, match=r"line of '000001\.jpg' holds 1 values, expected 2 of -1 or 1"):
        celeba.build(tree.root, tmp_path / "out")
    (tree.root / "Eval/list_eval_partition.txt").unlink()
    release_attributes = [f"{file} 1 1" for file, *_ in PICTURES]
    tree.text("Anno/list_attr_celeba.txt", "4", "A B", *release_attributes)
    with pytest.raises(UserError, match=r"holds no Eval/list_eval_partition\.txt or list_eval_partition\.txt"):
        celeba.build(tree.root, tmp_path / "out")


def test_absent_images_are_reported(tree, tmp_path, capsys):
    release(tree)
    (tree.root / "Img/img_align_celeba/000002.jpg").unlink()
    manifest = celeba.build(tree.root, tmp_path / "out", crop="center")
    assert [shard.keys for shard in manifest.split("train")] == [["000001"]]
    assert "1 of 4 images are not in" in capsys.readouterr().err
