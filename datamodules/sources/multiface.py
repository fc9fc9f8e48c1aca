"""Multiface (Wuu et al., 2022): 13 people, tracked meshes at 30 fps, millimetres, without head motion.

Both layouts are read:

* the release: ``m--<date>--<time>--<identity>--GHS/tracked_mesh/<segment>/<frame>.bin`` (V x 3 float32, V = 7306) and
  ``audio/<segment>.wav``; the template is the first frame of ``E001_Neutral_Eyes_Open``;
* FaceDiffuser's: ``wav/``, ``vertices_npy/<subject>_<sentence>.npy``, ``templates.pkl``, normalised already.

Only the 50 sentences (``SEN_*``) are used, numbered in alphabetical order as FaceDiffuser's ``preprocess.py`` does:
1 to 40 train, 41 to 45 val, 46 to 50 test; subjects 2, 3, 6, 7, 9 to 13 are seen, the test sentences of the others
make the split ``test_unseen``. FaceDiffuser does not say which identity has which number; here they follow the dates
in the folders' names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from datamodules.audio import read_audio
from datamodules.errors import UserError
from datamodules.shards import Manifest, Sample
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
from datamodules.sources.meshes import read_region

VERSION = 1
FPS = 30
NEUTRAL = "E001_Neutral_Eyes_Open"
SENTENCES = 50
SEEN = [f"{number:02d}" for number in (2, 3, 6, 7, *range(9, 14))]
UNSEEN = [f"{number:02d}" for number in (1, 4, 5, 8)]
LAST = {"train": 40, "val": 45, "test": 50}
# The public identities in the order of their dates; the place is the number.
IDENTITIES = ["002757580", "002539136", "6674443", "6795937", "8870559", "2183941", "002643814"]
IDENTITIES += ["5372021", "7889059", "002914589", "5067077", "002421669", "002645310"]
# FaceDiffuser's minima and maxima of each axis, in millimetres.
LOW, HIGH = (-117.798, -213.735, -177.091), (125.922, 185.79601, 75.365097)

Normalisation = Literal["facediffuser", "metre", "none"]


def build(
    root: Path,
    out: Path,
    normalisation: Normalisation = "facediffuser",
    ignore: Path | None = None,
    regions: dict[str, Path] | None = None,
    mesh: Path | None = None,
    precision: Precision = "float32",
    alignments: Path | None = None,
    limit: int | None = None,
    processes: int | None = None,
) -> Manifest:
    """Multiface, as released or in FaceDiffuser's layout.

    Example:
        facebench data multiface --root multiface --out data/multiface --ignore ignore.txt --mesh face_template.obj

    Args:
        root: folder with one folder m--...--GHS for each identity, or with wav/ and vertices_npy/.
        out: folder to write.
        normalisation: facediffuser maps fixed minima and maxima of each axis to [-1, 1], metre divides by 1000, none
            keeps millimetres. For vertices_npy/, which is prepared already, it says which preparation that was.
        ignore: file of vertex indices to drop, such as MeshTalk's, which leaves 6172 of 7306.
        regions: region name and file of vertex indices: --regions.lips lve.txt --regions.upper_face fdd.txt
        mesh: ply or obj with the triangles.
        precision: of the vertices' offsets from the template.
        alignments: folder with a forced aligner's <clip>.TextGrid of every clip, with tiers words and phones.
        limit: most clips of each split.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: neither layout, or files that do not fit each other.
    """
    need_folder(root)
    raw = not (root / "vertices_npy").is_dir()
    scale = scaling(normalisation)
    clips: dict[tuple[str, int], Any]
    if raw:
        clips, given, kept = _plan_release(root, ignore)
        given = {who: scale.apply(template) for who, template in given.items()}
    else:
        given = {_number(who, root): each for who, each in read_templates(need(root, "templates.pkl")).items()}
        clips = _plan_folder(root, given)
    planned: dict[str, list[Any]] = {}
    wanted = {split: [(who, i) for who in SEEN for i in _sentences(split)] for split in LAST}
    wanted["test_unseen"] = [(who, i) for who in UNSEEN for i in _sentences("test")]
    for split, names in wanted.items():
        planned[split] = [clips[each] for each in names if each in clips]
    absent = [f"{who}_{i:02d}" for names in wanted.values() for who, i in names if (who, i) not in clips]
    report_absent("Multiface", absent, sum(map(len, wanted.values())), "sentences of the official splits are absent")
    used = {clip.subject: given[clip.subject] for clips_ in planned.values() for clip in clips_}
    make: Any = ReadRelease(used, scale, kept, precision) if raw else ReadClips(used, FPS, precision)
    return build_clips(
        out,
        planned,
        make,
        name="Multiface" if normalisation == "facediffuser" else f"Multiface ({normalisation})",
        version=VERSION,
        fps=FPS,
        unit={"facediffuser": "dimensionless", "metre": "metre", "none": "millimetre"}[normalisation],
        topology="Multiface",
        templates=used,
        train_subjects=SEEN,
        fields={
            "layout": "release" if raw else "prepared",
            "normalisation": {
                "name": normalisation,
                "per": "axis",
                "applied": "here" if raw else "before",
                **scale.describe(),
            },
            "absent": absent,
        },
        regions=regions,
        mesh=mesh,
        precision=precision,
        alignments=alignments,
        limit=limit,
        processes=processes,
    )


def scaling(normalisation: Normalisation) -> Affine:
    """The map of vertices; its ``invert`` gives millimetres."""
    if normalisation == "facediffuser":
        return Affine.min_max(LOW, HIGH, to=(-1, 1))
    return Affine(np.zeros(3), np.full(3, 1000.0 if normalisation == "metre" else 1.0))


def _sentences(split: str) -> range:
    first = {"train": 0, "val": LAST["train"], "test": LAST["val"]}[split]
    return range(first + 1, LAST[split] + 1)


# FaceDiffuser's layout


def _plan_folder(root: Path, templates: dict[str, NDArray[np.float64]]) -> dict[tuple[str, int], ClipFile]:
    clips = {}
    for path in sorted((root / "vertices_npy").glob("*.npy")):
        who, _, sentence = path.stem.partition("_")
        if not sentence.isdigit():
            raise UserError(f"{path}: expected a name like 02_01.npy: subject and sentence")
        subject, number = _number(who, path), int(sentence)
        labels = {"sentence": number}
        clip = ClipFile(path.stem, subject, path, root / "wav" / f"{path.stem}.wav", labels=labels)
        clip.check(len(template_of(templates, subject, root / "templates.pkl")), FPS)
        clips[subject, number] = clip
    return clips


def _number(subject: str, path: Path) -> str:
    if not subject.isdigit():
        raise UserError(f"{path}: subject '{subject}', expected FaceDiffuser's numbers 1 to 13")
    return f"{int(subject):02d}"


# The release


@dataclass(frozen=True)
class Sequenced:
    """One sentence of the release: its frames and its sound."""

    key: str
    subject: str
    segment: str
    frames: tuple[Path, ...]
    audio: Path


def _plan_release(
    root: Path, ignore: Path | None
) -> tuple[dict[tuple[str, int], Sequenced], dict[str, NDArray[np.float64]], NDArray[np.int64]]:
    """Sentences, templates in millimetres, and the vertices that are kept."""
    folders = {}
    for folder in sorted(root.glob("m--*--GHS")):
        identity = folder.name.split("--")[-2]
        if identity not in IDENTITIES:
            raise UserError(f"{folder}: identity '{identity}', expected one of {', '.join(IDENTITIES)}")
        folders[f"{IDENTITIES.index(identity) + 1:02d}"] = folder
    if not folders:
        raise UserError(f"{root}: holds no m--*--GHS and no vertices_npy; point --root at the folder of Multiface")
    names = {path.name for folder in folders.values() for path in need(folder, "tracked_mesh").glob("SEN_*")}
    if len(names) != SENTENCES:
        raise UserError(f"{root}: {len(names)} different SEN_ segments, expected {SENTENCES}, which their numbers need")
    # An underscore sorts behind the letters, as in FaceDiffuser's list.
    number = {name: i for i, name in enumerate(sorted(names, key=str.upper), start=1)}

    neutral = {}
    for who, folder in folders.items():
        first = min(need(folder, f"tracked_mesh/{NEUTRAL}").glob("*.bin"), default=None)
        if first is None:
            raise UserError(f"{folder / 'tracked_mesh' / NEUTRAL}: no .bin file; its first frame is the template")
        neutral[who] = read_bin(first)
    count = len(next(iter(neutral.values())))
    kept = np.arange(count)
    if ignore is not None:
        kept = np.setdiff1d(kept, read_region("ignore", ignore, count))
    clips = {}
    for who, folder in folders.items():
        for segment in sorted((folder / "tracked_mesh").glob("SEN_*")):
            frames = tuple(sorted(segment.glob("*.bin")))
            if not frames:
                continue
            read_bin(frames[0], count)
            audio = folder / "audio" / f"{segment.name}.wav"
            check_length(audio, len(frames), FPS, segment)
            key = f"{who}_{number[segment.name]:02d}"
            clips[who, number[segment.name]] = Sequenced(key, who, segment.name, frames, audio)
    return clips, {who: mesh[kept].astype(np.float64) for who, mesh in neutral.items()}, kept


def read_bin(path: Path, vertices: int | None = None) -> NDArray[np.float32]:
    """One frame of the release, (V, 3) in millimetres.

    Raises:
        UserError: not whole vertices, or another number of them.
    """
    values = np.fromfile(path, "<f4")
    if not len(values) or len(values) % 3 or (vertices is not None and len(values) != 3 * vertices):
        expected = f"{3 * vertices}" if vertices is not None else "three for each vertex"
        raise UserError(f"{path}: {len(values)} float32 numbers, expected {expected}; copy it again")
    return values.reshape(-1, 3)


@dataclass(frozen=True)
class ReadRelease:
    """Frames of the release -> samples, in a process of the build."""

    templates: dict[str, NDArray[np.float64]]
    scale: Affine
    kept: NDArray[np.int64]
    precision: str

    def __call__(self, clips: list[Sequenced]) -> Iterator[Sample]:
        """Reads one clip after the other."""
        for clip in clips:
            count = len(read_bin(clip.frames[0]))
            vertices = np.stack([read_bin(path, count)[self.kept] for path in clip.frames])
            yield clip_sample(
                clip.key,
                read_audio(clip.audio),
                clip.subject,
                FPS,
                vertices=self.scale.apply(vertices),
                template=self.templates[clip.subject],
                labels={"sentence": clip.segment},
                precision=self.precision,
            )
