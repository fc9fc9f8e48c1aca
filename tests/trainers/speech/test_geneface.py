import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.head import Head
from datamodules.speech import SpeechDataModule
from trainers.speech.geneface import (
    Flow,
    GeneFace,
    MotionVAE,
    WaveNet,
    continuity_loss,
    find_landmarks,
    fit_vertices,
    lle_projection,
    mean_over,
)
from trainers.tasks import load_system

SMALL = {
    "condition_dim": 8,
    "hidden": 12,
    "latent": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "flow_hidden": 6,
    "flow_layers": 2,
}


def system(encoder: str, **changes) -> GeneFace:
    """Landmarks name each of the twelve vertices several times: the tiny mesh has no 68."""
    torch.manual_seed(0)
    settings = {
        "num_vertices": 12,
        "subjects": ["anna", "bert"],
        "encoder": encoder,
        "landmarks": [i % 12 for i in range(68)],
        "alignment": "resample_pairs",
        "sync_windows": 16,
        "sync_widths": [6, 8, 10],
        "sync_mouth_width": 6,
        "postnet_widths": [8, 12],
        "adaptation_steps": 5,
        "stage_epochs": [1],
    }
    return GeneFace(**{**settings, **SMALL, **changes})


def moving(model: GeneFace) -> GeneFace:
    """With random weights where a new system has zeros."""
    torch.nn.init.normal_(model.to_vertices, std=0.1)
    for coupling in model.vae.flow.couplings:
        torch.nn.init.normal_(coupling.leave.weight, std=0.5)
    return model.eval()


def batch_of(root, split: str = "train", size: int = 6) -> SpeechBatch:
    return next(iter(SpeechDataModule(str(root), batch_size=size).loader(split)))


def fit(model: GeneFace, root, folder, epochs: int) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, limit_val_batches=0, log_every_n_steps=1, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=SpeechDataModule(str(root), batch_size=3))
    return trainer


def test_flow_is_invertible_and_keeps_volume() -> None:
    torch.manual_seed(0)
    flow = Flow(channels=4, hidden=6, kernel=3, layers=2, couplings=4, context_dim=3).double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    code, context = torch.randn(1, 4, 5).double(), torch.randn(1, 3, 5).double()
    there = flow(code, torch.ones(1, 1, 5).double(), context)
    assert not torch.allclose(there, code)
    torch.testing.assert_close(flow.reverse(there, context), code)

    def flat(values: torch.Tensor) -> torch.Tensor:
        return flow(values.view(1, 4, 5), torch.ones(1, 1, 5).double(), context).flatten()

    jacobian = torch.autograd.functional.jacobian(flat, code.flatten())
    torch.testing.assert_close(torch.linalg.det(jacobian).abs(), torch.tensor(1.0).double())


def test_wavenet_of_one_layer_is_a_gated_convolution() -> None:
    torch.manual_seed(0)
    network = WaveNet(channels=2, kernel=3, layers=1, context_dim=1)
    x, context, mask = torch.randn(1, 2, 6), torch.randn(1, 1, 6), torch.tensor([[[1.0, 1, 1, 1, 0, 0]]])
    hidden = network.filters[0](x) + network.context(context)
    expected = network.outputs[0](hidden[:, :2].tanh() * hidden[:, 2:].sigmoid()) * mask
    torch.testing.assert_close(network(x, mask, context), expected)


def test_sampled_divergence_has_the_analytic_one_as_its_mean() -> None:
    torch.manual_seed(0)
    networks = {flow: MotionVAE(audio_dim=5, motion_dim=6, use_flow=flow, **SMALL).eval() for flow in (True, False)}
    networks[False].load_state_dict(networks[True].state_dict(), strict=False)  # a new flow only flips channels
    motion, states, mask = torch.randn(2, 16, 6), torch.randn(2, 32, 5), torch.ones(2, 16, dtype=torch.bool)
    mask[1, 9:] = False
    with torch.no_grad():
        made = {
            flow: [network.reconstruct(motion, network.condition(states, mask), mask).kl for _ in range(100)]
            for flow, network in networks.items()
        }
    sampled, analytic = torch.stack(made[True]), torch.stack(made[False])
    assert analytic.std() < 1e-6
    assert abs(sampled.mean() - analytic.mean()) < 4 * sampled.std() / 10


def test_losses_by_hand() -> None:
    made = torch.tensor([[[1.0], [3.0], [7.0]], [[2.0], [5.0], [9.0]]])
    true, mask = torch.zeros(2, 3, 1), torch.tensor([[True, True, True], [True, True, False]])
    # First frames 1 and 4, changes 4 and 16 and 9, five real frames.
    torch.testing.assert_close(continuity_loss(made, true, mask), torch.tensor((1 + 4 + 16 + 4 + 9) / 5))
    torch.testing.assert_close(mean_over(made, mask), torch.tensor((1 + 3 + 7 + 2 + 5) / 5))


def test_projection_gives_points_of_the_plane_of_their_neighbours_unchanged() -> None:
    torch.manual_seed(0)
    base = torch.randn(20, 2) @ torch.randn(2, 6)
    inside = torch.tensor([[0.3, 0.7]]) @ base[:2]
    projected, weights, index = lle_projection(inside, base, 5)
    torch.testing.assert_close(projected, inside, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights.sum(1), torch.ones(1))
    assert index.shape == (1, 5)
    repeated, _, _ = lle_projection(base[:1] + 0.1, base[:1].repeat(8, 1), 4)
    torch.testing.assert_close(repeated, base[:1])


def test_landmarks() -> None:
    assert find_landmarks("demo", 3689).tolist() == Head.load().landmarks.tolist()
    assert find_landmarks("all", 68).tolist() == list(range(68))
    for wrong, vertices in (("all", 12), ("demo", 100), ([3] * 67, 12), ([12] * 68, 12), ([-1] * 68, 12)):
        with pytest.raises(UserError, match=r"model\.landmarks: .* expected 68 below"):
            find_landmarks(wrong, vertices)


def test_vertices_that_follow_the_landmarks_linearly_are_found(talking_root) -> None:
    batch = batch_of(talking_root)
    landmarks = torch.arange(4).repeat(17)
    rng = np.random.default_rng(0)
    moved = torch.from_numpy(rng.normal(0, 0.01, (*batch.vertices.shape[:2], 4, 3))).float()
    batch.vertices = batch.template[:, None].repeat(1, moved.shape[1], 1, 1)
    batch.vertices[:, :, :4] += moved
    batch.vertices[:, :, 4:8] += moved.flip(2) * 0.5
    found = fit_vertices([batch], landmarks, every=1)
    offsets = batch.vertices - batch.template[:, None]
    predicted = (offsets[:, :, landmarks].flatten(2) @ found).unflatten(-1, (12, 3))
    assert (predicted - offsets)[batch.frame_mask].abs().max() < 1e-3 * offsets.abs().max()


def test_batch_gives_what_its_clips_give_alone(talking_root, speech_backbone) -> None:
    model, batch = moving(system(speech_backbone, sync_weight=0.0)), batch_of(talking_root)
    states, mask = model.hear(batch)
    motion = model.track(batch, mask)
    noise = torch.randn(len(batch), 4, mask.shape[1] // 4)
    together = model.losses(states, motion, mask, noise)
    vertices = model.animate(batch)
    alone = {name: [] for name in together}
    for i in range(len(batch)):
        clip = batch.clip(i)
        torch.testing.assert_close(vertices[i, : batch.lengths[i]], model.animate(clip)[0], rtol=0, atol=1e-5)
        states, clip_mask = model.hear(clip)
        steps = clip_mask.shape[1] // 4
        for name, loss in model.losses(
            states, model.track(clip, clip_mask), clip_mask, noise[i : i + 1, :, :steps]
        ).items():
            alone[name].append(loss * (steps if name == "kl" else clip_mask.sum()))
    latents = mask[:, ::4].sum()
    for name in ("mse", "continuity", "kl"):
        expected = torch.stack(alone[name]).sum() / (latents if name == "kl" else mask.sum())
        torch.testing.assert_close(together[name], expected, rtol=1e-4, atol=1e-6)


def test_last_pose_is_held_where_sound_ends_first(talking_root, speech_backbone) -> None:
    model, batch = moving(system(speech_backbone, alignment="pair_states")), batch_of(talking_root, size=1)
    _, mask = model.hear(batch)
    frames = int(mask.sum())
    assert frames < batch.lengths  # 30 fps, but 25 pairs of states a second
    vertices = model.animate(batch)[0]
    assert not torch.equal(vertices[frames - 2], vertices[frames - 1])
    assert all(torch.equal(frame, vertices[frames - 1]) for frame in vertices[frames:])
    assert model.track(batch, mask).shape == (1, mask.shape[1], 204)


def test_temperature_scales_the_noise_and_draws_differ(talking_root, speech_backbone) -> None:
    model, batch = moving(system(speech_backbone)), batch_of(talking_root, size=1)
    first = model.animate(batch)
    assert torch.equal(model.animate(batch), first)
    model.draw = 1
    second = model.animate(batch)
    assert not torch.allclose(second, first)
    model.temperature = 0.0
    calm = model.animate(batch)
    model.draw = 0
    assert torch.equal(model.animate(batch), calm)


def test_false_partners_are_half_and_half_of_these_near() -> None:
    torch.manual_seed(0)
    clip = torch.arange(4).repeat_interleave(500)
    seen = torch.randint(len(clip), (4000,))
    heard = GeneFace._false_partners(None, clip, seen)
    distance = (heard - seen).abs()
    assert abs((distance > 0).float().mean() - 0.5) < 0.05
    near = (distance > 0) & (distance <= 5) & (clip[heard] == clip[seen])
    assert abs(near.float().mean() - 0.25) < 0.05
    assert (distance[near] >= 2).float().mean() > 0.99


def test_too_short_clips_are_refused(talking_root, speech_backbone) -> None:
    model = system(speech_backbone)
    with pytest.raises(UserError, match="clips of 4 frames, but the expert needs 5"):
        model.sync_loss(torch.zeros(1, 8, 16), torch.zeros(1, 4, 204), torch.ones(1, 4, dtype=torch.bool))


def test_synchrony_counts_from_when_it_is_low(talking_root, speech_backbone) -> None:
    model, batch = moving(system(speech_backbone, sync_threshold=0.0)), batch_of(talking_root)
    states, mask = model.hear(batch)
    motion = model.track(batch, mask)
    assert model.losses(states, motion, mask)["sync"] == 0
    model.sync_threshold = 1e6
    assert model.losses(states, motion, mask)["sync"] > 0
    model.sync_threshold = 0.0
    assert model.losses(states, motion, mask)["sync"] > 0


def test_stages_and_checkpoint(talking_root, speech_backbone, tmp_path) -> None:
    model = system(speech_backbone, lr=0.01, unit=0.005, stage_epochs=[2])
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def changed() -> set[str]:
        return {
            name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
        }

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, module) -> None:
            seen.append(changed())
            before.update({name: value.clone() for name, value in module.state_dict().items()})

    seen: list[set[str]] = []
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=4, logger=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, use_distributed_sampler=False, callbacks=[Watch()], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, datamodule=SpeechDataModule(str(talking_root), batch_size=3))
    assert seen[0] == {"expert", "to_vertices"}
    assert seen[1] == {"expert"}
    assert seen[2] - {"sync_counts"} == seen[3] - {"sync_counts"} == {"vae"}

    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded, batch = load_system(tmp_path / "model.ckpt"), batch_of(talking_root, "test")
    assert torch.equal(loaded.animate(batch), model.eval().animate(batch))


def test_it_learns_to_open_the_mouth_with_loudness(talking_root, speech_backbone, tmp_path) -> None:
    model = system(speech_backbone, lr=0.01, unit=0.005, hidden=24, temperature=0.2)
    fit(model, talking_root, tmp_path, epochs=30)
    batch = batch_of(talking_root)
    real = batch.frame_mask
    error = (model.eval().animate(batch) - batch.vertices)[real].square().mean()
    neutral = (batch.template[:, None] - batch.vertices)[real].square().mean()
    assert error < 0.5 * neutral


def test_adaptation_moves_a_copy_toward_the_person(talking_root, speech_backbone) -> None:
    settings = {"unit": 0.005, "adaptation_steps": 60, "adaptation_lr": 1e-3, "mse_weight": 1.0}
    model = system(speech_backbone, adversarial_weight=0.05, **settings).eval()
    batch = batch_of(talking_root, "test", size=3)
    model.to_vertices.copy_(fit_vertices([batch], model.landmarks))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted, again = model.adapt(batch), model.adapt(batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in adapted.parameters())
    assert torch.equal(adapted.animate(batch), again.animate(batch))

    def error(system: GeneFace) -> torch.Tensor:
        return (system.animate(batch) - batch.vertices)[batch.frame_mask].square().mean()

    assert error(adapted) < 0.8 * error(model)
    adapted.lle_weight = 1.0
    landmarks = adapted.animate(batch)[batch.frame_mask][:, 2:]  # only vertices 0 and 1 ever move
    expected = batch.template[:, None].expand_as(batch.vertices)[batch.frame_mask][:, 2:]
    torch.testing.assert_close(landmarks, expected, rtol=0, atol=1e-5)


def test_reference_of_two_persons_or_too_short_is_refused(talking_root, speech_backbone) -> None:
    model = system(speech_backbone).eval()
    with pytest.raises(UserError, match="clips of anna, bert; expected one person's"):
        model.adapt(batch_of(talking_root))
    with pytest.raises(UserError, match=r"reference: lasts 0\.\d+ s, expected at least 1 s"):
        model.adapt(batch_of(talking_root, size=1))
