"""CodeTalker: speech-driven 3D facial animation with discrete motion prior (Xing et al., CVPR 2023, arXiv 2301.02379).

The claim: regression to the mean smooths motion away. Codes of a VQ-VAE of real motion, which a decoder of speech
queries one frame after the other, keep predictions within real motion, lips and upper face alike.

What stands here follows the official code (Doubiiu/CodeTalker, commit 1b7cb95), in two stages of one training:

1. a VQ-VAE of vertex offsets: convolution and transformer, several codes for each frame, and their mirror image;
2. with that frozen, FaceFormer's kind of decoder in front of it: speech and past motion in, codes out.

Both of its forms: BIWI (``alignment: pairs``, ``code_projection: true``), whose module is published, and VOCASET
(``interpolate``, ``false``), whose module ``stage1_vocaset`` was read in repositories that build on it: no linear
layers next to the codes, and a bias in the last one.

The official autoencoder adds the positional code of the first frame to every frame; so does this one. The motion that
is fed back is decoded from all frames so far, and convolution, normalisation and attention of the motion decoder run
over all of them, so this part cannot be cached. ``feedback_frames`` bounds it.

Deliberate differences, none of which changes what an evaluated network gives but for ``feedback_frames``:

- The transformer in front keeps keys and values of the past instead of recomputing them, and leaves vertices out of the
  loop: the motion decoder's last layer and the projection of the fed-back offset are one product.
- Masks are made for the length at hand (official: at most 600 frames).
- Batches of several clips; losses are means over real frames. The official loss is that of one clip.
- The frozen autoencoder has no dropout in the second stage.
- Both stages share one AdamW.
- No SpecAugment on the speech features. Where audio ends before the mesh does, :meth:`CodeTalker.animate` holds the
  last pose.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, leaky_relu, linear, mse_loss

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from trainers.nets import speech_encoder
from trainers.nets.cached_decoder import (
    CachedDecoderLayer,
    alignment_mask,
    causal_bias,
    distance_bias,
    periodic_positions,
)
from trainers.nets.motion_codes import SLOPE, MotionTransformer, Quantiser, hold_last, official_transformer_name
from trainers.nets.speech_encoder import STATES_PER_FRAME, TrainedPart
from trainers.stages import Staged
from trainers.tasks import SpeechToMesh, SystemInfo


class CodeTalker(Staged, SpeechToMesh):
    """CodeTalker as a trainable system.

    Args:
        num_vertices: V of the mesh.
        subjects: training subjects in the order of their style vectors.
        encoder: backbone specification of the speech encoder.
        alignment: ``interpolate`` (VOCASET, any frame rate) or ``pairs`` (BIWI, 25 fps).
        codes: size of the codebook.
        code_dim: width of a code; 64 for VOCASET, 128 for BIWI.
        codes_per_frame: 16 for VOCASET, 8 for BIWI.
        code_projection: linear layers between autoencoder and codes, and no bias in its last layer, as for BIWI; else
            codes_per_frame · code_dim must be ``motion_dim``.
        motion_dim: width of the autoencoder.
        motion_layers: of its encoder and of its decoder.
        motion_heads: attention heads of both.
        motion_hidden: width of their feed-forward layers.
        dim: width of the decoder of speech.
        layers: of that; 6 for VOCASET, 12 for BIWI.
        heads: attention heads of that.
        period: of its positional code and attention bias, in frames; 30 for VOCASET, 25 for BIWI.
        beta: weight of the commitment loss against the codebook loss.
        dropout: while training.
        feedback_frames: newest frames that the motion decoder sees when it makes the one that is fed back; null all of
            them, as officially, at a cost that grows with the square of the length.
        stage_epochs: epochs of the first stage; the second lasts to the end of the run.
        lr: learning rates of the two stages.
        halve_every: epochs after which the first stage halves its learning rate, 20 for VOCASET; null never.
        train_encoder: which part of the speech encoder the second stage trains; officially its ``transformer``.
        unit: metres; offsets are learned and losses measured in it, 0.001 for millimetres.
        unseen: the training subject whose style stands in for a speaker never seen, ``fixed:k``.
    """

    info = SystemInfo(
        name="codetalker",
        title="CodeTalker",
        task="speech-to-mesh",
        paper="Xing et al., CodeTalker: Speech-Driven 3D Facial Animation with Discrete Motion Prior, CVPR",
        year=2023,
        url="https://arxiv.org/abs/2301.02379",
        basis="official code",
    )

    def __init__(
        self,
        num_vertices: int,
        subjects: list[str],
        encoder: str,
        alignment: Literal["interpolate", "pairs"] = "interpolate",
        codes: int = 256,
        code_dim: int = 64,
        codes_per_frame: int = 16,
        code_projection: bool = False,
        motion_dim: int = 1024,
        motion_layers: int = 6,
        motion_heads: int = 8,
        motion_hidden: int = 1536,
        dim: int = 1024,
        layers: int = 6,
        heads: int = 4,
        period: int = 30,
        beta: float = 0.25,
        dropout: float = 0.1,
        feedback_frames: int | None = None,
        stage_epochs: list[int] = [200],  # noqa: B006 - read only; jsonargparse needs a plain default
        lr: list[float] = [1e-4, 1e-4],  # noqa: B006
        halve_every: int | None = None,
        train_encoder: TrainedPart = "transformer",
        unit: float = 1.0,
        unseen: str = "fixed:0",
    ) -> None:
        super().__init__(num_vertices, subjects, encoder, alignment, train_encoder, unseen)
        self.save_hyperparameters()
        if not code_projection and codes_per_frame * code_dim != motion_dim:
            raise UserError(
                f"model.motion_dim: {motion_dim}, expected codes_per_frame x code_dim, {codes_per_frame * code_dim}, "
                "or code_projection: true"
            )
        if len(lr) != 2:
            raise UserError(f"model.lr: {len(lr)} learning rates, expected 2, one for each stage")
        if feedback_frames is not None and feedback_frames < 1:
            raise UserError(f"model.feedback_frames: {feedback_frames}, expected a number above 0 or null")
        self.feedback_frames = feedback_frames
        self.lr = lr
        self.halve_every = halve_every
        self.unit = unit
        self.encoder.classifier = None
        self.autoencoder = MotionAutoencoder(
            3 * num_vertices,
            Quantiser(codes, code_dim, beta),
            codes_per_frame,
            code_projection,
            dim=motion_dim,
            layers=motion_layers,
            heads=motion_heads,
            hidden=motion_hidden,
            dropout=dropout,
        )
        self.decoder = FeatureDecoder(
            3 * num_vertices,
            len(subjects),
            codes_per_frame * code_dim,
            audio_dim=self.encoder.dim,
            audio_per_frame=STATES_PER_FRAME[alignment],
            dim=dim,
            layers=layers,
            heads=heads,
            period=period,
            dropout=dropout,
        )
        self.plan_stages(stage_epochs, [[self.autoencoder], [self.decoder, self.encoder]])

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """The current stage's loss."""
        terms = self.motion_losses(batch) if self.stage == 0 else self.speech_losses(batch)
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, batch_size=len(batch))
        self.log("train/loss", loss, batch_size=len(batch))
        return loss

    def enter_stage(self) -> None:
        """In the second stage the autoencoder is frozen, dropout and all."""
        super().enter_stage()
        self.autoencoder.train(self.stage == 0)

    def configure_optimizers(self) -> Any:
        """AdamW, whose learning rate for the first stage is halved in steps."""
        groups: list[dict[str, Any]] = [
            {"params": self.stage_parameters(stage), "lr": lr} for stage, lr in enumerate(self.lr)
        ]
        groups[1]["weight_decay"] = 0.0  # officially the second stage uses plain Adam
        optimiser = torch.optim.AdamW(groups)
        step = self.halve_every
        if step is None:
            return optimiser
        return [optimiser], [torch.optim.lr_scheduler.LambdaLR(optimiser, [lambda n: 0.5 ** (n // step), lambda n: 1])]

    def motion_losses(self, batch: SpeechBatch) -> dict[str, Tensor]:
        """The terms of the first stage: L1 of vertices and the quantisation loss."""
        offsets = self.offsets(batch)
        features = self.autoencoder.encoder(offsets, batch.lengths)
        real = batch.frame_mask
        quantised, loss, _ = self.autoencoder.quantise(features[real])
        codes = torch.zeros_like(features, dtype=quantised.dtype).index_put((real,), quantised)
        predicted = self.autoencoder.decoder(codes, batch.lengths, real)
        return {"motion": l1_loss(predicted, offsets[real]), "quantisation": loss}

    def speech_losses(self, batch: SpeechBatch) -> dict[str, Tensor]:
        """The terms of the second stage, teacher-forced: MSE of vertices and of features against the true codes.

        Over all frames that are real and have speech.
        """
        speech, lengths = self.hear(batch)
        offsets = self.offsets(batch)[:, : speech.shape[1] // self.decoder.audio_per_frame]
        real = torch.arange(offsets.shape[1], device=lengths.device) < lengths[:, None]
        with torch.no_grad():
            true_codes, _, _ = self.autoencoder.quantise(self.autoencoder.encoder(offsets, lengths)[real])
        features = self.decoder(speech, self.style_index(batch), offsets)
        codes, _, _ = self.autoencoder.quantise(features)
        predicted = self.autoencoder.decoder(codes, lengths, real)
        return {"motion": mse_loss(predicted, offsets[real]), "feature": mse_loss(features[real], true_codes)}

    def offsets(self, batch: SpeechBatch) -> Tensor:
        """True offsets from the template in :attr:`unit`, (B, T, V·3)."""
        return ((batch.vertices - batch.template[:, None]) / self.unit).flatten(2)

    def hear(self, batch: SpeechBatch) -> tuple[Tensor, Tensor]:
        """Speech states (B, T·m, D), m per frame, and the number of frames of each clip that have them, (B,) int64."""
        states, lengths = self.encode(batch)
        return states, lengths // self.decoder.audio_per_frame

    @torch.no_grad()
    def animate(self, batch: SpeechBatch) -> Tensor:
        """Free-running animation; see :meth:`SpeechToMesh.animate`."""
        speech, lengths = self.hear(batch)
        codes = self.decoder.free_running(speech, self.style_index(batch), self.autoencoder, self.feedback_frames)
        hidden = self.autoencoder.decoder.hidden(codes, lengths)
        offsets = self.autoencoder.decoder.mapping(hold_last(hidden, lengths, batch.vertices.shape[1]))
        return batch.template[:, None] + self.unit * offsets.unflatten(-1, (self.num_vertices, 3))


class MotionAutoencoder(nn.Module):
    """The VQ-VAE of the first stage.

    Args:
        width: of a frame of motion, V·3.
        quantiser: the codebook.
        codes_per_frame: H.
        projection: linear layers next to the codes, and no bias in the last layer.
        others: of :class:`~trainers.nets.motion_codes.MotionTransformer`.
    """

    def __init__(
        self, width: int, quantiser: Quantiser, codes_per_frame: int, projection: bool, dim: int, **others: Any
    ) -> None:
        super().__init__()
        code_width = codes_per_frame * quantiser.vq_embed_dim
        self.codes_per_frame = codes_per_frame
        self.quantiser = quantiser
        self.encoder = MotionEncoder(width, code_width if projection else None, dim, **others)
        self.decoder = MotionDecoder(width, code_width if projection else None, dim, **others)

    def quantise(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Replaces each H-th of a frame's features (..., H·code_dim) by the code nearest to it.

        Returns:
            (..., H·code_dim) with a straight-through gradient, the quantisation loss, and (..., H) int64 numbers.
        """
        rows = features.reshape(-1, self.quantiser.vq_embed_dim)
        codes, loss, numbers = self.quantiser.nearest(rows)
        return codes.reshape(features.shape), loss, numbers.reshape(*features.shape[:-1], self.codes_per_frame)


class MotionEncoder(nn.Module):
    """Offsets (B, T, V·3) -> features (B, T, H·code_dim)."""

    def __init__(self, width: int, code_width: int | None, dim: int, **others: Any) -> None:
        super().__init__()
        self.mapping = nn.Linear(width, dim)
        self.transformer = MotionTransformer(dim, count_frames=False, **others)
        self.projection = nn.Linear(dim, code_width) if code_width else nn.Identity()

    def forward(self, offsets: Tensor, lengths: Tensor) -> Tensor:
        """``lengths`` (B,) int64 frames of each clip are real."""
        return self.projection(self.transformer(leaky_relu(self.mapping(offsets), SLOPE), lengths))


class MotionDecoder(nn.Module):
    """Codes (B, T, H·code_dim) -> offsets (B, T, V·3)."""

    def __init__(self, width: int, code_width: int | None, dim: int, **others: Any) -> None:
        super().__init__()
        self.projection = nn.Linear(code_width, dim) if code_width else nn.Identity()
        self.transformer = MotionTransformer(dim, count_frames=False, **others)
        self.mapping = nn.Linear(dim, width, bias=code_width is None)

    def forward(self, codes: Tensor, lengths: Tensor, real: Tensor) -> Tensor:
        """Offsets (F, V·3) of the frames where ``real`` (B, T) is True."""
        return self.mapping(self.hidden(codes, lengths)[real])

    def hidden(self, codes: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, dim), what the last layer maps to offsets; ``lengths`` (B,) int64 frames of each clip are real."""
        return self.transformer(self.projection(codes), lengths)


class FeatureDecoder(nn.Module):
    """Speech, a style and past motion in, the features of a frame's codes out.

    Args:
        width: of a frame of motion, V·3.
        num_subjects: number of style vectors.
        code_width: of a frame's features.
        audio_dim: width of the speech states.
        audio_per_frame: m, speech states that belong to one frame.
        dim: d, width of the transformer.
        layers: of it.
        heads: attention heads.
        period: of positional code and attention bias, in frames.
        dropout: while training.
    """

    def __init__(
        self,
        width: int,
        num_subjects: int,
        code_width: int,
        audio_dim: int,
        audio_per_frame: int,
        dim: int,
        layers: int,
        heads: int,
        period: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.audio_per_frame = audio_per_frame
        self.period = period
        self.heads = heads
        self.audio_projection = nn.Linear(audio_dim, dim)
        self.vertex_encoder = nn.Linear(width, dim)
        self.style = nn.Embedding(num_subjects, dim)
        self.layers = nn.ModuleList(
            CachedDecoderLayer(dim, heads, dim_feedforward=2 * dim, dropout=dropout, batch_first=True)
            for _ in range(layers)
        )
        self.to_codes = nn.Linear(dim, code_width, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.to_codes.weight)

    def forward(self, speech: Tensor, subject: Tensor, offsets: Tensor) -> Tensor:
        """Teacher-forced: all frames at once, each from the true frames before it.

        The first token is the projection of a zero offset plus the style, where free-running decoding starts from the
        style alone; so it is in the official code.

        Args:
            speech: (B, T·m, audio_dim).
            subject: (B,) int64.
            offsets: (B, T, V·3), the true offsets from the template.

        Returns:
            (B, T, code_width).
        """
        length, memory = offsets.shape[1], self.audio_projection(speech)
        first = self.vertex_encoder.bias.expand(len(offsets), 1, -1)
        previous = torch.cat([first, self.vertex_encoder(offsets[:, :-1])], dim=1)
        hidden = previous + self.style(subject)[:, None]
        hidden = self.dropout(hidden + periodic_positions(length, hidden.shape[-1], self.period).to(hidden))
        bias = causal_bias(self.heads, length, self.period).to(hidden).repeat(len(hidden), 1, 1)
        mask = alignment_mask(length, self.audio_per_frame).to(hidden.device)
        for layer in self.layers:
            hidden = layer(hidden, memory, tgt_mask=bias, memory_mask=mask)
        return self.to_codes(hidden)

    def free_running(
        self, speech: Tensor, subject: Tensor, autoencoder: MotionAutoencoder, feedback_frames: int | None = None
    ) -> Tensor:
        """One frame after the other, each from the motion that the codes before it decode to.

        Args:
            speech: (B, T·m, audio_dim).
            subject: (B,) int64.
            autoencoder: makes codes of features, and motion of codes.
            feedback_frames: newest frames that its decoder sees; None all of them.

        Returns:
            (B, T, code_width) codes.
        """
        layers: Any = self.layers
        hearing = self.audio_projection(speech)
        memory = [layer.project_memory(hearing, self.audio_per_frame) for layer in layers]
        length = speech.shape[1] // self.audio_per_frame
        style = self.style(subject)
        positions = periodic_positions(length, style.shape[-1], self.period).to(style)
        bias = distance_bias(self.heads, length, self.period).to(style).flip(-1)
        last = autoencoder.decoder.mapping
        feedback = self.vertex_encoder.weight @ last.weight
        feedback_bias = self.vertex_encoder(
            last.weight.new_zeros(last.out_features) if last.bias is None else last.bias
        )

        codes = speech.new_empty(len(speech), length, self.to_codes.out_features)
        token, pasts = style, [None] * len(layers)
        for t in range(length):
            hidden = token + positions[t]
            for i, (layer, (keys, values)) in enumerate(zip(layers, memory, strict=True)):
                hidden, pasts[i] = layer.step(
                    hidden, pasts[i], bias[:, None, length - 1 - t :], keys[:, t], values[:, t]
                )
            _, _, numbers = autoencoder.quantise(self.to_codes(hidden))
            codes[:, t] = autoencoder.quantiser.embedding(numbers).flatten(1)
            seen = codes[:, max(0, t + 1 - (feedback_frames or length)) : t + 1]
            motion = autoencoder.decoder.hidden(seen, torch.full_like(subject, seen.shape[1]))[:, -1]
            token = linear(motion, feedback, feedback_bias) + style
        return codes


OFFICIAL_NAMES = {
    "audio_feature_map": "decoder.audio_projection",
    "vertice_map": "decoder.vertex_encoder",
    "learnable_style_emb": "decoder.style",
    "feat_map": "decoder.to_codes",
    "autoencoder.quantize.embedding": "autoencoder.quantiser.embedding",
    "autoencoder.encoder.vertice_mapping.0": "autoencoder.encoder.mapping",
    "autoencoder.encoder.encoder_linear_embedding_post.net": "autoencoder.encoder.projection",
    "autoencoder.decoder.decoder_linear_embedding_pre.net": "autoencoder.decoder.projection",
    "autoencoder.decoder.vertice_map_reverse": "autoencoder.decoder.mapping",
}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the state dict of an official second-stage checkpoint, which holds both stages, to :class:`CodeTalker`'s.

    ===========================================================  =====================================================
    official (with or without ``module.`` in front)              here
    ===========================================================  =====================================================
    ``audio_encoder.*``                                          ``encoder.*``, see
                                                                 :func:`trainers.nets.speech_encoder.from_official`
    ``audio_feature_map.*``                                      ``decoder.audio_projection.*``
    ``vertice_map.*``                                            ``decoder.vertex_encoder.*``
    ``learnable_style_emb.weight``                               ``decoder.style.weight``
    ``transformer_decoder.layers.*``                             ``decoder.layers.*``
    ``feat_map.weight``                                          ``decoder.to_codes.weight``
    ``autoencoder.quantize.embedding.weight``                    ``autoencoder.quantiser.embedding.weight``
    ``autoencoder.encoder.vertice_mapping.0.*``                  ``autoencoder.encoder.mapping.*``
    ``autoencoder.encoder.encoder_linear_embedding_post.net.*``  ``autoencoder.encoder.projection.*`` (BIWI)
    ``autoencoder.decoder.decoder_linear_embedding_pre.net.*``   ``autoencoder.decoder.projection.*`` (BIWI)
    ``autoencoder.decoder.vertice_map_reverse.*``                ``autoencoder.decoder.mapping.*``
    ``autoencoder.encoder.*``, ``autoencoder.decoder.*``         ``autoencoder.encoder.transformer.*``, see
                                                                 :func:`trainers.nets.motion_codes.official_transformer_name`
    ``PPE.pe``, ``*_pos_embedding.pe``                           dropped; positions are computed
    ===========================================================  =====================================================
    """
    return {name: value for key, value in state.items() if (name := official_name(key)) is not None}


def official_name(key: str) -> str | None:
    """What the weight called ``key`` in an official checkpoint is called here; None where it is computed.

    Raises:
        UserError: no weight of CodeTalker's.
    """
    key = key.removeprefix("module.")
    if key.endswith(".pe"):
        return None
    part, _, rest = key.partition(".")
    if part == "audio_encoder":
        return f"encoder.{speech_encoder.official_name(rest)}"
    if part == "transformer_decoder":
        return f"decoder.{rest}"
    name, _, end = key.rpartition(".")
    if name in OFFICIAL_NAMES:
        return f"{OFFICIAL_NAMES[name]}.{end}"
    match = re.fullmatch(r"autoencoder\.(encoder|decoder)\.(.+)", key)
    if match and (renamed := official_transformer_name(match[2])):
        return f"autoencoder.{match[1]}.transformer.{renamed}"
    raise UserError(f"official checkpoint: unknown weight '{key}', expected one of CodeTalker's")
