from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from torch.distributions import Normal, kl_divergence

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.sources.mead3d import CONTROLS
from datamodules.speech import SpeechDataModule
from trainers import backbones, tasks
from trainers.nets.rig import Rig
from trainers.nets.speech_encoder import SpeechEncoder
from trainers.speech.probtalk3d import CodeBottleneck, EmotionJudge, GaussianBottleneck, ProbTalk3D, from_official
from trainers.tasks import load_system

# The tiny talking heads' controls are all zero; random ones stand in where the motion matters.
NAMES = ["open", "jaw_close"]


@pytest.fixture
def names(tmp_path) -> str:
    path = tmp_path / "controls.txt"
    path.write_text("open\nclose\n")
    return f"names:{path}"


def system(encoder: str, **changes) -> ProbTalk3D:
    torch.manual_seed(0)
    settings = {
        "num_vertices": 12,
        "subjects": ["anna", "bert"],
        "emotions": ["neutral"],
        "encoder": encoder,
        "alignment": "resample_pairs",
        "dim": 16,
        "heads": 2,
        "hidden": 24,
        "prior_layers": 1,
        "predictor_layers": 1,
        "codes": 12,
        "code_dim": 8,
        "train_encoder": "none",
        "stage_epochs": [1],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "load_rig", lambda spec: Rig(NAMES, torch.randn(2, 12, 3) / 100))
        return ProbTalk3D(rig="names:none", **{**settings, **changes})


def batch_of(root, split: str = "train", size: int = 6) -> SpeechBatch:
    batch = next(iter(SpeechDataModule(str(root), batch_size=size).loader(split)))
    motion = torch.rand(batch.weights.shape, generator=torch.Generator().manual_seed(0))
    return replace(batch, weights=motion * batch.frame_mask[..., None])


@pytest.mark.parametrize("latent", ["vq", "vae"])
def test_batch_gives_what_its_clips_give_alone(talking_root, speech_backbone, latent: str) -> None:
    model, batch = system(speech_backbone, latent=latent).eval(), batch_of(talking_root)
    assert len(set(batch.lengths.tolist())) > 1
    for temperature in (0.0, 0.5):
        model.temperature = temperature
        together = model.control(batch)
        for i, length in enumerate(batch.lengths.tolist()):
            torch.testing.assert_close(together[i, :length], model.control(batch.clip(i))[0], rtol=0, atol=1e-5)


def test_losses_are_means_over_real_frames(talking_root, speech_backbone) -> None:
    model, batch = system(speech_backbone).eval(), batch_of(talking_root)
    clips = [batch.clip(i) for i in range(len(batch))]
    frames = batch.lengths.double() / batch.lengths.sum()
    for whole, alone in (
        (model.prior_losses(batch.weights, batch.lengths), [model.prior_losses(c.weights, c.lengths) for c in clips]),
        (model.predictor_losses(batch), [model.predictor_losses(clip) for clip in clips]),
    ):
        for name, value in whole.items():
            expected = sum(share * terms[name] for share, terms in zip(frames, alone, strict=True))
            torch.testing.assert_close(value.double(), expected.double(), rtol=1e-4, atol=1e-6)


def test_code_rows_are_consecutive_values_of_channels_over_time() -> None:
    bottleneck = CodeBottleneck(codes=4, code_dim=2, beta=0.25)
    features = torch.arange(24.0).reshape(2, 3, 4)  # frame t of clip b holds 12 b + 4 t + channel
    lengths = torch.tensor([3, 2])
    rows = bottleneck.rows(features, lengths)
    assert rows[:6].flatten().tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert rows[6:].flatten().tolist() == [12, 16, 13, 17, 14, 18, 15, 19]
    back = bottleneck.frames(rows, lengths)
    assert torch.equal(back[0], features[0])
    assert torch.equal(back[1, :2], features[1, :2])


def test_draws_grow_apart_with_temperature_and_are_the_nearest_at_zero(talking_root, speech_backbone) -> None:
    model, clip = system(speech_backbone).eval(), batch_of(talking_root, size=1)
    states, lengths = model.hear(clip)
    features = model.predict(states, lengths, clip).detach()
    torch.nn.init.normal_(model.prior.bottleneck.codebook.embedding.weight)

    def spread(temperature: float) -> float:
        draws = []
        for model.draw in range(8):
            draws.append(model.draw_motion(features, lengths, temperature, model.generators(clip)))
        return torch.cat(draws).std(0).mean().item()

    assert spread(0.0) == 0
    assert 0 < spread(0.5) < spread(5.0) < spread(100.0)
    nearest = model.prior.bottleneck(features, lengths)[0]
    generators = model.generators(clip)
    torch.testing.assert_close(model.prior.bottleneck.draw(features, lengths, 1e-6, generators), nearest)


def test_a_draw_depends_on_key_and_number_alone(talking_root, speech_backbone) -> None:
    model, batch = system(speech_backbone, temperature=5.0, samples=2).eval(), batch_of(talking_root)
    torch.nn.init.normal_(model.prior.bottleneck.codebook.embedding.weight)
    first, second = model.predictions(batch, model.animate)
    torch.manual_seed(99)
    assert torch.equal(model.animate(batch), first)
    assert not torch.equal(first, second)


def test_gaussian_bottleneck_is_that_of_a_vae() -> None:
    torch.manual_seed(0)
    bottleneck, features = GaussianBottleneck(4), torch.randn(2, 5, 4)
    lengths = torch.tensor([5, 3])
    mean, deviation = bottleneck.mean(features), (bottleneck.log_variance(features) / 2).exp()
    divergence = kl_divergence(Normal(mean, deviation), Normal(torch.zeros_like(mean), torch.ones_like(mean)))
    expected = torch.cat([divergence[0], divergence[1, :3]]).mean()
    torch.testing.assert_close(bottleneck(features, lengths)[1], expected)
    generators = [torch.Generator().manual_seed(i) for i in (1, 2)]
    drawn = bottleneck.draw(features, lengths, 20.0, generators)
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(drawn[1, :3], (mean + 20 * deviation)[1, :3] - 20 * deviation[1, :3] * (1 - noise))
    torch.testing.assert_close(bottleneck.draw(features, lengths, 0.0, generators), mean)


def test_style_tells_subject_emotion_and_intensity(talking_root, speech_backbone) -> None:
    model, clip = system(speech_backbone, emotions=["neutral", "happy"], temperature=0.0).eval(), None
    clip = batch_of(talking_root, size=1)
    states, lengths = model.hear(clip)
    base = model.predict(states, lengths, clip)
    for change in (
        {"subject_index": 1 - clip.subject_index},
        {"emotion": 1 - clip.emotion},
        {"intensity": clip.intensity + 2},
    ):
        assert not torch.allclose(model.predict(states, lengths, replace(clip, **change)), base)
    for change in ({"emotion": torch.tensor([-1])}, {"intensity": torch.tensor([-1])}):
        with pytest.raises(UserError, match=f"{clip.key[0]}.*no {next(iter(change))}"):
            model.predict(states, lengths, replace(clip, **change))


def test_bad_settings_are_refused(speech_backbone) -> None:
    for change, message in (
        ({"alignment": "interpolate"}, "model.alignment"),
        ({"code_dim": 7}, "model.code_dim: 7"),
        ({"lr": [0.1]}, "model.lr"),
        ({"stage_epochs": [1, 2]}, "model.stage_epochs"),
    ):
        with pytest.raises(UserError, match=message):
            system(speech_backbone, **change)


def fit(model: ProbTalk3D, root, folder, epochs: int) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, limit_val_batches=0, log_every_n_steps=1, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=SpeechDataModule(str(root), batch_size=3))
    return trainer


@pytest.mark.parametrize("train_encoder", ["none", "upper"])
def test_stages_train_prior_then_predictor(
    talking_root, speech_backbone, names, tmp_path, monkeypatch, train_encoder: str
) -> None:
    monkeypatch.setattr(tasks, "load_rig", lambda spec: Rig(["open", "close"], torch.ones(2, 12, 3) / 100))
    settings = dict(system(speech_backbone).hparams)
    settings = {**settings, "rig": names, "train_encoder": train_encoder, "lr": [0.01, 0.01]}
    model = ProbTalk3D(**settings)
    states = []

    class Record(pl.Callback):
        def on_train_epoch_end(self, trainer, module) -> None:
            states.append({key: value.clone() for key, value in module.named_parameters()})
            assert module.prior.training == (module.stage == 0)

    before = {key: value.clone() for key, value in model.named_parameters()}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, limit_val_batches=0, log_every_n_steps=1, callbacks=[Record()],
    )  # fmt: skip
    trainer.fit(model, datamodule=SpeechDataModule(str(talking_root), batch_size=3))

    def changed(old: dict, new: dict) -> set[str]:
        return {key.split(".")[0] for key in old if not torch.equal(old[key], new[key])}

    assert changed(before, states[0]) == {"prior"}
    assert changed(states[0], states[1]) == ({"predictor"} if train_encoder == "none" else {"predictor", "encoder"})
    moved = [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    assert not any("feature_extractor" in key for key in moved), "the convolutions of the speech encoder stay frozen"
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    batch = batch_of(talking_root, "test")
    assert torch.equal(load_system(tmp_path / "model.ckpt").animate(batch), model.eval().animate(batch))


def test_first_stage_learns_to_reconstruct(talking_root, speech_backbone) -> None:
    model, batch = system(speech_backbone, dropout=0.0, lr=[0.01, 0.01]), batch_of(talking_root)
    time = torch.arange(batch.weights.shape[1])[:, None]
    motion = 0.5 + 0.4 * torch.sin(time / torch.tensor([3.0, 5.0])).expand(len(batch), -1, -1)
    optimiser = model.configure_optimizers()
    losses = []
    for _ in range(150):
        terms = model.prior_losses(motion, batch.lengths)
        optimiser.zero_grad()
        sum(terms.values()).backward()
        optimiser.step()
        losses.append((terms["expression"] + terms["jaw"]).item())
    assert losses[-1] < 0.3 * losses[0]


def test_emotions_are_judged_by_the_nearest_mean(talking_root, monkeypatch) -> None:
    batch = batch_of(talking_root)
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    clips = []
    for number in range(6):
        motion = (centres[number % 3] + 0.01 * (-1) ** number).expand(1, 4, 2)
        clips.append(replace(batch.clip(0), weights=motion, emotion=torch.tensor([number % 3])))
    monkeypatch.setattr("trainers.speech.probtalk3d.split_clips", lambda data, split: iter(clips))
    judge = EmotionJudge(None)
    assert judge(centres[:, None].expand(-1, 5, -1) + 0.2).tolist() == [0, 1, 2]


def paper_system(monkeypatch, **changes) -> ProbTalk3D:
    monkeypatch.setattr(backbones, "load", lambda spec, kind: SpeechEncoder({"model_type": "hubert"}))
    monkeypatch.setattr(tasks, "load_rig", lambda spec: Rig(CONTROLS))
    with torch.device("meta"):
        return ProbTalk3D(
            rig="flame",
            num_vertices=0,
            subjects=[str(i) for i in range(32)],
            emotions=[str(i) for i in range(8)],
            encoder="hub:facebook/hubert-base-ls960",
            **changes,
        )


def test_paper_scale_sizes(monkeypatch) -> None:
    model = paper_system(monkeypatch)

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    d, hidden = 256, 384
    layer = 2 * 2 * d + 3 * d * d + (d * d + d) + (d * hidden + hidden) + (hidden * d + d)
    head = (5 * d * d + d) + (d * d + d)  # convolution and embedding
    assert count(model.prior.encoder) == (53 * d + d) + head + 6 * layer
    assert count(model.prior.decoder) == head + 6 * layer + 53 * d
    assert count(model.prior.bottleneck) == 256 * 128
    assert count(model.predictor) == (2 * 768 * d + d) + (32 + 8 + 3) * d + head + 12 * layer
    assert model.control_groups == {"expression": list(range(50)), "jaw": [50, 51, 52]}


def test_official_names_cover_the_network(monkeypatch) -> None:
    model = paper_system(monkeypatch, prior_layers=2, predictor_layers=1)
    official = {"motion_prior.quantize.embedding.weight": torch.zeros(256, 128)}
    for part, side, layers in (
        ("motion_prior.motion_encoder", "encoder", 2),
        ("motion_prior.motion_decoder", "decoder", 2),
        ("feature_predictor", "encoder", 1),
    ):
        first = "expander.0.0" if side == "decoder" else "squasher.0.0"
        keys = [f"{first}.{end}" for end in ("weight", "bias")]
        keys += [f"{side}_linear_embedding.net.{end}" for end in ("weight", "bias")]
        for i in range(layers):
            attention, forward = (f"{side}_transformer.net.{2 * i + half}.fn" for half in (0, 1))
            keys += [f"{half}.norm.{end}" for half in (attention, forward) for end in ("weight", "bias")]
            keys += [f"{attention}.fn.{name}" for name in ("to_qkv.weight", "to_out.weight", "to_out.bias")]
            keys += [f"{forward}.fn.{name}.{end}" for name in ("l1", "l2") for end in ("weight", "bias")]
        keys.append(f"{side}_pos_embedding.pe")
        official |= {f"{part}.{key}": torch.zeros(0) for key in keys}
    official |= {f"motion_prior.motion_encoder.feature_mapping.0.{end}": torch.zeros(0) for end in ("weight", "bias")}
    official["motion_prior.motion_decoder.feature_mapping_reverse.weight"] = torch.zeros(0)
    official |= {f"feature_predictor.audio_feature_map.{end}": torch.zeros(0) for end in ("weight", "bias")}
    official["feature_predictor.style_embedding.weight"] = torch.zeros(0)
    official["motion_prior._losses.losses_train.total"] = torch.zeros(0)
    ours = {key for key, _ in model.named_parameters() if not key.startswith("encoder.")}
    assert set(from_official(official)) == ours
    with pytest.raises(UserError, match="unknown weight 'strange"):
        from_official({"strange.weight": torch.zeros(0)})
