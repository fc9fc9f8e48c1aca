import json

from datamodules.shards import Manifest, Sample, write_shard
from sweeps.people import people


def make(labels):
    return [Sample(key, 1, {"json": json.dumps(value).encode(), "txt": b"x"}) for key, value in labels.items()]


def test_subject_or_identity_of_each_sample(tmp_path):
    labels = {"a": {"subject": "F1"}, "b": {"identity": 7}, "c": {"caption": "nobody"}}
    shards = [
        write_shard(tmp_path / "test-000000.tar", "test", make(labels)),
        write_shard(tmp_path / "train-000000.tar", "train", make({"d": {"subject": "F2"}})),
    ]
    assert people(Manifest(tmp_path, "words", "test", {}, shards), "test") == {"a": "F1", "b": "7"}
