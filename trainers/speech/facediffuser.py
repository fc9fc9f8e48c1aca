"""FaceDiffuser: speech-driven 3D facial animation by diffusion (Stan et al., MIG 2023, arXiv 2309.11306).

The claim: speech does not determine the face, so a denoising diffusion model that draws the motion gives animations
that are as accurate as, and more varied than, those of deterministic systems, for vertices and for rig controls.

What stands here follows the official code (uuembodiedsocialai/FaceDiffuser, commit e15f350). A GRU sees, frame by
frame, the speech, the noised motion and the number of the noising step, and predicts the clean motion; the loss is
Huber's.
The cosine schedule and the posterior's own variance are those of diffusers. :class:`FaceDiffuser` is the vertex model
and, with ``emotions``, the variant that comes with ProbTalk3D's code (commit 277ebf3): one code of speaker, emotion and
intensity multiplies the speech instead of the GRU's output. :class:`FaceDiffuserRig` is the model of rig controls: for
BEAT, and with ``variant="uudamm"`` for UUDaMM. The encoder's convolutions, projection and first two layers are frozen
(``train_encoder="upper"``).

Deliberate differences, none of which changes what an evaluated network gives:

- Sampling of vertices does not carry vertices along. The network sees the noised mesh through one linear layer, so only
  the mesh's part in that layer's row space matters, and that part is itself a diffusion with independent noise: it is
  drawn in an orthonormal basis of the row space, and vertices are made once, by the last step. The distribution is the
  same; the cost of a step no longer grows with the mesh.
- Besides ancestral sampling (``sampler: ddpm``) there is the deterministic ``ddim`` (Song et al. 2021), and either can
  take fewer steps than the training. diffusers' DDIM step with eta 1 is the official ancestral step.
- Batches of several clips, one noising step for each; the loss is the mean over their real frames.
- At 25 fps audio can end a frame before the mesh does. As in the official code such frames have no loss; animation
  holds the last frame for them. Officially animations end with the audio, or a frame before.
- No SpecAugment on the speech features.
- Motion is diffused in ``unit``: officially in the data's own, so that on VOCASET the noise's deviation is a metre.
- UUDaMM's controls are scaled by the data set, not here.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from torch.nn.functional import huber_loss, max_pool1d, one_hot
from torch.nn.utils.rnn import pad_sequence

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from metrics.motion import lip_vertex_error
from metrics.samples import coverage_error, sample_diversity
from trainers.measuring import split_clips
from trainers.nets import speech_encoder
from trainers.nets.motion_codes import hold_last
from trainers.nets.speech_encoder import STATES_PER_FRAME, TrainedPart
from trainers.tasks import INTENSITIES, Condition, SpeechToMesh, SpeechToRig, SystemInfo

PairAlignment = Literal["pair_states", "resample_pairs"]
Sampler = Literal["ddpm", "ddim"]
# Share of the posterior's deviation that a step adds as noise.
ETA: dict[str, float] = {"ddpm": 1.0, "ddim": 0.0}
MEASURED_DRAWS = 10


class MotionDiffusion(SpeechToMesh):
    """What the variants share: training on noised motions, and sampling.

    Attributes:
        lr: learning rate of Adam.
        scheduler: the noise of every step, and the steps that sampling takes.
        sampler: ``ddpm`` or ``ddim``.
    """

    lr: float
    sampler: Sampler

    def plan_diffusion(self, steps: int, sample_steps: int | None, sampler: Sampler) -> None:
        """Makes the schedule.

        Raises:
            UserError: sampling steps that are no equal parts of the training's, or another sampler.
        """
        if sampler not in ETA:
            raise UserError(f"model.sampler: '{sampler}', expected one of {', '.join(ETA)}")
        sample_steps = sample_steps or steps
        if steps < 1 or sample_steps < 1 or steps % sample_steps:
            raise UserError(
                f"model.sample_steps: {sample_steps}, expected a number that divides diffusion_steps ({steps})"
            )
        self.diffusion_steps = steps
        self.sampler = sampler
        self.scheduler = schedule(steps, sample_steps)

    @abstractmethod
    def motion(self, batch: SpeechBatch) -> Tensor:
        """What is diffused, (B, T, D)."""

    @abstractmethod
    def denoise(self, noised: Tensor, step: Tensor, speech: Tensor, batch: SpeechBatch) -> Tensor:
        """The clean motion (B, T, D) that the network sees in a noised one.

        Args:
            noised: (B, T, D).
            step: (B,) int64, how noised it is.
            speech: (B, T, 2·A) states of :meth:`hear`.
            batch: the clips.
        """

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """The Huber loss at one noising step for each clip."""
        speech, frames = self.hear(batch)
        motion = self.motion(batch)[:, : speech.shape[1]]
        step = torch.randint(self.diffusion_steps, (len(batch),), device=motion.device)
        loss = self.loss(speech, frames, batch, step, torch.randn_like(motion))
        self.log("train/loss", loss, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on all that is trained."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def hear(self, batch: SpeechBatch) -> tuple[Tensor, Tensor]:
        """Speech states of each frame side by side (B, T, 2·A), and how many frames have them, (B,) int64."""
        states, lengths = self.encode(batch)
        per_frame = STATES_PER_FRAME[self.alignment]
        return states.unflatten(1, (-1, per_frame)).flatten(2), lengths // per_frame

    def loss(self, speech: Tensor, frames: Tensor, batch: SpeechBatch, step: Tensor, noise: Tensor) -> Tensor:
        """The Huber loss (delta 1) between clean and predicted motion, over frames that are real and have speech.

        Args:
            speech: (B, T, 2·A) states of :meth:`hear`.
            frames: (B,) int64, frames that have them.
            batch: the clips.
            step: (B,) int64, how much noise is added.
            noise: (B, T, D), standard normal.
        """
        count = speech.shape[1]
        motion = self.motion(batch)[:, :count]
        noised = self.scheduler.add_noise(motion, noise[:, :count], step)  # type: ignore[arg-type]
        predicted = self.denoise(noised, step, speech, batch)
        real = (torch.arange(count, device=frames.device) < frames[:, None])[..., None]
        # Where padded, the difference is zero: cheaper than to pick the real frames.
        total = huber_loss(predicted.where(real, motion), motion, reduction="sum")
        return total / (frames.sum() * motion.shape[-1])

    def run_back(
        self,
        clean: Callable[[Tensor, Tensor], Tensor],
        width: int,
        frames: Tensor,
        generators: list[torch.Generator],
        sampler: Sampler,
    ) -> tuple[Tensor, Tensor]:
        """From noise to the last step, whose prediction is the sample: no noise is left after it.

        Args:
            clean: what the network makes of a noised motion (B, T, D) at a step (B,).
            width: D.
            frames: (B,) int64, frames of each clip; T is their maximum.
            generators: of each clip's noise.
            sampler: ``ddpm`` or ``ddim``.

        Returns:
            the motion (B, T, D) before the last step, and that step (B,).
        """
        *earlier, last = self.scheduler.timesteps.tolist()
        x = gaussian(generators, frames, width)
        for step in earlier:
            predicted = clean(x, torch.full_like(frames, step))
            noise = gaussian(generators, frames, width) if ETA[sampler] else None
            x = self.scheduler.step(predicted, step, x, ETA[sampler], variance_noise=noise, return_dict=False)[0]
        return x, torch.full_like(frames, last)


class FaceDiffuser(MotionDiffusion):
    """The vertex model as a trainable system.

    Args:
        num_vertices: V of the mesh.
        subjects: training subjects in the order of their one-hot codes.
        encoder: backbone specification of the speech encoder.
        alignment: ``pair_states`` (25 fps) or ``resample_pairs`` (any frame rate).
        emotions: names of the data's emotions, for the variant that is conditioned on emotion and intensity.
        latent_dim: width of the projected speech, motion and step; 512 for BIWI, 256 for other data.
        gru_dim: width of the GRU; officially the same.
        layers: of the GRU.
        dropout: between them, while training.
        diffusion_steps: of the training; 500 for BIWI, 1000 for other data.
        sample_steps: of sampling, a divisor of ``diffusion_steps``; all of them where it is not given.
        sampler: ``ddpm`` or ``ddim``.
        samples: predictions to draw for each clip.
        train_encoder: which part of the encoder is trained: ``none``, or all but its first layers (``upper``).
        offsets: diffuses offsets from the template; officially vertices, the template's coordinates with them.
        unit: metres; motion is diffused and the loss measured in it, 0.001 for millimetres.
        lr: learning rate of Adam.
        unseen: whose style stands in for a speaker never seen, see :class:`trainers.tasks.SpeechToMesh`.
    """

    info = SystemInfo(
        name="facediffuser",
        title="FaceDiffuser",
        task="speech-to-mesh",
        paper="Stan et al., FaceDiffuser: Speech-Driven 3D Facial Animation Synthesis Using Diffusion, MIG",
        year=2023,
        url="https://arxiv.org/abs/2309.11306",
        basis="official code",
    )

    def __init__(
        self,
        num_vertices: int,
        subjects: list[str],
        encoder: str,
        alignment: PairAlignment = "pair_states",
        emotions: list[str] | None = None,
        latent_dim: int = 512,
        gru_dim: int = 512,
        layers: int = 2,
        dropout: float = 0.3,
        diffusion_steps: int = 500,
        sample_steps: int | None = None,
        sampler: Sampler = "ddpm",
        samples: int = 1,
        train_encoder: TrainedPart = "upper",
        offsets: bool = False,
        unit: float = 1.0,
        lr: float = 1e-4,
        unseen: str = "fixed:0",
    ) -> None:
        super().__init__(num_vertices, subjects, encoder, alignment, train_encoder, unseen, emotions, samples)
        self.save_hyperparameters()
        self.plan_diffusion(diffusion_steps, sample_steps, sampler)
        self.offsets = offsets
        self.unit = unit
        self.lr = lr
        self.encoder.classifier = None
        if emotions:
            self.conditions: tuple[Condition, ...] = ("subject", "emotion", "intensity")  # type: ignore[misc]
        self.denoiser = MeshDenoiser(
            num_vertices,
            num_codes=len(subjects) + (len(emotions) + INTENSITIES if emotions else 0),
            audio_dim=self.encoder.dim * STATES_PER_FRAME[alignment],
            steps=diffusion_steps,
            latent_dim=latent_dim,
            gru_dim=gru_dim,
            layers=layers,
            dropout=dropout,
            code_on_speech=bool(emotions),
        )

    def motion(self, batch: SpeechBatch) -> Tensor:
        """Coordinates in :attr:`unit`: (B, T, V·3)."""
        vertices = batch.vertices - batch.template[:, None] if self.offsets else batch.vertices
        return vertices.flatten(2) / self.unit

    def denoise(self, noised: Tensor, step: Tensor, speech: Tensor, batch: SpeechBatch) -> Tensor:
        """See :meth:`MotionDiffusion.denoise`."""
        return self.denoiser(noised, step, speech, self.code(batch), self.still(batch))

    @torch.no_grad()
    def animate(self, batch: SpeechBatch) -> Tensor:
        """One sample of each clip; see :meth:`SpeechToMesh.animate`."""
        return self.drawn(*self.hear(batch), batch, self.generators(batch), self.sampler)

    def drawn(
        self, speech: Tensor, frames: Tensor, batch: SpeechBatch, generators: list[torch.Generator], sampler: Sampler
    ) -> Tensor:
        """Samples vertices in the row space of the network's first layer.

        Args:
            speech: (B, T, 2·A) states of :meth:`hear`.
            frames: (B,) int64, frames that have them.
            batch: the clips: B, or a single one for all.
            generators: of each sample's noise, length B.
            sampler: ``ddpm`` or ``ddim``.

        Returns:
            (B, T, V, 3) metres.
        """
        network, code = self.denoiser, self.code(batch)
        rows, mix = torch.linalg.qr(network.input_projection.weight.mT)
        feedback = network.vertex_decoder.weight.mT @ rows
        rest = (network.vertex_decoder.bias + self.still(batch)) @ rows

        def hidden(seen: Tensor, step: Tensor) -> Tensor:
            return network.hidden(seen @ mix + network.input_projection.bias, step, speech, code)

        def clean(seen: Tensor, step: Tensor) -> Tensor:
            return hidden(seen, step) @ feedback + rest

        last = hidden(*self.run_back(clean, rows.shape[1], frames, generators, sampler))
        held = hold_last(last, frames, batch.vertices.shape[1])
        offsets = self.unit * network.vertex_decoder(held)
        return batch.template[:, None] + offsets.unflatten(-1, (self.num_vertices, 3))

    @torch.no_grad()
    def measurements(self, data: SpeechDataModule) -> dict[str, dict[str, float]]:
        """Diversity and accuracy of 10 samples of every test clip by both samplers, mm, data in metres.

        Returns:
            for ``ddpm`` and ``ddim``: ``<sampler>_diversity``, the mean distance of a vertex between two samples;
            ``<sampler>_lve`` and ``<sampler>_ce``, the lip-vertex error (L2, maximum) of the first and the best sample.
        """
        lips = data.region("lips")
        series: dict[str, dict[str, float]] = {
            f"{sampler}_{name}": {} for sampler in ETA for name in ("diversity", "lve", "ce")
        }
        for clip in split_clips(data):
            key = clip.key[0]
            speech, frames = self.hear(clip)
            speech, frames = speech.expand(MEASURED_DRAWS, -1, -1), frames.expand(MEASURED_DRAWS)
            samplers: tuple[Sampler, ...] = ("ddpm", "ddim")
            for sampler in samplers:
                generators: list[torch.Generator] = []
                for self.draw in range(MEASURED_DRAWS):
                    generators += self.generators(clip)
                self.draw = 0
                samples = self.drawn(speech, frames, clip, generators, sampler)
                errors = {
                    "diversity": sample_diversity(samples, "halves"),
                    "lve": lip_vertex_error(samples[0], clip.vertices[0], lips, "l2").mean(),
                    "ce": coverage_error(samples, clip.vertices[0], lips, "l2").mean(),
                }
                for name, error in errors.items():
                    series[f"{sampler}_{name}"][key] = 1e3 * error.item()
        return series

    def code(self, batch: SpeechBatch) -> Tensor:
        """One-hot codes of speaker and, in that variant, emotion and intensity side by side: (B, codes)."""
        if not self.emotions:
            return self.style(batch)
        return torch.cat([self.style(batch), self.emotion(batch), self.intensity(batch)], dim=-1)

    def still(self, batch: SpeechBatch) -> Tensor:
        """The :meth:`motion` of a face that does not move, (B, 1, V·3)."""
        template = batch.template.flatten(1)[:, None] / self.unit
        return torch.zeros_like(template) if self.offsets else template


class FaceDiffuserRig(MotionDiffusion, SpeechToRig):
    """The model of rig controls as a trainable system. It knows no speakers.

    Args:
        rig: the controls, see :func:`trainers.nets.rig.load_rig`.
        num_vertices: V of the mesh; 0 on data without meshes.
        subjects: training subjects of the data.
        encoder: backbone specification of the speech encoder.
        variant: ``beat``, or ``uudamm``: another code of the noising step, and no normalisation before the GRU.
        alignment: ``pair_states`` (25 fps) or ``resample_pairs`` (any frame rate).
        latent_dim: width of the code of the noising step.
        gru_dim: width of the GRU; officially the same.
        layers: of the GRU; 2 for BEAT, 4 for UUDaMM.
        dropout: between them, while training.
        diffusion_steps: of the training.
        sample_steps: of sampling, a divisor of ``diffusion_steps``; all of them where it is not given.
        sampler: ``ddpm`` or ``ddim``.
        samples: predictions to draw for each clip.
        train_encoder: which part of the encoder is trained: ``none``, or all but its first layers (``upper``).
        unit: of a control; controls are diffused and the loss measured in it.
        lr: learning rate of Adam.
    """

    info = SystemInfo(
        name="facediffuser-rig",
        title="FaceDiffuser (rig)",
        task="speech-to-mesh",
        paper="Stan et al., FaceDiffuser: Speech-Driven 3D Facial Animation Synthesis Using Diffusion, MIG",
        year=2023,
        url="https://arxiv.org/abs/2309.11306",
        basis="official code",
    )
    conditions: ClassVar[tuple[Condition, ...]] = ()

    def __init__(
        self,
        rig: str,
        num_vertices: int,
        subjects: list[str],
        encoder: str,
        variant: Literal["beat", "uudamm"] = "beat",
        alignment: PairAlignment = "resample_pairs",
        latent_dim: int = 256,
        gru_dim: int = 256,
        layers: int = 2,
        dropout: float = 0.3,
        diffusion_steps: int = 1000,
        sample_steps: int | None = None,
        sampler: Sampler = "ddpm",
        samples: int = 1,
        train_encoder: TrainedPart = "upper",
        unit: float = 1.0,
        lr: float = 1e-4,
    ) -> None:
        super().__init__(
            rig,
            num_vertices,
            subjects,
            encoder=encoder,
            alignment=alignment,
            train_encoder=train_encoder,
            samples=samples,
        )
        self.save_hyperparameters()
        self.plan_diffusion(diffusion_steps, sample_steps, sampler)
        self.unit = unit
        self.lr = lr
        self.encoder.classifier = None
        self.denoiser = RigDenoiser(
            len(self.rig.controls),
            audio_dim=self.encoder.dim * STATES_PER_FRAME[alignment],
            steps=diffusion_steps,
            latent_dim=latent_dim,
            gru_dim=gru_dim,
            layers=layers,
            dropout=dropout,
            variant=variant,
        )

    def motion(self, batch: SpeechBatch) -> Tensor:
        """The controls in :attr:`unit`."""
        return batch.weights / self.unit

    def denoise(self, noised: Tensor, step: Tensor, speech: Tensor, batch: SpeechBatch) -> Tensor:
        """See :meth:`MotionDiffusion.denoise`."""
        return self.denoiser(noised, step, speech)

    @torch.no_grad()
    def control(self, batch: SpeechBatch) -> Tensor:
        """One sample of each clip, not clipped; see :meth:`SpeechToRig.control`."""
        speech, frames = self.hear(batch)

        def clean(noised: Tensor, step: Tensor) -> Tensor:
            return self.denoiser(noised, step, speech)

        width = len(self.rig.controls)
        controls = clean(*self.run_back(clean, width, frames, self.generators(batch), self.sampler))
        return self.unit * hold_last(controls, frames, batch.vertices.shape[1])


class MeshDenoiser(nn.Module):
    """A noised mesh, its noising step, speech and a code in; the clean mesh out.

    Args:
        num_vertices: V of the mesh.
        num_codes: length of the code of speaker (and emotion and intensity).
        audio_dim: width of a frame's speech states.
        steps: noising steps.
        latent_dim: width of the projected speech, motion and step.
        gru_dim: of the GRU.
        layers: of the GRU.
        dropout: between them, while training.
        code_on_speech: the code multiplies the projected speech instead of the output of the GRU.
    """

    def __init__(
        self,
        num_vertices: int,
        num_codes: int,
        audio_dim: int,
        steps: int,
        latent_dim: int,
        gru_dim: int,
        layers: int = 2,
        dropout: float = 0.3,
        code_on_speech: bool = False,
    ) -> None:
        super().__init__()
        self.code_on_speech = code_on_speech
        self.speech_projection = nn.Linear(audio_dim, latent_dim)
        self.input_projection = nn.Linear(num_vertices * 3, 2 * latent_dim)
        self.smoothing = nn.Conv1d(1, 1, kernel_size=9, padding="same")
        self.time = nn.Sequential(OneHot(steps), nn.Linear(steps, latent_dim), nn.Mish())
        self.norm = nn.LayerNorm(3 * latent_dim)
        self.gru = nn.GRU(3 * latent_dim, gru_dim, layers, batch_first=True, dropout=dropout)
        self.code = nn.Linear(num_codes, latent_dim if code_on_speech else gru_dim, bias=False)
        self.vertex_decoder = nn.Linear(gru_dim, num_vertices * 3)
        nn.init.zeros_(self.vertex_decoder.weight)
        nn.init.zeros_(self.vertex_decoder.bias)

    def forward(self, noised: Tensor, step: Tensor, speech: Tensor, code: Tensor, still: Tensor) -> Tensor:
        """The clean mesh.

        Args:
            noised: (B, T, V·3).
            step: (B,) int64.
            speech: (B, T, audio_dim).
            code: (B, num_codes).
            still: (B, 1, V·3), the face that does not move.

        Returns:
            (B, T, V·3).
        """
        return self.vertex_decoder(self.hidden(self.input_projection(noised), step, speech, code)) + still

    def hidden(self, projected: Tensor, step: Tensor, speech: Tensor, code: Tensor) -> Tensor:
        """What the last layer decodes, (B, T, gru_dim); ``projected`` is (B, T, 2·latent_dim), the first layer's."""
        factor = self.code(code)[:, None]
        heard = self.speech_projection(speech)
        # The convolution runs over the projection's channels, not over time.
        smoothed = self.smoothing(projected.flatten(0, 1)[:, None])[:, 0].relu()
        seen = max_pool1d(smoothed, kernel_size=2).unflatten(0, projected.shape[:2])
        when = self.time(step)[:, None].expand_as(seen)
        if self.code_on_speech:
            heard = heard * factor
        hidden, _ = self.gru(self.norm(torch.cat([heard, seen, when], dim=-1)))
        return hidden if self.code_on_speech else hidden * factor


class RigDenoiser(nn.Module):
    """Noised controls, their noising step and speech in; clean controls out.

    Args:
        num_controls: C of the rig.
        audio_dim: width of a frame's speech states.
        steps: noising steps.
        latent_dim: width of the code of a step.
        gru_dim: of the GRU.
        layers: of the GRU.
        dropout: between them, while training.
        variant: ``beat`` or ``uudamm``.
    """

    def __init__(
        self,
        num_controls: int,
        audio_dim: int,
        steps: int,
        latent_dim: int = 256,
        gru_dim: int = 256,
        layers: int = 2,
        dropout: float = 0.3,
        variant: Literal["beat", "uudamm"] = "beat",
    ) -> None:
        super().__init__()
        self.variant = variant
        width = audio_dim + num_controls + latent_dim
        self.control_decoder = nn.Linear(gru_dim, num_controls)
        self.norm: nn.Module
        if variant == "beat":
            self.time = nn.Sequential(OneHot(steps), nn.Linear(steps, latent_dim), nn.Mish())
            self.norm = nn.LayerNorm(width)
        else:
            inner, outer = nn.Linear(latent_dim, latent_dim), nn.Linear(latent_dim, latent_dim)
            self.time = nn.Sequential(Sinusoid(latent_dim), inner, nn.SiLU(), outer)
            self.norm = nn.Identity()
            nn.init.normal_(self.control_decoder.weight)
            nn.init.normal_(self.control_decoder.bias)
        self.gru = nn.GRU(width, gru_dim, layers, batch_first=True, dropout=dropout)

    def forward(self, noised: Tensor, step: Tensor, speech: Tensor) -> Tensor:
        """The clean controls.

        Args:
            noised: (B, T, C).
            step: (B,) int64.
            speech: (B, T, audio_dim).

        Returns:
            (B, T, C).
        """
        when = self.time(step)[:, None].expand(-1, noised.shape[1], -1)
        tokens = [speech, noised, when] if self.variant == "beat" else [speech, when, noised]
        hidden, _ = self.gru(self.norm(torch.cat(tokens, dim=-1)))
        return self.control_decoder(hidden)


class OneHot(nn.Module):
    """(B,) int64 -> (B, classes) float32."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, index: Tensor) -> Tensor:
        """See the class."""
        return one_hot(index, self.classes).float()


class Sinusoid(nn.Module):
    """(B,) int64 -> (B, dim) float32: sines and cosines in turn, as in the transformer of Vaswani et al. 2017."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, index: Tensor) -> Tensor:
        """See the class."""
        halves = get_timestep_embedding(index, self.dim, downscale_freq_shift=0)
        return halves.unflatten(-1, (2, -1)).mT.flatten(1)


def schedule(steps: int, sample_steps: int) -> DDIMScheduler:
    """The cosine schedule of ``steps`` noising steps; the network predicts the clean motion, which is not clipped.

    Sampling takes ``sample_steps`` of them, evenly from the last one on.
    """
    scheduler = DDIMScheduler(
        num_train_timesteps=steps,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    # In single precision the variance left at the first of few steps rounds to less than nothing.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(sample_steps)
    return scheduler


def gaussian(generators: list[torch.Generator], frames: Tensor, width: int) -> Tensor:
    """Standard normal noise (B, T, width), each clip's from its generator, zero where padded."""
    drawn = [torch.randn(n, width, generator=g) for n, g in zip(frames.tolist(), generators, strict=True)]
    return pad_sequence(drawn, batch_first=True).to(frames.device)


OFFICIAL_NAMES = {
    "cond_projection": "speech_projection",
    "input_projection.0": "input_projection",
    "input_projection.1": "smoothing",
    "time_mlp.0": "time.1",
    "norm_cond": "norm",
    "gru": "gru",
    "obj_vector": "code",
    "embed_timestep.time_embed.0": "time.1",
    "embed_timestep.time_embed.2": "time.3",
    "rnn": "gru",
}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the state dict of an official checkpoint, of any variant, to this file's systems'.

    =================================  =====================================================================
    official                           here
    =================================  =====================================================================
    ``audio_encoder.*``                ``encoder.*``, see :func:`trainers.nets.speech_encoder.from_official`
    ``cond_projection.*``              ``denoiser.speech_projection.*``
    ``input_projection.0.*``           ``denoiser.input_projection.*``
    ``input_projection.1.*``           ``denoiser.smoothing.*``
    ``time_mlp.0.*``                   ``denoiser.time.1.*``
    ``embed_timestep.time_embed.0.*``  ``denoiser.time.1.*`` (UUDaMM)
    ``embed_timestep.time_embed.2.*``  ``denoiser.time.3.*`` (UUDaMM)
    ``norm_cond.*``                    ``denoiser.norm.*``
    ``gru.*``, ``rnn.*`` (UUDaMM)      ``denoiser.gru.*``
    ``obj_vector.weight``              ``denoiser.code.weight``
    ``final_layer.*``                  ``denoiser.vertex_decoder.*`` or, of rigs, ``denoiser.control_decoder.*``
    ``out.*`` (UUDaMM)                 ``denoiser.control_decoder.*``
    ``*.pe``                           left out: computed
    =================================  =====================================================================

    Use: ``FaceDiffuser(...).load_state_dict(from_official(torch.load(file, weights_only=True)))``.
    """
    last = "vertex_decoder" if "obj_vector.weight" in state else "control_decoder"
    return {official_name(key, last): value for key, value in state.items() if not key.endswith(".pe")}


def official_name(key: str, last: str) -> str:
    """What the official weight ``key`` is called here; ``last`` is our name of the last layer. See the table above."""
    if key.startswith("audio_encoder."):
        return "encoder." + speech_encoder.official_name(key.removeprefix("audio_encoder."))
    module, _, rest = key.rpartition(".")
    name = {**OFFICIAL_NAMES, "final_layer": last, "out": last}[module]
    return f"denoiser.{name}.{rest}"
