"""VOCASET (Cudeiro et al., CVPR 2019): 12 subjects x 40 sentences, FLAME meshes at 60 fps, metres.

Both layouts are read:

* the release: ``data_verts.npy`` (frames, V, 3), ``raw_audio_fixed.pkl`` (subject -> sentence -> audio, sample_rate),
  ``templates.pkl`` and ``subj_seq_to_idx.pkl`` (subject -> sentence -> frame -> row), pickles of Python 2;
* FaceFormer's: ``wav/``, ``vertices_npy/`` (T, 3 V) at 60 fps, ``templates.pkl`` and ``templates/*.ply``.

Splits, subject order and every second frame are those of FaceFormer's ``vocaset/data_loader.py``, which follows VOCA's
``config_parser.py``. Two sentences are missing in the release itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.audio import mono_16khz
from datamodules.errors import UserError
from datamodules.shards import Manifest, Sample
from datamodules.sources.clips import (
    LENGTH_TOLERANCE,
    ClipFile,
    Precision,
    ReadClips,
    build_clips,
    clip_sample,
    read_templates,
    template_of,
)
from datamodules.sources.layout import need, need_folder, open_npy, report_absent
from datamodules.sources.pickles import read_pickle

VERSION = 1
CAPTURE_FPS = 60
RELEASE = ("data_verts.npy", "raw_audio_fixed.pkl", "subj_seq_to_idx.pkl")


def _subjects(*numbers: str) -> list[str]:
    return [f"FaceTalk_{number}_TA" for number in numbers]


# The order is that of the one-hot codes.
SUBJECTS = {
    "train": _subjects(
        "170728_03272",
        "170904_00128",
        "170725_00137",
        "170915_00223",
        "170811_03274",
        "170913_03279",
        "170904_03276",
        "170912_03278",
    ),
    "val": _subjects("170811_03275", "170908_03277"),
    "test": _subjects("170809_00138", "170731_00024"),
}
SENTENCES = {"train": range(1, 41), "val": range(21, 41), "test": range(21, 41)}


def build(
    root: Path,
    out: Path,
    fps: int = 30,
    regions: dict[str, Path] | None = None,
    mesh: Path | None = None,
    precision: Precision = "float32",
    alignments: Path | None = None,
    limit: int | None = None,
    processes: int | None = None,
) -> Manifest:
    """VOCASET, as released or in FaceFormer's layout.

    Example:
        facebench data vocaset --root VOCASET --out data/vocaset --regions.lips lve.txt

    Args:
        root: folder with data_verts.npy and its pickles, or with wav/ and vertices_npy/.
        out: folder to write.
        fps: 30 takes every second frame as FaceFormer and its successors do; 60 takes all, as VOCA does.
        regions: region name and file of vertex indices: --regions.lips lve.txt --regions.upper_face fdd.txt
        mesh: ply or obj with the triangles; by default the first of templates/*.ply.
        precision: of the vertices' offsets from the template.
        alignments: folder with a forced aligner's <clip>.TextGrid of every clip, with tiers words and phones.
        limit: most clips of each split.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: neither layout, or files that do not fit each other.
    """
    need_folder(root)
    if fps not in (30, CAPTURE_FPS):
        raise UserError(f"--fps {fps}: expected 30 or {CAPTURE_FPS}, half or all of the frames that were captured")
    step = CAPTURE_FPS // fps
    raw = need(root, "vertices_npy", "data_verts.npy").is_file()
    templates = read_templates(need(root, "templates.pkl"))
    plan = _plan_release(root, templates, step) if raw else _plan_folder(root, templates, step)
    splits, absent = _split(plan)
    report_absent(
        "VOCASET",
        absent,
        sum(len(clips) for clips in splits.values()) + len(absent),
        "sequences of the official splits are absent",
    )
    used = {subject: template_of(templates, subject, root / "templates.pkl") for subject in _used(splits)}
    make: Any = ReadRelease(root, used, fps, precision) if raw else ReadClips(used, fps, precision)
    return build_clips(
        out,
        splits,
        make,
        name="VOCASET",
        version=VERSION,
        fps=fps,
        unit="metre",
        topology="FLAME",
        templates=used,
        train_subjects=SUBJECTS["train"],
        fields={"layout": "release" if raw else "faceformer", "absent": absent},
        regions=regions,
        mesh=mesh or next(iter(sorted((root / "templates").glob("*.ply"))), None),
        precision=precision,
        alignments=alignments,
        sources=[root / name for name in RELEASE] if raw else [],
        limit=limit,
        processes=processes,
    )


def parse_name(name: str) -> tuple[str, int]:
    """``<subject>_sentenceNN`` -> subject (all before the last underscore) and number (the last two characters)."""
    subject, _, _ = name.rpartition("_")
    if not subject or not name[-2:].isdigit():
        raise UserError(f"VOCASET: sequence '{name}', expected a name like FaceTalk_170728_03272_TA_sentence01")
    return subject, int(name[-2:])


def _split(plan: dict[str, Any]) -> tuple[dict[str, list[Any]], list[str]]:
    """Planned clips by split in official order, and the official sequences that are not there."""
    by_name = {parse_name(name): clip for name, clip in plan.items()}
    splits: dict[str, list[Any]] = {}
    absent = []
    for split, subjects in SUBJECTS.items():
        wanted = [(subject, sentence) for subject in subjects for sentence in SENTENCES[split]]
        splits[split] = [by_name[each] for each in wanted if each in by_name]
        absent += [
            f"{subject}_sentence{sentence:02d}" for subject, sentence in wanted if (subject, sentence) not in by_name
        ]
    return splits, absent


def _used(splits: dict[str, list[Any]]) -> list[str]:
    return list(dict.fromkeys(clip.subject for clips in splits.values() for clip in clips))


# FaceFormer's layout


def _plan_folder(root: Path, templates: dict[str, NDArray[np.float64]], step: int) -> dict[str, ClipFile]:
    clips = {}
    for path in sorted((root / "vertices_npy").glob("*.npy")):
        subject, sentence = parse_name(path.stem)
        clip = ClipFile(path.stem, subject, path, root / "wav" / f"{path.stem}.wav", step, {"sentence": sentence})
        clip.check(len(template_of(templates, subject, root / "templates.pkl")), CAPTURE_FPS / step)
        clips[path.stem] = clip
    return clips


# The release


@dataclass(frozen=True)
class Rows:
    """One clip of the release: which rows of ``data_verts.npy``."""

    key: str
    subject: str
    sequence: str
    rows: tuple[int, ...]


def _plan_release(root: Path, templates: dict[str, NDArray[np.float64]], step: int) -> dict[str, Rows]:
    path = root / "data_verts.npy"
    shape = open_npy(path).shape
    vertices = len(next(iter(templates.values())))
    if shape[1:] != (vertices, 3):
        raise UserError(
            f"{path}: shape {shape}, expected (frames, {vertices}, 3) as the templates have it; copy it again"
        )
    index = read_pickle(need(root, "subj_seq_to_idx.pkl"))
    sounds = read_pickle(need(root, "raw_audio_fixed.pkl"))
    clips = {}
    for subject, sequences in index.items():
        for sequence, frames in sequences.items():
            name = f"{subject}_{sequence}"
            rows = tuple(int(frames[frame]) for frame in sorted(frames))
            if not rows or max(rows) >= shape[0] or min(rows) < 0:
                raise UserError(
                    f"{root / 'subj_seq_to_idx.pkl'}: {name} names rows up to {max(rows, default=-1)}, but {path} has "
                    f"{shape[0]}; copy both again"
                )
            _check_sound(sounds.get(subject, {}).get(sequence), len(rows), name, root / "raw_audio_fixed.pkl")
            clips[name] = Rows(name, subject, sequence, rows[::step])
    return clips


def _check_sound(sound: Any, frames: int, name: str, path: Path) -> None:
    if not isinstance(sound, dict) or not {"audio", "sample_rate"} <= sound.keys():
        raise UserError(f"{path}: no audio and sample_rate of {name}, which has vertices; copy it again")
    seconds = len(sound["audio"]) / sound["sample_rate"]
    if abs(seconds - frames / CAPTURE_FPS) > LENGTH_TOLERANCE:
        raise UserError(
            f"{path}: {seconds:.2f} s of sound for {name}, but {frames} frames, {frames / CAPTURE_FPS:.2f} s; "
            "expected the same recording"
        )


@dataclass(frozen=True)
class ReadRelease:
    """Rows of the release -> samples, in a process of the build."""

    root: Path
    templates: dict[str, NDArray[np.float64]]
    fps: float
    precision: str

    def __call__(self, clips: list[Rows]) -> Iterator[Sample]:
        """Reads one clip after the other; the vertices stay on disk."""
        vertices = open_npy(self.root / "data_verts.npy")
        for clip in clips:
            sound = self._sounds[clip.subject][clip.sequence]
            yield clip_sample(
                clip.key,
                mono_16khz(to_float(np.asarray(sound["audio"])), int(sound["sample_rate"])),
                clip.subject,
                self.fps,
                vertices=np.asarray(vertices[list(clip.rows)], np.float64),
                template=self.templates[clip.subject],
                labels={"sentence": parse_name(clip.key)[1]},
                precision=self.precision,
            )

    @cached_property
    def _sounds(self) -> dict[str, Any]:
        return read_pickle(self.root / "raw_audio_fixed.pkl")


def to_float(samples: NDArray[Any]) -> NDArray[np.float64]:
    """(S,) or (S, channels) samples as a wav file has them -> (S, channels) in [-1, 1]."""
    full = float(-np.iinfo(samples.dtype).min) if np.issubdtype(samples.dtype, np.integer) else 1.0
    return np.asarray(samples, np.float64).reshape(len(samples), -1) / full
