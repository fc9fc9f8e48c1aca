"""A small software renderer: triangle meshes to images, label maps and pixel positions, in vectorised numpy.

It needs no graphics card and no display, and gives the same bytes for the same input, which is what a
reproducible corpus asks for. Triangles are cut into spans (one row of pixels of one triangle), spans into
fragments, and a z-buffer keeps the nearest fragment of each pixel; colours are interpolated
perspective-correctly. Several fragments per pixel and direction (``supersample``) are averaged against aliasing.

Conventions: vertices in metres, y up, z toward the viewer; pixel (0, 0) is the upper left one and its centre
lies at (0.5, 0.5); colours in [0, 1].
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks along -z.

    Attributes:
        centre: the point (3,) in metres that is seen in the middle of the image.
        distance: metres from ``centre`` to the pinhole.
        frame: width and height in metres of what the image shows at the depth of ``centre``.
    """

    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    distance: float = 1.0
    frame: float = 0.3

    def project(self, points: Array, size: int) -> Array:
        """(..., 3) points in metres to (..., 3): x and y in pixels of a size x size image, and depth in metres."""
        x, y, z = np.moveaxis(np.asarray(points, dtype=np.float64) - self.centre, -1, 0)
        depth = self.distance - z
        scale = size * self.distance / self.frame / depth
        return np.stack([size / 2 + x * scale, size / 2 - y * scale, depth], axis=-1)


@dataclass(frozen=True)
class Light:
    """One distant light and what comes from everywhere.

    Attributes:
        direction: (3,) from the surface toward the light, of any length.
        ambient: share of the colour that shows without the light.
        gloss: strength of the highlight.
    """

    direction: tuple[float, float, float] = (0.2, 0.4, 1.0)
    ambient: float = 0.45
    gloss: float = 0.05


@dataclass(frozen=True)
class Raster:
    """The nearest triangle at every sample of a square image.

    Attributes:
        size: pixels per side.
        pixel: (P,) index of every covered pixel in the flattened image.
        triangle: (P,) the triangle seen there.
        weights: (P, 3) its perspective-correct barycentric weights.
    """

    size: int
    pixel: Array
    triangle: Array
    weights: Array


def render(
    vertices: Array,
    triangles: Array,
    colours: Array,
    size: int,
    camera: Camera | None = None,
    *,
    supersample: int = 4,
    background: Array | float = 1.0,
    light: Light | None = None,
) -> Array:
    """Draws a mesh.

    Args:
        vertices: (N, 3) metres.
        triangles: (F, 3) vertex indices, counter-clockwise seen from outside; both sides are drawn.
        colours: (N, 3) per vertex or (F, 3) per triangle in [0, 1]; per vertex if N equals F.
        size: pixels per side.
        camera: where from; by default 1 m before the origin, 0.3 m in view.
        supersample: samples per pixel and direction.
        background: colour (3,), grey level or image (size, size, 3) in [0, 1].
        light: smooth shading by this light; without one the colours are drawn as they are.

    Returns:
        (size, size, 3) uint8.
    """
    raster = rasterise((camera or Camera()).project(vertices, size * supersample), triangles, size * supersample)
    if len(colours) == len(vertices):
        lit = colours if light is None else shade(vertices, triangles, colours, light)
        samples = interpolate(raster, triangles, lit)
    else:
        samples = colours[raster.triangle]
        if light is not None:
            samples = samples * interpolate(
                raster, triangles, shade(vertices, triangles, np.ones((len(vertices), 3)), light)
            )
    return to_image(raster, samples, supersample, background)


def render_labels(
    vertices: Array, triangles: Array, labels: Array, size: int, camera: Camera, *, supersample: int = 4
) -> Array:
    """(size, size) uint8: the label (F,) that covers most of each pixel; 0 where nothing is drawn."""
    raster = rasterise(camera.project(vertices, size * supersample), triangles, size * supersample)
    return to_labels(raster, labels[raster.triangle], supersample)


def rasterise(points: Array, triangles: Array, size: int) -> Raster:
    """Finds the nearest triangle at the centre of every pixel.

    Args:
        points: (N, 3) x, y in pixels and depth, as :meth:`Camera.project` gives them.
        triangles: (F, 3) vertex indices.
        size: pixels per side.
    """
    # Components first, (3, F): reductions over the three corners are then sums of whole rows.
    x, y, depth = np.moveaxis(points[triangles.T], -1, 0)
    # Edge functions a x + b y + c, one per corner, that vanish on the opposite edge; divided by their value at
    # the corner they are the barycentric weights. Shared edges give the same bits with opposite sign on both
    # sides, so that neighbours neither overlap nor leave gaps.
    following, last = [1, 2, 0], [2, 0, 1]
    a = y[following] - y[last]
    b = x[last] - x[following]
    c = x[following] * y[last] - x[last] * y[following]
    area = c.sum(0)

    top = np.clip(np.ceil(y.min(0) - 0.5), 0, size).astype(np.int64)
    bottom = np.clip(np.ceil(y.max(0) - 0.5), 0, size).astype(np.int64)
    in_view = (bottom > top) & (x.max(0) > 0) & (x.min(0) < size) & (depth.min(0) > 0)
    drawn = np.flatnonzero(in_view & (area != 0))
    sign = np.sign(area[drawn])
    a, b, c = a[:, drawn] * sign, b[:, drawn] * sign, c[:, drawn] * sign
    nearness = 1 / (depth[:, drawn] * np.abs(area[drawn]))

    # Spans: where each row of pixel centres enters and leaves each triangle.
    span_triangle, row = _expand(top[drawn], bottom[drawn])
    slope, height = a[:, span_triangle], b[:, span_triangle] * (row + 0.5) + c[:, span_triangle]
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = -height / slope
    enter = np.where(slope > 0, crossing, -np.inf).max(0)
    leave = np.where(slope < 0, crossing, np.inf).min(0)
    first = np.clip(np.ceil(enter - 0.5), 0, size).astype(np.int64)
    end = np.clip(np.ceil(leave - 0.5), 0, size).astype(np.int64)
    span, column = _expand(first, np.maximum(first, end))

    # 1 / depth is linear on the screen: each span starts at a value and grows by a step.
    step = (a * nearness).sum(0)[span_triangle]
    start = (height * nearness[:, span_triangle]).sum(0) + 0.5 * step
    fragment_nearness = start[span] + step[span] * column

    # The nearest fragment of each pixel: nearness in the high bits, the fragment's triangle in the low ones.
    bits = max(1, len(drawn).bit_length())
    largest = fragment_nearness.max(initial=1e-9)
    key = (fragment_nearness * (2.0 ** (61 - bits) / largest)).astype(np.int64) << bits
    key |= span_triangle[span]
    buffer = np.full(size * size, -1, dtype=np.int64)
    np.maximum.at(buffer, (row * size)[span] + column, key)

    pixel = np.flatnonzero(buffer >= 0)
    local = buffer[pixel] & ((1 << bits) - 1)
    py, px = np.divmod(pixel, size)
    weights = (a[:, local] * (px + 0.5) + b[:, local] * (py + 0.5) + c[:, local]) * nearness[:, local]
    return Raster(size, pixel, drawn[local], (weights / weights.sum(0)).T)


def _expand(first: Array, end: Array) -> tuple[Array, Array]:
    """Ranges [first, end) written out: (owner of each element, element)."""
    count = end - first
    owner = np.repeat(np.arange(len(count)), count)
    offset = np.cumsum(count) - count
    return owner, np.arange(len(owner)) - (offset - first)[owner]


def interpolate(raster: Raster, triangles: Array, values: Array) -> Array:
    """(P, C) per-vertex values (N, C) at the covered pixels."""
    corners = triangles[raster.triangle]
    result = raster.weights[:, :1] * values[corners[:, 0]]
    result += raster.weights[:, 1:2] * values[corners[:, 1]]
    result += raster.weights[:, 2:] * values[corners[:, 2]]
    return result


def to_image(raster: Raster, samples: Array, supersample: int, background: Array | float = 1.0) -> Array:
    """Averages samples (P, 3) over pixels, before a background, to (size, size, 3) uint8."""
    size = raster.size // supersample
    pixel = _coarse_pixel(raster, supersample)
    share = 1 / supersample**2
    cover = np.bincount(pixel, minlength=size * size) * share
    image = np.stack([np.bincount(pixel, samples[:, i], size * size) * share for i in range(3)], axis=-1)
    behind = np.broadcast_to(background, (size, size, 3)).reshape(-1, 3)
    image += (1 - cover)[:, None] * behind
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8).reshape(size, size, 3)


def to_labels(raster: Raster, samples: Array, supersample: int) -> Array:
    """The label that most samples (P,) of a pixel carry, as (size, size) uint8; samples of nothing count as 0."""
    size = raster.size // supersample
    pixel = _coarse_pixel(raster, supersample)
    classes = int(samples.max(initial=0)) + 1
    votes = np.bincount(pixel * classes + samples, minlength=size * size * classes).reshape(-1, classes)
    votes[:, 0] += supersample**2 - np.bincount(pixel, minlength=size * size)
    return votes.argmax(1).astype(np.uint8).reshape(size, size)


def _coarse_pixel(raster: Raster, supersample: int) -> Array:
    row, column = np.divmod(raster.pixel, raster.size)
    return (row // supersample) * (raster.size // supersample) + column // supersample


def vertex_normals(vertices: Array, triangles: Array) -> Array:
    """(N, 3) unit normals: the mean of the adjacent triangles' normals, weighted by area."""
    corners = vertices[triangles]
    faces = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    index = triangles.T.ravel()
    normals = np.stack([np.bincount(index, np.tile(faces[:, i], 3), len(vertices)) for i in range(3)], axis=-1)
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)


def shade(vertices: Array, triangles: Array, colours: Array, light: Light) -> Array:
    """(N, 3) vertex colours under a light: soft Lambert shading with a Blinn-Phong highlight seen along -z."""
    normals = vertex_normals(vertices, triangles)
    direction = np.asarray(light.direction) / np.linalg.norm(light.direction)
    halfway = direction + np.array([0, 0, 1])
    halfway /= max(np.linalg.norm(halfway), 1e-12)  # none for a light straight from behind
    # Wrapped by one half: skin scatters light beyond the terminator, which also hides the mesh's facets.
    diffuse = np.clip((normals @ direction + 0.5) / 1.5, 0, 1)[:, None]
    highlight = light.gloss * np.clip(normals @ halfway, 0, 1)[:, None] ** 24
    return np.clip(colours * (light.ambient + (1 - light.ambient) * diffuse) + highlight, 0, 1)
