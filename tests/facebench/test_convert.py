import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from facebench.__main__ import main
from trainers import backbones
from trainers.animation import Conditions, request
from trainers.nets.speech_encoder import SpeechEncoder
from trainers.tasks import load_system

GOLDENS = Path(os.environ.get("FACEBENCH_GOLDENS", Path(__file__).parents[3] / "shared" / "parity"))
golden = pytest.mark.skipif(not GOLDENS.is_dir(), reason="no outputs of official code; set FACEBENCH_GOLDENS")


def convert(config, weights, run):
    return main(["convert", "--config", str(config), "--weights", str(weights), "--run", str(run)])


def write_config(path, **changes):
    """FaceFormer at the size of its recorded outputs, on an encoder of random weights."""
    sizes = json.loads((GOLDENS / "faceformer_vocaset" / "config.json").read_text())
    encoder = path.parent / "encoder.safetensors"
    backbones.save(
        SpeechEncoder(sizes["wav2vec2"]), encoder, "speech", {"config": sizes["wav2vec2"]}, {"name": "random"}
    )
    arguments = {
        "num_vertices": sizes["vertice_dim"] // 3,
        "subjects": [str(i) for i in range(sizes["n_train_subjects"])],
        "encoder": f"path:{encoder}",
        "dim": sizes["feature_dim"],
    }
    model = {"class_path": "trainers.speech.faceformer.FaceFormer", "init_args": arguments | changes}
    path.write_text(yaml.safe_dump({"model": model, "trainer": {"max_epochs": 100}}))
    return path


@golden
@pytest.mark.parametrize("wrapped", [False, True])
def test_official_weights_give_the_official_animation(tmp_path, wrapped):
    folder = GOLDENS / "faceformer_vocaset"
    weights = folder / "weights.safetensors"
    if wrapped:
        state = {f"module.{name}": value for name, value in load_file(weights).items()}
        weights = tmp_path / "official.pth"
        torch.save({"state_dict": state}, weights)
    assert convert(write_config(tmp_path / "config.yaml"), weights, tmp_path / "run") == 0
    system = load_system(tmp_path / "run" / "checkpoints" / "last.ckpt")
    io = load_file(folder / "io.safetensors")
    subject = Conditions(subject=str(int(io["one_hot"].argmax())))
    clip = request(system, "clip", io["audio"][0].numpy(), io["template"].reshape(-1, 3), 30, subject)
    frames = io["predict"].shape[1]
    clip = replace(clip, vertices=clip.vertices[:, :1].expand(-1, frames, -1, -1), lengths=torch.tensor([frames]))
    with torch.no_grad():
        torch.testing.assert_close(system.animate(clip).flatten(2), io["predict"], rtol=1e-4, atol=1e-5)


@golden
def test_mistakes_are_clear_errors(tmp_path, capsys):
    config = write_config(tmp_path / "config.yaml")
    weights = GOLDENS / "faceformer_vocaset" / "weights.safetensors"

    def refused(config, weights, run=tmp_path / "new"):
        assert convert(config, weights, run) == 2
        assert not (tmp_path / "new").exists()
        return capsys.readouterr().err

    assert "is there already" in refused(config, weights, tmp_path)
    assert "no such file" in refused(config, tmp_path / "none.pth")
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"no tensors")
    assert "not a readable safetensors file" in refused(config, other)
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "module.pth")
    assert "could run code" in refused(config, tmp_path / "module.pth")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "numbers.pth")
    assert "names with tensors" in refused(config, tmp_path / "numbers.pth")
    torch.save({"strange.weight": torch.zeros(1)}, tmp_path / "strange.pth")
    assert "not the official weights" in refused(config, tmp_path / "strange.pth")
    assert "not the official weights" in refused(write_config(tmp_path / "small.yaml", dim=16), weights)
    (tmp_path / "empty.yaml").write_text("trainer: {}")
    assert "section 'model'" in refused(tmp_path / "empty.yaml", weights)
    cstalk = Path(__file__).parents[2] / "configs" / "demo" / "cstalk.yaml"
    assert "no official weights in one file" in refused(cstalk, weights)
