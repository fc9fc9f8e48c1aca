import math

import pytest
import torch
from torch import nn
from torch.nn.functional import instance_norm, mse_loss

from trainers.nets.motion_codes import (
    MotionLayer,
    MotionTransformer,
    Quantiser,
    hold_last,
    normalise_over_time,
    repeat_ends,
)


def test_nearest_code_loss_and_straight_through_gradient() -> None:
    quantiser = Quantiser(2, 2, beta=0.25)
    quantiser.embedding.weight.data = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    rows = torch.tensor([[0.2, 0.0], [0.9, 0.5]], requires_grad=True)
    quantised, loss, numbers = quantiser.nearest(rows)
    assert numbers.tolist() == [0, 1]
    torch.testing.assert_close(quantised, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert loss.item() == pytest.approx(1.25 * (0.04 + 0.01 + 0.25) / 4)
    quantised.sum().backward()
    assert torch.equal(rows.grad, torch.ones(2, 2))
    quantiser.nearest(rows)[1].backward()
    codes = torch.tensor([[-0.2, 0.0], [0.1, 0.5]]) * 2 / 4  # of the codebook term alone
    torch.testing.assert_close(quantiser.embedding.weight.grad, codes)


def test_draws_follow_the_softmax_of_squared_distances() -> None:
    quantiser = Quantiser(3, 1)
    quantiser.embedding.weight.data = torch.tensor([[0.0], [1.0], [3.0]])
    weights = [math.exp(-(distance**2) / 2.0) for distance in (0.5, 0.5, 2.5)]
    expected = torch.tensor(weights) / sum(weights)
    rows = torch.tensor([[0.5]])
    torch.testing.assert_close(quantiser.probabilities(rows, 2.0)[0], expected)
    drawn = quantiser.draw(rows.expand(20_000, 1), 2.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.bincount(drawn, minlength=3) / 20_000, expected, rtol=0, atol=0.015)
    cold = quantiser.draw(torch.tensor([[0.4], [2.2]]), 1e-4, torch.Generator().manual_seed(0))
    assert cold.tolist() == [0, 2]


def test_layer_attends_over_the_full_width_and_past_masks() -> None:
    torch.manual_seed(0)
    layer, x = MotionLayer(6, heads=2, hidden=10), torch.randn(1, 4, 6)
    query, key, value = layer.qkv(layer.norm1(x[:, :3])).split(6, dim=-1)
    heads = []
    for columns in (slice(0, 3), slice(3, 6)):
        scores = query[0, :, columns] @ key[0, :, columns].T / math.sqrt(6)
        heads.append(scores.softmax(-1) @ value[0, :, columns])
    after = x[0, :3] + layer.out(torch.cat(heads, dim=-1))
    expected = after + layer.down(nn.GELU("tanh")(layer.up(layer.norm2(after))))
    mask = torch.tensor([True, True, True, False])[None, None, None]
    torch.testing.assert_close(layer(x, mask)[0, :3], expected)


def test_normalisation_and_repeated_ends_equal_torch_on_each_clip() -> None:
    torch.manual_seed(0)
    x, lengths = torch.randn(2, 7, 3), torch.tensor([7, 4])
    real = torch.arange(7) < lengths[:, None]
    normalised, repeated = normalise_over_time(x, real), repeat_ends(x, lengths, 2)
    for i, length in enumerate(lengths.tolist()):
        clip = x[i : i + 1, :length].transpose(1, 2)
        torch.testing.assert_close(normalised[i, :length], instance_norm(clip)[0].T)
        padded = nn.functional.pad(clip, (2, 2), mode="replicate")
        assert torch.equal(repeated[i, : length + 4], padded[0].T)
    held = hold_last(x, lengths, 9)
    assert torch.equal(held[0, 6:], x[0, 6:7].expand(3, -1))
    assert torch.equal(held[1, 3:], x[1, 3:4].expand(6, -1))


@pytest.mark.parametrize("count_frames", [True, False])
def test_a_clip_gives_the_same_alone_and_padded(count_frames: bool) -> None:
    torch.manual_seed(0)
    network = MotionTransformer(8, layers=2, heads=2, hidden=12, count_frames=count_frames).eval()
    x, lengths = torch.randn(3, 9, 8), torch.tensor([9, 5, 1])
    together = network(x, lengths)
    for i, length in enumerate(lengths.tolist()):
        alone = network(x[i : i + 1, :length], lengths[i : i + 1])
        torch.testing.assert_close(together[i, :length], alone[0], rtol=0, atol=1e-5)


def test_without_counted_frames_a_shift_in_time_only_shifts() -> None:
    torch.manual_seed(0)
    network = MotionTransformer(8, layers=1, heads=2, hidden=12, count_frames=False).eval()
    x = torch.randn(1, 1, 8).expand(1, 6, 8)
    out = network(x, torch.tensor([6]))
    torch.testing.assert_close(out, out[:, :1].expand_as(out))


def test_quantiser_trains_towards_the_rows() -> None:
    torch.manual_seed(0)
    quantiser = Quantiser(4, 2)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    optimiser = torch.optim.SGD(quantiser.parameters(), lr=1.0)
    for _ in range(200):
        optimiser.zero_grad()
        quantised, loss, _ = quantiser.nearest(rows)
        loss.backward()
        optimiser.step()
    first = mse_loss(torch.zeros_like(rows), rows)
    assert mse_loss(quantised, rows) < first
