"""What the data modules of all tasks share: the manifest, the splits and their loaders."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import pytorch_lightning as pl

from datamodules.columns import select_columns
from datamodules.errors import UserError
from datamodules.shards import Manifest
from datamodules.stream import BatchPlan, Loader, OnBadSample, ShardDataset


@dataclass(frozen=True)
class Source:
    """One data set of a mix.

    Attributes:
        root: its folder or address.
        weight: its share of an epoch's samples, against the weights of the others.
    """

    root: str
    weight: float = 1.0


class ShardDataModule(pl.LightningDataModule):
    """Streams a folder of shards, or a mix of several; see ``docs/streaming.md``.

    Args:
        root: the folder, as written by ``facebench data``, or the address of one; for a mix a list of these with
            their weights. Data sets of a mix must agree in kind and fields.
        batch_size: samples in a batch of each rank.
        num_workers: processes that read and decode.
        seed: of the order of training samples.
        predict_split: the split that ``predict`` and ``test`` run over.
        columns: feature columns to give with each batch, as made by ``facebench data features``.
        frames_per_batch: instead of ``batch_size``, a bound on a batch's frames with padding.
        on_bad_sample: ``error``, or ``skip`` a sample that is damaged or does not decode and count it.
        max_bad_share: share of the split's samples that each rank may skip in an epoch.

    Raises:
        UserError: the folder is missing, unfinished, or of another kind, a column is missing or stale, or the data
            sets of a mix do not agree.
    """

    kind: ClassVar[str]
    agree: ClassVar[tuple[str, ...]] = ()  # fields of the manifest that the data sets of a mix must have in common
    unite: ClassVar[tuple[str, ...]] = ()  # fields that are lists of names, which a mix has all of

    def __init__(
        self,
        root: str | list[Source],
        batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        predict_split: str = "test",
        columns: list[str] | None = None,
        frames_per_batch: int | None = None,
        on_bad_sample: OnBadSample = "error",
        max_bad_share: float = 0.01,
    ) -> None:
        super().__init__()
        if (batch_size is None) == (frames_per_batch is None):
            raise UserError("data.batch_size, data.frames_per_batch: expected one of them; give either")
        for name, value in (("batch_size", batch_size), ("frames_per_batch", frames_per_batch)):
            if value is not None and value < 1:
                raise UserError(f"data.{name}: {value}, expected at least 1")
        if not 0 <= max_bad_share <= 1:
            raise UserError(f"data.max_bad_share: {max_bad_share}, expected a share between 0 and 1")
        sources = [Source(root)] if isinstance(root, str) else root
        for source in sources:
            if not source.weight > 0:
                raise UserError(f"data.root: weight {source.weight} of {source.root}, expected a number above 0")
        self.root = " + ".join(source.root for source in sources)
        self.weights = [source.weight for source in sources]
        self.batch_size = batch_size
        self.frames_per_batch = frames_per_batch
        self.num_workers = num_workers
        self.seed = seed
        self.predict_split = predict_split
        self.on_bad_sample = on_bad_sample
        self.max_bad_share = max_bad_share
        self.manifests = [Manifest.read(source.root, self.kind) for source in sources]
        self.manifest = self.manifests[0] if len(sources) == 1 else self._mixed()
        self.columns = select_columns(self.manifests, columns or [])

    def _mixed(self) -> Manifest:
        """One description of all data sets of a mix."""
        first = self.manifests[0]
        fields = {name: first.fields[name] for name in self.agree if name in first.fields}
        keys: dict[str, Manifest] = {}
        for manifest in self.manifests:
            for name in self.agree:
                here, there = manifest.fields.get(name), first.fields.get(name)
                if here != there:
                    raise UserError(
                        f"data.root: field '{name}' is {here} in {manifest.root}, but {there} in {first.root}; "
                        "mix data sets that agree, or build one of them anew"
                    )
            for key in (key for shard in manifest.shards for key in shard.keys):
                if key in keys:
                    raise UserError(
                        f"data.root: key '{key}' is in {keys[key].root} and in {manifest.root}; "
                        "build one of them with other keys"
                    )
                keys[key] = manifest
        for name in self.unite:
            names = [value for manifest in self.manifests for value in manifest.fields[name]]
            fields[name] = list(dict.fromkeys(names))
        name = " + ".join(manifest.name for manifest in self.manifests)
        shards = [shard for manifest in self.manifests for shard in manifest.shards]
        files = {f"{i}/{file}": sha for i, m in enumerate(self.manifests) for file, sha in m.files.items()}
        return Manifest(first.root, self.kind, name, fields, shards, files)

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
        """Every sample once over all ranks, in stored order."""
        return self.loader("val")

    def test_dataloader(self) -> Loader:
        """Every sample of ``predict_split`` once over all ranks, in stored order."""
        return self.loader(self.predict_split)

    def predict_dataloader(self) -> Loader:
        """The same as :meth:`test_dataloader`."""
        return self.loader(self.predict_split)

    def loader(self, split: str, shuffle: bool = False, whole: bool = False) -> Loader:
        """A loader over this rank's share of a split; ``whole``: over all of it, for what every rank must know."""
        trainer = None if whole else self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        columns = list(self.columns.values())
        dataset = ShardDataset(
            self.manifests, split, self.decode, self.collate, columns, self.on_bad_sample, training=shuffle
        )
        counts = [len(manifest.split(split)) for manifest in self.manifests]
        plan = BatchPlan(
            dataset.shards,
            self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            rank=rank,
            world=world,
            frames_per_batch=self.frames_per_batch,
            mix=list(zip(counts, self.weights, strict=True)),
        )
        return Loader(dataset, plan, self.num_workers, self.max_bad_share)
