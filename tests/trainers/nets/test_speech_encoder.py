from typing import get_args

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2ForCTC, Wav2Vec2Model
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from datamodules.errors import UserError
from trainers import backbones
from trainers.nets.speech_encoder import (
    Alignment,
    SpeechEncoder,
    TrainedPart,
    from_official,
    interpolate_features,
    nearest_features,
    normalise,
    pair_features,
)

CONFIG = {
    "conv_dim": [8] * 7,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 3,
}


def encoder(**changes) -> SpeechEncoder:
    torch.manual_seed(0)
    return SpeechEncoder({**CONFIG, **changes}, ["sil", "a", "b"]).eval()


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "wavlm"])
@pytest.mark.parametrize("alignment", get_args(Alignment))
def test_a_clip_gives_the_same_alone_and_in_a_padded_batch(kind: str, norm: str, alignment: Alignment) -> None:
    network = encoder(model_type=kind, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer")
    lengths = torch.tensor([16_000, 9_000, 1_600])
    frames = torch.tensor([24, 14, 2])
    audio = torch.randn(3, 16_000)
    audio[1, 9_000:], audio[2, 1_600:] = 0, 0
    states, counts = network(audio, lengths, alignment, frames)
    for i, (samples, count) in enumerate(zip(lengths, counts, strict=True)):
        alone, (alone_count,) = network(audio[i : i + 1, :samples], lengths[i : i + 1], alignment, frames[i : i + 1])
        assert alone_count == count == alone.shape[1]
        torch.testing.assert_close(states[i, :count], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "wavlm"])
def test_native_states_are_those_of_transformers(kind: str) -> None:
    network = encoder(model_type=kind)
    audio = torch.randn(1, 8_000)
    states, _ = network(audio, torch.tensor([8_000]))
    torch.testing.assert_close(states, network.network(normalise(audio[0])[None]).last_hidden_state)


def test_alignments_give_the_promised_number_of_states() -> None:
    network, audio, lengths = encoder(), torch.randn(1, 16_000), torch.tensor([16_000])
    assert network(audio, lengths)[1] == 49
    assert network(audio, lengths, "interpolate", torch.tensor([30]))[1] == 30
    assert network(audio, lengths, "pairs", torch.tensor([20]))[1] == 40
    assert network(audio, lengths, "pairs", torch.tensor([30]))[1] == 48
    assert network(audio, lengths, "pair_states", torch.tensor([20]))[1] == 40
    assert network(audio, lengths, "interpolate_states", torch.tensor([30]))[1] == 30
    assert network(audio, lengths, "nearest", torch.tensor([30]))[1] == 30
    assert network(audio, lengths, "resample_pairs", torch.tensor([30]))[1] == 60


def test_states_are_aligned_after_the_transformer_saw_the_whole_clip() -> None:
    network, audio, lengths = encoder(), torch.randn(1, 16_000), torch.tensor([16_000])
    states, _ = network(audio, lengths)
    frames = torch.tensor([20])
    assert torch.equal(network(audio, lengths, "pair_states", frames)[0], states[:, :40])
    torch.testing.assert_close(network(audio, lengths, "resample_pairs", frames)[0][0, [0, -1]], states[0, [0, -1]])
    ramp = torch.arange(6.0)[:, None]
    assert nearest_features(ramp, 3)[:, 0].tolist() == [1, 3, 5]
    assert nearest_features(ramp, 12)[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize(("part", "trained"), [("none", set()), ("upper", {"2"}), ("transformer", {"0", "1", "2"})])
def test_parts_that_are_trained(part: TrainedPart, trained: set[str]) -> None:
    network = encoder(num_hidden_layers=3)
    network.train_part(part)
    names = [name for name, parameter in network.network.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[2] for name in names if name.startswith("encoder.layers.")} == trained
    assert not any(name.startswith("feature_extractor.") for name in names)
    assert any(name.startswith("feature_projection.") for name in names) == (part == "transformer")


def test_mel_energies_are_those_of_a_reference_and_of_a_clip_alone() -> None:
    network = backbones.load("mel:40", "speech")
    audio, lengths = torch.randn(2, 6_400), torch.tensor([6_400, 3_500])
    states, counts = network(audio, lengths)
    assert (states.shape, counts.tolist()) == ((2, 20, 40), [20, 10])
    filters = mel_filter_bank(401, 40, 0, 8_000, 16_000, norm="slaney", mel_scale="slaney")
    reference = spectrogram(
        normalise(audio[0]).numpy(),
        window_function(800, "hann"),
        frame_length=800,
        hop_length=320,
        power=2.0,
        pad_mode="constant",
        mel_filters=filters,
        mel_floor=1e-5,
        log_mel="log",
    )
    torch.testing.assert_close(states[0], torch.from_numpy(reference.T[:20]).float(), rtol=1e-4, atol=1e-4)
    alone, _ = network(audio[1:, :3_500], lengths[1:], "interpolate", torch.tensor([7]))
    torch.testing.assert_close(network(audio, lengths, "interpolate", torch.tensor([13, 7]))[0][1, :7], alone[0])
    with pytest.raises(UserError, match="mel energies have no weights"):
        network.train_part("upper")
    with pytest.raises(UserError, match="expected mel:<number of bands>"):
        backbones.load("mel:wide", "speech")
    with pytest.raises(ValueError, match="number of frames"):
        network(audio, lengths, "pairs")


def test_interpolation_is_linear_and_keeps_both_ends() -> None:
    features = torch.randn(7, 2)
    expected = [np.interp(np.linspace(0, 6, 10), np.arange(7), column) for column in features.T.numpy()]
    torch.testing.assert_close(interpolate_features(features, 10), torch.tensor(np.array(expected).T).float())


def test_pairs_drop_what_has_no_partner_or_no_frame() -> None:
    features = torch.randn(7, 2)
    assert torch.equal(pair_features(features, 9), features[:6])
    assert torch.equal(pair_features(features, 2), features[:4])


@pytest.mark.parametrize("samples", [1, 100, 400, 1_600])
def test_short_clips_and_silence_are_finite(samples: int) -> None:
    network = encoder()
    for audio in (torch.zeros(1, samples), torch.randn(1, samples)):
        states, lengths = network(audio, torch.tensor([samples]), "interpolate", torch.tensor([3]))
        assert states.shape == (1, 3, 16)
        assert lengths == 3
        assert states.isfinite().all()


def test_level_and_offset_do_not_matter() -> None:
    network, audio, lengths = encoder(), torch.randn(1, 8_000), torch.tensor([8_000])
    torch.testing.assert_close(network(audio, lengths)[0], network(0.02 * audio + 0.1, lengths)[0], rtol=0, atol=1e-4)


def test_base_model_has_the_size_of_the_papers() -> None:
    with torch.device("meta"):
        network = SpeechEncoder({})
    network.train_part("transformer")
    assert network.receptive_field == 400
    assert sum(p.numel() for p in network.parameters()) == 94_371_712
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 90_171_264


def test_spec_augment_is_off() -> None:
    network = encoder(mask_time_prob=0.9, mask_time_length=2, hidden_dropout=0.0, attention_dropout=0.0)
    network.config.layerdrop = 0.0
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    audio, lengths = torch.randn(1, 16_000), torch.tensor([16_000])
    expected = network(audio, lengths)[0]
    torch.testing.assert_close(network.train()(audio, lengths)[0], expected)


def test_backbone_file_gives_the_same_network_back(tmp_path) -> None:
    network = encoder()
    init = {"config": CONFIG, "classes": network.classes}
    backbones.save(network, tmp_path / "speech.safetensors", "speech", init, {})
    loaded = backbones.load(f"path:{tmp_path}/speech.safetensors", "speech")
    audio, lengths = torch.randn(1, 8_000), torch.tensor([8_000])
    assert loaded.classes == ["sil", "a", "b"]
    assert torch.equal(loaded.logits(audio, lengths)[0], network.logits(audio, lengths)[0])


def test_encoder_without_classes_has_no_logits() -> None:
    with pytest.raises(UserError, match="no phoneme or character classifier"):
        SpeechEncoder(CONFIG).logits(torch.randn(1, 8_000), torch.tensor([8_000]))


def test_official_names_of_weight_norm_are_understood() -> None:
    source = Wav2Vec2Model(Wav2Vec2Config(**CONFIG))
    old = {
        key.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for key, value in source.state_dict().items()
    }
    assert any(key.endswith("weight_g") for key in old)
    network = SpeechEncoder(CONFIG)
    network.load_state_dict(from_official(old))
    assert all(torch.equal(network.network.state_dict()[key], value) for key, value in source.state_dict().items())


def hub_folder(path, **changes):
    """A CTC model as a hub snapshot holds it."""
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**{**CONFIG, **changes}))
    model.save_pretrained(path)
    (path / "vocab.json").write_text('{"<pad>": 0, "E": 1, "T": 2}')
    tokenizer = Wav2Vec2CTCTokenizer(str(path / "vocab.json"), unk_token="<pad>", bos_token=None, eos_token=None)
    tokenizer.save_pretrained(path)
    return model.eval()


def test_hub_model_is_loaded_with_its_character_classifier(tmp_path) -> None:
    model = hub_folder(tmp_path)
    network = backbones.load(f"hub:{tmp_path}", "speech")
    audio = torch.randn(1, 8_000)
    assert network.classes[:3] == ["<pad>", "E", "T"]
    logits, _ = network.logits(audio, torch.tensor([8_000]))
    torch.testing.assert_close(logits, model(normalise(audio[0])[None]).logits)


def test_hub_model_without_classifier_is_loaded_without(tmp_path) -> None:
    Wav2Vec2Model(Wav2Vec2Config(**CONFIG)).save_pretrained(tmp_path)
    assert backbones.load(f"hub:{tmp_path}", "speech").classifier is None


def test_hub_model_that_is_not_there_says_how_to_get_it(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="hf download nobody/nothing"):
        backbones.load("hub:nobody/nothing", "speech")


def test_incomplete_hub_model_is_refused(tmp_path) -> None:
    model = Wav2Vec2Model(Wav2Vec2Config(**CONFIG))
    state = {key: value for key, value in model.state_dict().items() if "layers.1" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match="not a complete wav2vec"):
        backbones.load(f"hub:{tmp_path}", "speech")
