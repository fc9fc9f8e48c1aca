"""Feature columns from backbones: extraction into columns, and which column stands in for a frozen backbone.

A column holds what :func:`trainers.backbones.load` gives for every sample, one sample at a time. A system with a frozen
encoder that finds such a column in its batches reads it instead of computing the same again; it is the same only if the
weights have the same hash and features meet frames in the same way, which :func:`matching_column` holds.
"""

import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.batches import FaceBatch, SpeechBatch
from datamodules.columns import Column, build_column
from datamodules.datamodule import ShardDataModule
from datamodules.errors import UserError
from datamodules.kinds import open_data, read_sample
from datamodules.shards import Shard
from datamodules.stream import ShardReader
from trainers import backbones
from trainers.nets.speech_encoder import Alignment

IMAGES = 32  # of a batch; clips go one by one, so that padding cannot touch them


def extract_speech(network: Any, batch: SpeechBatch, alignment: Alignment) -> list[torch.Tensor]:
    """Hidden states (N, D) of each clip; the classifier's logits follow from the ``native`` ones."""
    states, lengths = network(batch.audio, batch.audio_lengths, alignment, batch.lengths)
    return [clip[:length] for clip, length in zip(states, lengths.tolist(), strict=True)]


def extract_image(network: Any, batch: FaceBatch, alignment: None) -> list[torch.Tensor]:
    """What the network gives for each image."""
    return list(network(batch.image))


def extract_clip_image(network: Any, batch: FaceBatch, alignment: None) -> list[torch.Tensor]:
    """CLIP's embedding of each image."""
    return list(network.encode_image(batch.image))


def extract_transcript(network: Any, batch: SpeechBatch, alignment: None) -> list[torch.Tensor]:
    """CLIP's embedding of what each clip says."""
    return list(network.encode_text(batch.transcript))


# Kind of data -> the kinds of backbone that read it, and how.
EXTRACTORS: dict[str, dict[str, Callable[..., list[torch.Tensor]]]] = {
    "talking-heads": {"speech": extract_speech, "clip": extract_transcript},
    "faces": {
        "identity": extract_image,
        "attributes": extract_image,
        "inverter": extract_image,
        "clip": extract_clip_image,
    },
}


def write_features(
    root: str | Path,
    backbone: str,
    kind: str | None = None,
    alignment: Alignment = "native",
    name: str | None = None,
    precision: str = "float16",
    processes: int | None = None,
) -> Column:
    """Runs a backbone over all samples of a folder of shards and stores the result as a column beside them.

    Args:
        root: the folder.
        backbone: its specification.
        kind: of the backbone; by default ``speech`` for talking heads, and for faces what its file says.
        alignment: how speech features meet frames; see :class:`trainers.nets.speech_encoder.SpeechEncoder`.
        name: of the column; by default the backbone's name, and the alignment.
        precision: ``float16`` or ``float32``, as stored.
        processes: by default one per core, or per graphics card where there is one.

    Raises:
        UserError: a backbone that cannot be had or does not read this kind of data, a sample that cannot be used, or
            another column of that name.
    """
    data = open_data(root)
    if kind is None:
        kind = "speech" if data.kind == "talking-heads" else backbones.kind_of(backbone)
    fitting = EXTRACTORS.get(data.kind, {})
    if kind not in fitting:
        raise UserError(
            f"--backbone {backbone}: of kind '{kind}', but {root} holds {data.kind}, read by kinds {', '.join(fitting)}"
        )
    backbones.load(backbone, kind)  # fails here rather than in a child process when it cannot be had
    aligned = alignment if kind == "speech" else None
    column = Column(
        name=name or "-".join(filter(None, [Path(backbone.partition(":")[2]).stem, aligned])),
        kind=kind,
        backbone=backbone,
        weights=backbones.weight_hash(backbone),
        alignment=aligned,
        fps=data.manifest.fields["fps"] if aligned not in (None, "native") else None,
        dtype=precision,
    )
    cards = torch.cuda.device_count()
    processes = processes or cards or os.cpu_count()
    make = partial(
        _extract, str(root), backbone, kind, aligned, threads=1 if processes and processes > 1 and not cards else None
    )
    return build_column(data.manifest, column, make, processes)


def matching_column(data: ShardDataModule, backbone: str, kind: str, alignment: Alignment | None) -> str | None:
    """Which of the columns that ``data`` gives holds what a frozen backbone would compute.

    Args:
        data: the data module.
        backbone, kind: the system's.
        alignment: that it needs; None for images.

    Returns:
        its name; None where the data gives no column of this kind, so that the system must compute.

    Raises:
        UserError: it gives some, but of other weights or another alignment.
    """
    columns = [column for column in data.columns.values() if column.kind == kind]
    if not columns:
        return None
    weights = backbones.weight_hash(backbone)
    for column in columns:
        if (column.weights, column.alignment) == (weights, alignment):
            return column.name
    found = "; ".join(f"'{c.name}' is of {c.backbone} ({c.weights[:12]}), {c.alignment}" for c in columns)
    raise UserError(
        f"data.columns: {found}, but the system needs {backbone} ({weights[:12]}), {alignment}; make that column with "
        "'facebench data features', or drop this one to compute features anew"
    )


def _extract(
    root: str, backbone: str, kind: str, alignment: Any, shard: Shard, threads: int | None
) -> Iterator[np.ndarray]:
    if threads is not None:  # as many processes as cores: more threads would only get in each other's way
        torch.set_num_threads(threads)
    data, network, device = _opened(root), *_loaded(backbone, kind)
    reader = ShardReader(data.manifest, shard)
    size = 1 if data.kind == "talking-heads" else IMAGES
    for start in range(0, len(shard.keys), size):
        numbers = range(start, min(start + size, len(shard.keys)))
        batch = data.collate([read_sample(data, reader, number) for number in numbers])
        batch = data.transfer_batch_to_device(batch, device, 0)
        with torch.inference_mode():
            arrays = EXTRACTORS[data.kind][kind](network, batch, alignment)
        yield from (array.float().cpu().numpy() for array in arrays)


@cache
def _opened(root: str) -> ShardDataModule:
    return open_data(root)


@cache
def _loaded(backbone: str, kind: str) -> tuple[Any, torch.device]:
    """The network of this process, each on the next graphics card where there are some."""
    cards = torch.cuda.device_count()
    device = torch.device("cuda", os.getpid() % cards) if cards else torch.device("cpu")
    return backbones.load(backbone, kind).to(device), device
