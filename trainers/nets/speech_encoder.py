"""Speech encoders: a waveform in, hidden states at 50 Hz or at the frame rate of a mesh out.

:class:`SpeechEncoder` is transformers' ``Wav2Vec2Model`` (Baevski et al. 2020), ``HubertModel`` (Hsu et al. 2021) or
``WavLMModel`` (Chen et al. 2022): a convolutional extractor with a stride of 320 samples (50 Hz at 16 kHz), then a
transformer. :class:`MelEncoder` gives log-mel energies in the same form, without a network. Animation systems need
states at the frame rate of the mesh, and bring them there between extractor and transformer or after it;
:data:`Alignment` names the ways.

SpecAugment is off, and a clip in a padded batch gives what it gives alone: the extractor runs clip by clip (its
group normalisation would otherwise mix padding into the statistics) and the transformer is masked.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModel,
    AutoModelForCTC,
    HubertConfig,
    PretrainedConfig,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    WavLMConfig,
)
from transformers.audio_utils import mel_filter_bank

from datamodules.errors import UserError

SAMPLE_RATE = 16_000
FEATURE_RATE = 50
STRIDE = SAMPLE_RATE // FEATURE_RATE
CONFIGS = {"wav2vec2": Wav2Vec2Config, "hubert": HubertConfig, "wavlm": WavLMConfig}

# How 50 Hz meets frames, and how many states a frame then has:
#   native              50 Hz, no frames
#   interpolate         extractor features interpolated to one per frame, first on first and last on last (FaceFormer)
#   pairs               two extractor features per frame, for 25 fps; what exceeds the frames is cut (FaceFormer, BIWI)
#   interpolate_states  states of the whole clip, interpolated to one per frame
#   nearest             the state of the whole clip that is nearest in time to the frame's middle
#   pair_states         two states of the whole clip per frame, for 25 fps (FaceXHuBERT, FaceDiffuser, ProbTalk3D)
#   resample_pairs      states of the whole clip interpolated to two per frame, any frame rate (FaceXHuBERT at 30 fps)
Alignment = Literal["native", "interpolate", "pairs", "interpolate_states", "nearest", "pair_states", "resample_pairs"]
STATES_PER_FRAME = {
    "interpolate": 1,
    "pairs": 2,
    "interpolate_states": 1,
    "nearest": 1,
    "pair_states": 2,
    "resample_pairs": 2,
}
# Which part is trained: nothing; the transformer but for its first two layers (FaceXHuBERT, FaceDiffuser); all but the
# convolutional extractor (FaceFormer).
TrainedPart = Literal["none", "upper", "transformer"]


class SpeechEncoder(nn.Module):
    """wav2vec 2.0, HuBERT or WavLM with explicit frame alignment and, where it has one, a frame classifier.

    Args:
        config: arguments of the transformers config that ``model_type`` names (``wav2vec2``, ``hubert``, ``wavlm``; the
            first where it is absent); else empty, it is the base model of the paper.
        classes: what :meth:`logits` tells apart, in order: phonemes (the demo encoder) or characters (CTC models).
    """

    def __init__(self, config: dict[str, Any], classes: list[str] | None = None) -> None:
        super().__init__()
        kind = CONFIGS[config.get("model_type", "wav2vec2")]
        self.config: PretrainedConfig = kind(**{**config, "apply_spec_augment": False})
        self.network = AutoModel.from_config(self.config)
        self.classes = list(classes or [])
        self.classifier = nn.Linear(self.dim, len(self.classes)) if self.classes else None

    @classmethod
    def from_hub(cls, name: str) -> "SpeechEncoder":
        """Loads a model of the Hugging Face hub from the local cache (or a local folder); nothing is downloaded.

        Raises:
            UserError: it is not in the cache, of another family, or lacks weights.
        """
        try:
            loaded: Any = AutoModelForCTC.from_pretrained(
                name, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            model, report = loaded
            missing = set(report["missing_keys"])
            has_head = not any(key.startswith("lm_head.") for key in missing)
            classes = _vocabulary(name)[: model.config.vocab_size] if has_head else None
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"backbone 'hub:{name}': not in the local cache ({type(error).__name__}); run "
                f"'hf download {name}' where there is a network, or give a local file as path:<file>"
            ) from error
        kind = model.config.model_type
        if kind not in CONFIGS:
            raise UserError(f"backbone 'hub:{name}': a model of type '{kind}', expected {', '.join(CONFIGS)}")
        # The masking vector is SpecAugment's alone, and CTC checkpoints do without.
        missing -= {f"{kind}.masked_spec_embed", "lm_head.weight", "lm_head.bias"}
        if missing:
            raise UserError(
                f"backbone 'hub:{name}': not a complete {kind} model, {len(missing)} weights are missing "
                f"(first '{min(missing)}')"
            )
        encoder = cls({**model.config.to_diff_dict(), "model_type": kind}, classes)
        encoder.network.load_state_dict(model.base_model.state_dict())
        if encoder.classifier is not None:
            encoder.classifier.load_state_dict(model.lm_head.state_dict())
        return encoder

    @property
    def dim(self) -> int:
        """Width of a hidden state."""
        return self.config.hidden_size

    @property
    def receptive_field(self) -> int:
        """Samples that one feature of the extractor sees: the shortest clip it takes."""
        field, stride = 1, 1
        for kernel, step in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            field += (kernel - 1) * stride
            stride *= step
        return field

    def train_part(self, part: TrainedPart) -> None:
        """Lets gradients reach a part of the network and freezes the rest."""
        self.network.requires_grad_(part != "none")
        if part != "none":
            # Its own method: transformers would otherwise ask for gradients of the waveform all the same.
            self.network.feature_extractor._freeze_parameters()
        if part == "upper":
            self.network.feature_projection.requires_grad_(False)
            self.network.encoder.layers[:2].requires_grad_(False)

    def forward(
        self,
        audio: Tensor,
        audio_lengths: Tensor,
        alignment: Alignment = "native",
        frames: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encodes a padded batch.

        Args:
            audio: (B, S) float32 waveforms at 16 kHz, any level.
            audio_lengths: (B,) int64, samples.
            alignment: how features meet frames, see :data:`Alignment`.
            frames: (B,) int64, frames of each clip; not needed for ``native``.

        Returns:
            The states (B, N, D), undefined where padded, and how many of each clip are real, (B,) int64. With pairs
            they can be fewer than two per frame, where the audio ends before the frames do.
        """
        features = self.convolve(audio, audio_lengths)
        if alignment in BEFORE:
            features = align(features, BEFORE[alignment], frames)
        lengths = torch.tensor([len(clip) for clip in features], device=audio.device)
        states = self.contextualise(pad_sequence(features, batch_first=True), lengths)
        if alignment in AFTER:
            clips = [clip[:length] for clip, length in zip(states, lengths.tolist(), strict=True)]
            clips = align(clips, AFTER[alignment], frames)
            lengths = torch.tensor([len(clip) for clip in clips], device=audio.device)
            states = pad_sequence(clips, batch_first=True)
        return states, lengths

    def logits(self, audio: Tensor, audio_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of :attr:`classes` at 50 Hz.

        Returns:
            (B, N, C) float32, undefined where padded, and how many of each clip are real, (B,) int64.

        Raises:
            UserError: the encoder has no classifier.
        """
        if self.classifier is None:
            raise UserError(
                "speech encoder: it has no phoneme or character classifier; use demo:speech or a CTC model "
                "such as hub:facebook/wav2vec2-base-960h"
            )
        states, lengths = self(audio, audio_lengths)
        return self.classifier(states), lengths

    def convolve(self, audio: Tensor, audio_lengths: Tensor) -> list[Tensor]:
        """The extractor's features of each clip, (N, C) at 50 Hz, from the normalised waveform."""
        features = []
        for waveform, length in zip(audio, audio_lengths.tolist(), strict=True):
            clip = normalise(waveform[:length])
            clip = pad(clip, (0, max(0, self.receptive_field - length)))
            features.append(self.network.feature_extractor(clip[None])[0].T)
        return features

    def contextualise(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Features (B, N, C), of which (B,) are real, through projection and transformer: (B, N, D)."""
        mask = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
        projected = self.network.feature_projection(features)
        if isinstance(projected, tuple):  # HuBERT's gives the projection alone
            projected = projected[0]
        return self.network.encoder(projected, attention_mask=mask).last_hidden_state


class MelEncoder(nn.Module):
    """Log-mel energies at 50 Hz, in the form of a speech encoder: Hann windows of 50 ms, Slaney's mel scale.

    Args:
        bands: number of mel bands.
    """

    classes: tuple[str, ...] = ()
    classifier = None
    filters: Tensor
    WINDOW = 800

    def __init__(self, bands: int) -> None:
        super().__init__()
        self.dim = bands
        filters = mel_filter_bank(
            self.WINDOW // 2 + 1, bands, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
        )
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)

    @classmethod
    def from_name(cls, name: str) -> "MelEncoder":
        """``80`` -> 80 bands.

        Raises:
            UserError: not a number above 0.
        """
        if not name.isdigit() or not int(name):
            raise UserError(f"backbone 'mel:{name}': expected mel:<number of bands>, such as mel:80")
        return cls(int(name))

    def train_part(self, part: TrainedPart) -> None:
        """There is nothing to train.

        Raises:
            UserError: a part is to be trained.
        """
        if part != "none":
            raise UserError(f"model.train_encoder: '{part}', but mel energies have no weights; set it to none")

    def forward(
        self,
        audio: Tensor,
        audio_lengths: Tensor,
        alignment: Alignment = "native",
        frames: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`SpeechEncoder.forward`; features and states are the same here."""
        clips = [self._energies(clip[:length]) for clip, length in zip(audio, audio_lengths.tolist(), strict=True)]
        if alignment != "native":
            clips = align(clips, {**BEFORE, **AFTER}[alignment], frames)
        lengths = torch.tensor([len(clip) for clip in clips], device=audio.device)
        return pad_sequence(clips, batch_first=True), lengths

    def _energies(self, waveform: Tensor) -> Tensor:
        """(S,) -> (S // 320, bands)."""
        with torch.autocast(waveform.device.type, enabled=False):  # half precision holds neither end of their range
            window = torch.hann_window(self.WINDOW, device=waveform.device)
            padded = pad(normalise(waveform), (0, max(0, STRIDE - len(waveform))))
            spectrum = torch.stft(
                padded, self.WINDOW, STRIDE, window=window, center=True, pad_mode="constant", return_complex=True
            )
            energies = spectrum.abs().square().T @ self.filters
        return energies[: max(1, len(waveform) // STRIDE)].clamp(min=1e-5).log()


def align(clips: list[Tensor], how: Callable[[Tensor, int], Tensor], frames: Tensor | None) -> list[Tensor]:
    """Brings the features of every clip, (N, C) at 50 Hz, to its number of frames."""
    if frames is None:
        raise ValueError("an alignment other than 'native' needs the number of frames")
    return [how(clip, count) for clip, count in zip(clips, frames.tolist(), strict=True)]


def normalise(waveform: Tensor) -> Tensor:
    """Zero mean and unit variance, as the models were pretrained; silence stays silence."""
    return (waveform - waveform.mean()) / (waveform.var(correction=0) + 1e-7).sqrt()


def interpolate_features(features: Tensor, frames: int) -> Tensor:
    """(N, C) -> (frames, C), linearly, first on first and last on last."""
    return interpolate(features.T[None], size=frames, mode="linear", align_corners=True)[0].T


def pair_features(features: Tensor, frames: int) -> Tensor:
    """(N, C) -> (2·min(frames, N // 2), C): two features for each frame; a single one is both of the first frame's."""
    if len(features) == 1:
        features = features.expand(2, -1)
    return features[: 2 * min(frames, len(features) // 2)]


def nearest_features(features: Tensor, frames: int) -> Tensor:
    """(N, C) -> (frames, C): the feature whose middle is nearest to each frame's."""
    middle = (torch.arange(frames, device=features.device) + 0.5) * len(features) / frames
    return features[middle.long().clamp(max=len(features) - 1)]


def resample_pairs(features: Tensor, frames: int) -> Tensor:
    """(N, C) -> (2·frames, C), linearly, first on first and last on last."""
    return interpolate_features(features, 2 * frames)


BEFORE = {"interpolate": interpolate_features, "pairs": pair_features}
AFTER = {
    "interpolate_states": interpolate_features,
    "nearest": nearest_features,
    "pair_states": pair_features,
    "resample_pairs": resample_pairs,
}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a ``Wav2Vec2Model`` or ``HubertModel`` state dict to :class:`SpeechEncoder`'s.

    Old names of weight normalisation are understood.

    =====================  ===============================================
    official               here
    =====================  ===============================================
    ``*.weight_g``         ``network.*.parametrizations.weight.original0``
    ``*.weight_v``         ``network.*.parametrizations.weight.original1``
    all others             ``network.*``
    =====================  ===============================================
    """
    return {official_name(key): value for key, value in state.items()}


def official_name(key: str) -> str:
    """What the weight called ``key`` in an official state dict is called here; see :func:`from_official`."""
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        if key.endswith(f".{old}"):
            key = key.removesuffix(old) + f"parametrizations.weight.{new}"
    return f"network.{key}"


def _vocabulary(name: str) -> list[str]:
    vocabulary = Wav2Vec2CTCTokenizer.from_pretrained(name, local_files_only=True).get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)
