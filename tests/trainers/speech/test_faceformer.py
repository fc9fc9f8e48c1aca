import math
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from benchmarks.decoding import naive_decode
from datamodules.batches import SpeechBatch
from datamodules.speech import SpeechDataModule
from trainers import backbones
from trainers.nets.cached_decoder import distance_bias, periodic_positions
from trainers.nets.speech_encoder import SpeechEncoder
from trainers.speech.faceformer import FaceFormer, MotionDecoder
from trainers.tasks import load_system

SIZES = {"num_vertices": 5, "num_subjects": 3, "audio_dim": 6, "dim": 8, "period": 4}


def decoder(**changes) -> MotionDecoder:
    """Random weights everywhere, large enough for the feedback to matter."""
    torch.manual_seed(0)
    network = MotionDecoder(**{**SIZES, **changes}).double().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return network


def speech(frames: int, per_frame: int = 1, clips: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(clips, frames * per_frame, 6).double(), torch.eye(3)[:clips].double()


def system(encoder: str, **changes) -> FaceFormer:
    torch.manual_seed(0)
    settings = {"num_vertices": 12, "subjects": ["anna", "bert"], "encoder": encoder, "dim": 16, "period": 4}
    return FaceFormer(**{**settings, **changes})


def batch_of(root, split: str = "train", size: int = 6) -> SpeechBatch:
    return next(iter(SpeechDataModule(str(root), batch_size=size).loader(split)))


@pytest.mark.parametrize("per_frame", [1, 2])
@pytest.mark.parametrize("frames", [1, 2, 13])
def test_cached_and_folded_decoding_equals_the_naive_loop_with_all_gradients(frames: int, per_frame: int) -> None:
    inputs = speech(frames, per_frame)
    target = torch.randn(2, frames, 15).double()
    results = []
    for decode in (MotionDecoder.forward, naive_decode):
        network = decoder(audio_per_frame=per_frame)
        offsets = decode(network, *inputs)
        (offsets - target).square().mean().backward()
        # A single frame feeds nothing back: its feedback weights have no gradient, or zeros.
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in network.named_parameters()}
        results.append((offsets, gradients))
    (ours, our_gradients), (naive, naive_gradients) = results
    assert torch.allclose(ours, naive, rtol=0, atol=1e-10)
    for name, expected in naive_gradients.items():
        assert torch.allclose(our_gradients[name], expected, rtol=1e-9, atol=1e-10), name


def test_equality_holds_beyond_600_frames_in_single_precision() -> None:
    network, inputs = decoder(period=30).float(), [tensor.float() for tensor in speech(640)]
    with torch.inference_mode():
        torch.testing.assert_close(network(*inputs), naive_decode(network, *inputs), rtol=1e-4, atol=1e-5)


def test_free_running_equals_teacher_forcing_on_its_own_frames() -> None:
    network, inputs = decoder(), speech(11)
    with torch.no_grad():
        network.vertex_encoder.bias.zero_()  # the official first token differs between the modes by this bias
        offsets = network(*inputs)
        torch.testing.assert_close(network.teacher_forced(*inputs, offsets), offsets)


def test_dropout_is_active_in_training_only() -> None:
    network, inputs = decoder(dropout=0.5), speech(5)
    assert torch.equal(network(*inputs), network(*inputs))
    network.train()
    assert not torch.equal(network(*inputs), network(*inputs))


def test_positions_repeat_after_a_period_and_bias_steps_down_by_periods() -> None:
    positions = periodic_positions(9, dim=6, period=4)
    assert torch.equal(positions[0], positions[4])
    assert torch.equal(positions[:4], positions[4:8])
    torch.testing.assert_close(positions[3, :2], torch.tensor([math.sin(3), math.cos(3)]))
    bias = distance_bias(heads=4, length=9, period=4)
    assert bias[0].tolist() == [0, 0, 0, 0, -0.25, -0.25, -0.25, -0.25, -0.5]
    assert bias[:, -1].tolist() == [-2 / 4, -2 / 16, -2 / 64, -2 / 256]


def test_untrained_system_gives_the_template(talking_root, speech_backbone) -> None:
    batch = batch_of(talking_root)
    vertices = system(speech_backbone).eval().animate(batch)
    assert torch.equal(vertices, batch.template[:, None].expand_as(batch.vertices))


@pytest.mark.parametrize("alignment", ["interpolate", "pairs"])
def test_batch_gives_what_its_clips_give_alone(talking_root, speech_backbone, alignment: str) -> None:
    model = system(speech_backbone, alignment=alignment).eval()
    torch.nn.init.normal_(model.decoder.vertex_decoder.weight, std=0.1)
    batch = batch_of(talking_root)
    assert len(set(batch.lengths.tolist())) > 1
    together = model.animate(batch)
    losses, counts = [], []
    for i in range(len(batch)):
        clip = batch.clip(i)
        torch.testing.assert_close(together[i, : batch.lengths[i]], model.animate(clip)[0], rtol=0, atol=1e-5)
        features, frames = model.hear(clip)
        losses.append(model.loss(features, frames, clip))
        counts.append(frames)
    expected = (torch.stack(losses) * torch.cat(counts)).sum() / torch.cat(counts).sum()
    torch.testing.assert_close(model.loss(*model.hear(batch), batch), expected)


def test_prediction_does_not_see_the_truth(talking_root, speech_backbone) -> None:
    model, batch = system(speech_backbone).eval(), batch_of(talking_root)
    torch.nn.init.normal_(model.decoder.vertex_decoder.weight, std=0.1)
    before = model.animate(batch)
    batch.vertices = torch.randn_like(batch.vertices)
    assert torch.equal(model.animate(batch), before)


def test_last_pose_is_held_where_audio_ends_first(talking_root, speech_backbone) -> None:
    model, batch = system(speech_backbone, alignment="pairs").eval(), batch_of(talking_root, size=1)
    torch.nn.init.normal_(model.decoder.vertex_decoder.weight, std=0.1)
    _, frames = model.hear(batch)
    assert frames < batch.lengths  # 30 fps, but 25 pairs of features a second
    vertices = model.animate(batch)[0]
    assert not torch.equal(vertices[frames - 2], vertices[frames - 1])
    assert all(torch.equal(frame, vertices[frames - 1].squeeze(0)) for frame in vertices[int(frames) :])


def test_silence_a_tenth_of_a_second_and_half_a_minute(talking_root, speech_backbone) -> None:
    model, batch = system(speech_backbone).eval(), batch_of(talking_root, size=1)
    torch.nn.init.normal_(model.decoder.vertex_decoder.weight, std=0.1)
    for seconds, audio in ((1, torch.zeros), (0.1, torch.randn), (31, torch.randn)):
        samples, frames = int(seconds * 16_000), int(seconds * 30)
        batch.audio, batch.audio_lengths = audio(1, samples), torch.tensor([samples])
        batch.vertices, batch.lengths = torch.zeros(1, frames, 12, 3), torch.tensor([frames])
        vertices = model.animate(batch)
        assert vertices.shape == (1, frames, 12, 3)
        assert vertices.isfinite().all()


@pytest.mark.parametrize(
    ("mode", "total", "trained"),
    [
        ({"num_vertices": 5023, "subjects": list("abcdefgh")}, 96_415_645, 92_215_197),
        (
            {"num_vertices": 23370, "subjects": list("abcdef"), "dim": 128, "period": 25, "alignment": "pairs"},
            112_688_094,
            108_487_646,
        ),
    ],
    ids=["vocaset", "biwi"],
)
def test_parameter_counts_are_the_official_ones(monkeypatch, mode: dict, total: int, trained: int) -> None:
    monkeypatch.setattr(backbones, "load", lambda spec, kind: SpeechEncoder({}, ["a", "b"]).requires_grad_(False))
    with torch.device("meta"):
        model = FaceFormer(encoder="hub:facebook/wav2vec2-base-960h", **mode)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


def fit(model: FaceFormer, root, folder, epochs: int = 1) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, limit_val_batches=0, log_every_n_steps=1, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=SpeechDataModule(str(root), batch_size=3))
    return trainer


@pytest.mark.parametrize("train_encoder", ["transformer", "none"])
def test_checkpoint_holds_what_was_trained(talking_root, speech_backbone, tmp_path, train_encoder: str) -> None:
    model = system(speech_backbone, train_encoder=train_encoder, lr=0.01)
    before = {name: weight.clone() for name, weight in model.encoder.state_dict().items()}
    trainer = fit(model, talking_root, tmp_path)
    changed = {name for name, weight in model.encoder.state_dict().items() if not torch.equal(weight, before[name])}
    assert bool(changed) == (train_encoder == "transformer")
    assert not any("feature_extractor" in name for name in changed)
    assert any(key.startswith("encoder.") for key in model.state_dict()) == (train_encoder == "transformer")

    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded, batch = load_system(tmp_path / "model.ckpt"), batch_of(talking_root, "test")
    assert torch.equal(loaded.animate(batch), model.eval().animate(batch))


@pytest.mark.parametrize("past", ["predicted", "true", "scheduled"])
def test_it_learns_to_open_the_mouth_with_loudness(talking_root, speech_backbone, tmp_path, past) -> None:
    model = system(speech_backbone, train_encoder="none", past=past, lr=0.01, dropout=0.0)
    fit(model, talking_root, tmp_path, epochs=60)
    batch = batch_of(talking_root)
    real = batch.frame_mask
    error = (model.eval().animate(batch) - batch.vertices)[real].square().mean()
    neutral = (batch.template[:, None] - batch.vertices)[real].square().mean()
    assert error < 0.3 * neutral


def test_the_scheduled_past_goes_from_true_to_predicted(speech_backbone, monkeypatch) -> None:
    model = system(speech_backbone, past="scheduled").eval()
    torch.nn.init.normal_(model.decoder.vertex_decoder.weight, std=0.1)
    states, style, target = torch.randn(2, 200, 16), torch.eye(2), torch.randn(2, 200, 36)
    monkeypatch.setattr(FaceFormer, "trainer", SimpleNamespace(estimated_stepping_batches=40))

    def share_of_truth(step: int) -> float:
        monkeypatch.setattr(FaceFormer, "global_step", step)
        past = model.mixed_past(states, style, target)
        true = (past == target).all(-1)
        predicted = model.decoder.teacher_forced(states, style, target)
        assert torch.equal(past[~true], predicted[~true])
        return true.float().mean().item()

    assert share_of_truth(0) == 1
    assert share_of_truth(40) == 0
    assert 0.4 < share_of_truth(20) < 0.6
