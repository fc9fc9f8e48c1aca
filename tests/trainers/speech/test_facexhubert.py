import pytest
import pytorch_lightning as pl
import torch

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers import backbones
from trainers.nets.speech_encoder import SpeechEncoder
from trainers.speech.facexhubert import ExpressiveGRU, FaceXHuBERT

EMOTIONS = ["happy", "neutral", "sad"]


def system(encoder: str, **changes) -> FaceXHuBERT:
    """Random weights, also in the last layer."""
    torch.manual_seed(0)
    settings = {
        "num_vertices": 12,
        "subjects": ["anna", "bert"],
        "encoder": encoder,
        "emotions": EMOTIONS,
        "alignment": "resample_pairs",
        "dim": 8,
        "train_encoder": "none",
    }
    model = FaceXHuBERT(**{**settings, **changes}).eval()
    torch.nn.init.normal_(model.decoder.vertex_decoder.weight)
    return model


def batch_of(root, split: str = "train", size: int = 6, emotion: int = 1) -> SpeechBatch:
    batch = next(iter(SpeechDataModule(str(root), batch_size=size).loader(split)))
    batch.emotion = torch.full_like(batch.emotion, emotion)
    return batch


def test_untrained_system_gives_the_template(talking_root, speech_backbone) -> None:
    model, batch = system(speech_backbone), batch_of(talking_root)
    torch.nn.init.zeros_(model.decoder.vertex_decoder.weight)
    assert torch.equal(model.animate(batch), batch.template[:, None].expand_as(batch.vertices))


def test_both_codes_multiply_what_the_recurrent_layers_give() -> None:
    torch.manual_seed(0)
    network = ExpressiveGRU(num_vertices=1, num_subjects=2, audio_dim=3, dim=2).eval()
    network.vertex_decoder.weight.data = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    network.style.weight.data = torch.tensor([[2.0, 3], [5, 7]])
    network.emotion.weight.data = torch.tensor([[1.0, 10], [1, 100]])
    speech = torch.randn(1, 4, 3)
    hidden, _ = network.gru(speech)
    with torch.no_grad():
        offsets = network(speech, torch.tensor([[0.0, 1]]), torch.tensor([[0.0, 1]]))
    torch.testing.assert_close(offsets[..., :2], hidden * torch.tensor([30.0, 700]))
    torch.testing.assert_close(offsets[..., 2], offsets[..., 0] + offsets[..., 1])


def test_every_emotion_but_neutral_is_emotional(talking_root, speech_backbone) -> None:
    model, batch = system(speech_backbone), batch_of(talking_root, size=3)
    batch.emotion = torch.tensor([0, 1, 2])
    assert model.emotional(batch).tolist() == [[0, 1], [1, 0], [0, 1]]
    happy, sad, neutral = (model.animate(batch_of(talking_root, emotion=i)) for i in (0, 2, 1))
    assert torch.equal(happy, sad)
    assert not torch.allclose(happy, neutral)


def test_it_needs_a_neutral_emotion_and_clips_with_one(talking_root, speech_backbone) -> None:
    with pytest.raises(UserError, match=r"model\.emotions: \['calm'\], expected one of them to be 'neutral'"):
        system(speech_backbone, emotions=["calm"])
    batch = batch_of(talking_root, emotion=-1)
    with pytest.raises(UserError, match=rf"clip '{batch.key[0]}': no emotion, but FaceXHuBERT takes one of happy, "):
        system(speech_backbone).animate(batch)


@pytest.mark.parametrize("alignment", ["pair_states", "resample_pairs"])
def test_batch_gives_what_its_clips_give_alone(talking_root, speech_backbone, alignment: str) -> None:
    model, batch = system(speech_backbone, alignment=alignment), batch_of(talking_root)
    assert len(set(batch.lengths.tolist())) > 1
    together = model.animate(batch)
    losses, counts = [], []
    for i in range(len(batch)):
        clip = batch.clip(i)
        torch.testing.assert_close(together[i, : batch.lengths[i]], model.animate(clip)[0], rtol=0, atol=1e-5)
        speech, frames = model.hear(clip)
        losses.append(model.loss(speech, frames, clip))
        counts.append(frames)
    expected = (torch.stack(losses) * torch.cat(counts)).sum() / torch.cat(counts).sum()
    torch.testing.assert_close(model.loss(*model.hear(batch), batch), expected)


def test_last_pose_is_held_where_audio_ends_first(talking_root, speech_backbone) -> None:
    model, batch = system(speech_backbone, alignment="pair_states"), batch_of(talking_root, size=1)
    _, frames = model.hear(batch)
    assert frames < batch.lengths  # 30 fps, but 25 pairs of states a second
    vertices = model.animate(batch)[0]
    assert not torch.equal(vertices[frames - 2], vertices[frames - 1])
    assert all(torch.equal(frame, vertices[frames - 1].squeeze(0)) for frame in vertices[int(frames) :])


def test_the_unit_scales_what_is_learned(talking_root, speech_backbone) -> None:
    batch = batch_of(talking_root)
    metres, half = system(speech_backbone), system(speech_backbone, unit=0.5)
    still = batch.template[:, None]
    torch.testing.assert_close(half.animate(batch) - still, (metres.animate(batch) - still) / 2)


def test_parameter_counts_are_the_official_ones(monkeypatch) -> None:
    hubert = {"model_type": "hubert"}
    monkeypatch.setattr(backbones, "load", lambda spec, kind: SpeechEncoder(hubert).requires_grad_(False))
    with torch.device("meta"):
        model = FaceXHuBERT(23370, list("abcdefghijklmn"), "hub:facebook/hubert-base-ls960", ["neutral", "emotional"])
    assert sum(p.numel() for p in model.parameters()) == 114_166_622
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 95_395_422


def test_it_learns_to_open_the_mouth_with_loudness(talking_root, speech_backbone, tmp_path) -> None:
    model = system(speech_backbone, emotions=["neutral"], dim=16, unit=0.01, lr=0.01, dropout=0.0)
    torch.nn.init.zeros_(model.decoder.vertex_decoder.weight)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=60, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, limit_val_batches=0, enable_checkpointing=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=SpeechDataModule(str(talking_root), batch_size=3))
    batch = batch_of(talking_root, emotion=0)
    real = batch.frame_mask
    error = (model.eval().animate(batch) - batch.vertices)[real].square().mean()
    neutral = (batch.template[:, None] - batch.vertices)[real].square().mean()
    assert error < 0.3 * neutral
