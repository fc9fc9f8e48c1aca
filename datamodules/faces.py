"""Face images with attributes, masks, landmarks and captions."""

import io
import json
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from datamodules.batches import FaceBatch
from datamodules.datamodule import ShardDataModule


class FaceDataModule(ShardDataModule):
    """Gives :class:`FaceBatch`; arguments as in :class:`ShardDataModule`."""

    kind: ClassVar[str] = "faces"

    @property
    def size(self) -> int:
        """Height and width of the images, pixels."""
        return self.manifest.fields["size"]

    @property
    def attributes(self) -> list[str]:
        """Names of the columns of ``FaceBatch.attributes``."""
        return self.manifest.fields["attributes"]

    def decode(self, key: str, members: dict[str, bytes]) -> dict[str, Any]:
        """PNG to a float image, JSON to labels."""
        labels = json.loads(members["json"])
        pixels = np.array(Image.open(io.BytesIO(members["png"])).convert("RGB"))
        if pixels.shape != (self.size, self.size, 3):
            raise ValueError(f"image of shape {pixels.shape}, expected {self.size} pixels square")
        return {
            "key": key,
            "image": torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1,
            "mask": torch.from_numpy(np.array(Image.open(io.BytesIO(members["mask.png"])))),
            "attributes": torch.tensor(labels["attributes"], dtype=torch.float32),
            "identity": labels["identity"],
            "age": labels["age"],
            "landmarks": torch.tensor(labels["landmarks"], dtype=torch.float32),
            "captions": labels["captions"],
        }

    def collate(self, samples: list[dict[str, Any]]) -> FaceBatch:
        """Stacks samples."""

        def stacked(name: str) -> torch.Tensor:
            return torch.stack([sample[name] for sample in samples])

        return FaceBatch(
            key=[sample["key"] for sample in samples],
            image=stacked("image"),
            attributes=stacked("attributes"),
            identity=torch.tensor([sample["identity"] for sample in samples]),
            age=torch.tensor([sample["age"] for sample in samples], dtype=torch.float32),
            mask=stacked("mask"),
            landmarks=stacked("landmarks"),
            captions=[sample["captions"] for sample in samples],
        )
