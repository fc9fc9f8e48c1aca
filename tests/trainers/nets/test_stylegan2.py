import math

import pytest
import torch
import torch.nn.functional as F
from scipy.signal import upfirdn

from trainers.nets.stylegan2 import (
    Convolution,
    Discriminator,
    Generator,
    MappingNetwork,
    Resample,
    SynthesisLayer,
    convolve,
    from_official,
    minibatch_std,
)

SMALL = {"resolution": 16, "channel_base": 128, "channel_max": 16}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small_generator(**options) -> Generator:
    G = Generator(z_dim=8, w_dim=12, **{**SMALL, **options})
    for name, parameter in G.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(parameter, 0.3)
    return G


def upfirdn_2d(image: torch.Tensor, up: int, down: int, gain: float) -> torch.Tensor:
    """scipy's one-dimensional filter along both axes, full length."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]).numpy() / 8 * math.sqrt(gain)
    rows = upfirdn(taps, image.numpy(), up, down, axis=-1)
    return torch.from_numpy(upfirdn(taps, rows, up, down, axis=-2))


def test_resampling_agrees_with_scipy():
    image = torch.randn(2, 3, 8, 8)
    up = upfirdn_2d(image, up=2, down=1, gain=4)[..., 1:17, 1:17]
    torch.testing.assert_close(Resample().up(image), up, rtol=1e-5, atol=1e-6)
    # Padding by one pixel puts the first filter window at the even positions that scipy keeps.
    down = upfirdn_2d(F.pad(image, (1, 1, 1, 1)), up=1, down=1, gain=1)[..., 3:11:2, 3:11:2]
    torch.testing.assert_close(Resample().down(image), down, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_convolutions_that_resample_are_filter_plus_convolution(size):
    x, weight, resample = torch.randn(2, 4, 8, 8), torch.randn(5, 4, size, size), Resample()
    half = size // 2
    # Enough context around the filtered image, which the convolution then eats up.
    blurred = upfirdn_2d(F.pad(x, (4, 4, 4, 4)), up=1, down=1, gain=1)
    first = 6 - half
    down = F.conv2d(blurred[..., first : first + 7 + size, first : first + 7 + size], weight)[..., ::2, ::2]
    torch.testing.assert_close(convolve(x, weight, resample, down=True), down[..., :4, :4], rtol=1e-4, atol=1e-4)

    stretched = upfirdn_2d(F.pad(x, (4, 4, 4, 4)), up=2, down=1, gain=4)
    first = 9 - half
    window = stretched[..., first : first + 15 + size, first : first + 15 + size]
    up = F.conv2d(window, weight.flip(2, 3))
    torch.testing.assert_close(convolve(x, weight, resample, up=True), up, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("up", [False, True])
def test_modulated_convolution_is_one_convolution_per_sample(up):
    layer = SynthesisLayer(4, 6, w_dim=5, resolution=16 if up else 8, up=up)
    torch.nn.init.normal_(layer.bias)
    x, w = torch.randn(3, 4, 8, 8), torch.randn(3, 5)
    style = layer.affine(w)
    expected = []
    for i in range(3):
        weight = layer.weight * style[i, None, :, None, None]
        weight = weight / weight.square().sum(dim=(1, 2, 3), keepdim=True).add(1e-8).sqrt()
        y = convolve(x[i : i + 1], weight, layer.resample, up=up) + layer.bias[:, None, None]
        expected.append(F.leaky_relu(y, 0.2) * math.sqrt(2))
    torch.testing.assert_close(layer(x, w, "none"), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_truncation_draws_the_first_layers_to_the_average():
    mapping = MappingNetwork(z_dim=8, c_dim=0, w_dim=12, num_ws=6)
    mapping.w_avg.normal_()
    z = torch.randn(4, 8)
    ws = mapping(z)
    torch.testing.assert_close(mapping(z, truncation_psi=0.0), mapping.w_avg.expand(4, 6, 12))
    half = mapping(z, truncation_psi=0.5, truncation_cutoff=2)
    torch.testing.assert_close(half[:, :2], (ws[:, :2] + mapping.w_avg) / 2)
    torch.testing.assert_close(half[:, 2:], ws[:, 2:])


def test_running_average_of_w_only_moves_when_asked():
    mapping = MappingNetwork(z_dim=8, c_dim=0, w_dim=12, num_ws=6, w_avg_beta=0.75)
    z = torch.randn(4, 8)
    ws = mapping(z)
    assert not mapping.w_avg.any()
    mapping(z, update_average=True)
    torch.testing.assert_close(mapping.w_avg, ws[:, 0].mean(dim=0) / 4)


def test_noise_modes():
    G = small_generator()
    ws = G.mapping(torch.randn(2, 8))
    assert torch.equal(G.synthesis(ws, "const"), G.synthesis(ws, "const"))
    assert not torch.equal(G.synthesis(ws, "random"), G.synthesis(ws, "random"))
    assert not torch.equal(G.synthesis(ws, "none"), G.synthesis(ws, "const"))


@pytest.mark.parametrize("architecture", ["skip", "resnet"])
@pytest.mark.parametrize(("resolution", "num_ws"), [(8, 4), (16, 6), (64, 10)])
def test_every_latent_reaches_the_image(architecture, resolution, num_ws):
    G = small_generator(architecture=architecture, resolution=resolution)
    assert G.num_ws == num_ws
    ws = torch.randn(1, num_ws, 12, requires_grad=True)
    image = G.synthesis(ws, "none")
    assert image.shape == (1, 3, resolution, resolution)
    (gradient,) = torch.autograd.grad(image.square().sum(), ws)
    assert (gradient.abs().sum(dim=2) > 0).all()


@pytest.mark.parametrize("architecture", ["skip", "resnet"])
def test_discriminator_sees_every_pixel(architecture):
    D = Discriminator(architecture=architecture, **SMALL)
    image = torch.randn(4, 3, 16, 16, requires_grad=True)
    logits = D(image)
    assert logits.shape == (4, 1)
    (gradient,) = torch.autograd.grad(logits.sum(), image)
    assert (gradient.abs().sum(dim=1) > 0).all()


def test_labels_condition_both_networks():
    G, D = small_generator(c_dim=3), Discriminator(c_dim=3, **SMALL)
    z, c = torch.randn(2, 8), torch.eye(3)[:2]
    assert not torch.allclose(G(z, c, noise_mode="none"), G(z, c.flip(0), noise_mode="none"))
    image = torch.randn(2, 3, 16, 16)
    assert not torch.allclose(D(image, c), D(image, c.flip(0)))
    # Labels are normalised after their embedding, whose bias starts at zero: their scale does not matter.
    torch.testing.assert_close(D(image, c), D(image, 5 * c))
    with pytest.raises(ValueError, match=r"conditional: give labels of shape \(B, 3\)"):
        G(z)


def test_minibatch_deviation_of_interleaved_groups():
    x = torch.randn(6, 4, 2, 2)
    result = minibatch_std(x, group_size=3, channels=2)
    assert torch.equal(result[:, :4], x)
    for i in range(6):
        group = x[i % 2 :: 2]
        for k in range(2):
            expected = group[:, 2 * k : 2 * k + 2].std(dim=0, correction=0).mean()
            torch.testing.assert_close(result[i, 4 + k], expected.expand(2, 2))
    with pytest.raises(ValueError, match="batch of 6 does not divide into groups of 4"):
        minibatch_std(x, group_size=4, channels=1)


def test_clamp_limits_activations():
    layer = Convolution(3, 4, kernel_size=3, clamp=0.5)
    assert layer(100 * torch.randn(1, 3, 8, 8)).abs().max() <= 0.5 * math.sqrt(2) + 1e-6


def test_autocast_touches_only_the_convolutions():
    G, D = small_generator(), Discriminator(**SMALL)
    z = torch.randn(4, 8)
    image = G(z, noise_mode="const")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(G.mapping(z), G.mapping(z).float())
        half = G(z, noise_mode="const")
        logits = D(image)
    assert half.dtype == logits.dtype == torch.float32
    assert not torch.equal(half, image)
    assert (half - image).abs().max() < 0.03 * image.abs().max()
    torch.testing.assert_close(logits, D(image), rtol=0.05, atol=0.05)


def test_official_names_load():
    G = small_generator()
    official = {f"G.{name}": tensor for name, tensor in G.state_dict().items()}
    official["G.synthesis.b8.conv0.resample_filter"] = torch.ones(4, 4)
    official["D.b4.out.bias"] = torch.zeros(1)
    again = small_generator()
    again.load_state_dict(from_official(official, "G."))
    ws = torch.randn(1, 6, 12)
    assert torch.equal(again.synthesis(ws, "const"), G.synthesis(ws, "const"))


def test_paper_scale_has_the_official_size():
    """The weights that the official code counts for configuration F at 1024 pixels."""
    with torch.device("meta"):
        G, D = Generator(), Discriminator()
    assert sum(p.numel() for p in G.parameters()) == 30_370_060
    assert sum(p.numel() for p in D.parameters()) == 29_012_513
    assert G.num_ws == 18


@pytest.mark.parametrize("resolution", [4, 48, 100])
def test_resolution_must_be_a_power_of_two(resolution):
    with pytest.raises(ValueError, match=f"resolution {resolution} is not"):
        Generator(resolution=resolution)
