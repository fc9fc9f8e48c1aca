import numpy as np
import pytest
import torch
from PIL import Image

from facebench.__main__ import main
from trainers.editing.interfacegan import InterFaceGAN


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    torch.manual_seed(0)
    specs = {name: tiny[name] for name in ("generator", "inverter")}
    system = InterFaceGAN(["Eyeglasses", "Male"], [1.0, 2.0, 3.0], guide=tiny["attributes"], **specs)
    system.boundaries.copy_(torch.nn.functional.normalize(torch.randn_like(system.boundaries), dim=-1))
    stored = {"state_dict": system.state_dict()}
    system.on_save_checkpoint(stored)
    path = tmp_path_factory.mktemp("edit") / "last.ckpt"
    torch.save(stored, path)
    return path


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)).save(path)
    return path


def edit(checkpoint, photo, out, *more):
    return main(["edit", "--checkpoint", str(checkpoint), "--image", str(photo), "--out", str(out), *more])


def test_a_strip_holds_photo_inversion_and_every_strength(checkpoint, photo, tmp_path):
    assert edit(checkpoint, photo, tmp_path / "a.png", "--scale", "1") == 0
    strip = np.array(Image.open(tmp_path / "a.png"))
    assert strip.shape == (2 * 32, 5 * 32, 3), "two attributes; photo, inversion, three strengths"
    inversion, weakest, strongest = (strip[:32, 32 * k : 32 * (k + 1)].astype(float) for k in (1, 2, 4))
    assert 0 < np.abs(weakest - inversion).mean() < np.abs(strongest - inversion).mean()


def test_removing_goes_the_other_way(checkpoint, photo, tmp_path):
    for name, more in (("add", []), ("remove", ["--remove", "true"])):
        edit(checkpoint, photo, tmp_path / f"{name}.png", "--attribute", "[Male]", "--strengths", "[3]", *more)
    added, removed = (np.array(Image.open(tmp_path / f"{name}.png")) for name in ("add", "remove"))
    assert added.shape == removed.shape == (64, 3 * 64, 3)
    assert (added[:, :128] == removed[:, :128]).all()
    assert (added[:, 128:] != removed[:, 128:]).any()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--attribute", "[Beard]"], "attribute 'Beard': this InterFaceGAN edits Eyeglasses, Male"),
        (["--image", "no.png"], "no.png: no such image"),
        (["--image", __file__], "not an image that can be read"),
    ],
)
def test_mistakes_are_one_line(checkpoint, photo, tmp_path, capsys, more, says):
    assert edit(checkpoint, photo, tmp_path / "a.png", *more) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
