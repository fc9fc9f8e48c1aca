import numpy as np
import pytest
import torch

from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers.cli import RunCLI
from trainers.predictions import read_description, read_vertices
from trainers.tasks import load_system


def test_predict_writes_what_the_system_gives(voca_config, talking_root, tmp_path):
    run = tmp_path / "run"
    command = ["--config", str(voca_config), "--run", str(run)]
    RunCLI(["fit", *command, "--trainer.max_epochs", "1"])
    RunCLI(["predict", *command])
    description = read_description(run / "predictions", "speech-to-mesh")
    data = SpeechDataModule(str(talking_root), batch_size=1)
    assert description["keys"] == [key for shard in data.manifest.split("test") for key in shard.keys]
    assert description["data"] == data.manifest.sha256
    assert description["unseen"] == "fixed:0"
    assert description["throughput"] > 0

    system = load_system(run / "checkpoints" / "last.ckpt")
    for batch in data.loader("test"):
        with torch.inference_mode():
            expected = system.animate(batch)[0]
        np.testing.assert_allclose(read_vertices(run / "predictions", batch.key[0]), expected, atol=1e-6)


def test_unfinished_and_other_predictions_are_refused(tmp_path):
    with pytest.raises(UserError, match="not a folder of finished predictions"):
        read_description(tmp_path)
    (tmp_path / "predictions.json").write_text('{"task": "face-editing"}')
    with pytest.raises(UserError, match="predictions of task 'face-editing', expected 'speech-to-mesh'"):
        read_description(tmp_path, "speech-to-mesh")
    with pytest.raises(UserError, match="no prediction for clip 'a'"):
        read_vertices(tmp_path, "a")
