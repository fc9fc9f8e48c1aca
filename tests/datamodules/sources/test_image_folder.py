import math
import shutil

import numpy as np
import pytest
from PIL import Image

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from datamodules.sources import image_folder


def test_a_table_says_everything(tree, tmp_path, read_back):
    pixels = {name: tree.image(name) for name in ("a/one.png", "two.PNG", "three.png")}
    tree.text(
        "../table.csv",
        "file,split,identity,age,captions,Smiling,Bald",
        "two.PNG,test,bert,,,-1,1",
        'a/one.png,train,anna,31.5,"a smile | dark hair, wide eyes",1,0',
        "three.png,,,,,0,0",
    )
    manifest = image_folder.build(tree.root, tmp_path / "out", table=tree.root / "../table.csv", name="mine")
    module = FaceDataModule(str(tmp_path / "out"), batch_size=1)
    train, test = read_back(module, "train"), read_back(module, "test")
    assert (set(train), set(test)) == ({"a-one", "three"}, {"two"})
    one = train["a-one"]
    np.testing.assert_allclose((one.image[0].permute(1, 2, 0) + 1) * 127.5, pixels["a/one.png"], atol=1e-3)
    assert module.attributes == ["Smiling", "Bald"]
    assert one.attributes.tolist() == [[1, 0]]
    assert one.captions == [["a smile", "dark hair, wide eyes"]]
    assert one.age.tolist() == [31.5]
    assert one.identity.tolist() == [0]  # training identities come first
    assert test["two"].identity.tolist() == [1]
    assert test["two"].attributes.tolist() == [[0, 1]]
    assert train["three"].identity.tolist() == [-1]
    assert math.isnan(train["three"].age[0])
    assert manifest.fields["identities"] == {"train": 1, "test": 1}
    assert manifest.name == "mine"


def test_without_a_table_folders_are_splits(tree, tmp_path):
    for name in ("train/a.png", "val/a.png", "test/x/a.png", "other/a.jpg"):
        tree.image(name)
    tree.text("train/notes.txt", "no image")
    manifest = image_folder.build(tree.root, tmp_path / "out")
    keys = {split: sorted(key for s in manifest.split(split) for key in s.keys) for split in ("train", "val", "test")}
    assert keys == {"train": ["other-a", "train-a"], "val": ["val-a"], "test": ["test-x-a"]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["name", "a.png"], "no column 'file'"),
        (["file", "b.png"], "file 'b.png' is not in"),
        (["file,Bald", "a.png,yes"], "has Bald = 'yes', expected 0 or 1"),
        (["file,age", "a.png,old"], "has age = 'old', expected years"),
        (["file,split", "a.png,../x"], r"split '\.\./x', expected letters"),
        (["file,Bald", "a.png"], "line 2 has another number of values"),
        (["file", "a.png", "a.jpg"], "get the same key 'a'"),
    ],
)
def test_mistakes_in_the_table_are_named(tree, tmp_path, rows, message):
    tree.image("a.png")
    tree.image("a.jpg")
    tree.text("table.csv", *rows)
    with pytest.raises(UserError, match=message):
        image_folder.build(tree.root, tmp_path / "out", table=tree.root / "table.csv")


def test_no_images_is_refused(tree, tmp_path):
    tree.text("readme.txt", "nothing here")
    with pytest.raises(UserError, match="no image of any split"):
        image_folder.build(tree.root, tmp_path / "out")


def test_a_file_that_is_listed_twice_is_refused(tree, tmp_path):
    tree.image("a.png")
    tree.text("table.csv", "file,split", "a.png,train", "a.png,test")
    with pytest.raises(UserError, match="sample 'a' comes twice, in split 'train' and in split 'test'"):
        image_folder.build(tree.root, tmp_path / "out", table=tree.root / "table.csv")


def test_a_table_may_begin_as_spreadsheets_write_it(tree, tmp_path):
    tree.image("a.png")
    tree.path("table.csv").write_text("file,split\na.png,test\n", encoding="utf-8-sig")
    manifest = image_folder.build(tree.root, tmp_path / "out", table=tree.root / "table.csv")
    assert manifest.split("test")[0].keys == ["a"]


def test_a_changed_source_is_not_taken_for_the_one_that_was_built(tree, tmp_path, capsys):
    tree.image("a.png")
    out = tmp_path / "out"

    def build(caption: str, folder: str = "release") -> None:
        tree.text("../table.csv", "file,captions", f"a.png,{caption}")
        image_folder.build(tmp_path / folder, out, table=tmp_path / "table.csv")

    build("a smile")
    with pytest.raises(UserError, match="or of a source that has changed since"):
        build("a frown")
    shutil.copytree(tree.root, tmp_path / "moved")
    capsys.readouterr()
    build("a smile", "moved")
    assert "already built, left as it is" in capsys.readouterr().out
    tree.image("a.png", (9, 9))
    with pytest.raises(UserError, match="or of a source that has changed since"):
        image_folder.build(tree.root, out, table=tmp_path / "table.csv", size=8)


def test_photos_are_turned_as_their_camera_says(tree, tmp_path, read_back):
    pixels = tree.image("a.png", (12, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned to the left
    Image.fromarray(pixels).save(tree.path("a.png"), exif=exif)
    image_folder.build(tree.root, tmp_path / "out", crop="center")
    image = read_back(FaceDataModule(str(tmp_path / "out"), batch_size=1), "train")["a"].image[0]
    upright = np.rot90(pixels, -1)[2:10]
    np.testing.assert_allclose((image.permute(1, 2, 0) + 1) * 127.5, upright, atol=1e-3)
