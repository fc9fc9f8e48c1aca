"""Face images with attributes, masks, landmarks and captions."""

import io
import json
import math
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from datamodules.batches import FaceBatch
from datamodules.columns import collate_columns, decode_columns
from datamodules.datamodule import ShardDataModule
from datamodules.errors import BadSample


class FaceDataModule(ShardDataModule):
    """Gives :class:`FaceBatch`; arguments as in :class:`ShardDataModule`."""

    kind: ClassVar[str] = "faces"
    agree: ClassVar[tuple[str, ...]] = ("size", "attributes", "mask_classes", "identities")

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
        pixels = read_png(members["png"], self.size, "RGB")
        return {
            "key": key,
            "image": torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1,
            "mask": self._mask(members),
            "attributes": torch.tensor(labels["attributes"], dtype=torch.float32),
            "identity": -1 if labels["identity"] is None else labels["identity"],
            "age": math.nan if labels["age"] is None else labels["age"],
            "landmarks": torch.tensor(labels["landmarks"], dtype=torch.float32).reshape(-1, 2),
            "captions": labels["captions"],
            "features": decode_columns(self.columns, members),
        }

    def _mask(self, members: dict[str, bytes]) -> torch.Tensor:
        if not self.manifest.fields["mask_classes"]:
            return torch.zeros((0, 0), dtype=torch.uint8)
        return torch.from_numpy(read_png(members["mask.png"], self.size, None))

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
            features=collate_columns(self.columns, [sample["features"] for sample in samples])[0],
        )


def read_png(contents: bytes, size: int, mode: str | None) -> np.ndarray:
    """Pixels of a square PNG; its size is looked at before anything is decoded.

    Args:
        contents: the file.
        size: height and width that it must have.
        mode: Pillow's mode to convert to; None for the stored numbers of a one-channel image.

    Raises:
        BadSample: an image of another size or of several channels.
    """
    with Image.open(io.BytesIO(contents), formats=["PNG"]) as image:
        if image.size != (size, size):
            raise BadSample("image of another size", f"{image.width} x {image.height} pixels, expected {size} x {size}")
        if mode is None and image.mode not in ("L", "P"):
            raise BadSample("mask that is no map of indices", f"mode {image.mode}")
        return np.array(image if mode is None else image.convert(mode))
