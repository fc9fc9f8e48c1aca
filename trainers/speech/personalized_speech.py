"""After Personalized speech-driven expressive 3D facial animation synthesis with style control (Bozkurt 2023).

arXiv 2310.17011. The claim: a motion can be split into the style of who moves and the content of what is said, and with
a style taken from a short reference, speech is animated as that person would speak, without training anew.

No official code is known, and the paper's sizes and weights were not at hand: this is a reconstruction. From the paper
and from what others tell of it: non-autoregressive, in the space of blendshapes, trained end to end; an expression
encoder that splits a clip into style and content; a speech encoder that also predicts phonemes and their durations; an
expression decoder; transformer layers of speech encoder and decoder that the style modulates by scale and bias;
identity classified from the style, and adversarially, by gradient reversal, from the content. The rest is ours:

- Transformers of 4 layers, 256 wide, with sinusoidal positions; a style of 128 numbers, the mean over a clip.
- The decoder makes motion of the content of speech and of the content of a motion alike, so that both mean the same.
- The content has mean 0 and deviation 1 over a clip (instance normalisation, as in voice conversion), so that how large
  and how lopsided a speaker's motion is must come from the style.
- A clip's style comes from another clip of the same speaker in the batch (cross-reconstruction); where there is none it
  is the one remembered.
- Phoneme and logarithm of its duration are predicted for every frame; FastSpeech 2 predicts them for every phoneme.
- The adversary reads the content's quantiles and its mean absolute velocity over a clip.
- Losses: absolute error of the controls 1, of their velocity 0.5, from speech and from a motion's content; phonemes,
  durations, identity from the style and from the content 0.1 each.
- A training subject's style is the running mean of its clips' styles.
"""

import copy
import math
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm

from datamodules.batches import SpeechBatch
from datamodules.speech import SpeechDataModule
from trainers.measuring import split_clips
from trainers.nets.speech_encoder import SAMPLE_RATE, TrainedPart
from trainers.tasks import SpeechToRig, SystemInfo

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SUMMARY = len(QUANTILES) + 1
UNKNOWN = -100  # cross_entropy's own mark


class PersonalizedSpeech(SpeechToRig):
    """Bozkurt's system, reconstructed, as a trainable system.

    Args:
        rig: specification of the controls, see :func:`trainers.nets.rig.load_rig`.
        num_vertices: V of the mesh; 0 on data of controls alone.
        subjects: training subjects, whose styles are remembered.
        encoder: backbone specification of the speech encoder.
        phonemes: those that the phoneme head tells apart; others are not counted.
        dim: width of the transformers and of the content.
        style_dim: of a style.
        layers: of each of the three transformers.
        heads: attention heads.
        dropout: in the transformers, while training.
        velocity_weight: of the error of frame-to-frame differences.
        phoneme_weight: of the phonemes' cross-entropy.
        duration_weight: of the squared error of the logarithm of a phoneme's frames.
        identity_weight: of the speaker's cross-entropy, from the style.
        adversary_weight: of the reversed gradient of the speaker's cross-entropy, from the content.
        train_encoder: which part of the speech encoder is trained.
        lr: learning rate of Adam.
        unseen: the training subject whose style stands in for a speaker never seen, ``fixed:k``.
    """

    info = SystemInfo(
        name="personalized_speech",
        title="after PersonalizedSpeech (Bozkurt)",
        task="speech-to-mesh",
        paper="Bozkurt, Personalized Speech-driven Expressive 3D Facial Animation Synthesis with Style Control",
        year=2023,
        url="https://arxiv.org/abs/2310.17011",
        basis="reconstruction",
    )
    conditions = ("subject", "reference")
    styles: Tensor
    style_counts: Tensor

    def __init__(
        self,
        rig: str,
        num_vertices: int,
        subjects: list[str],
        encoder: str,
        phonemes: list[str],
        dim: int = 256,
        style_dim: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.1,
        velocity_weight: float = 0.5,
        phoneme_weight: float = 0.1,
        duration_weight: float = 0.1,
        identity_weight: float = 0.1,
        adversary_weight: float = 0.1,
        train_encoder: TrainedPart = "none",
        lr: float = 1e-4,
        unseen: str = "fixed:0",
    ) -> None:
        super().__init__(
            rig,
            num_vertices,
            subjects,
            encoder=encoder,
            alignment="interpolate_states",
            train_encoder=train_encoder,
            unseen=unseen,
        )
        self.save_hyperparameters()
        self.phonemes = phonemes
        self.loss_weights = {
            "velocity": velocity_weight,
            "phoneme": phoneme_weight,
            "duration": duration_weight,
            "identity": identity_weight,
            "adversary": adversary_weight,
        }
        self.lr = lr
        controls = len(self.rig.controls)
        blocks: dict[str, Any] = {"dim": dim, "layers": layers, "heads": heads, "dropout": dropout}
        self.expression_encoder = ExpressionEncoder(controls, style_dim, **blocks)
        self.speech_encoder = StyledTransformer(self.encoder.dim, style_dim, **blocks)
        self.decoder = StyledTransformer(dim, style_dim, **blocks)
        self.output = nn.Linear(dim, controls)
        self.phoneme_head = nn.Linear(dim, len(phonemes))
        self.duration_head = nn.Linear(dim, 1)
        self.identity_head = nn.Linear(style_dim, len(subjects))
        self.adversary = nn.Sequential(nn.Linear(SUMMARY * dim, dim), nn.ReLU(), nn.Linear(dim, len(subjects)))
        self.register_buffer("styles", torch.zeros(len(subjects), style_dim))
        self.register_buffer("style_counts", torch.zeros(len(subjects)))

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """All losses, weighted."""
        losses = self.losses(batch, same_speaker(batch.subject_index))
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, batch_size=len(batch))
        return torch.stack(
            [self.loss_weights.get(name.split("/")[0], 1.0) * loss for name, loss in losses.items()]
        ).sum()

    def losses(self, batch: SpeechBatch, other: Tensor) -> dict[str, Tensor]:
        """Every loss before its weight; means over real frames or over clips.

        Args:
            batch: the clips, of training subjects.
            other: (B,) int64, the clip whose style each is given; its own number for the remembered style.

        Returns:
            ``motion`` and ``velocity`` from ``/speech`` and from ``/content``, ``phoneme``, ``duration``, ``identity``,
            ``adversary``.
        """
        real = batch.frame_mask
        steps = real[:, 1:]
        own, content = self.expression_encoder(batch.weights, real)
        if self.training:
            self.remember(own.detach(), batch.subject_index)
        itself = other == torch.arange(len(other), device=other.device)
        style = torch.where(itself[:, None], self.styles[batch.subject_index], own[other])
        heard = self.hear(batch, style)
        losses = {}
        for name, source in (("speech", heard), ("content", content)):
            error = self.output(self.decoder(source, style, real)) - batch.weights
            losses[f"motion/{name}"] = error[real].abs().mean()
            losses[f"velocity/{name}"] = error.diff(dim=1)[steps].abs().mean()
        labels, durations = frame_phonemes(batch, self.phonemes)
        known = real & (labels != UNKNOWN)
        if known.any():
            losses["phoneme"] = cross_entropy(self.phoneme_head(heard)[known], labels[known])
            losses["duration"] = (self.duration_head(heard)[..., 0] - durations.log())[known].square().mean()
        losses["identity"] = cross_entropy(self.identity_head(own), batch.subject_index)
        summary = ReverseGradient.apply(clip_summary(content, real))
        losses["adversary"] = cross_entropy(self.adversary(summary), batch.subject_index)
        return losses

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on all that is trained."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    @torch.no_grad()
    def control(self, batch: SpeechBatch) -> Tensor:
        """In the remembered style of the subject; see :meth:`SpeechToRig.control`."""
        style = self.styles[self.style_index(batch)]
        return self.output(self.decoder(self.hear(batch, style), style, batch.frame_mask)).clamp(0, 1)

    def hear(self, batch: SpeechBatch, style: Tensor) -> Tensor:
        """The content of speech, as it is spoken in a style (B, style_dim): (B, T, dim)."""
        states, _ = self.encode(batch)
        return self.speech_encoder(states, style, batch.frame_mask)

    @torch.no_grad()
    def remember(self, styles: Tensor, subjects: Tensor, patience: int = 20) -> None:
        """Moves the remembered styles of subjects (B,) toward those seen (B, style_dim): the mean of the last ones."""
        for style, subject in zip(styles, subjects.tolist(), strict=True):
            self.style_counts[subject] += 1
            self.styles[subject] += (style - self.styles[subject]) / self.style_counts[subject].clamp(max=patience)

    def adapt(self, reference: SpeechBatch) -> "PersonalizedSpeech":
        """Takes the style of clips; nothing is trained.

        Args:
            reference: clips of one person with the values of their controls, a second or more in all.

        Returns:
            A copy in evaluation mode that has this person's style alone. This system stays as it is.

        Raises:
            UserError: see :meth:`check_reference`.
        """
        self.check_reference(reference)
        adapted = copy.deepcopy(self).eval().requires_grad_(False)
        with torch.no_grad():
            styles, _ = adapted.expression_encoder(reference.weights, reference.frame_mask)
        adapted.styles.copy_(styles.mean(0).expand_as(adapted.styles))
        adapted.every_style = False
        return adapted

    @torch.no_grad()
    def measurements(self, data: SpeechDataModule) -> dict[str, dict[str, float]]:
        """Whether a linear probe names a test clip's speaker, 1 or 0: from its style, and from its content.

        The probe is a logistic regression, trained on the test clips of other folds; ``chance`` is one over the number
        of speakers. The content of a clip is given as the adversary sees it, see :func:`clip_summary`.
        """
        keys, speakers = [], []
        codes: dict[str, list[Any]] = {"style": [], "content": []}
        for clip in split_clips(data):
            style, content = self.expression_encoder(clip.weights, clip.frame_mask)
            keys.append(clip.key[0])
            speakers.append(clip.subject[0])
            codes["style"].append(style[0].numpy())
            codes["content"].append(clip_summary(content, clip.frame_mask)[0].numpy())
        names, counts = np.unique(speakers, return_counts=True)
        folds = StratifiedKFold(min(6, int(counts.min())), shuffle=True, random_state=0)
        series = {"chance": dict.fromkeys(keys, 1 / len(names))}
        for name, rows in codes.items():
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
            guesses = cross_val_predict(probe, np.stack(rows), speakers, cv=folds)
            right = [float(guess == speaker) for guess, speaker in zip(guesses, speakers, strict=True)]
            series[name] = dict(zip(keys, right, strict=True))
        return series


class ExpressionEncoder(nn.Module):
    """A motion to its style and its content.

    Args:
        controls: C, values of a frame.
        style_dim: of the style.
        dim: width, and of the content.
        layers: of the transformer.
        heads: attention heads.
        dropout: while training.
    """

    def __init__(self, controls: int, style_dim: int, dim: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.input = nn.Linear(controls, dim)
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout, batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.style = nn.Linear(dim, style_dim)
        self.content = nn.Linear(dim, dim)

    def forward(self, motion: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Splits clips.

        Args:
            motion: (B, T, C).
            real: (B, T) bool.

        Returns:
            style (B, style_dim), the mean over real frames, and content (B, T, dim), standardised over real frames.
        """
        x = self.input(motion)
        x = self.transformer(x + positions(x.shape[1], x.shape[2]).to(x), src_key_padding_mask=~real)
        weights = real[..., None] / real.sum(1)[:, None, None]
        content = self.content(x)
        content = content - (content * weights).sum(1, keepdim=True)
        spread = ((content.square() * weights).sum(1, keepdim=True) + 1e-6).sqrt()
        return (self.style(x) * weights).sum(1), content / spread


class StyledTransformer(nn.Module):
    """A transformer whose normalised activations a style scales and shifts.

    Args:
        inputs: width of a frame that goes in.
        style_dim: of the style.
        dim: width.
        layers: of them.
        heads: attention heads.
        dropout: while training.
    """

    def __init__(self, inputs: int, style_dim: int, dim: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.input = nn.Linear(inputs, dim)
        self.layers = nn.ModuleList(StyledLayer(style_dim, dim, heads, dropout) for _ in range(layers))
        self.last = nn.LayerNorm(dim)

    def forward(self, x: Tensor, style: Tensor, real: Tensor) -> Tensor:
        """(B, T, inputs), a style (B, style_dim) and which frames are real (B, T) -> (B, T, dim)."""
        x = self.input(x)
        x = x + positions(x.shape[1], x.shape[2]).to(x)
        for layer in self.layers:
            x = layer(x, style, real)
        return self.last(x)


class StyledLayer(nn.Module):
    """Self-attention and a feed-forward network, each behind an adaptive layer normalisation; plain at the start.

    Args:
        style_dim: of the style.
        dim: width.
        heads: attention heads.
        dropout: while training.
    """

    def __init__(self, style_dim: int, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim)
        )
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(style_dim, 4 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, style: Tensor, real: Tensor) -> Tensor:
        """(B, T, dim), (B, style_dim) and (B, T) -> (B, T, dim)."""
        scale, shift, scale_2, shift_2 = self.modulation(style)[:, None].chunk(4, dim=-1)
        y = layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        y, _ = self.attention(y, y, y, key_padding_mask=~real, need_weights=False)
        x = x + self.dropout(y)
        y = layer_norm(x, x.shape[-1:]) * (1 + scale_2) + shift_2
        return x + self.dropout(self.feed_forward(y))


class ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient has the other sign (Ganin and Lempitsky 2015)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The input itself."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Minus the gradient."""
        return -gradients[0]


def positions(length: int, dim: int) -> Tensor:
    """Sinusoidal positions, (length, dim)."""
    frequency = torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000) / dim))
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :dim]


def clip_summary(content: Tensor, real: Tensor) -> Tensor:
    """Quantiles (5, 25, 50, 75 and 95 %) and mean absolute velocity over the real frames of each clip.

    Args:
        content: (B, T, dim).
        real: (B, T) bool.

    Returns:
        (B, 6·dim).
    """
    rows = []
    for clip, length in zip(content, real.sum(1).tolist(), strict=True):
        frames = clip[:length]
        quantiles = frames.quantile(frames.new_tensor(QUANTILES), dim=0)
        rows.append(torch.cat([quantiles.flatten(), frames.diff(dim=0).abs().mean(0)]))
    return torch.stack(rows)


def same_speaker(subjects: Tensor) -> Tensor:
    """For each clip (B,) another of the same subject at random; itself where there is none."""
    candidates = (subjects[:, None] == subjects).float()
    alone = candidates.sum(1) == 1
    candidates.fill_diagonal_(0)
    candidates[alone] = torch.eye(len(subjects), device=subjects.device)[alone]
    return torch.multinomial(candidates, 1)[:, 0]


def frame_phonemes(batch: SpeechBatch, phonemes: list[str]) -> tuple[Tensor, Tensor]:
    """The phoneme in the middle of each frame, and how long it lasts. Times are spread over the length of the sound.

    Args:
        batch: the clips.
        phonemes: names in the order of their labels.

    Returns:
        labels (B, T) int64, -100 where no phoneme of the list is, and durations (B, T) float32 in frames, 1 there.
    """
    numbers = {name: i for i, name in enumerate(phonemes)}
    labels = torch.full(batch.weights.shape[:2], UNKNOWN)
    durations = torch.ones(labels.shape)
    rates = batch.lengths * SAMPLE_RATE / batch.audio_lengths
    for clip, lasting, spoken, rate in zip(labels, durations, batch.phonemes, rates.tolist(), strict=True):
        for name, start, end in spoken:
            if name in numbers and end > start:
                # Frames whose middle lies within.
                within = slice(max(0, math.ceil(start * rate - 0.5)), max(0, math.ceil(end * rate - 0.5)))
                clip[within] = numbers[name]
                lasting[within] = (end - start) * rate
    return labels.to(batch.lengths.device), durations.to(batch.lengths.device)
