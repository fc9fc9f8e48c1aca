import io
import json

import numpy as np
import pytest
from PIL import Image

from datamodules.doctor import examine
from datamodules.errors import UserError
from datamodules.head import Head
from datamodules.kinds import open_data
from datamodules.prompts import PromptDataModule
from datamodules.show import write_sheet
from datamodules.sources import tead


def test_pictures_labels_and_controls_come_back(prompts_root):
    batch = open_data(prompts_root, batch_size=4).whole("train")
    assert len(batch) == 8
    assert batch.text[5] == "sad prompt 5"
    assert batch.emotion.tolist() == [0, 1] * 4
    units = Head.load().units
    moved = {units[i]: batch.weights[5, i].item() for i in batch.weights[5].nonzero()[:, 0]}
    assert moved == {"browInnerUp": 1.0, "mouthFrownLeft": 0.5}
    assert batch.image[5, :, [0, 15, 31], 0].tolist() == [[1.0, -1.0, 1.0]] * 3
    assert batch.captions[5] == ["caption 5"]
    assert batch.real.all()


def test_prompts_without_pictures(tmp_path):
    line = {"text": "a glad face", "emotion": "happy", "aus": {}, "blendshapes": {"open": 0.25}, "split": "train"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    tead.build(tmp_path / "a.jsonl", tmp_path / "out", processes=1)
    batch = PromptDataModule(str(tmp_path / "out"), batch_size=1).whole("train")
    assert batch.text == ["a glad face"]
    assert batch.weights.tolist() == [[0.25]]
    assert not batch.image.numel()
    assert write_sheet(tmp_path / "out", "train", 1, tmp_path / "sheet.png").cards[0].facts["controls"] == "open 0.25"


def test_the_doctor_and_the_sheet_know_prompts(prompts_root, tmp_path):
    assert examine(str(prompts_root), splits=["train", "test"], processes=1).ready
    sheet = write_sheet(prompts_root, "train", 2, tmp_path / "sheet.png")
    moved = "browInnerUp 1.00, mouthFrownLeft 0.50"
    assert sheet.cards[1].facts == {"prompt": "sad prompt 7", "emotion": "sad", "controls": moved}
    assert (sheet.cards[1].picture == 255).all()


@pytest.mark.parametrize(
    ("member", "contents", "message"),
    [
        ("weights.npy", np.zeros(3, np.float32), "wrong rig controls"),
        ("json", {"text": "", "emotion": "bored"}, "unknown emotion"),
    ],
)
def test_wrong_samples_are_named(prompts_root, member, contents, message):
    data = open_data(prompts_root)
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "png")
    array = io.BytesIO()
    np.save(array, np.zeros(52, np.float32))
    members = {"json": b'{"text": "", "emotion": "sad"}', "weights.npy": array.getvalue(), "png": buffer.getvalue()}
    data.decode("key", members)
    if isinstance(contents, dict):
        members[member] = json.dumps(contents).encode()
    else:
        array = io.BytesIO()
        np.save(array, contents)
        members[member] = array.getvalue()
    with pytest.raises(Exception, match=message):
        data.decode("key", members)


def test_other_kinds_are_refused(faces_root):
    with pytest.raises(UserError, match="holds 'faces', expected 'expression-prompts'"):
        PromptDataModule(str(faces_root), batch_size=1)
