import pytest
import torch

from trainers.backbone import augmentation


@pytest.fixture
def image():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(64, 3, 16, 16, generator=generator) - 0.5


def test_mirror_flips_about_half(image):
    torch.manual_seed(0)
    changed = augmentation.mirror(image)
    flipped = (changed == image.flip(3)).flatten(1).all(1)
    kept = (changed == image).flatten(1).all(1)
    assert (flipped ^ kept).all()
    assert 16 < flipped.sum() < 48


@pytest.mark.parametrize("change", [augmentation.shift, augmentation.change_colours, augmentation.blur])
def test_a_grey_plane_keeps_its_shape(change):
    plane = torch.full((8, 3, 16, 16), 0.2)
    changed = change(plane)
    torch.testing.assert_close(changed, changed[:, :1, :1, :1].expand_as(plane))


def test_colours_move_no_further_than_told(image):
    bright = augmentation.change_colours(torch.zeros_like(image), strength=0.1)
    assert bright.abs().max() <= 0.1
    assert bright.std() > 0.02


def test_blur_takes_detail_away_and_keeps_the_mean(image):
    changed = augmentation.blur(image)
    assert changed.var() < image.var()
    torch.testing.assert_close(changed.mean((1, 2, 3)), image.mean((1, 2, 3)), atol=0.02, rtol=0)


def test_noise_differs_by_image(image):
    noise = augmentation.add_noise(torch.zeros_like(image), most=0.2).flatten(1).std(1)
    assert noise.max() < 0.25
    assert noise.max() > 2 * noise.min()


def test_all_together_stay_in_range(image):
    changed = augmentation.augment(image * 2)
    assert changed.shape == image.shape
    assert changed.abs().max() <= 1
