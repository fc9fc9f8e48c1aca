"""Imitator: personalized speech-driven 3D facial animation (Thambiraja et al., ICCV 2023, arXiv 2301.00023).

The claim: a transformer that knows nothing of style turns speech into visemes, and a small motion decoder turns
visemes and a style code into vertices; so a few seconds of a new person are enough to learn that person's style.
A loss weighted around m, b and p makes the lips close.

What stands here follows the official code (bala1144/Imitator, commit f7bfa82): network with its decoder variants,
losses, the mapping of checkpoints, and what the two stages of personalisation train.

Deliberate differences:

- Decoding keeps keys and values of the past instead of recomputing them, and dropout is drawn once per token; the
  official loop draws anew for the whole past at every step.
- The official positional code is indexed by the clip's place in the batch, and batches hold one clip: every frame has
  the code of position 0. So it is here, in any batch and at any length (official: at most 600 frames).
- The official closure weights come from a file with one number per frame, whose derivation was not published. Here
  they follow from the batch's phoneme times, see :func:`closure_weights`.
- Batches of several clips; the losses are means over their real frames.
- No SpecAugment on the speech features, and no learning-rate schedule: the official one waits for 5000 epochs
  without progress.
- Losses that the official code has but its configurations leave off (vertex regulariser, predicted closure weights)
  are left out.
- Personalisation minimises over a fixed number of steps on all reference clips at once. The code is learned in the
  place of the stand-in of unseen speakers, as the official loader does, and then written in the place of everyone:
  the adapted copy has one style.
"""

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers.measuring import adaptation
from trainers.nets import speech_encoder
from trainers.nets.cached_decoder import CachedDecoderLayer
from trainers.nets.speech_encoder import SAMPLE_RATE, TrainedPart
from trainers.tasks import SpeechToMesh, SystemInfo

BILABIALS = ("m", "b", "p")


class Imitator(SpeechToMesh):
    """Imitator as a trainable system.

    Args:
        num_vertices: V of the mesh.
        subjects: training subjects in the order of their one-hot codes.
        encoder: backbone specification of the speech encoder.
        dim: width of visemes and style codes.
        heads: attention heads of the viseme transformer.
        decoder_layers: linear layers of the motion decoder.
        growing: widens the motion decoder from layer to layer instead of keeping its width.
        style_mode: whether the style code is added to the visemes (``add``) or stands beside them (``concat``).
        dropout: in the viseme transformer, while training.
        train_encoder: which part of the encoder is trained: ``none``, or its ``transformer`` as the official code does.
        velocity_weight: of the error of frame-to-frame differences.
        closure_weight: of the error around m, b and p; needs phoneme times. 0 leaves it out.
        closure_width: seconds after which the closure weight has fallen to exp(-1/2).
        lip_weight: of the additional error on the lips.
        adaptation_steps: steps of personalisation: on the style code alone, then also on the last layer.
        adaptation_lr: learning rate of personalisation.
        unit: metres; offsets are learned and the losses measured in it.
        lr: learning rate of Adam.
        unseen: the training subject whose style stands in for a speaker never seen, ``fixed:k``.
    """

    info = SystemInfo(
        name="imitator",
        title="Imitator",
        task="speech-to-mesh",
        paper="Thambiraja et al., Imitator: Personalized Speech-driven 3D Facial Animation, ICCV",
        year=2023,
        url="https://arxiv.org/abs/2301.00023",
        basis="official code",
    )
    conditions = ("subject", "reference")

    def __init__(
        self,
        num_vertices: int,
        subjects: list[str],
        encoder: str,
        dim: int = 64,
        heads: int = 4,
        decoder_layers: int = 5,
        growing: bool = False,
        style_mode: Literal["add", "concat"] = "add",
        dropout: float = 0.1,
        train_encoder: TrainedPart = "transformer",
        velocity_weight: float = 10.0,
        closure_weight: float = 5.0,
        closure_width: float = 0.05,
        lip_weight: float = 0.0,
        adaptation_steps: list[int] = [100, 100],  # noqa: B006 - read only; jsonargparse needs a plain default
        adaptation_lr: float = 1e-2,
        unit: float = 1.0,
        lr: float = 1e-4,
        unseen: str = "fixed:0",
    ) -> None:
        super().__init__(num_vertices, subjects, encoder, "interpolate", train_encoder, unseen)
        self.save_hyperparameters()
        self.velocity_weight = velocity_weight
        self.closure_weight = closure_weight
        self.closure_width = closure_width
        self.lip_weight = lip_weight
        if len(adaptation_steps) != 2:
            raise UserError(f"model.adaptation_steps: {adaptation_steps}, expected two numbers, one for each stage")
        self.adaptation_steps = adaptation_steps
        self.adaptation_lr = adaptation_lr
        self.unit = unit
        self.lr = lr
        self.encoder.classifier = None
        self.visemes = VisemeTransformer(self.encoder.dim, dim, heads, dropout)
        self.motion = MotionDecoder(num_vertices, len(subjects), dim, decoder_layers, growing, style_mode)

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """Reconstruction, velocity, closures and lips."""
        offsets = self.motion(self.hear(batch), self.style(batch))
        terms = self.losses(offsets, batch)
        for name, value in terms.items():
            self.log(f"train/{name}", value, batch_size=len(batch))
        loss = torch.stack(list(terms.values())).sum()
        self.log("train/loss", loss, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on all that is trained."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    @torch.no_grad()
    def animate(self, batch: SpeechBatch) -> Tensor:
        """See :meth:`SpeechToMesh.animate`."""
        offsets = self.motion(self.hear(batch), self.style(batch))
        return batch.template[:, None] + self.unit * offsets.unflatten(-1, (self.num_vertices, 3))

    def adapt(self, reference: SpeechBatch) -> "Imitator":
        """Personalisation: first the style code alone, then also the last layer of the motion decoder.

        The visemes of the reference are computed once; neither stage changes them.

        Args:
            reference: clips of one person with their vertices, a second or more in all.

        Returns:
            A copy in evaluation mode that has this person's style alone. This system stays as it is.

        Raises:
            UserError: see :meth:`check_reference`.
        """
        self.check_reference(reference)
        adapted = copy.deepcopy(self).eval().requires_grad_(False)
        style, motion = adapted.style(reference), adapted.motion
        target, real = adapted._target(reference), reference.frame_mask
        with torch.no_grad():
            visemes = adapted.hear(reference)
        stages = ([motion.style], [motion.style, motion.last])
        with torch.enable_grad():
            for steps, modules in zip(self.adaptation_steps, stages, strict=True):
                parameters = [p.requires_grad_() for module in modules for p in module.parameters()]
                optimizer = torch.optim.Adam(parameters, lr=self.adaptation_lr)
                for _ in range(steps):
                    optimizer.zero_grad()
                    residual = motion(visemes, style) - target
                    velocity = frame_errors(residual.diff(dim=1))[real[:, 1:]].mean()
                    (frame_errors(residual)[real].mean() + self.velocity_weight * velocity).backward()
                    optimizer.step()
        code = motion.style(style[:1]).detach()
        motion.style.weight.data.copy_(code.T.expand_as(motion.style.weight))
        adapted.every_style = False
        return adapted.requires_grad_(False)

    def measurements(self, data: SpeechDataModule) -> dict[str, dict[str, float]]:
        """Error on the lips with and without ten seconds of the speaker; see :func:`trainers.measuring.adaptation`."""
        return adaptation(self, data, seconds=10.0)

    def hear(self, batch: SpeechBatch) -> Tensor:
        """Visemes of the clips, free of style: (B, T, dim)."""
        states, _ = self.encode(batch)
        return self.visemes(states)

    def losses(self, offsets: Tensor, batch: SpeechBatch) -> dict[str, Tensor]:
        """The weighted terms of the training loss.

        Args:
            offsets: (B, T, V·3) predicted offsets from the template, in :attr:`unit`.
            batch: the clips.

        Raises:
            UserError: the closures are weighted, and a clip has no phoneme times.
        """
        residual, real = offsets - self._target(batch), batch.frame_mask
        errors = frame_errors(residual)
        terms = {
            "reconstruction": errors[real].mean(),
            "velocity": self.velocity_weight * frame_errors(residual.diff(dim=1))[real[:, 1:]].mean(),
        }
        if self.closure_weight:
            weights = self.closure_weight * closure_weights(batch, self.closure_width)
            terms["closure"] = (weights * errors)[real].mean()
        if self.lip_weight:
            # Officially the other vertices count as zero, so the mean is over all.
            lips = frame_errors(residual.unflatten(-1, (-1, 3))[:, :, self.lips].flatten(2))[real].mean()
            terms["lips"] = self.lip_weight * lips * len(self.lips) / self.num_vertices
        return terms

    def _target(self, batch: SpeechBatch) -> Tensor:
        return ((batch.vertices - batch.template[:, None]) / self.unit).flatten(2)


class VisemeTransformer(nn.Module):
    """Speech states in, visemes out, one frame after the other; each frame is fed back as it is.

    Args:
        audio_dim: width of the speech states.
        dim: d, width of the visemes.
        heads: attention heads.
        dropout: while training.
    """

    def __init__(self, audio_dim: int, dim: int = 64, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.audio_projection = nn.Linear(audio_dim, dim)
        self.layer = CachedDecoderLayer(dim, heads, dim_feedforward=2 * dim, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, speech: Tensor) -> Tensor:
        """Free-running from a zero token.

        Args:
            speech: (B, T, audio_dim), one state per frame.

        Returns:
            (B, T, d).
        """
        projected = self.audio_projection(speech)
        cross_keys, cross_values = self.layer.project_memory(projected, per_token=1)
        first_position = torch.tensor([0.0, 1.0], device=speech.device).repeat(projected.shape[-1] // 2)
        token, past, visemes = torch.zeros_like(projected[:, 0]), None, []
        for t in range(speech.shape[1]):
            token, past = self.layer.step(
                self.dropout(token + first_position), past, None, cross_keys[:, t], cross_values[:, t]
            )
            visemes.append(token)
        return torch.stack(visemes, dim=1)


class MotionDecoder(nn.Module):
    """Visemes and a style code in, vertex offsets out, each frame on its own.

    The last layer is a learned basis of displacements and starts from zero.

    Args:
        num_vertices: V of the mesh.
        num_subjects: length of the style vector.
        dim: width of visemes and style code.
        layers: linear layers, leaky rectifiers between them.
        growing: the widths double up to the last layer, from (V·3 - width) // 2^(layers - 1).
        style_mode: ``add`` or ``concat``.
    """

    def __init__(
        self,
        num_vertices: int,
        num_subjects: int,
        dim: int = 64,
        layers: int = 5,
        growing: bool = False,
        style_mode: Literal["add", "concat"] = "add",
    ) -> None:
        super().__init__()
        self.concat = style_mode == "concat"
        self.style = nn.Linear(num_subjects, dim, bias=False)
        outputs, inner = num_vertices * 3, dim * (2 if self.concat else 1)
        first = (outputs - inner) // 2 ** (layers - 1) if growing else inner
        widths = [inner, *(first * 2**i if growing else first for i in range(layers - 1))]
        hidden: list[nn.Module] = []
        for i in range(layers - 1):
            hidden += [nn.Linear(widths[i], widths[i + 1]), nn.LeakyReLU(0.01)]
        self.hidden = nn.Sequential(*hidden)
        self.last = nn.Linear(widths[-1], outputs)
        for name, parameter in self.hidden.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_uniform_(parameter)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, visemes: Tensor, style: Tensor) -> Tensor:
        """Decodes every frame.

        Args:
            visemes: (B, T, dim).
            style: (B, num_subjects), one-hot or any mixture.

        Returns:
            (B, T, V·3) offsets from the template.
        """
        code = self.style(style)[:, None]
        styled = torch.cat([visemes, code.expand_as(visemes)], dim=-1) if self.concat else visemes + code
        return self.last(self.hidden(styled))


def frame_errors(residual: Tensor) -> Tensor:
    """Mean of squares of each frame: (B, T, D) to (B, T)."""
    return residual.square().mean(-1)


def closure_weights(batch: SpeechBatch, width: float) -> Tensor:
    """How much each frame belongs to a closure of the lips: 1 within m, b or p, falling off around it.

    The weight of a frame whose middle is d seconds from the nearest bilabial is exp(-(d / width)² / 2). Times are
    spread over the frames as the speech features are, over the length of the sound.

    Args:
        batch: the clips; phonemes in the International Phonetic Alphabet or ARPAbet.
        width: seconds.

    Returns:
        (B, T) float32 in [0, 1], zero where a clip has no bilabial.

    Raises:
        UserError: a clip has no phoneme times.
    """
    rows = []
    seconds = batch.audio_lengths / SAMPLE_RATE / batch.lengths
    for key, phonemes, frame in zip(batch.key, batch.phonemes, seconds.tolist(), strict=True):
        if not phonemes:
            raise UserError(
                f"clip '{key}': no phoneme times to find m, b and p; align it or set model.closure_weight 0"
            )
        middle = (torch.arange(batch.vertices.shape[1]) + 0.5) * frame
        closures = [(start, end) for name, start, end in phonemes if name.lower() in BILABIALS]
        distance = torch.full((len(closures) + 1, len(middle)), torch.inf)
        for row, (start, end) in zip(distance, closures, strict=False):
            row.copy_(torch.maximum(start - middle, middle - end).clamp(min=0))
        rows.append((-0.5 * (distance.amin(0) / width).square()).exp())
    return torch.stack(rows).to(batch.lengths.device)


OFFICIAL_NAMES = {
    "audio_feature_map": "visemes.audio_projection",
    "transformer_decoder.layers.0": "visemes.layer",
    "obj_vector": "motion.style",
    "vertice_map_r.decoder.final_out_layer": "motion.last",
    "vertice_map_r.decoder": "motion.hidden",
}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the state dict of an official checkpoint's network to :class:`Imitator`'s.

    =========================================  =======================================================================
    official                                   here
    =========================================  =======================================================================
    ``audio_encoder.*``                        ``encoder.*``, see :func:`trainers.nets.speech_encoder.from_official`
    ``audio_feature_map.*``                    ``visemes.audio_projection.*``
    ``transformer_decoder.layers.0.*``         ``visemes.layer.*``
    ``obj_vector.weight``                      ``motion.style.weight``
    ``vertice_map_r.decoder.final_out_layer``  ``motion.last``
    ``vertice_map_r.decoder.*``                ``motion.hidden.*``
    ``PPE.pe``                                 left out: computed
    =========================================  =======================================================================

    Lightning checkpoints put ``nn_model.`` before every name; 'facebench convert' takes it away first.
    """
    return {official_name(key): value for key, value in state.items() if key != "PPE.pe"}


def official_name(key: str) -> str:
    """What the official weight ``key`` is called here; see :func:`from_official`."""
    if key.startswith("audio_encoder."):
        return "encoder." + speech_encoder.official_name(key.removeprefix("audio_encoder."))
    prefix = next(name for name in OFFICIAL_NAMES if key.startswith(f"{name}."))
    return OFFICIAL_NAMES[prefix] + key.removeprefix(prefix)
