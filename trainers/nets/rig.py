"""Rigs: named controls in [0, 1], and what each moves on a mesh."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.head import Head
from datamodules.sources import mead3d


class Rig(nn.Module):
    """A linear rig: vertices = template + sum of control · offset.

    Args:
        controls: C names, in order.
        offsets: (C, V, 3) float32, metres: what a control at 1 moves; None where only the controls are known.
    """

    offsets: Tensor | None

    def __init__(self, controls: list[str], offsets: Tensor | None = None) -> None:
        super().__init__()
        self.controls = controls
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, template: Tensor, weights: Tensor) -> Tensor:
        """Poses meshes.

        Args:
            template: (B, V, 3) metres.
            weights: (B, T, C) values of the controls.

        Returns:
            (B, T, V, 3) metres. Without offsets the mesh is empty, V = 0.

        Raises:
            UserError: a mesh that the rig does not move.
        """
        offsets = weights.new_zeros(len(self.controls), 0, 3) if self.offsets is None else self.offsets
        if template.shape[1:] != offsets.shape[1:]:
            raise UserError(
                f"rig: moves meshes of {offsets.shape[1]} vertices, found {template.shape[1]}; name this mesh's rig"
            )
        return template[:, None] + (weights @ offsets.flatten(1)).unflatten(-1, offsets.shape[1:])


def load_rig(spec: str) -> Rig:
    """Builds a rig.

    Args:
        spec: ``demo``, the 52 ARKit units of the demo head; ``flame``, names of FLAME's 53 coefficients as the source
            ``mead3d`` builds them, for data without meshes; ``path:FILE``, a safetensors file whose tensors are named
            by the controls, each (V, 3) float32 in metres, and whose metadata ``controls`` lists them in order, one a
            line; ``names:FILE``, a text file of control names, one a line, for data without meshes.

    Raises:
        UserError: a specification of another form, or a file that cannot be read.
    """
    kind, _, name = spec.partition(":")
    if spec == "demo":
        head = Head.load()
        return Rig(list(head.units), torch.from_numpy(head.unit_deltas))
    if spec == "flame":
        return Rig(mead3d.CONTROLS)
    if kind not in ("path", "names"):
        raise UserError(f"model.rig: '{spec}', expected demo, flame, path:FILE or names:FILE")
    if not Path(name).is_file():
        raise UserError(
            f"model.rig: {name}: no such file; expected {'offsets' if kind == 'path' else 'names'} of controls"
        )
    if kind == "names":
        return Rig(Path(name).read_text().split())
    try:
        with safe_open(name, framework="pt") as file:
            controls = file.metadata()["controls"].splitlines()
            return Rig(controls, torch.stack([file.get_tensor(control) for control in controls]))
    except (SafetensorError, TypeError, KeyError) as error:
        raise UserError(f"model.rig: {name}: not a rig ({error!r:.60}); see trainers.nets.rig.load_rig") from error
