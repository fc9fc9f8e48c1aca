"""Descriptions of expressions: text prompts with an emotion, rig controls and, where the data has it, a picture."""

import json
from typing import Any, ClassVar

import numpy as np
import torch

from datamodules.batches import PromptBatch
from datamodules.columns import collate_columns, decode_columns
from datamodules.datamodule import ShardDataModule
from datamodules.errors import BadSample
from datamodules.faces import read_png
from datamodules.shards import read_npy


class PromptDataModule(ShardDataModule):
    """Gives :class:`PromptBatch`; arguments as in :class:`ShardDataModule`."""

    kind: ClassVar[str] = "expression-prompts"
    agree: ClassVar[tuple[str, ...]] = ("controls", "emotions", "size")

    @property
    def controls(self) -> list[str]:
        """Names of the columns of ``PromptBatch.weights``."""
        return self.manifest.fields["controls"]

    @property
    def emotions(self) -> list[str]:
        """Names that ``PromptBatch.emotion`` numbers."""
        return self.manifest.fields["emotions"]

    @property
    def size(self) -> int:
        """Height and width of the images in pixels; 0 where the data has none."""
        return self.manifest.fields.get("size", 0)

    def whole(self, split: str) -> PromptBatch:
        """All prompts of a split in one batch, in stored order, on every rank: they are small."""
        count = sum(len(shard.keys) for shard in self.manifest.split(split))
        return next(iter(PromptDataModule(self.root, batch_size=count).loader(split)))

    def decode(self, key: str, members: dict[str, bytes]) -> dict[str, Any]:
        """JSON to labels, arrays to tensors."""
        labels = json.loads(members["json"])
        weights = read_npy(members["weights.npy"])
        if weights.shape != (len(self.controls),) or not np.isfinite(weights).all():
            raise BadSample("wrong rig controls", f"array of shape {weights.shape}, expected ({len(self.controls)},)")
        if labels["emotion"] not in self.emotions:
            raise BadSample("unknown emotion", f"'{labels['emotion']}'")
        pixels = read_png(members["png"], self.size, "RGB") if self.size else np.zeros((0, 0, 3), np.uint8)
        return {
            "key": key,
            "text": labels["text"],
            "emotion": self.emotions.index(labels["emotion"]),
            "weights": torch.from_numpy(weights.astype(np.float32)),
            "image": torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1,
            "captions": labels.get("captions", []),
            "features": decode_columns(self.columns, members),
        }

    def collate(self, samples: list[dict[str, Any]]) -> PromptBatch:
        """Stacks samples."""
        return PromptBatch(
            key=[sample["key"] for sample in samples],
            text=[sample["text"] for sample in samples],
            emotion=torch.tensor([sample["emotion"] for sample in samples]),
            weights=torch.stack([sample["weights"] for sample in samples]),
            image=torch.stack([sample["image"] for sample in samples]),
            captions=[sample["captions"] for sample in samples],
            features=collate_columns(self.columns, [sample["features"] for sample in samples])[0],
        )
