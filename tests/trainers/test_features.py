import shutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from datamodules.speech import SpeechDataModule
from trainers import backbones
from trainers.features import write_features
from trainers.nets.speech_encoder import SpeechEncoder
from trainers.speech.faceformer import FaceFormer
from trainers.speech.voca import VOCA

CONFIG = {
    "conv_dim": [8] * 7,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
}
ALIGNMENTS = ("native", "interpolate", "pairs")


def write_encoder(path: Path, seed: int) -> str:
    torch.manual_seed(seed)
    init = {"config": CONFIG, "classes": ["sil", "m", "h"]}
    backbones.save(SpeechEncoder(**init), path, "speech", init, {})
    return f"path:{path}"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "encoder.safetensors", 0)


@pytest.fixture(scope="module")
def root(talking_root, encoder, tmp_path_factory) -> str:
    """Talking heads at 25 frames per second, as pairs want it, with columns of each alignment and one of half."""
    root = shutil.copytree(talking_root, tmp_path_factory.mktemp("columns") / "talking")
    manifest = root / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"fps": 30', '"fps": 25'))
    for alignment in ALIGNMENTS:
        write_features(root, encoder, alignment=alignment, precision="float32", processes=1)
    write_features(root, encoder, alignment="interpolate", name="half", processes=1)
    return str(root)


def batch_of(root: str, *columns: str, size: int = 6):
    return next(iter(SpeechDataModule(root, batch_size=size, columns=list(columns)).loader("train")))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_a_column_equals_what_is_computed_online(root, encoder, alignment):
    network, name = backbones.load(encoder, "speech"), f"encoder-{alignment}"
    for batch in SpeechDataModule(root, batch_size=1, columns=[name]).loader("train"):
        with torch.no_grad():
            states, lengths = network(batch.audio, batch.audio_lengths, alignment, batch.lengths)
        assert torch.equal(batch.features[name], states)
        assert torch.equal(batch.feature_lengths[name], lengths)


def test_half_precision_is_the_same_rounded(root):
    batch = batch_of(root, "encoder-interpolate", "half")
    exact, half = batch.features["encoder-interpolate"], batch.features["half"]
    assert torch.equal(half, exact.half().float())
    assert not torch.equal(half, exact)


def losses(system, root: str, folder: Path, *columns: str) -> list[float]:
    """The training loss of each step of two epochs, from the same seed."""

    class Record(pl.Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_train_batch_end(self, trainer, module, outputs, *args) -> None:
            self.losses.append(float(outputs["loss"]))

    record = Record()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, limit_val_batches=0, use_distributed_sampler=False, enable_checkpointing=False,
        callbacks=[record],
    )  # fmt: skip
    pl.seed_everything(0)
    trainer.fit(system, datamodule=SpeechDataModule(root, batch_size=3, columns=list(columns)))
    return record.losses


def faceformer(encoder: str, **changes) -> FaceFormer:
    torch.manual_seed(0)
    settings = {"num_vertices": 12, "subjects": ["anna", "bert"], "encoder": encoder, "dim": 16, "period": 4}
    return FaceFormer(**{**settings, "unit": 0.01, "lr": 0.01, "train_encoder": "none", **changes})


def voca(encoder: str) -> VOCA:
    torch.manual_seed(0)
    return VOCA(num_vertices=12, subjects=["anna", "bert"], encoder=encoder, components=4, windows=8, unit=0.01)


@pytest.mark.parametrize(
    ("make", "column"),
    [
        (faceformer, "encoder-interpolate"),
        (lambda encoder: faceformer(encoder, alignment="pairs"), "encoder-pairs"),
        (voca, "encoder-native"),
    ],
    ids=["faceformer", "faceformer-pairs", "voca"],
)
def test_training_with_the_column_gives_the_losses_of_training_without(
    root, encoder, tmp_path, monkeypatch, make, column
):
    online = losses(make(encoder), root, tmp_path)
    model = make(encoder)

    def refuse(*args, **kwargs):
        raise AssertionError("the encoder was run although the data gives its states")

    monkeypatch.setattr(model.encoder, "convolve", refuse)
    stored = losses(model, root, tmp_path, column)
    assert len(online) == len(stored) == 4
    assert stored == pytest.approx(online, rel=1e-4)

    batch = batch_of(root, column)
    with torch.no_grad():
        from_column = model.eval().animate(batch)
        monkeypatch.undo()
        batch.features = {}
        computed = model.animate(batch)
    torch.testing.assert_close(from_column[batch.frame_mask], computed[batch.frame_mask], rtol=0, atol=1e-5)


def test_a_column_of_other_weights_or_alignment_is_one_clear_error(root, encoder, tmp_path):
    other = write_encoder(tmp_path / "other.safetensors", 1)
    with pytest.raises(UserError, match=r"'encoder-interpolate' is of path:.*, but the system needs path:.*other"):
        losses(faceformer(other), root, tmp_path, "encoder-interpolate")
    with pytest.raises(UserError, match=r"'encoder-native' is of .* native, but the system needs .* interpolate"):
        losses(faceformer(encoder), root, tmp_path, "encoder-native")


def test_the_same_weights_under_another_path_fit(root, encoder, tmp_path):
    copy = tmp_path / "copy.safetensors"
    shutil.copy(encoder.removeprefix("path:"), copy)
    model = faceformer(f"path:{copy}")
    losses(model, root, tmp_path, "encoder-native", "encoder-interpolate")
    assert model._column == "encoder-interpolate"


def test_images_have_columns_too(faces_root, tiny, tmp_path):
    root = shutil.copytree(faces_root, tmp_path / "faces")
    column = write_features(root, tiny["identity"], precision="float32", processes=1)
    assert (column.name, column.kind, column.dims) == ("identity", "identity", [8])
    network = backbones.load(tiny["identity"], "identity")
    for batch in FaceDataModule(str(root), batch_size=5, columns=["identity"]).loader("test"):
        with torch.no_grad():
            torch.testing.assert_close(batch.features["identity"], network(batch.image), rtol=0, atol=1e-5)


def test_a_backbone_that_does_not_read_the_data_is_refused(root, faces_root, tiny):
    with pytest.raises(UserError, match=r"kind 'generator', but .* holds faces, read by kinds identity"):
        write_features(faces_root, tiny["generator"])
    with pytest.raises(UserError, match="weights of kind 'identity', expected 'speech'"):
        write_features(root, tiny["identity"])
    with pytest.raises(UserError, match="give --kind"):
        write_features(faces_root, "hub:somewhere/something")


def test_a_sample_that_cannot_be_used_is_named(talking_root, encoder, tmp_path):
    root = shutil.copytree(talking_root, tmp_path / "talking")
    shard = root / "val-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"RIFF", b"XXXX", 1))
    with pytest.raises(UserError, match=r"val-000000\.tar: sample 'carla-030': damaged bytes"):
        write_features(root, encoder, processes=1)


def test_transcripts_and_images_through_clip(talking_root, faces_root, clip_folder, tmp_path):
    spec = f"path:{clip_folder}"
    clip = backbones.load(spec, "clip")
    for source, module in ((talking_root, SpeechDataModule), (faces_root, FaceDataModule)):
        root = shutil.copytree(source, tmp_path / module.__name__)
        write_features(root, spec, kind="clip", name="clip", precision="float32", processes=1)
        batch = next(iter(module(str(root), batch_size=2, columns=["clip"]).loader("train")))
        with torch.no_grad():
            expected = (
                clip.encode_text(batch.transcript) if hasattr(batch, "transcript") else clip.encode_image(batch.image)
            )
        torch.testing.assert_close(batch.features["clip"], expected)
