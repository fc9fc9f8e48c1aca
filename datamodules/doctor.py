"""The shard doctor: everything in a folder of shards that would stop, hang or spoil a job, found before it starts.

It looks at the manifest, at every byte of every file, at the members of every sample, decodes some of them, and lays
out the batches of every rank and worker as :class:`datamodules.stream.BatchPlan` will. A *problem* refuses the job; a
*note* is worth knowing.
"""

import bisect
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from datamodules.columns import COLUMNS, Column, column_problems, decode_columns, read_columns
from datamodules.datamodule import ShardDataModule
from datamodules.errors import BadSample, UserError
from datamodules.kinds import open_data
from datamodules.shards import MANIFEST, Manifest, Shard, file_sha256, worker_count
from datamodules.stream import BatchPlan, ShardReader

SPLITS = ("train", "val", "test")
FIELDS = {
    "faces": ("size", "attributes", "mask_classes"),
    "expression-prompts": ("controls", "emotions"),
    "talking-heads": (
        "fps",
        "sample_rate",
        "unit",
        "topology",
        "vertices",
        "subjects",
        "train_subjects",
        "emotions",
        "controls",
        "regions",
    ),
}
LISTED = 5  # findings of one kind in one file; the rest are counted
PATIENCE = 0.5  # seconds by which a clip's sound and mesh may differ in length: recordings seldom end together


@dataclass
class Findings:
    """Problems and notes, one line each, that begin with the file's name."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, file: str | Path, lines: list[str]) -> None:
        """Adds problems of one kind with one file; of many only the first, and how many more."""
        self.problems += [f"{file}: {line}" for line in lines[:LISTED]]
        if len(lines) > LISTED:
            self.problems.append(f"{file}: and {len(lines) - LISTED} more like the last")

    def extend(self, other: "Findings") -> None:
        """Adds another's."""
        self.problems += other.problems
        self.notes += other.notes


@dataclass(frozen=True)
class SplitPlan:
    """A split, and what becomes of it on every rank and worker.

    Attributes:
        split: its name.
        shards, samples, frames, bytes: how much there is.
        lengths: shortest, median and longest sample, frames.
        batches: that every rank gets in an epoch.
        dropped: samples of an epoch that no rank gets, because not every rank could have a batch of them (training).
        stand_ins: batches of one sample that is not counted, for ranks that would have none (evaluation).
        padding: share of all frames in batches that are padding.
        worker_shards: fewest and most shards that one data worker opens in an epoch.
        idle: data workers, over all ranks, that never get a batch.
    """

    split: str
    shards: int
    samples: int
    frames: int
    bytes: int
    lengths: tuple[int, float, int]
    batches: int
    dropped: int
    stand_ins: int
    padding: float
    worker_shards: tuple[int, int]
    idle: int


@dataclass(frozen=True)
class Report:
    """What :func:`examine` found; ``ready`` is whether a job may start."""

    root: str
    kind: str
    name: str
    world_size: int
    workers: int
    batch_size: int | None
    frames_per_batch: int | None
    decoded: int
    checksums: bool
    columns: list[str]
    splits: list[SplitPlan]
    problems: list[str]
    notes: list[str]

    @property
    def ready(self) -> bool:
        """No problems."""
        return not self.problems

    def as_json(self) -> bytes:
        """All of it, for machines."""
        return json.dumps({"ready": self.ready, **asdict(self)}, indent=1).encode()


def examine(
    root: str | Path,
    *,
    world_size: int = 1,
    workers: int = 0,
    batch_size: int | None = None,
    frames_per_batch: int | None = None,
    samples: int = 4,
    splits: list[str] | None = None,
    checksums: bool = True,
    processes: int | None = None,
) -> Report:
    """Examines a folder of shards for a job.

    Args:
        root: the folder, or an address.
        world_size: processes that will train together.
        workers: data workers of each.
        batch_size, frames_per_batch: one of them, as the data module takes it; by default batches of 8.
        samples: of each shard to decode; 0 for all.
        splits: those the job uses, each of which must have samples.
        checksums: whether every byte is read.
        processes: shards to look at side by side, by default one per core.

    Raises:
        UserError: no readable manifest, or arguments out of range.
    """
    for name, value, least in (("world-size", world_size, 1), ("workers", workers, 0), ("samples", samples, 0)):
        if value < least:
            raise UserError(f"--{name} {value}: expected at least {least}")
    threads = worker_count(processes)
    if batch_size is None and frames_per_batch is None:
        batch_size = 8
    data = open_data(root, batch_size, frames_per_batch=frames_per_batch)
    manifest = data.manifest
    found = Findings()
    _check_description(data, found)
    _check_files(manifest, found, checksums)
    _check_keys(manifest, found)
    columns = _check_columns(manifest, found)

    decoded = 0
    members: Counter[frozenset[str]] = Counter()
    shards = []
    bar_columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bar_columns, transient=True) as progress, ThreadPoolExecutor(threads) as pool:
        bar = progress.add_task("shards", total=len(manifest.shards))
        for shard in pool.map(lambda shard: _check_shard(data, columns, shard, samples, checksums), manifest.shards):
            shards.append(shard)
            decoded += shard.decoded
            members.update(frozenset(names) for names in shard.members.values())
            progress.advance(bar)
    usual = members.most_common(1)[0][0] if members else frozenset()
    for looked_at in shards:
        found.extend(looked_at.findings)
        found.add(
            manifest.root / looked_at.file,
            [
                f"sample '{key}' has the members {_listed(names)}, the others {_listed(usual)}"
                for key, names in looked_at.members.items()
                if names != usual
            ],
        )

    plans = []
    for split in splits or SPLITS:
        chosen = [shard for shard in manifest.shards if shard.split == split]
        if not any(shard.keys for shard in chosen):
            what = "is empty" if chosen else "is missing"
            found.problems.append(f"{manifest.root / MANIFEST}: split '{split}' {what}; build it, or name --splits")
            continue
        plan = plan_split(split, chosen, batch_size, frames_per_batch, world_size, workers)
        plans.append(plan)
        if split == "train" and not plan.batches:
            found.problems.append(
                f"{manifest.root / MANIFEST}: split 'train' has {plan.samples} samples, fewer batches than "
                f"{world_size} ranks; take smaller batches or fewer ranks"
            )
        if plan.idle:
            found.notes.append(f"split '{split}': {plan.idle} data workers of all ranks never get a batch")
    unused = sorted({shard.split for shard in manifest.shards} - set(splits or SPLITS))
    if unused:
        found.notes.append(f"splits that the job does not use: {', '.join(unused)}")
    return Report(
        str(root),
        manifest.kind,
        manifest.name,
        world_size,
        workers,
        batch_size,
        frames_per_batch,
        decoded,
        checksums,
        [column.name for column in columns],
        plans,
        found.problems,
        found.notes,
    )


def plan_split(
    split: str, shards: list[Shard], batch_size: int | None, frames_per_batch: int | None, world_size: int, workers: int
) -> SplitPlan:
    """Lays out the first epoch of a split; every other has as many batches."""
    training = split == "train"
    plan = BatchPlan(shards, batch_size, shuffle=training, world=world_size, frames_per_batch=frames_per_batch)
    batches = plan.all_batches()
    given = batches[: len(plan) * world_size]
    sizes = [(len(batch), [plan.lengths[number] for number in batch]) for batch in given]
    real = sum(sum(lengths) for _, lengths in sizes)
    padded = sum(size * max(lengths) for size, lengths in sizes)
    parts = [
        given[rank::world_size][worker :: max(workers, 1)]
        for rank in range(world_size)
        for worker in range(max(workers, 1))
    ]
    opened = [len({bisect.bisect_right(plan.starts, number) for batch in part for number in batch}) for part in parts]
    return SplitPlan(
        split=split,
        shards=len(shards),
        samples=len(plan.lengths),
        frames=sum(plan.lengths),
        bytes=sum(shard.bytes for shard in shards),
        lengths=(min(plan.lengths), median(plan.lengths), max(plan.lengths)),
        batches=len(plan),
        dropped=len(plan.lengths) - sum(size for size, _ in sizes),
        stand_ins=len(plan) * world_size - len(given),
        padding=1 - real / padded if padded else 0.0,
        worker_shards=(min(opened), max(opened)),
        idle=sum(not part for part in parts) if workers else 0,
    )


def print_report(report: Report, console: Console | None = None) -> None:
    """Prints tables, notes, problems and the verdict."""
    console = console or Console()
    speech = report.kind == "talking-heads"
    console.print(f"[bold]{escape(report.name)}[/bold], {escape(report.kind)}, {escape(report.root)}")
    contents = Table(title="Contents", title_justify="left")
    for name in ("split", "shards", "samples", *(("frames", "shortest", "median", "longest") if speech else ()), "MB"):
        contents.add_column(name, justify="left" if name == "split" else "right")
    for plan in report.splits:
        frames = (plan.frames, plan.lengths[0], f"{plan.lengths[1]:g}", plan.lengths[2]) if speech else ()
        row = (plan.split, plan.shards, plan.samples, *frames, f"{plan.bytes / 1e6:.1f}")
        contents.add_row(*(escape(str(value)) for value in row))
    console.print(contents)

    per_batch = f"{report.batch_size} samples" if report.batch_size else f"{report.frames_per_batch} frames"
    layout = Table(
        title=f"Plan: {report.world_size} ranks x {report.workers} workers, {per_batch} a batch", title_justify="left"
    )
    names = (
        "split",
        "batches a rank",
        "samples dropped",
        "stand-ins",
        *(("padding",) if speech else ()),
        "shards a worker",
    )
    for name in names:
        layout.add_column(name, justify="left" if name == "split" else "right")
    for plan in report.splits:
        padding = (f"{plan.padding:.1%}",) if speech else ()
        fewest, most = plan.worker_shards
        shards = str(most) if fewest == most else f"{fewest} to {most}"
        layout.add_row(escape(plan.split), str(plan.batches), str(plan.dropped), str(plan.stand_ins), *padding, shards)
    console.print(layout)

    read = "every byte was read" if report.checksums else "checksums were not verified"
    columns = f", columns: {', '.join(report.columns)}" if report.columns else ""
    console.print(escape(f"{read}, {report.decoded} samples were decoded{columns}"))
    for note in report.notes:
        console.print(f"[yellow]note[/yellow]     {escape(note)}", soft_wrap=True)
    for problem in report.problems:
        console.print(f"[red]problem[/red]  {escape(problem)}", soft_wrap=True)
    console.print("[bold green]ready[/bold green]" if report.ready else "[bold red]not ready[/bold red]")


def _check_description(data: ShardDataModule, found: Findings) -> None:
    """The manifest's fields, and for talking heads what lies beside the shards."""
    manifest = data.manifest
    path = manifest.root / MANIFEST
    missing = [name for name in FIELDS[manifest.kind] if name not in manifest.fields]
    found.add(path, [f"field '{name}' is missing; build the shards again" for name in missing])
    if missing or manifest.kind != "talking-heads":
        return
    count, speech = manifest.fields["vertices"], data
    for name, check in (("templates.safetensors", _templates), ("topology.safetensors", _topology)):
        try:
            found.add(manifest.root / name, list(check(speech, count)))
        except Exception as error:
            found.add(manifest.root / name, [f"cannot be read ({type(error).__name__}: {error}); copy it again"])


def _templates(data: Any, count: int) -> Iterator[str]:
    for subject in data.manifest.fields["subjects"]:
        if subject not in data.templates:
            yield f"no mesh of subject '{subject}'"
    for subject, vertices in data.templates.items():
        if vertices.shape != (count, 3):
            yield f"'{subject}' has the shape {tuple(vertices.shape)}, expected ({count}, 3)"
        elif not vertices.isfinite().all():
            yield f"'{subject}' has vertices that are not finite"


def _topology(data: Any, count: int) -> Iterator[str]:
    if not count:  # rig controls alone
        return
    names = ["triangles", *data.manifest.fields["regions"]]
    if "lips" not in names:
        yield "no region 'lips', which validation measures"
    for name in names:
        indices = data.topology.get(name)
        if indices is None:
            yield f"no '{name}'"
        elif not len(indices):
            if name != "triangles":  # needed to draw, not to train
                yield f"'{name}' is empty"
        elif indices.min() < 0 or indices.max() >= count:
            yield f"'{name}' names vertex {max(int(indices.max()), -int(indices.min()))}, but meshes have {count}"


def _check_files(manifest: Manifest, found: Findings, checksums: bool) -> None:
    """Files that the manifest lists beside the shards, and files that nothing lists."""
    for name, sha256 in manifest.files.items():
        path = manifest.root / name
        if not path.is_file():
            found.add(path, ["missing; copy it again or build the shards again"])
        elif checksums and file_sha256(path) != sha256:
            found.add(path, ["damaged, its SHA-256 is not the manifest's; copy it again"])
    if manifest.url is None:
        known = {MANIFEST, COLUMNS, "templates.safetensors", "topology.safetensors", *manifest.files}
        known |= {shard.file for shard in manifest.shards}
        known |= {tar.file for column in read_columns(manifest).values() for tar in column.tars}
        strange = sorted(path.name for path in manifest.root.iterdir() if path.name not in known)
        if strange:
            more = f" and {len(strange) - LISTED} more" if len(strange) > LISTED else ""
            found.notes.append(f"{manifest.root}: files that nothing lists: {', '.join(strange[:LISTED])}{more}")


def _check_keys(manifest: Manifest, found: Findings) -> None:
    """No key twice, whether in one split or in two."""
    where: dict[str, Shard] = {}
    for shard in manifest.shards:
        twice = []
        for key in shard.keys:
            if key in where:
                other = where[key]
                twice.append(f"key '{key}' is also in {other.file} of split '{other.split}'; build with unique keys")
            where.setdefault(key, shard)
        found.add(manifest.root / shard.file, twice)


def _check_columns(manifest: Manifest, found: Findings) -> list[Column]:
    """The columns that fit."""
    fitting = []
    for column in read_columns(manifest).values():
        problems = column_problems(manifest, column)
        found.problems += problems
        if not problems:
            fitting.append(column)
    return fitting


@dataclass
class _ShardFindings:
    file: str
    findings: Findings
    members: dict[str, frozenset[str]]
    decoded: int = 0


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))


def _check_shard(
    data: ShardDataModule, fitting: list[Column], shard: Shard, samples: int, checksums: bool
) -> _ShardFindings:
    """Size, checksum, members of all samples (or, without checksums, of those to be decoded), and some decoded."""
    result = _ShardFindings(shard.file, Findings(), {})
    columns = {
        column.name: column
        for column in fitting
        if not _damage(data.manifest, column.beside(shard), checksums, result.findings)
    }
    damaged = _damage(data.manifest, shard, checksums, result.findings)
    if damaged == "missing" or (damaged and not shard.checksums):
        return result
    if not shard.keys:
        result.findings.notes.append(f"{data.manifest.root / shard.file}: holds no samples")
        return result

    readers = [ShardReader(data.manifest, tar) for tar in (shard, *(c.beside(shard) for c in columns.values()))]
    count = len(shard.keys)
    chosen = set(np.linspace(0, count - 1, min(samples or count, count)).round().astype(int).tolist())
    bad, wrong = [], []
    try:
        for number in range(count) if checksums else sorted(chosen):
            key = shard.keys[number]
            try:
                members = readers[0].read(number)
                result.members[key] = frozenset(members)
                if number not in chosen:
                    continue
                for column, reader in zip(columns.values(), readers[1:], strict=True):
                    members[column.member] = reader.read(number)["npy"]
                decoded = data.decode(key, members)
                data.collate([decoded])
                decode_columns(columns, members, shard.lengths[number])
                result.decoded += 1
                wrong += [f"sample '{key}': {what}" for what in _strange(data, shard, number, decoded)]
                result.findings.notes += [
                    f"{data.manifest.root / shard.file}: sample '{key}': {what}" for what in _odd(data, decoded)
                ]
            except UserError:
                raise
            except Exception as error:
                what = str(error) if isinstance(error, BadSample) else f"{type(error).__name__}: {error}"
                bad.append(f"sample '{key}' cannot be used ({what}); build the shard again")
    except UserError as error:  # the whole shard
        result.findings.problems.append(str(error))
    finally:
        for reader in readers:
            reader.close()
    result.findings.add(data.manifest.root / shard.file, bad)
    result.findings.add(data.manifest.root / shard.file, wrong)
    return result


def _damage(manifest: Manifest, tar: Shard, checksums: bool, findings: Findings) -> str:
    """What is wrong with a tar as a file, also added to the findings; empty if nothing is."""
    path, what = manifest.root / tar.file, ""
    if manifest.url is None and not path.is_file():
        what = "missing"
    elif manifest.url is None and path.stat().st_size != tar.bytes:
        what = f"{path.stat().st_size} bytes, expected {tar.bytes}"
    elif checksums and file_sha256(manifest.locate(tar)) != tar.sha256:
        what = "damaged, its SHA-256 is not the one that was written down"
    if what:
        findings.add(path, [f"{what}; copy it again or build it again"])
    return what


def _strange(data: Any, shard: Shard, number: int, sample: dict[str, Any]) -> Iterator[str]:
    """What a decoded sample says that the manifest does not."""
    fields = data.manifest.fields
    if data.kind == "talking-heads":
        if len(sample["vertices"]) != shard.lengths[number]:
            yield f"{len(sample['vertices'])} frames, but its manifest says {shard.lengths[number]}"
        if shard.split == "train" and sample["subject"] not in fields["train_subjects"]:
            yield f"subject '{sample['subject']}' is not among the manifest's train_subjects"
        if sample["weights"].shape[1] != len(fields["controls"]):
            yield f"{sample['weights'].shape[1]} rig controls, but the manifest names {len(fields['controls'])}"
    elif data.kind == "faces":
        if len(sample["attributes"]) != len(fields["attributes"]):
            yield f"{len(sample['attributes'])} attributes, but the manifest names {len(fields['attributes'])}"
        highest = int(sample["mask"].max()) if sample["mask"].numel() else 0
        if fields["mask_classes"] and highest >= len(fields["mask_classes"]):
            yield f"mask class {highest}, but the manifest names {len(fields['mask_classes'])}"


def _odd(data: Any, sample: dict[str, Any]) -> Iterator[str]:
    """What may be meant so, but seldom is."""
    if data.kind != "talking-heads":
        return
    sound = len(sample["audio"]) / data.manifest.fields["sample_rate"]
    mesh = len(sample["vertices"]) / data.fps
    if abs(sound - mesh) > PATIENCE:
        yield f"{sound:.2f} s of sound, but {mesh:.2f} s of mesh at {data.fps:g} fps"
    if data.manifest.fields["unit"] != "metre" or not sample["template"].numel():
        return
    extent = float(np.ptp(sample["template"].numpy(), axis=0).max())
    if not 0.05 < extent < 1:
        yield f"a head of {extent:.3g} m; are its vertices in metres?"
