import math

import numpy as np
import pytest
from PIL import Image

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from datamodules.sources import ffhq

HEADING = "image_number,age_group,age_group_confidence,gender,gender_confidence,head_pitch,head_roll,head_yaw,"
HEADING += "left_eye_occluded,right_eye_occluded,glasses"
CLEAR = "{},20-29,0.9,male,0.9,5,1,-7,3.0,60.0,Normal"


def images(tree, numbers, size=(8, 8)) -> dict[int, np.ndarray]:
    return {n: tree.image(f"images1024x1024/{n // 1000:02d}000/{n:05d}.png", size) for n in numbers}


def test_the_official_split_without_labels(tree, tmp_path, read_back):
    pixels = images(tree, [0, 59_999, 60_000, 69_999])
    ffhq.build(tree.root, tmp_path / "out")
    module = FaceDataModule(str(tmp_path / "out"), batch_size=1)
    for split, numbers in (("train", [0, 59_999]), ("val", [60_000, 69_999])):
        batches = read_back(module, split)
        assert sorted(batches) == [f"{n:05d}" for n in numbers]
        for n in numbers:
            batch = batches[f"{n:05d}"]
            np.testing.assert_allclose((batch.image[0].permute(1, 2, 0) + 1) * 127.5, pixels[n], atol=1e-3)
            assert batch.attributes.shape == (1, 0)
            assert batch.mask.shape == (1, 0, 0)
            assert batch.landmarks.shape == (1, 0, 2)
            assert batch.identity.tolist() == [-1]
            assert math.isnan(batch.age[0])
            assert batch.captions == [[]]
    assert module.size == 8


def test_adatrans_split_and_choice_of_images(tree, tmp_path, read_back):
    """The rules of AdaTrans' ``create_FFHQ_AGING``; one image breaks each of them."""
    rows = {
        1: CLEAR.format(1),
        2: "2,70-120,0.61,female,0.67,29,1,39,89,49,None",
        3: "3,20-29,0.60,male,0.9,5,1,-7,3,3,None",
        4: "4,20-29,0.9,male,0.66,5,1,-7,3,3,None",
        5: "5,20-29,0.9,male,0.9,-30,1,-7,3,3,None",
        6: "6,20-29,0.9,male,0.9,5,1,40,3,3,None",
        7: "7,20-29,0.9,male,0.9,5,1,-7,50,50,None",
        8: "8,20-29,0.9,male,0.9,5,1,-7,90,3,None",
        9: "9,20-29,0.9,male,0.9,5,1,-7,3,3,Dark",
        68_999: "68999,0-2,0.9,female,0.9,5,1,-7,3,3,None",
        69_000: CLEAR.format(69_000),
    }
    images(tree, rows)
    tree.text("ffhq_aging_labels.csv", HEADING, *rows.values())
    ffhq.build(tree.root, tmp_path / "out", splits="adatrans")
    module = FaceDataModule(str(tmp_path / "out"), batch_size=1)
    train, test = read_back(module, "train"), read_back(module, "test")
    assert sorted(train) == ["00001", "00002", "68999"]
    assert list(test) == ["69000"]
    assert module.attributes == ["Male", "Eyeglasses"]
    assert {key: batch.attributes[0].tolist() for key, batch in train.items()} == {
        "00001": [1, 1],
        "00002": [0, 0],
        "68999": [0, 0],
    }
    # AdaTrans' ordinal bits ask whether an age is at least 10, 20, 30, 40, 50, 70: lower bounds answer that exactly.
    assert {key: float(batch.age[0]) for key, batch in train.items()} == {"00001": 20, "00002": 70, "68999": 0}


def test_images_are_resized_by_lanczos(tree, tmp_path, read_back):
    pixels = images(tree, [0])
    ffhq.build(tree.root, tmp_path / "out", size=4)
    batch = read_back(FaceDataModule(str(tmp_path / "out"), batch_size=1), "train")["00000"]
    expected = np.array(Image.fromarray(pixels[0]).resize((4, 4), Image.Resampling.LANCZOS))
    np.testing.assert_allclose((batch.image[0].permute(1, 2, 0) + 1) * 127.5, expected, atol=1e-3)


def test_mistakes_are_named(tree, tmp_path):
    images(tree, [0])
    with pytest.raises(UserError, match=r"no ffhq_aging_labels\.csv, which --splits adatrans needs"):
        ffhq.build(tree.root, tmp_path / "out", splits="adatrans")
    tree.text("ffhq_aging_labels.csv", HEADING, CLEAR.format(1))
    with pytest.raises(UserError, match="no row for image 00000"):
        ffhq.build(tree.root, tmp_path / "out")
    tree.text("ffhq_aging_labels.csv", "image_number,age_group", "0,20-29")
    with pytest.raises(UserError, match="line 2 cannot be read"):
        ffhq.build(tree.root, tmp_path / "out")
    (tree.root / "ffhq_aging_labels.csv").unlink()
    images(tree, [1], size=(6, 6))
    with pytest.raises(UserError, match=r"00001\.png: 6 pixels square, but the first image has 8; give --size"):
        ffhq.build(tree.root, tmp_path / "out")
    images(tree, [0], size=(6, 8))
    with pytest.raises(UserError, match="6 x 8 pixels, expected a square"):
        ffhq.build(tree.root, tmp_path / "out")
    (tree.root / "images1024x1024/00000/00000.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"00000\.png: not an image"):
        ffhq.build(tree.root, tmp_path / "out")
