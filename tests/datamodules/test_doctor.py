import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save

from datamodules.columns import Column, build_column
from datamodules.doctor import Report, examine, plan_split, print_report
from datamodules.errors import UserError
from datamodules.shards import Manifest, Sample, Shard, npy_bytes, write_shard
from datamodules.stream import BatchPlan


@pytest.fixture
def talking(talking_root, tmp_path) -> Path:
    return shutil.copytree(talking_root, tmp_path / "talking")


@pytest.fixture
def faces(faces_root, tmp_path) -> Path:
    return shutil.copytree(faces_root, tmp_path / "faces")


def only(report: Report) -> str:
    """The one problem that was found."""
    assert len(report.problems) == 1, report.problems
    return report.problems[0]


def edit(root: Path, change) -> None:
    """Changes the manifest as a person with an editor would."""
    path = root / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def rewrite(root: Path, file: str, change) -> None:
    """Builds one shard anew from changed samples, with a manifest that fits: an error of the build, not of the disk."""
    raw = json.loads((root / "manifest.json").read_text())
    shard = next(Shard(**s) for s in raw["shards"] if s["file"] == file)
    from datamodules.stream import ShardReader

    reader = ShardReader(Manifest.read(root), shard)
    samples = [
        change(Sample(key, length, reader.read(i)))
        for i, (key, length) in enumerate(zip(shard.keys, shard.lengths, strict=True))
    ]
    raw["shards"] = [
        vars(write_shard(root / file, shard.split, samples)) if s["file"] == file else s for s in raw["shards"]
    ]
    (root / "manifest.json").write_text(json.dumps(raw))


def test_sound_data_are_ready(talking, faces):
    for root in (talking, faces):
        report = examine(root, batch_size=2)
        assert report.ready
        assert report.notes == []
        assert json.loads(report.as_json())["ready"] is True
    assert report.decoded == 4 * 4, "four of each shard"
    assert [(plan.split, plan.samples) for plan in report.splits] == [("train", 17), ("val", 4), ("test", 8)]
    assert examine(faces, samples=0).decoded == 29


def test_processes_below_one_are_refused(faces):
    with pytest.raises(UserError, match="--processes 0: expected at least 1"):
        examine(faces, processes=0)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_plan_is_that_of_the_stream(world, workers):
    shards = [
        Shard(f"{s}.tar", "train", 0, "", [f"{s}-{k}" for k in range(n)], [10 * s + k + 1 for k in range(n)])
        for s, n in enumerate((5, 3, 9, 6))
    ]
    owner = [s for s, shard in enumerate(shards) for _ in shard.keys]
    lengths = [length for shard in shards for length in shard.lengths]
    for split in ("train", "val"):
        ranks = [list(BatchPlan(shards, 3, shuffle=split == "train", rank=r, world=world)) for r in range(world)]
        real = [[[n for n in batch if n >= 0] for batch in rank] for rank in ranks]
        batches = [batch for rank in real for batch in rank if batch]
        opened = [
            len({owner[n] for batch in rank[w :: max(workers, 1)] for n in batch})
            for rank in real
            for w in range(max(workers, 1))
        ]
        padded = sum(len(batch) * max(lengths[n] for n in batch) for batch in batches)
        plan = plan_split(split, shards, 3, None, world, workers)
        assert {len(rank) for rank in ranks} == {plan.batches}
        assert plan.dropped == 23 - sum(map(len, batches))
        assert plan.stand_ins == sum(n < 0 for rank in ranks for batch in rank for n in batch)
        assert plan.padding == pytest.approx(1 - sum(lengths[n] for batch in batches for n in batch) / padded)
        assert plan.worker_shards == (min(opened), max(opened))


def test_a_missing_a_truncated_and_a_damaged_shard_are_named(faces):
    (faces / "val-000000.tar").unlink()
    assert only(examine(faces)).startswith(f"{faces}/val-000000.tar: missing")
    shutil.copy(faces / "train-000001.tar", faces / "val-000000.tar")
    report = examine(faces)
    assert any("val-000000.tar: " in p and "bytes, expected" in p for p in report.problems)


def test_a_flipped_bit_names_the_shard_and_the_sample(faces):
    shard = faces / "train-000001.tar"
    contents = bytearray(shard.read_bytes())
    contents[contents.index(b"IDAT", len(contents) // 2) + 8] ^= 4
    shard.write_bytes(contents)
    report = examine(faces)
    first, second = report.problems
    assert first.startswith(f"{shard}: damaged, its SHA-256")
    assert second.startswith(f"{shard}: sample 'face-")
    assert "damaged bytes" in second


def test_without_checksums_only_the_decoded_samples_are_read(faces):
    report = examine(faces, checksums=False, samples=1)
    assert report.ready
    assert report.decoded == 4


def test_an_empty_and_a_missing_split_are_refused_unless_they_are_not_used(talking):
    def change(raw):
        raw["shards"] = [shard for shard in raw["shards"] if shard["split"] != "val"]
        write_shard(talking / "test-000000.tar", "test", [])
        for shard in raw["shards"]:
            if shard["split"] == "test":
                shard.update(vars(write_shard(talking / "test-000000.tar", "test", [])))

    edit(talking, change)
    (talking / "val-000000.tar").unlink()
    report = examine(talking)
    assert [problem.split(";")[0] for problem in report.problems] == [
        f"{talking}/manifest.json: split 'val' is missing",
        f"{talking}/manifest.json: split 'test' is empty",
    ]
    assert examine(talking, splits=["train"]).ready


def test_fewer_batches_than_ranks_are_refused(talking):
    assert examine(talking, world_size=3, batch_size=2).ready
    assert "fewer batches than 4 ranks" in only(examine(talking, world_size=4, batch_size=2))
    assert "fewer batches than 4 ranks" in only(examine(talking, world_size=4, frames_per_batch=60))


def test_keys_in_two_splits_are_refused(faces):
    rewrite(faces, "test-000000.tar", lambda sample: sample._replace(key=sample.key.replace("-03", "-02")))
    report = examine(faces)
    assert len(report.problems) == 4
    assert "test-000000.tar: key 'face-020' is also in val-000000.tar of split 'val'" in report.problems[0]


def test_a_mesh_of_another_topology_and_vertices_that_are_not_numbers_are_refused(talking):
    def other(sample: Sample) -> Sample:
        if sample.key != "carla-031":
            return sample
        return sample._replace(members=sample.members | {"offsets.npy": npy_bytes(np.zeros((19, 5, 3), np.float16))})

    rewrite(talking, "val-000000.tar", other)
    assert "val-000000.tar: sample 'carla-031' cannot be used (wrong topology" in only(examine(talking))

    def broken(sample: Sample) -> Sample:
        offsets = np.full((sample.length, 12, 3), np.nan, np.float16)
        return sample._replace(members=sample.members | {"offsets.npy": npy_bytes(offsets)})

    rewrite(talking, "val-000000.tar", broken)
    report = examine(talking)
    assert len(report.problems) == 3
    assert "sample 'carla-030' cannot be used (vertices are not finite)" in report.problems[0]


def test_a_sample_without_a_member_is_refused_although_it_is_not_decoded(faces):
    def change(sample: Sample) -> Sample:
        if sample.key != "face-003":
            return sample
        return sample._replace(members={name: sample.members[name] for name in ("png", "json")})

    rewrite(faces, "train-000000.tar", change)
    problem = only(examine(faces, samples=2))
    assert problem.endswith("sample 'face-003' has the members json, png, the others json, mask.png, png")


def test_labels_that_do_not_fit_the_manifest_are_refused(talking, faces):
    edit(talking, lambda raw: raw["fields"].update(train_subjects=["anna"], controls=["open"]))
    report = examine(talking)
    assert any("subject 'bert' is not among the manifest's train_subjects" in p for p in report.problems)
    assert any("2 rig controls, but the manifest names 1" in p for p in report.problems)
    edit(faces, lambda raw: raw["fields"].update(attributes=["Male"]))
    assert any("3 attributes, but the manifest names 1" in p for p in examine(faces).problems)
    edit(faces, lambda raw: raw["fields"].pop("size"))
    assert any("manifest.json: field 'size' is missing" in p for p in examine(faces).problems)


def test_what_lies_beside_the_shards_is_examined(talking):
    (talking / "templates.safetensors").rename(talking / "moved")
    assert any(f"{talking}/templates.safetensors: missing" in problem for problem in examine(talking).problems)
    (talking / "moved").rename(talking / "templates.safetensors")
    edit(talking, lambda raw: raw["files"].clear())
    topology = load_file(talking / "topology.safetensors")
    (talking / "topology.safetensors").write_bytes(
        save({**topology, "lips": np.array([0, 12], np.int32), "upper_face": np.zeros(0, np.int32)})
    )
    report = examine(talking)
    assert sorted(problem.rpartition(": ")[2] for problem in report.problems) == [
        "'lips' names vertex 12, but meshes have 12",
        "'upper_face' is empty",
    ]
    (talking / "topology.safetensors").write_bytes(b"")
    assert "topology.safetensors: cannot be read" in only(examine(talking))


def test_sound_of_another_length_and_millimetres_are_noted(talking):
    edit(talking, lambda raw: raw["fields"].update(fps=60))
    notes = examine(talking, samples=1).notes
    assert not any("s of sound" in note for note in notes), "they differ by less than half a second"
    edit(talking, lambda raw: raw["fields"].update(fps=10))
    assert any("s of sound, but 1.50 s of mesh at 10 fps" in note for note in examine(talking, samples=1).notes)
    templates = {name: 1000 * vertices for name, vertices in load_file(talking / "templates.safetensors").items()}
    (talking / "templates.safetensors").write_bytes(save(templates))
    assert any("are its vertices in metres?" in note for note in examine(talking, samples=1).notes)


def test_columns_are_examined_too(talking):
    column = Column("loud", "speech", "path:a", "abc", "interpolate", 30, "float32")
    build_column(Manifest.read(talking), column, lambda shard: [np.zeros((n, 2)) for n in shard.lengths], processes=1)
    report = examine(talking)
    assert report.ready
    assert report.columns == ["loud"]
    tar = talking / "val-000000.loud.tar"
    contents = bytearray(tar.read_bytes())
    contents[700] ^= 1
    tar.write_bytes(contents)
    assert only(examine(talking)).startswith(f"{tar}: damaged")
    tar.unlink()
    assert only(examine(talking)).startswith(f"{tar}: missing")


def test_files_that_nothing_lists_are_noted(faces):
    (faces / "train-000009.tar.tmp").write_bytes(b"")
    report = examine(faces)
    assert report.ready
    assert report.notes == [f"{faces}: files that nothing lists: train-000009.tar.tmp"]


def test_nothing_is_written(talking):
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in talking.iterdir()}
    examine(talking)
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in talking.iterdir()} == before


def test_the_report_is_readable(talking):
    (talking / "val-000000.tar").unlink()
    out = io.StringIO()
    print_report(examine(talking, batch_size=2, world_size=2, workers=1), Console(file=out, width=120))
    text = out.getvalue()
    assert "Plan: 2 ranks x 1 workers, 2 samples a batch" in text
    assert f"problem  {talking}/val-000000.tar: missing" in text
    assert text.rstrip().endswith("not ready")


def test_arguments_out_of_range_are_refused(talking):
    with pytest.raises(UserError, match="--world-size 0"):
        examine(talking, world_size=0)
    with pytest.raises(UserError, match="no such data folder"):
        examine(talking / "nowhere")
