import numpy as np
import pytest
from PIL import Image

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from datamodules.sources import celebahq


def release(tree) -> dict[int, np.ndarray]:
    """Images of 8 and masks of 4 pixels; number 2001 lies in the second mask folder."""
    originals = {0: "119613.jpg", 1: "162771.jpg", 2001: "202599.jpg", 3: "162770.jpg"}
    pixels = {n: tree.image(f"CelebA-HQ-img/{n}.jpg") for n in originals}
    mapping = [f"{n:<8}{int(file[:6]) - 1:<12}{file}" for n, file in originals.items()]
    tree.text("CelebA-HQ-to-CelebA-mapping.txt", "idx     orig_idx    orig_file", *mapping)
    rows = [f"{n}.jpg  {'1' if n else '-1'}  -1" for n in originals]
    tree.text("CelebAMask-HQ-attribute-anno.txt", "4", "Smiling Young", *rows)
    for n in originals:
        tree_mask(tree, n, "skin", [[1, 1, 1, 1]] * 4)
        tree_mask(tree, n, "hair", [[0, 0, 0, 1]] * 4)
        tree_mask(tree, n, "nose", [[0, 1, 0, 1]] * 4)
    return pixels


def tree_mask(tree, number: int, part: str, rows) -> None:
    """As released: RGB, 255 where the part is."""
    painted = np.repeat(255 * np.array(rows, np.uint8)[..., None], 3, axis=2)
    Image.fromarray(painted).save(tree.path(f"CelebAMask-HQ-mask-anno/{number // 2000}/{number:05d}_{part}.png"))


def test_splits_attributes_and_merged_masks(tree, tmp_path, read_back):
    pixels = release(tree)
    celebahq.build(tree.root, tmp_path / "out")
    module = FaceDataModule(str(tmp_path / "out"), batch_size=1)
    batches = {split: read_back(module, split) for split in ("train", "val", "test")}
    keys = {split: sorted(found) for split, found in batches.items()}
    assert keys == {"train": ["00000", "00003"], "val": ["00001"], "test": ["02001"]}
    test = batches["test"]["02001"]
    np.testing.assert_allclose((test.image[0].permute(1, 2, 0) + 1) * 127.5, pixels[2001], atol=1e-3)
    assert test.attributes.tolist() == [[1, 0]]
    assert batches["train"]["00000"].attributes.tolist() == [[0, 0]]
    # g_mask.py paints skin 1, then nose 2, then hair 13; each mask pixel becomes two by two.
    assert test.mask[0].tolist() == [[1, 1, 2, 2, 1, 1, 13, 13]] * 8
    classes = module.manifest.fields["mask_classes"]
    assert (classes[0], classes[1], classes[13], len(classes)) == ("background", "skin", "hair", 19)


def test_masks_follow_size_and_can_be_left_out(tree, tmp_path, read_back):
    release(tree)
    celebahq.build(tree.root, tmp_path / "small", size=4)
    module = FaceDataModule(str(tmp_path / "small"), batch_size=1)
    assert read_back(module, "val")["00001"].mask[0].tolist() == [[1, 2, 1, 13]] * 4
    celebahq.build(tree.root, tmp_path / "bare", masks=False)
    module = FaceDataModule(str(tmp_path / "bare"), batch_size=1)
    assert read_back(module, "val")["00001"].mask.shape == (1, 0, 0)


def test_mistakes_are_named(tree, tmp_path):
    release(tree)
    for path in (tree.root / "CelebAMask-HQ-mask-anno/1").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"2001\.jpg: no masks of this image"):
        celebahq.build(tree.root, tmp_path / "out")
    tree.text("CelebA-HQ-to-CelebA-mapping.txt", "idx orig_idx orig_file", "0 1")
    with pytest.raises(UserError, match="line '0 1', expected 'idx orig_idx orig_file'"):
        celebahq.build(tree.root, tmp_path / "out")
