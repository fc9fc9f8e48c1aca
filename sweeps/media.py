"""Pictures and videos of predictions: what a person looks at beside the numbers."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import soundfile
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

from datamodules.audio import SAMPLE_RATE
from datamodules.draw import Draw, drawer, png_bytes
from datamodules.faces import FaceDataModule
from datamodules.shards import write_atomic
from datamodules.speech import SpeechDataModule
from trainers.predictions import read_description, read_images, read_vertices

LABEL_HEIGHT = 24
CLIPS = 2  # videos of one run, spread evenly over the split: the same clips for every system
PHOTOS = 8  # strips of one run: the first photos of the split


def write_media(task: str, predictions: Path, root: str, folder: Path) -> dict[str, list[dict[str, str]]]:
    """Makes what the report shows of one run.

    Args:
        task: of the predictions.
        predictions: folder of predictions.
        root: the data that was predicted.
        folder: where to write ``media/``.

    Returns:
        ``videos`` or ``strips`` as in ``Result.media``; files relative to the suite's folder, two above ``folder``.
    """
    title = read_description(predictions)["title"]
    if task == "speech-to-mesh":
        made = write_comparisons(folder / "media", predictions, SpeechDataModule(root, batch_size=1), title)
        kind = "videos"
    else:
        made = write_strips(folder / "media", predictions, FaceDataModule(root, batch_size=PHOTOS), title)
        kind = "strips"
    suite = folder.parents[1]
    return {
        kind: [{"key": key, "file": str(path.relative_to(suite)), "caption": caption} for key, path, caption in made]
    }


def write_comparisons(
    folder: Path, predictions: Path, data: SpeechDataModule, title: str
) -> list[tuple[str, Path, str]]:
    """Videos of a few clips, the truth beside the prediction, with sound: key, path and sentence of each."""
    split = read_description(predictions)["split"]
    keys = [key for shard in data.manifest.split(split) for key in shard.keys]
    wanted = keys[:: -(-len(keys) // CLIPS)]
    made: list[tuple[str, Path, str]] = []
    for batch in data.loader(split):
        key, length = batch.key[0], int(batch.lengths[0])
        if key in wanted:
            tracks = [("ground truth", batch.vertices[0, :length].numpy()), (title, read_vertices(predictions, key))]
            audio = batch.audio[0, : batch.audio_lengths[0]].numpy()
            path = folder / f"talking-{len(made)}.mp4"
            write_video(path, tracks, drawer(data, batch.subject[0], 224), audio, data.fps)
            made.append((key, path, batch.transcript[0]))
    return made


def write_video(
    path: Path, tracks: Sequence[tuple[str, np.ndarray]], draw: Draw, audio: np.ndarray, fps: float
) -> None:
    """Writes an mp4 with sound, its tracks side by side.

    Args:
        path: of the mp4.
        tracks: label and vertices (T, V, 3) of each; the shortest decides the length.
        draw: vertices of one frame -> square image.
        audio: (S,) float32 at 16 kHz.
        fps: frames per second.
    """
    frames = min(len(vertices) for _, vertices in tracks)
    size = len(draw(tracks[0][1][0]))
    labels = np.concatenate([_label(text, size) for text, _ in tracks], axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.tmp.mp4")  # ffmpeg chooses the format by the suffix
    with tempfile.TemporaryDirectory() as temporary:
        sound = Path(temporary) / "sound.wav"
        soundfile.write(sound, audio, SAMPLE_RATE)
        writer = imageio_ffmpeg.write_frames(
            str(partial),
            (labels.shape[1], size + LABEL_HEIGHT),
            fps=fps,
            audio_path=str(sound),
            codec="libx264",
            audio_codec="aac",
            quality=7,
            macro_block_size=2,
            output_params=["-movflags", "+faststart"],
            ffmpeg_log_level="error",
        )
        writer.send(None)
        for t in track(range(frames), description=path.name, transient=True):
            row = np.concatenate([draw(vertices[t]) for _, vertices in tracks], axis=1)
            writer.send(np.ascontiguousarray(np.concatenate([labels, row])))
        writer.close()
    partial.replace(path)


def write_strips(folder: Path, predictions: Path, data: FaceDataModule, title: str) -> list[tuple[str, Path, str]]:
    """PNGs of a few people: photo, inversion, each attribute's edits at rising strength. Key, path, caption of each."""
    description = read_description(predictions)
    batch: dict[str, Any] = next(read_images(predictions))
    photos = next(iter(data.loader(description["split"])))
    strengths = np.linspace(0, len(description["strengths"]) - 1, 4).round().astype(int)[1:]
    names = ["photo", "inversion", *(name if k == 1 else "" for name in description["attributes"] for k in range(3))]
    header = np.concatenate([_label(name, 2 * photos.image.shape[-1]) for name in names], axis=1)
    made = []
    for i, key in enumerate(photos.key[: len(batch["inversion"])]):
        photo = ((photos.image[i].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
        edits = [batch[attribute][s, i] for attribute in description["attributes"] for s in strengths]
        row = np.concatenate([photo, batch["inversion"][i], *edits], axis=1).repeat(2, axis=0).repeat(2, axis=1)
        path = folder / f"edits-{i}.png"
        write_atomic(path, png_bytes(np.concatenate([header, row])))
        made.append((key, path, f"{title}: photo, inversion, then each attribute edited to the opposite"))
    return made


def _label(text: str, width: int) -> np.ndarray:
    """(LABEL_HEIGHT, width, 3) uint8: centred dark text on white, smaller where it would not fit."""
    image = Image.new("RGB", (width, LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    size = next((size for size in range(14, 8, -1) if draw.textlength(text, ImageFont.load_default(size)) < width), 8)
    draw.text((width / 2, LABEL_HEIGHT / 2), text, fill=(40, 40, 45), font=ImageFont.load_default(size), anchor="mm")
    return np.asarray(image)
