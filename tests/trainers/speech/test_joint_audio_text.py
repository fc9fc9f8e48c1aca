from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers import backbones
from trainers.backbone.text import word_tokenizer
from trainers.nets.text_encoder import TextEncoder
from trainers.speech.joint_audio_text import Fusion, JointAudioText


@pytest.fixture(scope="module")
def text_backbone(tmp_path_factory) -> str:
    tokenizer = word_tokenizer(["a hum", "the nun"])
    init = {
        "config": {"n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": tokenizer.get_vocab_size()},
        "tokenizer": tokenizer.to_str(),
    }
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("text") / "text.safetensors"
    backbones.save(TextEncoder(**init), path, "text", init, {})
    return f"path:{path}"


def system(encoder: str, text: str, **changes) -> JointAudioText:
    """Random weights, also in the last layer."""
    torch.manual_seed(0)
    settings = {"num_vertices": 12, "subjects": ["anna", "bert"], "encoder": encoder, "text": text, "dim": 6}
    model = JointAudioText(**{**settings, **changes}).eval()
    torch.nn.init.normal_(model.decoder.offsets.weight)
    return model


def batch_of(root, split: str = "train", size: int = 6) -> SpeechBatch:
    return next(iter(SpeechDataModule(str(root), batch_size=size).loader(split)))


def test_untrained_system_gives_the_template(talking_root, speech_backbone, text_backbone) -> None:
    batch = batch_of(talking_root)
    model = JointAudioText(12, ["anna", "bert"], speech_backbone, text_backbone)
    assert torch.equal(model.animate(batch), batch.template[:, None].expand_as(batch.vertices))


@pytest.mark.parametrize(
    "changes",
    [
        {"fusion": "concat"},
        {"fusion": "gated", "text_layers": "all"},
        {"fusion": "tensor", "encoder": "mel100:8"},
        {"modality": "audio", "encoder": "mel100:8"},
        {"modality": "text"},
    ],
)
def test_batch_gives_what_its_clips_give_alone(talking_root, speech_backbone, text_backbone, changes) -> None:
    model = system(**{"encoder": speech_backbone, "text": text_backbone, **changes})
    batch = batch_of(talking_root)
    together = model.animate(batch)
    for i, length in enumerate(batch.lengths.tolist()):
        torch.testing.assert_close(together[i, :length], model.animate(batch.clip(i))[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("modality", "hears", "reads"), [("joint", True, True), ("audio", True, False), ("text", False, True)]
)
def test_each_modality_follows_what_it_is_given(
    talking_root, speech_backbone, text_backbone, modality, hears, reads
) -> None:
    model, batch = system(speech_backbone, text_backbone, modality=modality), batch_of(talking_root, size=1)
    moved = model.animate(batch)
    other_sound = replace(batch, audio=torch.randn_like(batch.audio))
    other_words = replace(batch, transcript=["the nun"])
    assert torch.equal(model.animate(other_sound), moved) != hears
    assert torch.equal(model.animate(other_words), moved) != reads
    assert any(key.startswith("language.") for key, _ in model.named_parameters()) == reads


def test_fusions_are_what_they_are_called() -> None:
    torch.manual_seed(0)
    sound, text = torch.randn(2, 5, 3, 4).unbind(0)
    tensor, concat, gated = (Fusion(4, kind) for kind in ("tensor", "concat", "gated"))
    one = torch.ones(5, 3, 1)
    outer = torch.einsum("btu,btv->btuv", torch.cat([sound, one], -1), torch.cat([text, one], -1))
    torch.testing.assert_close(tensor(sound, text), tensor.linear(outer.reshape(5, 3, 25)))
    both = torch.cat([sound, text], -1)
    torch.testing.assert_close(concat(sound, text), concat.linear(both))
    share = gated.linear(both).sigmoid()
    torch.testing.assert_close(gated(sound, text), (1 - share) * sound + share * text)


def test_words_stand_in_their_frames(talking_root, speech_backbone, text_backbone) -> None:
    model, batch = system(speech_backbone, text_backbone), batch_of(talking_root, size=1)
    batch.words = [[("a", 0.1, 0.2), ("hum", 0.3, 0.4)]]  # frames 3, 4, 5 and 9, 10, 11
    model.meaning.weight.data.zero_()
    model.meaning.bias.data.zero_()
    model.meaning.weight.data[:, :6, 1] = torch.eye(6)
    states, _ = model.language([["a", "hum"]])
    expected = torch.zeros(batch.vertices.shape[1], 6)
    for frames, state in ((slice(3, 6), states[0, 0]), (slice(9, 12), states[0, 1])):
        expected[frames] = ((state - state.mean()) / (state.var(correction=0) + 1e-5).sqrt())[:6]
    torch.testing.assert_close(model.read(batch)[0], expected)


def test_words_take_the_transcripts_marks_or_are_spread_or_are_asked_for(
    talking_root, speech_backbone, text_backbone
) -> None:
    model, batch = system(speech_backbone, text_backbone), batch_of(talking_root, size=1)
    batch.words, batch.transcript = [[("a", 0.0, 0.1), ("hum", 0.1, 0.2)]], ["A hum?"]
    assert model.words(batch, 0) == [("A", 0.0, 0.1), ("hum?", 0.1, 0.2)]
    batch.transcript = ["A long hum?"]
    assert model.words(batch, 0) == batch.words[0]
    batch.words = [[]]
    with pytest.warns(UserWarning, match="spread evenly over the clip"):
        spread = model.words(batch, 0)
    seconds = int(batch.lengths[0]) / 30
    assert [word for word, _, _ in spread] == ["A", "long", "hum?"]
    assert [end for _, _, end in spread] == pytest.approx([seconds / 3, seconds * 2 / 3, seconds])
    batch.transcript = [""]
    with pytest.raises(UserError, match="neither transcript nor words"):
        model.animate(batch)


def test_losses_are_weighted_means_over_real_frames(talking_root, speech_backbone, text_backbone) -> None:
    model = system(speech_backbone, text_backbone, unit=0.5, velocity_weight=3.0)
    model.log_dict = lambda *args, **others: None
    model.vertex_weights[5:8] = 2.0
    batch = batch_of(talking_root)
    weights = torch.ones(12)
    weights[[5, 6, 7]] = 2.0
    moved, errors, steps = model.animate(batch), [], []
    for i, length in enumerate(batch.lengths.tolist()):
        difference = (moved[i, :length] - batch.vertices[i, :length]) / 0.5
        errors.append(weights[:, None] * difference**2)
        steps.append(weights[:, None] * (difference[1:] - difference[:-1]) ** 2)
    expected = torch.cat(errors).mean() + 3.0 * torch.cat(steps).mean()
    torch.testing.assert_close(model.training_step(batch, 0), expected)


def fit(model: JointAudioText, root, folder, epochs: int) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, limit_val_batches=0, use_distributed_sampler=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=SpeechDataModule(str(root), batch_size=3))
    return trainer


def test_regions_and_frame_rate_must_be_the_datas(talking_root, speech_backbone, text_backbone, tmp_path) -> None:
    with pytest.raises(UserError, match="no region 'ears'; name some of lips, upper_face"):
        fit(system(speech_backbone, text_backbone, region_weights={"ears": 2.0}), talking_root, tmp_path, 1)
    with pytest.raises(UserError, match=r"30 frames per second, but this .* is for 25 \(model.fps"):
        fit(system(speech_backbone, text_backbone, fps=25.0), talking_root, tmp_path, 1)


def test_it_learns_and_measures_lips_and_upper_face(talking_root, speech_backbone, text_backbone, tmp_path) -> None:
    model = JointAudioText(
        12, ["anna", "bert"], speech_backbone, text_backbone, dropout=0.0, unit=0.01, lr=0.01, emotions=["neutral"],
        region_weights={"lips": 2.0},
    )  # fmt: skip
    fit(model, talking_root, tmp_path, epochs=40)
    assert model.vertex_weights[:, 0].tolist() == [2.0] * 3 + [1.0] * 9
    batch = batch_of(talking_root)
    real = batch.frame_mask
    error = (model.eval().animate(batch) - batch.vertices)[real].square().mean()
    neutral = (batch.template[:, None] - batch.vertices)[real].square().mean()
    assert error < 0.5 * neutral

    data = SpeechDataModule(str(talking_root), batch_size=2)
    series = model.measurements(data)
    clip = batch_of(talking_root, "test", size=1)
    distance = 1000 * (model.animate(clip) - clip.vertices)[0].norm(dim=-1)
    assert set(series) == {"lips", "upper_face"}
    assert len(series["lips"]) == 3
    assert series["lips"][clip.key[0]] == pytest.approx(distance[:, :3].amax(1).mean().item(), rel=1e-4)
    assert series["upper_face"][clip.key[0]] == pytest.approx(distance[:, 5:8].mean().item(), rel=1e-4)
