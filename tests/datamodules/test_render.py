import numpy as np
import pytest
from scipy.spatial import ConvexHull, Delaunay

from datamodules.render import Camera, Light, rasterise, render, render_labels, shade, vertex_normals

FAR = Camera(distance=1e6, frame=1.0)  # so far away that the projection is orthographic


def sphere(radius=0.3, count=3000):
    """A Fibonacci sphere, triangulated by its convex hull, oriented outward."""
    i = np.arange(count) + 0.5
    z, turn = 1 - 2 * i / count, np.pi * (1 + 5**0.5) * i
    vertices = np.stack([np.sqrt(1 - z**2) * np.cos(turn), np.sqrt(1 - z**2) * np.sin(turn), z], axis=1) * radius
    faces = ConvexHull(vertices).simplices
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    inward = (np.cross(b - a, c - a) * a).sum(1) < 0
    faces[inward] = faces[inward][:, ::-1]
    return vertices, faces


def first_hit(origin, directions, triangles):
    """Which of the triangles (F, 3, 3) each ray meets first, by solving for the point of intersection; -1 for none."""
    hits = np.full(len(directions), -1)
    for i, direction in enumerate(directions):
        # origin + t direction = a + u (b - a) + v (c - a)
        a, b, c = np.moveaxis(triangles, 1, 0)
        system = np.stack([np.broadcast_to(-direction, a.shape), b - a, c - a], axis=-1)
        t, u, v = np.linalg.solve(system, (origin - a)[..., None])[..., 0].T
        inside = (u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0)
        if inside.any():
            hits[i] = np.where(inside, t, np.inf).argmin()
    return hits


def test_a_triangle_covers_its_area_and_only_its_area():
    vertices = np.array([[-0.4, -0.3, 0], [0.35, -0.2, 0], [0.1, 0.45, 0]])
    triangle = np.array([[0, 1, 2]])
    (ax, ay), (bx, by), (cx, cy) = vertices[:, :2]
    area = abs((bx - ax) * (cy - ay) - (cx - ax) * (by - ay)) / 2
    image = render(vertices, triangle, np.zeros((3, 3)), 256, FAR, background=1.0)
    assert (1 - image / 255.0).mean() == pytest.approx(area, rel=2e-3)
    outside = image[:12]
    assert (outside == 255).all()


@pytest.mark.parametrize("turned", [False, True])
def test_neighbouring_triangles_leave_no_gap_and_do_not_overlap(turned):
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(-0.45, 0.45, (60, 2)), [[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]]])
    triangles = Delaunay(points).simplices
    triangles = triangles[:, ::-1] if turned else triangles
    vertices = np.concatenate([points, np.zeros((len(points), 1))], axis=1)
    projected = FAR.project(vertices, 200)
    whole = rasterise(projected, triangles, 200)
    assert len(whole.pixel) == 200 * 200
    assert sum(len(rasterise(projected, one[None], 200).pixel) for one in triangles) == 200 * 200


def test_a_sphere_has_the_silhouette_and_the_depth_of_a_sphere():
    vertices, faces = sphere()
    raster = rasterise(FAR.project(vertices, 300), faces, 300)
    assert len(raster.pixel) / 300**2 == pytest.approx(np.pi * 0.3**2, rel=5e-3)
    hit = (raster.weights[..., None] * vertices[faces[raster.triangle]]).sum(1)
    assert np.linalg.norm(hit, axis=1) == pytest.approx(0.3, rel=5e-3)
    assert hit[:, 2].min() > -5e-3  # the front, never the back (edges of the polyhedron straddle the outline)


def test_the_nearest_triangle_is_the_one_a_ray_meets_first():
    """Against rays that are intersected one by one, in perspective, with a cluttered scene."""
    rng = np.random.default_rng(1)
    vertices = rng.uniform(-0.2, 0.2, (120, 3))
    faces = np.arange(120).reshape(40, 3)
    camera, size = Camera(distance=0.9, frame=0.5), 24
    raster = rasterise(camera.project(vertices, size), faces, size)
    y, x = np.mgrid[:size, :size].reshape(2, -1) + 0.5
    scale = camera.frame / size
    through = np.stack([(x - size / 2) * scale, (size / 2 - y) * scale, np.zeros(size * size)], axis=1)
    eye = np.array([0, 0, camera.distance])
    first = first_hit(eye, through - eye, vertices[faces])
    ours = np.full(size * size, -1)
    ours[raster.pixel] = raster.triangle
    assert (first >= 0).sum() > 100
    assert (ours == first).mean() > 0.995  # rays exactly through an edge may go either way


def test_colours_are_interpolated_in_perspective():
    """The middle of the screen of a tilted quad is not the middle of the quad: it follows 1 / depth."""
    vertices = np.array([[-0.2, 0, 0.4], [0.2, 0, -0.4], [0, 0.3, 0.0]])
    camera = Camera(distance=1.0, frame=1.0)
    values = np.diag([1.0, 1.0, 1.0])
    raster = rasterise(camera.project(vertices, 400), np.array([[0, 1, 2]]), 400)
    point = raster.weights @ values @ vertices
    x, y = raster.pixel % 400 + 0.5, raster.pixel // 400 + 0.5
    assert camera.project(point, 400)[:, :2] == pytest.approx(np.stack([x, y], 1), abs=1e-6)
    assert raster.weights.min() > -1e-9
    assert raster.weights.sum(1) == pytest.approx(1)


def test_barycentric_colours():
    vertices = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [-0.5, 0.5, 0]])
    image = render(vertices, np.array([[0, 1, 2]]), np.eye(3), 100, FAR, supersample=2)
    # At the pixel centre (x, y) the weights are 1 - s - t, s, t with s = x / 100, t = 1 - y / 100.
    y, x = 79, 19
    s, t = (x + 0.5) / 100, 1 - (y + 0.5) / 100
    assert image[y, x] / 255 == pytest.approx([1 - s - t, s, t], abs=3e-3)


def test_projection_agrees_with_where_things_are_drawn():
    camera = Camera(centre=(0.01, -0.02, 0.03), distance=0.8, frame=0.3)
    vertices, faces = sphere(0.01, 200)
    spot = np.array([0.05, 0.04, 0.02])
    image = render(vertices + spot, faces, np.zeros_like(vertices), 128, camera)
    y, x = np.nonzero(image[..., 0] < 128)
    assert camera.project(spot, 128)[:2] == pytest.approx([x.mean() + 0.5, y.mean() + 0.5], abs=0.6)


def test_labels_are_those_of_the_nearest_triangles():
    square = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
    vertices = np.concatenate([square * 0.4, square * 0.2 + [0, 0, 0.1]])
    triangles = np.array([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]])
    labels = render_labels(vertices, triangles, np.array([3, 3, 7, 7]), 100, FAR)
    assert labels.dtype == np.uint8
    assert (labels == 7).sum() == 40 * 40
    assert (labels == 3).sum() == 80 * 80 - 40 * 40
    assert labels[0, 0] == 0


def test_colours_per_triangle_are_flat_and_can_be_lit():
    square = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]])
    triangles = np.array([[0, 1, 2], [0, 2, 3]])
    colours = np.array([[1.0, 0, 0], [0, 0, 1.0]])
    flat = render(square, triangles, colours, 16, FAR)
    assert flat[12, 14].tolist() == [255, 0, 0]
    assert flat[2, 1].tolist() == [0, 0, 255]
    lit = render(square, triangles, colours, 16, FAR, light=Light((0, 0, -1), ambient=0.4, gloss=0.0))
    assert lit[12, 14].tolist() == [102, 0, 0]  # lit from behind: the ambient share only


def test_normals_of_a_sphere_point_outward_and_light_brightens_the_lit_side():
    vertices, faces = sphere()
    normals = vertex_normals(vertices, faces)
    assert (normals * vertices).sum(1) == pytest.approx(0.3, rel=1e-2)
    lit = shade(vertices, faces, np.full_like(vertices, 0.5), Light((1, 0, 0), ambient=0.2, gloss=0.0))
    assert lit[vertices[:, 0].argmax()] == pytest.approx(0.5, abs=1e-3)
    assert lit[vertices[:, 0].argmin()] == pytest.approx(0.1, abs=1e-3)


def test_nothing_in_view_is_background_only():
    vertices = np.array([[5, 5, 0], [6, 5, 0], [5, 6, 0], [0, 0, 2e6], [1, 0, 2e6], [0, 1, 2e6]])
    image = render(vertices, np.array([[0, 1, 2], [3, 4, 5]]), np.zeros((6, 3)), 16, FAR, background=(0, 0.5, 1))
    assert (image == [0, 128, 255]).all()
