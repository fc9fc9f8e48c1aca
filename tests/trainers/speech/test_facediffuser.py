import math

import pytest
import pytorch_lightning as pl
import torch
from diffusers import DDPMScheduler

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers import backbones, tasks
from trainers.nets.rig import Rig
from trainers.nets.speech_encoder import SpeechEncoder
from trainers.speech import facediffuser
from trainers.speech.facediffuser import FaceDiffuser, FaceDiffuserRig, MeshDenoiser, Sinusoid, gaussian, schedule

SETTINGS = {
    "subjects": ["anna", "bert"],
    "alignment": "resample_pairs",
    "latent_dim": 4,
    "gru_dim": 8,
    "diffusion_steps": 4,
    "train_encoder": "none",
}


def mesh_system(encoder: str, **changes) -> FaceDiffuser:
    """Random weights, also in the last layer."""
    torch.manual_seed(0)
    model = FaceDiffuser(12, encoder=encoder, **{**SETTINGS, **changes}).eval()
    torch.nn.init.normal_(model.denoiser.vertex_decoder.weight, std=0.3)
    return model


@pytest.fixture
def rig_system(speech_backbone, monkeypatch):
    offsets = torch.eye(36)[:2].unflatten(-1, (12, 3))
    monkeypatch.setattr(tasks, "load_rig", lambda spec: Rig(["open", "close"], offsets))

    def build(**changes) -> FaceDiffuserRig:
        torch.manual_seed(0)
        return FaceDiffuserRig("demo", 12, encoder=speech_backbone, **{**SETTINGS, **changes}).eval()

    return build


def batch_of(root, split: str = "train", size: int = 6) -> SpeechBatch:
    return next(iter(SpeechDataModule(str(root), batch_size=size).loader(split)))


@pytest.mark.parametrize("steps", [25, 500, 1000])
def test_any_number_of_sampling_steps_gives_numbers(steps: int) -> None:
    for sample_steps in (number for number in range(1, steps + 1) if steps % number == 0):
        scheduler, x = schedule(steps, sample_steps), torch.zeros(1, 2)
        for step in scheduler.timesteps.tolist()[:-1]:
            x = scheduler.step(torch.zeros(1, 2), step, x, 1.0, variance_noise=torch.ones(1, 2), return_dict=False)[0]
        assert torch.isfinite(x).all(), sample_steps


@pytest.mark.parametrize("sample_steps", [5, 10])
def test_the_stochastic_step_is_ancestral_sampling(sample_steps: int) -> None:
    ours = schedule(10, sample_steps)
    theirs = DDPMScheduler(
        num_train_timesteps=10,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        variance_type="fixed_small",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(sample_steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist() == list(range(9, -1, -10 // sample_steps))
    torch.manual_seed(0)
    clean, x = torch.randn(2, 1, 3, 4)
    for step in ours.timesteps.tolist():
        noise = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(step))
        expected = theirs.step(clean, step, x, generator=torch.Generator().manual_seed(step)).prev_sample
        torch.testing.assert_close(ours.step(clean, step, x, eta=1.0, variance_noise=noise).prev_sample, expected)
    assert torch.equal(ours.step(clean, 0, x).prev_sample, clean), "after the last step no noise is left"


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_network_that_always_says_the_same_samples_the_same(talking_root, speech_backbone, sampler: str) -> None:
    model, batch = mesh_system(speech_backbone, sampler=sampler), batch_of(talking_root)
    torch.nn.init.zeros_(model.denoiser.vertex_decoder.weight)
    torch.testing.assert_close(model.animate(batch), batch.template[:, None].expand_as(batch.vertices))


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_sampling_in_the_row_space_is_sampling_of_vertices(
    talking_root, speech_backbone, monkeypatch, sampler: str, offsets: bool
) -> None:
    model, batch = mesh_system(speech_backbone, sampler=sampler, offsets=offsets, unit=0.1), batch_of(talking_root)
    weight = model.denoiser.input_projection.weight
    assert weight.shape == (8, 36), "fewer rows than coordinates"
    rows = torch.linalg.qr(weight.T).Q
    noises = torch.randn(5, *batch.vertices.shape[:2], 36)

    speech, _ = model.hear(batch)
    x = noises[0]
    for row, step in enumerate((3, 2, 1, 0), start=1):
        predicted = model.denoise(x, torch.full((6,), step), speech, batch)
        eta = {"ddpm": 1.0, "ddim": 0.0}[sampler]
        x = model.scheduler.step(predicted, step, x, eta=eta, variance_noise=noises[row]).prev_sample
    still = batch.template[:, None] if offsets else 0
    expected = still + 0.1 * x.detach().unflatten(-1, (12, 3))

    drawn = iter(noises @ rows)
    monkeypatch.setattr(facediffuser, "gaussian", lambda generators, frames, width: next(drawn))
    real = batch.frame_mask
    torch.testing.assert_close(model.animate(batch)[real], expected[real], rtol=1e-4, atol=1e-5)


def test_samples_differ_and_are_the_same_in_any_batch(talking_root, speech_backbone) -> None:
    model, batch = mesh_system(speech_backbone, samples=3), batch_of(talking_root)
    assert len(set(batch.lengths.tolist())) > 1
    together = model.predict_step(batch, 0)
    for i, key in enumerate(batch.key):
        assert together[key].shape == (3, int(batch.lengths[i]), 12, 3)
        assert (together[key][0] - together[key][1]).abs().max() > 1e-4
        alone = model.predict_step(batch.clip(i), 0)[key]
        torch.testing.assert_close(together[key], alone, rtol=0, atol=1e-5)


def test_noise_is_normal_and_zero_where_padded() -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    noise = gaussian(generators, torch.tensor([500, 1000]), 8)
    assert noise.shape == (2, 1000, 8)
    assert not noise[0, 500:].any()
    assert abs(noise[1].mean()) < 0.05
    assert abs(noise[1].std() - 1) < 0.05


@pytest.mark.parametrize("emotions", [None, ["neutral"]])
def test_loss_of_a_batch_is_the_mean_over_its_frames(talking_root, speech_backbone, emotions) -> None:
    model, batch = mesh_system(speech_backbone, emotions=emotions, unit=0.01), batch_of(talking_root)
    step, noise = torch.tensor([0, 1, 2, 3, 0, 1]), torch.randn(*batch.vertices.shape[:2], 36)
    losses, counts = [], []
    for i in range(len(batch)):
        clip = batch.clip(i)
        speech, frames = model.hear(clip)
        losses.append(model.loss(speech, frames, clip, step[i : i + 1], noise[i : i + 1, : int(frames)]))
        counts.append(frames)
    expected = (torch.stack(losses) * torch.cat(counts)).sum() / torch.cat(counts).sum()
    torch.testing.assert_close(model.loss(*model.hear(batch), batch, step, noise), expected)


def test_the_emotion_variant_takes_speaker_emotion_and_intensity(talking_root, speech_backbone) -> None:
    model, batch = mesh_system(speech_backbone, emotions=["neutral", "happy"]), batch_of(talking_root, size=3)
    assert model.conditions == ("subject", "emotion", "intensity")
    assert mesh_system(speech_backbone).conditions == ("subject",)
    batch.subject_index = torch.tensor([0, 1, -1])
    batch.emotion, batch.intensity = torch.tensor([0, 1, 1]), torch.tensor([0, 2, 1])
    assert model.code(batch).tolist() == [[1, 0, 1, 0, 1, 0, 0], [0, 1, 0, 1, 0, 0, 1], [1, 0, 0, 1, 0, 1, 0]]
    happy = model.animate(batch)
    batch.emotion = torch.zeros(3, dtype=torch.int64)
    assert not torch.allclose(model.animate(batch)[1], happy[1])
    batch.intensity = torch.tensor([0, 3, 0])
    with pytest.raises(UserError, match=rf"clip '{batch.key[1]}': no intensity, but FaceDiffuser takes one of 0, 1, 2"):
        model.animate(batch)


@pytest.mark.parametrize("code_on_speech", [False, True])
def test_the_code_multiplies_the_output_or_the_speech(code_on_speech: bool) -> None:
    torch.manual_seed(0)
    network = MeshDenoiser(2, 1, 3, steps=2, latent_dim=4, gru_dim=4, code_on_speech=code_on_speech).eval()
    projected, step, speech = torch.randn(1, 5, 8), torch.tensor([1]), torch.randn(1, 5, 3)
    torch.nn.init.zeros_(network.code.weight)
    silenced = network.hidden(projected, step, speech, torch.ones(1, 1))
    if not code_on_speech:
        assert not silenced.any()
        return
    for parameter in network.speech_projection.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.ones_(network.code.weight)
    torch.testing.assert_close(network.hidden(projected, step, speech, torch.ones(1, 1)), silenced)


def test_steps_are_coded_by_sines_and_cosines_in_turn() -> None:
    expected = [math.sin(7), math.cos(7), math.sin(7 / 100), math.cos(7 / 100)]
    torch.testing.assert_close(Sinusoid(4)(torch.tensor([7])), torch.tensor([expected]))


def test_strange_samplers_and_numbers_of_steps_are_refused(speech_backbone) -> None:
    with pytest.raises(
        UserError, match=r"model\.sample_steps: 3, expected a number that divides diffusion_steps \(4\)"
    ):
        mesh_system(speech_backbone, sample_steps=3)
    with pytest.raises(UserError, match=r"model\.sampler: 'euler', expected one of ddpm, ddim"):
        mesh_system(speech_backbone, sampler="euler")


@pytest.mark.parametrize("variant", ["beat", "uudamm"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_rig_moves_by_what_is_sampled(talking_root, rig_system, variant: str, sampler: str) -> None:
    model, batch = rig_system(variant=variant, sampler=sampler, layers=3), batch_of(talking_root)
    control, vertices = model.control(batch), model.animate(batch)
    torch.testing.assert_close(vertices[:, :, 0, :2] - batch.template[:, None, 0, :2], control)
    clip = batch.clip(2)
    torch.testing.assert_close(control[2:3, : int(clip.lengths)], model.control(clip), rtol=0, atol=1e-5)


def test_a_rig_learns_its_controls(talking_root, rig_system) -> None:
    """All controls are 0.5: from any noise the samples come to it."""
    model, batch = rig_system(dropout=0.0, lr=0.02, gru_dim=16), batch_of(talking_root)
    batch.weights = torch.full_like(batch.weights, 0.5)
    model.log = lambda *args, **kwargs: None
    optimiser = model.configure_optimizers()
    for _ in range(60):
        optimiser.zero_grad()
        model.training_step(batch, 0).backward()
        optimiser.step()
    assert (model.control(batch)[batch.frame_mask] - 0.5).abs().mean() < 0.05


OFFICIAL_COUNTS = {
    "biwi": ({"num_vertices": 23370, "subjects": list("abcdef")}, 207_906_152, 189_134_952),
    "vocaset": (
        {
            "num_vertices": 5023,
            "subjects": list("abcdefgh"),
            "latent_dim": 256,
            "gru_dim": 256,
            "diffusion_steps": 1000,
        },
        107_796_327,
        89_025_127,
    ),
    "multiface": (
        {
            "num_vertices": 6172,
            "subjects": list("abcdefghi"),
            "latent_dim": 256,
            "gru_dim": 256,
            "diffusion_steps": 1000,
        },
        110_447_326,
        91_676_126,
    ),
    "beat": (51, 96_653_081, 77_881_881),
    "uudamm": (192, 97_458_752, 78_687_552),
}


@pytest.mark.parametrize("data", list(OFFICIAL_COUNTS))
def test_parameter_counts_are_the_official_ones(monkeypatch, data: str) -> None:
    hubert = {"model_type": "hubert"}
    monkeypatch.setattr(backbones, "load", lambda spec, kind: SpeechEncoder(hubert).requires_grad_(False))
    settings, total, trained = OFFICIAL_COUNTS[data]
    with torch.device("meta"):
        if isinstance(settings, dict):
            model = FaceDiffuser(encoder="hub:facebook/hubert-base-ls960", **settings)
        else:
            monkeypatch.setattr(tasks, "load_rig", lambda spec: Rig([str(i) for i in range(settings)]))
            layers = {"beat": 2, "uudamm": 4}[data]
            model = FaceDiffuserRig("names:x", 0, ["a"], "hub:facebook/hubert-base-ls960", variant=data, layers=layers)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


def test_it_learns_to_open_the_mouth_with_loudness(talking_root, speech_backbone, tmp_path) -> None:
    model = mesh_system(speech_backbone, gru_dim=16, latent_dim=16, offsets=True, unit=0.03, lr=0.01, dropout=0.0)
    torch.nn.init.zeros_(model.denoiser.vertex_decoder.weight)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=60, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, limit_val_batches=0, enable_checkpointing=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=SpeechDataModule(str(talking_root), batch_size=3))
    batch = batch_of(talking_root)
    real = batch.frame_mask
    error = (model.eval().animate(batch) - batch.vertices)[real].square().mean()
    still = (batch.template[:, None] - batch.vertices)[real].square().mean()
    assert error < 0.5 * still


def test_measurements_of_every_test_clip(talking_root, speech_backbone) -> None:
    series = mesh_system(speech_backbone).measurements(SpeechDataModule(str(talking_root), batch_size=3))
    keys = set(batch_of(talking_root, "test").key)
    for sampler in ("ddpm", "ddim"):
        assert all(set(series[f"{sampler}_{name}"]) == keys for name in ("diversity", "lve", "ce"))
        for key in keys:
            assert series[f"{sampler}_diversity"][key] > 0
            assert series[f"{sampler}_ce"][key] <= series[f"{sampler}_lve"][key]
