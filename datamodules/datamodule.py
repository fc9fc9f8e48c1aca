"""What the data modules of all tasks share: the manifest, the splits and their loaders."""

from abc import abstractmethod
from typing import Any, ClassVar

import pytorch_lightning as pl

from datamodules.errors import UserError
from datamodules.shards import Manifest
from datamodules.stream import BatchPlan, Loader, ShardDataset


class ShardDataModule(pl.LightningDataModule):
    """Streams a folder of shards.

    Args:
        root: the folder, as written by ``facebench data``.
        batch_size: samples in a batch of each rank.
        num_workers: processes that read and decode.
        seed: of the order of training samples.
        predict_split: the split that ``predict`` and ``test`` run over.

    Raises:
        UserError: the folder is missing, unfinished, or of another kind.
    """

    kind: ClassVar[str]

    def __init__(
        self, root: str, batch_size: int, num_workers: int = 0, seed: int = 0, predict_split: str = "test"
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size: {batch_size}, expected at least 1")
        self.root = root
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.predict_split = predict_split
        self.manifest = Manifest.read(root, self.kind)

    @abstractmethod
    def decode(self, key: str, members: dict[str, bytes]) -> Any:
        """Encoded members of one sample -> decoded sample."""

    @abstractmethod
    def collate(self, samples: list[Any]) -> Any:
        """Decoded samples -> typed batch."""

    def train_dataloader(self) -> Loader:
        """Shuffled anew each epoch; equal batch counts on every rank."""
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> Loader:
        """Every sample once, in stored order."""
        return self.loader("val")

    def test_dataloader(self) -> Loader:
        """Every sample of ``predict_split`` once, in stored order."""
        return self.loader(self.predict_split)

    def predict_dataloader(self) -> Loader:
        """The same as :meth:`test_dataloader`."""
        return self.loader(self.predict_split)

    def loader(self, split: str, shuffle: bool = False) -> Loader:
        """A loader over one split."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        dataset = ShardDataset(self.manifest, split, self.decode, self.collate)
        plan = BatchPlan(dataset.shards, self.batch_size, shuffle=shuffle, seed=self.seed, rank=rank, world=world)
        return Loader(dataset, plan, self.num_workers)
