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
from datamodules.columns import collate_columns, decode_columns
from datamodules.datamodule import ShardDataModule
from datamodules.errors import BadSample, UserError
from datamodules.shards import read_npy


class SpeechDataModule(ShardDataModule):
    """Gives :class:`SpeechBatch`, clips of similar length together; arguments as in :class:`ShardDataModule`."""

    kind: ClassVar[str] = "talking-heads"
    agree: ClassVar[tuple[str, ...]] = (
        "fps",
        "sample_rate",
        "unit",
        "topology",
        "vertices",
        "emotions",
        "controls",
        "regions",
    )
    unite: ClassVar[tuple[str, ...]] = ("subjects", "train_subjects")

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
        """Subject -> neutral mesh (V, 3) in metres.

        Raises:
            UserError: two data sets of a mix have different meshes of one name.
        """
        found: dict[str, torch.Tensor] = {}
        for manifest in self.manifests:
            path = manifest.root / "templates.safetensors"
            for subject, vertices in load_file(path).items():
                template = torch.from_numpy(vertices)
                if not torch.equal(found.setdefault(subject, template), template):
                    raise UserError(f"{path}: another mesh of '{subject}' than in the other data; rename the subject")
        return found

    @cached_property
    def topology(self) -> dict[str, np.ndarray]:
        """``triangles`` (F, 3) and the vertex indices of each named region."""
        return load_file(self.manifest.root / "topology.safetensors")

    @property
    def regions(self) -> dict[str, np.ndarray]:
        """Region name -> vertex indices."""
        return {name: self.topology[name] for name in self.manifest.fields["regions"]}

    def region(self, name: str) -> torch.Tensor:
        """Vertex indices of a named region.

        Raises:
            UserError: the data does not name it.
        """
        if name not in self.manifest.fields["regions"]:
            raise UserError(f"{self.root}: no region '{name}'; build the shards with --regions.{name} FILE")
        return torch.as_tensor(self.topology[name])

    def on_after_batch_transfer(self, batch: SpeechBatch, dataloader_idx: int) -> SpeechBatch:
        """Numbers the speakers as the system in training or use does, which may have been trained on others."""
        subjects = getattr(self.trainer and self.trainer.lightning_module, "subjects", self.train_subjects)
        numbers = {name: number for number, name in enumerate(subjects)}
        indices = [numbers.get(name, -1) for name in batch.subject]
        batch.subject_index = torch.tensor(indices, device=batch.subject_index.device)
        return batch

    def decode(self, key: str, members: dict[str, bytes]) -> dict[str, Any]:
        """Offsets to vertices, PCM to a float waveform, JSON to labels."""
        labels = json.loads(members["json"])
        if labels["subject"] not in self.templates:
            raise BadSample("unknown subject", f"'{labels['subject']}'")
        template = self.templates[labels["subject"]]
        offsets = read_npy(members["offsets.npy"])
        if offsets.shape[1:] != template.shape or not len(offsets):
            raise BadSample("wrong topology", f"array of shape {offsets.shape}, expected {len(template)} vertices")
        vertices = torch.from_numpy(offsets.astype(np.float32)) + template
        if not torch.isfinite(vertices).all():
            raise BadSample("vertices are not finite")
        weights = read_npy(members["weights.npy"])
        if weights.ndim != 2 or len(weights) != len(offsets):
            raise BadSample("wrong rig controls", f"array of shape {weights.shape}, clip of {len(offsets)} frames")
        if not np.isfinite(weights).all():
            raise BadSample("rig controls are not finite")
        if labels["emotion"] is not None and labels["emotion"] not in self.manifest.fields["emotions"]:
            raise BadSample("unknown emotion", f"'{labels['emotion']}'")
        pose = read_npy(members["pose.npy"]) if "pose.npy" in members else np.zeros((len(offsets), 3))
        if pose.shape != (len(offsets), 3) or not np.isfinite(pose).all():
            raise BadSample("wrong head pose", f"array of shape {pose.shape}, clip of {len(offsets)} frames")
        features = decode_columns(self.columns, members, len(offsets))
        return {
            **labels,
            "key": key,
            "template": template,
            "vertices": vertices,
            "audio": torch.from_numpy(read_wav(members["wav"], self.manifest.fields["sample_rate"])),
            "weights": torch.from_numpy(weights.astype(np.float32)),
            "pose": torch.from_numpy(pose.astype(np.float32)),
            "features": features,
        }

    def collate(self, samples: list[dict[str, Any]]) -> SpeechBatch:
        """Pads to the longest clip: meshes by the template, audio and weights by zero."""
        emotions = self.manifest.fields["emotions"]
        felt, strengths = ([sample[name] for sample in samples] for name in ("emotion", "intensity"))
        number = {subject: i for i, subject in enumerate(self.train_subjects)}
        templates = torch.stack([sample["template"] for sample in samples])
        lengths = torch.tensor([len(sample["vertices"]) for sample in samples])
        vertices = templates[:, None].repeat(1, int(lengths.max()), 1, 1)
        for i, sample in enumerate(samples):
            vertices[i, : lengths[i]] = sample["vertices"]
        features, feature_lengths = collate_columns(self.columns, [sample["features"] for sample in samples])
        return SpeechBatch(
            key=[sample["key"] for sample in samples],
            audio=pad_sequence([sample["audio"] for sample in samples], batch_first=True),
            audio_lengths=torch.tensor([len(sample["audio"]) for sample in samples]),
            vertices=vertices,
            lengths=lengths,
            template=templates,
            subject=[sample["subject"] for sample in samples],
            subject_index=torch.tensor([number.get(sample["subject"], -1) for sample in samples]),
            emotion=torch.tensor([-1 if each is None else emotions.index(each) for each in felt]),
            intensity=torch.tensor([-1 if each is None else each for each in strengths]),
            weights=pad_sequence([sample["weights"] for sample in samples], batch_first=True),
            transcript=[sample["transcript"] for sample in samples],
            words=[[(w, s, e) for w, s, e in sample["words"]] for sample in samples],
            phonemes=[[(p, s, e) for p, s, e in sample["phonemes"]] for sample in samples],
            pose=pad_sequence([sample["pose"] for sample in samples], batch_first=True),
            features=features,
            feature_lengths=feature_lengths,
        )


def read_wav(contents: bytes, rate: int) -> np.ndarray:
    """Samples (S,) float32 of a mono WAV file.

    Raises:
        BadSample: another format, rate or number of channels, or samples that are not finite.
    """
    # A compressed format could unpack to any size.
    with soundfile.SoundFile(io.BytesIO(contents)) as sound:
        if sound.format not in ("WAV", "WAVEX") or sound.samplerate != rate or sound.channels != 1 or not sound.frames:
            found = f"{sound.format}, {sound.samplerate} Hz, {sound.channels} channels, {sound.frames} samples"
            raise BadSample("wrong audio", f"{found}; expected mono WAV at {rate} Hz")
        samples = sound.read(dtype="float32")
    if not np.isfinite(samples).all():
        raise BadSample("audio is not finite")
    return samples
