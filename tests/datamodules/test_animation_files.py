import csv

import numpy as np
import pygltflib
import pytest
import trimesh

from datamodules.animation_files import ARKIT, morph_targets, write_arkit_csv, write_glb, write_obj_frames
from datamodules.errors import UserError
from datamodules.head import Head

TEMPLATE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
TRIANGLES = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]])


def read_accessor(gltf: pygltflib.GLTF2, number: int) -> np.ndarray:
    accessor = gltf.accessors[number]
    view, blob = gltf.bufferViews[accessor.bufferView], gltf.binary_blob()
    raw = blob[view.byteOffset : view.byteOffset + view.byteLength]
    kind = {pygltflib.FLOAT: "<f4", pygltflib.UNSIGNED_INT: "<u4"}[accessor.componentType]
    array = np.frombuffer(raw, kind)
    return array.reshape(accessor.count, -1) if accessor.type == "VEC3" else array


def test_glb_holds_the_motion(tmp_path) -> None:
    rng = np.random.default_rng(0)
    vertices = TEMPLATE + rng.normal(0, 0.01, (7, 4, 3)).astype(np.float32)
    write_glb(tmp_path / "a.glb", TEMPLATE, TRIANGLES, 30, *morph_targets(vertices, TEMPLATE))
    gltf = pygltflib.GLTF2().load(str(tmp_path / "a.glb"))
    (primitive,) = gltf.meshes[0].primitives
    sampler = gltf.animations[0].samplers[0]
    targets = np.stack([read_accessor(gltf, target["POSITION"]) for target in primitive.targets])
    weights = read_accessor(gltf, sampler.output).reshape(7, -1)
    moved = read_accessor(gltf, primitive.attributes.POSITION) + np.tensordot(weights, targets, axes=1)
    np.testing.assert_allclose(moved, vertices, atol=1.1e-5)
    np.testing.assert_allclose(read_accessor(gltf, sampler.input), np.arange(7) / 30, rtol=1e-6)
    assert np.abs(weights).max() <= 1 + 1e-6
    assert gltf.meshes[0].extras["targetNames"][0] == "component000"
    still = trimesh.load(tmp_path / "a.glb", force="mesh", process=False)  # another reader opens it
    np.testing.assert_allclose(still.vertices, TEMPLATE)
    assert np.array_equal(still.faces, TRIANGLES)


def test_motion_of_one_direction_is_one_target() -> None:
    direction = np.zeros((4, 3))
    direction[1] = [0, 0.01, 0]
    vertices = TEMPLATE + np.linspace(0, 1, 50)[:, None, None] * direction
    targets, weights = morph_targets(vertices, TEMPLATE)
    assert len(targets) == 1
    np.testing.assert_allclose(np.abs(next(iter(targets.values()))), direction, atol=1e-7)
    np.testing.assert_allclose(np.abs(weights[:, 0]), np.linspace(0, 1, 50), atol=1e-6)
    assert len(morph_targets(np.stack([TEMPLATE] * 3), TEMPLATE)[0]) == 1


def test_each_frame_is_an_obj(tmp_path) -> None:
    vertices = np.stack([TEMPLATE, 2 * TEMPLATE])
    write_obj_frames(tmp_path / "obj", vertices, TRIANGLES)
    assert sorted(path.name for path in (tmp_path / "obj").iterdir()) == ["frame-00000.obj", "frame-00001.obj"]
    mesh = trimesh.load(tmp_path / "obj" / "frame-00001.obj", process=False)
    np.testing.assert_allclose(mesh.vertices, vertices[1])
    assert np.array_equal(mesh.faces, TRIANGLES)


def test_curves_of_the_demo_head_are_arkits(tmp_path) -> None:
    units = Head.load().units
    assert {unit[0].upper() + unit[1:] for unit in units} == set(ARKIT)
    weights = np.random.default_rng(0).normal(0.5, 0.5, (65, 52)).astype(np.float32)
    pose = np.full((65, 3), [0.1, 0.2, 0.3])
    write_arkit_csv(tmp_path / "a.csv", units, weights, 30, pose)
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 65
    for unit in ("jawOpen", "browInnerUp"):
        column = [float(row[unit[0].upper() + unit[1:]]) for row in rows]
        np.testing.assert_allclose(column, weights[:, units.index(unit)].clip(0, 1), atol=1e-6)
    assert {int(row["BlendShapeCount"]) for row in rows} == {len(rows[0]) - 2} == {61}
    assert rows[64]["Timecode"] == "00:00:02:04.000"
    assert [float(rows[0][name]) for name in ("HeadPitch", "HeadYaw", "HeadRoll")] == [0.1, 0.2, 0.3]
    with pytest.raises(UserError, match="'exp001' is not one of ARKit's 52"):
        write_arkit_csv(tmp_path / "b.csv", ["exp001"], weights[:, :1], 30)
