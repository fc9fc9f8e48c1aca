from datamodules.faces import FaceDataModule
from datamodules.sources import celebatext_hq


def test_flists_captions_and_attributes(tree, tmp_path, read_back):
    for n in (10, 200, 3000):
        tree.image(f"CelebAimg/{n}.jpg")
        tree.text(f"captions/{n}.txt", f"She is number {n}.", "", "A second caption.")
    tree.text("data_flist/train.flist", "../data/CelebAimg/3000.jpg", "../data/CelebAimg/10.jpg")
    tree.text("data_flist/test.flist", "../data/CelebAimg/200.jpg")
    tree.text("CelebAMask-HQ-attribute-anno.txt", "3", "Male Young", "10.jpg 1 1", "200.jpg -1 1", "3000.jpg -1 -1")
    celebatext_hq.build(tree.root, tmp_path / "out")
    module = FaceDataModule(str(tmp_path / "out"), batch_size=1)
    train, test = read_back(module, "train"), read_back(module, "test")
    assert (sorted(train), sorted(test)) == (["00010", "03000"], ["00200"])
    assert test["00200"].captions == [["She is number 200.", "A second caption."]]
    assert test["00200"].attributes.tolist() == [[0, 1]]
    assert train["00010"].attributes.tolist() == [[1, 1]]
