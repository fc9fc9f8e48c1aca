import pytest
import torch

from metrics import rig
from metrics.distribution import frechet_distance, mean_and_covariance

CONTROLS = torch.tensor([0, 1])


def test_error_by_hand_and_clips_count_alike():
    predicted = torch.tensor([[3.0, 4.0, 12.0], [0.0, 0.0, 0.0]])
    truth = torch.zeros(2, 3)
    assert rig.control_error(predicted, truth).tolist() == [13.0, 0.0]
    assert rig.control_error(predicted, truth, CONTROLS).tolist() == [5.0, 0.0]
    by_clip, by_frame = rig.ControlError(), rig.ControlError(pooling="frames")
    for metric in (by_clip, by_frame):
        metric.update(predicted, truth)
        metric.update(predicted[:1], truth[:1])
    assert by_clip.compute() == (6.5 + 13) / 2
    assert by_frame.compute() == (13 + 0 + 13) / 3


def test_dynamics_by_hand():
    moving = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # sums of squares 1 and 4; by control 1, 0 and 0, 4
    still = torch.zeros(2, 2)
    assert rig.control_dynamics(moving, CONTROLS) == 1.5
    assert rig.control_dynamics(moving, CONTROLS, per_control=True) == (0.5 + 2) / 2
    signed, absolute = rig.ControlDynamicsDeviation(), rig.ControlDynamicsDeviation(signed=False)
    for metric in (signed, absolute):
        metric.update(still, moving, CONTROLS)
        metric.update(moving, still, CONTROLS)
    assert signed.compute() == 0
    assert absolute.compute() == 1.5


def test_control_sets_of_the_official_script():
    assert (len(rig.BEAT_MOUTH), len(rig.BEAT_UPPER)) == (12, 16)
    assert (len(rig.DAMM_MOUTH), len(rig.DAMM_UPPER)) == (61, 131)
    assert not set(rig.BEAT_MOUTH) & set(rig.BEAT_UPPER)


def test_windows():
    curves = torch.arange(10.0).reshape(5, 2)
    assert rig.motion_windows(curves, 2, 1).tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]
    assert rig.motion_windows(curves, 3, 2).tolist() == [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9]]
    assert rig.motion_windows(curves, 6, 1).shape == (0, 12)


@pytest.mark.parametrize("encoder", [None, lambda windows: windows.mean(1)])
def test_coefficient_distance_is_that_of_the_windows(encoder):
    generator = torch.Generator().manual_seed(2)
    real, fake = torch.randn(40, 3, generator=generator), 2 * torch.randn(30, 3, generator=generator)
    metric = rig.CoefficientDistance(6 if encoder is None else 3, 2, 1, encoder)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    metric.update(fake[:1], real=False)  # shorter than a window
    windows = [torch.stack([curves[i : i + 2] for i in range(len(curves) - 1)]) for curves in (real, fake)]
    features = [window.flatten(1) if encoder is None else encoder(window) for window in windows]
    expected = frechet_distance(*mean_and_covariance(features[0]), *mean_and_covariance(features[1]))
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-9)
