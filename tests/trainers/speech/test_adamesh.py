import copy
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers import backbones
from trainers.measuring import joined
from trainers.nets.speech_encoder import SpeechEncoder
from trainers.speech.adamesh import (
    ADAPTED,
    AdaMesh,
    ExpressionAdapter,
    PoseCodec,
    PoseGPT,
    attach_adapters,
    code_mask,
    draw,
    merge_adapters,
    pose_spread,
    steps,
)
from trainers.tasks import load_system

SIZES = {
    "dim": 16,
    "heads": 4,
    "feed_forward": 32,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "subsampling": 4,
    "post_width": 8,
    "dropout": 0.0,
    "post_dropout": 0.0,
    "ranks": [1, 2],
    "adapt_steps": 40,
    "adapt_lr": 0.01,
    "codes": 16,
    "code_dim": 8,
    "pose_dim": 16,
    "pose_layers": 2,
    "pose_window": 4,
    "clusters": 3,
    "stage_epochs": [1],
}


@pytest.fixture(scope="session")
def rig(tmp_path_factory) -> str:
    """The two controls of the tiny talking heads: one moves vertex 0 up, the other vertex 1 down."""
    offsets = torch.zeros(2, 12, 3)
    offsets[0, 0, 1], offsets[1, 1, 1] = 0.01, -0.01
    path = tmp_path_factory.mktemp("rig") / "rig.safetensors"
    save_file({"open": offsets[0].clone(), "close": offsets[1].clone()}, path, {"controls": "open\nclose"})
    return f"path:{path}"


def system(encoder: str, rig: str, **changes) -> AdaMesh:
    torch.manual_seed(0)
    settings = {"rig": rig, "num_vertices": 12, "subjects": ["anna", "bert"], "encoder": encoder}
    return AdaMesh(**{**settings, **SIZES, **changes})


def batch_of(root, split: str = "train", size: int = 6) -> SpeechBatch:
    """Clips whose controls follow the meshes, and whose heads turn slowly, more with every clip."""
    batch = next(iter(SpeechDataModule(str(root), batch_size=size).loader(split)))
    offsets = batch.vertices - batch.template[:, None]
    batch.weights = torch.stack([offsets[:, :, 0, 1], -offsets[:, :, 1, 1]], -1) / 0.01
    time = torch.arange(offsets.shape[1])[None, :, None] + torch.arange(3)
    gain = 0.02 * torch.arange(1, len(batch) + 1)[:, None, None]
    batch.pose = gain * (time / 6).sin() * batch.frame_mask[..., None]
    return batch


def randomised(model: AdaMesh, batch: SpeechBatch) -> AdaMesh:
    """Measured on a batch, with a codebook and bank as if trained."""
    model.measure([batch])
    model.codec.train().losses(*model.turns(batch))
    model.pose_loss(batch)
    return model.eval()


def test_conformer_blocks_equal_the_equations() -> None:
    """One block of width 4, recomputed by hand with the positional term as Transformer-XL defines it."""
    torch.manual_seed(0)
    network = ExpressionAdapter(6, 3, 1, 0, 2, 4, 0.0, dim=4, heads=2, feed_forward=8, kernel=3, dropout=0.0).eval()
    block, x = network.encoder.layers[0], torch.randn(5, 4)
    torch.nn.init.normal_(block.self_attn.pos_bias_u)
    torch.nn.init.normal_(block.self_attn.pos_bias_v)

    def half_step(x, norm, layer):
        return x + 0.5 * layer.output_dense(torch.nn.functional.silu(layer.intermediate_dense(norm(x))))

    with torch.no_grad():
        h = half_step(x, block.ffn1_layer_norm, block.ffn1)
        attention, y = block.self_attn, block.self_attn_layer_norm(h)
        q, k, v = (getattr(attention, f"linear_{name}")(y).unflatten(-1, (2, 2)) for name in "qkv")
        mixed = torch.zeros(5, 2, 2)
        for head in range(2):
            for i in range(5):
                scores = []
                for j in range(5):
                    angles = [(i - j) / 10_000 ** (2 * n / 4) for n in range(2)]
                    code = torch.tensor([f(a) for a in angles for f in (math.sin, math.cos)])
                    position = attention.linear_pos(code).unflatten(0, (2, 2))[head]
                    content = (q[i, head] + attention.pos_bias_u[head]) @ k[j, head]
                    scores.append((content + (q[i, head] + attention.pos_bias_v[head]) @ position) / 2**0.5)
                mixed[i, head] = torch.stack(scores).softmax(0) @ v[:, head]
        h = h + attention.linear_out(mixed.flatten(1))
        conv = block.conv_module
        a, b = (conv.layer_norm(h) @ conv.pointwise_conv1.weight[:, :, 0].T).chunk(2, dim=-1)
        gated = torch.cat([torch.zeros(1, 4), a * b.sigmoid(), torch.zeros(1, 4)])
        deep = torch.stack([(gated[t : t + 3] * conv.depthwise_conv.weight[:, 0].T).sum(0) for t in range(5)])
        deep = torch.nn.functional.silu(deep / (1 + conv.batch_norm.eps) ** 0.5)
        h = h + deep @ conv.pointwise_conv2.weight[:, :, 0].T
        h = block.final_layer_norm(half_step(h, block.ffn2_layer_norm, block.ffn2))
        expected = network.encoder.layer_norm(h)
        found = network.encoder(x[None], torch.ones(1, 5, dtype=torch.bool))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_merged_adapters_equal_unmerged_ones_and_start_from_nothing() -> None:
    torch.manual_seed(0)
    network = ExpressionAdapter(6, 3, 1, 1, 2, 8, 0.0, dim=16, heads=4, feed_forward=32, kernel=15, dropout=0.0).eval()
    plain = copy.deepcopy(network)
    states, real = torch.randn(2, 40, 6), torch.ones(2, 20, dtype=torch.bool)
    mixture = attach_adapters(network, [1, 2, 4])
    assert torch.equal(network(states, real)[1], plain(states, real)[1])

    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    # Six layers in each of two blocks, three ranks, A and B.
    assert len(trained) == 2 * len(ADAPTED) * 3 * 2
    for name, parameter in trained.items():
        assert any(layer in name for layer in ADAPTED)
        assert "lora_B" not in name or not parameter.any()
        torch.nn.init.normal_(parameter, std=0.3)
    layer = network.encoder.layers[0].self_attn.linear_q
    x = torch.randn(7, 16)
    low_rank = sum(x @ layer.lora_A[name].weight.T @ layer.lora_B[name].weight.T for name in layer.lora_A)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + low_rank)

    unmerged = network(states, real)[1]
    assert not torch.allclose(unmerged, plain(states, real)[1], atol=0.1)
    merge_adapters(mixture)
    torch.testing.assert_close(network(states, real)[1], unmerged, rtol=0, atol=1e-5)
    assert network.state_dict().keys() == plain.state_dict().keys()


def test_expression_loss_is_the_sum_of_both_absolute_errors(talking_root, speech_backbone, rig) -> None:
    model, batch = system(speech_backbone, rig), batch_of(talking_root)
    randomised(model, batch)
    true = batch.weights[batch.frame_mask].numpy()
    target = (batch.weights.numpy() - true.mean(0)) / true.std(0)
    states, _ = model.encode(batch)
    with torch.no_grad():
        rough, fine = model.expression(states, batch.frame_mask)
        loss = model.loss(states, batch)
    total, frames = 0.0, 0
    for i, length in enumerate(batch.lengths.tolist()):
        for predicted in (rough, fine):
            total += np.abs(predicted[i, :length].numpy() - target[i, :length]).sum()
        frames += length
    assert float(loss) == pytest.approx(total / frames, rel=1e-4)


def test_a_batch_gives_what_its_clips_give_alone(talking_root, speech_backbone, rig) -> None:
    batch = batch_of(talking_root)
    model = randomised(system(speech_backbone, rig), batch)
    assert len(set(batch.lengths.tolist())) > 1
    controls, poses = model.control(batch), model.head_pose(batch)
    losses, frames = [], []
    for i, length in enumerate(batch.lengths.tolist()):
        clip = batch.clip(i)
        torch.testing.assert_close(controls[i, :length], model.control(clip)[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(poses[i, :length], model.head_pose(clip)[0], rtol=0, atol=1e-5)
        losses.append(model.loss(model.encode(clip)[0], clip))
        frames.append(length)
    together = model.loss(model.encode(batch)[0], batch)
    torch.testing.assert_close(together, (torch.stack(losses) * torch.tensor(frames)).sum() / sum(frames))


def test_the_truth_is_not_seen_and_a_minute_can_be_spoken(talking_root, speech_backbone, rig) -> None:
    batch = batch_of(talking_root)
    model = randomised(system(speech_backbone, rig), batch)
    before = model.animate(batch), model.head_pose(batch)
    batch.vertices, batch.weights, batch.pose = (
        torch.randn_like(x) for x in (batch.vertices, batch.weights, batch.pose)
    )
    assert torch.equal(model.animate(batch), before[0])
    assert torch.equal(model.head_pose(batch), before[1])
    clip = batch.clip(0)
    clip.audio, clip.audio_lengths = torch.randn(1, 960_000), torch.tensor([960_000])
    clip.vertices, clip.lengths = clip.template[:, None].expand(-1, 1800, -1, -1), torch.tensor([1800])
    assert model.animate(clip).shape == (1, 1800, 12, 3)
    pose = model.head_pose(clip)
    assert pose.shape == (1, 1800, 3)
    assert pose.isfinite().all()


def test_codes_are_nearest_and_follow_the_means_of_their_vectors() -> None:
    codec = PoseCodec(3, 2)
    codec.codebook.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [50.0, 50.0]]))
    codec.usage.fill_(1.0)
    vectors = torch.tensor([[1.0, 1.0], [3.0, -1.0], [9.0, 2.0]])
    assert codec.quantise(vectors[None])[1].tolist() == [[0, 0, 1]]
    codec.follow(vectors)
    # Weights 0.9 for the old code, 0.1 for each new vector; then 0.9 for the old usage, 0.1 for the new.
    expected = torch.tensor([[(0.1 * 1 + 0.1 * 3) / 1.1, 0.0], [0.9 * 10 + 0.1 * 9, 0.1 * 2], [50.0, 50.0]])
    torch.testing.assert_close(codec.codebook, expected)
    torch.testing.assert_close(codec.usage, torch.tensor([1.1, 1.0, 0.9]))
    codec.usage[2] = PoseCodec.UNUSED
    codec.follow(vectors)
    assert any(torch.equal(codec.codebook[2], vector) for vector in vectors), "a code out of use starts again"


def test_codec_learns_to_give_back_a_pose() -> None:
    torch.manual_seed(0)
    codec = PoseCodec(32, 16)
    time = torch.arange(64)[None, :, None]
    turns = (time / torch.tensor([5.0, 7.0, 9.0]) + torch.arange(4)[:, None, None]).sin()
    real = torch.ones(4, 8, dtype=torch.bool)
    optimiser = torch.optim.Adam(codec.parameters(), lr=5e-3)
    for _ in range(200):
        optimiser.zero_grad()
        torch.stack(list(codec.losses(turns, real).values())).sum().backward()
        optimiser.step()
    codec.eval()
    decoded = codec.decode(codec.quantise(codec.encode(turns, real))[0], real)
    assert (decoded - turns).square().mean() < 0.15 * turns.square().mean()


def test_cached_generation_follows_its_own_scores_beyond_the_window() -> None:
    torch.manual_seed(0)
    gpt = PoseGPT(codes=9, speech_dim=5, styles=3, dim=16, layers=2, heads=4, window=4).eval()
    speech, style = torch.randn(2, 13, 5), torch.tensor([0, 2])
    with torch.no_grad():
        codes = gpt.generate(speech, style, [], top_k=9, temperature=0)
        assert torch.equal(gpt(codes, speech, style).argmax(-1), codes)
        changed = codes.clone()
        changed[:, 6] = (changed[:, 6] + 1) % 9
        assert torch.equal(gpt(changed, speech, style)[:, :7], gpt(codes, speech, style)[:, :7])


def test_draws_have_the_chances_of_the_softmax_over_the_best() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = draw(scores, [generator] * 4000, top_k=2, temperature=0.5)
    share = (drawn == 2).float().mean()
    assert set(drawn.tolist()) == {1, 2}
    assert float(share) == pytest.approx(1 / (1 + math.exp(-2)), abs=0.02)
    assert draw(scores[:1], [generator], top_k=2, temperature=0).tolist() == [2]


def test_helpers() -> None:
    assert code_mask(torch.tensor([1, 8, 17])).tolist() == [[True, False, False], [True, False, False], [True] * 3]
    assert steps(torch.tensor([[[1.0], [3.0], [2.0]]])).flatten().tolist() == [0, 2, -1]
    pose = torch.tensor([[[1.0], [3.0], [99.0]]])
    assert pose_spread(pose, torch.tensor([2])).tolist() == [[1.0]]


def test_style_matrix_counts_codes_by_what_is_said(speech_backbone, rig) -> None:
    model = system(speech_backbone, rig, clusters=2, code_dim=1)
    model.centroids.copy_(torch.tensor([0.0, 1.0])[:, None].expand(-1, 16))
    speech = torch.tensor([0.1, 0.9, 1.2, 0.2])[None, :, None].expand(-1, -1, 16)
    vectors, real = torch.tensor([[[2.0], [3.0], [-1.0], [7.0]]]), torch.tensor([[True, True, True, False]])
    sums, counts = model.style_matrices(speech, vectors, real)
    assert sums.tolist() == [[[2.0, 4.0], [2.0, 10.0]]]
    assert counts.tolist() == [3.0]


def test_the_style_of_a_training_speaker_is_found_again(talking_root, speech_backbone, rig) -> None:
    batch = batch_of(talking_root)
    model = randomised(system(speech_backbone, rig), batch)
    assert [model.retrieve(clips_of(batch, subject)) for subject in (0, 1)] == [0, 1]


def clips_of(batch: SpeechBatch, subject: int) -> SpeechBatch:
    return joined([batch.clip(i) for i in (batch.subject_index == subject).nonzero()[:, 0].tolist()])


def test_adaptation_tunes_adapters_alone_and_lowers_the_error(talking_root, speech_backbone, rig) -> None:
    batch = batch_of(talking_root)
    model = randomised(system(speech_backbone, rig), batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reference = clips_of(batch, 1)
    adapted = model.adapt(reference)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    changed = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in changed if name != "pose_style"} == {
        name for name in before if any(f"{layer}.weight" in name for layer in ADAPTED)
    }
    assert int(adapted.pose_style) == model.retrieve(reference)
    states, _ = model.encode(reference)
    assert adapted.loss(states, reference) < 0.95 * model.loss(states, reference)
    again = model.adapt(reference)
    assert torch.equal(again.control(batch), adapted.control(batch))
    assert not torch.equal(adapted.control(batch), model.control(batch))


def test_bad_references(talking_root, speech_backbone, rig) -> None:
    batch = batch_of(talking_root)
    model = randomised(system(speech_backbone, rig), batch)
    short = batch.clip(0)
    with pytest.raises(UserError, match=r"reference: lasts 0\.\d+ s, expected at least 1 s"):
        model.adapt(short)
    with pytest.raises(UserError, match="expected one person's"):
        model.adapt(batch)
    batch.subject = ["anna"] * len(batch)
    batch.weights = batch.weights[..., :1]
    with pytest.raises(UserError, match="reference: has 1 controls, expected the 2"):
        model.adapt(batch)


def test_a_fit_passes_both_stages_and_its_checkpoint_speaks_alike(
    talking_root, speech_backbone, rig, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("trainers.tasks.registry", lambda: {"adamesh": AdaMesh})
    model = system(speech_backbone, rig)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, limit_val_batches=0, use_distributed_sampler=False,
    )  # fmt: skip
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.fit(model, datamodule=SpeechDataModule(str(talking_root), batch_size=3))
    moved = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert {"expression", "codec", "gpt", "centroids", "style_counts"} <= moved
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded, batch = load_system(tmp_path / "model.ckpt"), batch_of(talking_root, "test")
    assert torch.equal(loaded.animate(batch), model.eval().animate(batch))
    # The tiny corpus has no head pose, so there is none to speak with.
    assert not loaded.head_pose(batch).any()


def test_too_little_speech_for_the_clusters(talking_root, speech_backbone, rig) -> None:
    model = system(speech_backbone, rig, clusters=500)
    with pytest.raises(UserError, match=r"model\.clusters: 500, but the training clips have \d+ pieces"):
        model.measure([batch_of(talking_root)])


def test_sizes_at_paper_scale(monkeypatch, tmp_path) -> None:
    """Counted by hand from the official sizes."""
    names = tmp_path / "controls.txt"
    names.write_text("\n".join(f"c{i}" for i in range(53)))
    encoder = SpeechEncoder({"hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16})
    monkeypatch.setattr(backbones, "load", lambda spec, kind: encoder.requires_grad_(False))
    with torch.device("meta"):
        model = AdaMesh(f"names:{names}", 0, ["a", "b"], "hub:facebook/hubert-large-ls960-ft")
    d, ff, kernel = 256, 2048, 15
    norm, dense = 2 * d, d * ff + ff + ff * d + d
    attention = 4 * (d * d + d) + d * d + 2 * d
    convolution = norm + d * 2 * d + d * kernel + norm + d * d
    block = 2 * (norm + dense) + norm + attention + convolution + norm
    subsampling = (9 + 1) * d + (9 * d + 1) * d + 512 * d * d + d
    post = 53 * 5 * 128 + 128 + 128 * 5 * 53 + 53
    expected = subsampling + 2 * (3 * block + norm) + d * 53 + 53 + post
    assert sum(p.numel() for p in model.expression.parameters()) == expected
