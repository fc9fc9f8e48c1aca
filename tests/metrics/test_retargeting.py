import pytest
import torch

from metrics import retargeting


def test_error_by_hand_in_millimetres():
    retargeted = torch.zeros(2, 2, 3)
    retargeted[0, 0] = torch.tensor([0.003, 0.0, 0.004])
    mean, worst = retargeting.RetargetingError(), retargeting.RetargetingError("max")
    for metric in (mean, worst):
        metric.update(retargeted, torch.zeros(2, 2, 3))
    assert mean.compute().item() == pytest.approx(5 / 4)
    assert worst.compute().item() == pytest.approx(5 / 2)


def test_code_error_by_hand():
    metric = retargeting.CodeError()
    metric.update(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2, 2))
    assert metric.compute() == 2.5


def test_cycle_of_an_exact_retargeting_is_zero():
    source = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0))
    there = source[:, [4, 2, 0, 1, 3]]
    back = there[:, [2, 3, 1, 4, 0]]
    assert retargeting.retargeting_error(back, source, "max").max() == 0


def test_unknown_reduction():
    with pytest.raises(ValueError, match="over_vertices is 'median', expected one of max, mean"):
        retargeting.RetargetingError("median")
