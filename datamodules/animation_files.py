"""Moving meshes in files that animators open: glTF with morph targets, one OBJ for each frame, ARKit curves as CSV."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pygltflib
from numpy.typing import NDArray

from datamodules.errors import UserError
from datamodules.shards import write_atomic

Floats = NDArray[np.float32]

TOLERANCE = 1e-5  # metres: a hundredth of a millimetre


def write_glb(
    path: Path,
    template: Floats,
    triangles: NDArray[np.integer],
    fps: float,
    targets: dict[str, Floats],
    weights: Floats,
) -> None:
    """Writes a binary glTF 2.0 file: a mesh, its morph targets by name, and their animated weights.

    Args:
        path: ends in .glb.
        template: (V, 3) metres.
        triangles: (F, 3) vertex indices.
        fps: frames per second.
        targets: name -> (V, 3) offsets in metres at weight 1.
        weights: (T, C) weights of the targets, in their order.
    """
    blob = bytearray()
    gltf = pygltflib.GLTF2(asset=pygltflib.Asset(version="2.0", generator="facebench"))

    def accessor(array: NDArray, component: int, kind: str, target: int | None = None) -> int:
        gltf.bufferViews.append(
            pygltflib.BufferView(buffer=0, byteOffset=len(blob), byteLength=array.nbytes, target=target)
        )
        extent = {}
        if kind != "SCALAR" or component == pygltflib.FLOAT:
            extent = {"min": array.min(0, keepdims=array.ndim == 1), "max": array.max(0, keepdims=array.ndim == 1)}
        gltf.accessors.append(
            pygltflib.Accessor(
                bufferView=len(gltf.bufferViews) - 1,
                componentType=component,
                count=len(array),
                type=kind,
                **{name: np.asarray(value).tolist() for name, value in extent.items()},
            )
        )
        blob.extend(array.tobytes())
        return len(gltf.accessors) - 1

    def positions(array: NDArray) -> int:
        return accessor(array.astype("<f4"), pygltflib.FLOAT, pygltflib.VEC3, pygltflib.ARRAY_BUFFER)

    indices = accessor(
        triangles.astype("<u4").ravel(), pygltflib.UNSIGNED_INT, pygltflib.SCALAR, pygltflib.ELEMENT_ARRAY_BUFFER
    )
    primitive = pygltflib.Primitive(
        attributes=pygltflib.Attributes(POSITION=positions(template)),
        indices=indices,
        targets=[{"POSITION": positions(offsets)} for offsets in targets.values()],
    )
    mesh = pygltflib.Mesh(primitives=[primitive], weights=[0.0] * len(targets), extras={"targetNames": list(targets)})
    times = accessor((np.arange(len(weights)) / fps).astype("<f4"), pygltflib.FLOAT, pygltflib.SCALAR)
    curves = accessor(weights.astype("<f4").ravel(), pygltflib.FLOAT, pygltflib.SCALAR)
    gltf.animations.append(
        pygltflib.Animation(
            name="speech",
            samplers=[pygltflib.AnimationSampler(input=times, output=curves, interpolation="LINEAR")],
            channels=[
                pygltflib.AnimationChannel(sampler=0, target=pygltflib.AnimationChannelTarget(node=0, path="weights"))
            ],
        )
    )
    gltf.meshes.append(mesh)
    gltf.nodes.append(pygltflib.Node(mesh=0, name="head"))
    gltf.scenes.append(pygltflib.Scene(nodes=[0]))
    gltf.scene = 0
    gltf.buffers.append(pygltflib.Buffer(byteLength=len(blob)))
    gltf.set_binary_blob(bytes(blob))
    write_atomic(path, b"".join(gltf.save_to_bytes()))


def morph_targets(vertices: Floats, template: Floats) -> tuple[dict[str, Floats], Floats]:
    """Motion as few morph targets: the principal components of the offsets, as many as stay within :data:`TOLERANCE`.

    Args:
        vertices: (T, V, 3) metres.
        template: (V, 3) metres.

    Returns:
        name -> (V, 3) offsets, and their weights (T, C), C at least 1 and at most T.
    """
    offsets = (vertices - template).reshape(len(vertices), -1).astype(np.float64)
    left, singular, right = np.linalg.svd(offsets, full_matrices=False)
    count, left_over = 0, offsets
    while count == 0 or (np.abs(left_over).max() > TOLERANCE and count < len(singular)):
        left_over = left_over - singular[count] * np.outer(left[:, count], right[count])
        count += 1
    # Targets of the size of the largest motion, so that weights lie in [-1, 1].
    scale = np.maximum(np.abs(left[:, :count]).max(0), 1e-12)
    targets = (right[:count] * (singular[:count] * scale)[:, None]).reshape(count, *template.shape)
    names = {f"component{i:03d}": target.astype(np.float32) for i, target in enumerate(targets)}
    return names, (left[:, :count] / scale).astype(np.float32)


def write_obj_frames(folder: Path, vertices: Floats, triangles: NDArray[np.integer]) -> None:
    """Writes ``frame-00000.obj`` ..., one mesh for each frame, all of one topology.

    Args:
        folder: where to.
        vertices: (T, V, 3) metres.
        triangles: (F, 3) vertex indices.
    """
    faces = "".join(f"f {a} {b} {c}\n" for a, b, c in (np.asarray(triangles) + 1).tolist())
    for t, frame in enumerate(vertices.tolist()):
        points = "".join(f"v {x:.6f} {y:.6f} {z:.6f}\n" for x, y, z in frame)
        write_atomic(folder / f"frame-{t:05d}.obj", (points + faces).encode())


def arkit_names(path: Path, controls: Sequence[str]) -> list[str]:
    """Controls in the spelling of Live Link Face.

    Args:
        path: of the file that is to hold them.
        controls: names, in ARKit's spelling or with another first letter.

    Raises:
        UserError: one is not ARKit's.
    """
    names = [control[0].upper() + control[1:] for control in controls]
    for control, name in zip(controls, names, strict=True):
        if name not in ARKIT:
            raise UserError(f"{path}: '{control}' is not one of ARKit's 52 blendshapes; write a .npy instead")
    return names


def write_arkit_csv(
    path: Path, controls: Sequence[str], weights: Floats, fps: float, pose: Floats | None = None
) -> None:
    """Writes curves in the layout of Apple's Live Link Face: one row a frame, one column for each blendshape.

    Args:
        path: ends in .csv.
        controls: C names, in ARKit's spelling or with another first letter; ``EyeBlinkLeft`` and ``eyeBlinkLeft`` are
            the same.
        weights: (T, C); what lies outside [0, 1], the range of a blendshape, is cut.
        fps: frames per second.
        pose: (T, 3) rotation of the head in radians around x, y and z; by default none.

    Raises:
        UserError: the controls are not ARKit's.
    """
    columns = dict(zip(arkit_names(path, controls), np.clip(weights, 0, 1).T, strict=True))
    pitch, yaw, roll = (np.zeros((3, len(weights))) if pose is None else np.asarray(pose).T)[:3]
    columns |= {"HeadYaw": yaw, "HeadPitch": pitch, "HeadRoll": roll}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    # How the eyes turn stands in blendshapes already; their angles stay 0.
    header = [
        *ARKIT,
        *(f"{part}{turn}" for part in ("Head", "LeftEye", "RightEye") for turn in ("Yaw", "Pitch", "Roll")),
    ]
    writer.writerow(["Timecode", "BlendShapeCount", *header])
    for t in range(len(weights)):
        seconds, frame = divmod(t, round(fps))
        stamp = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}:{frame:02d}.000"
        values = [f"{columns[name][t]:.6f}" if name in columns else "0.000000" for name in header]
        writer.writerow([stamp, len(header), *values])
    write_atomic(path, text.getvalue().encode())


ARKIT = [
    *("EyeBlinkLeft", "EyeLookDownLeft", "EyeLookInLeft", "EyeLookOutLeft", "EyeLookUpLeft", "EyeSquintLeft"),
    *("EyeWideLeft", "EyeBlinkRight", "EyeLookDownRight", "EyeLookInRight", "EyeLookOutRight", "EyeLookUpRight"),
    *("EyeSquintRight", "EyeWideRight", "JawForward", "JawRight", "JawLeft", "JawOpen", "MouthClose"),
    *("MouthFunnel", "MouthPucker", "MouthRight", "MouthLeft", "MouthSmileLeft", "MouthSmileRight"),
    *("MouthFrownLeft", "MouthFrownRight", "MouthDimpleLeft", "MouthDimpleRight", "MouthStretchLeft"),
    *("MouthStretchRight", "MouthRollLower", "MouthRollUpper", "MouthShrugLower", "MouthShrugUpper"),
    *("MouthPressLeft", "MouthPressRight", "MouthLowerDownLeft", "MouthLowerDownRight", "MouthUpperUpLeft"),
    *("MouthUpperUpRight", "BrowDownLeft", "BrowDownRight", "BrowInnerUp", "BrowOuterUpLeft", "BrowOuterUpRight"),
    *("CheekPuff", "CheekSquintLeft", "CheekSquintRight", "NoseSneerLeft", "NoseSneerRight", "TongueOut"),
]
"""The 52 blendshapes of ARKit in the order of Live Link Face."""
