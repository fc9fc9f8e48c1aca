import pytest
import torch

from datamodules.errors import UserError
from trainers.nets.inverter import InversionEncoder


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    network = InversionEncoder(num_layers=10, dim=24, architecture="resnet10", width=8, head_width=16, size=64).eval()
    network.w_avg.normal_()
    return network


def test_code_is_mean_plus_shared_plus_offsets(encoder):
    image = torch.rand(3, 3, 64, 64)
    shared, offsets = encoder.components(image)
    assert offsets.shape == (3, 10, 24)
    assert not offsets[:, 0].any()
    torch.testing.assert_close(encoder(image), encoder.w_avg + shared.unsqueeze(1) + offsets)


def test_without_offsets_all_layers_agree(encoder):
    for head in encoder.heads[1:]:
        torch.nn.init.zeros_(head.layers[-1].weight)
        torch.nn.init.zeros_(head.layers[-1].bias)
    codes = encoder(torch.rand(2, 3, 64, 64))
    torch.testing.assert_close(codes, codes[:, :1].expand_as(codes))


def test_layers_read_the_levels_of_e4e():
    official = InversionEncoder(num_layers=18, dim=4, architecture="resnet10", width=8, head_width=4, size=64)
    assert official.level == [0] * 3 + [1] * 4 + [2] * 11
    sides = [len([m for m in head.layers if isinstance(m, torch.nn.Conv2d)]) for head in official.heads]
    assert sides == [2] * 3 + [3] * 4 + [4] * 11  # 4, 8 and 16 pixels down to 1


def test_other_sizes_are_resized(encoder):
    assert encoder(torch.rand(1, 3, 128, 128)).shape == (1, 10, 24)


def test_hub_has_none():
    with pytest.raises(UserError, match="belongs to one generator"):
        InversionEncoder.from_hub("e4e")
