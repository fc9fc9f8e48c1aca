"""Speech encoders of the wav2vec 2.0 family: a waveform in, one hidden state per frame out.

The network is transformers' ``Wav2Vec2Model`` (Baevski et al. 2020): a convolutional extractor with a stride of
320 samples (50 Hz at 16 kHz), then a transformer. Animation systems need its states at the frame rate of the mesh,
and bring them there *between* the two parts; :meth:`SpeechEncoder.forward` names the ways.

SpecAugment is off, and a clip in a padded batch gives what it gives alone: the extractor runs clip by clip (its
group normalisation would otherwise mix padding into the statistics) and the transformer is masked.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2ForCTC, Wav2Vec2Model

from datamodules.errors import UserError

SAMPLE_RATE = 16_000
FEATURE_RATE = 50

Alignment = Literal["native", "interpolate", "pairs"]


class SpeechEncoder(nn.Module):
    """wav2vec 2.0 with explicit frame alignment and, where it was trained with one, a frame classifier.

    Args:
        config: arguments of transformers' ``Wav2Vec2Config``; an empty dict is the paper's base model.
        classes: what :meth:`logits` tells apart, in order: phonemes (the demo encoder) or characters (CTC models).
    """

    def __init__(self, config: dict[str, Any], classes: list[str] | None = None) -> None:
        super().__init__()
        self.config = Wav2Vec2Config(**{**config, "apply_spec_augment": False})
        self.wav2vec2 = Wav2Vec2Model(self.config)
        self.classes = list(classes or [])
        self.classifier = nn.Linear(self.dim, len(self.classes)) if self.classes else None

    @classmethod
    def from_hub(cls, name: str) -> "SpeechEncoder":
        """Loads a model of the Hugging Face hub from the local cache (or a local folder); nothing is downloaded.

        Raises:
            UserError: it is not in the cache, not a wav2vec 2.0 model, or lacks weights.
        """
        try:
            loaded: Any = Wav2Vec2ForCTC.from_pretrained(
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
        # The masking vector is SpecAugment's alone, and CTC checkpoints do without.
        missing -= {"wav2vec2.masked_spec_embed", "lm_head.weight", "lm_head.bias"}
        if missing:
            raise UserError(
                f"backbone 'hub:{name}': not a complete wav2vec 2.0 model, {len(missing)} weights are missing "
                f"(first '{min(missing)}')"
            )
        encoder = cls(model.config.to_diff_dict(), classes)
        encoder.wav2vec2.load_state_dict(model.wav2vec2.state_dict())
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

    def freeze_extractor(self) -> None:
        """Trains all but the convolutional extractor, as the animation papers do."""
        self.wav2vec2.freeze_feature_encoder()

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
            alignment: how features meet frames. ``native``: one state per feature, 50 Hz. ``interpolate``: features are
                interpolated linearly, first on first and last on last, to one per frame. ``pairs``: two features
                per frame (25 fps); what exceeds ``frames`` or has no partner is cut.
            frames: (B,) int64, frames of each clip; not needed for ``native``.

        Returns:
            The states (B, N, D), undefined where padded, and how many of each clip are real, (B,) int64. For ``pairs``
            they can be fewer than two per frame, where the audio ends before the frames do.
        """
        features = self.convolve(audio, audio_lengths)
        if alignment != "native":
            if frames is None:
                raise ValueError(f"alignment '{alignment}' needs the number of frames")
            align = {"interpolate": interpolate_features, "pairs": pair_features}[alignment]
            features = [align(clip, count) for clip, count in zip(features, frames.tolist(), strict=True)]
        lengths = torch.tensor([len(clip) for clip in features], device=audio.device)
        return self.contextualise(pad_sequence(features, batch_first=True), lengths), lengths

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
            features.append(self.wav2vec2.feature_extractor(clip[None])[0].T)
        return features

    def contextualise(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Features (B, N, C), of which (B,) are real, through projection and transformer: (B, N, D)."""
        mask = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
        projected, _ = self.wav2vec2.feature_projection(features)
        return self.wav2vec2.encoder(projected, attention_mask=mask).last_hidden_state


def normalise(waveform: Tensor) -> Tensor:
    """Zero mean and unit variance, as the models were pretrained; silence stays silence."""
    return (waveform - waveform.mean()) / (waveform.var(correction=0) + 1e-7).sqrt()


def interpolate_features(features: Tensor, frames: int) -> Tensor:
    """(N, C) -> (frames, C), linearly, first on first and last on last."""
    return interpolate(features.T[None], size=frames, mode="linear", align_corners=True)[0].T


def pair_features(features: Tensor, frames: int) -> Tensor:
    """(N, C) -> (2·min(frames, N // 2), C): two features for each frame."""
    return features[: 2 * min(frames, len(features) // 2)]


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a ``Wav2Vec2Model`` state dict to :class:`SpeechEncoder`'s; old weight-norm names are understood.

    =====================  ===============================================
    official               here
    =====================  ===============================================
    ``*.weight_g``         ``wav2vec2.*.parametrizations.weight.original0``
    ``*.weight_v``         ``wav2vec2.*.parametrizations.weight.original1``
    all others             ``wav2vec2.*``
    =====================  ===============================================
    """
    return {official_name(key): value for key, value in state.items()}


def official_name(key: str) -> str:
    """What the weight called ``key`` in a ``Wav2Vec2Model`` state dict is called here; see :func:`from_official`."""
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        if key.endswith(f".{old}"):
            key = key.removesuffix(old) + f"parametrizations.weight.{new}"
    return f"wav2vec2.{key}"


def _vocabulary(name: str) -> list[str]:
    vocabulary = Wav2Vec2CTCTokenizer.from_pretrained(name, local_files_only=True).get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)
