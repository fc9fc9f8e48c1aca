"""Errors of rig controls and of expression coefficients: curves (T, C) instead of vertices.

The formulas are those of FaceDiffuser's script for blendshapes, which differ from its own for vertices: clips count
alike, and the dynamics deviation takes one deviation of a sum over all controls.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metrics.distribution import FrechetDistance
from metrics.motion import MotionMetric

# Controls of the mouth and of the upper face in FaceDiffuser's script.
BEAT_MOUTH = (23, 25, 27, 28, 31, 37, 39, 40, 41, 42, 47, 48)
BEAT_UPPER = (*range(8, 22), 49, 50)
DAMM_MOUTH = (*range(94, 114), *range(146, 178), *range(183, 192))
DAMM_UPPER = tuple(i for i in range(192) if i not in DAMM_MOUTH)


def control_error(predicted: Tensor, truth: Tensor, controls: Tensor | None = None) -> Tensor:
    """Blendshape error of each frame: ‖ĉ − c‖₂ over all controls (MBE) or those of the mouth (LBE).

    Args:
        predicted: (T, C) controls.
        truth: (T, C) controls.
        controls: (K,) int64 indices, for instance of the mouth; by default all.

    Returns:
        (T,) float64, in the unit of the controls.

    Example:
        >>> control_error(torch.tensor([[3.0, 4.0, 12.0]]), torch.zeros(1, 3)).tolist()
        [13.0]
        >>> control_error(torch.tensor([[3.0, 4.0, 12.0]]), torch.zeros(1, 3), torch.tensor([0, 1])).tolist()
        [5.0]
    """
    difference = predicted.double() - truth.double()
    return (difference if controls is None else difference[:, controls]).norm(dim=1)


def control_dynamics(curves: Tensor, controls: Tensor, per_control: bool = False) -> Tensor:
    """How much controls move: std_t(Σ_k c_tk²), the population deviation.

    Computed in the precision of ``curves``, control after control as the script does: in float32 its rounding shows
    in the sixth digit of a deviation, so a float64 value would not be the published one. Pass float64 for that.

    Args:
        curves: (T, C) controls.
        controls: (K,) int64 indices.
        per_control: True takes the mean over k of std_t(c_tk²), which is what the formula for vertices would be;
            FaceDiffuser's script sums first.

    Returns:
        () float64, in squared units of the controls.

    Example:
        >>> curves = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # the sum of squares stands still
        >>> control_dynamics(curves, torch.tensor([0, 1])).item()
        0.0
        >>> control_dynamics(curves, torch.tensor([0, 1]), per_control=True).item()
        0.5
    """
    squares = np.square(np.ascontiguousarray(curves.T[controls].cpu().numpy()))
    dynamics = squares.std(1).mean() if per_control else squares.sum(0).std()
    return torch.tensor(dynamics, dtype=torch.float64, device=curves.device)


class ControlError(MotionMetric):
    """:func:`control_error` over a test set; FaceDiffuser's script pools by ``clips``.

    Args:
        pooling: ``frames`` or ``clips``.
        scale: multiplied into the result.
    """

    def __init__(self, pooling: str = "clips", scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(pooling, scale, **kwargs)

    def update(self, predicted: Tensor, truth: Tensor, controls: Tensor | None = None) -> None:
        """Adds one clip: controls (T, C) twice, and the indices of those that count."""
        self.add(control_error(predicted, truth, controls))


class ControlDynamicsDeviation(MotionMetric):
    """Dynamics deviation of controls: :func:`control_dynamics` of the truth minus the prediction's, mean over clips.

    Args:
        signed: False takes the absolute value of each clip; the signed value is best at 0.
        per_control: as in :func:`control_dynamics`.
        scale: multiplied into the result.
    """

    higher_is_better = None

    def __init__(self, signed: bool = True, per_control: bool = False, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__("clips", scale, **kwargs)
        self.signed, self.per_control = signed, per_control

    def update(self, predicted: Tensor, truth: Tensor, controls: Tensor) -> None:
        """Adds one clip: controls (T, C) twice, and the (K,) indices of the upper face."""
        of_truth, of_prediction = (
            control_dynamics(curves, controls, self.per_control) for curves in (truth, predicted)
        )
        deviation = of_truth - of_prediction
        self.add((deviation if self.signed else deviation.abs())[None])


def motion_windows(curves: Tensor, length: int, stride: int) -> Tensor:
    """Windows (N, length · C) of curves (T, C), one every ``stride`` frames; the rest at the end is left out.

    Example:
        >>> motion_windows(torch.arange(5.0)[:, None], 2, 2).tolist()
        [[0.0, 1.0], [2.0, 3.0]]
    """
    if len(curves) < length:
        return curves.new_zeros(0, length * curves.shape[1])
    return curves.unfold(0, length, stride).transpose(1, 2).flatten(1)


class CoefficientDistance(FrechetDistance):
    """Fréchet distance between windows of predicted and of true curves (coefficient FID).

    Published values rest on encoders that were not published: name the encoder, its weights, the length and the
    stride of the windows with every value.

    Args:
        dimensions: features of one window; length · C without an encoder.
        length, stride: frames of a window, and between the starts of two.
        encoder: (N, length, C) -> (N, dimensions), for instance a motion autoencoder's; by default the window itself.
    """

    def __init__(
        self,
        dimensions: int,
        length: int,
        stride: int,
        encoder: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dimensions, **kwargs)
        self.length, self.stride, self.encoder = length, stride, encoder

    @torch.no_grad()
    def update(self, curves: Tensor, real: bool) -> None:  # type: ignore[override]
        """Adds one clip's curves (T, C), true or predicted; a clip shorter than a window adds nothing."""
        windows = motion_windows(curves, self.length, self.stride)
        if self.encoder is not None:
            windows = self.encoder(windows.unflatten(1, (self.length, -1)))
        super().update(windows, real)
