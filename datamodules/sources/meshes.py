"""Mesh files and region files as releases have them."""

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import UserError
from datamodules.sources.layout import open_npy, read_text
from datamodules.sources.pickles import read_pickle


def read_mesh(path: Path) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Vertices and triangles of an ``.obj`` or ``.ply`` file, in the file's order.

    Polygons of more corners are cut into fans. An ``.obj`` is read here, because mesh libraries split its vertices
    along texture seams.

    Returns:
        vertices (V, 3) in the file's unit and triangles (F, 3).

    Raises:
        UserError: no such file, or not a mesh.
    """
    if path.suffix.lower() != ".obj":
        return _read_with_trimesh(path)
    vertices, triangles = [], []
    try:
        for line in read_text(path).splitlines():
            kind, *values = line.split() or [""]
            if kind == "v":
                vertices.append([float(value) for value in values[:3]])
            elif kind == "f":
                corners = [int(value.split("/")[0]) for value in values]
                corners = [corner - 1 if corner > 0 else len(vertices) + corner for corner in corners]
                triangles += [[corners[0], *pair] for pair in pairwise(corners[1:])]
    except ValueError as error:
        raise UserError(f"{path}: not a readable obj file ({error}); export it again") from error
    if not vertices:
        raise UserError(f"{path}: holds no vertices; expected an obj file with lines 'v x y z'")
    return np.array(vertices), np.array(triangles, np.int32).reshape(-1, 3)


def _read_with_trimesh(path: Path) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    import trimesh

    if not path.is_file():
        raise UserError(f"{path}: no such mesh file")
    try:
        mesh = trimesh.load_mesh(path, process=False)
        return np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int32)
    except Exception as error:  # trimesh raises almost anything for a damaged file
        raise UserError(f"{path}: not a readable mesh ({type(error).__name__}: {error}); give a ply or obj") from error


def read_region(name: str, path: Path, vertices: int) -> NDArray[np.int32]:
    """The vertex indices of a region.

    Args:
        name: of the region, for instance ``lips``.
        path: integers separated by commas or spaces, an ``.npy`` of integers, or a pickled dict of regions such as
            ``FLAME_masks.pkl``, which has a key of that name.
        vertices: V of the mesh.

    Returns:
        (N,) int32, ascending, each once.

    Raises:
        UserError: no such file or key, or not indices below ``vertices``.
    """
    if path.suffix == ".pkl":
        regions = read_pickle(path)
        if not isinstance(regions, dict) or name not in regions:
            known = ", ".join(map(str, regions)) if isinstance(regions, dict) else "none"
            raise UserError(f"{path}: no region '{name}'; regions of this file: {known}")
        indices = np.asarray(regions[name])
    elif path.suffix == ".npy":
        indices = open_npy(path)
    else:
        try:
            indices = np.array([int(word) for word in read_text(path).replace(",", " ").split()])
        except ValueError as error:
            raise UserError(f"{path}: region '{name}' is not a list of integers ({error})") from error
    if indices.ndim != 1 or not len(indices) or not np.issubdtype(indices.dtype, np.integer):
        raise UserError(f"{path}: region '{name}' is {indices.dtype} of shape {indices.shape}, expected indices (N,)")
    if indices.min() < 0 or indices.max() >= vertices:
        raise UserError(
            f"{path}: region '{name}' names vertices {indices.min()} to {indices.max()}, but the mesh has {vertices}; "
            "give the region file of this topology"
        )
    return np.unique(indices).astype(np.int32)


def region_hash(indices: NDArray[np.int32]) -> str:
    """SHA-256 of the sorted indices as little-endian int64, the form in which protocols state it."""
    return hashlib.sha256(np.unique(indices).astype("<i8").tobytes()).hexdigest()
