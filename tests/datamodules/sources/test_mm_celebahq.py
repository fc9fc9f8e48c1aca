import pickle

import numpy as np
import pytest
from PIL import Image

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from datamodules.sources import mm_celebahq


def release(tree, numbers, folder="text/celeba-caption"):
    for n in numbers:
        tree.image(f"images/{n}.jpg")
        tree.text(f"{folder}/{n}.txt", *(f"caption {i} of {n}" for i in range(10)))


def test_captions_and_the_numbers_split(tree, tmp_path, read_back):
    release(tree, [0, 23_999, 24_000])
    manifest = mm_celebahq.build(tree.root, tmp_path / "out")
    module = FaceDataModule(str(tmp_path / "out"), batch_size=1)
    train, test = read_back(module, "train"), read_back(module, "test")
    assert (sorted(train), sorted(test)) == (["00000", "23999"], ["24000"])
    assert test["24000"].captions == [[f"caption {i} of 24000" for i in range(10)]]
    assert manifest.fields["split_from"] == "numbers up to 23999 train"


def test_pickled_lists_decide_the_split(tree, tmp_path, read_back, capsys):
    release(tree, [0, 5, 9], folder="text")
    tree.path("train/filenames.pickle").write_bytes(pickle.dumps(["9", "0.jpg"], protocol=2))
    tree.path("test/filenames.pickle").write_bytes(pickle.dumps(["5", "7"], protocol=2))
    manifest = mm_celebahq.build(tree.root, tmp_path / "out")
    keys = {split: sorted(manifest.split(split)[0].keys) for split in ("train", "test")}
    assert keys == {"train": ["00000", "00009"], "test": ["00005"]}
    assert manifest.fields["split_from"] == "lists"
    assert "1 of 4 images of the split are absent: 7" in capsys.readouterr().err


def test_celebamask_adds_attributes_and_masks(tree, tmp_path, read_back):
    release(tree, [3])
    tree.text("mask/CelebAMask-HQ-attribute-anno.txt", "1", "Smiling Young", "3.jpg -1 1")
    skin = np.zeros((8, 8, 3), np.uint8)
    skin[2:] = 255
    Image.fromarray(skin).save(tree.path("mask/CelebAMask-HQ-mask-anno/0/00003_skin.png"))
    mm_celebahq.build(tree.root, tmp_path / "out", celebamask=tree.root / "mask")
    batch = read_back(FaceDataModule(str(tmp_path / "out"), batch_size=1), "train")["00003"]
    assert batch.attributes.tolist() == [[0, 1]]
    assert batch.mask[0].tolist() == [[0] * 8] * 2 + [[1] * 8] * 6


def test_mistakes_are_named(tree, tmp_path):
    release(tree, [0, 1])
    tree.path("train/filenames.pickle").write_bytes(pickle.dumps(["0"]))
    with pytest.raises(UserError, match=r"holds filenames\.pickle of one split only"):
        mm_celebahq.build(tree.root, tmp_path / "out")
    tree.path("test/filenames.pickle").write_bytes(pickle.dumps({"1": 1}))
    with pytest.raises(UserError, match="holds a dict, expected a list of image names"):
        mm_celebahq.build(tree.root, tmp_path / "out")
    tree.path("test/filenames.pickle").write_bytes(pickle.dumps(["1"]))
    (tree.root / "text/celeba-caption/1.txt").unlink()
    with pytest.raises(UserError, match=r"1\.txt: cannot be read"):
        mm_celebahq.build(tree.root, tmp_path / "out")
