import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from datamodules.errors import UserError
from trainers import backbones


class Doubler(nn.Module):
    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 2.0))


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    monkeypatch.setattr(backbones, "_class", lambda kind: Doubler)


def test_what_is_saved_is_loaded_frozen(tmp_path):
    path = tmp_path / "a.safetensors"
    backbones.save(Doubler(3), path, "identity", {"size": 3}, {"commit": "abc"})
    network = backbones.load(f"path:{path}", "identity")
    assert network.weight.tolist() == [2.0, 2.0, 2.0]
    assert not network.training
    assert not network.weight.requires_grad
    assert backbones.card(f"path:{path}") == {"commit": "abc"}


def test_weights_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    backbones.save(Doubler(), path, "identity", {}, {})
    with pytest.raises(UserError, match="weights of kind 'identity', expected 'attributes'"):
        backbones.load(f"path:{path}", "attributes")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    backbones.save(Doubler(3), path, "identity", {"size": 2}, {})
    with pytest.raises(UserError, match="do not fit their description"):
        backbones.load(f"path:{path}", "identity")


def test_what_cannot_be_had_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="no such weights; demo weights here"):
        backbones.load("demo:nothing", "identity")
    with pytest.raises(UserError, match="train it with 'facebench fit'"):
        backbones.load(f"path:{tmp_path / 'a'}", "identity")
    with pytest.raises(UserError, match="expected demo:<name>"):
        backbones.load("resnet", "identity")


def test_a_file_cannot_name_code_to_run(tmp_path):
    path = tmp_path / "a.safetensors"
    metadata = {"kind": "os:system", "init": {"command": "true"}, "card": {}}
    save_file({"weight": torch.zeros(2)}, path, metadata={"facebench": json.dumps(metadata)})
    with pytest.raises(UserError, match="weights of kind 'os:system'"):
        backbones.load(f"path:{path}", "identity")


def test_a_pickle_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not weights written by facebench"):
        backbones.load(f"path:{path}", "identity")


def test_the_judge_must_not_be_the_guide(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        network = Doubler()
        nn.init.constant_(network.weight, value)
        backbones.save(network, tmp_path / f"{name}.safetensors", "identity", {}, {})
    backbones.check_judge(f"path:{tmp_path / 'a.safetensors'}", f"path:{tmp_path / 'c.safetensors'}")
    with pytest.raises(UserError, match="judge with another"):
        backbones.check_judge(f"path:{tmp_path / 'a.safetensors'}", f"path:{tmp_path / 'b.safetensors'}")


def test_a_hub_judge_is_known_by_its_weights(monkeypatch):
    networks = {}
    monkeypatch.setattr(backbones, "load", lambda spec, kind: networks[spec])
    for name in ("a", "b", "c"):
        torch.manual_seed(0)
        networks[f"hub:{name}"] = torch.nn.Linear(2, 3)
    networks["hub:c"].bias.data[1] += 1e-6
    networks["hub:dlib"] = torch.nn.Identity()
    hashes = [backbones.judge_hash(f"hub:{name}", "clip") for name in ("a", "b", "c")]
    assert hashes[0] == hashes[1] != hashes[2]
    assert len(hashes[0]) == 64
    assert backbones.judge_hash("hub:dlib", "landmarks") == "hub:dlib"
