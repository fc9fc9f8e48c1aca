from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers import backbones
from trainers.nets.cached_decoder import alignment_mask, causal_bias, periodic_positions
from trainers.nets.speech_encoder import SpeechEncoder
from trainers.speech.codetalker import CodeTalker, from_official
from trainers.tasks import load_system

SIZES = {
    "codes": 12,
    "code_dim": 4,
    "codes_per_frame": 4,
    "motion_dim": 16,
    "motion_layers": 1,
    "motion_heads": 2,
    "motion_hidden": 24,
    "dim": 12,
    "layers": 2,
    "heads": 2,
    "period": 4,
    "train_encoder": "none",
    "stage_epochs": [1],
}
BIWI = {"alignment": "pairs", "codes_per_frame": 2, "code_projection": True}


def system(encoder: str, **changes) -> CodeTalker:
    """Random weights everywhere, large enough for the feedback to matter."""
    torch.manual_seed(0)
    model = CodeTalker(num_vertices=12, subjects=["anna", "bert"], encoder=encoder, **{**SIZES, **changes})
    torch.nn.init.normal_(model.decoder.to_codes.weight)
    torch.nn.init.normal_(model.autoencoder.quantiser.embedding.weight)
    torch.nn.init.normal_(model.decoder.vertex_encoder.weight)
    torch.nn.init.normal_(model.decoder.audio_projection.weight)
    return model


def batch_of(root, split: str = "train", size: int = 6) -> SpeechBatch:
    return next(iter(SpeechDataModule(str(root), batch_size=size).loader(split)))


def doubled(model: CodeTalker, batch: SpeechBatch) -> tuple[CodeTalker, SpeechBatch]:
    """In double precision: normalisation over time enlarges rounding where a channel hardly moves."""
    changes = {name: getattr(batch, name).double() for name in ("audio", "vertices", "template")}
    return model.double().eval(), replace(batch, **changes)


def recomputed(model: CodeTalker, batch: SpeechBatch, window: int | None) -> torch.Tensor:
    """Offsets as the official loop makes them: everything again for every frame, through all vertices."""
    decoder, autoencoder = model.decoder, model.autoencoder
    speech, lengths = model.hear(batch)
    memory, style = decoder.audio_projection(speech), decoder.style(model.style_index(batch))
    count = speech.shape[1] // decoder.audio_per_frame
    inputs = style[:, None]
    for t in range(count):
        hidden = inputs + periodic_positions(t + 1, style.shape[-1], decoder.period)
        bias = causal_bias(decoder.heads, t + 1, decoder.period).to(style).repeat(len(style), 1, 1)
        mask = alignment_mask(count, decoder.audio_per_frame)[: t + 1]
        for layer in decoder.layers:
            hidden = torch.nn.TransformerDecoderLayer.forward(layer, hidden, memory, tgt_mask=bias, memory_mask=mask)
        codes, _, _ = autoencoder.quantise(decoder.to_codes(hidden))
        seen = codes if window is None else codes[:, -window:]
        # The official code decodes the first frame twice over, since its normalisation takes no single frame.
        seen = seen.repeat(1, 2, 1) if t == 0 else seen
        full = torch.full((len(style),), seen.shape[1])
        motion = autoencoder.decoder.mapping(autoencoder.decoder.hidden(seen, full))
        newest = decoder.vertex_encoder(motion[:, -1]) + style
        inputs = torch.cat([inputs, newest[:, None]], dim=1)
    return autoencoder.decoder.mapping(autoencoder.decoder.hidden(codes, lengths))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("form", [{}, BIWI], ids=["vocaset", "biwi"])
@torch.no_grad()
def test_cached_decoding_equals_full_recomputation(talking_root, speech_backbone, form: dict, window) -> None:
    model, batch = system(speech_backbone, **form, feedback_frames=window), batch_of(talking_root, size=2)
    model, batch = doubled(model, batch)
    expected = recomputed(model, batch, window)
    _, frames = model.hear(batch)
    vertices = model.animate(batch)
    for i, count in enumerate(frames.tolist()):
        offsets = (vertices[i, :count] - batch.template[i]).flatten(1)
        torch.testing.assert_close(offsets, expected[i, :count], rtol=1e-6, atol=1e-6)
        assert (expected[i, 1:count] - expected[i, : count - 1]).abs().max() > 0.01
    assert model.hparams.feedback_frames == window


@pytest.mark.parametrize("form", [{}, BIWI], ids=["vocaset", "biwi"])
def test_batch_gives_what_its_clips_give_alone(talking_root, speech_backbone, form: dict) -> None:
    model, batch = doubled(system(speech_backbone, **form), batch_of(talking_root))
    assert len(set(batch.lengths.tolist())) > 1
    together = model.animate(batch)
    for i, length in enumerate(batch.lengths.tolist()):
        torch.testing.assert_close(together[i, :length], model.animate(batch.clip(i))[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", [{}, BIWI], ids=["vocaset", "biwi"])
def test_losses_are_means_over_real_frames(talking_root, speech_backbone, form: dict) -> None:
    model, batch = system(speech_backbone, **form).eval(), batch_of(talking_root)
    clips = [batch.clip(i) for i in range(len(batch))]
    _, heard = model.hear(batch)
    for losses, frames in ((model.motion_losses, batch.lengths), (model.speech_losses, heard)):
        whole, alone = losses(batch), [losses(clip) for clip in clips]
        for name, value in whole.items():
            shares = frames.double() / frames.sum()
            expected = sum(share * terms[name].double() for share, terms in zip(shares, alone, strict=True))
            torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)


def test_losses_are_those_of_the_paper(talking_root, speech_backbone) -> None:
    model, clip = system(speech_backbone).eval(), batch_of(talking_root, size=1)
    offsets, autoencoder = model.offsets(clip), model.autoencoder
    features = autoencoder.encoder(offsets, clip.lengths)
    rows = features.reshape(-1, 4)
    book = autoencoder.quantiser.embedding.weight
    codes = book[(rows[:, None] - book).square().sum(-1).argmin(-1)]
    decoded = autoencoder.decoder.mapping(autoencoder.decoder.hidden(codes.reshape(features.shape), clip.lengths))
    terms = model.motion_losses(clip)
    torch.testing.assert_close(terms["motion"], (decoded - offsets).abs().mean())
    torch.testing.assert_close(terms["quantisation"], 1.25 * (codes - rows).square().mean())

    speech, lengths = model.hear(clip)
    predicted = model.decoder(speech, model.style_index(clip), offsets)
    torch.testing.assert_close(
        model.speech_losses(clip)["feature"], (predicted - codes.reshape(features.shape)).square().mean()
    )
    previous = torch.cat([torch.zeros_like(offsets[:, :1]), offsets[:, :-1]], dim=1)
    changed = offsets.clone()
    changed[:, -1] += 1  # the last frame is never an input
    assert torch.equal(model.decoder(speech, model.style_index(clip), changed), predicted)
    changed[:, 3] += 1
    assert torch.equal(model.decoder(speech, model.style_index(clip), changed)[:, :4], predicted[:, :4])
    assert not torch.allclose(model.decoder(speech, model.style_index(clip), changed)[:, 4], predicted[:, 4])
    assert previous.shape == offsets.shape
    assert lengths == clip.lengths


def test_every_frame_has_its_own_codes(talking_root, speech_backbone) -> None:
    model = system(speech_backbone)
    features = torch.randn(2, 3, 16)
    codes, _, numbers = model.autoencoder.quantise(features)
    assert numbers.shape == (2, 3, 4)
    book = model.autoencoder.quantiser.embedding.weight
    torch.testing.assert_close(codes, book[numbers].flatten(2))
    one, _, _ = model.autoencoder.quantise(features[1:, 2:])
    torch.testing.assert_close(one, codes[1:, 2:])


def test_prediction_does_not_see_the_truth_and_holds_the_last_pose(talking_root, speech_backbone) -> None:
    model, batch = system(speech_backbone, **BIWI).eval(), batch_of(talking_root, size=1)
    before = model.animate(batch)
    assert torch.equal(model.animate(replace(batch, vertices=torch.randn_like(batch.vertices))), before)
    _, frames = model.hear(batch)
    assert frames < batch.lengths  # 30 fps, but 25 pairs of features a second
    assert (before[0, int(frames) :] == before[0, int(frames) - 1]).all()


def test_bad_settings_are_refused(speech_backbone) -> None:
    for change, message in (
        ({"motion_dim": 20}, "model.motion_dim: 20, expected codes_per_frame x code_dim, 16"),
        ({"lr": [0.1]}, "model.lr"),
        ({"feedback_frames": 0}, "model.feedback_frames: 0"),
        ({"stage_epochs": []}, "model.stage_epochs"),
    ):
        with pytest.raises(UserError, match=message):
            system(speech_backbone, **change)


@pytest.mark.parametrize("train_encoder", ["none", "transformer"])
def test_stages_train_autoencoder_then_decoder(talking_root, speech_backbone, tmp_path, train_encoder: str) -> None:
    model = system(speech_backbone, train_encoder=train_encoder, lr=[0.01, 0.01], halve_every=1, stage_epochs=[2])
    states, rates = [], []

    class Record(pl.Callback):
        def on_train_epoch_end(self, trainer, module) -> None:
            states.append({key: value.clone() for key, value in module.named_parameters()})
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
            assert module.autoencoder.training == (module.stage == 0)

    before = {key: value.clone() for key, value in model.named_parameters()}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, limit_val_batches=0, log_every_n_steps=1, callbacks=[Record()],
    )  # fmt: skip
    trainer.fit(model, datamodule=SpeechDataModule(str(talking_root), batch_size=3))

    def changed(old: dict, new: dict) -> set[str]:
        return {key.split(".")[0] for key in old if not torch.equal(old[key], new[key])}

    assert changed(before, states[1]) == {"autoencoder"}
    assert changed(states[1], states[2]) == ({"decoder"} if train_encoder == "none" else {"decoder", "encoder"})
    moved = [key for key in states[1] if not torch.equal(states[1][key], states[2][key])]
    assert not any("feature_extractor" in key for key in moved), "the convolutions of the speech encoder stay frozen"
    assert [rate[0] for rate in rates] == pytest.approx([0.005, 0.0025, 0.00125])
    assert [rate[1] for rate in rates] == [0.01] * 3
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    batch = batch_of(talking_root, "test")
    assert torch.equal(load_system(tmp_path / "model.ckpt").animate(batch), model.eval().animate(batch))


def paper_system(monkeypatch, **changes) -> CodeTalker:
    monkeypatch.setattr(backbones, "load", lambda spec, kind: SpeechEncoder({}, ["a", "b"]))
    with torch.device("meta"):
        return CodeTalker(encoder="hub:facebook/wav2vec2-base-960h", **changes)


PAPER = {
    "vocaset": {"num_vertices": 5023, "subjects": list("abcdefgh")},
    "biwi": {
        "num_vertices": 23370,
        "subjects": list("abcdef"),
        "alignment": "pairs",
        "code_dim": 128,
        "codes_per_frame": 8,
        "code_projection": True,
        "layers": 12,
        "period": 25,
    },
}


@pytest.mark.parametrize("form", ["vocaset", "biwi"])
def test_paper_scale_sizes(monkeypatch, form: str) -> None:
    settings = PAPER[form]
    model = paper_system(monkeypatch, **settings)
    d, hidden, width = 1024, 1536, 3 * settings["num_vertices"]
    layer = 4 * d + 3 * d * d + (d * d + d) + (d * hidden + hidden) + (hidden * d + d)
    transformer = (5 * d * d + d) + (d * d + d) + 6 * layer
    ends = 2 * (d * d + d) + width * d if form == "biwi" else width * d + width
    autoencoder = (width * d + d) + 2 * transformer + ends + 256 * settings.get("code_dim", 64)
    attention = 4 * (d * d + d)
    block = 2 * attention + (2 * d * d + 2 * d) + (2 * d * d + d) + 3 * 2 * d
    decoder = (768 * d + d) + (width * d + d) + len(settings["subjects"]) * d + d * d
    decoder += settings.get("layers", 6) * block
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == 94_371_712 + autoencoder + decoder
    if form == "vocaset":
        assert total == pytest.approx(315e6, rel=0.02)  # MemoryTalker's table


@pytest.mark.parametrize("form", ["vocaset", "biwi"])
def test_official_names_cover_the_network(monkeypatch, form: str) -> None:
    model = paper_system(monkeypatch, **{**PAPER[form], "layers": 1, "motion_layers": 2})
    ends = ("weight", "bias")
    official = {f"audio_feature_map.{end}" for end in ends} | {f"vertice_map.{end}" for end in ends}
    official |= {"learnable_style_emb.weight", "feat_map.weight", "PPE.pe", "autoencoder.quantize.embedding.weight"}
    layer = torch.nn.TransformerDecoderLayer(4, 1)
    official |= {f"transformer_decoder.layers.0.{key}" for key in layer.state_dict()}
    for side, first in (("encoder", "squasher"), ("decoder", "expander")):
        keys = {f"{first}.0.0.{end}" for end in ends} | {f"{side}_linear_embedding.net.{end}" for end in ends}
        for i in range(2):
            attention, forward = (f"{side}_transformer.net.{2 * i + half}.fn" for half in (0, 1))
            keys |= {f"{half}.norm.{end}" for half in (attention, forward) for end in ends}
            keys |= {f"{attention}.fn.{name}" for name in ("to_qkv.weight", "to_out.weight", "to_out.bias")}
            keys |= {f"{forward}.fn.{name}.{end}" for name in ("l1", "l2") for end in ends}
        official |= {f"autoencoder.{side}.{key}" for key in (*keys, f"{side}_pos_embedding.pe")}
    official |= {f"autoencoder.encoder.vertice_mapping.0.{end}" for end in ends}
    official.add("autoencoder.decoder.vertice_map_reverse.weight")
    if form == "biwi":
        official |= {f"autoencoder.encoder.encoder_linear_embedding_post.net.{end}" for end in ends}
        official |= {f"autoencoder.decoder.decoder_linear_embedding_pre.net.{end}" for end in ends}
    else:
        official.add("autoencoder.decoder.vertice_map_reverse.bias")
    renamed = from_official({f"module.{key}": torch.zeros(0) for key in official})
    assert set(renamed) == {key for key, _ in model.named_parameters() if not key.startswith("encoder.")}
    with pytest.raises(UserError, match="unknown weight 'strange"):
        from_official({"strange.weight": torch.zeros(0)})
