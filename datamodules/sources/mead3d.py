"""3DMEAD: MEAD (Wang et al., ECCV 2020) as FLAME coefficients, reconstructed by EMOTE, 25 fps; no vertices.

Both layouts are read, each with ProbTalk3D's ``wav/<subject>_<sentence>_<emotion>_<intensity>.wav``:

* EMOTE's: ``EMICA-MEAD_flame2020/<subject>/front/<emotion>/level_<1 to 3>/<sentence>/shape_pose_cam.hdf5`` with the
  data sets ``exp`` (1, T, 100) and ``jaw`` (1, T, 3); needs h5py (the extra ``data``);
* ProbTalk3D's: ``param/<subject>_<sentence>_<emotion>_<intensity>.npy``, (1, T, 403): shape 300, expression 100, jaw 3.

The controls are the first 50 expression coefficients and the jaw's axis-angle. Splits and scaling are those of
ProbTalk3D's ``framework/data/mead.py`` and ``datasets/mead-splits-*``. The shape coefficients are not stored: the
official evaluation sets them to zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
from numpy.typing import NDArray

from datamodules.audio import read_audio
from datamodules.errors import UserError
from datamodules.shards import Manifest, Sample
from datamodules.sources.affine import Affine
from datamodules.sources.clips import LENGTH_TOLERANCE, build_clips, clip_sample
from datamodules.sources.layout import need, need_folder, open_npy, report_absent

VERSION = 1
FPS = 25
EMOTIONS = ["neutral", "happy", "sad", "surprised", "fear", "disgusted", "angry", "contempt"]
LEVELS = ["level_1", "level_2", "level_3"]
SHAPE, EXPRESSION, JAW = 300, 100, 3
USED = 50  # expression coefficients
CONTROLS = [f"exp_{i:02d}" for i in range(USED)] + [f"jaw_{i}" for i in range(JAW)]
SEEN = [f"M{i:03d}" for i in (3, 5, 7, 9, 11, 12, 13, 19, *range(22, 32))]
SEEN += [f"W{i:03d}" for i in (9, 11, 14, 15, 16, 18, 19, 21, 23, 24, 25, 26, 28, 29)]
VAL_SUBJECTS = ["M032", "M033", "M034", "M035", "W033", "W035", "W036"]
TEST_SUBJECTS = ["M037", "M039", "M040", "M041", "M042", "W037", "W038", "W040"]
# Last sentence of train, val and test, for neutral and for emotional clips.
SENTENCES = {True: (32, 36, 40), False: (24, 27, 30)}

Normalisation = Literal["probtalk3d", "none"]
Splits = Literal["stage1", "stage2"]


def build(
    root: Path,
    out: Path,
    normalisation: Normalisation = "probtalk3d",
    splits: Splits = "stage2",
    alignments: Path | None = None,
    limit: int | None = None,
    processes: int | None = None,
) -> Manifest:
    """3DMEAD: FLAME coefficients with emotion and intensity, from EMOTE's hdf5 or ProbTalk3D's npy.

    Clips without sound, or whose sound is of another length, are left out and reported, as in the official loader.

    Example:
        facebench data mead3d --root 3DMEAD --out data/mead3d --splits stage2

    Args:
        root: folder with EMICA-MEAD_flame2020/ or param/, and wav/.
        out: folder to write.
        normalisation: probtalk3d maps expression from [-3, 3] and jaw from [-0.1, 0.5] to [0, 1]; none keeps them.
        splits: stage2 (32 subjects, by sentence) or stage1 (by subject: 32, 7, 8).
        alignments: folder with a forced aligner's <clip>.TextGrid of every clip, with tiers words and phones.
        limit: most clips of each split.
        processes: parallel processes, by default one per core.

    Raises:
        UserError: neither layout, arrays of other shapes, or h5py is not installed.
    """
    need_folder(root)
    sounds = need(root, "wav")
    folder = need(root, "param", "EMICA-MEAD_flame2020")
    clips = _plan_npy(folder) if folder.name == "param" else _plan_hdf5(folder)
    planned: dict[str, list[Coefficients]] = {"train": [], "val": [], "test": []}
    silent = []
    for clip in clips:
        split = split_of(clip.subject, clip.sentence, clip.emotion, splits)
        if split is None:
            continue
        if _fits(sounds / f"{clip.key}.wav", clip.frames()):
            planned[split].append(clip)
        else:
            silent.append(clip.key)
    report_absent("3DMEAD", silent, len(clips), "clips have no sound, or one of another length")
    scale = scaling(normalisation)
    return build_clips(
        out,
        planned,
        ReadCoefficients(scale, sounds),
        name="3DMEAD",
        version=VERSION,
        fps=FPS,
        unit="FLAME coefficients" if normalisation == "none" else "FLAME coefficients in [0, 1]",
        topology="FLAME coefficients",
        templates={clip.subject: np.zeros((0, 3)) for clips in planned.values() for clip in clips},
        train_subjects=SEEN,
        controls=CONTROLS,
        emotions=EMOTIONS,
        fields={
            "layout": folder.name,
            "splits": splits,
            "normalisation": {"name": normalisation, "per": "control", **scale.describe()},
            "without_sound": silent,
        },
        alignments=alignments,
        sources=[sounds / f"{clip.key}.wav" for clips in planned.values() for clip in clips[:limit]],
        limit=limit,
        processes=processes,
    )


def scaling(normalisation: Normalisation) -> Affine:
    """The map of the 53 controls; its ``invert`` gives FLAME's coefficients and radians."""
    if normalisation == "none":
        return Affine(np.zeros(USED + JAW), np.ones(USED + JAW))
    low, high = np.repeat([-3.0, -0.1], [USED, JAW]), np.repeat([3.0, 0.5], [USED, JAW])
    return Affine.min_max(low, high, to=(0, 1))


def split_of(subject: str, sentence: int, emotion: int, splits: Splits) -> str | None:
    """The split of a clip; None for one that is in none.

    Args:
        subject: for instance M003.
        sentence: from 1.
        emotion: index into ``EMOTIONS``.
        splits: of ProbTalk3D's first or second stage.
    """
    if splits == "stage1":
        groups = {"train": SEEN, "val": VAL_SUBJECTS, "test": TEST_SUBJECTS}
        return next((split for split, subjects in groups.items() if subject in subjects), None)
    if subject not in SEEN:
        return None
    last = SENTENCES[emotion == 0]
    return next((split for split, end in zip(("train", "val", "test"), last, strict=True) if sentence <= end), None)


@dataclass(frozen=True)
class Coefficients:
    """One clip: an npy or hdf5 file of coefficients."""

    subject: str
    sentence: int
    emotion: int
    intensity: int
    path: Path

    @property
    def key(self) -> str:
        """ProbTalk3D's name."""
        return f"{self.subject}_{self.sentence:03d}_{self.emotion}_{self.intensity}"

    def frames(self) -> int:
        """T, from the header; checks the shape."""
        if self.path.suffix == ".npy":
            shape = open_npy(self.path).shape
            if len(shape) != 3 or shape[0] != 1 or shape[2] != SHAPE + EXPRESSION + JAW or not shape[1]:
                raise UserError(f"{self.path}: shape {shape}, expected (1, T, 403): shape 300, expression 100, jaw 3")
            return shape[1]
        with _open_hdf5(self.path) as file:
            shapes = {name: file[name].shape if name in file else None for name in ("exp", "jaw")}
        expression, jaw = shapes["exp"], shapes["jaw"]
        if not expression or not jaw or expression[2:] != (EXPRESSION,) or jaw != (1, expression[1], JAW):
            raise UserError(f"{self.path}: data sets {shapes}, expected exp (1, T, 100) and jaw (1, T, 3)")
        return expression[1]

    def read(self) -> NDArray[np.float64]:
        """(T, 53) expression and jaw."""
        if self.path.suffix == ".npy":
            array = np.asarray(open_npy(self.path)[0], np.float64)
            return np.concatenate([array[:, SHAPE : SHAPE + USED], array[:, SHAPE + EXPRESSION :]], axis=1)
        with _open_hdf5(self.path) as file:
            return np.concatenate([file["exp"][0, :, :USED], file["jaw"][0]], axis=1).astype(np.float64)


def _plan_npy(folder: Path) -> list[Coefficients]:
    clips = []
    for path in sorted(folder.glob("*.npy")):
        subject, *numbers = path.stem.split("_")
        if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
            raise UserError(f"{path}: expected a name like M003_001_0_0.npy: subject, sentence, emotion, intensity")
        sentence, emotion, intensity = map(int, numbers)
        if emotion >= len(EMOTIONS) or intensity >= len(LEVELS):
            raise UserError(f"{path}: emotion {emotion} and intensity {intensity}, expected 0 to 7 and 0 to 2")
        clips.append(Coefficients(subject, sentence, emotion, intensity, path))
    return clips


def _plan_hdf5(folder: Path) -> list[Coefficients]:
    clips = []
    for emotion, felt in enumerate(EMOTIONS):
        for intensity, level in enumerate(LEVELS):
            for path in folder.glob(f"*/front/{felt}/{level}/*/shape_pose_cam.hdf5"):
                subject, sentence = path.parts[-6], path.parts[-2]
                if not sentence.isdigit():
                    raise UserError(f"{path.parent}: sentence '{sentence}', expected a number like 001")
                clips.append(Coefficients(subject, int(sentence), emotion, intensity, path))
    return sorted(clips, key=lambda clip: clip.key)


def _open_hdf5(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UserError("mead3d: h5py is not installed; run: pip install 'facebench[data]'") from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path}: not a readable hdf5 file ({error}); copy it again") from error


def _fits(audio: Path, frames: int) -> bool:
    if not audio.is_file():
        return False
    try:
        return abs(soundfile.info(audio).duration - frames / FPS) <= LENGTH_TOLERANCE
    except soundfile.LibsndfileError as error:
        raise UserError(f"{audio}: not a sound file that can be read ({error}); convert it to wav") from error


@dataclass(frozen=True)
class ReadCoefficients:
    """Coefficient files -> samples, in a process of the build."""

    scale: Affine
    sounds: Path

    def __call__(self, clips: list[Coefficients]) -> Iterator[Sample]:
        """Reads one clip after the other."""
        for clip in clips:
            labels = {
                "sentence": clip.sentence,
                "emotion": EMOTIONS[clip.emotion],
                "intensity": clip.intensity,
            }
            weights = self.scale.apply(clip.read())
            audio = read_audio(self.sounds / f"{clip.key}.wav")
            yield clip_sample(clip.key, audio, clip.subject, FPS, weights=weights, labels=labels)
