import math

import pytest
import torch

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers.speech.personalized_speech import (
    ExpressionEncoder,
    PersonalizedSpeech,
    ReverseGradient,
    StyledLayer,
    clip_summary,
    frame_phonemes,
    positions,
    same_speaker,
)


def batch_of(root, split: str = "train", size: int = 6) -> SpeechBatch:
    return next(iter(SpeechDataModule(str(root), batch_size=size).loader(split)))


@pytest.fixture
def system(speech_backbone, tmp_path) -> PersonalizedSpeech:
    names = tmp_path / "controls.txt"
    names.write_text("open\nclose\n")
    torch.manual_seed(0)
    model = PersonalizedSpeech(
        rig=f"names:{names}", num_vertices=0, subjects=["anna", "bert"], encoder=speech_backbone, phonemes=["h", "m"],
        dim=16, style_dim=8, layers=2, heads=2,
    )  # fmt: skip
    for layer in (*model.speech_encoder.layers, *model.decoder.layers):
        torch.nn.init.normal_(layer.modulation.weight, std=0.5)
    torch.nn.init.normal_(model.styles)
    return model.eval()


def test_data_of_other_controls_is_refused(system, talking_root) -> None:
    data = SpeechDataModule(str(talking_root), batch_size=1)
    system.check_controls(data)
    data.manifest.fields["controls"] = ["close", "open"]
    with pytest.raises(UserError, match=r"model\.rig: control 0 is 'open', but 'close' in .*; name the data's rig"):
        system.check_controls(data)
    data.manifest.fields["controls"] = ["open"]
    with pytest.raises(UserError, match=r"model\.rig: 2 controls, but .* has 1"):
        system.check_controls(data)


def test_a_layer_begins_as_the_plain_pre_norm_layer() -> None:
    torch.manual_seed(0)
    ours = StyledLayer(style_dim=3, dim=8, heads=2, dropout=0.0)
    plain = torch.nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)
    plain.self_attn.load_state_dict(ours.attention.state_dict())
    plain.linear1.load_state_dict(ours.feed_forward[0].state_dict())
    plain.linear2.load_state_dict(ours.feed_forward[3].state_dict())
    x, real = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    expected = plain(x, src_key_padding_mask=~real)
    torch.testing.assert_close(ours(x, torch.randn(2, 3), real), expected)
    ours.modulation.bias.data[:8] = 1.0  # the first scale: the attention's input doubles
    plain.norm1.weight.data.fill_(2.0)
    torch.testing.assert_close(ours(x, torch.randn(2, 3), real), plain(x, src_key_padding_mask=~real))


def test_style_is_a_mean_over_real_frames_and_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    encoder = ExpressionEncoder(controls=4, style_dim=3, dim=8, layers=1, heads=2, dropout=0.0).eval()
    motion, real = torch.randn(2, 7, 4), torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    style, content = encoder(motion, real)
    alone_style, alone_content = encoder(motion[1:, :4], real[1:, :4])
    torch.testing.assert_close(style[1:], alone_style)
    torch.testing.assert_close(content[1:, :4], alone_content)


def test_gradients_come_back_reversed() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = ReverseGradient.apply(x)
    assert torch.equal(y, x)
    (y * torch.tensor([3.0, 4.0])).sum().backward()
    assert x.grad.tolist() == [-3.0, -4.0]


def test_summary_is_quantiles_and_velocity_of_real_frames() -> None:
    content = torch.tensor([[[0.0], [4.0], [1.0], [2.0], [3.0], [99.0]]])
    real = torch.tensor([[True] * 5 + [False]])
    torch.testing.assert_close(
        clip_summary(content, real), torch.tensor([[0.2, 1.0, 2.0, 3.0, 3.8, (4 + 3 + 1 + 1) / 4]])
    )


def test_content_does_not_know_how_large_a_motion_is() -> None:
    torch.manual_seed(0)
    encoder = ExpressionEncoder(controls=4, style_dim=3, dim=8, layers=1, heads=2, dropout=0.0).eval()
    real = torch.tensor([[True] * 9 + [False] * 3])
    _, content = encoder(torch.rand(1, 12, 4), real)
    torch.testing.assert_close(content[:, :9].mean(1), torch.zeros(1, 8), rtol=0, atol=1e-5)
    torch.testing.assert_close(content[:, :9].std(1, correction=0), torch.ones(1, 8), rtol=1e-3, atol=0)


def test_positions_are_sines_and_cosines_of_any_length() -> None:
    table = positions(2000, 4)
    expected = [math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)]
    torch.testing.assert_close(table[3], torch.tensor(expected))
    assert table.shape == (2000, 4)


def test_styles_come_from_another_clip_of_the_same_speaker() -> None:
    torch.manual_seed(0)
    subjects = torch.tensor([0, 1, 0, 2, 0])
    drawn = torch.stack([same_speaker(subjects) for _ in range(50)])
    assert set(drawn[:, 0].tolist()) == {2, 4}
    assert set(drawn[:, 1].tolist()) == {1}
    assert torch.equal(subjects[drawn], subjects.expand_as(drawn))


def test_frames_have_the_phoneme_of_their_middle_and_its_duration(talking_root) -> None:
    batch = batch_of(talking_root, size=1).clip(0)
    frames, fps = int(batch.lengths[0]), 30
    batch.phonemes = [[("h", 0.0, 0.1), ("x", 0.1, 0.2), ("m", 0.2, 0.35)]]
    labels, durations = frame_phonemes(batch, ["h", "m"])
    # Middles lie at 1/60, 3/60 ...; 0.1 s are three frames, 0.2 to 0.35 s the middles 13/60 to 19/60 and 21/60.
    expected = [0, 0, 0, -100, -100, -100, 1, 1, 1, 1]
    assert labels[0, :10].tolist() == expected
    assert set(labels[0, 11:].tolist()) == {-100}
    torch.testing.assert_close(durations[0, [0, 3, 6]], torch.tensor([0.1 * fps, 1.0, 0.15 * fps]), rtol=1e-2, atol=0)
    assert labels.shape == (1, frames)


def test_batch_gives_what_its_clips_give_alone_and_does_not_see_the_truth(talking_root, system) -> None:
    batch = batch_of(talking_root)
    together = system.control(batch)
    for i, length in enumerate(batch.lengths.tolist()):
        clip = batch.clip(i)
        clip.weights = torch.full_like(clip.weights, torch.nan)
        torch.testing.assert_close(together[i, :length], system.control(clip)[0], rtol=0, atol=1e-5)


def test_losses_of_a_batch_are_means_over_the_frames_of_its_clips(talking_root, system) -> None:
    batch = batch_of(talking_root)
    itself = torch.arange(len(batch))
    together = system.losses(batch, itself)
    alone = [system.losses(batch.clip(i), itself[:1]) for i in range(len(batch))]
    frames = batch.lengths.double()
    counts = {"motion": frames, "velocity": frames - 1, "identity": torch.ones(len(batch)).double(),
              "adversary": torch.ones(len(batch)).double()}  # fmt: skip
    for name, expected in together.items():
        if name.split("/")[0] in counts:
            count = counts[name.split("/")[0]]
            values = torch.stack([losses[name] for losses in alone]).double()
            torch.testing.assert_close((values * count).sum() / count.sum(), expected.double(), rtol=1e-4, atol=1e-6)


def test_the_adversary_pushes_content_away_from_the_speaker_and_identity_pulls_style_to_it(
    talking_root, system
) -> None:
    batch = batch_of(talking_root)
    losses = system.losses(batch, torch.arange(len(batch)))
    (reversed_gradient,) = torch.autograd.grad(
        losses["adversary"], system.expression_encoder.content.weight, retain_graph=True
    )
    _, content = system.expression_encoder(batch.weights, batch.frame_mask)
    logits = system.adversary(clip_summary(content, batch.frame_mask))
    plain = torch.nn.functional.cross_entropy(logits, batch.subject_index)
    (gradient,) = torch.autograd.grad(plain, system.expression_encoder.content.weight)
    torch.testing.assert_close(reversed_gradient, -gradient)
    assert torch.autograd.grad(losses["identity"], system.expression_encoder.style.weight)[0].abs().sum() > 0


def test_style_is_another_clips_or_the_remembered_one(talking_root, system) -> None:
    batch = batch_of(talking_root)
    seen = []
    with system.decoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1])):
        system.losses(batch, torch.tensor([1, 1, 0, 3, 4, 5]))
    own, _ = system.expression_encoder(batch.weights, batch.frame_mask)
    torch.testing.assert_close(seen[0][[0, 2]], own[[1, 0]])
    torch.testing.assert_close(seen[0][[1, 3, 4, 5]], system.styles[batch.subject_index[[1, 3, 4, 5]]])


def test_remembered_styles_are_running_means(system) -> None:
    system.styles.zero_()
    system.remember(torch.tensor([[1.0] * 8, [3.0] * 8, [7.0] * 8]), torch.tensor([0, 0, 1]))
    assert system.styles[:, 0].tolist() == [2.0, 7.0]


def test_a_reference_gives_a_copy_its_style(talking_root, system) -> None:
    data = batch_of(talking_root, "test", size=3)
    style, _ = system.expression_encoder(data.weights, data.frame_mask)
    before = system.control(data)
    adapted = system.adapt(data)
    torch.testing.assert_close(adapted.styles, style.mean(0).expand(2, -1))
    assert torch.equal(system.control(data), before)
    system.styles.copy_(style.mean(0).expand(2, -1))
    torch.testing.assert_close(system.control(data), adapted.control(data))


def test_probes_are_measured_for_every_clip(talking_root, system) -> None:
    data = SpeechDataModule(str(talking_root), batch_size=3, predict_split="test")
    clips = [batch_of(talking_root, "train").clip(i) for i in range(6)]
    for clip in clips:  # two speakers, of whom one never opens the mouth
        clip.weights = torch.full_like(clip.weights, 3.0 * (clip.subject[0] == "anna"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainers.speech.personalized_speech.split_clips", lambda data: clips)
        series = system.measurements(data)
    assert set(series) == {"style", "content", "chance"}
    assert set(series["chance"].values()) == {0.5}
    assert all(value == 1.0 for value in series["style"].values())


def test_bad_references_are_refused(talking_root, system) -> None:
    batch = batch_of(talking_root)
    with pytest.raises(UserError, match="one person"):
        system.adapt(batch)
    with pytest.raises(UserError, match=r"lasts 0\.\d+ s, expected at least 1 s"):
        system.adapt(batch.clip(0))
    test = batch_of(talking_root, "test", size=3)
    test.weights = test.weights[..., :0]
    with pytest.raises(UserError, match="has 0 controls"):
        system.adapt(test)
