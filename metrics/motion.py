"""Motion metrics: how far predicted vertices are from true ones, and whether they move as much.

Notation: v, v̂ ∈ R^(T×V×3) are true and predicted vertices in one coordinate unit, L a set of lip vertices, U one
of the upper face, v₀ the template, d_tk = ‖v_tk − v̂_tk‖₂.

Published numbers under one name differ by the formula (squared or not), the reduction over vertices (maximum or
mean) and the pooling (over all frames of the test set, or per clip first), so each of these is an argument here
and part of a protocol (:mod:`metrics.protocols`). Functions give one clip's values; the classes pool them over a
test set, with a float64 sum and a count as their whole state: exact and small under DDP, whatever the number of
frames. Metrics of several samples a clip are in :mod:`metrics.samples`, of time in :mod:`metrics.timing`, of rig
controls in :mod:`metrics.rig`, of retargeting in :mod:`metrics.retargeting`.
"""

from typing import Any

import numpy as np
import torch
import trimesh
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor
from torchmetrics import Metric

VARIANTS = ("squared", "l2", "centred")
REDUCTIONS = ("max", "mean")
POOLINGS = ("frames", "clips")


def lip_vertex_error(
    predicted: Tensor, truth: Tensor, lips: Tensor, variant: str = "squared", over_vertices: str = "max"
) -> Tensor:
    """Lip vertex error (LVE) of each frame: the maximum or mean over L of d² or d.

    Args:
        predicted: (T, V, 3) vertices.
        truth: (T, V, 3) vertices.
        lips: (L,) int64 indices of the lip vertices.
        variant: ``squared`` for d² (CodeTalker's script, torchmetrics, FaceDiffuser, ProbTalk3D), ``l2`` for d
            (MeshTalk's paper, Imitator's "lip max"), ``centred`` for d after the centroid of the lips was
            subtracted from both (MeshTalk's author), which ignores a lip set that is displaced as a whole.
        over_vertices: ``max`` or ``mean``.

    Returns:
        (T,) float64, in the unit of the vertices, squared for ``squared``.

    Example:
        >>> truth = torch.zeros(2, 3, 3)
        >>> predicted = truth.clone()
        >>> predicted[0, 1] = torch.tensor([3.0, 0.0, 4.0])
        >>> lip_vertex_error(predicted, truth, torch.tensor([1, 2])).tolist()
        [25.0, 0.0]
        >>> lip_vertex_error(predicted, truth, torch.tensor([1, 2]), "l2", "mean").tolist()
        [2.5, 0.0]
    """
    choice("variant", variant, VARIANTS)
    choice("over_vertices", over_vertices, REDUCTIONS)
    predicted_lips, true_lips = predicted[:, lips].double(), truth[:, lips].double()
    if variant == "centred":
        predicted_lips = predicted_lips - predicted_lips.mean(1, keepdim=True)
        true_lips = true_lips - true_lips.mean(1, keepdim=True)
    squared = (predicted_lips - true_lips).square().sum(-1)
    errors = squared if variant == "squared" else squared.sqrt()
    return errors.amax(1) if over_vertices == "max" else errors.mean(1)


def mean_vertex_error(predicted: Tensor, truth: Tensor) -> Tensor:
    """Mean vertex error (MVE) of each frame: the mean of d over all vertices (FaceDiffuser, ProbTalk3D).

    Args:
        predicted: (T, V, 3) vertices.
        truth: (T, V, 3) vertices.

    Returns:
        (T,) float64, in the unit of the vertices.

    Example:
        >>> mean_vertex_error(torch.ones(1, 2, 3), torch.zeros(1, 2, 3)).tolist()
        [1.7320508075688772]
    """
    return (predicted.double() - truth.double()).norm(dim=-1).mean(1)


def upper_face_error(predicted: Tensor, truth: Tensor, upper_face: Tensor, over_vertices: str = "max") -> Tensor:
    """Eye or upper-face error (EVE) of each frame: the maximum or mean over U of d (EmoTalk's family).

    Args:
        predicted: (T, V, 3) vertices.
        truth: (T, V, 3) vertices.
        upper_face: (U,) int64 indices of the eyes and the forehead, or of the whole upper face.
        over_vertices: ``max`` or ``mean``.

    Returns:
        (T,) float64, in the unit of the vertices.

    Example:
        >>> predicted = torch.tensor([[[3.0, 0.0, 4.0], [0.0, 1.0, 0.0]]])
        >>> upper_face_error(predicted, torch.zeros(1, 2, 3), torch.tensor([0, 1]), "mean").tolist()
        [3.0]
    """
    choice("over_vertices", over_vertices, REDUCTIONS)
    errors = (predicted[:, upper_face].double() - truth[:, upper_face].double()).norm(dim=-1)
    return errors.amax(1) if over_vertices == "max" else errors.mean(1)


def surface_distance(predicted: Tensor, truth: Tensor, triangles: Tensor) -> Tensor:
    """Face vertex error of each frame as FaceXHuBERT's script takes it: the mean distance from v̂ to the true surface.

    A vertex that slides along the surface costs nothing, unlike in :func:`mean_vertex_error`. The distance is
    exact: every triangle that can hold the nearest point is looked at.

    Args:
        predicted: (T, V̂, 3) vertices; V̂ need not be V.
        truth: (T, V, 3) vertices.
        triangles: (F, 3) int64 vertex indices of the true mesh.

    Returns:
        (T,) float64, in the unit of the vertices.

    Example:
        >>> square = torch.tensor([[[0.0, 0, 0], [4, 0, 0], [4, 4, 0], [0, 4, 0]]])
        >>> above = torch.tensor([[[1.0, 2.0, 3.0], [7.0, 0.0, 4.0]]])
        >>> surface_distance(above, square, torch.tensor([[0, 1, 2], [0, 2, 3]])).tolist()
        [4.0]
    """
    frames = zip(predicted.double().cpu().numpy(), truth.double().cpu().numpy(), strict=True)
    faces = triangles.cpu().numpy()
    means = [_distances_to_surface(points, vertices[faces]).mean() for points, vertices in frames]
    return torch.tensor(means, dtype=torch.float64, device=predicted.device)


def _distances_to_surface(points: NDArray[np.float64], corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) distances from points (N, 3) to the nearest of triangles (F, 3, 3)."""
    centres = corners.mean(1)
    radius = np.linalg.norm(corners - centres[:, None], axis=-1).max()
    tree = cKDTree(centres)
    # The nearest point lies in a triangle whose centre is at most this far: the distance to some triangle's centre
    # bounds the distance to the surface, and a triangle's points are within the radius of its centre.
    reach = tree.query(points)[0] + radius
    candidates = tree.query_ball_point(points, reach * (1 + 1e-9))
    counts = np.array([len(found) for found in candidates])
    owner = np.repeat(np.arange(len(points)), counts)
    nearest = trimesh.triangles.closest_point(corners[np.concatenate(candidates).astype(int)], points[owner])
    distances = np.linalg.norm(nearest - points[owner], axis=1)
    return np.minimum.reduceat(distances, np.cumsum(counts) - counts)


def motion_dynamics(vertices: Tensor, template: Tensor, region: Tensor) -> Tensor:
    """How much a region moves: mean over its vertices of std_t(‖v_t − v₀‖²), the population deviation.

    Args:
        vertices: (T, V, 3) vertices.
        template: (V, 3) the neutral mesh.
        region: (U,) int64 vertex indices.

    Returns:
        () float64, in squared units of the vertices.
    """
    offsets = vertices[:, region].double() - template[region].double()
    return offsets.square().sum(-1).std(0, correction=0).mean()


def face_dynamics_deviation(
    predicted: Tensor, truth: Tensor, template: Tensor, upper_face: Tensor, signed: bool = True
) -> Tensor:
    """Upper-face dynamics deviation (FDD) of one clip: the truth's :func:`motion_dynamics` minus the prediction's.

    CodeTalker's value is signed: clips that move too much cancel those that move too little, and the best value
    is 0. FaceDiffuser added the absolute variant.

    Args:
        predicted: (T, V, 3) vertices.
        truth: (T, V, 3) vertices.
        template: (V, 3) the neutral mesh.
        upper_face: (U,) int64 vertex indices.
        signed: False takes the absolute value of the clip.

    Returns:
        () float64, in squared units of the vertices.
    """
    deviation = motion_dynamics(truth, template, upper_face) - motion_dynamics(predicted, template, upper_face)
    return deviation if signed else deviation.abs()


def mouth_opening(vertices: Tensor, upper_lip: Tensor, lower_lip: Tensor) -> Tensor:
    """Distance of each frame between the centroids of the inner upper and the inner lower lip.

    Args:
        vertices: (T, V, 3) vertices.
        upper_lip: (L,) int64 indices on the inner edge of the upper lip.
        lower_lip: (L',) int64 indices on the inner edge of the lower lip.

    Returns:
        (T,) float64, in the unit of the vertices.
    """
    return (vertices[:, upper_lip].double().mean(1) - vertices[:, lower_lip].double().mean(1)).norm(dim=-1)


def mouth_opening_difference(predicted: Tensor, truth: Tensor, upper_lip: Tensor, lower_lip: Tensor) -> Tensor:
    """Mouth opening difference (MOD) of each frame (EmoTalk): | opening of the prediction − of the truth |.

    Args:
        predicted: (T, V, 3) vertices.
        truth: (T, V, 3) vertices.
        upper_lip: (L,) int64 indices on the inner edge of the upper lip.
        lower_lip: (L',) int64 indices on the inner edge of the lower lip.

    Returns:
        (T,) float64, in the unit of the vertices.
    """
    return (mouth_opening(predicted, upper_lip, lower_lip) - mouth_opening(truth, upper_lip, lower_lip)).abs()


class MotionMetric(Metric):
    """Mean of an error over a test set; a subclass's ``update`` says what the error is and what it needs.

    Args:
        pooling: ``frames`` weighs every frame of the test set alike, ``clips`` every clip.
        scale: multiplied into the result, for instance 1000 from metres to millimetres.
    """

    higher_is_better: bool | None = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, pooling: str = "frames", scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pooling = choice("pooling", pooling, POOLINGS)
        self.scale = scale
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, errors: Tensor) -> None:
        """Adds one clip's errors (T,)."""
        self.total += errors.sum() if self.pooling == "frames" else errors.mean()
        self.count += errors.numel() if self.pooling == "frames" else 1

    def compute(self) -> Tensor:
        """The mean, () float64; NaN before the first clip."""
        return self.total / self.count * self.scale


class LipVertexError(MotionMetric):
    """:func:`lip_vertex_error` over a test set.

    Args:
        variant: ``squared``, ``l2`` or ``centred``.
        over_vertices: ``max`` or ``mean``.
        pooling: ``frames`` or ``clips``.
        scale: multiplied into the result.

    Example:
        >>> metric = LipVertexError(variant="l2", scale=1000)
        >>> metric.update(torch.full((2, 1, 3), 0.1), torch.zeros(2, 1, 3), lips=torch.tensor([0]))
        >>> round(metric.compute().item(), 3)
        173.205
    """

    def __init__(
        self,
        variant: str = "squared",
        over_vertices: str = "max",
        pooling: str = "frames",
        scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(pooling, scale, **kwargs)
        self.variant = choice("variant", variant, VARIANTS)
        self.over_vertices = choice("over_vertices", over_vertices, REDUCTIONS)

    def update(self, predicted: Tensor, truth: Tensor, lips: Tensor) -> None:
        """Adds one clip: vertices (T, V, 3) twice and the (L,) lip indices."""
        self.add(lip_vertex_error(predicted, truth, lips, self.variant, self.over_vertices))


class MeanVertexError(MotionMetric):
    """:func:`mean_vertex_error` over a test set."""

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        """Adds one clip: vertices (T, V, 3) twice."""
        self.add(mean_vertex_error(predicted, truth))


class UpperFaceError(MotionMetric):
    """:func:`upper_face_error` over a test set.

    Args:
        over_vertices: ``max`` or ``mean``.
        pooling: ``frames`` or ``clips``.
        scale: multiplied into the result.
    """

    def __init__(self, over_vertices: str = "max", pooling: str = "frames", scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(pooling, scale, **kwargs)
        self.over_vertices = choice("over_vertices", over_vertices, REDUCTIONS)

    def update(self, predicted: Tensor, truth: Tensor, upper_face: Tensor) -> None:
        """Adds one clip: vertices (T, V, 3) twice and the (U,) upper-face indices."""
        self.add(upper_face_error(predicted, truth, upper_face, self.over_vertices))


class SurfaceDistance(MotionMetric):
    """:func:`surface_distance` over a test set; FaceXHuBERT's script pools by ``clips``."""

    def update(self, predicted: Tensor, truth: Tensor, triangles: Tensor) -> None:
        """Adds one clip: vertices (T, V̂, 3) and (T, V, 3), and the triangles (F, 3)."""
        self.add(surface_distance(predicted, truth, triangles))


class FaceDynamicsDeviation(MotionMetric):
    """:func:`face_dynamics_deviation`, the mean over the clips of a test set.

    Args:
        signed: False takes the absolute value of each clip; the signed value is best at 0.
        scale: multiplied into the result.
    """

    higher_is_better = None

    def __init__(self, signed: bool = True, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__("clips", scale, **kwargs)
        self.signed = signed

    def update(self, predicted: Tensor, truth: Tensor, template: Tensor, upper_face: Tensor) -> None:
        """Adds one clip: vertices (T, V, 3) twice, the template (V, 3) and the (U,) upper-face indices."""
        self.add(face_dynamics_deviation(predicted, truth, template, upper_face, self.signed)[None])


class MouthOpeningDifference(MotionMetric):
    """:func:`mouth_opening_difference` over a test set."""

    def update(self, predicted: Tensor, truth: Tensor, upper_lip: Tensor, lower_lip: Tensor) -> None:
        """Adds one clip: vertices (T, V, 3) twice and the indices of the inner edges of both lips."""
        self.add(mouth_opening_difference(predicted, truth, upper_lip, lower_lip))


def choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """``value``, if it is one of ``choices``.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} is '{value}', expected one of {', '.join(choices)}")
    return value
