"""A shard that was damaged or forged at random never crashes, hangs, writes elsewhere or changes a sample unnoticed."""

import io
import json
import random
import struct
import tarfile
import zlib
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from datamodules.shards import Manifest, file_sha256
from datamodules.speech import SpeechDataModule
from datamodules.stream import ShardDataset

NAMES = ["../../escaped.png", "/tmp/escaped.json", "face-000.exe", "\0", "a" * 90 + ".png", "face-001.png", "..", ""]


def flip_bits(contents: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice([1, 1, 1, 2, 30])):
        contents[rng.randrange(len(contents))] ^= 1 << rng.randrange(8)
    return contents


def overwrite(contents: bytearray, rng: random.Random) -> bytearray:
    start, size = rng.randrange(len(contents)), rng.choice([1, 16, 512, 3000])
    contents[start : start + size] = rng.choice([bytes(size), rng.randbytes(size)])[: len(contents) - start]
    return contents


def truncate(contents: bytearray, rng: random.Random) -> bytearray:
    return contents[: rng.randrange(len(contents))]


def grow(contents: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(contents))
    return contents[:start] + rng.randbytes(rng.choice([1, 512, 5000])) + contents[start:]


def swap(contents: bytearray, rng: random.Random) -> bytearray:
    """Two blocks, such as headers, change places."""
    i, j = (512 * rng.randrange(len(contents) // 512) for _ in range(2))
    contents[i : i + 512], contents[j : j + 512] = contents[j : j + 512], contents[i : i + 512]
    return contents


def rename(contents: bytearray, rng: random.Random) -> bytearray:
    """A member gets another name, kind or declared size, with a correct header."""
    with tarfile.open(fileobj=io.BytesIO(contents)) as tar:
        member = rng.choice(tar.getmembers())
    change = rng.randrange(3)
    if change == 0:
        member.name = rng.choice(NAMES)
    elif change == 1:
        member.size = rng.choice([0, 1, 1 << 20, (8 << 30) - 1])
    else:
        member.type = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, b"S", b"x", b"L"])
        member.linkname = "/etc/passwd"
    header = member.tobuf(tarfile.USTAR_FORMAT if change else tarfile.GNU_FORMAT)
    contents[member.offset : member.offset + 512] = header[:512]
    return contents


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(contents: bytearray, rng: random.Random) -> bytearray:
    """A member is replaced by something small that would unpack to something huge, in as many bytes."""
    side = rng.choice([32, 30_000, (1 << 31) - 1])
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    zeros = zlib.compress(bytes(1 << 20))
    npy = io.BytesIO()
    shape = rng.choice([(1 << 40,), (0, 1 << 60), (10, 1 << 20, 3)])
    np.lib.format.write_array_header_1_0(npy, {"descr": "<f2", "fortran_order": False, "shape": shape})
    wav = (
        b"RIFF\xff\xff\xff\xffWAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16)
        + b"data\xff\xff\xff\x7f"
    )
    choices = [
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zeros) + png_chunk(b"IEND", b""),
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"zTXt", b"a\0\0" + zeros),
        npy.getvalue(),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
        b"\x80\x04cos\nsystem\n(S'false'\ntR.",
        b"[" * 100_000,
        wav,
        b"PK\x03\x04" + zeros,
    ]
    with tarfile.open(fileobj=io.BytesIO(contents)) as tar:
        member = rng.choice(tar.getmembers())
    data = rng.choice(choices)[: member.size].ljust(member.size)
    contents[member.offset_data : member.offset_data + member.size] = data
    return contents


MUTATIONS = [flip_bits, flip_bits, overwrite, truncate, grow, swap, rename, bomb]


class Target:
    """One shard that is written over and over, in a folder of which nothing else may change."""

    def __init__(self, root: Path, file: str, split: str, folder: Path, module: type, recorded: bool) -> None:
        self.module = module(str(root), batch_size=1)
        shard = next(shard for shard in self.module.manifest.shards if shard.file == file)
        self.shard = shard if recorded else replace(shard, sizes=[], checksums=[])
        self.split = split
        self.contents = (root / file).read_bytes()
        self.folder = folder
        folder.mkdir()
        self.path = folder / file
        self.truth = dict(zip(shard.keys, self.read(self.contents, self.shard)[0], strict=True))

    def read(self, contents: bytes, shard) -> tuple[list, list]:
        """The samples of a shard with these contents, None where one is bad, and the bad ones."""
        self.path.write_bytes(contents)
        manifest = replace(self.module.manifest, root=self.folder, shards=[shard])
        dataset = ShardDataset(manifest, self.split, self.module.decode, list, on_bad_sample="skip")
        bad: list = []
        try:
            return [dataset._try(i, bad) for i in range(len(dataset))], bad
        finally:
            for reader in dataset.readers:
                reader.close()

    def attack(self, rng: random.Random) -> str:
        """Damages the shard and reads it; says what came of it."""
        contents = rng.choice(MUTATIONS)(bytearray(self.contents), rng)
        try:
            samples, bad = self.read(contents, self.shard)
        except UserError:
            return "refused"
        for key, sample in zip(self.shard.keys, samples, strict=True):
            if sample is not None:
                assert_same(sample, self.truth[key])
        assert len(bad) == sum(sample is None for sample in samples)
        if not bad:  # the change lies behind the last sample, or it changed nothing
            assert contents[: sum(self.shard.sizes)] == self.contents[: sum(self.shard.sizes)]
        return "counted" if bad else "harmless"

    def forge(self, rng: random.Random) -> None:
        """Damages the shard and makes the manifest agree: whoever did this may give other samples, but no more."""
        contents = rng.choice(MUTATIONS)(bytearray(self.contents), rng)
        sizes = self.shard.sizes
        edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        checksums = [zlib.crc32(contents[a:b]) for a, b in pairwise(edges)]
        self.path.write_bytes(contents)
        forged = replace(self.shard, bytes=len(contents), sha256=file_sha256(self.path), checksums=checksums)
        with suppress(UserError):
            self.read(contents, forged)


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


@pytest.fixture
def targets(faces_root, talking_root, tmp_path) -> list[Target]:
    return [
        Target(faces_root, "test-000000.tar", "test", tmp_path / "faces", FaceDataModule, True),
        Target(faces_root, "val-000000.tar", "val", tmp_path / "old-faces", FaceDataModule, False),
        Target(talking_root, "test-000000.tar", "test", tmp_path / "clips", SpeechDataModule, True),
    ]


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_mutation_goes_unnoticed(targets, tmp_path, count):
    rng = random.Random(count)
    outcomes = {"refused": 0, "counted": 0, "harmless": 0}
    for i in range(count):
        target = targets[i % len(targets)]
        if i % 5 == 4 and target.shard.sizes:
            target.forge(rng)
        else:
            outcomes[target.attack(rng)] += 1
    assert outcomes["refused"] > count // 10
    assert outcomes["counted"] > count // 10
    assert outcomes["harmless"] < count // 10
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {target.path.relative_to(tmp_path) for target in targets}


@pytest.mark.parametrize("name", ["../other.tar", "/etc/passwd", "a/b.tar", "", "a\0b"])
def test_a_manifest_cannot_name_files_elsewhere(faces_root, tmp_path, name):
    raw = json.loads((faces_root / "manifest.json").read_text())
    raw["shards"][0]["file"] = name
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="is not a file of this folder"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("key", ["../face", "/face", "a/../../face", "a\0"])
def test_a_key_cannot_lead_out_of_a_folder_of_predictions(faces_root, tmp_path, key):
    raw = json.loads((faces_root / "manifest.json").read_text())
    raw["shards"][0]["keys"][0] = key
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="leads out of the folder"):
        Manifest.read(tmp_path)


def test_a_manifest_whose_counts_do_not_agree_is_refused(faces_root, tmp_path):
    for damage in ({"lengths": [1]}, {"sizes": [1 << 50] * 10}, {"sizes": [], "checksums": [1]}, {"lengths": [0] * 10}):
        raw = json.loads((faces_root / "manifest.json").read_text())
        raw["shards"][0] |= damage
        (tmp_path / "manifest.json").write_text(json.dumps(raw))
        with pytest.raises(UserError, match="not a readable manifest"):
            Manifest.read(tmp_path)


def test_a_manifest_of_before_checksums_still_reads(faces_root, tmp_path):
    raw = json.loads((faces_root / "manifest.json").read_text())
    for shard in raw["shards"]:
        del shard["sizes"], shard["checksums"]
        (tmp_path / shard["file"]).write_bytes((faces_root / shard["file"]).read_bytes())
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    new, old = (FaceDataModule(str(root), batch_size=17).loader("train") for root in (faces_root, tmp_path))
    for ours, theirs in zip(new, old, strict=True):
        assert ours.key == theirs.key
        assert torch.equal(ours.image, theirs.image)
