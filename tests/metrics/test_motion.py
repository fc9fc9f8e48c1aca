import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.multimodal import LipVertexError as TorchmetricsLipVertexError

from metrics import motion

LIPS = torch.tensor([1, 2])


def clips(number=4, vertices=6):
    generator = torch.Generator().manual_seed(3)
    for i in range(number):
        frames = 3 + 2 * i
        yield torch.randn(2, frames, vertices, 3, generator=generator)


def tiny():
    """Two frames of three vertices; vertex 0 is outside the lips."""
    truth = torch.zeros(2, 3, 3)
    predicted = truth.clone()
    predicted[0, 0] = 100.0
    predicted[0, 1] = torch.tensor([3.0, 4.0, 0.0])
    predicted[1, 2] = torch.tensor([0.0, 0.0, 2.0])
    return predicted, truth


@pytest.mark.parametrize(
    ("variant", "over", "expected"),
    [
        ("squared", "max", [25.0, 4.0]),
        ("squared", "mean", [12.5, 2.0]),
        ("l2", "max", [5.0, 2.0]),
        ("l2", "mean", [2.5, 1.0]),
        ("centred", "max", [2.5, 1.0]),  # half of the offset goes with the centroid of the two vertices
    ],
)
def test_lip_vertex_error_by_hand(variant, over, expected):
    assert motion.lip_vertex_error(*tiny(), LIPS, variant, over).tolist() == expected


def test_centred_ignores_displacement():
    truth = next(clips())[0]
    moved = truth + torch.tensor([0.1, -2.0, 3.0])
    assert motion.lip_vertex_error(moved, truth, LIPS, "centred").max() < 1e-6
    assert motion.lip_vertex_error(moved, truth, LIPS, "l2").min() > 3


def test_lip_vertex_error_equals_torchmetrics():
    ours, theirs = motion.LipVertexError("squared"), TorchmetricsLipVertexError(LIPS.tolist())
    for predicted, truth in clips():
        ours.update(predicted, truth, LIPS)
        theirs.update(predicted, truth)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_pooling_by_hand():
    by_frame, by_clip = motion.MeanVertexError("frames"), motion.MeanVertexError("clips")
    for metric in (by_frame, by_clip):
        metric.update(torch.tensor([1.0, 0, 0]).expand(1, 2, 3), torch.zeros(1, 2, 3))
        metric.update(torch.tensor([0, 4.0, 0]).expand(3, 2, 3), torch.zeros(3, 2, 3))
    assert by_frame.compute() == (1 + 3 * 4) / 4
    assert by_clip.compute() == (1 + 4) / 2


def test_dynamics_deviation_by_hand_and_its_cancelling():
    # One vertex at distance 0 and 2: squared 0 and 4, population deviation 2. Still: deviation 0.
    moving = torch.tensor([0.0, 2.0])[:, None, None] * torch.tensor([1.0, 0, 0])
    still, template, region = torch.zeros(2, 1, 3), torch.zeros(1, 3), torch.tensor([0])
    assert motion.face_dynamics_deviation(still, moving, template, region) == 2
    assert motion.face_dynamics_deviation(moving, still, template, region) == -2
    signed, absolute = motion.FaceDynamicsDeviation(signed=True), motion.FaceDynamicsDeviation(signed=False)
    for metric in (signed, absolute):
        metric.update(still, moving, template, region)
        metric.update(moving, still, template, region)
    assert signed.compute() == 0
    assert absolute.compute() == 2


def test_mouth_opening_difference_by_hand():
    truth = torch.zeros(1, 3, 3)
    truth[0, :, 1] = torch.tensor([2.0, 4.0, 0.0])  # two upper vertices at heights 2 and 4, lower at 0: opening 3
    predicted = torch.zeros(1, 3, 3)
    predicted[0, 2, 1] = -1.0  # opening 1
    upper, lower = torch.tensor([0, 1]), torch.tensor([2])
    assert motion.mouth_opening_difference(predicted, truth, upper, lower).tolist() == [2.0]
    metric = motion.MouthOpeningDifference(scale=1000)
    metric.update(predicted, truth, upper, lower)
    assert metric.compute() == 2000


def test_state_does_not_grow():
    metric = motion.MeanVertexError()
    for predicted, truth in clips(8):
        metric.update(predicted, truth)
    assert sum(state.numel() for state in metric.metric_state.values()) == 2


def test_unknown_choice():
    with pytest.raises(ValueError, match="variant is 'l1', expected one of squared, l2, centred"):
        motion.LipVertexError("l1")


arrays = st.integers(0, 2**32 - 1).map(
    lambda seed: torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 3, 5, 3)))
)


@given(arrays, st.sampled_from(motion.VARIANTS), st.sampled_from(motion.REDUCTIONS), st.floats(1.1, 10))
@settings(max_examples=30, deadline=None)
def test_properties_of_lip_vertex_error(pair, variant, over, factor):
    predicted, truth = pair
    error = motion.lip_vertex_error(predicted, truth, LIPS, variant, over)
    assert motion.lip_vertex_error(truth, truth, LIPS, variant, over).abs().max() == 0
    order = torch.tensor([4, 1, 2, 0, 3])  # vertices outside the lips change places
    shuffled = motion.lip_vertex_error(predicted[:, order], truth[:, order], LIPS, variant, over)
    assert torch.equal(shuffled, error)
    scaled = motion.lip_vertex_error(truth + factor * (predicted - truth), truth, LIPS, variant, over)
    assert (scaled > error).all()


def test_upper_face_error_by_hand():
    worst, mean = motion.UpperFaceError(), motion.UpperFaceError("mean", scale=10)
    for metric in (worst, mean):
        metric.update(*tiny(), LIPS)
    assert worst.compute() == (5 + 2) / 2
    assert mean.compute() == 10 * (2.5 + 1) / 2


def test_surface_distance_by_hand():
    square = torch.tensor([[[0.0, 0, 0], [4, 0, 0], [4, 4, 0], [0, 4, 0]]])
    triangles = torch.tensor([[0, 1, 2], [0, 2, 3]])
    points = torch.tensor([[[1.0, 2.0, 3.0], [7.0, 0.0, 4.0], [2.0, 2.0, 0.0], [-3.0, -4.0, 12.0]]])
    # above the inside, beyond an edge's end, on the surface, beyond a corner
    assert motion.surface_distance(points, square, triangles).item() == pytest.approx((3 + 5 + 0 + 13) / 4)
    metric = motion.SurfaceDistance("clips", scale=2)
    metric.update(points, square, triangles)
    assert metric.compute().item() == pytest.approx(10.5)


def test_surface_distance_is_the_least_over_all_triangles():
    generator = torch.Generator().manual_seed(5)
    truth = torch.rand(2, 30, 3, generator=generator)
    triangles = torch.randint(0, 30, (40, 3), generator=generator)
    triangles = triangles[(triangles.sort(1).values.diff(dim=1) > 0).all(1)]
    points = 2 * torch.rand(2, 25, 3, generator=generator) - 0.5
    for t, distance in enumerate(motion.surface_distance(points, truth, triangles)):
        corners = truth[t][triangles].double().numpy()
        least = []
        for point in points[t].double().numpy():
            nearest = trimesh.triangles.closest_point(corners, np.tile(point, (len(corners), 1)))
            least.append(np.linalg.norm(nearest - point, axis=1).min())
        assert distance.item() == pytest.approx(np.mean(least), rel=1e-9)


def test_surface_distance_ignores_sliding_and_itself():
    truth = torch.tensor([[[0.0, 0, 0], [4, 0, 0], [0, 4, 0]]])
    slid = truth + torch.tensor([0.5, 0.5, 0.0]) * (truth.sum(-1, keepdim=True) == 0)
    triangles = torch.tensor([[0, 1, 2]])
    assert motion.surface_distance(truth, truth, triangles) == 0
    assert motion.surface_distance(slid, truth, triangles) == 0
    assert motion.mean_vertex_error(slid, truth) > 0.2
