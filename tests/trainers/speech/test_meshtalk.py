import math

import pytest
import pytorch_lightning as pl
import torch
from scipy.ndimage import gaussian_filter1d
from torch.nn.functional import one_hot

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers.speech.meshtalk import (
    MeshTalk,
    Prior,
    gumbel,
    head_mask,
    quantise,
    smooth_over_time,
    vertex_mask,
    vertex_statistics,
)

SMALL = {
    "num_vertices": 12,
    "subjects": ["anna", "bert"],
    "eye_landmarks": "upper_face",
    "smooth": ["upper_face"],
    "heads": 3,
    "classes": 4,
    "audio_width": 8,
    "audio_dim": 8,
    "expression_widths": [8, 8],
    "expression_dim": 8,
    "fusion_width": 8,
    "unet_widths": [8, 8, 8],
    "prior_width": 4,
    "lr": 0.01,
}


def system(**changes) -> MeshTalk:
    torch.manual_seed(0)
    return MeshTalk(**{**SMALL, **changes})


def batch_of(root, split: str = "train", size: int = 6) -> SpeechBatch:
    return next(iter(SpeechDataModule(str(root), batch_size=size).loader(split)))


def fit(model: MeshTalk, root, epochs: int = 2) -> MeshTalk:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=SpeechDataModule(str(root), batch_size=3))
    return model.eval()


def test_a_head_sees_the_heads_before_it_and_the_frames_before() -> None:
    assert head_mask(3, 1, 2).tolist() == [[0, 0, 0]] * 2 + [[1, 0, 0]] * 2 + [[1, 1, 0]] * 2
    torch.manual_seed(0)
    heads, frames = 8, 5
    prior = Prior(heads, classes=3, audio_dim=2, width=4)
    codes = torch.randn(1, frames, heads, 3, requires_grad=True)
    audio = torch.randn(1, frames, 2, requires_grad=True)
    prior(codes, audio)[0, 3, 6].square().sum().backward()
    seen = codes.grad[0].abs().sum(-1) > 0
    # Six layers, each of them strictly after: of its own frame head 6 sees head 0 alone.
    assert seen[3].tolist() == [True] + [False] * 7
    # Of earlier frames all but the last head, whose label no embedding comes after.
    assert seen[2].tolist() == [True] * 7 + [False]
    assert not seen[4].any()
    assert (audio.grad[0].abs().sum(-1) > 0).tolist() == [True] * 4 + [False]


def test_drawing_frame_by_frame_equals_the_whole_sequence_at_once() -> None:
    torch.manual_seed(0)
    prior = Prior(heads=8, classes=5, audio_dim=3, width=4).double()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    audio, noise = torch.randn(2, 30, 3).double(), gumbel(torch.rand(2, 30, 8, 5)).double()
    labels = prior.sample(audio, noise)
    logprobs = prior(one_hot(labels, 5).double(), audio)
    assert torch.equal((logprobs + noise).argmax(-1), labels)
    assert len(labels.unique()) == 5


def test_draws_have_the_priors_probabilities() -> None:
    torch.manual_seed(0)
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    _, labels = quantise(probabilities.log().expand(20_000, 3), torch.rand(20_000, 3))
    torch.testing.assert_close(one_hot(labels).float().mean(0), probabilities, rtol=0, atol=0.015)


def test_codes_are_one_hot_with_the_gradient_of_a_softmax() -> None:
    logits = torch.tensor([0.2, 1.0, -0.5], requires_grad=True)
    codes, label = quantise(logits)
    assert label == 1
    torch.testing.assert_close(codes.detach(), torch.tensor([0.0, 1.0, 0.0]))
    (gradient,) = torch.autograd.grad(codes[0], logits)
    (expected,) = torch.autograd.grad(logits.softmax(-1)[0], logits)
    torch.testing.assert_close(gradient, expected)


def test_smoothing_is_a_gaussian_over_time_that_knows_where_a_clip_ends() -> None:
    torch.manual_seed(0)
    vertices, lengths = torch.randn(2, 20, 3, 3), torch.tensor([20, 13])
    smoothed = smooth_over_time(vertices, torch.tensor([1.0, 0.25, 0.0]), lengths)
    for i, length in enumerate(lengths.tolist()):
        clip = vertices[i, :length]
        expected = torch.from_numpy(gaussian_filter1d(clip.numpy(), 2.0, axis=0, mode="nearest", radius=4))
        torch.testing.assert_close(smoothed[i, :length, 0], expected[:, 0])
        torch.testing.assert_close(smoothed[i, :length, 1], 0.25 * expected[:, 1] + 0.75 * clip[:, 1])
        assert torch.equal(smoothed[i, :length, 2], clip[:, 2])


def test_statistics_are_those_of_all_real_frames(talking_root) -> None:
    data = SpeechDataModule(str(talking_root), batch_size=4)
    mean, spread = vertex_statistics(data.loader("train"))
    frames = torch.cat([batch.vertices[batch.frame_mask] for batch in data.loader("train")]).double()
    torch.testing.assert_close(mean, frames.mean(0).float())
    torch.testing.assert_close(spread, frames.std(0, correction=0).float(), rtol=1e-4, atol=1e-7)


def test_masks_are_regions_or_files(talking_root, tmp_path) -> None:
    data = SpeechDataModule(str(talking_root), batch_size=3)
    assert vertex_mask("lips", data).tolist() == [1.0] * 3 + [0.0] * 9
    path = tmp_path / "mask.txt"
    path.write_text("\n".join(["0.5"] * 12))
    assert vertex_mask(str(path), data).tolist() == [0.5] * 12
    for contents, message in (("0.5\n0.5\n", "2 weights"), ("a\nb\n", "one number")):
        path.write_text(contents)
        with pytest.raises(UserError, match=message):
            vertex_mask(str(path), data)
    with pytest.raises(UserError, match="neither a file nor a region"):
        vertex_mask("ears", data)


def test_losses_are_means_over_real_frames_and_decoding_some_vertices_is_decoding_all(talking_root) -> None:
    model, batch = system().eval(), batch_of(talking_root)
    for name in ("mouth", "eyes", "landmarks"):
        model.get_buffer(name).uniform_()
    frames, real = batch.vertices.shape[1], batch.frame_mask
    audio, shape = model.hear(batch, frames), (3, len(batch), frames, 3, 4)
    uniform = torch.rand(shape)
    losses = model.autoencoder_losses(batch.template, batch.vertices, audio, real, uniform, (1, 2))

    def squares(expression: torch.Tensor, audio: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        codes, _ = quantise(model.fusion(expression, audio), draws)
        return ((model.decode(batch.template, codes) - batch.vertices) * 1e3).square()[real].mean(dim=(0, 2))

    expression = model.see(batch.vertices)
    own = squares(expression, audio, uniform[0])
    mouth = squares(expression[[1, 2, 3, 4, 5, 0]], audio, uniform[1])
    eyes = squares(expression, audio[[2, 3, 4, 5, 0, 1]], uniform[2])
    torch.testing.assert_close(losses["reconstruction"], own.mean())
    torch.testing.assert_close(losses["landmarks"], own @ model.landmarks / model.landmarks.sum())
    expected = mouth @ model.mouth / model.mouth.sum() + eyes @ model.eyes / model.eyes.sum()
    torch.testing.assert_close(losses["modality_crossing"], expected)

    model.sampled_vertices = 12  # all of them, in any order
    torch.testing.assert_close(
        model.autoencoder_losses(batch.template, batch.vertices, audio, real, uniform, (1, 2)), losses
    )
    clip = batch.clip(1)
    alone = model.autoencoder_losses(
        clip.template, clip.vertices, model.hear(clip, clip.vertices.shape[1]), clip.frame_mask
    )
    assert set(alone) == {"reconstruction", "landmarks"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_gives_what_its_clips_give_alone_and_does_not_see_the_truth(talking_root, temperature: float) -> None:
    model, batch = system(temperature=temperature).eval(), batch_of(talking_root)
    together = model.animate(batch)
    for i, length in enumerate(batch.lengths.tolist()):
        clip = batch.clip(i)
        clip.vertices = torch.full_like(clip.vertices, torch.nan)
        torch.testing.assert_close(together[i, :length], model.animate(clip)[0], rtol=0, atol=1e-5)


def test_samples_differ_unless_the_likeliest_codes_are_taken(talking_root) -> None:
    model, batch = system(temperature=1.0, samples=2).eval(), batch_of(talking_root, size=2)
    assert not torch.equal(*model.predict_step(batch, 0)[batch.key[0]])
    model.temperature = 0.0
    assert torch.equal(*model.predict_step(batch, 0)[batch.key[0]])


def test_training_is_deterministic_and_takes_masks_and_statistics_from_the_data(talking_root) -> None:
    model = fit(system(stage_epochs=[1]), talking_root, epochs=2)
    again = fit(system(stage_epochs=[1]), talking_root, epochs=2).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())
    assert model.spread.all()
    assert model.smooth_masks[0].nonzero()[:, 0].tolist() == [5, 6, 7]


def test_learning_rates_fall_in_the_last_epochs_of_each_stage() -> None:
    model = system(stage_epochs=[5], decay_epochs=[4, 7])
    assert [model._decay(epoch) for epoch in range(9)] == [1, 1, 1, 1, 0.1, 1, 1, 0.1, 0.1]
    assert {system()._decay(epoch) for epoch in range(9)} == {1.0}
    with pytest.raises(UserError, match="decay_epochs"):
        system(decay_epochs=[4])


def test_states_of_a_speech_encoder_are_heard_at_the_frames_of_a_segment(talking_root, speech_backbone) -> None:
    model, batch = system(encoder=speech_backbone).eval(), batch_of(talking_root)
    whole = model.hear(batch, batch.vertices.shape[1])
    part = model.hear(batch, 5, torch.tensor([0, 1, 2, 3, 4, 5]))
    for i in range(6):
        torch.testing.assert_close(part[i], whole[i, i : i + 5])


def test_layers_that_read_vertices_have_a_learning_rate_of_their_own() -> None:
    model = system(lr=0.1, vertex_lr=0.01)
    groups = model.configure_optimizers()["optimizer"].param_groups
    rates = {id(p): (group["initial_lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    expected = {"expression_encoder.layers.0": (0.01, 0), "unet.encoder.0": (0.01, 1e-3), "unet": (0.1, 1e-3)}
    for name, parameter in model.named_parameters():
        if not name.startswith("encoder."):
            owner = next((prefix for prefix in expected if name.startswith(f"{prefix}.")), None)
            assert rates[id(parameter)] == (expected[owner] if owner else (0.1, 0)), name


def test_another_frame_rate_is_refused(talking_root) -> None:
    with pytest.raises(UserError, match=r"30 frames per second, but this MeshTalk is for 25 \(model.fps"):
        fit(system(fps=25.0), talking_root)


def test_swaps_are_measured_for_every_test_clip(talking_root) -> None:
    series = system().eval().measurements(SpeechDataModule(str(talking_root), batch_size=3))
    assert set(series) == {"lips_by_audio", "lips_by_expression", "upper_face_by_audio", "upper_face_by_expression"}
    assert all(len(values) == 3 and all(map(math.isfinite, values.values())) for values in series.values())


def test_parameters_at_the_released_sizes() -> None:
    with torch.device("meta"):
        model = MeshTalk(6172, ["anyone"])
    sizes = {
        "expression_encoder": 18516 * 256 + 256 + 256 * 128 + 128 + 4 * (2 * 128 * 128 + 2 * 128) + 128 * 128 + 128,
        "fusion": 2 * (256 * 256 + 256) + 256 * 2048 + 2048,
        "unet": 2 * (18516 * 512 + 512 * 256 + 256 * 128) + 18516 + 2 * (512 + 256) + 128 + 18516
        + (2048 + 128) * 128 + 128 + 2 * 4 * (2 * 128 * 128 + 2 * 128),
    }  # fmt: skip
    for name, expected in sizes.items():
        assert sum(p.numel() for p in model.get_submodule(name).parameters()) == expected, name
