"""Any talking heads as files: a folder of sounds, a folder of vertices, and one neutral mesh for each subject.

::

    wav/<name>.wav              any sound that libsndfile reads; <name> is <subject>_<sentence>
    vertices_npy/<name>.npy     (T, 3 V) or (T, V, 3) floating point
    templates.pkl               subject -> (V, 3); or templates/<subject>.npy, .ply or .obj

A CSV may have a row for each name with the columns name, split, subject, transcript, emotion and intensity.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import UserError
from datamodules.shards import Manifest
from datamodules.sources.clips import (
    ClipFile,
    Precision,
    ReadClips,
    build_clips,
    read_templates,
    template_of,
)
from datamodules.sources.layout import need, need_folder, open_npy, read_table, split_of
from datamodules.sources.meshes import read_mesh

VERSION = 1


def build(
    root: Path,
    out: Path,
    fps: float,
    unit: str,
    table: Path | None = None,
    name: str = "meshes",
    topology: str = "own",
    regions: dict[str, Path] | None = None,
    mesh: Path | None = None,
    precision: Precision = "float32",
    alignments: Path | None = None,
    limit: int | None = None,
    processes: int | None = None,
) -> Manifest:
    """Any folder of wav and npy vertices, with templates and an optional CSV.

    The CSV has the column name and, where known, split, subject, transcript, emotion and intensity (0, 1, 2). Without
    it the subject is what stands before the last underscore of a name, and all clips are training clips.

    Example:
        facebench data mesh-folder --root mine --out data/mine --fps 25 --unit metre --table clips.csv

    Args:
        root: folder with wav/, vertices_npy/ and templates.pkl or templates/.
        out: folder to write.
        fps: frames per second of the vertices.
        unit: of the vertices: metre, millimetre or dimensionless.
        table: the CSV.
        name: of the data set, as printed on a leaderboard.
        topology: a name for the mesh, which protocols ask for.
        regions: region name and file of vertex indices: --regions.lips lips.txt
        mesh: ply or obj with the triangles; by default the first mesh file of templates/.
        precision: of the vertices' offsets from the template.
        alignments: folder with a forced aligner's <clip>.TextGrid of every clip, with tiers words and phones.
        limit: most clips of each split.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: files that do not fit each other, or an unknown unit.
    """
    need_folder(root)
    if unit not in ("metre", "millimetre", "dimensionless"):
        raise UserError(f"--unit {unit}: expected metre, millimetre or dimensionless")
    if not 0 < fps < math.inf:
        raise UserError(f"--fps {fps:g}: expected a number of frames per second above 0")
    source = need(root, "templates.pkl", "templates")
    templates = read_templates(source) if source.is_file() else _template_files(source)
    folder = need(root, "vertices_npy")
    rows = read_table(table, ["name"]) if table else [{"name": path.stem} for path in sorted(folder.glob("*.npy"))]
    emotions = list(dict.fromkeys(row["emotion"] for row in rows if row.get("emotion")))
    splits: dict[str, list[ClipFile]] = {}
    for row in rows:
        clip = _plan(root, row, table or folder)
        clip.check(len(template_of(templates, clip.subject, source)), fps)
        splits.setdefault(split_of(row, table or folder), []).append(clip)
    used = {clip.subject: templates[clip.subject] for clips in splits.values() for clip in clips}
    meshes = [path for path in sorted((root / "templates").glob("*")) if path.suffix in (".ply", ".obj")]
    return build_clips(
        out,
        splits,
        ReadClips(used, fps, precision),
        name=name,
        version=VERSION,
        fps=fps,
        unit=unit,
        topology=topology,
        templates=used,
        train_subjects=list(dict.fromkeys(clip.subject for clip in splits.get("train", []))),
        emotions=emotions,
        regions=regions,
        mesh=mesh or next(iter(meshes), None),
        precision=precision,
        alignments=alignments,
        limit=limit,
        processes=processes,
    )


def _template_files(folder: Path) -> dict[str, NDArray[np.float64]]:
    readers: dict[str, Any] = {
        ".npy": lambda path: np.asarray(open_npy(path), np.float64).reshape(-1, 3),
        ".ply": lambda path: read_mesh(path)[0],
        ".obj": lambda path: read_mesh(path)[0],
    }
    files = [path for path in sorted(folder.iterdir()) if path.suffix in readers]
    templates = {path.stem: readers[path.suffix](path) for path in files}
    sizes = {len(mesh) for mesh in templates.values()}
    if len(sizes) != 1:
        raise UserError(f"{folder}: templates of {sorted(sizes) or 'no'} vertices, expected one topology")
    return templates


def _plan(root: Path, row: dict[str, str], path: Path) -> ClipFile:
    name = row["name"]
    subject = row.get("subject") or name.rpartition("_")[0]
    if not subject or "." in name:
        raise UserError(f"{path}: name '{name}', expected <subject>_<sentence> without dots, or a column 'subject'")
    intensity = row.get("intensity") or None
    if intensity is not None and intensity not in ("0", "1", "2"):
        raise UserError(f"{path}: '{name}' has intensity = '{intensity}', expected 0, 1 or 2")
    labels = {
        "transcript": row.get("transcript", ""),
        "emotion": row.get("emotion") or None,
        "intensity": None if intensity is None else int(intensity),
    }
    return ClipFile(name, subject, root / "vertices_npy" / f"{name}.npy", root / "wav" / f"{name}.wav", labels=labels)
