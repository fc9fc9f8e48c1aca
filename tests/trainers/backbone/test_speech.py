import pytest
import pytorch_lightning as pl
import torch

from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers import backbones
from trainers.backbone.speech import IGNORED, SpeechTraining

ENCODER = {
    "conv_dim": [16] * 7,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
}


def training(**changes) -> SpeechTraining:
    torch.manual_seed(0)
    settings = {"encoder": ENCODER, "phonemes": ["sil", "m", "a"], "merge": {"n": "m"}, "lr": 3e-3}
    return SpeechTraining(**{**settings, **changes})


def first_batch(root):
    return next(iter(SpeechDataModule(str(root), batch_size=2).loader("train")))


def test_targets_follow_the_phoneme_times(talking_root) -> None:
    batch = first_batch(talking_root)
    batch.phonemes = [[("a", 0.1, 0.2), ("n", 0.2, 0.24)], [("?", 0.0, 0.05)]]
    targets = training().targets(batch, torch.tensor([14, 6]))
    # Frames stand for 12.5, 32.5, 52.5 ... milliseconds.
    assert targets[0].tolist() == [0] * 5 + [2] * 5 + [1] * 2 + [0] * 2
    assert targets[1].tolist() == [IGNORED] * 2 + [0] * 4 + [IGNORED] * 8


def test_targets_of_a_faster_clip_come_earlier(talking_root) -> None:
    batch = first_batch(talking_root)
    batch.phonemes = [[("a", 0.1, 0.2)], []]
    targets = training().targets(batch, torch.tensor([14, 6]), speed=2.0)
    assert targets[0].tolist() == [0] * 2 + [2] * 3 + [0] * 9


def test_classes_must_hold_silence_and_the_ends_of_merges() -> None:
    with pytest.raises(UserError, match="'sil' is missing"):
        training(phonemes=["m", "a"])
    with pytest.raises(UserError, match="'o' is missing"):
        training(merge={"ɔ": "o"})


def test_it_learns_and_exports(talking_root, tmp_path) -> None:
    model = training(phonemes=["sil", "m", "h"], merge={}, speed=0.0)
    data = SpeechDataModule(str(talking_root), batch_size=3)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=40, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, log_every_n_steps=1, use_distributed_sampler=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    batch = next(iter(data.loader("train")))
    logits, lengths = model.eval().network.logits(batch.audio, batch.audio_lengths)
    targets = model.targets(batch, lengths)
    right = logits.argmax(-1).eq(targets)[targets != IGNORED]
    assert right.float().mean() > 0.9

    model.export(tmp_path / "speech.safetensors", {"scores": {}})
    loaded = backbones.load(f"path:{tmp_path}/speech.safetensors", "speech")
    assert loaded.classes == ["sil", "m", "h"]
    assert torch.equal(loaded.logits(batch.audio, batch.audio_lengths)[0], logits)
