import pytest
import pytorch_lightning as pl
import torch

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers.speech.voca import VOCA, VOCANetwork, audio_windows, from_official, window_indices
from trainers.tasks import load_system


def system(encoder: str, **changes) -> VOCA:
    torch.manual_seed(0)
    return VOCA(**{"num_vertices": 12, "subjects": ["anna", "bert"], "encoder": encoder, "components": 4, **changes})


def batch_of(root, split: str = "train", size: int = 6) -> SpeechBatch:
    return next(iter(SpeechDataModule(str(root), batch_size=size).loader(split)))


def random_expressions(model: VOCA) -> VOCA:
    torch.nn.init.normal_(model.network.expression.weight, std=0.1)
    return model.eval()


def fit(model: VOCA, root, folder, epochs: int = 1) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, limit_val_batches=0, log_every_n_steps=1, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=SpeechDataModule(str(root), batch_size=3))
    return trainer


def test_network_has_the_official_size() -> None:
    with torch.device("meta"):
        network = VOCANetwork(num_features=29, num_subjects=8, num_vertices=5023)
    assert sum(parameter.numel() for parameter in network.parameters()) == 809_563


def test_convolutions_pad_on_the_right_as_tensorflow_does() -> None:
    network = VOCANetwork(3, 2, 4, components=2).eval()
    torch.nn.init.normal_(network.expression.weight)
    windows, style = torch.randn(5, 16, 3, requires_grad=True), torch.eye(2)[[0, 1, 0, 1, 0]]
    network(windows, style).sum().backward()
    # With SAME padding 0 before and 1 after, outputs at time 0 see 3, 7, 15 and, of 16, the first 16 inputs.
    assert windows.grad[0].abs().sum(-1).ne(0).all()
    x = torch.randn(1, 5, 16)
    ours = torch.nn.functional.pad(x, (0, 1))
    assert network.conv1(ours).shape[-1] == 8
    first = network.conv1(x[..., :3])
    torch.testing.assert_close(network.conv1(ours)[..., :1], first)


def test_audio_windows_are_centred_and_zero_beyond_the_clip() -> None:
    features = torch.arange(1.0, 21.0)[None, :, None]
    windows = audio_windows(features)
    assert windows.shape == (1, 20, 16, 1)
    assert windows[0, 0, :, 0].tolist() == [0.0] * 8 + list(range(1, 9))
    assert windows[0, 10, :, 0].tolist() == list(range(3, 19))
    assert windows[0, 19, :, 0].tolist() == list(range(12, 21)) + [0.0] * 7


def test_windows_are_runs_of_real_frames_each_drawn_once(speech_backbone) -> None:
    assert window_indices(torch.arange(3), 2).tolist() == [[0, 0], [0, 1], [1, 2]]
    clip, frame = system(speech_backbone, acceleration_weight=1.0).draw_windows(torch.tensor([2, 4]))
    drawn = sorted((*clips, *frames) for clips, frames in zip(clip.tolist(), frame.tolist(), strict=True))
    first = [(0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 1)]
    second = [(1, 1, 1, *frames) for frames in ((0, 0, 0), (0, 0, 1), (0, 1, 2), (1, 2, 3))]
    assert drawn == first + second
    assert len(system(speech_backbone, windows=5).draw_windows(torch.tensor([20]))[0]) == 5


def test_expression_layer_starts_from_the_principal_components() -> None:
    torch.manual_seed(0)
    basis, mean = torch.linalg.qr(torch.randn(12, 3)).Q, torch.randn(12)
    offsets = torch.randn(500, 3) * torch.tensor([3.0, 2.0, 1.0]) @ basis.T + mean
    network = VOCANetwork(3, 2, 4, components=3)
    network.initialise_expressions(offsets.unflatten(-1, (4, 3)))
    weight = network.expression.weight.detach()
    torch.testing.assert_close(network.expression.bias.detach(), offsets.mean(0))
    torch.testing.assert_close(weight @ weight.T, torch.cov(offsets.T, correction=0), rtol=1e-3, atol=1e-3)


def test_batch_gives_what_its_clips_give_alone(talking_root, speech_backbone) -> None:
    model, batch = random_expressions(system(speech_backbone)), batch_of(talking_root)
    together = model.animate(batch)
    for i, length in enumerate(batch.lengths.tolist()):
        alone = model.animate(batch.clip(i))
        torch.testing.assert_close(together[i, :length], alone[0], rtol=0, atol=1e-5)


def test_unseen_subject_speaks_in_the_chosen_style(talking_root, speech_backbone) -> None:
    batch = batch_of(talking_root, "test", size=1)
    assert batch.subject_index.tolist() == [-1]
    unseen = [random_expressions(system(speech_backbone, unseen=f"fixed:{k}")).animate(batch) for k in (0, 1)]
    batch.subject_index = torch.tensor([1])
    assert not torch.equal(*unseen)
    assert torch.equal(unseen[1], random_expressions(system(speech_backbone)).animate(batch))


def test_silence_a_tenth_of_a_second_and_half_a_minute(talking_root, speech_backbone) -> None:
    model, batch = random_expressions(system(speech_backbone)), batch_of(talking_root, size=1)
    for seconds, audio in ((1, torch.zeros), (0.1, torch.randn), (31, torch.randn)):
        samples, frames = int(seconds * 16_000), int(seconds * 30)
        batch.audio, batch.audio_lengths = audio(1, samples), torch.tensor([samples])
        batch.vertices, batch.lengths = torch.zeros(1, frames, 12, 3), torch.tensor([frames])
        assert model.animate(batch).isfinite().all()


def test_encoder_without_classes_is_refused(speech_backbone_without_classes) -> None:
    with pytest.raises(UserError, match="classifies neither"):
        system(speech_backbone_without_classes)


def test_it_learns_and_its_checkpoint_leaves_the_encoder_out(talking_root, speech_backbone, tmp_path) -> None:
    model = system(speech_backbone, lr=0.01)
    trainer = fit(model, talking_root, tmp_path, epochs=60)
    batch = batch_of(talking_root)
    real = batch.frame_mask
    error = (model.eval().animate(batch) - batch.vertices)[real].square().mean()
    neutral = (batch.template[:, None] - batch.vertices)[real].square().mean()
    assert error < 0.3 * neutral

    assert not any(key.startswith("encoder.") for key in model.state_dict())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = load_system(tmp_path / "model.ckpt")
    assert torch.equal(loaded.animate(batch), model.animate(batch))


def test_official_variables_load() -> None:
    source = VOCANetwork(29, 8, 7)
    variables = {}
    for name, value in source.state_dict().items():
        layer, kind = name.split(".")
        if layer == "batch_norm":
            names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
            if kind in names:
                variables[f"VOCA/SpeechEncoder/batch_norm/{names[kind]}"] = value
            continue
        scope = "ExpressionLayer/expression_offset" if layer == "expression" else f"SpeechEncoder/{layer}"
        if kind == "bias":
            variables[f"VOCA/{scope}/biases"] = value
        else:
            tensorflow = value.permute(2, 1, 0)[:, None] if layer.startswith("conv") else value.T
            variables[f"VOCA/{scope}/weights"] = tensorflow
    assert variables["VOCA/SpeechEncoder/conv1/weights"].shape == (3, 1, 37, 32)
    assert variables["VOCA/ExpressionLayer/expression_offset/weights"].shape == (50, 21)
    network = VOCANetwork(29, 8, 7)
    network.load_state_dict(from_official(variables))
    assert all(torch.equal(network.state_dict()[name], value) for name, value in source.state_dict().items())
