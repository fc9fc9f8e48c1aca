"""BIWI / B3D(AC)2 (Fanelli et al., 2010): 14 subjects x 40 sentences spoken neutrally and with emotion, 25 fps.

Both layouts are read:

* the release: ``faces/<subject>/<NN or eNN>/*.vl`` (uint32 number of vertices, then 3 V float32 a frame),
  ``rigid_scans/<subject>.obj`` (templates and triangles), ``audio/<subject>_<NN or eNN>_cut.wav`` (or without ``_cut``,
  or in ``wav/``);
* FaceFormer's: ``wav/``, ``vertices_npy/`` (T, 3 V), ``templates.pkl``, ``templates/*.ply``, normalised already; names
  ``F2_e01``. FaceXHuBERT's is alike, with names ``F2_01`` to ``F2_80`` and ``templates_scaled.pkl``.

Two preparations are known by name, and their vertices and errors cannot be mixed:

``codetalker``
    (FaceFormer, CodeTalker, ``main_preprocess.m``) the emotional half; every frame is turned by pi about x, less its
    centroid, divided by the square root of its surface area. Six subjects train; test-A (split ``test``) has the same
    six with other sentences, test-B (split ``test_unseen``) the eight others.
``facexhubert``
    (``vertex_process.py``) both halves, the emotional one as sentences 41 to 80; every axis is shifted by the mean and
    divided by the extent of the subject's template. All 14 subjects are in all splits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from datamodules.audio import read_audio
from datamodules.errors import UserError
from datamodules.shards import Manifest, Sample, npy_bytes
from datamodules.sources.affine import Affine
from datamodules.sources.clips import (
    ClipFile,
    Precision,
    ReadClips,
    build_clips,
    check_length,
    clip_sample,
    read_templates,
    template_of,
)
from datamodules.sources.layout import need, need_folder, report_absent
from datamodules.sources.meshes import read_mesh

VERSION = 1
FPS = 25
SEEN = ["F2", "F3", "F4", "M3", "M4", "M5"]
UNSEEN = ["F1", "F5", "F6", "F7", "F8", "M1", "M2", "M6"]
ALL = [f"F{i}" for i in range(1, 9)] + [f"M{i}" for i in range(1, 7)]
EMOTIONS = ["neutral", "emotional"]
HALF = 40  # sentences of each half

Normalisation = Literal["codetalker", "facexhubert", "none"]
Splits = Literal["codetalker", "facexhubert"]
# Sentence -> (1 to 40, emotional or not), as sequences are named in each preparation.
Sequence = tuple[int, bool]


def build(
    root: Path,
    out: Path,
    normalisation: Normalisation = "codetalker",
    splits: Splits = "codetalker",
    regions: dict[str, Path] | None = None,
    mesh: Path | None = None,
    precision: Precision = "float32",
    alignments: Path | None = None,
    limit: int | None = None,
    processes: int | None = None,
) -> Manifest:
    """BIWI / B3D(AC)2, as released or in FaceFormer's or FaceXHuBERT's layout.

    Example:
        facebench data biwi --root BIWI --out data/biwi --normalisation codetalker --regions.lips lve.txt

    Args:
        root: folder with faces/, rigid_scans/ and audio/, or with wav/ and vertices_npy/.
        out: folder to write.
        normalisation: codetalker, facexhubert or none (the unit of the release). For vertices_npy/, which is prepared
            already, it says which preparation that was.
        splits: codetalker (emotional half, six training subjects, an unseen test set) or facexhubert (both halves).
        regions: region name and file of vertex indices: --regions.lips lve.txt --regions.upper_face fdd.txt
        mesh: ply or obj with the triangles; by default the first of templates/*.ply or of rigid_scans/*.obj.
        precision: of the vertices' offsets from the template.
        alignments: folder with a forced aligner's <clip>.TextGrid of every clip, with tiers words and phones.
        limit: most clips of each split.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: neither layout, or files that do not fit each other.
    """
    need_folder(root)
    raw = need(root, "vertices_npy", "faces").name == "faces"
    clips: dict[tuple[str, Sequence], Any]
    if raw:
        given, triangles = _read_scans(root)
        clips, meshes = _plan_release(root, given, splits), sorted((root / "rigid_scans").glob("*.obj"))
    else:
        file = need(root, "templates.pkl", "templates_scaled.pkl")
        given, triangles = read_templates(file), None
        clips, meshes = _plan_folder(root, given, file, splits), sorted((root / "templates").glob("*.ply"))
    wanted = official_splits(splits)
    planned = {
        split: [clips[who, what] for who, what in names if (who, what) in clips] for split, names in wanted.items()
    }
    absent = [_key(*each, splits) for names in wanted.values() for each in names if each not in clips]
    report_absent("BIWI", absent, sum(map(len, wanted.values())), "sequences of the official splits are absent")

    used = {clip.subject: given[clip.subject] for clips_ in planned.values() for clip in clips_}
    maps = subject_maps(normalisation, used) if raw else {}
    templates = {who: _normalise_template(normalisation, maps, who, mesh, triangles) for who, mesh in used.items()}
    make: Any = ReadClips(templates, FPS, precision)
    if triangles is not None:
        make = ReadRelease(templates, normalisation, maps, triangles, precision)
    return build_clips(
        out,
        planned,
        make,
        name="BIWI" if normalisation == "codetalker" else f"BIWI ({normalisation})",
        version=VERSION,
        fps=FPS,
        unit="millimetre" if normalisation == "none" else "dimensionless",
        topology="BIWI",
        templates=templates,
        train_subjects=SEEN if splits == "codetalker" else ALL,
        emotions=EMOTIONS,
        fields={
            "layout": "release" if raw else "prepared",
            "splits": splits,
            "normalisation": _describe(normalisation, raw, maps),
            "absent": absent,
        },
        regions=regions,
        mesh=mesh or next(iter(meshes), None),
        precision=precision,
        alignments=alignments,
        limit=limit,
        processes=processes,
    )


def official_splits(splits: Splits) -> dict[str, list[tuple[str, Sequence]]]:
    """Split -> (subject, (sentence 1 to 40, emotional))."""

    def emotional(subjects: list[str], first: int, last: int) -> list[tuple[str, Sequence]]:
        return [(who, (i, True)) for who in subjects for i in range(first, last + 1)]

    def both(first: int, last: int) -> list[tuple[str, Sequence]]:
        return [(who, (i, felt)) for who in ALL for felt in (False, True) for i in range(first, last + 1)]

    if splits == "codetalker":
        return {
            "train": emotional(SEEN, 1, 32),
            "val": emotional(SEEN, 33, 36),
            "test": emotional(SEEN, 37, 40),
            "test_unseen": emotional(UNSEEN, 37, 40),
        }
    return {"train": both(1, 36), "val": both(37, 38), "test": both(39, 40)}


def _name(sequence: Sequence) -> str:
    return f"{'e' if sequence[1] else ''}{sequence[0]:02d}"


def _key(subject: str, sequence: Sequence, splits: Splits) -> str:
    """FaceXHuBERT's name of a clip, ``F2_41``, or the release's, ``F2_e01``."""
    number, emotional = sequence
    return f"{subject}_{number + HALF * emotional:02d}" if splits == "facexhubert" else f"{subject}_{_name(sequence)}"


def _labels(sequence: Sequence) -> dict[str, Any]:
    return {"sentence": _name(sequence), "emotion": EMOTIONS[sequence[1]], "intensity": 0}


# Normalisations


def subject_maps(normalisation: Normalisation, templates: dict[str, NDArray[np.float64]]) -> dict[str, Affine]:
    """Subject -> FaceXHuBERT's map; empty for normalisations that have none per subject."""
    if normalisation != "facexhubert":
        return {}
    return {who: Affine(mesh.mean(0), mesh.max(0) - mesh.min(0)) for who, mesh in templates.items()}


def codetalker_map(vertices: NDArray[np.floating], triangles: NDArray[np.int32]) -> Affine:
    """CodeTalker's map of each frame.

    The rotation by pi about x is a scale of -1 on y and z. Its area is that of mixed Voronoi cells, whose sum is the
    surface's.

    Args:
        vertices: (T, V, 3).
        triangles: (F, 3).

    Returns:
        centre and scale (T, 1, 3).
    """
    scale = np.sqrt([_surface(frame, triangles) for frame in vertices])[:, None, None] * np.array([1.0, -1.0, -1.0])
    return Affine(vertices.mean(-2, keepdims=True), scale)


def _surface(vertices: NDArray[np.floating], triangles: NDArray[np.int32]) -> float:
    a, b, c = (vertices[triangles[:, corner]] for corner in range(3))
    return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)


def clip_map(members: dict[str, Any], fields: dict[str, Any], subject: str) -> Affine:
    """The map that a clip's vertices went through; its ``invert`` gives the release's millimetres.

    Args:
        members: of the sample, the ``npy`` ones as arrays.
        fields: the manifest's.
        subject: who speaks.

    Raises:
        UserError: vertices that were prepared elsewhere, of which nothing is recorded.
    """
    normalisation = fields["normalisation"]
    if normalisation["per"] == "frame":
        centre, scale = members["normalisation.npy"].astype(np.float64).transpose(1, 0, 2)[:, :, None]
        return Affine(centre, scale)
    if normalisation["per"] == "subject":
        return Affine.described(normalisation["subjects"][subject])
    if normalisation["name"] == "none":
        return Affine(np.zeros(3), np.ones(3))
    raise UserError(f"normalisation '{normalisation['name']}' was applied elsewhere; build from the release to undo it")


def _describe(normalisation: Normalisation, raw: bool, maps: dict[str, Affine]) -> dict[str, Any]:
    if not raw or normalisation == "none":
        return {"name": normalisation, "per": None, "applied": "before" if not raw else "never"}
    if normalisation == "codetalker":
        return {"name": normalisation, "per": "frame", "member": "normalisation.npy"}
    return {"name": normalisation, "per": "subject", "subjects": {who: each.describe() for who, each in maps.items()}}


def _normalise_template(
    normalisation: Normalisation,
    maps: dict[str, Affine],
    subject: str,
    template: NDArray[np.float64],
    triangles: NDArray[np.int32] | None,
) -> NDArray[np.float64]:
    if triangles is None or normalisation == "none":
        return template
    if normalisation == "facexhubert":
        return maps[subject].apply(template)
    return codetalker_map(template[None], triangles).apply(template)[0]


# FaceFormer's and FaceXHuBERT's layout


def _plan_folder(
    root: Path, templates: dict[str, NDArray[np.float64]], file: Path, splits: Splits
) -> dict[tuple[str, Sequence], ClipFile]:
    clips = {}
    for path in sorted((root / "vertices_npy").glob("*.npy")):
        subject, _, sequence = path.stem.rpartition("_")
        what = _parse(sequence, splits)
        clip = ClipFile(path.stem, subject, path, root / "wav" / f"{path.stem}.wav", labels=_labels(what))
        clip.check(len(template_of(templates, subject, file)), FPS)
        clips[subject, what] = clip
    return clips


def _parse(sequence: str, splits: Splits) -> Sequence:
    """``e01`` as FaceFormer names it, or ``41`` as FaceXHuBERT does."""
    felt, digits = sequence.startswith("e"), sequence.removeprefix("e")
    if not digits.isdigit() or (felt and splits == "facexhubert"):
        expected = "F2_01 to F2_80" if splits == "facexhubert" else "F2_e01"
        raise UserError(f"BIWI: sequence '{sequence}' does not fit --splits {splits}, expected names like {expected}")
    number = int(digits)
    return (number - HALF, True) if splits == "facexhubert" and number > HALF else (number, felt)


# The release


@dataclass(frozen=True)
class Sequenced:
    """One clip of the release: its frames and its sound."""

    key: str
    subject: str
    frames: tuple[Path, ...]
    audio: Path
    labels: dict[str, Any] = field(default_factory=dict)


def _read_scans(root: Path) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.int32]]:
    """Templates of all subjects, and the triangles that they share."""
    templates, triangles = {}, None
    for path in sorted(need(root, "rigid_scans").glob("*.obj")):
        templates[path.stem], triangles = read_mesh(path)
    if triangles is None:
        raise UserError(f"{root / 'rigid_scans'}: no .obj file; expected one template for each subject")
    sizes = {who: len(mesh) for who, mesh in templates.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(f"{root / 'rigid_scans'}: templates of several sizes {sizes}, expected one topology")
    return templates, triangles


def _plan_release(
    root: Path, templates: dict[str, NDArray[np.float64]], splits: Splits
) -> dict[tuple[str, Sequence], Sequenced]:
    folder = need(root, "audio", "wav")
    clips = {}
    for names in official_splits(splits).values():
        for who, what in names:
            frames = tuple(sorted((root / "faces" / who / _name(what)).glob("*.vl")))
            if not frames:
                continue
            vertices = len(template_of(templates, who, root / "rigid_scans"))
            read_vl(frames[0], vertices)
            cut = folder / f"{who}_{_name(what)}_cut.wav"
            audio = cut if cut.is_file() else folder / f"{who}_{_name(what)}.wav"
            check_length(audio, len(frames), FPS, frames[0].parent)
            clips[who, what] = Sequenced(_key(who, what, splits), who, frames, audio, _labels(what))
    return clips


def read_vl(path: Path, vertices: int) -> NDArray[np.float32]:
    """One frame of the release, (V, 3) in its unit.

    Raises:
        UserError: another number of vertices, or a file that is too short or too long for its number.
    """
    raw = path.read_bytes()
    count = int.from_bytes(raw[:4], "little")
    if count != vertices or len(raw) != 4 + 12 * vertices:
        raise UserError(
            f"{path}: {count} vertices in {len(raw)} bytes, expected {vertices} in {4 + 12 * vertices} as the template "
            "has; copy it again"
        )
    return np.frombuffer(raw, "<f4", offset=4).reshape(-1, 3)


@dataclass(frozen=True)
class ReadRelease:
    """Frames of the release -> samples, in a process of the build."""

    templates: dict[str, NDArray[np.float64]]
    normalisation: Normalisation
    maps: dict[str, Affine]
    triangles: NDArray[np.int32]
    precision: str

    def __call__(self, clips: list[Sequenced]) -> Iterator[Sample]:
        """Reads one clip after the other."""
        for clip in clips:
            template = self.templates[clip.subject]
            vertices = np.stack([read_vl(path, len(template)) for path in clip.frames]).astype(np.float64)
            members = {}
            if self.normalisation == "codetalker":
                each = codetalker_map(vertices, self.triangles)
                recorded = np.concatenate([each.centre, each.scale], axis=1).astype(np.float32)
                members["normalisation.npy"] = npy_bytes(recorded)
                vertices = each.apply(vertices)
            elif self.normalisation == "facexhubert":
                vertices = self.maps[clip.subject].apply(vertices)
            yield clip_sample(
                clip.key,
                read_audio(clip.audio),
                clip.subject,
                FPS,
                vertices=vertices,
                template=template,
                labels=clip.labels,
                precision=self.precision,
                members=members,
            )
