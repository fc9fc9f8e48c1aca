"""ProbTalk3D: non-deterministic emotion controllable speech-driven 3D facial animation synthesis using VQ-VAE.

Wu, Haque and Yumak, ACM SIGGRAPH MIG 2024, arXiv 2409.07966. The claim: a motion prior of discrete codes, from which a
predictor of speech, speaker, emotion and intensity draws at random, gives motions that are both diverse and accurate,
where earlier systems give one motion for a sentence.

What stands here follows the official code (uuembodiedsocialai/ProbTalk3D, commit c7d157a), re-implemented, in two
stages of one training:

1. a VQ-VAE of the motion alone: convolution and transformer, a codebook, and their mirror image;
2. with that frozen, a transformer from HuBERT states, multiplied by an embedded style, to the codes' space.

Prediction draws every code from softmax(-|feature - code|² / temperature); temperature 0 takes the nearest. A code
does not stand for a frame: the official quantiser cuts each clip's (channel, time) array into rows of consecutive
values, so a code mostly holds one channel over successive frames. So it is here.

``latent: vae`` is the paper's ablation: a Gaussian for every frame instead of codes. The published script then
multiplies the noise by 20, and here the temperature is that factor.

Deliberate differences:

- Motion is made in the controls of a rig, FLAME's expression and jaw in the paper. Where the controls have other names,
  those that start with ``jaw`` take the jaw's weight in the loss.
- Batches of several clips; losses are means over real frames. A clip's codes are cut from its own frames.
- Clips of any length (official: at most 5000 frames).
- The frozen prior has no dropout in the second stage. Both stages share one AdamW; the second one's weight decay is 0,
  which makes it the official Adam.
- Audio can end a frame before the motion does. Such frames have no loss; :meth:`ProbTalk3D.control` holds the last one.
- At 30 fps use ``alignment: resample_pairs``, which the official code does for rates that do not divide 50.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.nn.utils.rnn import pad_sequence

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from metrics.motion import lip_vertex_error
from metrics.samples import coverage_error, mean_estimate_error, sample_diversity
from trainers.measuring import split_clips
from trainers.nets import speech_encoder
from trainers.nets.motion_codes import SLOPE, MotionTransformer, Quantiser, hold_last, official_transformer_name
from trainers.nets.rig import Rig
from trainers.nets.speech_encoder import STATES_PER_FRAME, Alignment, TrainedPart
from trainers.stages import Staged
from trainers.tasks import INTENSITIES, SpeechToRig, SystemInfo

# Weights of the bottleneck's own loss, and of the L1 losses of expression and jaw.
PRIOR_WEIGHTS = {"vq": (1.5, 0.5, 0.1), "vae": (1e-4, 1.5, 1.0)}
# Weights of the L1 losses of latent, expression and jaw.
PREDICTOR_WEIGHTS = (1.0, 0.15, 0.1)
MEASURED_DRAWS = 10
MEASURED_TEMPERATURES = (0.1, 0.2, 0.5)


class ProbTalk3D(Staged, SpeechToRig):
    """ProbTalk3D as a trainable system.

    Args:
        rig: specification of the controls, see :func:`trainers.nets.rig.load_rig`.
        num_vertices: V of the mesh; 0 on data of controls alone.
        subjects: training subjects in the order of their one-hot codes.
        emotions: names of the emotions in the order of their one-hot codes.
        encoder: backbone specification of the speech encoder.
        alignment: one with two states per frame: ``pair_states`` (25 fps) or ``resample_pairs`` (any frame rate).
        latent: ``vq`` or, for the ablation, ``vae``.
        dim: width of all transformers.
        heads: attention heads.
        hidden: width of the feed-forward layers.
        prior_layers: of the motion encoder and of the motion decoder.
        predictor_layers: of the predictor.
        codes: size of the codebook.
        code_dim: width of a code, which divides ``dim``.
        beta: weight of the commitment loss against the codebook loss.
        dropout: on embedded frames, while training.
        temperature: of the draw; 0 takes the nearest code, or the mean with ``vae``.
        samples: predictions to draw for each clip.
        stage_epochs: epochs of the first stage; the second lasts to the end of the run.
        lr: learning rates of the two stages.
        train_encoder: which part of the speech encoder the second stage trains; officially ``upper``.
        unseen: the training subject whose style stands in for a speaker never seen, ``fixed:k``.
    """

    info = SystemInfo(
        name="probtalk3d",
        title="ProbTalk3D",
        task="speech-to-mesh",
        paper="Wu et al., ProbTalk3D: Non-Deterministic Emotion Controllable Speech-Driven 3D Facial Animation, MIG",
        year=2024,
        url="https://arxiv.org/abs/2409.07966",
        basis="official code",
    )
    conditions = ("subject", "emotion", "intensity")

    def __init__(
        self,
        rig: str,
        num_vertices: int,
        subjects: list[str],
        emotions: list[str],
        encoder: str,
        alignment: Alignment = "pair_states",
        latent: Literal["vq", "vae"] = "vq",
        dim: int = 256,
        heads: int = 8,
        hidden: int = 384,
        prior_layers: int = 6,
        predictor_layers: int = 12,
        codes: int = 256,
        code_dim: int = 128,
        beta: float = 0.25,
        dropout: float = 0.1,
        temperature: float = 0.2,
        samples: int = 1,
        stage_epochs: list[int] = [200],  # noqa: B006 - read only; jsonargparse needs a plain default
        lr: list[float] = [1e-4, 1e-5],  # noqa: B006
        train_encoder: TrainedPart = "upper",
        unseen: str = "fixed:0",
    ) -> None:
        super().__init__(
            rig,
            num_vertices,
            subjects,
            encoder=encoder,
            alignment=alignment,
            train_encoder=train_encoder,
            unseen=unseen,
            emotions=emotions,
            samples=samples,
        )
        self.save_hyperparameters()
        if STATES_PER_FRAME.get(alignment) != 2:
            raise UserError(f"model.alignment: '{alignment}', expected pair_states (25 fps) or resample_pairs")
        if latent == "vq" and dim % code_dim:
            raise UserError(f"model.code_dim: {code_dim}, expected a divisor of model.dim, which is {dim}")
        if len(lr) != 2:
            raise UserError(f"model.lr: {len(lr)} learning rates, expected 2, one for each stage")
        self.latent = latent
        self.temperature = temperature
        self.lr = lr
        self.encoder.classifier = None
        bottleneck = CodeBottleneck(codes, code_dim, beta) if latent == "vq" else GaussianBottleneck(dim)
        controls = self.rig.controls
        groups: dict[str, list[int]] = {"expression": [], "jaw": []}
        for number, name in enumerate(controls):
            groups["jaw" if name.startswith("jaw") else "expression"].append(number)
        self.control_groups = {name: numbers for name, numbers in groups.items() if numbers}
        self.prior = MotionPrior(len(controls), bottleneck, dim, prior_layers, heads, hidden, dropout)
        style_dim = len(subjects) + len(emotions) + INTENSITIES
        self.predictor = LatentPredictor(2 * self.encoder.dim, style_dim, dim, predictor_layers, heads, hidden, dropout)
        self.plan_stages(stage_epochs, [[self.prior], [self.predictor, self.encoder]])

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """The current stage's loss."""
        terms = self.prior_losses(batch.weights, batch.lengths) if self.stage == 0 else self.predictor_losses(batch)
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, batch_size=len(batch))
        self.log("train/loss", loss, batch_size=len(batch))
        return loss

    def enter_stage(self) -> None:
        """In the second stage the prior is frozen, dropout and all."""
        super().enter_stage()
        self.prior.train(self.stage == 0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the prior, Adam on the predictor and what is trained of the speech encoder."""
        prior, predictor = (self.stage_parameters(stage) for stage in (0, 1))
        return torch.optim.AdamW(
            [
                {"params": prior, "lr": self.lr[0], "betas": (0.9, 0.98), "eps": 1e-9},
                {"params": predictor, "lr": self.lr[1], "weight_decay": 0.0},
            ]
        )

    def prior_losses(self, motion: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """The weighted terms of the first stage: of quantisation (or KL divergence), expression and jaw.

        Args:
            motion: (B, T, C) controls.
            lengths: (B,) int64, frames.
        """
        features = self.prior.encoder(motion, lengths)
        latent, loss = self.prior.bottleneck(features, lengths)
        bottleneck, expression, jaw = PRIOR_WEIGHTS[self.latent]
        terms = self._motion_losses(self.prior.decoder(latent, lengths), motion, lengths, expression, jaw)
        return {"bottleneck": bottleneck * loss, **terms}

    def predictor_losses(self, batch: SpeechBatch) -> dict[str, Tensor]:
        """The weighted terms of the second stage: of latent, expression and jaw, over frames that have speech."""
        states, lengths = self.hear(batch)
        motion = batch.weights[:, : states.shape[1]]
        with torch.no_grad():
            true_latent, _ = self.prior.bottleneck(self.prior.encoder(motion, lengths), lengths)
        latent, _ = self.prior.bottleneck(self.predict(states, lengths, batch), lengths)
        manifold, expression, jaw = PREDICTOR_WEIGHTS
        terms = self._motion_losses(self.prior.decoder(latent, lengths), motion, lengths, expression, jaw)
        return {"latent": manifold * (latent - true_latent)[_real(latent, lengths)].abs().mean(), **terms}

    def _motion_losses(
        self, predicted: Tensor, motion: Tensor, lengths: Tensor, expression: float, jaw: float
    ) -> dict[str, Tensor]:
        error = (predicted - motion)[_real(motion, lengths)].abs()
        weights = {"expression": expression, "jaw": jaw}
        return {name: weights[name] * error[:, numbers].mean() for name, numbers in self.control_groups.items()}

    def hear(self, batch: SpeechBatch) -> tuple[Tensor, Tensor]:
        """Pairs of speech states (B, T, 2·D), and the number of frames of each clip that have them, (B,) int64."""
        states, lengths = self.encode(batch)
        return states.unflatten(1, (-1, 2)).flatten(2), lengths // 2

    def predict(self, states: Tensor, lengths: Tensor, batch: SpeechBatch) -> Tensor:
        """Features (B, T, dim) in the latent space, from the states of :meth:`hear`.

        Raises:
            UserError: a clip's emotion or intensity is not known.
        """
        style = torch.cat([self.style(batch), self.emotion(batch), self.intensity(batch)], dim=1)
        return self.predictor(states, style, lengths)

    @torch.no_grad()
    def control(self, batch: SpeechBatch) -> Tensor:
        """One draw; see :meth:`SpeechToRig.control`."""
        states, lengths = self.hear(batch)
        features = self.predict(states, lengths, batch)
        motion = self.draw_motion(features, lengths, self.temperature, self.generators(batch))
        return hold_last(motion, lengths, batch.vertices.shape[1])

    def draw_motion(
        self, features: Tensor, lengths: Tensor, temperature: float, generators: list[torch.Generator]
    ) -> Tensor:
        """Controls (B, T, C) from the features of :meth:`predict`, one draw by each generator."""
        latent = self.prior.bottleneck.draw(features, lengths, temperature, generators)
        return self.prior.decoder(latent, lengths)

    @torch.no_grad()
    def measurements(self, data: SpeechDataModule) -> dict[str, dict[str, float]]:
        """The paper's claim, of 10 draws of every test clip.

        Emotions are judged by the training emotion whose mean controls are nearest to the clip's.

        Returns:
            for each clip ``diversity_0.1``, ``_0.2`` and ``_0.5``, mean distance of two draws in control space at that
            temperature; ``deterministic``, the same at temperature 0; ``emotion_first`` and ``emotion_others``, the
            share of draws, of the first or of all others, that show the right emotion at the system's own temperature;
            and, where there is a mesh, lip-vertex errors (L2, maximum, mm) at that temperature: ``lve`` of the first
            draw, ``mee`` of the draws' mean, ``ce`` of the best draw; and ``vertex_diversity``, the mean distance (mm)
            of a vertex between two draws, as the paper's script pairs them.
        """
        names = {f"diversity_{value}": value for value in MEASURED_TEMPERATURES} | {"deterministic": 0.0}
        series: dict[str, dict[str, float]] = {name: {} for name in (*names, "emotion_first", "emotion_others")}
        judge = EmotionJudge(data)
        mouth, lips = None, torch.as_tensor(data.regions.get("lips", []), dtype=torch.int64)
        if self.rig.offsets is not None:
            mouth = Rig(self.rig.controls, self.rig.offsets[:, lips])
            series |= {"lve": {}, "mee": {}, "ce": {}, "vertex_diversity": {}}
        for clip in split_clips(data):
            key = clip.key[0]
            states, lengths = self.hear(clip)
            features = self.predict(states, lengths, clip)
            for name, temperature in names.items():
                draws = self._draws(clip, features, lengths, temperature)
                series[name][key] = sample_diversity(draws[:, :, None]).item()
            draws = self._draws(clip, features, lengths, self.temperature)
            right = judge(draws) == clip.emotion
            series["emotion_first"][key] = float(right[0])
            series["emotion_others"][key] = right[1:].float().mean().item()
            if mouth is not None:
                faces = self.rig(clip.template.expand(MEASURED_DRAWS, -1, -1), draws)
                series["vertex_diversity"][key] = 1e3 * sample_diversity(faces, "halves").item()
                spoken = mouth(clip.template[:, lips].expand(MEASURED_DRAWS, -1, -1), draws)
                truth, everything = clip.vertices[0][:, lips], torch.arange(len(lips))
                series["lve"][key] = 1e3 * lip_vertex_error(spoken[0], truth, everything, "l2").mean().item()
                series["mee"][key] = 1e3 * mean_estimate_error(spoken, truth, everything, "l2").mean().item()
                series["ce"][key] = 1e3 * coverage_error(spoken, truth, everything, "l2").mean().item()
        return series

    def _draws(self, clip: SpeechBatch, features: Tensor, lengths: Tensor, temperature: float) -> Tensor:
        generators: list[torch.Generator] = []
        for self.draw in range(MEASURED_DRAWS):
            generators += self.generators(clip)
        self.draw = 0
        features, lengths = features.expand(MEASURED_DRAWS, -1, -1), lengths.expand(MEASURED_DRAWS)
        return hold_last(self.draw_motion(features, lengths, temperature, generators), lengths, int(clip.lengths[0]))


class EmotionJudge:
    """Tells the emotion of a motion: the one whose mean controls over the training split are nearest.

    Distances are in units of the deviation of a training clip from its emotion's mean.
    """

    def __init__(self, data: SpeechDataModule) -> None:
        clips = list(split_clips(data, "train"))
        means = torch.stack([clip.weights[0].mean(0) for clip in clips])
        self.emotions, shown = torch.cat([clip.emotion for clip in clips]).unique(return_inverse=True)
        self.centres = torch.stack([means[shown == number].mean(0) for number in range(len(self.emotions))])
        self.deviation = (means - self.centres[shown]).square().mean(0).sqrt() + 1e-3

    def __call__(self, motions: Tensor) -> Tensor:
        """(S, T, C) controls -> (S,) int64 emotions."""
        distances = torch.cdist(motions.mean(1) / self.deviation, self.centres / self.deviation)
        return self.emotions[distances.argmin(1)]


class MotionPrior(nn.Module):
    """Motion to features, a bottleneck, and back.

    Args:
        controls: C, width of a frame.
        bottleneck: of codes or Gaussians.
        dim, layers, heads, hidden, dropout: as in :class:`~trainers.nets.motion_codes.MotionTransformer`.
    """

    def __init__(
        self,
        controls: int,
        bottleneck: "CodeBottleneck | GaussianBottleneck",
        dim: int,
        layers: int,
        heads: int,
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.encoder = MotionEncoder(controls, dim, layers, heads, hidden, dropout)
        self.bottleneck = bottleneck
        self.decoder = MotionDecoder(controls, dim, layers, heads, hidden, dropout)


class MotionEncoder(nn.Module):
    """Controls (B, T, C) -> features (B, T, dim)."""

    def __init__(self, controls: int, dim: int, layers: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.mapping = nn.Linear(controls, dim)
        self.transformer = MotionTransformer(dim, layers, heads, hidden, dropout)

    def forward(self, motion: Tensor, lengths: Tensor) -> Tensor:
        """``lengths`` (B,) int64 frames of each clip are real."""
        return self.transformer(leaky_relu(self.mapping(motion), SLOPE), lengths)


class MotionDecoder(nn.Module):
    """Latent (B, T, dim) -> controls (B, T, C)."""

    def __init__(self, controls: int, dim: int, layers: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.transformer = MotionTransformer(dim, layers, heads, hidden, dropout)
        self.mapping = nn.Linear(dim, controls, bias=False)

    def forward(self, latent: Tensor, lengths: Tensor) -> Tensor:
        """``lengths`` (B,) int64 frames of each clip are real."""
        return self.mapping(self.transformer(latent, lengths))


class LatentPredictor(nn.Module):
    """Speech states (B, T, speech_dim), times an embedded style, -> features (B, T, dim)."""

    def __init__(
        self, speech_dim: int, style_dim: int, dim: int, layers: int, heads: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.mapping = nn.Linear(speech_dim, dim)
        self.style = nn.Linear(style_dim, dim, bias=False)
        self.transformer = MotionTransformer(dim, layers, heads, hidden, dropout)

    def forward(self, states: Tensor, style: Tensor, lengths: Tensor) -> Tensor:
        """``style`` (B, style_dim) are one-hot codes; ``lengths`` (B,) int64 frames of each clip are real."""
        return self.transformer(self.mapping(states) * self.style(style)[:, None], lengths)


class CodeBottleneck(nn.Module):
    """Features as codes, each of consecutive values of a clip's (channel, time) array."""

    def __init__(self, codes: int, code_dim: int, beta: float) -> None:
        super().__init__()
        self.codebook = Quantiser(codes, code_dim, beta)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes (B, T, dim), with a straight-through gradient, and the quantisation loss."""
        quantised, loss, _ = self.codebook.nearest(self.rows(features, lengths))
        return self.frames(quantised, lengths), loss

    def draw(self, features: Tensor, lengths: Tensor, temperature: float, generators: list[torch.Generator]) -> Tensor:
        """Codes drawn at random (B, T, dim), by one CPU generator for each clip; the nearest at temperature 0."""
        if temperature:
            clips = zip(features, lengths.tolist(), generators, strict=True)
            drawn = [self.codebook.draw(_rows(clip[:n], self.codebook), temperature, g) for clip, n, g in clips]
            numbers = torch.cat(drawn)
        else:
            _, _, numbers = self.codebook.nearest(self.rows(features, lengths))
        return self.frames(self.codebook.embedding(numbers), lengths)

    def rows(self, features: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, dim) -> (R, code_dim): what is replaced by codes, clip after clip."""
        clips = zip(features, lengths.tolist(), strict=True)
        return torch.cat([_rows(clip[:length], self.codebook) for clip, length in clips])

    def frames(self, rows: Tensor, lengths: Tensor) -> Tensor:
        """The inverse of :meth:`rows`: (B, T, dim), zero where padded."""
        per_frame = len(rows) // int(lengths.sum())
        clips = rows.split((per_frame * lengths).tolist())
        return pad_sequence([clip.reshape(-1, n).T for clip, n in zip(clips, lengths.tolist(), strict=True)], True)


class GaussianBottleneck(nn.Module):
    """A Gaussian for every frame, as in a VAE."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean = nn.Linear(dim, dim)
        self.log_variance = nn.Linear(dim, dim)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """A draw (B, T, dim), and the KL divergence to the standard normal, mean over real frames and channels."""
        mean, log_variance = self.mean(features), self.log_variance(features)
        latent = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return latent, divergence[_real(features, lengths)].mean()

    def draw(self, features: Tensor, lengths: Tensor, temperature: float, generators: list[torch.Generator]) -> Tensor:
        """A draw (B, T, dim) by one CPU generator for each clip, its noise multiplied by ``temperature``."""
        mean, deviation = self.mean(features), (0.5 * self.log_variance(features)).exp()
        shape = mean.shape[-1]
        noise = [torch.randn(n, shape, generator=g) for n, g in zip(lengths.tolist(), generators, strict=True)]
        return mean + temperature * deviation * pad_sequence(noise, batch_first=True).to(mean)


def _rows(clip: Tensor, codebook: Quantiser) -> Tensor:
    return clip.T.reshape(-1, codebook.vq_embed_dim)


def _real(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


OFFICIAL_PARTS = {
    "motion_prior.motion_encoder": "prior.encoder",
    "motion_prior.motion_decoder": "prior.decoder",
    "feature_predictor": "predictor",
}
OFFICIAL_NAMES = {
    "motion_prior.quantize.embedding.weight": "prior.bottleneck.codebook.embedding.weight",
    "motion_prior.motion_encoder.feature_mapping.0": "prior.encoder.mapping",
    "motion_prior.motion_decoder.feature_mapping_reverse": "prior.decoder.mapping",
    "motion_prior.mean": "prior.bottleneck.mean",
    "motion_prior.logvar": "prior.bottleneck.log_variance",
    "feature_predictor.audio_feature_map": "predictor.mapping",
    "feature_predictor.style_embedding": "predictor.style",
}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the state dict of an official checkpoint (``VqvaePredict`` or ``VaePredict``) to :class:`ProbTalk3D`'s.

    ======================================================  ==========================================================
    official                                                here
    ======================================================  ==========================================================
    ``feature_extractor.audiomodel.*``                      ``encoder.*``, see
                                                            :func:`trainers.nets.speech_encoder.from_official`
    ``motion_prior.motion_encoder.feature_mapping.0.*``     ``prior.encoder.mapping.*``
    ``motion_prior.motion_encoder.*``                       ``prior.encoder.transformer.*``, see
                                                            :func:`trainers.nets.motion_codes.official_transformer_name`
    ``motion_prior.quantize.embedding.weight``              ``prior.bottleneck.codebook.embedding.weight``
    ``motion_prior.mean.*``, ``motion_prior.logvar.*``      ``prior.bottleneck.mean.*``, ``.log_variance.*``
    ``motion_prior.motion_decoder.feature_mapping_reverse``  ``prior.decoder.mapping``
    ``motion_prior.motion_decoder.*``                       ``prior.decoder.transformer.*``
    ``feature_predictor.audio_feature_map.*``               ``predictor.mapping.*``
    ``feature_predictor.style_embedding.*``                 ``predictor.style.*``
    ``feature_predictor.*``                                 ``predictor.transformer.*``
    ``*_pos_embedding.pe``, ``*_losses.*``                  dropped; positions are computed
    ======================================================  ==========================================================
    """
    return {name: value for key, value in state.items() if (name := official_name(key)) is not None}


def official_name(key: str) -> str | None:
    """What the weight called ``key`` in an official checkpoint is called here; None where it is computed."""
    if key.endswith(".pe") or "_losses." in key:
        return None
    if key.startswith("feature_extractor.audiomodel."):
        return f"encoder.{speech_encoder.official_name(key.removeprefix('feature_extractor.audiomodel.'))}"
    for official, ours in OFFICIAL_NAMES.items():
        if key.startswith(official):
            return ours + key.removeprefix(official)
    for official, ours in OFFICIAL_PARTS.items():
        if key.startswith(f"{official}."):
            return f"{ours}.transformer.{official_transformer_name(key.removeprefix(f'{official}.'))}"
    raise UserError(f"official checkpoint: unknown weight '{key}', expected one of ProbTalk3D's")
