"""Retargeting errors: how far a motion that was moved to another mesh is from the motion that mesh would have made.

Three uses of one formula: pairs with a known answer (two subjects of one topology, the same controls), a motion
retargeted to the mesh it came from (self-retargeting), and one sent to another mesh and back (cycle).
"""

from typing import Any

from torch import Tensor

from metrics.motion import REDUCTIONS, MotionMetric, choice


def retargeting_error(retargeted: Tensor, truth: Tensor, over_vertices: str = "mean") -> Tensor:
    """Retargeting error of each frame: the mean or maximum over all vertices of d.

    Args:
        retargeted: (T, V, 3) vertices.
        truth: (T, V, 3) vertices: the known answer, or the source of a self-retargeting or a cycle.
        over_vertices: ``mean`` or ``max``.

    Returns:
        (T,) float64, in the unit of the vertices.

    Example:
        >>> import torch
        >>> retargeted = torch.tensor([[[3.0, 0.0, 4.0], [0.0, 1.0, 0.0]]])
        >>> [retargeting_error(retargeted, torch.zeros(1, 2, 3), over).item() for over in ("mean", "max")]
        [3.0, 5.0]
    """
    choice("over_vertices", over_vertices, REDUCTIONS)
    distances = (retargeted.double() - truth.double()).norm(dim=-1)
    return distances.mean(1) if over_vertices == "mean" else distances.amax(1)


def code_error(codes: Tensor, truth: Tensor) -> Tensor:
    """Code error of each frame: ‖ẑ − z‖₂ between recovered and true expression codes (NFR's zFACS).

    Args:
        codes: (T, K) recovered codes.
        truth: (T, K) true codes.

    Returns:
        (T,) float64.

    Example:
        >>> import torch
        >>> code_error(torch.tensor([[0.3, 0.4]]), torch.zeros(1, 2)).round(decimals=6).tolist()
        [0.5]
    """
    return (codes.double() - truth.double()).norm(dim=1)


class RetargetingError(MotionMetric):
    """:func:`retargeting_error` over a test set.

    Args:
        over_vertices: ``mean`` or ``max``.
        pooling: ``frames`` or ``clips``.
        scale: multiplied into the result: 1000 from metres to millimetres.
    """

    def __init__(
        self, over_vertices: str = "mean", pooling: str = "frames", scale: float = 1000.0, **kwargs: Any
    ) -> None:
        super().__init__(pooling, scale, **kwargs)
        self.over_vertices = choice("over_vertices", over_vertices, REDUCTIONS)

    def update(self, retargeted: Tensor, truth: Tensor) -> None:
        """Adds one clip: vertices (T, V, 3) twice."""
        self.add(retargeting_error(retargeted, truth, self.over_vertices))


class CodeError(MotionMetric):
    """:func:`code_error` over a test set."""

    def update(self, codes: Tensor, truth: Tensor) -> None:
        """Adds one clip: codes (T, K) twice."""
        self.add(code_error(codes, truth))
