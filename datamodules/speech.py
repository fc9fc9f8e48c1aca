"""Talking heads: speech, the mesh that speaks it, and what is known of both."""

import io
import json
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import soundfile
import torch
from safetensors.numpy import load_file
from torch.nn.utils.rnn import pad_sequence

from datamodules.batches import SpeechBatch
from datamodules.datamodule import ShardDataModule


class SpeechDataModule(ShardDataModule):
    """Gives :class:`SpeechBatch`, clips of similar length together; arguments as in :class:`ShardDataModule`."""

    kind: ClassVar[str] = "talking-heads"

    @property
    def fps(self) -> float:
        """Frames per second of the meshes."""
        return self.manifest.fields["fps"]

    @property
    def num_vertices(self) -> int:
        """V of the mesh."""
        return self.manifest.fields["vertices"]

    @property
    def train_subjects(self) -> list[str]:
        """Training subjects in the order of their one-hot codes."""
        return self.manifest.fields["train_subjects"]

    @cached_property
    def templates(self) -> dict[str, torch.Tensor]:
        """Subject -> neutral mesh (V, 3) in metres."""
        stored = load_file(self.manifest.root / "templates.safetensors")
        return {subject: torch.from_numpy(vertices) for subject, vertices in stored.items()}

    @cached_property
    def topology(self) -> dict[str, np.ndarray]:
        """``triangles`` (F, 3) and the vertex indices of each named region."""
        return load_file(self.manifest.root / "topology.safetensors")

    @property
    def regions(self) -> dict[str, np.ndarray]:
        """Region name -> vertex indices."""
        return {name: self.topology[name] for name in self.manifest.fields["regions"]}

    def decode(self, key: str, members: dict[str, bytes]) -> dict[str, Any]:
        """Offsets to vertices, PCM to a float waveform, JSON to labels."""
        labels = json.loads(members["json"])
        template = self.templates[labels["subject"]]
        offsets = torch.from_numpy(np.load(io.BytesIO(members["offsets.npy"]), allow_pickle=False)).float()
        if offsets.shape[1:] != template.shape:
            raise ValueError(f"mesh of {offsets.shape[1]} vertices, expected {len(template)}")
        if not torch.isfinite(offsets).all():
            raise ValueError("vertices are not finite")
        audio, rate = soundfile.read(io.BytesIO(members["wav"]), dtype="float32")
        if rate != self.manifest.fields["sample_rate"] or audio.ndim != 1 or not len(audio):
            raise ValueError(f"audio of shape {audio.shape} at {rate} Hz, expected mono samples")
        weights = np.load(io.BytesIO(members["weights.npy"]), allow_pickle=False)
        return {
            **labels,
            "key": key,
            "template": template,
            "vertices": template + offsets,
            "audio": torch.from_numpy(audio),
            "weights": torch.from_numpy(weights).float(),
        }

    def collate(self, samples: list[dict[str, Any]]) -> SpeechBatch:
        """Pads to the longest clip: meshes by the template, audio and weights by zero."""
        emotions = self.manifest.fields["emotions"]
        number = {subject: i for i, subject in enumerate(self.train_subjects)}
        templates = torch.stack([sample["template"] for sample in samples])
        lengths = torch.tensor([len(sample["vertices"]) for sample in samples])
        vertices = templates[:, None].repeat(1, int(lengths.max()), 1, 1)
        for i, sample in enumerate(samples):
            vertices[i, : lengths[i]] = sample["vertices"]
        return SpeechBatch(
            key=[sample["key"] for sample in samples],
            audio=pad_sequence([sample["audio"] for sample in samples], batch_first=True),
            audio_lengths=torch.tensor([len(sample["audio"]) for sample in samples]),
            vertices=vertices,
            lengths=lengths,
            template=templates,
            subject=[sample["subject"] for sample in samples],
            subject_index=torch.tensor([number.get(sample["subject"], -1) for sample in samples]),
            emotion=torch.tensor([emotions.index(sample["emotion"]) for sample in samples]),
            intensity=torch.tensor([sample["intensity"] for sample in samples]),
            weights=pad_sequence([sample["weights"] for sample in samples], batch_first=True),
            transcript=[sample["transcript"] for sample in samples],
            words=[[(w, s, e) for w, s, e in sample["words"]] for sample in samples],
            phonemes=[[(p, s, e) for p, s, e in sample["phonemes"]] for sample in samples],
        )
