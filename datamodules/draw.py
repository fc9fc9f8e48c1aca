"""Drawing what data sets hold: subjects, meshes, and pictures as files."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from datamodules.demo.talking import appearance
from datamodules.render import Camera, Light, render
from datamodules.speech import SpeechDataModule

Draw = Callable[[np.ndarray], np.ndarray]  # vertices (V, 3) -> image (size, size, 3) uint8

GREY = (0.72, 0.72, 0.74)
BACKGROUND = np.array([0.93, 0.94, 0.96])


def drawer(data: SpeechDataModule, subject: str, size: int) -> Draw:
    """How to draw a subject: in colour where the data says what it looks like, else as a grey mesh."""
    template = data.templates[subject].numpy()
    centre, extent = (template.max(0) + template.min(0)) / 2, np.ptp(template, axis=0)
    camera = Camera(
        centre=tuple(centre), distance=max(1.2, 3 * float(extent.max())), frame=float(1.1 * extent[:2].max())
    )
    light = Light()
    if subject in data.manifest.fields.get("identities", {}):
        person = appearance(data.manifest, subject)

        def draw(vertices: np.ndarray) -> np.ndarray:
            mesh = person.dress(vertices)
            return render(
                mesh.vertices,
                mesh.triangles,
                mesh.colours,
                size,
                camera,
                supersample=2,
                background=BACKGROUND,
                light=light,
            )

        return draw
    return mesh_drawer(data.topology["triangles"], camera, size)


def mesh_drawer(triangles: np.ndarray, camera: Camera, size: int) -> Draw:
    """Draws any mesh in grey."""

    def draw(vertices: np.ndarray) -> np.ndarray:
        colours = np.tile(GREY, (len(vertices), 1))
        return render(vertices, triangles, colours, size, camera, supersample=2, background=BACKGROUND, light=Light())

    return draw


def png_bytes(image: np.ndarray) -> bytes:
    """An image (H, W, 3) uint8 as the bytes of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", optimize=True)
    return buffer.getvalue()
