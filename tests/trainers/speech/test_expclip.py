from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from torch.nn.functional import normalize

from datamodules.errors import UserError
from datamodules.head import Head
from datamodules.speech import SpeechDataModule
from trainers import backbones
from trainers.nets.speech_encoder import SpeechEncoder
from trainers.speech.expclip import ExpCLIP, StyledGenerator, nearest_is_own
from trainers.tasks import load_system

SUBJECTS = ["F1", "M1", "F2", "M2", "F3", "M3", "F4", "M4"]
UNITS = Head.load().units


@pytest.fixture
def system(speech_backbone, clip_folder, prompts_root):
    def make(**changes) -> ExpCLIP:
        torch.manual_seed(0)
        settings = {
            "rig": "demo", "num_vertices": 3689, "subjects": SUBJECTS, "encoder": speech_backbone,
            "clip": f"path:{clip_folder}", "prompts": str(prompts_root), "embedding": 8, "hidden": 16, "dim": 16,
            "layers": 2, "heads": 2, "reach": 5, "dropout": 0.0, "prompt_batch": 8, "stage_epochs": [1],
        }  # fmt: skip
        return ExpCLIP(**{**settings, **changes})

    return make


@pytest.fixture
def batch(head_root):
    return next(iter(SpeechDataModule(str(head_root), batch_size=4).loader("test")))


def fit(model, head_root, folder, epochs: int) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, limit_val_batches=0, log_every_n_steps=1, use_distributed_sampler=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=SpeechDataModule(str(head_root), batch_size=4))
    return trainer


def generator(reach: int = 3) -> StyledGenerator:
    torch.manual_seed(0)
    network = StyledGenerator(4, 5, 6, dim=8, layers=2, heads=2, reach=reach, dropout=0.0).double().eval()
    torch.nn.init.normal_(network.nearness)
    return network


def test_a_frame_sees_its_neighbourhood_and_the_style():
    network = generator()
    speech, style = torch.randn(1, 20, 4).double().requires_grad_(), torch.randn(1, 6).double().requires_grad_()
    out = network(speech, torch.ones(1, 20, dtype=torch.bool), style)
    heard, styled = torch.autograd.grad(out[0, 10].sum(), [speech, style])
    seen = heard[0].abs().sum(-1).nonzero()[:, 0].tolist()
    assert seen == list(range(4, 17))  # two layers of three frames each
    assert (styled != 0).all()


def test_attention_knows_the_order_of_frames():
    network = generator()
    speech, real = torch.randn(1, 7, 4).double(), torch.ones(1, 7, dtype=torch.bool)
    mirrored = network(speech.flip(1), real, torch.zeros(1, 6).double()).flip(1)
    assert not torch.allclose(network(speech, real, torch.zeros(1, 6).double()), mirrored)


def test_padding_changes_nothing():
    network = generator()
    speech, style = torch.randn(2, 30, 4).double(), torch.randn(2, 6).double()
    real = torch.arange(30) < torch.tensor([[30], [11]])
    together = network(speech, real, style)
    alone = network(speech[1:, :11], real[1:, :11], style[1:])
    torch.testing.assert_close(together[1:, :11], alone)
    assert together.isfinite().all()


def test_prompts_images_and_the_neutral_expression(system, batch):
    model = system().eval()
    neutral = model.space.of_expression(torch.zeros(4, 52))
    torch.testing.assert_close(model.prompted_style(batch), neutral)
    told = replace(batch, prompt=["", "a glad face", "", "a sad face"])
    style = model.prompted_style(told)
    torch.testing.assert_close(style[::2], neutral[::2])
    torch.testing.assert_close(style[1:2], model.embed(["a glad face"]))
    torch.testing.assert_close(style[3:], model.embed(["a sad face"]))

    image = torch.rand(4, 3, 40, 40) * 2 - 1
    shown = model.prompted_style(replace(told, prompt_image=image))
    torch.testing.assert_close(shown[1::2], style[1::2])
    expected = model.space.image_head(normalize(model.clip.encode_image(image[:1]), dim=-1))
    torch.testing.assert_close(shown[:1], normalize(expected, dim=-1))
    assert not torch.allclose(model.control(told), model.control(batch))


def test_a_clip_alone_and_in_a_batch_has_its_own_prompt(system, batch):
    model = system().eval()
    told = replace(batch, prompt=["a glad face", "", "a sad face", ""])
    together = model.animate(told)
    for i, length in enumerate(batch.lengths.tolist()):
        torch.testing.assert_close(together[i, :length], model.animate(told.clip(i))[0], rtol=0, atol=1e-5)


def test_augmentation_keeps_the_speech_and_blends_the_rest(system, batch, head_root, tmp_path):
    model = system(augmentation=1.0, weakest=0.5, unprompted=0.0)
    fit(model, head_root, tmp_path, epochs=2)
    speaks = torch.tensor([name.startswith(("jaw", "mouth", "tongue")) for name in UNITS])
    assert torch.equal(model.spoken, speaks)
    for _ in range(5):
        style, target = model.augment(batch)
        assert torch.equal(target[..., speaks], batch.weights[..., speaks])
        torch.testing.assert_close(style.norm(dim=-1), torch.ones(4))
        for i in range(4):
            # The tiny prompts move one control of the upper face each: strength 1 replaces the clip's own motion.
            up = max(range(52), key=lambda unit: target[i, :, unit].mean().item() if not speaks[unit] else -1)
            assert UNITS[up] in ("cheekSquintLeft", "browInnerUp")
            rest = next(u for u in range(52) if not speaks[u] and UNITS[u] not in ("cheekSquintLeft", "browInnerUp"))
            kept = target[i, :, rest] / batch.weights[i, :, rest].clamp(min=1e-9)
            share = kept[batch.weights[i, :, rest] > 0.01]
            torch.testing.assert_close(share, share.mean().expand_as(share), rtol=1e-3, atol=1e-3)
            strength = 1 - share.mean()
            assert 0.5 - 1e-3 <= strength <= 1 + 1e-3
            torch.testing.assert_close(
                target[i, :, up], strength + (1 - strength) * batch.weights[i, :, up], rtol=1e-3, atol=1e-3
            )


def test_the_neutral_expression_augments_as_well(system, batch, head_root, tmp_path):
    model = system(augmentation=1.0, weakest=1.0, unprompted=1.0)
    fit(model, head_root, tmp_path, epochs=2)
    style, target = model.augment(batch)
    torch.testing.assert_close(style, model.prompted_style(batch))
    torch.testing.assert_close(target, torch.where(model.spoken, batch.weights, 0.0))


def test_without_augmentation_a_clip_s_style_is_one_of_its_frames(system, batch, head_root, tmp_path):
    model = system(augmentation=0.0)
    fit(model, head_root, tmp_path, epochs=2)
    style, target = model.augment(batch)
    assert torch.equal(target, batch.weights)
    for i, length in enumerate(batch.lengths.tolist()):
        frames = model.space.of_expression(batch.weights[i, :length])
        assert (frames - style[i]).abs().amax(-1).min() < 1e-5


def test_losses_are_means_over_real_frames(system, batch, head_root, tmp_path):
    model = system(augmentation=0.0, velocity_weight=1.0)
    fit(model, head_root, tmp_path, epochs=2)
    clips = [batch.clip(i) for i in range(4)]
    # One style for all, so that no draw differs.
    neutral = model.space.of_expression(torch.zeros(1, 52))
    model.augment = lambda some: (neutral.expand(len(some), -1), some.weights)
    with torch.no_grad():
        together = model.eval().generate(batch)
        alone = [model.generate(clip) for clip in clips]
    lengths = batch.lengths.float()
    for name, counts in (("controls", lengths), ("velocity", lengths - 1)):
        expected = (torch.stack([losses[name] for losses in alone]) * counts).sum() / counts.sum()
        torch.testing.assert_close(together[name], expected, rtol=1e-4, atol=1e-5)


def test_a_run_without_its_second_stage_is_refused(system, head_root, tmp_path):
    with pytest.raises(UserError, match=r"trainer.max_epochs: 1, but the last stage of ExpCLIP starts after epoch 1"):
        fit(system(), head_root, tmp_path, epochs=1)


def test_alignment_brings_texts_to_their_expressions(system, head_root, tmp_path):
    model = system(temperature=0.2)
    fit(model, head_root, tmp_path, epochs=2)
    model.space.requires_grad_(True)
    optimiser, known = torch.optim.Adam(model.space.parameters(), 5e-3), model.known
    for _ in range(300):
        optimiser.zero_grad()
        torch.stack(list(model.align(torch.arange(8)).values())).sum().backward()
        optimiser.step()
    text = model.embed(known.text)
    expression = model.space.of_expression(known.weights)
    nearest = (text @ expression.T).argmax(1)
    assert (known.emotion[nearest] == known.emotion).float().mean() > 0.9
    decoded = model.space.decode(text)
    assert (decoded - known.weights).abs().mean() < 0.02


def test_checkpoints_hold_neither_clip_nor_prompts(system, batch, head_root, tmp_path):
    model = system()
    trainer = fit(model, head_root, tmp_path, epochs=2)
    assert {key.split(".")[0] for key in model.state_dict()} == {"space", "generator"}
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    told = replace(batch, prompt=["a glad face"] * 4)
    assert torch.equal(load_system(tmp_path / "last.ckpt").animate(told), model.eval().animate(told))


def test_measurements_name_every_prompt_and_clip(system, batch, head_root, prompts_root):
    model = system().eval()
    data = SpeechDataModule(str(head_root), batch_size=2)
    series = model.measurements(data)
    assert set(series["retrieval"]) == {f"prompt-{i:03d}" for i in range(10, 14)}
    assert set(series["lip_error"]) == set(series["prompted_lip_error"]) == set(batch.key)
    lips = torch.as_tensor(data.regions["lips"])
    clip = batch.clip(0)
    apart = (model.animate(clip) - clip.vertices)[0][:, lips].norm(dim=-1).amax(-1).mean() * 1e3
    assert series["lip_error"][clip.key[0]] == pytest.approx(apart.item(), rel=1e-4)
    upper = [i for i, name in enumerate(UNITS) if not name.startswith(("jaw", "mouth", "tongue"))]
    clip.prompt = ["happy prompt 10"]
    off = (model.control(clip)[0] - model.read_prompts("test").weights[0])[:, upper].abs().mean()
    assert series["prompted_difference"][clip.key[0]] == pytest.approx(off.item(), rel=1e-4)


def test_nearest_emotion(prompts_root):
    from datamodules.prompts import PromptDataModule

    unseen = PromptDataModule(str(prompts_root), batch_size=1).whole("test")  # emotions 0, 1, 0, 1
    embedding = torch.tensor([[3.0, 1.0], [3.0, 1.0], [0.0, 1.0], [0.1, 1.0]])
    found = nearest_is_own(embedding, torch.eye(2), unseen)
    assert list(found.values()) == [1.0, 0.0, 0.0, 1.0]


def test_prompts_for_another_rig_are_refused(system, head_root, prompts_root, tmp_path):
    (tmp_path / "names.txt").write_text("open\nclose\n")
    model = system(rig=f"names:{tmp_path / 'names.txt'}", num_vertices=0, speech_controls=["open"])
    with pytest.raises(UserError, match=r"model.prompts: .* has other controls \(52: .*\) than model\.rig \(2: open"):
        model.read_prompts("train")


def test_speech_controls_that_name_nothing_are_refused(system):
    with pytest.raises(UserError, match="no control of demo starts with 'Mouth'"):
        system(speech_controls=["jaw", "Mouth"])


def test_without_a_prompt_nothing_of_the_clip_s_expression_is_left(system, batch, head_root, tmp_path):
    model = system(augmentation=1.0, unprompted=1.0, weakest=0.0)
    fit(model, head_root, tmp_path, epochs=2)
    _, target = model.augment(batch)
    assert not target[..., ~model.spoken][batch.frame_mask].any()
    torch.testing.assert_close(target[..., model.spoken], batch.weights[..., model.spoken])


def test_paper_scale_has_the_reconstruction_s_sizes(monkeypatch):
    class Clip(torch.nn.Module):
        class model:  # noqa: N801
            class config:  # noqa: N801
                projection_dim = 512

    def load(spec, kind):
        return Clip() if kind == "clip" else SpeechEncoder({}, ["a"]).requires_grad_(False)

    monkeypatch.setattr(backbones, "load", load)
    with torch.device("meta"):
        model = ExpCLIP("demo", 0, ["2"], encoder="hub:x", clip="hub:y", prompts="none")
    encoder = [tuple(p.shape) for p in model.space.expression_encoder.parameters() if p.ndim == 2]
    decoder = [tuple(p.shape) for p in model.space.expression_decoder.parameters() if p.ndim == 2]
    assert encoder == [(256, 52), (512, 256), (512, 512)]
    assert decoder == [(512, 512), (256, 512), (52, 256)]
    assert all(p.shape == (512, 512) for p in model.space.text_head.parameters() if p.ndim == 2)
