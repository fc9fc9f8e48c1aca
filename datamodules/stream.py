"""The stream: which samples make which batch, in which order, on which rank, and how it resumes.

The manifest names every sample with its length, so that the batches of an epoch are decided before a byte is
read: a pure function of (seed, epoch, number of ranks). Each rank takes every n-th batch of that one list, and
a resumed run starts behind the batches it had. The bytes come from the WebDataset tars by offset.
"""

import os
import random
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from webdataset.tariterators import base_plus_ext

from datamodules.errors import UserError
from datamodules.shards import Manifest, Shard

# Samples are shuffled within a window of this many shards, so that a remote stream fetches each shard once.
SHUFFLE_WINDOW = 16
# Batches of similar length are formed within a pool of this many batches: little padding, still random.
POOL = 32


class ShardReader:
    """Reads samples of one shard by number, through an index of its tar's members."""

    def __init__(self, manifest: Manifest, shard: Shard) -> None:
        self.path = manifest.root / shard.file
        self.keys = shard.keys
        self.members: list[dict[str, tuple[int, int]]] | None = None
        self.file = -1
        self.process = -1

    def read(self, number: int) -> dict[str, bytes]:
        """Member name -> bytes of one sample.

        Raises:
            UserError: the tar is damaged or holds other samples than the manifest says.
        """
        if self.members is None:
            self.members = self._index()
        if self.process != os.getpid():  # a forked worker needs a descriptor of its own
            self.file, self.process = os.open(self.path, os.O_RDONLY), os.getpid()
        return {name: os.pread(self.file, size, offset) for name, (offset, size) in self.members[number].items()}

    def _index(self) -> list[dict[str, tuple[int, int]]]:
        found: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    key, extension = base_plus_ext(member.name)
                    found.setdefault(key, {})[extension] = (member.offset_data, member.size)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{self.path}: not a readable tar ({error}); copy it again or rebuild") from error
        if list(found) != self.keys:
            raise UserError(f"{self.path}: holds other samples than its manifest; copy it again or rebuild")
        return list(found.values())


class ShardDataset(Dataset):
    """A split as a map from a list of sample numbers to a batch.

    Args:
        manifest: the data set.
        split: its split.
        decode: key and members -> decoded sample; raises for a damaged one.
        collate: decoded samples -> batch.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        decode: Callable[[str, dict[str, bytes]], Any],
        collate: Callable[[list[Any]], Any],
    ) -> None:
        self.shards = manifest.split(split)
        self.readers = [ShardReader(manifest, shard) for shard in self.shards]
        self.where = [(s, i) for s, shard in enumerate(self.shards) for i in range(len(shard.keys))]
        self.decode = decode
        self.collate = collate

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, numbers: list[int]) -> Any:
        return self.collate([self._sample(number) for number in numbers])

    def _sample(self, number: int) -> Any:
        s, i = self.where[number]
        key = self.shards[s].keys[i]
        members = self.readers[s].read(i)
        try:
            return self.decode(key, members)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.readers[s].path}: sample '{key}' cannot be decoded ({type(error).__name__}: {error}); "
                "copy the shard again or rebuild"
            ) from error


class BatchPlan(Sampler[list[int]]):
    """The batches of one rank, epoch by epoch.

    Args:
        shards: the shards of the split.
        batch_size: samples in a batch; the last may hold fewer.
        shuffle: for training; otherwise the stored order.
        seed: of the shuffle.
        rank, world: this process and how many there are.
    """

    def __init__(
        self,
        shards: list[Shard],
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.shards = shards
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0
        self.done = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it before each epoch."""
        if epoch != self.epoch:
            self.epoch, self.done = epoch, 0

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank, also where a resumed one yields fewer."""
        batches = -(-sum(len(shard.keys) for shard in self.shards) // self.batch_size)
        # Training drops the few batches that not every rank could have: no rank waits for another.
        return batches // self.world if self.shuffle else len(range(self.rank, batches, self.world))

    def __iter__(self) -> Iterator[list[int]]:
        mine = self.all_batches()[self.rank :: self.world][: len(self)]
        yield from mine[self.done :]

    def all_batches(self) -> list[list[int]]:
        """The batches of all ranks in this epoch, as sample numbers."""
        starts: list[int] = []
        lengths: list[int] = []
        for shard in self.shards:
            starts.append(len(lengths))
            lengths.extend(shard.lengths)
        numbers = list(range(len(lengths)))
        size = self.batch_size
        if not self.shuffle:
            return [numbers[i : i + size] for i in range(0, len(numbers), size)]

        rng = random.Random(f"{self.seed}-{self.epoch}")
        order = list(range(len(self.shards)))
        rng.shuffle(order)
        numbers = []
        for i in range(0, len(order), SHUFFLE_WINDOW):
            window = [starts[s] + k for s in order[i : i + SHUFFLE_WINDOW] for k in range(len(self.shards[s].keys))]
            rng.shuffle(window)
            numbers.extend(window)
        batches = []
        for i in range(0, len(numbers), POOL * size):
            pool = sorted(numbers[i : i + POOL * size], key=lambda number: lengths[number])
            pool_batches = [pool[j : j + size] for j in range(0, len(pool), size)]
            rng.shuffle(pool_batches)
            batches.extend(pool_batches)
        return batches


class Loader:
    """Batches of a :class:`BatchPlan`, read by a DataLoader; its place in the epoch goes into the checkpoint.

    It holds a DataLoader and is none: Lightning would rebuild one for prediction, and lose the plan.
    """

    def __init__(self, dataset: ShardDataset, plan: BatchPlan, num_workers: int) -> None:
        self.plan = plan
        self.sampler = plan  # where Lightning looks for set_epoch
        self.batch_sampler = None
        self.loader = DataLoader(
            dataset,
            sampler=plan,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # starting an epoch must not move the generator that training draws from
        )

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            if self.plan.shuffle:  # an evaluation that stopped early (a sanity check) starts over next time
                self.plan.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and batches of it given so far."""
        return {"epoch": self.plan.epoch, "done": self.plan.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where the saved loader stood."""
        self.plan.epoch, self.plan.done = state["epoch"], state["done"]


def _as_it_is(batch: Any) -> Any:
    return batch
