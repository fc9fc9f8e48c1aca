"""After AdaMesh: personalised facial expressions and head poses (Chen et al., IEEE TMM 2025, arXiv 2310.07236).

The claim: ten seconds of a person are enough. A mixture of low-rank adapters (MoLoRA) tunes the expression adapter to
the person's manner, and a pose style found by the nearest match, without tuning, gives the head motion.

The expression adapter follows the official code (thuhcsi/AdaMesh, commit 07f65ac): HuBERT states at 50 Hz,
convolutional subsampling by two, a Conformer encoder and a Conformer decoder, a linear output with a convolutional
refinement, and the absolute error before and after it, summed over standardised controls. MoLoRA and the pose adapter
were not released: they are reconstructions from the abstract, hence "after".

- MoLoRA: adapters of several ranks r in parallel, y = W x + sum over r of B_r A_r x with B_r = 0 at first, on queries,
  keys, values and outputs of attention and on pointwise convolutions. They alone are tuned on the reference, and merged
  into W.
- Pose: a VQ-VAE turns 8 frames of head rotation and its differences into one code. A transformer predicts the codes one
  after the other from speech and a style token. The style of a person is a matrix: how often each cluster of speech
  states is spoken, times the mean and mean square of the pose codes that go with it. Of the training speakers the one
  with the nearest matrix by cosine, after standardisation over the speakers, lends the token.

Deliberate differences from the official code:

- Speech states are resampled to two per frame and convolutions are padded, so that any frame rate gives exactly one
  output per frame.
- Masks after every convolution: a clip gives in a batch what it gives alone. While training, padding enters the
  statistics of the Conformer's batch normalisation, as it does in the library.
- Tuning to a reference runs without dropout and leaves batch statistics as they are, so that it is deterministic.
- Subsampling may be narrower than the model (official: as wide), and learning rates are arguments.

The style bank holds one matrix per training speaker, and the token is the speaker's embedding. The token of the average
speaker is trained by forgetting the speaker at random. The transformer has rotary positions and a sliding window
(transformers' Mistral) instead of GPT-2's table, so that any length can be spoken. Expression adapter and VQ-VAE share
nothing and are trained side by side in the first stage; the second trains the transformer.
"""

import copy
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from peft import LoraConfig, LoraModel, PeftConfig
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, gelu, mse_loss, one_hot
from transformers import DynamicCache, MistralConfig, MistralModel, SeamlessM4TConfig
from transformers.models.seamless_m4t.modeling_seamless_m4t import (
    SeamlessM4TConformerEncoder,
    SeamlessM4TConformerRelPositionalEmbedding,
)

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers import measuring
from trainers.stages import Staged
from trainers.tasks import Condition, SpeechToRig, SystemInfo

STATES = 2  # speech states of a frame
STRIDE = 8  # frames of a pose code
ADAPTED = ["linear_q", "linear_k", "linear_v", "linear_out", "pointwise_conv1", "pointwise_conv2"]
REFERENCE = 10.0  # seconds of a reference, as the paper claims
DRAWS = 8  # of a head pose, to measure how much it moves
MOTIONLESS = 1e-4  # a spread below it is none


class AdaMesh(Staged, SpeechToRig):
    """AdaMesh as a trainable system.

    Args:
        rig: specification of the controls, see :func:`trainers.nets.rig.load_rig`.
        num_vertices: V of the mesh; 0 on data of controls alone.
        subjects: training subjects in the order of their pose styles.
        encoder: backbone specification of the speech encoder, which stays frozen.
        dim: width of the Conformers.
        heads: attention heads of the Conformers.
        feed_forward: hidden width of their feed-forward layers.
        kernel: frames that their depthwise convolutions see, odd.
        encoder_blocks: Conformer blocks of the encoder.
        decoder_blocks: Conformer blocks of the decoder, which follows the encoder frame by frame.
        subsampling: channels of the convolutions that bring speech states to the frame rate.
        post_width: channels of the refinement.
        dropout: in the Conformers, while training.
        post_dropout: in the refinement, while training.
        lr: learning rate of AdamW for the expression adapter.
        weight_decay: of AdamW.
        ranks: of the parallel low-rank adapters.
        adapt_steps: steps of AdamW on the reference.
        adapt_lr: their learning rate.
        codes: size of the pose codebook.
        code_dim: width of a pose code.
        pose_dim: width of the pose transformer.
        pose_layers: its layers.
        pose_heads: its attention heads.
        pose_window: pose codes that it looks back.
        pose_lr: learning rate of AdamW for VQ-VAE and pose transformer.
        clusters: of speech states in a pose style.
        forget_style: share of training clips whose speaker the pose transformer is not told.
        top_k: most likely pose codes to draw from.
        temperature: of the draw; 0 takes the most likely code.
        stage_epochs: epochs of the first stage (expressions and VQ-VAE); the pose transformer takes the rest.
    """

    info = SystemInfo(
        name="adamesh",
        title="after AdaMesh",
        task="speech-to-mesh",
        paper="Chen et al., AdaMesh: Personalized Facial Expressions and Head Poses for Adaptive Speech-Driven 3D "
        "Facial Animation, IEEE TMM",
        year=2025,
        url="https://arxiv.org/abs/2310.07236",
        basis="reconstruction",
    )
    conditions: ClassVar[tuple[Condition, ...]] = ("reference",)

    centroids: Tensor
    style_sums: Tensor
    style_counts: Tensor
    pose_style: Tensor

    def __init__(
        self,
        rig: str,
        num_vertices: int,
        subjects: list[str],
        encoder: str,
        dim: int = 256,
        heads: int = 4,
        feed_forward: int = 2048,
        kernel: int = 15,
        encoder_blocks: int = 3,
        decoder_blocks: int = 3,
        subsampling: int = 256,
        post_width: int = 128,
        dropout: float = 0.1,
        post_dropout: float = 0.5,
        lr: float = 1e-5,
        weight_decay: float = 0.002,
        ranks: list[int] = [4, 8, 16, 32],  # noqa: B006
        adapt_steps: int = 100,
        adapt_lr: float = 1e-4,
        codes: int = 256,
        code_dim: int = 64,
        pose_dim: int = 256,
        pose_layers: int = 6,
        pose_heads: int = 4,
        pose_window: int = 64,
        pose_lr: float = 1e-4,
        clusters: int = 50,
        forget_style: float = 0.2,
        top_k: int = 50,
        temperature: float = 1.0,
        stage_epochs: list[int] = [50],  # noqa: B006
    ) -> None:
        super().__init__(rig, num_vertices, subjects, encoder=encoder, alignment="resample_pairs")
        self.save_hyperparameters()
        self.lr = lr
        self.pose_lr = pose_lr
        self.weight_decay = weight_decay
        self.ranks = ranks
        self.adapt_steps = adapt_steps
        self.adapt_lr = adapt_lr
        self.forget_style = forget_style
        self.top_k = top_k
        self.temperature = temperature
        blocks: dict[str, Any] = {"dim": dim, "heads": heads, "feed_forward": feed_forward, "kernel": kernel}
        self.expression = ExpressionAdapter(
            self.encoder.dim,
            len(self.rig.controls),
            encoder_blocks,
            decoder_blocks,
            subsampling,
            post_width,
            post_dropout,
            **blocks,
            dropout=dropout,
        )
        self.codec = PoseCodec(codes, code_dim)
        self.gpt = PoseGPT(codes, self.encoder.dim, len(subjects) + 1, pose_dim, pose_layers, pose_heads, pose_window)
        self.register_buffer("centroids", torch.zeros(clusters, self.encoder.dim))
        self.register_buffer("style_sums", torch.zeros(len(subjects), clusters, 2 * code_dim))
        self.register_buffer("style_counts", torch.zeros(len(subjects)))
        self.register_buffer("pose_style", torch.tensor(len(subjects)))  # the average speaker's
        self.plan_stages(stage_epochs, [[self.expression, self.codec], [self.gpt]])

    def on_fit_start(self) -> None:
        """Measures the training data, unless a checkpoint brought the result."""
        if not self.expression.scale.std.any():
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            batches = data.loader("train", whole=True)
            self.measure(self.transfer_batch_to_device(batch, self.device, 0) for batch in batches)

    @torch.no_grad()
    def measure(self, batches: Iterable[SpeechBatch]) -> None:
        """Means and spreads of controls and pose, and clusters of speech states.

        Raises:
            UserError: there is less speech than clusters.
        """
        controls, poses, speech = Moments(), Moments(), []
        for batch in batches:
            controls.add(batch.weights[batch.frame_mask])
            poses.add(batch.pose[batch.frame_mask])
            states, real = self.hear_codes(batch)
            speech.append(states[real].cpu())
        for scale, moments in ((self.expression.scale, controls), (self.codec.scale, poses)):
            scale.mean.copy_(moments.mean)
            scale.std.copy_(moments.std)
        spoken = torch.cat(speech)
        if len(spoken) < len(self.centroids):
            raise UserError(
                f"model.clusters: {len(self.centroids)}, but the training clips have {len(spoken)} pieces of speech; "
                "set it lower"
            )
        found = KMeans(len(self.centroids), n_init=1, random_state=0).fit(spoken.numpy())
        self.centroids.copy_(torch.from_numpy(found.cluster_centers_))

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """Expression and VQ-VAE losses in the first stage, that of the pose transformer in the second."""
        if self.stage == 0:
            losses = {"expression": self.loss(self.encode(batch)[0], batch), **self.codec.losses(*self.turns(batch))}
        else:
            losses = {"pose": self.pose_loss(batch)}
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, batch_size=len(batch))
        return torch.stack(list(losses.values())).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, with a learning rate for expressions and one for poses."""
        poses = [*self.codec.parameters(), *self.gpt.parameters()]
        groups = [{"params": self.expression.parameters(), "lr": self.lr}, {"params": poses, "lr": self.pose_lr}]
        return torch.optim.AdamW(groups, weight_decay=self.weight_decay)

    @torch.no_grad()
    def control(self, batch: SpeechBatch) -> Tensor:
        """Controls of every frame; see :meth:`SpeechToRig.control`."""
        _, refined = self.expression(self.encode(batch)[0], batch.frame_mask)
        return self.expression.scale.restore(refined)

    @torch.no_grad()
    def head_pose(self, batch: SpeechBatch, style: int | None = None) -> Tensor:
        """Head motion to the speech, drawn at random; the same for a key in any batch, see :meth:`generators`.

        Args:
            batch: the clips.
            style: number of the training subject whose pose style to use, or their count for the average speaker's;
                by default what :meth:`adapt` found, and without it the average.

        Returns:
            (B, T, 3) rotation vectors in radians; what lies beyond a clip's length is undefined. Zero where the
            training data had no head pose.
        """
        speech, real = self.hear_codes(batch)
        styles = (self.pose_style if style is None else torch.tensor(style, device=self.device)).expand(len(batch))
        codes = self.gpt.generate(speech, styles, self.generators(batch), self.top_k, self.temperature)
        turns = self.codec.decode(self.codec.codebook[codes], real)
        return self.codec.scale.restore(turns[:, : batch.vertices.shape[1]])

    def loss(self, states: Tensor, batch: SpeechBatch) -> Tensor:
        """Absolute errors before and after the refinement, summed over standardised controls, mean over real frames.

        Args:
            states: (B, 2·T, D) of :meth:`encode`.
            batch: the clips.
        """
        target = self.expression.scale(batch.weights)
        errors = [(predicted - target).abs() for predicted in self.expression(states, batch.frame_mask)]
        return torch.stack(errors).sum(0)[batch.frame_mask].sum(-1).mean()

    def pose_loss(self, batch: SpeechBatch) -> Tensor:
        """Cross-entropy of the pose codes; also adds the clips to the style bank."""
        speech, real = self.hear_codes(batch)
        with torch.no_grad():
            vectors, codes = self.codec.quantise(self.codec.encode(*self.turns(batch)))
            sums, counts = self.style_matrices(speech, vectors, real)
            for bank, clips in ((self.style_sums, sums), (self.style_counts, counts)):
                bank += over_ranks(torch.zeros_like(bank).index_add(0, batch.subject_index, clips.to(bank.dtype)))
        forgotten = torch.rand(len(batch), device=self.device) < self.forget_style
        style = batch.subject_index.masked_fill(forgotten, len(self.subjects))
        return cross_entropy(self.gpt(codes, speech, style)[real], codes[real])

    def turns(self, batch: SpeechBatch) -> tuple[Tensor, Tensor]:
        """Standardised pose, held at its end to whole codes, (B, 8·L, 3), and which codes are real, (B, L) bool."""
        real = code_mask(batch.lengths)
        frame = torch.arange(STRIDE * real.shape[1], device=real.device).minimum(batch.lengths[:, None] - 1)
        return self.codec.scale(batch.pose.take_along_dim(frame[..., None], dim=1)), real

    def hear_codes(self, batch: SpeechBatch) -> tuple[Tensor, Tensor]:
        """Mean speech state of every pose code, (B, L, D), zero where padded, and which are real, (B, L) bool."""
        states, _ = self.encode(batch)
        real = code_mask(batch.lengths)
        heard = batch.frame_mask.repeat_interleave(STATES, dim=1)
        missing = STATES * STRIDE * real.shape[1] - heard.shape[1]
        states = nn.functional.pad(states.masked_fill(~heard[..., None], 0), (0, 0, 0, missing))
        heard = nn.functional.pad(heard, (0, missing))
        total = states.unflatten(1, (-1, STATES * STRIDE)).sum(2)
        return total / heard.unflatten(1, (-1, STATES * STRIDE)).sum(-1, keepdim=True).clamp(min=1), real

    def style_matrices(self, speech: Tensor, vectors: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Semantic-aware pose style of clips, before division by the number of codes.

        Args:
            speech: (B, L, D) speech states of the codes.
            vectors: (B, L, E) pose codes.
            real: (B, L) bool.

        Returns:
            (B, clusters, 2·E), sums of the codes and of their squares for each cluster of speech, and how many codes
            each clip has, (B,).
        """
        cluster = torch.cdist(speech, self.centroids.expand(len(speech), -1, -1)).argmin(-1)
        spoken = one_hot(cluster, len(self.centroids)).float() * real[..., None]
        return spoken.mT @ torch.cat([vectors, vectors.square()], dim=-1), real.sum(1).float()

    @torch.no_grad()
    def retrieve(self, reference: SpeechBatch) -> int:
        """The training subject whose pose style is nearest to the reference's."""
        speech, real = self.hear_codes(reference)
        vectors, _ = self.codec.quantise(self.codec.encode(*self.turns(reference)))
        sums, counts = self.style_matrices(speech, vectors, real)
        bank = self.style_sums / self.style_counts.clamp(min=1)[:, None, None]
        spread, mean = torch.std_mean(bank, dim=0, correction=0)
        scale = torch.where(spread > 0, 1 / spread, 0)
        wanted = (sums.sum(0) / counts.sum() - mean) * scale
        nearness = cosine_similarity(((bank - mean) * scale).flatten(1), wanted.flatten(), dim=-1)
        return int(nearness.masked_fill(self.style_counts == 0, -torch.inf).argmax())  # of those who spoke

    def adapt(self, reference: SpeechBatch) -> "AdaMesh":
        """A copy tuned to one person: MoLoRA on the expressions of the reference, merged, and the nearest pose style.

        Args:
            reference: clips of one person with controls and pose, about 10 s together.

        Raises:
            UserError: see :meth:`check_reference`.
        """
        self.check_reference(reference)
        shared = (self.encoder, self.rig, self._states)
        adapted = copy.deepcopy(self, {id(part): part for part in shared}).eval()
        adapted.pose_style.fill_(self.retrieve(reference))
        with torch.no_grad():
            states, _ = adapted.encode(reference)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            mixture = attach_adapters(adapted.expression, self.ranks)
        trained = [parameter for parameter in mixture.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=self.adapt_lr, weight_decay=self.weight_decay)
        for _ in range(self.adapt_steps):
            optimiser.zero_grad()
            adapted.loss(states, reference).backward()
            optimiser.step()
        merge_adapters(mixture)
        return adapted

    def measurements(self, data: SpeechDataModule) -> dict[str, dict[str, float]]:
        """Adaptation to ten seconds, on the test split, and the pose style of speakers never heard.

        ``adapted`` and ``unadapted`` are lip-vertex errors; see :func:`trainers.measuring.adaptation`. For
        ``retrieved_style`` and ``average_style`` the spread over time of the three angles of drawn head poses is
        compared with the speaker's: mean absolute difference in degrees for each clip. Nothing was chosen by these
        distances and test speakers are too few, so the validation speakers count as well.
        """
        styles: dict[str, dict[str, float]] = {"retrieved_style": {}, "average_style": {}}
        for split in ("val", "test"):
            for reference, others in measuring.reference_clips(data, REFERENCE, split):
                wanted = pose_spread(others.pose, others.lengths).mean(0)
                for name, style in zip(styles, (self.retrieve(reference), len(self.subjects)), strict=True):
                    spreads = []
                    for self.draw in range(DRAWS):
                        spreads.append(pose_spread(self.head_pose(others, style), others.lengths))
                    self.draw = 0
                    distance = (torch.stack(spreads).mean(0) - wanted).abs().mean(-1).rad2deg()
                    styles[name] |= dict(zip(others.key, distance.tolist(), strict=True))
        return {**measuring.adaptation(self, data, REFERENCE), **styles}


class Standardisation(nn.Module):
    """Zero mean and unit variance by training statistics; all zero until they are measured."""

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.zeros(dim))

    def forward(self, values: Tensor) -> Tensor:
        """(..., dim) -> the same without unit."""
        return (values - self.mean) / self.std.clamp(min=MOTIONLESS)

    def restore(self, values: Tensor) -> Tensor:
        """The inverse; what never moved in training stays at its mean."""
        return self.mean + self.std * values


class Moments:
    """Mean and standard deviation of what is added, (N, dim) each time."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Any = 0
        self.squares: Any = 0

    def add(self, values: Tensor) -> None:
        """Adds rows."""
        values = values.double()
        self.count += len(values)
        self.total = self.total + values.sum(0)
        self.squares = self.squares + values.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """(dim,)."""
        return self.total / self.count

    @property
    def std(self) -> Tensor:
        """(dim,), zero where nothing moves."""
        return (self.squares / self.count - self.mean.square()).clamp(min=0).sqrt()


def attach_adapters(network: nn.Module, ranks: list[int]) -> LoraModel:
    """Puts low-rank adapters of several ranks in parallel on a network (MoLoRA); nothing else of it stays trainable.

    The network's output does not change before they are trained.

    Args:
        network: its layers named in :data:`ADAPTED` get adapters, in place.
        ranks: one adapter of each.

    Returns:
        peft's handle, for :func:`merge_adapters`.
    """
    names = {f"rank{rank}": rank for rank in ranks}
    configs: dict[str, PeftConfig] = {
        name: LoraConfig(r=rank, lora_alpha=rank, target_modules=ADAPTED) for name, rank in names.items()
    }
    first, *others = configs
    mixture = LoraModel(network, configs, first)
    for name in others:
        mixture.inject_adapter(network, name)
    mixture.set_adapter(list(configs))
    return mixture


def merge_adapters(mixture: LoraModel) -> None:
    """Adds the adapters to the weights and takes them off the network, which is then as plain as it was."""
    mixture.merge_and_unload().requires_grad_(True)


class ExpressionAdapter(nn.Module):
    """Speech states in, standardised controls out: subsampling, Conformer encoder and decoder, refinement.

    Args:
        speech_dim: D, width of the speech states.
        num_controls: C.
        encoder_blocks, decoder_blocks: Conformer blocks of either.
        subsampling: channels of the subsampling.
        post_width: channels of the refinement.
        post_dropout: in the refinement, while training.
        others: of the Conformers, see :func:`conformer`.
    """

    def __init__(
        self,
        speech_dim: int,
        num_controls: int,
        encoder_blocks: int,
        decoder_blocks: int,
        subsampling: int,
        post_width: int,
        post_dropout: float,
        **others: Any,
    ) -> None:
        super().__init__()
        self.subsampling = Subsampling(speech_dim, subsampling, others["dim"])
        self.encoder = conformer(encoder_blocks, **others)
        self.decoder = conformer(decoder_blocks, **others)
        self.output = nn.Linear(others["dim"], num_controls)
        self.widen = nn.Conv1d(num_controls, post_width, 5, padding=2)
        self.narrow = nn.Conv1d(post_width, num_controls, 5, padding=2)
        self.dropout = nn.Dropout(post_dropout)
        self.scale = Standardisation(num_controls)

    def forward(self, states: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Controls before and after the refinement.

        Args:
            states: (B, 2·T, D), two for each frame.
            real: (B, T) bool, True where a frame is.

        Returns:
            two of (B, T, C), undefined where padded.
        """
        hidden = self.decoder(self.encoder(self.subsampling(states, real), real), real)
        rough = self.output(hidden)
        mask = real[:, None]
        wide = self.dropout(self.widen(rough.mT * mask).tanh())
        return rough, rough + self.dropout(self.narrow(wide * mask)).mT


def conformer(blocks: int, dim: int, heads: int, feed_forward: int, kernel: int, dropout: float) -> nn.Module:
    """Conformer blocks (Gulati et al. 2020) with relative positions: (B, T, dim), real (B, T) bool -> (B, T, dim).

    Args:
        blocks: how many.
        dim: width.
        heads: of attention.
        feed_forward: hidden width of the two half-step feed-forward layers of a block.
        kernel: frames that the depthwise convolution sees, odd.
        dropout: while training.
    """
    # Of the library's Conformers this one masks padding before its convolutions.
    config = SeamlessM4TConfig(
        hidden_size=dim,
        speech_encoder_layers=blocks,
        speech_encoder_attention_heads=heads,
        speech_encoder_intermediate_size=feed_forward,
        speech_encoder_dropout=dropout,
        speech_encoder_layerdrop=0.0,
        conv_depthwise_kernel_size=kernel,
        position_embeddings_type="relative",
        max_source_positions=1,  # see RelativePositions
        attn_implementation="eager",  # type: ignore[call-arg]
    )
    encoder = SeamlessM4TConformerEncoder(config)
    encoder.embed_positions = RelativePositions(config)
    return encoder


class RelativePositions(SeamlessM4TConformerRelPositionalEmbedding):
    """The library's relative positions, made anew for each batch.

    The library keeps a table that grows with the clips and takes on their precision: one that validation made cannot be
    trained with, and differs from rank to rank.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, dim) -> (1, 2·T - 1, dim)."""
        return self.extend_pe(hidden_states)


class Subsampling(nn.Module):
    """Two 3x3 convolutions over time and features, the first with stride 2, then a linear layer.

    Args:
        speech_dim: D, width of the speech states.
        channels: of the convolutions.
        dim: width of the result.
    """

    def __init__(self, speech_dim: int, channels: int, dim: int) -> None:
        super().__init__()
        self.halve = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)
        self.project = nn.Linear(channels * -(-speech_dim // 2), dim)

    def forward(self, states: Tensor, real: Tensor) -> Tensor:
        """States (B, 2·T, D) of the frames real (B, T) -> (B, T, dim)."""
        heard = real.repeat_interleave(STATES, dim=1)[..., None]
        x = self.halve(states.masked_fill(~heard, 0)[:, None]).relu()
        x = self.mix(x * real[:, None, :, None]).relu()
        return self.project(x.transpose(1, 2).flatten(2))


class PoseCodec(nn.Module):
    """VQ-VAE (van den Oord et al. 2017) of head rotation: eight frames become one code.

    The codebook follows the encoder by moving averages (its appendix A.1); a code that goes out of use starts again at
    a vector of the batch.

    Args:
        codes: size of the codebook.
        dim: width of a code and of the network.
    """

    COMMITMENT = 0.25
    DECAY = 0.9
    UNUSED = 0.1  # mean number of vectors in a batch below which a code starts again

    codebook: Tensor
    usage: Tensor

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        halvings = STRIDE.bit_length() - 1
        widths = [6, *[dim] * halvings]
        self.down = nn.ModuleList(nn.Conv1d(width, dim, 4, stride=2, padding=1) for width in widths[:-1])
        self.down_mix = nn.ModuleList(nn.Conv1d(dim, dim, 3, padding=1) for _ in range(halvings))
        self.up_mix = nn.ModuleList(nn.Conv1d(dim, dim, 3, padding=1) for _ in range(halvings))
        self.up = nn.ModuleList(nn.ConvTranspose1d(dim, dim, 4, stride=2, padding=1) for _ in range(halvings))
        self.output = nn.Conv1d(dim, 3, 3, padding=1)
        self.scale = Standardisation(3)
        self.register_buffer("codebook", torch.zeros(codes, dim))
        self.register_buffer("usage", torch.zeros(codes))

    def encode(self, turns: Tensor, real: Tensor) -> Tensor:
        """Standardised pose (B, 8·L, 3) of the codes real (B, L) -> vectors (B, L, dim), not yet quantised."""
        x = torch.cat([turns, steps(turns)], dim=-1).mT
        mask = real.repeat_interleave(STRIDE, dim=1)[:, None]
        for down, mix in zip(self.down, self.down_mix, strict=True):
            x = gelu(down(x * mask))
            mask = mask[..., ::2]
            x = x + mix(gelu(x) * mask)
        return x.mT

    def quantise(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codes of (B, L, dim): their vectors, and their numbers (B, L) int64."""
        codes = torch.cdist(vectors, self.codebook.expand(len(vectors), -1, -1)).argmin(-1)
        return self.codebook[codes], codes

    def decode(self, vectors: Tensor, real: Tensor) -> Tensor:
        """Vectors (B, L, dim) of the codes real (B, L) -> standardised pose (B, 8·L, 3)."""
        x, mask = vectors.mT, real[:, None]
        for mix, up in zip(self.up_mix, self.up, strict=True):
            x = x + gelu(mix(x * mask))
            x = gelu(up(x * mask))
            mask = mask.repeat_interleave(2, dim=-1)
        return self.output(x * mask).mT

    def losses(self, turns: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Squared errors of the pose, of its steps and of the commitment to the codebook."""
        vectors = self.encode(turns, real)
        if self.training:
            self.follow(vectors[real])
        quantised, _ = self.quantise(vectors)
        decoded = self.decode(vectors + (quantised - vectors).detach(), real)
        frames = real.repeat_interleave(STRIDE, dim=1)
        return {
            "pose_reconstruction": mse_loss(decoded[frames], turns[frames]),
            "pose_steps": mse_loss(steps(decoded)[frames], steps(turns)[frames]),
            "commitment": self.COMMITMENT * mse_loss(vectors[real], quantised[real]),
        }

    @torch.no_grad()
    def follow(self, vectors: Tensor) -> None:
        """Moves the codes toward the means of the vectors (N, dim) nearest to them."""
        chosen = one_hot(self.quantise(vectors[None])[1][0], len(self.codebook)).float()
        near, count = over_ranks(chosen.T @ vectors), over_ranks(chosen.sum(0))
        sums = self.DECAY * self.usage[:, None] * self.codebook + (1 - self.DECAY) * near
        self.usage.mul_(self.DECAY).add_(count, alpha=1 - self.DECAY)
        unused = self.usage < self.UNUSED
        restarts = vectors[torch.randint(len(vectors), (len(unused),), device=vectors.device)]
        self.codebook.copy_(torch.where(unused[:, None], restarts, sums / self.usage.clamp(min=1e-5)[:, None]))
        self.usage.masked_fill_(unused, 2 * self.UNUSED)


class PoseGPT(nn.Module):
    """Predicts pose codes one after the other from speech and a style token.

    Args:
        codes: size of the codebook.
        speech_dim: D, width of the speech states.
        styles: number of style tokens.
        dim: width.
        layers: of the transformer.
        heads: of attention.
        window: codes that it looks back.
    """

    def __init__(
        self, codes: int, speech_dim: int, styles: int, dim: int, layers: int, heads: int, window: int
    ) -> None:
        super().__init__()
        config = MistralConfig(
            vocab_size=codes + 1,  # the last one starts a clip
            hidden_size=dim,
            intermediate_size=4 * dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=dim // heads,
            sliding_window=window,
        )
        self.start = codes
        self.transformer = MistralModel(config)
        self.speech = nn.Linear(speech_dim, dim)
        self.style = nn.Embedding(styles, dim)
        self.output = nn.Linear(dim, codes)

    def forward(self, codes: Tensor, speech: Tensor, style: Tensor) -> Tensor:
        """Scores of every code, each given those before it.

        Args:
            codes: (B, L) int64, the true ones.
            speech: (B, L, D) their speech states.
            style: (B,) int64.

        Returns:
            (B, L, codes).
        """
        previous = torch.cat([torch.full_like(codes[:, :1], self.start), codes[:, :-1]], dim=1)
        tokens = self.transformer.embed_tokens(previous) + self.condition(speech, style)
        return self.output(self.transformer(inputs_embeds=tokens, use_cache=False).last_hidden_state)

    def condition(self, speech: Tensor, style: Tensor) -> Tensor:
        """What every token is told: (B, L, dim)."""
        return self.speech(speech) + self.style(style)[:, None]

    def generate(
        self, speech: Tensor, style: Tensor, generators: list[torch.Generator], top_k: int, temperature: float
    ) -> Tensor:
        """Draws codes.

        Args:
            speech: (B, L, D).
            style: (B,) int64.
            generators: of the clips, on the CPU.
            top_k: most likely codes to draw from.
            temperature: divides the scores; 0 takes the most likely code.

        Returns:
            (B, L) int64.
        """
        told = self.condition(speech, style)
        cache = DynamicCache(config=self.transformer.config)
        code = torch.full((len(speech), 1), self.start, device=speech.device)
        drawn = []
        for t in range(speech.shape[1]):
            token = self.transformer.embed_tokens(code) + told[:, t : t + 1]
            hidden = self.transformer(inputs_embeds=token, past_key_values=cache, use_cache=True).last_hidden_state
            code = draw(self.output(hidden[:, 0]), generators, top_k, temperature)[:, None]
            drawn.append(code)
        return torch.cat(drawn, dim=1)


def draw(scores: Tensor, generators: list[torch.Generator], top_k: int, temperature: float) -> Tensor:
    """One of the ``top_k`` best for every row of scores (B, codes): (B,) int64."""
    if not temperature:
        return scores.argmax(-1)
    best, codes = scores.topk(min(top_k, scores.shape[-1]))
    chances = (best / temperature).softmax(-1).cpu()
    rows = zip(chances, generators, strict=True)
    chosen = torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
    return codes.gather(1, chosen.to(codes.device)[:, None])[:, 0]


def code_mask(lengths: Tensor) -> Tensor:
    """Which pose codes clips of so many frames (B,) have: (B, L) bool."""
    counts = (lengths + STRIDE - 1) // STRIDE
    return torch.arange(int(counts.max()), device=lengths.device) < counts[:, None]


def steps(turns: Tensor) -> Tensor:
    """Differences of consecutive frames (B, T, 3), the first zero."""
    return torch.diff(turns, dim=1, prepend=turns[:, :1])


def pose_spread(pose: Tensor, lengths: Tensor) -> Tensor:
    """Standard deviation over time of the angles (B, T, 3) of clips of so many frames: (B, 3) radians."""
    return torch.stack([clip[:n].std(0, correction=0) for clip, n in zip(pose, lengths.tolist(), strict=True)])


def over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes of a run."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values
