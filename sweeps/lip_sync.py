"""Talking meshes as SyncNet wants them: pictures of a face at 25 fps, cut as its authors cut television."""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from datamodules.draw import Draw, drawer
from datamodules.render import Camera
from datamodules.speech import SpeechDataModule
from metrics.score_speech import Clip
from trainers.nets.syncnet import FPS, SIZE, SyncNet

MARGIN = 0.4  # of the face's box: left, right and below, none above


class LipSyncJudge:
    """What SyncNet sees and hears of a clip, as :class:`metrics.score_speech.Judges` asks for it.

    Args:
        network: the judge.
        data: says what its subjects look like.
        face: vertex indices, from the forehead to the chin: what a face detector puts its box around.
    """

    def __init__(self, network: SyncNet, data: SpeechDataModule, face: ArrayLike) -> None:
        self.network, self.data, self.face = network, data, np.asarray(face)
        self._draw: dict[str, Draw] = {}
        self._last: tuple[str, Tensor, tuple[Tensor, Tensor]] | None = None

    @torch.inference_mode()
    def __call__(self, clip: Clip, vertices: Tensor) -> tuple[Tensor, Tensor]:
        """Vertices (T, V, 3) of a clip -> embeddings (N, 1024) of what is seen and of what is heard.

        Raises:
            ValueError: the clip lacks its sound or subject, or is too short.
        """
        if clip.audio is None or clip.subject is None:
            raise ValueError("needs the sound and the subject, which the data does not have")
        # Distance and confidence ask for the same clip one after the other, and drawing it takes seconds.
        if self._last is None or self._last[0] != clip.key or not torch.equal(self._last[1], vertices):
            if clip.subject not in self._draw:
                self._draw[clip.subject] = face_drawer(self.data, clip.subject, self.face)
            draw = self._draw[clip.subject]
            frames = np.stack([draw(frame.numpy()) for frame in at_rate(vertices, self.data.fps, FPS)])
            self._last = clip.key, vertices, self.network(torch.from_numpy(frames), clip.audio)
        return self._last[2]


def at_rate(vertices: Tensor, fps: float, rate: float) -> Tensor:
    """Motion (T, V, 3) at ``fps`` frames per second -> (T', V, 3) at ``rate``, straight lines between frames.

    Example:
        >>> at_rate(torch.tensor([0.0, 1.0, 2.0, 3.0]).reshape(4, 1, 1), 30, 20).flatten().tolist()
        [0.0, 1.5, 3.0]
    """
    last = len(vertices) - 1
    times = torch.arange(int(last * rate / fps + 1e-6) + 1, dtype=torch.float64) * fps / rate
    before = times.long().clamp(max=last)
    share = (times - before).to(vertices.dtype)[:, None, None]
    return torch.lerp(vertices[before], vertices[(before + 1).clamp(max=last)], share)


def face_drawer(data: SpeechDataModule, subject: str, face: ArrayLike) -> Draw:
    """Draws a subject's face, (224, 224, 3) uint8.

    The authors' ``run_pipeline.py``: a square 1.4 times as wide as the longer side of the face's box, centred left to
    right, from the box's upper edge down. The box is that of the neutral face, so that nothing but the mesh moves.
    """
    template = data.templates[subject].numpy()
    extent = np.ptp(template, axis=0)
    # The camera of datamodules.draw.drawer.
    camera = Camera(
        centre=tuple((template.max(0) + template.min(0)) / 2),
        distance=max(1.2, 3 * float(extent.max())),
        frame=float(1.1 * extent[:2].max()),
    )
    placed = camera.project(template[np.asarray(face)], 1)[:, :2]  # in shares of the picture
    side = (1 + MARGIN) * float(np.ptp(placed, axis=0).max())
    size = round(SIZE / side)
    left = round(float(placed[:, 0].max() + placed[:, 0].min() - side) / 2 * size) + SIZE
    top = round(float(placed[:, 1].min()) * size) + SIZE
    whole = drawer(data, subject, size)

    def draw(vertices: np.ndarray) -> np.ndarray:
        # The square may reach beyond the picture, whose edge is background.
        wide = np.pad(whole(vertices), ((SIZE, SIZE), (SIZE, SIZE), (0, 0)), mode="edge")
        return wide[top : top + SIZE, left : left + SIZE]

    return draw
