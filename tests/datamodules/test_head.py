import gzip

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from datamodules.head import Head
from datamodules.pack_head import DELTA_UNIT, members, pack_targets, parse_target, read_obj
from datamodules.render import vertex_normals

HEAD = Head.load()

# Apple, ARFaceAnchor.BlendShapeLocation
PAIRED = "browDown browOuterUp cheekSquint eyeBlink eyeLookDown eyeLookIn eyeLookOut eyeLookUp eyeSquint eyeWide"
PAIRED += " mouthDimple mouthFrown mouthLowerDown mouthPress mouthSmile mouthStretch mouthUpperUp noseSneer"
SINGLE = "browInnerUp cheekPuff jawForward jawLeft jawOpen jawRight mouthClose mouthFunnel mouthLeft mouthPucker"
SINGLE += " mouthRight mouthRollLower mouthRollUpper mouthShrugLower mouthShrugUpper tongueOut"


def units(**weights):
    code = np.zeros(52)
    for name, weight in weights.items():
        code[HEAD.units.index(name)] = weight
    return code


def mirror(vertices):
    """Index of each vertex's counterpart on the other side."""
    distance, index = cKDTree(vertices).query(vertices * [-1, 1, 1])
    assert distance.max() < 1e-3
    return index


def components(edges):
    """(3689,) the number of the connected component that each vertex lies in."""
    graph = coo_array((np.ones(len(edges)), tuple(edges.T)), shape=(HEAD.exterior, HEAD.exterior))
    return connected_components(graph, directed=False)[1]


def test_the_topology_is_that_of_the_documentation():
    assert HEAD.exterior == 3689
    assert HEAD.triangles.shape == (2 * 3646, 3)
    assert np.array_equal(np.unique(HEAD.triangles), np.arange(3689))
    counts = {name: len(HEAD.painted[name]) for name in ("lips", "face", "eyelids", "ears")}
    assert counts == {"lips": 270, "face": 2045, "eyelids": 345, "ears": 629}


def test_units_are_arkits():
    names = [side for name in PAIRED.split() for side in (f"{name}Left", f"{name}Right")] + SINGLE.split()
    assert sorted(names) == HEAD.units
    assert len(names) == 52


def test_the_exterior_is_one_surface_whose_only_holes_are_eyes_mouth_and_neck():
    triangles = HEAD.triangles
    directed = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]])
    forward = {tuple(edge) for edge in directed.tolist()}
    assert len(forward) == len(directed)  # consistently oriented
    assert components(directed).max() == 0
    border = np.array([edge for edge in forward if edge[::-1] not in forward])
    ring = components(border)
    seam = np.isin(np.arange(HEAD.exterior), HEAD.mouth_seam)
    assert np.array_equal(ring == ring[HEAD.mouth_seam[0]], seam)


def test_normals_point_outward():
    face = HEAD.vertices[: HEAD.exterior]
    nose_tip = HEAD.landmarks[30]
    crown = face[:, 1].argmax()
    normals = vertex_normals(face, HEAD.triangles)
    assert normals[nose_tip, 2] > 0.7
    assert normals[crown, 1] > 0.9


def test_identity_puts_the_origin_between_the_eyeballs():
    face = HEAD.identity({"macrodetails/african-male-old": 1.0, "nose/nose-hump-incr": 0.5})
    eyes = np.stack([face[HEAD.part(part)].mean(0) for part in ("eye_left", "eye_right")])
    assert eyes.mean(0) == pytest.approx([0, 0, 0], abs=1e-6)
    assert eyes[0, 0] == pytest.approx(-eyes[1, 0], abs=1e-4)
    assert 0.055 < eyes[0, 0] - eyes[1, 0] < 0.07  # metres: people's eyes are about 63 mm apart
    height = np.ptp(face[: HEAD.exterior, 1])
    assert 0.19 < height < 0.27


def test_identity_is_linear_and_unknown_targets_are_errors():
    target = "nose/nose-volume-incr"
    moved = HEAD.identity({target: 0.5}) - HEAD.identity({})
    assert moved == pytest.approx(0.5 * HEAD.identity_delta(target), abs=1e-6)
    with pytest.raises(KeyError):
        HEAD.identity({"nose/no-such-target": 1.0})


def test_pose_is_linear_and_takes_clips_and_both_meshes():
    neutral = HEAD.identity({"macrodetails/asian-female-young": 1.0})
    assert np.array_equal(HEAD.pose(neutral, np.zeros(52)), neutral)
    code = np.random.default_rng(0).uniform(0, 1, (3, 52))
    clip = HEAD.pose(neutral, code)
    assert clip.shape == (3, *neutral.shape)
    assert clip.dtype == np.float32
    expected = neutral[: HEAD.exterior] + np.einsum("tu,uvc->tvc", code, HEAD.unit_deltas)
    assert clip[:, : HEAD.exterior] == pytest.approx(expected, abs=1e-6)
    assert HEAD.pose(neutral[: HEAD.exterior], code[0]) == pytest.approx(expected[0], abs=1e-6)


def test_units_move_what_they_are_named_after():
    face = HEAD.vertices
    upper, lower = HEAD.inner_lips
    gap = {name: np.zeros(3) for name in ("rest", "open")}
    for name, code in (("rest", units()), ("open", units(jawOpen=1.0))):
        posed = HEAD.pose(face, code)
        gap[name] = posed[upper[len(upper) // 2]] - posed[lower[len(lower) // 2]]
    assert gap["rest"][1] < 0.004
    assert gap["open"][1] > 0.02

    left_corner = HEAD.landmarks[54]
    smile = HEAD.pose(face, units(mouthSmileLeft=1.0))[left_corner] - face[left_corner]
    assert smile[1] > 0.003
    lid = HEAD.landmarks[[43, 44]]
    blink = HEAD.pose(face, units(eyeBlinkLeft=1.0))[lid] - face[lid]
    assert (blink[:, 1] < -0.002).all()


def test_left_is_the_subjects_left():
    deltas = HEAD.unit_deltas[HEAD.units.index("mouthSmileLeft")]
    moved = np.linalg.norm(deltas, axis=1)
    assert HEAD.vertices[: HEAD.exterior][moved > 0.5 * moved.max(), 0].min() > 0


def test_regions_are_symmetric_and_lie_where_they_should():
    face = HEAD.vertices[: HEAD.exterior]
    other = mirror(face)
    for name, region in HEAD.regions.items():
        assert len(region), name
        assert np.array_equal(region, np.unique(region))
        assert len(np.intersect1d(other[region], region)) > 0.97 * len(region), name
    region = HEAD.regions
    assert face[region["forehead"], 1].min() > face[region["jaw"], 1].max()
    assert set(region["lips"]) <= set(region["mouth"])
    assert set(region["chin"]) <= set(region["jaw"])
    assert not set(region["upper_face"]) & set(region["mouth"])
    assert not set(region["scalp"]) & set(region["face"])


def test_inner_lips_run_from_right_to_left_and_meet_in_the_corners():
    face = HEAD.vertices
    upper, lower = HEAD.inner_lips
    for lip in (upper, lower):
        assert (np.diff(face[lip, 0]) > 0).all()
    assert (upper[0], upper[-1]) == (lower[0], lower[-1])
    assert set(upper) | set(lower) == set(HEAD.mouth_seam)
    assert face[upper[1:-1], 1].min() > face[lower[1:-1], 1].max()


def test_landmarks_follow_the_ibug_markup():
    point = HEAD.vertices[HEAD.landmarks]
    x, y, _ = point.T
    assert len(set(HEAD.landmarks)) == 68
    assert HEAD.landmarks.max() < HEAD.exterior
    assert (np.diff(x[:17]) > 0).all()  # jaw, from the subject's right to the left
    assert y[8] == y[:17].min()  # chin
    assert (np.diff(x[17:27]) > 0).all()  # brows
    assert (np.diff(y[27:31]) < 0).all()  # bridge of the nose
    assert x[[27, 28, 29, 30, 33, 8]] == pytest.approx(0, abs=1e-3)
    for upper, lower in ((37, 41), (38, 40), (43, 47), (44, 46), (51, 57), (62, 66)):
        assert y[upper] > y[lower]
        assert abs(x[upper] - x[lower]) < 0.003
    # Every point has its counterpart on the other side.
    pairs = [(0, 16), (3, 13), (8, 8), (17, 26), (21, 22), (31, 35), (36, 45), (39, 42), (48, 54), (60, 64)]
    for right, left in pairs:
        assert point[right] * [-1, 1, 1] == pytest.approx(point[left], abs=4e-3)


# The packer


def test_wavefront_text_is_read():
    text = "# base\nv 0 0 0\nv 1 0 0\nv 1 2 0\nv 0 2 0.5\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\ng body\nf 1/4 2/3 3/2 4/1\n"
    vertices, uv, quads, uv_quads = read_obj(text)
    assert vertices.tolist() == [[0, 0, 0], [1, 0, 0], [1, 2, 0], [0, 2, 0.5]]
    assert uv[2].tolist() == [1, 1]
    assert quads.tolist() == [[0, 1, 2, 3]]
    assert uv_quads.tolist() == [[3, 2, 1, 0]]


def test_targets_keep_their_precision_and_drop_what_was_cut_off():
    text = gzip.decompress(gzip.compress(b"# comment\n3 .1 -.025 0\n5 0 0 1.234\n9 1 1 1\n")).decode()
    index, delta = parse_target(text)
    assert index.tolist() == [3, 5, 9]
    assert delta[1].tolist() == pytest.approx([0, 0, 0.1234])  # decimetres became metres
    new_index = np.full(10, -1)
    new_index[[3, 5]] = [1, 0]
    packed = pack_targets("units", {"jawOpen": (index, delta), "elsewhere": (index[2:], delta[2:])}, new_index)
    assert packed["units_names"].tolist() == ["jawOpen"]
    assert packed["units_starts"].tolist() == [0, 2]
    assert packed["units_index"].tolist() == [1, 0]
    assert packed["units_delta"] * DELTA_UNIT == pytest.approx(np.array([[0.01, -0.0025, 0], [0, 0, 0.1234]]))


def test_group_ranges_are_inclusive():
    assert members({"eye": [[2, 4], [7, 7]]}, "eye").tolist() == [2, 3, 4, 7]
