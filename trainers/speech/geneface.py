"""GeneFace: audio-driven 3D talking faces that generalise to new speech (Ye et al., ICLR 2023, arXiv 2301.13430).

The claim: a variational motion generator trained on many speakers follows any speech, and an adversarial post-net then
brings its motion into the domain of one person of whom there is little footage, without losing the synchrony of lips
and sound. Motion is 68 landmarks in three dimensions without head pose; the paper's neural renderer of them is out of
scope here.

What stands here follows the official code (yerfor/GeneFace, commit 15ff4e5): HuBERT states, two for a frame; a VAE over
time whose encoder and decoder are WaveNets and whose prior is a flow, all conditioned on speech; a synchrony expert
that says whether five frames of mouth and ten of sound belong together; the post-net and its discriminator; the
projection of landmarks onto those of the person by locally linear embedding. The expert and the VAE are the two stages
of one training. The post-net is trained by :meth:`GeneFace.adapt` on clips of the person.

Deliberate differences:

- Vertices: the task asks for a mesh. A ridge regression from landmark offsets to vertex offsets, fitted once on the
  training clips and kept with the weights, gives it. That part is ours. What landmarks do not show, it cannot know.
- Landmarks are offsets from the speaker's neutral landmarks, which the task gives; officially from a mean face, so that
  they also tell identity.
- The post-net's last layer starts at zero: a system that was not adapted gives the VAE's motion. Official adaptation
  sees the sound of the whole training corpus and minutes of the person; here it sees the reference clips alone.
- Padding of a batch takes no part in the speech condition nor in the statistics of its batch normalisation (officially
  it does), and the post-net is adapted on the clips laid end to end. Inference goes clip by clip and without padding,
  as in the official code.
- The synchrony loss of the VAE is switched on by the first training batch where it is low enough (officially by a
  validation). Pairs that do not belong together: half from 2 to 5 frames away, half from anywhere in the batch
  (officially, by an oversight, always from the same clip).
- One rate for both stages, which decays exponentially as the VAE's does; officially that is also warmed up over 1,000
  steps, and the expert's falls as a cosine.
- Variances of landmarks to clamp, smoothing over time and injected blinks, which precede the renderer, are left out.
"""

import copy
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, cosine_similarity, gelu, leaky_relu, normalize, pad
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pad_sequence

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.head import Head
from datamodules.speech import SpeechDataModule
from datamodules.stream import Loader
from trainers.measuring import adaptation
from trainers.stages import Staged
from trainers.tasks import Condition, SpeechToMesh, SystemInfo

LANDMARKS = 68
MOUTH = slice(48, 68)  # of the iBUG 300-W markup
WINDOW = 5  # frames that the synchrony expert sees
NEIGHBOURS = 10  # of the locally linear embedding
RIDGE = 1e-3  # of the mean variance of a landmark coordinate


class GeneFace(Staged, SpeechToMesh):
    """GeneFace as a trainable system.

    Args:
        num_vertices: V of the mesh.
        subjects: training subjects. It does not tell them apart.
        encoder: backbone specification of the speech encoder, which stays as it is.
        landmarks: the 68 vertices that are landmarks, in the order of the iBUG 300-W markup; ``demo`` for those of the
            demo head, ``all`` for data whose meshes are the landmarks.
        alignment: ``pair_states`` (25 fps) or ``resample_pairs`` (any frame rate).
        condition_dim: width of the speech condition.
        condition_dropout: of it, while training; officially an option of 0.5.
        hidden: width of the VAE's WaveNets.
        latent: channels of the latent code, one for every four frames.
        kernel: of the VAE's WaveNets, frames.
        encoder_layers: of the VAE's encoder.
        decoder_layers: of its decoder.
        flow: whether the prior is a flow; else a standard normal distribution.
        flow_hidden: width of the flow's WaveNets.
        flow_layers: of each coupling.
        squeeze: pools the latent code over the clip; an official variant for expression coefficients.
        kl_weight: of the divergence from the prior.
        continuity_weight: of the error of the landmarks' velocities.
        sync_weight: of the synchrony loss.
        sync_threshold: its value from which on it counts.
        sync_windows: pairs of mouth and sound that the expert sees in a step.
        sync_widths: channels of the expert's three levels.
        sync_mouth_width: channels of its first mouth layer.
        temperature: factor of the noise that a clip is drawn from.
        postnet_widths: channels of the post-net's two levels, and of the discriminator.
        adaptation_steps: of :meth:`adapt`.
        adaptation_lr: learning rate of RMSprop there.
        adversarial_weight: of the discriminator's verdict there.
        adaptation_sync_weight: of the synchrony loss there.
        mse_weight: of the error of the landmarks there.
        lle_weight: how far an adapted system's landmarks are moved to their projection onto the reference's, 0 to 1.
        stage_epochs: epochs of the expert; the rest of the run trains the VAE.
        unit: metres; landmark offsets are learned and losses measured in it. Officially about 0.01.
        lr: learning rate of Adam at the start.
        decay_steps: steps in which it falls to a tenth.
        samples: predictions to draw for each clip.
    """

    info = SystemInfo(
        name="geneface",
        title="GeneFace",
        task="speech-to-mesh",
        paper="Ye et al., GeneFace: Generalized and High-Fidelity Audio-Driven 3D Talking Face Synthesis, ICLR",
        year=2023,
        url="https://arxiv.org/abs/2301.13430",
        basis="official code",
    )
    conditions: ClassVar[tuple[Condition, ...]] = ("reference",)
    landmarks: Tensor
    to_vertices: Tensor
    sync_counts: Tensor
    reference: Tensor | None

    def __init__(
        self,
        num_vertices: int,
        subjects: list[str],
        encoder: str,
        landmarks: Literal["demo", "all"] | list[int] = "demo",
        alignment: Literal["pair_states", "resample_pairs"] = "pair_states",
        condition_dim: int = 64,
        condition_dropout: float = 0.0,
        hidden: int = 256,
        latent: int = 16,
        kernel: int = 5,
        encoder_layers: int = 8,
        decoder_layers: int = 4,
        flow: bool = True,
        flow_hidden: int = 64,
        flow_layers: int = 4,
        squeeze: bool = False,
        kl_weight: float = 0.5,
        continuity_weight: float = 3.0,
        sync_weight: float = 0.01,
        sync_threshold: float = 0.75,
        sync_windows: int = 1024,
        sync_widths: list[int] = [128, 256, 512],  # noqa: B006
        sync_mouth_width: int = 96,
        temperature: float = 1.0,
        postnet_widths: list[int] = [128, 256],  # noqa: B006
        adaptation_steps: int = 6000,
        adaptation_lr: float = 1e-4,
        adversarial_weight: float = 0.85,
        adaptation_sync_weight: float = 0.1,
        mse_weight: float = 0.05,
        lle_weight: float = 0.25,
        stage_epochs: list[int] = [10],  # noqa: B006
        unit: float = 0.01,
        lr: float = 5e-4,
        decay_steps: int = 250_000,
        samples: int = 1,
    ) -> None:
        super().__init__(num_vertices, subjects, encoder, alignment, samples=samples)
        self.save_hyperparameters()
        self.kl_weight = kl_weight
        self.continuity_weight = continuity_weight
        self.sync_weight = sync_weight
        self.sync_threshold = sync_threshold
        self.sync_windows = sync_windows
        self.temperature = temperature
        self.postnet_widths = postnet_widths
        self.adaptation_steps = adaptation_steps
        self.adaptation_lr = adaptation_lr
        self.adversarial_weight = adversarial_weight
        self.adaptation_sync_weight = adaptation_sync_weight
        self.mse_weight = mse_weight
        self.lle_weight = lle_weight
        self.unit = unit
        self.lr = lr
        self.decay_steps = decay_steps
        self.register_buffer("landmarks", find_landmarks(landmarks, num_vertices), persistent=False)
        self.register_buffer("to_vertices", torch.zeros(LANDMARKS * 3, num_vertices * 3))
        self.register_buffer("sync_counts", torch.tensor(False))
        self.encoder.classifier = None
        self.vae = MotionVAE(
            audio_dim=self.encoder.dim,
            condition_dim=condition_dim,
            condition_dropout=condition_dropout,
            hidden=hidden,
            latent=latent,
            kernel=kernel,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            use_flow=flow,
            flow_hidden=flow_hidden,
            flow_layers=flow_layers,
            squeeze=squeeze,
        )
        self.expert = SyncExpert(self.encoder.dim, sync_widths, sync_mouth_width)
        self.postnet = PostNet(LANDMARKS * 3, postnet_widths)
        self.register_buffer("reference", None, persistent=False)
        self.plan_stages(stage_epochs, [[self.expert], [self.vae]])

    def setup(self, stage: str) -> None:
        """Also fits the map from landmarks to vertices."""
        super().setup(stage)
        if stage == "fit":
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            self.to_vertices.copy_(fit_vertices(data.loader("train", whole=True), self.landmarks))

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """The expert's judgement of true and false pairs; then the VAE's weighted losses."""
        states, mask = self.hear(batch)
        motion = self.track(batch, mask)
        if self.stage == 0:
            loss = self.sync_loss(states, motion, mask, false_pairs=True)
            self.log("train/expert", loss, batch_size=len(batch))
            return loss
        self.expert.eval()
        losses = self.losses(states, motion, mask)
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, batch_size=len(batch))
        return torch.stack(list(losses.values())).sum()

    def losses(self, states: Tensor, motion: Tensor, mask: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """The VAE's weighted losses, means over real frames.

        Args:
            states: (B, 2T, D) of :meth:`hear`.
            motion: (B, T, 204) of :meth:`track`.
            mask: (B, T) bool.
            noise: as in :meth:`MotionVAE.reconstruct`.
        """
        stride = self.vae.stride
        condition = self.vae.condition(states, mask[:, ::stride].repeat_interleave(stride, dim=1))
        made = self.vae.reconstruct(motion, condition, mask, noise)
        sync = self.sync_loss(states, made.motion, mask)
        self.sync_counts |= sync.detach() <= self.sync_threshold
        return {
            "mse": mean_over((made.motion - motion).square(), mask),
            "continuity": self.continuity_weight * continuity_loss(made.motion, motion, mask),
            "kl": self.kl_weight * made.kl,
            "sync": self.sync_weight * self.sync_counts * sync,
        }

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam for both stages, with a rate that decays exponentially."""
        optimizer = torch.optim.Adam([*self.expert.parameters(), *self.vae.parameters()], lr=self.lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1 ** (1 / self.decay_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def animate(self, batch: SpeechBatch) -> Tensor:
        """Draws a motion for each clip; see :meth:`SpeechToMesh.animate`. Where sound ends first, the pose is held."""
        states, mask = self.hear(batch)
        clips = []
        for clip, frames, generator in zip(states, mask.sum(1).tolist(), self.generators(batch), strict=True):
            motion = self.speak(clip, frames, generator)
            motion = self.postnet(motion[None], torch.ones_like(mask[:1, :frames]))[0]
            if self.reference is not None:
                motion = motion.lerp(lle_projection(motion, self.reference, NEIGHBOURS)[0], self.lle_weight)
            clips.append(motion)
        last = torch.arange(batch.vertices.shape[1], device=mask.device).minimum(mask.sum(1, keepdim=True) - 1)
        motion = pad_sequence(clips, batch_first=True).take_along_dim(last[..., None], dim=1)
        offsets = self.unit * motion @ self.to_vertices
        return batch.template[:, None] + offsets.unflatten(-1, (self.num_vertices, 3))

    def hear(self, batch: SpeechBatch) -> tuple[Tensor, Tensor]:
        """Speech states (B, 2T, D), zero where a frame is not real or has none, and which frames do: (B, T) bool.

        T is a whole number of latents.
        """
        states, lengths = self.encode(batch)
        frames = lengths // 2
        length = self.vae.whole(int(frames.max()))
        mask = torch.arange(length, device=frames.device) < frames[:, None]
        states = pad(states, (0, 0, 0, 2 * length - states.shape[1]))
        return states.masked_fill(~mask.repeat_interleave(2, dim=1)[..., None], 0.0), mask

    def track(self, batch: SpeechBatch, mask: Tensor) -> Tensor:
        """The true landmarks' offsets from neutral, (B, T, 204) in :attr:`unit`, zero where masked."""
        offsets = batch.vertices[:, :, self.landmarks] - batch.template[:, None, self.landmarks]
        motion = (offsets / self.unit).flatten(2)
        return pad(motion, (0, 0, 0, mask.shape[1] - motion.shape[1])).masked_fill(~mask[..., None], 0.0)

    def speak(self, states: Tensor, frames: int, generator: torch.Generator) -> Tensor:
        """Draws the VAE's motion of one clip.

        Args:
            states: (2T, D), of which ``2 * frames`` are real and the others zero.
            frames: of the clip.
            generator: on the CPU.

        Returns:
            (frames, 204) landmark offsets in :attr:`unit`.
        """
        length = self.vae.whole(frames)
        noise = torch.randn(self.vae.latent, length // self.vae.stride, generator=generator).to(states)
        condition = self.vae.condition(states[None, : 2 * length], states.new_ones(1, length, dtype=torch.bool))
        return self.vae.sample(condition, self.temperature * noise[None])[0, :frames]

    def sync_loss(self, states: Tensor, motion: Tensor, mask: Tensor, false_pairs: bool = False) -> Tensor:
        """The expert's cross-entropy on random windows of mouth and sound.

        Args:
            states: (B, 2T, D).
            motion: (B, T, 204).
            mask: (B, T) bool.
            false_pairs: whether half of the pairs do not belong together.

        Raises:
            UserError: no clip is as long as a window.
        """
        clip, start = mask[:, WINDOW - 1 :].nonzero(as_tuple=True)
        if not len(clip):
            raise UserError(f"clips of {int(mask.sum(1).max())} frames, but the expert needs {WINDOW}; use longer ones")
        seen = torch.randint(len(clip), (self.sync_windows,), device=clip.device)
        heard = self._false_partners(clip, seen) if false_pairs else seen
        mouth = motion.unflatten(-1, (LANDMARKS, 3))[:, :, MOUTH].flatten(2)
        frames = torch.arange(WINDOW, device=clip.device)
        sounds = torch.arange(2 * WINDOW, device=clip.device)
        similarity = self.expert(
            states[clip[heard, None], 2 * start[heard, None] + sounds],
            mouth[clip[seen, None], start[seen, None] + frames],
        )
        with torch.autocast(similarity.device.type, enabled=False):  # its logarithms need full precision
            return binary_cross_entropy(similarity.float(), (heard == seen).float())

    def _false_partners(self, clip: Tensor, seen: Tensor) -> Tensor:
        """For a half of the windows another one: a few frames away in the same clip, or any."""
        anywhere = torch.randint_like(seen, len(clip))
        distance = torch.randint_like(seen, 2, 6) * (2 * torch.randint_like(seen, 2) - 1)
        near = (seen + distance).clamp(0, len(clip) - 1)
        near = torch.where(clip[near] == clip[seen], near, anywhere)
        wrong = torch.where(torch.rand_like(seen, dtype=torch.float32) < 0.5, near, anywhere)
        return torch.where(torch.rand_like(seen, dtype=torch.float32) < 0.5, wrong, seen)

    def adapt(self, reference: SpeechBatch) -> "GeneFace":
        """Domain adaptation: trains the post-net against a discriminator of the person's true landmarks.

        Args:
            reference: clips of one person with their vertices, a second or more in all.

        Returns:
            A copy in evaluation mode that moves like this person. This system stays as it is.

        Raises:
            UserError: see :meth:`check_reference`.
        """
        self.check_reference(reference)
        adapted = copy.deepcopy(self).eval().requires_grad_(False)
        with torch.no_grad():
            states, mask = adapted.hear(reference)
        truth = adapted.track(reference, mask)
        adapted.reference = truth[mask]
        with torch.enable_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            adapted._train_postnet(states, truth, mask)
        return adapted.eval().requires_grad_(False)

    def _train_postnet(self, states: Tensor, truth: Tensor, mask: Tensor) -> None:
        critic = discriminator(LANDMARKS * 3, self.postnet_widths).to(truth)
        postnet = self.postnet.train().requires_grad_(True)
        optimizer = torch.optim.RMSprop(postnet.parameters(), lr=self.adaptation_lr)
        critic_optimizer = torch.optim.RMSprop(critic.parameters(), lr=self.adaptation_lr)
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.adaptation_steps):
            with torch.no_grad():
                drawn = [self.speak(s, n, generator) for s, n in zip(states, mask.sum(1).tolist(), strict=True)]
                raw = pad_sequence(drawn, batch_first=True)
                raw = pad(raw, (0, 0, 0, mask.shape[1] - raw.shape[1]))
            # End to end: padding would enter its batch normalisation.
            joined = postnet(raw[mask][None], mask[mask][None])[0]
            refined = torch.zeros_like(truth).index_put((mask,), joined)
            loss = (
                self.adversarial_weight * (1 - critic(refined[mask])).square().mean()
                + self.adaptation_sync_weight * self.sync_loss(states, refined, mask)
                + self.mse_weight * mean_over((refined - truth).square(), mask)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            fake, true = critic(refined[mask].detach()), critic(truth[mask])
            critic_optimizer.zero_grad()
            (fake.square().mean() + (1 - true).square().mean()).backward()
            critic_optimizer.step()

    def measurements(self, data: SpeechDataModule) -> dict[str, dict[str, float]]:
        """Error on the lips with and without ten seconds of the speaker; see :func:`trainers.measuring.adaptation`."""
        return adaptation(self, data, seconds=10.0)


class Reconstruction(NamedTuple):
    """What :meth:`MotionVAE.reconstruct` gives.

    Attributes:
        motion: (B, T, M), zero where masked.
        kl: divergence of the posterior from the prior, mean over real latents and channels.
        mean: (B, C, T / 4), of the posterior.
        log_std: (B, C, T / 4), of the posterior.
        prior: (B, C, T / 4), the drawn latents in the space where the prior is normal.
    """

    motion: Tensor
    kl: Tensor
    mean: Tensor
    log_std: Tensor
    prior: Tensor


class MotionVAE(nn.Module):
    """The audio-to-motion VAE.

    Args:
        audio_dim: width of the speech states.
        motion_dim: M, numbers of a frame.
        stride: frames of a latent.
        flow_kernel: of the flow's WaveNets.
        couplings: of the flow.
        others: as in :class:`GeneFace`.
    """

    def __init__(
        self,
        audio_dim: int,
        motion_dim: int = LANDMARKS * 3,
        condition_dim: int = 64,
        condition_dropout: float = 0.0,
        hidden: int = 256,
        latent: int = 16,
        kernel: int = 5,
        encoder_layers: int = 8,
        decoder_layers: int = 4,
        use_flow: bool = True,
        flow_hidden: int = 64,
        flow_layers: int = 4,
        squeeze: bool = False,
        stride: int = 4,
        flow_kernel: int = 3,
        couplings: int = 4,
    ) -> None:
        super().__init__()
        self.latent = latent
        self.stride = stride
        self.listen = nn.Conv1d(audio_dim, condition_dim, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(condition_dim)
        self.understand = nn.Conv1d(condition_dim, condition_dim, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(condition_dropout)
        self.pool = nn.Conv1d(condition_dim, condition_dim, 2 * stride, stride, stride // 2)
        down = nn.Conv1d(motion_dim, hidden, 2 * stride, stride, stride // 2)
        up = nn.ConvTranspose1d(hidden if squeeze else latent, hidden, stride, stride)
        self.encoder = Coder(down, kernel, encoder_layers, condition_dim, 2 * latent)
        self.decoder = Coder(up, kernel, decoder_layers, condition_dim, motion_dim)
        self.flow = Flow(latent, flow_hidden, flow_kernel, flow_layers, couplings, condition_dim) if use_flow else None
        self.pooling = Pooling(latent, hidden) if squeeze else nn.Identity()

    def whole(self, frames: int) -> int:
        """Frames of all latents that so many frames touch."""
        return -(-frames // self.stride) * self.stride

    def condition(self, states: Tensor, mask: Tensor) -> Tensor:
        """Speech states (B, 2T, D), of which every second is used, and their frames' mask (B, T): (B, C, T)."""
        heard = self.listen(states[:, ::2].mT).mT
        normal = torch.zeros_like(heard)
        normal[mask] = self.norm(heard[mask])
        return self.dropout(self.understand(gelu(normal.mT)) * mask[:, None])

    def reconstruct(
        self, motion: Tensor, condition: Tensor, mask: Tensor, noise: Tensor | None = None
    ) -> Reconstruction:
        """Encodes and decodes a motion.

        Args:
            motion: (B, T, M), zero where masked; T whole latents.
            condition: (B, C, T) of :meth:`condition`.
            mask: (B, T) bool.
            noise: (B, latent, T / 4) that the posterior is drawn with; drawn here where it is not given.
        """
        frames = mask[:, None].to(motion)
        latents = frames[..., :: self.stride]
        context = self.pool(condition)
        mean, log_std = self.encoder(motion.mT, latents, context).chunk(2, dim=1)
        code = mean + log_std.exp() * (torch.randn_like(mean) if noise is None else noise)
        made = self.decoder(self.pooling(code), frames, condition) * frames
        posterior, standard = torch.distributions.Normal(mean, log_std.exp()), torch.distributions.Normal(0.0, 1.0)
        if self.flow is None:
            prior, divergence = code, torch.distributions.kl_divergence(posterior, standard)
        else:
            prior = self.flow(code, latents, context)
            divergence = posterior.log_prob(code) - standard.log_prob(prior)
        return Reconstruction(made.mT, mean_over(divergence.mT, latents[:, 0]), mean, log_std, prior)

    def sample(self, condition: Tensor, noise: Tensor) -> Tensor:
        """Draws a motion (B, T, M) from a condition (B, C, T) and noise (B, latent, T / 4)."""
        code = noise if self.flow is None else self.flow.reverse(noise, self.pool(condition))
        return self.decoder(self.pooling(code), torch.ones_like(condition[:, :1]), condition).mT


class Coder(nn.Module):
    """A change of rate, a WaveNet and a projection: the VAE's encoder and decoder.

    Args:
        resample: the convolution that changes the rate.
        kernel: of the WaveNet.
        layers: of the WaveNet.
        context_dim: width of the condition.
        output_dim: width of the result.
    """

    def __init__(
        self, resample: nn.Conv1d | nn.ConvTranspose1d, kernel: int, layers: int, context_dim: int, output_dim: int
    ) -> None:
        super().__init__()
        self.resample = resample
        self.wavenet = WaveNet(resample.out_channels, kernel, layers, context_dim)
        self.projection = nn.Conv1d(resample.out_channels, output_dim, 1)

    def forward(self, x: Tensor, mask: Tensor, context: Tensor) -> Tensor:
        """A sequence (B, C, T), mask (B, 1, T') and condition (B, C', T') at the rate of the result (B, O, T')."""
        return self.projection(self.wavenet(self.resample(x) * mask, mask, context))


class WaveNet(nn.Module):
    """Gated convolutions with residual and skip paths, all weight-normalised and without dilation.

    Args:
        channels: of input, output and hidden states.
        kernel: odd.
        layers: at least 1.
        context_dim: width of the condition.
    """

    def __init__(self, channels: int, kernel: int, layers: int, context_dim: int) -> None:
        super().__init__()
        self.channels = channels
        self.context = weight_norm(nn.Conv1d(context_dim, 2 * channels * layers, 1))
        self.filters = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, 2 * channels, kernel, padding=kernel // 2)) for _ in range(layers)
        )
        # The last layer has a skip path alone.
        self.outputs = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels if i == layers - 1 else 2 * channels, 1)) for i in range(layers)
        )

    def forward(self, x: Tensor, mask: Tensor, context: Tensor) -> Tensor:
        """Sequence (B, C, T), mask (B, 1, T) and condition (B, C', T) to (B, C, T), zero where masked."""
        skipped = torch.zeros_like(x)
        shifts = self.context(context).chunk(len(self.filters), dim=1)
        for convolution, output, shift in zip(self.filters, self.outputs, shifts, strict=True):
            signal, gate = (convolution(x) + shift).chunk(2, dim=1)
            *residual, skip = output(signal.tanh() * gate.sigmoid()).split(self.channels, dim=1)
            skipped = skipped + skip
            if residual:
                x = (x + residual[0]) * mask
        return skipped * mask


class Flow(nn.Module):
    """Additive couplings with channel flips between: volume stays the same, so no determinant is needed.

    Args:
        channels: of the latent code, even.
        hidden: width of the WaveNets.
        kernel: of the WaveNets.
        layers: of each WaveNet.
        couplings: how many.
        context_dim: width of the condition.
    """

    def __init__(self, channels: int, hidden: int, kernel: int, layers: int, couplings: int, context_dim: int) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(
            Coupling(channels // 2, hidden, kernel, layers, context_dim) for _ in range(couplings)
        )

    def forward(self, x: Tensor, mask: Tensor, context: Tensor) -> Tensor:
        """A latent code (B, C, T) to where the prior is normal."""
        for coupling in self.couplings:
            kept, moved = x.chunk(2, dim=1)
            x = torch.cat([kept, coupling(kept, mask, context) + moved * mask], dim=1).flip(1)
        return x

    def reverse(self, x: Tensor, context: Tensor) -> Tensor:
        """The inverse of :meth:`forward` where nothing is masked."""
        mask = torch.ones_like(x[:, :1])
        for coupling in reversed(self.couplings):
            kept, moved = x.flip(1).chunk(2, dim=1)
            x = torch.cat([kept, moved - coupling(kept, mask, context)], dim=1)
        return x


class Coupling(nn.Module):
    """How one half of a latent code shifts the other; not at all before training."""

    def __init__(self, channels: int, hidden: int, kernel: int, layers: int, context_dim: int) -> None:
        super().__init__()
        self.enter = nn.Conv1d(channels, hidden, 1)
        self.wavenet = WaveNet(hidden, kernel, layers, context_dim)
        self.leave = nn.Conv1d(hidden, channels, 1)
        for parameter in self.leave.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, mask: Tensor, context: Tensor) -> Tensor:
        """One half (B, C / 2, T), mask (B, 1, T) and condition to the shift of the other."""
        return self.leave(self.wavenet(self.enter(x) * mask, mask, context)) * mask


class Pooling(nn.Module):
    """Attention of the mean latent over all latents of a clip; padding takes part, as in the official code."""

    def __init__(self, latent: int, hidden: int) -> None:
        super().__init__()
        self.query = nn.Linear(latent, latent)
        self.key = nn.Linear(latent, latent)
        self.value = nn.Linear(latent, hidden)

    def forward(self, code: Tensor) -> Tensor:
        """(B, latent, T) to (B, hidden, T), the same at all times."""
        code = code.mT
        scores = self.query(code.mean(1, keepdim=True)) @ self.key(code).mT
        return (scores.softmax(-1) @ self.value(code)).mT.expand(-1, -1, code.shape[1])


class ConvBlock(nn.Module):
    """Convolution, batch normalisation, perhaps a residual path, leaky ReLU.

    Args:
        inputs: channels in.
        outputs: channels out.
        kernel: of the convolution.
        stride: of it.
        padding: of it.
        residual: adds the input.
        slope: of the ReLU's negative side.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        padding: int = 1,
        residual: bool = False,
        slope: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride, padding)
        self.norm = nn.BatchNorm1d(outputs)
        self.residual = residual
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, C', T')."""
        out = self.norm(self.conv(x))
        return leaky_relu(out + x if self.residual else out, self.slope)


class SyncExpert(nn.Module):
    """Says whether five frames of a mouth and ten speech states belong together.

    Args:
        audio_dim: width of the speech states.
        widths: channels of the three levels.
        mouth_width: channels of the first mouth layer.
        mouth_dim: numbers of a mouth.
    """

    def __init__(self, audio_dim: int, widths: list[int], mouth_width: int, mouth_dim: int = 60) -> None:
        super().__init__()
        self.ears = _tower(audio_dim, widths[0], widths, last_stride=2)
        self.eyes = _tower(mouth_dim, mouth_width, widths, last_stride=1)

    def embed(self, states: Tensor, mouth: Tensor) -> tuple[Tensor, Tensor]:
        """Windows (N, 10, D) of sound and (N, 5, 60) of mouth: two of (N, E), unit length, no number below zero."""
        return normalize(self.ears(states.mT).flatten(1)), normalize(self.eyes(mouth.mT).flatten(1))

    def forward(self, states: Tensor, mouth: Tensor) -> Tensor:
        """Cosine similarity of windows as in :meth:`embed`: (N,) in [0, 1]."""
        return cosine_similarity(*self.embed(states, mouth)).clamp(max=1.0)


def _tower(inputs: int, first: int, widths: list[int], last_stride: int) -> nn.Sequential:
    low, middle, high = widths
    return nn.Sequential(
        ConvBlock(inputs, first),
        ConvBlock(first, low),
        ConvBlock(low, low, residual=True),
        ConvBlock(low, low, residual=True),
        ConvBlock(low, middle, stride=2),
        ConvBlock(middle, middle, residual=True),
        ConvBlock(middle, middle, residual=True),
        ConvBlock(middle, high, stride=last_stride),
        ConvBlock(high, high, residual=True),
        ConvBlock(high, high, residual=True),
        ConvBlock(high, high),
        ConvBlock(high, high, padding=0),
        ConvBlock(high, high, kernel=1, padding=0),
    )


class PostNet(nn.Module):
    """Refines landmark sequences; the identity before it is adapted.

    Args:
        motion_dim: numbers of a frame.
        widths: channels of the two levels.
    """

    def __init__(self, motion_dim: int, widths: list[int]) -> None:
        super().__init__()
        low, high = widths
        self.block1 = nn.Sequential(
            ConvBlock(motion_dim, low, slope=0.2),
            ConvBlock(low, low, residual=True, slope=0.2),
            ConvBlock(low, low, residual=True, slope=0.2),
        )
        self.block2 = nn.Sequential(
            ConvBlock(low, high, slope=0.2),
            ConvBlock(high, high, residual=True, slope=0.2),
            ConvBlock(high, high, residual=True, slope=0.2),
        )
        last = nn.Conv1d(low, motion_dim, 1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.block3 = nn.Sequential(ConvBlock(high, low, slope=0.2), last)

    def forward(self, motion: Tensor, mask: Tensor) -> Tensor:
        """Motion (B, T, M) and its mask (B, T) to (B, T, M)."""
        frames = mask[:, None].to(motion)
        change = motion.mT
        for block in (self.block1, self.block2, self.block3):
            change = block(change) * frames
        return motion + change.mT


def discriminator(motion_dim: int, widths: list[int]) -> nn.Sequential:
    """Says of single frames (N, M) whether they are the person's: (N, 1), 1 for true and 0 for made ones."""
    low, high = widths
    layers: list[nn.Module] = []
    for inputs, outputs, slope in ((motion_dim, low, 0.2), (low, high, 0.25), (high, high, 0.25), (high, low, 0.25)):
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(slope), nn.Dropout(0.25)]
    return nn.Sequential(*layers, nn.Linear(low, 1, bias=False))


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, T, C) over its C channels and the steps of (B, T) that are 1."""
    return (values * mask[..., None]).sum() / (mask.sum() * values.shape[-1])


def continuity_loss(made: Tensor, true: Tensor, mask: Tensor) -> Tensor:
    """Squared error of velocities and of the first frame, divided by all frames: motion (B, T, C), mask (B, T)."""
    error = made - true
    change = torch.cat([error[:, :1], error.diff(dim=1)], dim=1)
    return mean_over(change.square(), mask)


def lle_projection(points: Tensor, base: Tensor, neighbours: int) -> tuple[Tensor, Tensor, Tensor]:
    """Locally linear embedding: each point as the best affine combination of its nearest base points.

    Args:
        points: (N, C).
        base: (M, C).
        neighbours: how many base points are combined, at most M.

    Returns:
        The projected points (N, C), weights (N, K) that sum to 1, and indices (N, K) of the base points.
    """
    index = torch.cdist(points, base).topk(neighbours, dim=1, largest=False).indices
    nearest, *others = base[index].unbind(1)
    if not others:
        return nearest, torch.ones_like(nearest[:, :1]), index
    directions = torch.stack(others, dim=-1) - nearest[..., None]
    weights = (torch.linalg.pinv(directions) @ (points - nearest)[..., None])[..., 0]
    weights = torch.cat([1 - weights.sum(1, keepdim=True), weights], dim=1)
    return (weights[:, None] @ base[index])[:, 0], weights, index


def find_landmarks(landmarks: Literal["demo", "all"] | list[int], num_vertices: int) -> Tensor:
    """The 68 vertices that are landmarks, (68,) int64; see :class:`GeneFace`.

    Raises:
        UserError: another number of them, or vertices that the mesh does not have.
    """
    if landmarks == "demo":
        found = np.asarray(Head.load().landmarks)
    else:
        found = np.arange(num_vertices) if landmarks == "all" else np.asarray(landmarks)
    if found.shape != (LANDMARKS,) or found.min() < 0 or found.max() >= num_vertices:
        raise UserError(
            f"model.landmarks: {len(found)} vertices of 0 to {found.max(initial=0)}, expected {LANDMARKS} below "
            f"{num_vertices}; list the landmarks of this mesh"
        )
    return torch.from_numpy(found.astype(np.int64))


@torch.no_grad()
def fit_vertices(loader: Loader, landmarks: Tensor, every: int = 5) -> Tensor:
    """Ridge regression from the offsets of landmarks to those of all vertices, without a constant: neutral is neutral.

    Args:
        loader: of training clips.
        landmarks: (L,) vertex indices.
        every: takes one frame of so many.

    Returns:
        (3L, 3V): landmark offsets times it are vertex offsets.
    """
    square: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    for batch in loader:
        frames = (batch.vertices - batch.template[:, None])[:, ::every][batch.frame_mask[:, ::every]]
        known = frames[:, landmarks].flatten(1)
        square = square + known.T @ known
        cross = cross + known.T @ frames.flatten(1)
    square = torch.as_tensor(square)
    damping = RIDGE * square.diagonal().mean() * torch.eye(len(square))
    return torch.linalg.solve(square + damping, torch.as_tensor(cross))


OFFICIAL_NAMES = {
    "mel_encoder.0.": "listen.",
    "mel_encoder.1.": "norm.",
    "mel_encoder.3.": "understand.",
    "vae.g_pre_net.0.": "pool.",
    "vae.encoder.": "encoder.",
    "vae.decoder.": "decoder.",
    "vae.prior_flow.flows.0.": "flow.couplings.0.",
    "vae.prior_flow.flows.2.": "flow.couplings.1.",
    "vae.prior_flow.flows.4.": "flow.couplings.2.",
    "vae.prior_flow.flows.6.": "flow.couplings.3.",
    "vae.query_proj.": "pooling.query.",
    "vae.key_proj.": "pooling.key.",
    "vae.value_proj.": "pooling.value.",
    "pre_net.0.": "resample.",
    ".wn.": ".wavenet.",
    ".enc.": ".wavenet.",
    ".pre.": ".enter.",
    ".post.": ".leave.",
    "in_layers.": "filters.",
    "res_skip_layers.": "outputs.",
    "cond_layer.": "context.",
    "out_proj.": "projection.",
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
    "hubert_encoder.": "ears.",
    "mouth_encoder.": "eyes.",
    "conv_block.0.": "conv.",
    "conv_block.1.": "norm.",
    "backbone.": "",
}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the ``model`` of an official checkpoint (VAE, synchrony expert or post-net) to the network's here.

    Every part of a name is replaced as :data:`OFFICIAL_NAMES` says; ``vae.prior_flow.flows.2`` is the second coupling.

    Use: ``system.vae.load_state_dict(from_official(...))``, likewise ``system.expert`` and ``system.postnet``.
    """
    return {official_name(key): value for key, value in state.items()}


def official_name(key: str) -> str:
    """What the official weight ``key`` is called here; see :func:`from_official`."""
    for old, new in OFFICIAL_NAMES.items():
        key = key.replace(old, new)
    return key
