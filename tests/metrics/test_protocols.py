import copy

import pytest
import yaml

from datamodules.errors import UserError
from metrics.protocols import FOLDER, Protocol, available, region_hash

REGIONS = {"lips": [3, 1], "upper_face": [0], "upper_lip_inner": [1], "lower_lip_inner": [3]}


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


def test_id_needs_every_choice():
    protocol = Protocol.read("demo-speech")
    with pytest.raises(UserError, match=r"regions.lips.sha256.* not bound"):
        _ = protocol.id
    bound = protocol.bind_regions(REGIONS)
    assert bound.id.startswith("demo-speech-")
    assert bound.bind_regions({**REGIONS, "lips": [1, 3]}).id == bound.id  # a region is a set
    assert Protocol.read("demo-speech").bind_regions(REGIONS).id == bound.id


def test_id_changes_with_every_choice_but_not_with_words(tmp_path):
    bound = Protocol.read("demo-speech").bind_regions(REGIONS)

    def id_after(change):
        return Protocol.read(written(tmp_path, change)).bind_regions(REGIONS).id

    assert id_after(lambda spec: spec.update(description="other words")) == bound.id
    assert id_after(lambda spec: spec["metrics"]["mve"].update(title="other words")) == bound.id
    assert id_after(lambda spec: spec.update(fps=25)) != bound.id
    assert id_after(lambda spec: spec["metrics"]["mve"].update(pooling="clips")) != bound.id
    other = Protocol.read("demo-speech").bind_regions({**REGIONS, "lips": [1, 2]})
    assert other.id != bound.id


def test_bind_refuses_another_value():
    bound = Protocol.read("demo-speech").bind_regions(REGIONS)
    with pytest.raises(UserError, match=r"regions.lips.sha256 is .* but .* was used"):
        bound.bind_regions({**REGIONS, "lips": [2]})
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
        (lambda spec: spec.update(task="cooking"), "task must be one of"),
    ],
)
def test_open_choices_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        Protocol.read(written(tmp_path, change))


def test_unknown_name():
    with pytest.raises(UserError, match="not known and not a file; known: demo-editing, demo-speech"):
        Protocol.read("codetalker")


def test_region_hash_is_that_of_the_sorted_set():
    assert region_hash([3, 1, 1]) == region_hash([1, 3]) != region_hash([1, 2])
