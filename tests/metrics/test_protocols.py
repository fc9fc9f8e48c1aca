import copy

import numpy as np
import pytest
import yaml

from datamodules.errors import UserError
from metrics.protocols import FOLDER, Protocol, available, read_region, region_hash

REGIONS = {"lips": [3, 1], "upper_face": [0], "upper_lip_inner": [1], "lower_lip_inner": [3]}


MEE = {"measure": "mean_estimate_error", "variant": "l2", "over_vertices": "max", "region": "lips"}
HALVES = {
    "samples": 3,
    "primary": "d",
    "metrics": {"d": {"measure": "sample_diversity", "pairing": "halves", "shuffle_seed": 0, "pooling": "clips"}},
}


def written(tmp_path, change):
    spec = yaml.safe_load((FOLDER / "demo-speech.yaml").read_text())
    change(spec)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.mark.parametrize("name", available())
def test_shipped_protocols_are_complete(name):
    protocol = Protocol.read(name)
    assert protocol.name == name
    assert all(metric["title"] and metric["description"] for metric in protocol.metrics.values())


JUDGES = {"judges.motion.sha256": "0"}


def test_id_needs_every_choice():
    protocol = Protocol.read("demo-speech")
    with pytest.raises(UserError, match=r"regions.lips.sha256.* not bound"):
        _ = protocol.id
    bound = protocol.bind_regions(REGIONS).bind(JUDGES)
    assert bound.id.startswith("demo-speech-")
    assert bound.bind_regions({**REGIONS, "lips": [1, 3]}).id == bound.id  # a region is a set
    assert Protocol.read("demo-speech").bind_regions(REGIONS).bind(JUDGES).id == bound.id


def test_id_changes_with_every_choice_but_not_with_words(tmp_path):
    bound = Protocol.read("demo-speech").bind_regions(REGIONS).bind(JUDGES)

    def id_after(change):
        return Protocol.read(written(tmp_path, change)).bind_regions(REGIONS).bind(JUDGES).id

    assert id_after(lambda spec: spec.update(description="other words")) == bound.id
    assert id_after(lambda spec: spec["metrics"]["mve"].update(title="other words")) == bound.id
    assert id_after(lambda spec: spec.update(fps=25)) != bound.id
    assert id_after(lambda spec: spec["metrics"]["mve"].update(pooling="clips")) != bound.id
    other = Protocol.read("demo-speech").bind_regions({**REGIONS, "lips": [1, 2]}).bind(JUDGES)
    assert other.id != bound.id


def test_bind_refuses_another_value():
    bound = Protocol.read("demo-speech").bind_regions(REGIONS)
    with pytest.raises(UserError, match=r"regions.lips.sha256 is .* but .* was used"):
        bound.bind_regions({**REGIONS, "lips": [1, 2]})
    with pytest.raises(UserError, match=r"no field 'judges\.smell'"):
        bound.bind({"judges.smell": "x"})


def test_binding_leaves_the_original_alone():
    protocol = Protocol.read("demo-speech")
    before = copy.deepcopy(protocol.spec)
    protocol.bind_regions(REGIONS)
    assert protocol.spec == before


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ({**REGIONS, "lips": []}, "region 'lips': empty"),
        ({**REGIONS, "lips": [3689]}, "index 3689, but the mesh has 3689 vertices"),
        ({**REGIONS, "lips": [-1, 2]}, "index -1, but the mesh has 3689 vertices"),
        ({"lips": [1]}, "needs region 'upper_face', the data has lips"),
    ],
)
def test_bad_regions(regions, message):
    with pytest.raises(UserError, match=message):
        Protocol.read("demo-speech").bind_regions(regions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.pop("fps"), "fps missing"),
        (lambda spec: spec["metrics"]["mve"].pop("pooling"), "metrics.mve.pooling missing"),
        (lambda spec: spec["metrics"]["mve"].update(measure="eve"), "metrics.mve.measure must be one of"),
        (lambda spec: spec.update(primary="eve"), "primary is 'eve'"),
        (lambda spec: spec.update(length_mismatch="pad"), "length_mismatch is 'pad', expected one of"),
        (lambda spec: spec["metrics"]["lve_l2"].update(region="ears"), "'ears', not among regions"),
        (lambda spec: spec["metrics"]["lve_l2"].update(variant="l1"), "variant is 'l1', expected one of squared, l2"),
        (lambda spec: spec["metrics"]["fdd_abs"].update(pooling="frames"), "'frames', expected one of clips"),
        (lambda spec: spec["metrics"]["mve"].update(MEE), "needs several samples a clip, but samples is 1"),
        (lambda spec: spec.update(HALVES), "pairs two halves, but samples is 3"),
        (lambda spec: spec.update(single_sample=1), "single_sample is 1, expected less than samples"),
        (lambda spec: spec.update(unit="normalised"), "coordinates m can't be given in normalised"),
        (lambda spec: spec["regions"].update(lips={"sha256": None}), "regions.lips must give count and sha256"),
        (lambda spec: spec.update(task="cooking"), "task must be one of"),
        (lambda spec: spec.pop("split"), "split missing"),
        (lambda spec: spec.update(jobs=3), "'jobs' is not known and would change nothing"),
        (lambda spec: spec["metrics"]["mve"].update(region="lips"), "metrics.mve: 'region' is not known"),
    ],
)
def test_open_choices_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        Protocol.read(written(tmp_path, change))


def test_unknown_name():
    with pytest.raises(UserError, match=r"not known and not a file; known: .*codetalker-biwi, .*demo-speech"):
        Protocol.read("codetalker-vocaset")


def test_region_hash_is_that_of_the_sorted_set():
    assert region_hash([3, 1, 1]) == region_hash([1, 3]) != region_hash([1, 2])


def test_regions_are_counted():
    bound = Protocol.read("demo-speech").bind_regions({**REGIONS, "lips": [3, 1, 1]})
    assert bound.spec["regions"]["lips"] == {"count": 2, "sha256": region_hash([1, 3])}


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("codetalker-biwi", {"lips": 4996, "upper_face": 7784}),
        ("facediffuser-biwi", {"lips": 4996, "upper_face": 7784}),
        ("faceformer-vocaset", {"lips": 428, "upper_face": 1501}),
        ("probtalk3d-3dmead", {"lips": 428, "upper_face": 1501}),
        ("meshtalk", {"lips": 1438}),
        ("unitalker", {"lips": None}),
        ("facexhubert-biwi", {}),
    ],
)
def test_official_regions_are_counted_and_not_shipped(name, counts):
    regions = Protocol.read(name).spec["regions"]
    assert regions == {region: {"count": count, "sha256": None} for region, count in counts.items()}


def test_region_files(tmp_path):
    (tmp_path / "lve.txt").write_text("3, 1,2\n")
    np.save(tmp_path / "fdd.npy", np.array([4, 5]))
    assert read_region("lips", tmp_path / "lve.txt").tolist() == [3, 1, 2]
    assert read_region("upper_face", tmp_path / "fdd.npy").tolist() == [4, 5]


@pytest.mark.parametrize(
    ("name", "content"), [("gone.txt", None), ("words.txt", "lips, 2"), ("empty.txt", ""), ("text.npy", "1, 2")]
)
def test_bad_region_files(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"region 'lips': .*{name} gives no vertex indices"):
        read_region("lips", tmp_path / name)
    np.save(tmp_path / "weights.npy", np.array([0.1, 0.9]))
    with pytest.raises(UserError, match=r"holds float64 of shape \(2,\), expected a list of vertex indices"):
        read_region("lips", tmp_path / "weights.npy")
