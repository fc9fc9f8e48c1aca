"""FaceFormer: speech-driven 3D facial animation with transformers (Fan et al., CVPR 2022, arXiv 2112.05329).

The claim: with self-supervised speech features (wav2vec 2.0) and an autoregressive transformer decoder that attends
to its own past with a periodic positional code and a bias toward the recent past, a few minutes of scans per speaker
are enough for accurate, long-range-consistent animation.

What stands here follows the official code (EvelynFan/FaceFormer, commit dfaea81), in both of its modes: VOCASET
(``alignment="interpolate"``: one speech feature per frame) and BIWI (``alignment="pairs"``: two). Each frame is a
token: the previous frame's offset from the template, projected, plus the speaker's style. Training is free-running
through the whole clip, with the mean squared error on vertices as the only loss.

Deliberate differences, none of which changes what an evaluated network gives:

- Decoding keeps keys and values of the past instead of recomputing them, and leaves vertices out of the loop: the
  feedback hidden -> offset -> hidden is two linear layers with nothing between, so their product, d x d, stands for
  them, and all vertices are made once at the end. The gradient flows through the same product.
- Dropout is drawn once per token; the official loop draws anew for the whole past at every step.
- Positions and biases are made for the length at hand (official: at most 600 frames).
- Batches of several clips; the loss is the mean over their real frames.
- No SpecAugment on the speech features.
- In BIWI mode audio can end a frame before the mesh does. As in the official code such frames have no loss;
  :meth:`FaceFormer.animate` holds the last pose for them.
- ``train_encoder: none`` freezes the speech encoder as a whole; its states are then computed once per clip, or read
  from a feature column of the data.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from datamodules.batches import SpeechBatch
from trainers.nets import speech_encoder
from trainers.nets.cached_decoder import (
    CachedDecoderLayer,
    alignment_mask,
    causal_bias,
    distance_bias,
    periodic_positions,
)
from trainers.nets.speech_encoder import STATES_PER_FRAME, TrainedPart
from trainers.tasks import SpeechToMesh, SystemInfo


class FaceFormer(SpeechToMesh):
    """FaceFormer as a trainable system.

    Args:
        num_vertices: V of the mesh.
        subjects: training subjects in the order of their one-hot codes.
        encoder: backbone specification of the speech encoder.
        alignment: ``interpolate`` (VOCASET mode, any frame rate) or ``pairs`` (BIWI mode, 25 fps).
        dim: width of the decoder; 64 for VOCASET, 128 for BIWI.
        period: of the positional code and the attention bias, in frames; 30 for VOCASET, 25 for BIWI.
        heads: attention heads of the decoder.
        dropout: in the decoder, while training.
        train_encoder: which part of the encoder is trained: ``none``, or its ``transformer`` as the official code does.
        past: what a frame follows from in training: the ``predicted`` past, frame by frame, as in the official script;
            the ``true`` one, all frames at once (teacher forcing); or a ``scheduled`` mix, whose share of true frames
            falls from one to zero over the run.
        unit: metres; offsets are learned and the loss measured in it, 0.001 for millimetres.
        lr: learning rate of Adam.
        unseen: the training subject whose style stands in for a speaker never seen, ``fixed:k``.
    """

    info = SystemInfo(
        name="faceformer",
        title="FaceFormer",
        task="speech-to-mesh",
        paper="Fan et al., FaceFormer: Speech-Driven 3D Facial Animation with Transformers, CVPR",
        year=2022,
        url="https://arxiv.org/abs/2112.05329",
        basis="official code",
    )

    def __init__(
        self,
        num_vertices: int,
        subjects: list[str],
        encoder: str,
        alignment: Literal["interpolate", "pairs"] = "interpolate",
        dim: int = 64,
        period: int = 30,
        heads: int = 4,
        dropout: float = 0.1,
        train_encoder: TrainedPart = "transformer",
        past: Literal["predicted", "true", "scheduled"] = "predicted",
        unit: float = 1.0,
        lr: float = 1e-4,
        unseen: str = "fixed:0",
    ) -> None:
        super().__init__(num_vertices, subjects, encoder, alignment, train_encoder, unseen)
        self.save_hyperparameters()
        self.past = past
        self.unit = unit
        self.lr = lr
        self.encoder.classifier = None
        self.decoder = MotionDecoder(
            num_vertices,
            len(subjects),
            audio_dim=self.encoder.dim,
            audio_per_frame=STATES_PER_FRAME[alignment],
            dim=dim,
            period=period,
            heads=heads,
            dropout=dropout,
        )

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """The mean squared error on vertices."""
        speech, frames = self.hear(batch)
        loss = self.loss(speech, frames, batch)
        self.log("train/loss", loss, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on all that is trained."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    @torch.no_grad()
    def animate(self, batch: SpeechBatch) -> Tensor:
        """Free-running animation; see :meth:`SpeechToMesh.animate`."""
        speech, frames = self.hear(batch)
        offsets = self.decoder(speech, self.style(batch))
        last = torch.arange(batch.vertices.shape[1], device=frames.device).minimum(frames[:, None] - 1)
        offsets = offsets.take_along_dim(last[..., None], dim=1)
        return batch.template[:, None] + self.unit * offsets.unflatten(-1, (self.num_vertices, 3))

    def hear(self, batch: SpeechBatch) -> tuple[Tensor, Tensor]:
        """Speech states (B, T·m, D), m per frame, and the number of frames of each clip that have them, (B,) int64."""
        states, lengths = self.encode(batch)
        return states, lengths // self.decoder.audio_per_frame

    def loss(self, speech: Tensor, frames: Tensor, batch: SpeechBatch) -> Tensor:
        """The mean squared error on vertices over all frames that are real and have speech.

        Args:
            speech: (B, T·m, D) states of :meth:`hear`.
            frames: (B,) int64, frames that have them.
            batch: the clips.
        """
        count = speech.shape[1] // self.decoder.audio_per_frame
        target = ((batch.vertices[:, :count] - batch.template[:, None]) / self.unit).flatten(2)
        style = self.style(batch)
        if self.past == "predicted":
            predicted = self.decoder(speech, style)
        else:
            past = target if self.past == "true" else self.mixed_past(speech, style, target)
            predicted = self.decoder.teacher_forced(speech, style, past)
        real = torch.arange(count, device=frames.device) < frames[:, None]
        return (predicted - target)[real].square().mean()

    @torch.no_grad()
    def mixed_past(self, speech: Tensor, style: Tensor, target: Tensor) -> Tensor:
        """Scheduled sampling in two passes (Mihaylova & Martins 2019): true frames, some replaced by predicted ones.

        Args:
            speech, style, target: as in :meth:`MotionDecoder.teacher_forced`.

        Returns:
            (B, T, V·3); the share of true frames is what is left of the run, all of them in one without an end.
        """
        done = self.global_step / self.trainer.estimated_stepping_batches
        keep = torch.rand(target.shape[:2], device=target.device) >= done
        return torch.where(keep[..., None], target, self.decoder.teacher_forced(speech, style, target))


class MotionDecoder(nn.Module):
    """FaceFormer's decoder: speech states and a style in, vertex offsets out, one frame after the other.

    Args:
        num_vertices: V of the mesh.
        num_subjects: length of the one-hot style code.
        audio_dim: width of the speech states.
        audio_per_frame: m, speech states that belong to one frame.
        dim: d, width of the decoder.
        period: of the positional code and the attention bias, in frames.
        heads: attention heads.
        dropout: while training.
    """

    def __init__(
        self,
        num_vertices: int,
        num_subjects: int,
        audio_dim: int,
        audio_per_frame: int = 1,
        dim: int = 64,
        period: int = 30,
        heads: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.audio_per_frame = audio_per_frame
        self.period = period
        self.audio_projection = nn.Linear(audio_dim, dim)
        self.vertex_encoder = nn.Linear(num_vertices * 3, dim)
        self.vertex_decoder = nn.Linear(dim, num_vertices * 3)
        self.style = nn.Linear(num_subjects, dim, bias=False)
        self.layer = CachedDecoderLayer(dim, heads, dim_feedforward=2 * dim, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.vertex_decoder.weight)
        nn.init.zeros_(self.vertex_decoder.bias)

    def forward(self, speech: Tensor, style: Tensor) -> Tensor:
        """Free-running: each frame follows from the frames predicted before it.

        Args:
            speech: (B, T·m, audio_dim).
            style: (B, num_subjects).

        Returns:
            (B, T, V·3) offsets from the template.
        """
        cross_keys, cross_values = self.layer.project_memory(self.audio_projection(speech), self.audio_per_frame)
        length = cross_keys.shape[1]
        positions = periodic_positions(length, self.style.out_features, self.period).to(speech)
        bias = distance_bias(self.layer.heads, length, self.period).to(speech).flip(-1)
        feedback = self.vertex_encoder.weight @ self.vertex_decoder.weight
        feedback_bias = linear(self.vertex_decoder.bias, self.vertex_encoder.weight, self.vertex_encoder.bias)

        style_token = self.style(style)
        token, past, hidden = style_token, None, []
        for t in range(length):
            state, past = self.layer.step(
                self.dropout(token + positions[t]),
                past,
                bias[:, None, length - 1 - t :],
                cross_keys[:, t],
                cross_values[:, t],
            )
            hidden.append(state)
            token = linear(state, feedback, feedback_bias) + style_token
        return self.vertex_decoder(torch.stack(hidden, dim=1))

    def teacher_forced(self, speech: Tensor, style: Tensor, offsets: Tensor) -> Tensor:
        """All frames at once, each from the true frames before it.

        The first token is the projection of a zero offset plus the style, where free-running decoding starts from the
        style alone; so it is in the official code.

        Args:
            speech: (B, T·m, audio_dim).
            style: (B, num_subjects).
            offsets: (B, T, V·3), the true offsets from the template.

        Returns:
            (B, T, V·3) offsets from the template.
        """
        length = offsets.shape[1]
        previous = torch.cat([torch.zeros_like(offsets[:, :1]), offsets[:, :-1]], dim=1)
        tokens = self.vertex_encoder(previous) + self.style(style)[:, None]
        tokens = tokens + periodic_positions(length, self.style.out_features, self.period).to(tokens)
        bias = causal_bias(self.layer.heads, length, self.period).to(tokens)
        hidden = self.layer(
            self.dropout(tokens),
            self.audio_projection(speech),
            tgt_mask=bias.repeat(len(tokens), 1, 1),
            memory_mask=alignment_mask(length, self.audio_per_frame).to(tokens.device),
        )
        return self.vertex_decoder(hidden)


OFFICIAL_NAMES = {
    "audio_feature_map": "decoder.audio_projection",
    "vertice_map": "decoder.vertex_encoder",
    "vertice_map_r": "decoder.vertex_decoder",
    "obj_vector": "decoder.style",
    "transformer_decoder.layers.0": "decoder.layer",
}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the state dict of an official checkpoint to :class:`FaceFormer`'s.

    ================================  ===================================================================
    official                          here
    ================================  ===================================================================
    ``audio_encoder.*``               ``encoder.*``, see :func:`trainers.nets.speech_encoder.from_official`
    ``audio_feature_map.*``           ``decoder.audio_projection.*``
    ``vertice_map.*``                 ``decoder.vertex_encoder.*``
    ``vertice_map_r.*``               ``decoder.vertex_decoder.*``
    ``obj_vector.weight``             ``decoder.style.weight``
    ``transformer_decoder.layers.0``  ``decoder.layer``
    ``PPE.pe``                        left out: computed
    ================================  ===================================================================

    Use: ``FaceFormer(...).load_state_dict(from_official(torch.load(file, weights_only=True)))``.
    """
    return {official_name(key): value for key, value in state.items() if key != "PPE.pe"}


def official_name(key: str) -> str:
    """What the official weight ``key`` is called here; see :func:`from_official`."""
    if key.startswith("audio_encoder."):
        return "encoder." + speech_encoder.official_name(key.removeprefix("audio_encoder."))
    module, _, rest = key.rpartition(".")
    prefix = next(name for name in OFFICIAL_NAMES if module == name or module.startswith(f"{name}."))
    return f"{OFFICIAL_NAMES[prefix]}{module.removeprefix(prefix)}.{rest}"
