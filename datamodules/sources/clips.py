"""Talking heads from files: checks, samples and shards that every speech source shares.

The layout that FaceFormer made the custom of the field::

    wav/<subject>_<sentence>.wav
    vertices_npy/<subject>_<sentence>.npy     (T, 3 V) or (T, V, 3) floating point
    templates.pkl                             subject -> (V, 3)
    templates/*.ply                           optional: the triangles
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
from numpy.typing import NDArray
from safetensors.numpy import save

from datamodules.audio import SAMPLE_RATE, read_audio
from datamodules.errors import UserError
from datamodules.shards import Manifest, Sample, build_shards, npy_bytes
from datamodules.sources.layout import K, contents_hash, npy_shape, open_npy, shard_jobs
from datamodules.sources.meshes import read_mesh, read_region, region_hash
from datamodules.sources.pickles import read_pickle
from datamodules.words import Word, read_alignment

Precision = Literal["float32", "float16"]
SHARD_BYTES = 256e6
LENGTH_TOLERANCE = 1.0  # seconds between the end of the sound and the end of the mesh; more is another recording


@dataclass(frozen=True)
class ClipFile:
    """One clip as two files.

    Attributes:
        key: the sample's key.
        subject: who speaks.
        vertices: npy, (T, 3 V) or (T, V, 3).
        audio: any sound file.
        step: takes every n-th frame.
        labels: further entries of the sample's ``json``.
    """

    key: str
    subject: str
    vertices: Path
    audio: Path
    step: int = 1
    labels: dict[str, Any] = field(default_factory=dict)

    def check(self, vertices: int, fps: float) -> None:
        """Looks at both headers.

        Args:
            vertices: V of the subject's template.
            fps: frames per second after ``step``.

        Raises:
            UserError: not floating-point vertices of this mesh, no sound, or lengths that do not fit.
        """
        shape = npy_shape(self.vertices)
        if shape[1:] not in ((3 * vertices,), (vertices, 3)) or not shape[0]:
            raise UserError(
                f"{self.vertices}: shape {shape}, expected (T, {3 * vertices}) or (T, {vertices}, 3) as the template "
                f"of subject '{self.subject}'; convert it again or give the template of this mesh"
            )
        check_length(self.audio, -(-shape[0] // self.step), fps, self.vertices)

    def read(self, template: NDArray[np.floating]) -> NDArray[np.float64]:
        """(T, V, 3) vertices, in the file's unit."""
        return np.asarray(open_npy(self.vertices)[:: self.step], np.float64).reshape(-1, *template.shape)


def check_length(audio: Path, frames: int, fps: float, of: Path) -> None:
    """Compares a sound file's duration with a number of frames.

    Raises:
        UserError: no such file, not sound, or more than a second apart.
    """
    if not audio.is_file():
        raise UserError(f"{audio}: no such sound file, but there is {of}; add it or remove both")
    try:
        seconds = soundfile.info(audio).duration
    except soundfile.LibsndfileError as error:
        raise UserError(f"{audio}: not a sound file that can be read ({error}); convert it to wav") from error
    if abs(seconds - frames / fps) > LENGTH_TOLERANCE:
        raise UserError(
            f"{audio}: {seconds:.2f} s of sound, but {of} has {frames} frames, {frames / fps:.2f} s at {fps:g} fps; "
            "expected the same recording"
        )


def read_templates(path: Path) -> dict[str, NDArray[np.float64]]:
    """Subject -> (V, 3) from a pickled dict, in the file's unit.

    Raises:
        UserError: not a dict of meshes, or meshes of several sizes.
    """
    raw = read_pickle(path)
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{path}: holds a {type(raw).__name__}, expected a dict: subject -> template (V, 3)")
    templates = {}
    for subject, mesh in raw.items():
        mesh = np.asarray(mesh)
        if not np.issubdtype(mesh.dtype, np.floating) or mesh.size % 3 or not mesh.size:
            raise UserError(f"{path}: template '{subject}' is {mesh.dtype} of shape {mesh.shape}, expected (V, 3)")
        templates[str(subject)] = mesh.astype(np.float64).reshape(-1, 3)
    sizes = {len(mesh) for mesh in templates.values()}
    if len(sizes) > 1:
        raise UserError(f"{path}: templates of {sorted(sizes)} vertices, expected one topology")
    return templates


def template_of(templates: dict[str, NDArray[np.float64]], subject: str, path: Path) -> NDArray[np.float64]:
    """A subject's template.

    Raises:
        UserError: it has none.
    """
    if subject not in templates:
        raise UserError(f"{path}: no template of subject '{subject}'; templates: {', '.join(templates)}")
    return templates[subject]


def clip_sample(
    key: str,
    audio: NDArray[np.float32],
    subject: str,
    fps: float,
    *,
    vertices: Any = None,
    template: Any = None,
    weights: Any = None,
    labels: dict[str, Any] | None = None,
    precision: str = "float32",
    members: dict[str, bytes] | None = None,
) -> Sample:
    """A sample of kind ``talking-heads``.

    Args:
        key: of the sample.
        audio: (S,) in [-1, 1], mono, 16 kHz; stored with 16 bits.
        subject: who speaks.
        fps: frames per second.
        vertices, template: (T, V, 3) and (V, 3) in the shards' unit; without them the sample has V = 0.
        weights: (T, C) rig controls; without them C = 0.
        labels: further entries of the ``json``; ``transcript``, ``words``, ``phonemes``, ``emotion`` and
            ``intensity`` are empty or null where not given.
        precision: of the offsets.
        members: further members.

    Raises:
        UserError: no frames, or values that are not finite.
    """
    frames = len(weights) if vertices is None else len(vertices)
    offsets = np.zeros((frames, 0, 3)) if vertices is None else vertices - template
    weights = np.zeros((frames, 0)) if weights is None else weights
    if not frames or not np.isfinite(offsets).all() or not np.isfinite(weights).all():
        raise UserError(f"clip '{key}': no frames, or values that are not finite; copy the clip again or remove it")
    everything = {
        "subject": subject,
        "transcript": "",
        "words": [],
        "phonemes": [],
        "emotion": None,
        "intensity": None,
        "fps": fps,
        **(labels or {}),
    }
    encoded = {
        "offsets.npy": npy_bytes(offsets.astype(precision)),
        "wav": wav_bytes(audio),
        "json": json.dumps(everything, ensure_ascii=False).encode(),
        "weights.npy": npy_bytes(weights.astype(np.float32)),
        **(members or {}),
    }
    return Sample(key, frames, encoded)


def spoken(words: list[Word], phonemes: list[Word], transcript: str = "") -> dict[str, Any]:
    """The labels of what is said when; a transcript that is not known is the words."""
    return {
        "transcript": transcript or " ".join(word for word, _, _ in words),
        "words": words,
        "phonemes": phonemes,
    }


def wav_bytes(audio: NDArray[np.float32]) -> bytes:
    """16-bit mono wav at 16 kHz; what was read from 16 bits comes back bit by bit."""
    pcm = np.clip(np.round(audio.astype(np.float64) * 32768), -32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


@dataclass(frozen=True)
class ReadClips:
    """Clip files -> samples, in a process of the build.

    Attributes:
        templates: subject -> (V, 3), in the files' unit.
        fps: frames per second.
        precision: of the offsets.
    """

    templates: dict[str, NDArray[np.float64]]
    fps: float
    precision: str

    def __call__(self, clips: list[ClipFile]) -> Iterator[Sample]:
        """Reads one clip after the other."""
        for clip in clips:
            template = self.templates[clip.subject]
            yield clip_sample(
                clip.key,
                read_audio(clip.audio),
                clip.subject,
                self.fps,
                vertices=clip.read(template),
                template=template,
                labels=clip.labels,
                precision=self.precision,
            )


@dataclass(frozen=True)
class ReadAligned:
    """Planned clips -> samples with the times of their words and phonemes, in a process of the build.

    Attributes:
        make: planned clips -> samples.
        folder: holds ``<key>.TextGrid`` of every clip.
    """

    make: Callable[[list[Any]], Iterable[Sample]]
    folder: Path

    def __call__(self, clips: list[Any]) -> Iterator[Sample]:
        """Reads one clip after the other."""
        for sample in self.make(clips):
            labels = json.loads(sample.members["json"])
            labels |= spoken(*read_alignment(self.folder / f"{sample.key}.TextGrid"), labels["transcript"])
            sample.members["json"] = json.dumps(labels, ensure_ascii=False).encode()
            yield sample

    def files(self, keys: list[str]) -> list[Path]:
        """The files of clips.

        Raises:
            UserError: some have none.
        """
        files = {key: self.folder / f"{key}.TextGrid" for key in keys}
        missing = [key for key, file in files.items() if not file.is_file()]
        if missing:
            raise UserError(
                f"{self.folder}: no {missing[0]}.TextGrid, nor of {len(missing) - 1} other clips of {len(keys)}; align "
                "all of them, or build without --alignments"
            )
        return list(files.values())


def build_clips(
    out: Path,
    splits: dict[str, list[K]],
    make: Callable[[list[K]], Iterable[Sample]],
    *,
    name: str,
    version: int,
    fps: float,
    unit: str,
    topology: str,
    templates: dict[str, NDArray[np.float64]],
    train_subjects: list[str],
    controls: list[str] | None = None,
    emotions: list[str] | None = None,
    fields: dict[str, Any] | None = None,
    regions: dict[str, Path] | None = None,
    mesh: Path | None = None,
    precision: Precision = "float32",
    alignments: Path | None = None,
    sources: Iterable[Path] = (),
    limit: int | None = None,
    in_order: bool = False,
    processes: int | None = None,
) -> Manifest:
    """Builds shards of kind ``talking-heads``.

    Args:
        out: folder to write.
        splits: split -> planned clips.
        make: planned clips -> samples; picklable.
        name: the data set's, as printed on a leaderboard.
        version: of the source; another one makes other shards of the same files.
        fps, unit: of the vertices; ``topology`` is their name.
        templates: subject -> (V, 3) in that unit, ((0, 3) for data of rig controls alone).
        train_subjects: in the order of their one-hot codes.
        controls: names of the rig controls.
        emotions: in the order of their codes.
        fields: further fields of the manifest.
        regions: region name -> file, see :func:`datamodules.sources.meshes.read_region`.
        mesh: a mesh file with the triangles.
        precision: of the offsets; float16 halves the shards.
        alignments: folder with ``<key>.TextGrid`` of every clip; see :func:`datamodules.words.read_alignment`.
        sources: files that the samples are made of and that neither the planned clips nor ``make`` name.
        limit: most clips of each split.
        in_order: see :func:`datamodules.sources.layout.shard_jobs`.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: no clips, files that do not fit the mesh, or what :func:`datamodules.shards.build_shards` refuses.
    """
    if not any(splits.values()):
        raise UserError(f"{name}: no clip of any split was found; point --root at the folder of the official release")
    vertices = len(next(iter(templates.values())))
    triangles = np.zeros((0, 3), np.int32)
    if mesh is not None:
        corners, triangles = read_mesh(mesh)
        if len(corners) != vertices:
            raise UserError(f"{mesh}: a mesh of {len(corners)} vertices, but the data has {vertices}; give another")
    indices = {region: read_region(region, path, vertices) for region, path in (regions or {}).items()}
    described = {
        "fps": fps,
        "sample_rate": SAMPLE_RATE,
        "unit": unit,
        "topology": topology,
        "vertices": vertices,
        "subjects": list(templates),
        "train_subjects": train_subjects,
        "emotions": emotions or [],
        "controls": controls or [],
        "precision": precision,
        "regions": {region: {"count": len(found), "sha256": region_hash(found)} for region, found in indices.items()},
        **(fields or {}),
    }
    files = {
        "templates.safetensors": save({who: mesh.astype(np.float32) for who, mesh in templates.items()}),
        "topology.safetensors": save({"triangles": np.ascontiguousarray(triangles), **indices}),
    }
    taken = {split: clips[:limit] for split, clips in splits.items()}
    sources = list(sources)
    if alignments is not None:
        make = ReadAligned(make, alignments)
        sources += make.files([clip.key for clips in taken.values() for clip in clips])
    contents = contents_hash(taken, make, files, sources)
    plan = {"source": name, "version": version, "fields": described, "contents": contents}
    # A clip has about 130 frames; sound and labels take about 200 kB.
    per_shard = max(1, round(SHARD_BYTES / (130 * 12 * vertices + 200e3)))
    jobs = shard_jobs(splits, make, per_shard, limit, in_order)
    return build_shards(
        out, jobs, kind="talking-heads", name=name, fields=described, files=files, plan=plan, processes=processes
    )
