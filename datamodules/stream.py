"""The stream: which samples make which batch, in which order, on which rank, and how it resumes.

The manifest names every sample with its length, so that the batches of an epoch are decided before a byte is
read: a pure function of (seed, epoch). Each rank takes every n-th batch of that one list, and a resumed run, on
however many ranks, starts behind the batches that were given. The bytes come from the WebDataset tars by offset.

Training gives every rank equally many batches by leaving out the last few that not every rank could have;
evaluation by stand-ins that are marked as not real. See ``docs/streaming.md``.
"""

import bisect
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import tarfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import accumulate, chain, count, islice, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from webdataset.tariterators import base_plus_ext

from datamodules import remote
from datamodules.columns import Column
from datamodules.errors import BadSample, UserError
from datamodules.shards import Manifest, Shard, file_sha256, sample_spans

# Samples are shuffled within a window of this many shards, so that a remote stream fetches each shard once.
SHUFFLE_WINDOW = 16
# Batches of similar length are formed within a pool of this many batches: little padding, still random.
POOL = 32
# With a budget of frames, the clips of one batch differ in length by at most this factor.
BUCKET = 1.1
# A mix under a budget of frames has as many batches an epoch as the largest of its first epochs fills.
COUNTED_EPOCHS = 4
# Shards whose files a process keeps open.
OPEN_SHARDS = 4 * SHUFFLE_WINDOW
# A larger sample is refused before it is read.
LARGEST_SAMPLE = 1 << 30
# Tensors of a batch up to this many bytes are copied to the main process rather than shared with it.
SMALL_TENSOR = 1 << 16
# Seconds within which a forked worker says that it runs, and how often workers are forked until all do.
START_SECONDS, STARTS = 30.0, 5

OnBadSample = Literal["error", "skip"]


class ShardReader:
    """Reads samples of one shard by number."""

    def __init__(self, manifest: Manifest, shard: Shard) -> None:
        self.manifest = manifest
        self.shard = shard
        self.file = -1

    @property
    def place(self) -> str:
        """The shard's file or address, for messages."""
        return f"{self.manifest.place}/{self.shard.file}"

    @cached_property
    def starts(self) -> list[int]:
        """The byte at which each sample starts, and where the last one ends."""
        return list(accumulate(self.shard.sizes or self._scan(), initial=0))

    def read(self, number: int) -> dict[str, bytes]:
        """Member name -> bytes of one sample.

        Raises:
            BadSample: its bytes are not those that were written.
            UserError: the whole shard is damaged or cannot be fetched.
        """
        start, end = self.starts[number], self.starts[number + 1]  # may fetch the file again, so opened only now
        self.open()
        if end - start > LARGEST_SAMPLE:
            raise BadSample("too large", f"{end - start} bytes, at most {LARGEST_SAMPLE}")
        contents = os.pread(self.file, end - start, start)
        if self.manifest.url is not None and not self._is_intact(number, contents):
            # The address gave the right bytes once: the cached copy was damaged since.
            remote.forget_shard(self.shard.sha256)
            self.close()
            self.open()
            contents = os.pread(self.file, end - start, start)
        if not self._is_intact(number, contents):
            raise BadSample("damaged bytes", "not those of the manifest's checksum")
        members = {}
        with tarfile.open(fileobj=io.BytesIO(contents), mode="r:") as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)
                if key != self.shard.keys[number] or not member.isreg() or extension in members:
                    raise BadSample("strange member", f"'{member.name}'")
                members[extension] = contents[member.offset_data : member.offset_data + member.size]
        return members

    def _is_intact(self, number: int, contents: bytes) -> bool:
        return not self.shard.checksums or zlib.crc32(contents) == self.shard.checksums[number]

    def open(self) -> None:
        """Opens the file, after fetching it if it lies elsewhere."""
        while self.file < 0:
            path = self.manifest.locate(self.shard)
            try:
                self.file = os.open(path, os.O_RDONLY)
            except OSError as error:
                if self.manifest.url is None:
                    raise UserError(
                        f"{path}: {error.strerror}; copy the file again or build the shards again"
                    ) from None
                if not isinstance(error, FileNotFoundError):  # between locate and open the cache may have made room
                    raise UserError(
                        f"{path}: {error.strerror}; make it readable, or name another folder by FACEBENCH_CACHE"
                    ) from None

    def close(self) -> None:
        """Closes the file; reading opens it again."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def _scan(self) -> list[int]:
        """Sizes of the samples, for a manifest that does not record them; then the whole file is verified."""
        path = self.manifest.locate(self.shard)
        try:
            if self.manifest.url is not None and file_sha256(path) != self.shard.sha256:
                remote.forget_shard(self.shard.sha256)
                path = self.manifest.locate(self.shard)
            if file_sha256(path) != self.shard.sha256:
                raise UserError(f"{path}: damaged, its SHA-256 is not the manifest's; copy it again or rebuild")
            with path.open("rb") as file:
                spans = sample_spans(file)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable tar ({error}); copy it again or rebuild") from error
        if [key for key, _ in spans] != self.shard.keys:
            raise UserError(f"{path}: holds other samples than its manifest; copy it again or rebuild")
        return [size for _, size in spans]


class Bad(NamedTuple):
    """A sample that could not be used: its number in the split, its shard, and what is wrong with it."""

    number: int
    shard: str
    kind: str
    message: str


class Delivery(NamedTuple):
    """What a worker hands over: a batch, the bad samples it met, and an error instead of both."""

    batch: Any
    bad: list[Bad]
    error: str | None = None


class ShardDataset(Dataset):
    """A split as a map from a list of sample numbers to a batch.

    A negative number ``~n`` asks for sample n as a stand-in: ``batch.real`` is False in its place.

    A bad sample is an error, or it is skipped. In training its place is taken by the next good sample of the batch,
    which keeps the batch's size and its frames within bounds; in evaluation the same, marked as not real. Where the
    whole batch is bad, it is the next good sample of the split that is no longer than the batch's longest; where there
    is none, the shortest good one, alone. So every rank keeps its number of batches, and the same data give the same
    batches.

    Args:
        manifests: one data set or several of one kind, whose samples are numbered on.
        split: the split.
        decode: key and members -> decoded sample; raises :class:`BadSample` for one that cannot be used.
        collate: decoded samples -> batch.
        columns: feature columns, whose arrays join the members.
        on_bad_sample: ``error`` or ``skip``.
        training: whether a bad sample is replaced rather than masked.
    """

    def __init__(
        self,
        manifests: Manifest | Sequence[Manifest],
        split: str,
        decode: Callable[[str, dict[str, bytes]], Any],
        collate: Callable[[list[Any]], Any],
        columns: Sequence[Column] = (),
        on_bad_sample: OnBadSample = "error",
        training: bool = False,
    ) -> None:
        manifests = [manifests] if isinstance(manifests, Manifest) else manifests
        parts = [(manifest, manifest.split(split)) for manifest in manifests]
        self.shards = [shard for _, shards in parts for shard in shards]
        self.readers = [ShardReader(manifest, shard) for manifest, shards in parts for shard in shards]
        self.columns = {
            column.member: [ShardReader(reader.manifest, column.beside(reader.shard)) for reader in self.readers]
            for column in columns
        }
        self.starts = list(accumulate((len(shard.keys) for shard in self.shards), initial=0))
        self.lengths = [length for shard in self.shards for length in shard.lengths]
        self.opened: dict[int, None] = {}  # shards with open files, the last used last
        self.process = os.getpid()
        self.decode = decode
        self.collate = collate
        self.on_bad_sample = on_bad_sample
        self.training = training

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, numbers: list[int]) -> Delivery:
        bad: list[Bad] = []
        try:
            wanted = [number if number >= 0 else ~number for number in numbers]
            found = [self._try(number, bad) for number in wanted]
            good = [i for i, sample in enumerate(found) if sample is not None]
            if good:  # in the place of a bad one the next good one, the first again after the last
                places = [bisect.bisect_left(good, i) % len(good) for i in range(len(found))]
                samples = [found[good[place]] for place in places]
            else:
                samples = self._stand_ins(wanted, bad)
            numbers, found = numbers[: len(samples)], found[: len(samples)]
            batch = self.collate(samples)
        except UserError as error:  # as a value: an exception would arrive with the worker's traceback as its message
            return Delivery(None, [], str(error))
        pairs = zip(numbers, found, strict=True)
        batch.real = torch.tensor([number >= 0 and (self.training or s is not None) for number, s in pairs])
        return Delivery(batch, bad)

    def _stand_ins(self, wanted: list[int], bad: list[Bad]) -> list[Any]:
        """For a batch that is bad as a whole: as many samples, none longer than its longest; or else one."""
        longest = max(self.lengths[number] for number in wanted)
        following = [(wanted[0] + i) % len(self) for i in range(len(self))]
        # Those that are short enough stay in order, the others follow by length.
        for number in sorted(following, key=lambda number: max(longest, self.lengths[number])):
            if number not in wanted and (sample := self._try(number, bad)) is not None:
                return [sample] * (len(wanted) if self.lengths[number] <= longest else 1)
        raise UserError(f"{self.readers[0].manifest.place}: no sample of the split can be used; {bad[-1].message}")

    def _try(self, number: int, bad: list[Bad]) -> Any:
        """A decoded sample; None for a bad one, where these are skipped."""
        s = bisect.bisect_right(self.starts, number) - 1
        shard, i = self.shards[s], number - self.starts[s]
        try:
            return self._read(s, i)
        except UserError:
            raise
        except BadSample as error:
            kind, what = error.kind, str(error)
        except Exception as error:
            kind, what = f"not decodable: {type(error).__name__}", f"not decodable ({type(error).__name__}: {error})"
        message = f"{self.readers[s].place}: sample '{shard.keys[i]}': {what}"
        if self.on_bad_sample == "error":
            raise UserError(f"{message}; copy the shard again, rebuild it, or set data.on_bad_sample to skip")
        bad.append(Bad(number, shard.file, kind, message))
        return None

    def _read(self, s: int, i: int) -> Any:
        if self.process != os.getpid():  # files that were opened before a worker was forked belong to its parent
            self.process, self.opened = os.getpid(), {}
            for reader in chain(self.readers, *self.columns.values()):
                reader.file = -1
        self.opened.pop(s, None)
        self.opened[s] = None
        if len(self.opened) > OPEN_SHARDS:
            oldest = next(iter(self.opened))
            del self.opened[oldest]
            for readers in (self.readers, *self.columns.values()):
                readers[oldest].close()
        members = self.readers[s].read(i)
        members |= {member: readers[s].read(i)["npy"] for member, readers in self.columns.items()}
        return self.decode(self.shards[s].keys[i], members)


class BatchPlan(Sampler[list[int]]):
    """The batches of one rank, epoch by epoch.

    Several data sets are mixed by weight: an epoch is as long as all of them together, each gives its share of the
    samples, and one that is used up starts over in another order. A single one gives every sample once.

    Args:
        shards: the shards of the split, of one data set after another.
        batch_size: samples in a batch; the last may hold fewer.
        shuffle: for training; otherwise the stored order.
        seed: of the shuffle.
        rank, world: this process and how many there are.
        frames_per_batch: instead of ``batch_size``, a bound on samples times the longest of them. A sample that is
            longer makes a batch of its own.
        mix: number of shards and weight of each data set.
    """

    def __init__(
        self,
        shards: list[Shard],
        batch_size: int | None = None,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        frames_per_batch: int | None = None,
        mix: Sequence[tuple[int, float]] = (),
    ) -> None:
        self.shards = shards
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world = world
        self.frames_per_batch = frames_per_batch
        self.mix = list(mix) or [(len(shards), 1.0)]
        self.lengths = [length for shard in shards for length in shard.lengths]
        self.starts = list(accumulate((len(shard.keys) for shard in shards), initial=0))
        self.epoch = 0
        self.first = 0  # batches of the epoch, over all ranks, that were given before this plan took over
        self.done = 0  # batches given to this rank since

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it before each epoch."""
        if epoch != self.epoch:
            self.epoch, self.first, self.done = epoch, 0, 0

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank, also where a resumed one yields fewer: the same in every epoch."""
        # Training leaves out the few batches that not every rank could have; evaluation adds stand-ins.
        return self.total // self.world if self.shuffle else -(-self.total // self.world)

    @property
    def left(self) -> int:
        """Batches that this rank will still give in this epoch."""
        return (self.total - self.first) // self.world - self.done if self.shuffle else len(self)

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.all_batches()[self.first :]
        if self.shuffle:
            batches = batches[: len(batches) // self.world * self.world]
        else:
            stand_in = [~min(range(len(self.lengths)), key=self.lengths.__getitem__)]
            batches += [stand_in] * (-len(batches) % self.world)
        yield from batches[self.rank :: self.world][self.done :]

    def all_batches(self) -> list[list[int]]:
        """The batches of all ranks in this epoch, as sample numbers."""
        if not self.shuffle:
            return list(self._in_order())
        rng = random.Random(f"{self.seed}-{self.epoch}")
        samples = self._samples(self.epoch, rng)
        if self.frames_per_batch is None:
            return list(self._pools(samples, rng))
        batches = self._to_count(list(self._buckets(samples, rng)), rng)
        # Rare lengths come last, and what ranks cannot share is left out at the end: that must not always be the same.
        start = rng.randrange(len(batches))
        return batches[start:] + batches[:start]

    @cached_property
    def total(self) -> int:
        """Batches of an epoch over all ranks."""
        if not self.shuffle:
            return sum(1 for _ in self._in_order())
        if self.frames_per_batch is None:
            full, rest = divmod(len(self.lengths), self.batch_size)  # type: ignore[operator]
            return full + (rest > 0) if len(self.mix) == 1 else max(1, full)
        # How many the samples of a mix fill differs a little from epoch to epoch.
        epochs = range(1 if len(self.mix) == 1 else COUNTED_EPOCHS)
        rng = random.Random(0)
        return max(sum(1 for _ in self._buckets(self._samples(epoch, rng), rng)) for epoch in epochs)

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: epoch, batches given over all ranks, batches left on each, and of which list."""
        given = self.first + self.done * self.world
        return {
            "epoch": self.epoch,
            "given": given,
            "left": self.left,
            "world": self.world,
            "plan": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind the batches that were given, also on another number of ranks.

        Where samples are left out or repeated by that, one warning says so.
        """
        self.epoch, self.first, self.done = state["epoch"], state["given"], 0
        if state["left"] == 0:  # the epoch was over; batches that its ranks left out stay so
            self.first = self.total
            return
        if state["plan"] != self._fingerprint:
            self.first = 0
            warnings.warn(
                f"resumed in the middle of epoch {self.epoch} with other data, seed or batch size: "
                "the epoch starts over, and some of its samples come twice",
                stacklevel=2,
            )
            return
        lost = (self.total - self.first) % self.world
        if lost and state["world"] != self.world:
            warnings.warn(
                f"resumed in the middle of epoch {self.epoch} on {self.world} ranks: no sample of it comes twice, "
                f"but {lost} batches at its end are left out, because not every rank could have one",
                stacklevel=2,
            )

    @property
    def _fingerprint(self) -> str:
        decides = [self.seed, self.batch_size, self.frames_per_batch, self.mix, [shard.sha256 for shard in self.shards]]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def _in_order(self) -> Iterator[list[int]]:
        batch: list[int] = []
        longest = 0
        for number, length in enumerate(self.lengths):
            longest = max(longest, length)
            full = (
                len(batch) == self.batch_size
                if self.frames_per_batch is None
                else longest * (len(batch) + 1) > self.frames_per_batch
            )
            if full and batch:
                yield batch
                batch, longest = [], length
            batch.append(number)
        yield batch

    @cached_property
    def _ranges(self) -> list[tuple[int, int]]:
        """First sample of each data set, and the one behind its last."""
        edges = [self.starts[s] for s in accumulate((shards for shards, _ in self.mix), initial=0)]
        return list(pairwise(edges))

    @cached_property
    def _shares(self) -> list[int]:
        """Samples that each data set gives to an epoch."""
        samples = len(self.lengths) if self.batch_size is None else self.total * self.batch_size
        whole = sum(weight for _, weight in self.mix)
        edges = [round(samples * part / whole) for part in accumulate((weight for _, weight in self.mix), initial=0.0)]
        return [end - start for start, end in pairwise(edges)]

    def _samples(self, epoch: int, rng: random.Random) -> Iterator[int]:
        """The samples of an epoch: of each data set its share, from where the epoch before left it."""
        if len(self.mix) == 1:
            yield from self._pass(0, epoch)
            return
        streams = [self._endless(source, epoch * share) for source, share in enumerate(self._shares)]
        turns = [source for source, share in enumerate(self._shares) for _ in range(share)]
        rng.shuffle(turns)
        for source in turns:
            yield next(streams[source])

    def _endless(self, source: int, skip: int) -> Iterator[int]:
        start, end = self._ranges[source]
        first, skip = divmod(skip, end - start)
        passes = chain.from_iterable(self._pass(source, number) for number in count(first))
        return islice(passes, skip, None)

    def _pass(self, source: int, number: int) -> Iterator[int]:
        """Every sample of one data set once, in an order of its own."""
        rng = random.Random(f"{self.seed}-{source}-{number}")
        before = sum(shards for shards, _ in self.mix[:source])
        order = list(range(before, before + self.mix[source][0]))
        rng.shuffle(order)
        for i in range(0, len(order), SHUFFLE_WINDOW):
            window = [n for s in order[i : i + SHUFFLE_WINDOW] for n in range(self.starts[s], self.starts[s + 1])]
            rng.shuffle(window)
            yield from window

    def _pools(self, samples: Iterator[int], rng: random.Random) -> Iterator[list[int]]:
        """Batches of ``batch_size`` samples of similar length."""
        size: int = self.batch_size  # type: ignore[assignment]
        while pool := sorted(islice(samples, POOL * size), key=self.lengths.__getitem__):
            batches = [pool[j : j + size] for j in range(0, len(pool), size)]
            rng.shuffle(batches)
            yield from batches

    def _buckets(self, samples: Iterable[int], rng: random.Random) -> Iterator[list[int]]:
        """Batches within the budget of frames: a sample joins those of about its length until they are enough.

        How many there are follows from the lengths alone, so that it is the same in every order.
        """
        waiting: dict[int, list[int]] = {}
        for number in samples:
            bucket = self._bucket(self.lengths[number])
            batch = waiting.setdefault(bucket, [])
            batch.append(number)
            if len(batch) == self._bucket_size(bucket):
                yield waiting.pop(bucket)
        rest: list[int] = []
        batches = []
        for bucket, left in sorted(waiting.items()):
            rest += left
            size = self._bucket_size(bucket)
            while len(rest) >= size:
                batches.append(rest[:size])
                rest = rest[size:]
        if rest:
            batches.append(rest)
        rng.shuffle(batches)
        yield from batches

    def _to_count(self, batches: list[list[int]], rng: random.Random) -> list[list[int]]:
        """As many batches as every epoch has. Only those of a mix may be more or fewer.

        Any batch may be left out, so that no sample is left out epoch after epoch; halves keep to the budget.
        """
        while len(batches) > self.total:
            batches.pop(rng.randrange(len(batches)))
        while len(batches) < self.total:
            largest = max(batches, key=len)
            half = len(largest) // 2
            batches.append(largest[half:])
            del largest[half:]
        return batches

    def _bucket(self, length: int) -> int:
        return math.ceil(math.log(length, BUCKET) - 1e-9)

    def _bucket_size(self, bucket: int) -> int:
        longest = int(BUCKET**bucket + 1e-9)
        return max(1, self.frames_per_batch // longest)  # type: ignore[operator]


class Loader:
    """Batches of a :class:`BatchPlan`, read by a DataLoader; its place in the epoch goes into the checkpoint.

    It holds a DataLoader and is none: Lightning would rebuild one for prediction, and lose the plan.

    Attributes:
        plan: the batches.
        bad: how many bad samples were skipped since training began or went on, by shard and by what is wrong.

    Args:
        dataset: the samples.
        plan: the batches.
        num_workers: processes that read and decode; 0 for none but this one.
        max_bad_share: share of the split's samples that each rank may skip in an epoch; more is an error.
    """

    def __init__(self, dataset: ShardDataset, plan: BatchPlan, num_workers: int, max_bad_share: float = 0.0) -> None:
        self.dataset = dataset
        self.plan = plan
        self.max_bad_share = max_bad_share
        self.bad: Counter[tuple[str, str]] = Counter()
        self.sampler = plan  # where Lightning looks for set_epoch
        self.batch_sampler = None
        self.num_workers = num_workers
        self.loader: DataLoader | None = None

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Any]:
        skipped: set[int] = set()
        # On each rank, however many there are: a rank may meet more bad samples than others do.
        allowed = self.max_bad_share * len(self.dataset)
        for batch, bad, error in self.deliveries():
            if error is not None:
                raise UserError(error)
            for sample in bad:
                if sample.number not in skipped:
                    skipped.add(sample.number)
                    self._count(sample)
            if len(skipped) > allowed:
                raise UserError(
                    f"{bad[-1].message}; {len(skipped)} samples skipped, data.max_bad_share {self.max_bad_share:g} "
                    f"allows {int(allowed)} in an epoch: {self.bad_text()}; repair the data or raise it"
                )
            if self.plan.shuffle:  # an evaluation that stopped early (a sanity check) starts over next time
                self.plan.done += 1
            yield _tensors_again(batch)
        if self.plan.shuffle:
            self.plan.set_epoch(self.plan.epoch + 1)

    def deliveries(self) -> Iterator[Delivery]:
        """What the workers hand over, batch by batch; they are forked at the first call, and stay.

        CPython 3.11 can stand still in the child of a fork for ever, where a thread of a library (a collective of
        gloo that gives back its tensors) was about to enter the interpreter at that moment: the child inherits a lock
        without the thread that would release it. Such workers are killed and forked again.

        Raises:
            UserError: workers did not start, however often they were forked.
        """
        if self.loader is not None:
            return iter(self.loader)
        for _ in range(STARTS):
            before = set(multiprocessing.active_children())
            started = multiprocessing.Semaphore(0)
            loader = DataLoader(
                self.dataset,
                sampler=self.plan,
                batch_size=None,
                num_workers=self.num_workers,
                collate_fn=_small_by_value,
                worker_init_fn=partial(_report, started),
                persistent_workers=self.num_workers > 0,
                generator=torch.Generator(),  # starting an epoch must not move the generator that training draws from
            )
            deliveries = iter(loader)
            if all(started.acquire(timeout=START_SECONDS) for _ in range(self.num_workers)):
                self.loader = loader
                return deliveries
            del loader, deliveries  # ends those that run, and makes PyTorch forget the others
            for worker in set(multiprocessing.active_children()) - before:
                worker.kill()
                worker.join()
        raise UserError(
            f"{self.dataset.readers[0].manifest.place}: workers did not start within {START_SECONDS:g} seconds, "
            f"{STARTS} times in a row; data.num_workers is {self.num_workers}: choose fewer, or 0"
        )

    def _count(self, sample: Bad) -> None:
        """Warns at the first, the tenth, the hundredth ... sample of a kind."""
        self.bad[sample.shard, sample.kind] += 1
        number = sum(n for (_, kind), n in self.bad.items() if kind == sample.kind)
        if number == 10 ** (len(str(number)) - 1):
            warnings.warn(f"skipped, the {number}. of its kind: {sample.message}", stacklevel=3)

    def bad_text(self) -> str:
        """The skipped samples by shard and kind, in one line."""
        return ", ".join(f"{shard}: {number} x {kind}" for (shard, kind), number in sorted(self.bad.items()))

    @property
    def position(self) -> int:
        """Batches of the epoch that lie behind this rank; Lightning must count from there."""
        return len(self.plan) - self.plan.left

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch."""
        return self.plan.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the saved loader stood."""
        self.plan.load_state_dict(state)


def _report(started: Any, worker: int) -> None:
    """In a worker: says that it runs."""
    started.release()


def _small_by_value(delivery: Any) -> Any:
    """In a worker: makes arrays of a batch's small tensors, which then travel inside the message.

    A tensor travels as a file descriptor of shared memory, which costs a third of a millisecond whatever its size.
    """
    if delivery.batch is not None:
        for name, value in vars(delivery.batch).items():
            if isinstance(value, torch.Tensor) and value.nbytes <= SMALL_TENSOR:
                setattr(delivery.batch, name, value.numpy())
    return delivery


def _tensors_again(batch: Any) -> Any:
    """Undoes :func:`_small_by_value`, in the main process."""
    for name, value in vars(batch).items():
        if isinstance(value, np.ndarray):
            setattr(batch, name, torch.from_numpy(value))
    return batch
