"""The stream against plain readers: samples per second, memory over an epoch, and how long training waits for data.

Every reader does the same with a sample's bytes: our data module's decoding and batching. They differ in how the bytes
are found: (a) a bare ``tarfile`` loop, (b) a webdataset pipeline without a shuffle, (c) ours, shuffled and with
checksums, (d) a map-style DataLoader over the original files. All in this process, from files that the system has
cached. Sources are made in a temporary folder: faces as PNG with their labels, clips of five seconds.
"""

import functools
import gc
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import soundfile
import torch
import webdataset as wds
from PIL import Image
from pytorch_lightning.profilers import SimpleProfiler
from safetensors.numpy import save
from torch.utils.data import DataLoader, Dataset
from webdataset.tariterators import base_plus_ext

from benchmarks.table import Row, growth, median_seconds, run
from datamodules.datamodule import ShardDataModule
from datamodules.faces import FaceDataModule
from datamodules.shards import MANIFEST, Sample, npy_bytes, write_atomic, write_shard
from datamodules.speech import SpeechDataModule
from datamodules.stream import Loader
from trainers.speech.faceformer import FaceFormer

VERTICES, FRAMES, FPS, RATE = 3689, 150, 30, 16_000
SHARDS = 4
EPOCHS = 2  # of the training that is watched


def face_sample(number: int, size: int) -> Sample:
    """Smooth noise, which compresses about as well as a photo."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    pixels = (smooth + rng.integers(-4, 5, smooth.shape)).clip(0, 255).astype(np.uint8)
    labels = {"identity": number, "age": 30.0, "attributes": [0, 1] * 20, "captions": ["a face"] * 2}
    members = {
        "png": png(pixels),
        "mask.png": png((smooth[..., 0] // 64).astype(np.uint8)),
        "json": json.dumps({**labels, "landmarks": rng.uniform(0, size, (68, 2)).round(2).tolist()}).encode(),
    }
    return Sample(f"face{number:06d}", 1, members)


def clip_sample(number: int) -> Sample:
    """Five seconds of noise and a mesh that shakes."""
    rng = np.random.default_rng(number)
    sound = io.BytesIO()
    soundfile.write(sound, rng.uniform(-0.5, 0.5, FRAMES * RATE // FPS), RATE, format="WAV", subtype="PCM_16")
    labels = {"subject": "A", "transcript": "", "words": [], "phonemes": [], "emotion": "neutral", "intensity": 0}
    members = {
        "offsets.npy": npy_bytes(rng.normal(0, 1e-3, (FRAMES, VERTICES, 3)).astype(np.float16)),
        "wav": sound.getvalue(),
        "weights.npy": npy_bytes(np.zeros((FRAMES, 52), np.float16)),
        "json": json.dumps(labels).encode(),
    }
    return Sample(f"clip{number:06d}", FRAMES, members)


def png(pixels: np.ndarray) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def build(folder: Path, kind: str, fields: dict[str, Any], make: Callable[[int], Sample], count: int) -> None:
    """Writes the samples as shards into ``folder/shards`` and as files into ``folder/files``."""
    root, files = folder / "shards", folder / "files"
    root.mkdir(parents=True)
    files.mkdir()
    shards = []
    for s in range(SHARDS):
        samples = [make(number) for number in range(s * count // SHARDS, (s + 1) * count // SHARDS)]
        shards.append(vars(write_shard(root / f"train-{s:06d}.tar", "train", samples)))
        for sample in samples:
            for name, contents in sample.members.items():
                (files / f"{sample.key}.{name}").write_bytes(contents)
    raw = {"schema": 1, "kind": kind, "name": "noise", "fields": fields, "files": {}, "shards": shards}
    write_atomic(root / MANIFEST, json.dumps(raw).encode())


def build_faces(folder: Path, size: int, count: int) -> FaceDataModule:
    """Faces of ``size`` pixels."""
    fields = {"size": size, "attributes": [f"a{i}" for i in range(40)], "mask_classes": ["skin"] * 4}
    build(folder, "faces", fields, functools.partial(face_sample, size=size), count)
    return FaceDataModule(str(folder / "shards"), batch_size=32)


def build_clips(folder: Path, count: int) -> SpeechDataModule:
    """Clips at the size of the demo head."""
    fields = {"fps": FPS, "sample_rate": RATE, "unit": "metre", "topology": "noise", "vertices": VERTICES}
    fields |= {"subjects": ["A"], "train_subjects": ["A"], "emotions": ["neutral"], "controls": [], "regions": ["lips"]}
    build(folder, "talking-heads", fields, clip_sample, count)
    regions = {"triangles": np.array([[0, 1, 2]], np.int32), "lips": np.arange(200, dtype=np.int32)}
    write_atomic(folder / "shards" / "topology.safetensors", save(regions))
    template = np.random.default_rng(0).normal(0, 0.05, (VERTICES, 3)).astype(np.float32)
    write_atomic(folder / "shards" / "templates.safetensors", save({"A": template}))
    return SpeechDataModule(str(folder / "shards"), batch_size=8)


# The four readers: each gives decoded batches of one epoch.


def bare(data: ShardDataModule) -> Iterator[Any]:
    """(a) Python's tarfile, member by member."""

    def samples() -> Iterator[Any]:
        for shard in data.manifest.shards:
            with tarfile.open(data.manifest.root / shard.file) as tar:
                key, members = "", dict[str, bytes]()
                for entry in tar:
                    name, extension = base_plus_ext(entry.name)
                    if name != key and members:
                        yield data.decode(key, members)
                        members = {}
                    key, members[extension] = name, tar.extractfile(entry).read()  # type: ignore[union-attr]
                yield data.decode(key, members)

    return batched(data, samples())


def plain(data: ShardDataModule) -> Iterator[Any]:
    """(b) webdataset's own reader."""
    urls = [str(data.manifest.root / shard.file) for shard in data.manifest.shards]
    stored = wds.WebDataset(urls, shardshuffle=False)
    return batched(data, (data.decode(sample["__key__"], sample) for sample in stored))


def ours(data: ShardDataModule) -> Iterator[Any]:
    """(c) Ours, with a new process's state: nothing of an earlier epoch is kept."""
    return iter(data.train_dataloader())


class Files(Dataset):
    """(d) The original files, one sample at a time."""

    def __init__(self, data: ShardDataModule, folder: Path) -> None:
        self.data, self.folder = data, folder
        self.keys = [key for shard in data.manifest.shards for key in shard.keys]
        self.names = sorted(path.name.split(".", 1)[1] for path in folder.glob(f"{self.keys[0]}.*"))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> Any:
        key = self.keys[number]
        return self.data.decode(key, {name: (self.folder / f"{key}.{name}").read_bytes() for name in self.names})


def map_style(data: ShardDataModule) -> Iterable[Any]:
    """(d) PyTorch's shuffled loader over the files."""
    files = Files(data, data.manifest.root.parent / "files")
    return DataLoader(files, data.batch_size, shuffle=True, collate_fn=data.collate)


def batched(data: ShardDataModule, samples: Iterator[Any]) -> Iterator[Any]:
    """Batches of decoded samples."""
    while batch := list(islice(samples, data.batch_size)):
        yield data.collate(batch)


def readers(case: str, data: ShardDataModule, repeats: int) -> Iterator[Row]:
    """Samples per second of all four."""
    count = sum(len(shard.keys) for shard in data.manifest.shards)

    def consume(reader: Callable[[ShardDataModule], Iterable[Any]]) -> None:
        read = sum(len(batch) for batch in reader(data))
        assert read == count, f"{reader.__name__} read {read} of {count}"

    functions = [functools.partial(consume, reader) for reader in (bare, plain, ours, map_style)]
    a, b, c, d = (count / seconds for seconds in median_seconds(*functions, repeats=repeats))
    unit = "samples/s"
    yield Row(f"{case}: ours (c) / plain webdataset (b)", c, b, c / b, unit, ">= 0.95", c / b >= 0.95)
    yield Row(f"{case}: ours (c) / bare tarfile (a)", c, a, c / a, unit)
    yield Row(f"{case}: ours (c) / original files (d)", c, d, c / d, unit)


def resident_megabytes() -> float:
    """Memory that this process holds now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory(case: str, data: ShardDataModule) -> Row:
    """The most that an epoch's second half holds, against its first, after one epoch to warm up."""
    for _ in ours(data):
        pass
    batches, seen = ours(data), []
    for _ in batches:
        seen.append(resident_megabytes())
    half = len(seen) // 2
    return growth(
        f"{case}: memory, second half / first half of an epoch", max(seen[half:]), max(seen[:half]), 1.02, unit="MB"
    )


class Watch:
    """A loader's deliveries and how long each of them was waited for.

    Attributes:
        waits: seconds of every batch, an epoch after another.
    """

    def __init__(self, deliveries: Callable[[], Iterator[Any]]) -> None:
        self.deliveries = deliveries
        self.waits: list[float] = []

    def __call__(self) -> Iterator[Any]:
        """The deliveries of an epoch."""
        batches = self.deliveries()
        while True:
            start = time.perf_counter()
            got = list(islice(batches, 1))
            self.waits.append(time.perf_counter() - start)
            if not got:
                return
            yield got.pop()  # no name keeps it, so that giving its memory back is not timed as waiting for the next


class WatchedData(SpeechDataModule):
    """Speech data that keeps the time."""

    def train_dataloader(self) -> Loader:
        """The loader of training, watched."""
        loader = super().train_dataloader()
        self.watch = Watch(loader.deliveries)
        loader.deliveries = self.watch  # type: ignore[method-assign]
        return loader


def waiting(data: SpeechDataModule) -> Iterator[Row]:
    """Shares of the time between steps in FaceFormer's training at the size of its demo recipe.

    First the time blocked until a batch is there; then, for comparison, all of Lightning's fetch, in which the
    memory of the batch before is given back too. The first batch of each epoch, when workers start, is left out.
    """
    torch.manual_seed(0)
    system = FaceFormer(VERTICES, ["A"], "demo:speech", train_encoder="none", unit=0.03, lr=1e-3)
    loaded = WatchedData(data.root, batch_size=8, num_workers=1)
    profiler = SimpleProfiler()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        profiler=profiler,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(system, datamodule=loaded)
    fetches = later(profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"])
    steps = later(profiler.recorded_durations["run_training_batch"])
    waits = later(loaded.watch.waits)
    case = "FaceFormer demo training"
    share = waits / (fetches + steps)
    yield Row(f"{case}: waiting / all time (s)", waits, fetches + steps, share, "s", "<= 0.02", share <= 0.02)
    yield Row(f"{case}: fetching / all time (s)", fetches, fetches + steps, fetches / (fetches + steps), "s")


def later(seconds: list[float]) -> float:
    """The sum without the first of each epoch."""
    return sum(each for i, each in enumerate(seconds) if i % (len(seconds) // EPOCHS))


def measure() -> Iterator[Row]:
    """All rows."""
    with tempfile.TemporaryDirectory() as folder:
        for size, count in ((64, 2000), (256, 400)):
            data = build_faces(Path(folder) / f"faces-{size}", size, count)
            case = f"faces of {size} pixels"
            yield from readers(case, data, repeats=5)
            if size == 64:
                yield memory(case, data)
        clips = build_clips(Path(folder) / "clips", 64)
        yield from readers("5-second clips", clips, repeats=5)
        yield memory("5-second clips", clips)
        yield from waiting(clips)


if __name__ == "__main__":
    run("Streaming", measure)
