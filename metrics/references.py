"""Reference statistics: the real side of a comparison of two sets, computed once and kept.

A file is named by everything that decides its contents: the data, which of its images, the extractor's weights and the
resizer. It is written under a temporary name and renamed, so that processes that make the same one at the same time
do no harm, and one that is killed leaves none.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from datamodules.errors import UserError
from metrics.distribution import check_features, mean_and_covariance

SCHEMA = 1


@dataclass(frozen=True)
class ReferenceKey:
    """What decides the statistics.

    Attributes:
        data: SHA-256 of the data's contents.
        split: of the data.
        images: N, the first of the split.
        image_size: side in pixels before the extractor.
        resizer: how images get that size.
        extractor: SHA-256 of the extractor's weights.
    """

    data: str
    split: str
    images: int
    image_size: int
    resizer: str
    extractor: str

    @property
    def sha256(self) -> str:
        """A hash of it all."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Reference:
    """Features of real images, and their first two moments.

    Attributes:
        key: what they were computed from.
        features: (N, d) float32; precision, recall and KID need every image.
        mean: (d,) float64.
        covariance: (d, d) float64, over N - 1.
    """

    key: ReferenceKey
    features: Tensor
    mean: Tensor
    covariance: Tensor

    @classmethod
    def read(cls, path: Path) -> "Reference":
        """Reads a file written by :meth:`write`.

        Raises:
            UserError: there is none, or it is not readable.
        """
        if not path.is_file():
            raise UserError(f"{path}: no such reference statistics; score once with the data to make them")
        try:
            with safe_open(path, framework="pt") as file:
                key = ReferenceKey(**json.loads(file.metadata()["reference"]))
                tensors = {name: file.get_tensor(name) for name in ("features", "mean", "covariance")}
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{path}: not readable reference statistics; delete the file to make them again") from error
        return cls(key, **tensors)

    def write(self, path: Path) -> None:
        """Writes the file atomically."""
        tensors = {"features": self.features, "mean": self.mean, "covariance": self.covariance}
        contents = save(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            metadata={"reference": json.dumps(asdict(self.key), sort_keys=True)},
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid4().hex}.tmp")  # another process may be making the same file
        partial.write_bytes(contents)
        partial.replace(path)

    def check_extractor(self, extractor: str) -> None:
        """Holds that generated images are seen by the network that saw the real ones.

        Args:
            extractor: SHA-256 of the weights that the generated images' features come from.

        Raises:
            UserError: the statistics are another extractor's.
        """
        if extractor != self.key.extractor:
            raise UserError(
                f"reference statistics: made with extractor {self.key.extractor:.12}, but the generated images' "
                f"features come from {extractor:.12}; use the extractor that the protocol names on both sides"
            )


def cached(key: ReferenceKey, extract: Callable[[], Iterable[Tensor]], folder: Path | None = None) -> Reference:
    """The statistics of a key, from the cache or computed and kept.

    Args:
        key: what decides them.
        extract: gives features (B, d) of the real images, batch by batch; called only where the cache has none.
        folder: of the cache, by default :func:`cache_folder`.

    Raises:
        UserError: another number of images than the key says, features that are not finite, or a file in the cache
            that is not readable or says another key than its name.
    """
    path = (folder or cache_folder()) / f"{key.sha256}.safetensors"
    if path.is_file():
        reference = Reference.read(path)
        if reference.key != key:
            raise UserError(f"{path}: holds the statistics of another key than its name; delete the file")
        return reference
    features = torch.cat(list(extract())).float().cpu()
    if len(features) != key.images:
        raise UserError(f"reference statistics: {len(features)} real images, but the protocol says {key.images}")
    check_features(features, "real")
    reference = Reference(key, features, *mean_and_covariance(features))
    reference.write(path)
    return reference


def cache_folder() -> Path:
    """``$FACEBENCH_CACHE/references``, by default under the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FACEBENCH_CACHE") or Path(cache) / "facebench") / "references"
