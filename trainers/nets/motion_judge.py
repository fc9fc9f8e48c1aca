"""A judge of motion: which emotion does a moving face show, and features for distances of two sets of motions."""

import torch
from torch import Tensor, nn

from datamodules.errors import UserError


class MotionJudge(nn.Module):
    """Classifies clips of any length by the mean and the spread over time of learned functions of a frame.

    Ours; there is no standard classifier of three-dimensional expressions. What it is worth is its accuracy on true
    motion, which stands beside every value as the ceiling row.

    Args:
        emotions: what it tells apart, in order.
        num_vertices: V of the mesh.
        vertices: indices of the vertices it looks at.
        width: functions of a frame.
        dropout: while training.
    """

    vertices: Tensor
    UNIT = 0.01  # metres: offsets of a face are of this size

    def __init__(
        self, emotions: list[str], num_vertices: int, vertices: list[int], width: int = 64, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.emotions = emotions
        self.num_vertices = num_vertices
        self.register_buffer("vertices", torch.tensor(vertices), persistent=False)
        self.frame = nn.Sequential(nn.Linear(3 * len(vertices), width), nn.GELU())
        self.clip = nn.Sequential(nn.LayerNorm(2 * width), nn.Dropout(dropout), nn.Linear(2 * width, width), nn.GELU())
        self.head = nn.Linear(width, len(emotions))

    def features(self, vertices: Tensor, template: Tensor) -> Tensor:
        """What the decision rests on.

        Args:
            vertices: (T, V, 3) metres.
            template: (V, 3) metres, of the same subject.

        Returns:
            (width,) float32.

        Raises:
            UserError: another mesh.
        """
        if vertices.shape[1:] != (self.num_vertices, 3):
            raise UserError(f"motion judge: knows meshes of {self.num_vertices} vertices, found {vertices.shape[1]}")
        offsets = (vertices[:, self.vertices] - template[self.vertices]) / self.UNIT
        states = self.frame(offsets.flatten(1).float())
        return self.clip(torch.cat([states.mean(0), states.std(0, correction=0)]))

    def forward(self, vertices: Tensor, template: Tensor) -> Tensor:
        """Logits (E,) of one clip; arguments as in :meth:`features`."""
        return self.head(self.features(vertices, template))
