from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics import samples as several
from metrics.motion import lip_vertex_error

LIPS = torch.tensor([1, 2])
X = torch.tensor([1.0, 0.0, 0.0])


def along_x(*values, frames=1, vertices=3):
    """Samples whose vertices all lie at one place of the x axis."""
    return torch.tensor(values)[:, None, None, None].expand(-1, frames, vertices, 1) * X


def test_mean_and_coverage_by_hand():
    truth = torch.zeros(1, 3, 3)
    samples = along_x(-1.0, 5.0)
    assert several.mean_estimate_error(samples, truth, LIPS).tolist() == [4.0]
    assert several.mean_estimate_error(samples, truth, LIPS, "l2").tolist() == [2.0]
    assert several.coverage_error(samples, truth, LIPS).tolist() == [1.0]


def test_coverage_takes_one_sample_for_the_whole_clip():
    truth = torch.zeros(2, 3, 3)
    first = torch.tensor([0.0, 3.0])[:, None, None].expand(2, 3, 1) * X  # 0 + 9
    second = torch.tensor([2.0, 2.0])[:, None, None].expand(2, 3, 1) * X  # 4 + 4: the best, though not in frame 0
    assert several.coverage_error(torch.stack([first, second]), truth, LIPS).tolist() == [4.0, 4.0]


def test_diversity_by_hand():
    samples = along_x(0.0, 1.0, 3.0, 6.0)
    assert several.sample_diversity(samples, "halves") == (3 + 5) / 2
    assert several.sample_diversity(samples, "halves", torch.tensor([3, 0, 1, 2])) == (5 + 3) / 2
    assert several.sample_diversity(samples, "all") == (1 + 3 + 6 + 2 + 5 + 3) / 6


def test_halves_of_all_orders_average_to_all_pairs():
    samples = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    draws = [several.sample_diversity(samples, "halves", several.shuffled(4, 0, str(i))) for i in range(400)]
    assert torch.stack(draws).mean().item() == pytest.approx(several.sample_diversity(samples).item(), rel=0.01)


def test_shuffle_depends_on_seed_and_clip_alone():
    assert torch.equal(several.shuffled(10, 1, "a"), several.shuffled(10, 1, "a"))
    assert not torch.equal(several.shuffled(10, 1, "a"), several.shuffled(10, 1, "b"))
    assert not torch.equal(several.shuffled(10, 1, "a"), several.shuffled(10, 2, "a"))
    assert sorted(several.shuffled(10, 1, "a").tolist()) == list(range(10))


def test_style_diversity_leaves_out_clips_of_one_style():
    metric = several.StyleDiversity(scale=1000)
    metric.update(along_x(0.0, 2.0))
    metric.update(along_x(0.0, 3.0, 3.0))
    metric.update(along_x(7.0))
    assert metric.compute() == 1000 * (2 + 2) / 2


def test_multimodality_is_the_norm_over_all_ordered_pairs():
    samples = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1)).double()
    squares = sum(2 * (a - b).square().sum() for a, b in combinations(samples, 2))
    assert several.multimodality(samples).item() == pytest.approx(squares.sqrt().item(), rel=1e-12)


@pytest.mark.parametrize(
    "of_one",
    [
        lambda one: several.mean_estimate_error(one, one[0], LIPS),
        lambda one: several.coverage_error(one, one[0], LIPS),
        several.sample_diversity,
        several.multimodality,
    ],
)
def test_one_sample_is_refused(of_one):
    with pytest.raises(ValueError, match="needs at least 2 samples a clip, found 1"):
        of_one(along_x(1.0))


def test_odd_halves_are_refused():
    with pytest.raises(ValueError, match="even number of samples, found 3"):
        several.sample_diversity(along_x(1.0, 2.0, 3.0), "halves")


@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
@settings(max_examples=25, deadline=None)
def test_properties(seed, number):
    generator = torch.Generator().manual_seed(seed)
    samples, truth = torch.randn(number, 2, 4, 3, generator=generator), torch.randn(2, 4, 3, generator=generator)
    best = several.coverage_error(samples, truth, LIPS).sum()
    assert all(best <= lip_vertex_error(sample, truth, LIPS).sum() for sample in samples)
    same = truth.expand(number, -1, -1, -1)
    assert several.mean_estimate_error(same, truth, LIPS).max() < 1e-12
    assert several.sample_diversity(same) == 0
    wider = truth + 2 * (samples - truth)
    assert several.sample_diversity(wider).item() == pytest.approx(2 * several.sample_diversity(samples).item())
