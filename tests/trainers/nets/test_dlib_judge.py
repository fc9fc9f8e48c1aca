import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from datamodules.errors import UserError
from trainers.nets.face_encoders import IdentityEncoder

with_dlib = pytest.mark.skipif(
    find_spec("dlib") is None or find_spec("face_recognition_models") is None, reason="needs facebench[dlib]"
)


@pytest.fixture(scope="module")
def portrait():
    """A real face, cut roughly as a portrait: (1, 3, 256, 256) in [-1, 1]."""
    sample_data = pytest.importorskip("matplotlib.cbook", reason="needs matplotlib's sample portrait").get_sample_data
    image = Image.open(sample_data("grace_hopper.jpg")).convert("RGB")
    return pil_to_tensor(image.crop((130, 30, 386, 286)))[None].float() / 127.5 - 1


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(UserError, match=r"facebench\[dlib\]"):
        IdentityEncoder.from_hub("dlib")


@with_dlib
def test_same_person_is_alike_at_64_pixels_and_noise_is_not(portrait):
    judge = IdentityEncoder.from_hub("dlib")
    small = F.interpolate(portrait, (64, 64), mode="bilinear", antialias=True)
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    original, darker, shrunk, nobody = judge(portrait), judge(portrait * 0.9 - 0.05), judge(small), judge(noise)
    torch.testing.assert_close(original.norm(dim=1), torch.ones(1))
    assert original.shape == (1, 128)
    assert (original * darker).sum() > 0.97
    assert (original * shrunk).sum() > 0.9
    assert (original * nobody).sum() < (original * shrunk).sum() - 0.1
