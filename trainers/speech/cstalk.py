"""After CSTalk: correlation supervised speech-driven 3D emotional facial animation generation (Liang et al. 2024).

arXiv 2404.18604. The claim: regions of a face do not move independently of one another, and a network that has learned
how they move together, emotion by emotion, can supervise a generator, which then moves them more naturally.

No official code is known, and the paper's sizes and weights were not at hand: this is a reconstruction. From the paper:
motion is the curves of a control rig (MetaHuman's 185 in the paper), independent of identity; stage 1 learns the
correlation of facial regions with a transformer encoder for each emotion; stage 2 is a generator in the form of an
autoencoder, wav2vec 2.0 features and an emotion embedding in, a temporal convolutional network as decoder, supervised
by the frozen correlation network. The rest is ours:

- The regions: brow, eye, cheek and nose, mouth, jaw and tongue, told apart by the names of the controls, see
  :func:`control_regions`.
- The correlation network sees one frame. Each region is a token; one is hidden and predicted from the others. It has
  4 layers of 4 heads, 256 wide.
- ``correlation: shared`` trains one network for all emotions, with an emotion token, instead of one for each.
- The correlation loss: the squared difference between each generated region and what the frozen network predicts for
  it from the other generated regions. Weights: reconstruction 1, velocity 0.5, correlation 0.1.
- The decoder's convolutions look ahead as far as back; speech is at hand as a whole.
"""

import re
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers.measuring import split_clips
from trainers.nets.speech_encoder import TrainedPart
from trainers.stages import Staged
from trainers.tasks import SpeechToRig, SystemInfo

# What the name of a control begins with, after MetaHuman's CTRL_expressions_, CTRL_L_, CTRL_R_, CTRL_C_ or CTRL_.
REGIONS = {
    "brow": ("brow",),
    "eye": ("eye",),
    "cheek-nose": ("cheek", "nose", "ear"),
    "mouth": ("mouth", "lip"),
    "jaw-tongue": ("jaw", "chin", "tongue", "teeth", "neck"),
}
PREFIX = re.compile(r"^ctrl_(expressions_|[lrc]_)?")


class CSTalk(Staged, SpeechToRig):
    """CSTalk's reconstruction as a trainable system.

    Args:
        rig: specification of the controls, see :func:`trainers.nets.rig.load_rig`.
        num_vertices: V of the mesh; 0 on data of controls alone.
        subjects: training subjects; the system does not tell them apart.
        emotions: names of the emotions in the order of their one-hot codes.
        encoder: backbone specification of the speech encoder.
        correlation: stage 1 trains one network ``per-emotion`` or a ``shared`` one with an emotion token.
        correlation_dim: width of the correlation network.
        correlation_layers: of the correlation network.
        correlation_heads: of each layer.
        correlation_stride: the correlation network learns and judges every so-many-th frame; neighbours are much alike.
        dim: channels of the generator.
        levels: residual blocks of the generator, dilated by 1, 2, 4 and so on.
        dropout: in both networks, while training.
        train_encoder: which part of the speech encoder the second stage trains.
        velocity_weight: of the error of frame-to-frame differences.
        correlation_weight: of the correlation loss; 0 is the ablation.
        stage_epochs: epochs of the first stage; the second lasts to the end of the run.
        lr: learning rate of Adam in both stages.
    """

    info = SystemInfo(
        name="cstalk",
        title="after CSTalk",
        task="speech-to-mesh",
        paper="Liang et al., CSTalk: Correlation Supervised Speech-driven 3D Emotional Facial Animation Generation, FG",
        year=2024,
        url="https://arxiv.org/abs/2404.18604",
        basis="reconstruction",
    )
    conditions = ("emotion",)

    def __init__(
        self,
        rig: str,
        num_vertices: int,
        subjects: list[str],
        emotions: list[str],
        encoder: str,
        correlation: Literal["per-emotion", "shared"] = "per-emotion",
        correlation_dim: int = 256,
        correlation_layers: int = 4,
        correlation_heads: int = 4,
        correlation_stride: int = 1,
        dim: int = 256,
        levels: int = 5,
        dropout: float = 0.1,
        train_encoder: TrainedPart = "none",
        velocity_weight: float = 0.5,
        correlation_weight: float = 0.1,
        stage_epochs: list[int] = [50],  # noqa: B006 - read only; jsonargparse needs a plain default
        lr: float = 1e-4,
    ) -> None:
        super().__init__(
            rig,
            num_vertices,
            subjects,
            encoder=encoder,
            alignment="interpolate_states",
            train_encoder=train_encoder,
            emotions=emotions,
        )
        self.save_hyperparameters()
        self.velocity_weight = velocity_weight
        self.correlation_weight = correlation_weight
        self.correlation_stride = correlation_stride
        self.lr = lr
        self.encoder.classifier = None
        self.regions = control_regions(self.rig.controls)
        self.correlation = nn.ModuleList(
            CorrelationNetwork(
                list(self.regions.values()),
                1 if correlation == "per-emotion" else len(emotions),
                correlation_dim,
                correlation_layers,
                correlation_heads,
                dropout,
            )
            for _ in range(len(emotions) if correlation == "per-emotion" else 1)
        )
        self.generator = Generator(
            self.encoder.dim, len(emotions), len(self.rig.controls), dim=dim, levels=levels, dropout=dropout
        )
        self.plan_stages(stage_epochs, [[self.correlation], [self.generator, self.encoder]])

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """Stage 1: hidden regions from the others. Stage 2: the generator's losses."""
        if self.stage == 0:
            loss = self.correlation_loss(batch.weights, batch)
            self.log("train/correlation", loss, batch_size=len(batch))
            return loss
        self.correlation.eval()
        terms = self.losses(self.generate(batch), batch)
        for name, value in terms.items():
            self.log(f"train/{name}", value, batch_size=len(batch))
        loss = torch.stack(list(terms.values())).sum()
        self.log("train/loss", loss, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on both stages' networks."""
        return torch.optim.Adam([*self.stage_parameters(0), *self.stage_parameters(1)], lr=self.lr)

    @torch.no_grad()
    def control(self, batch: SpeechBatch) -> Tensor:
        """See :meth:`SpeechToRig.control`."""
        return self.generate(batch)

    def measurements(self, data: SpeechDataModule) -> dict[str, dict[str, float]]:
        """How far the regions of generated motion are from moving together as true ones do.

        The judge guided no training: ridge regressions of each region on all others, fitted on the true controls of
        the training split.

        Returns:
            the series ``residual``: root mean square over frames and controls of each test clip.
        """
        judge = LinearCorrelation(list(self.regions.values()))
        judge.fit(np.concatenate([clip.weights[0].numpy() for clip in split_clips(data, "train")]))
        clips = split_clips(data)
        return {"residual": {clip.key[0]: judge.residual(self.control(clip)[0].numpy()) for clip in clips}}

    def generate(self, batch: SpeechBatch) -> Tensor:
        """The controls, with gradients: (B, T, C)."""
        states, _ = self.encode(batch)
        return self.generator(states, self.emotion(batch), batch.frame_mask)

    def losses(self, generated: Tensor, batch: SpeechBatch) -> dict[str, Tensor]:
        """The weighted terms of stage 2: means over real frames and controls.

        Args:
            generated: (B, T, C) controls.
            batch: the clips.
        """
        real = batch.frame_mask
        residual = generated - batch.weights
        terms = {
            "reconstruction": residual[real].square().mean(),
            "velocity": self.velocity_weight * residual.diff(dim=1)[real[:, 1:]].square().mean(),
        }
        if self.correlation_weight:
            terms["correlation"] = self.correlation_weight * self.correlation_loss(generated, batch)
        return terms

    def correlation_loss(self, controls: Tensor, batch: SpeechBatch) -> Tensor:
        """Mean squared difference between each region of controls (B, T, C) and what the others let expect."""
        frame = torch.arange(controls.shape[1], device=controls.device)
        clip, frame = (batch.frame_mask & (frame % self.correlation_stride == 0)).nonzero(as_tuple=True)
        seen = controls[clip, frame]
        return mse_loss(self.correlated(seen, self.emotion(batch)[clip]), seen)

    def correlated(self, controls: Tensor, emotion: Tensor) -> Tensor:
        """Every region as the correlation network predicts it from the others.

        Args:
            controls: (N, C) of single frames.
            emotion: (N, E) one-hot.

        Returns:
            (N, C).
        """
        if len(self.correlation) == 1:
            return self.correlation[0](controls, emotion)
        expected = torch.zeros_like(controls)
        for number, network in enumerate(self.correlation):
            felt = emotion[:, number] > 0
            if felt.any():
                expected[felt] = network(controls[felt], emotion[felt, number : number + 1]).to(expected.dtype)
        return expected


class CorrelationNetwork(nn.Module):
    """A transformer over the regions of one frame that predicts a hidden region from the others.

    Args:
        regions: indices of each region's controls; every control belongs to one.
        emotions: length of the emotion code.
        dim: width.
        layers: of the encoder.
        heads: of each layer.
        dropout: while training.
    """

    def __init__(
        self, regions: list[list[int]], emotions: int, dim: int, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.regions = regions
        self.read = nn.ModuleList(nn.Linear(len(region), dim) for region in regions)
        self.write = nn.ModuleList(nn.Linear(dim, len(region)) for region in regions)
        self.hidden = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.place = nn.Parameter(torch.randn(len(regions), dim) * dim**-0.5)
        self.emotion = nn.Linear(emotions, dim)
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False)

    def forward(self, controls: Tensor, emotion: Tensor) -> Tensor:
        """Hides one region after the other.

        Args:
            controls: (N, C) of single frames.
            emotion: (N, emotions) one-hot.

        Returns:
            (N, C): every control as predicted from the regions that are not its own.
        """
        seen = [read(controls[:, region]) for read, region in zip(self.read, self.regions, strict=True)]
        tokens = torch.stack(seen, dim=1) + self.place
        felt = self.emotion(emotion)[:, None]
        predicted = torch.zeros_like(controls)
        for number, region in enumerate(self.regions):
            masked = tokens.clone()
            masked[:, number] = self.hidden + self.place[number]
            states = self.encoder(torch.cat([felt, masked], dim=1))
            predicted[:, region] = self.write[number](states[:, 1 + number]).to(predicted.dtype)
        return predicted


class Generator(nn.Module):
    """Speech states and an emotion in, controls out: projection, emotion embedding, temporal convolutions.

    Args:
        audio_dim: width of the speech states.
        emotions: length of the emotion code.
        controls: C.
        dim: channels.
        levels: residual blocks; the n-th is dilated by 2^n, so a frame sees 2^(levels + 2) - 4 frames to either side.
        dropout: while training.
    """

    def __init__(self, audio_dim: int, emotions: int, controls: int, dim: int, levels: int, dropout: float) -> None:
        super().__init__()
        self.audio = nn.Linear(audio_dim, dim)
        self.emotion = nn.Linear(emotions, dim, bias=False)
        self.blocks = nn.ModuleList(TemporalBlock(dim, 2**level, dropout) for level in range(levels))
        self.controls = nn.Linear(dim, controls)

    def forward(self, speech: Tensor, emotion: Tensor, real: Tensor) -> Tensor:
        """Generates all frames at once.

        Args:
            speech: (B, T, audio_dim), one state per frame.
            emotion: (B, emotions) one-hot.
            real: (B, T) bool, False where padded.

        Returns:
            (B, T, C).
        """
        mask = real[:, None].to(speech.dtype)
        hidden = (self.audio(speech) + self.emotion(emotion)[:, None]).transpose(1, 2).where(real[:, None], 0.0)
        for block in self.blocks:
            hidden = block(hidden, mask)
        return self.controls(hidden.transpose(1, 2))


class TemporalBlock(nn.Module):
    """Two dilated convolutions over time with a shortcut (Bai et al. 2018), looking ahead as far as back.

    Args:
        dim: channels.
        dilation: frames between the taps of the kernel, which has three.
        dropout: while training.
    """

    def __init__(self, dim: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(dim, dim, 3, dilation=dilation, padding=dilation) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, dim, T), zero where the mask (B, 1, T) is, to the same form."""
        hidden = x
        for convolution in self.convolutions:
            hidden = self.dropout(convolution(hidden).relu()) * mask
        return x + hidden


class LinearCorrelation:
    """Ridge regression of each region's controls on those of all others.

    Args:
        regions: indices of each region's controls.
    """

    def __init__(self, regions: list[list[int]]) -> None:
        self.regions = regions
        self.models = [Ridge(alpha=1.0) for _ in regions]

    def fit(self, controls: NDArray[np.float32]) -> None:
        """Learns from true controls, (N, C)."""
        for model, region in zip(self.models, self.regions, strict=True):
            model.fit(np.delete(controls, region, axis=1), controls[:, region])

    def residual(self, controls: NDArray[np.float32]) -> float:
        """Root mean square of what the regressions do not explain of controls (N, C)."""
        expected = np.zeros_like(controls)
        for model, region in zip(self.models, self.regions, strict=True):
            predicted = model.predict(np.delete(controls, region, axis=1))
            expected[:, region] = predicted.reshape(len(controls), -1)
        return float(np.sqrt(np.square(controls - expected).mean()))


def control_regions(controls: list[str]) -> dict[str, list[int]]:
    """Tells the regions of a face apart by the names of controls.

    Args:
        controls: ARKit's names (``browInnerUp``), MetaHuman's raw controls (``CTRL_expressions_browDownL``) or those of
            its board (``CTRL_L_brow_down.ty``); the case of letters does not matter.

    Returns:
        region -> indices of its controls, for the regions that have any.

    Raises:
        UserError: a control of no region, or fewer than two regions.
    """
    regions: dict[str, list[int]] = {name: [] for name in REGIONS}
    for number, control in enumerate(controls):
        plain = PREFIX.sub("", control.lower())
        region = next((name for name, starts in REGIONS.items() if plain.startswith(starts)), None)
        if region is None:
            known = ", ".join(start for starts in REGIONS.values() for start in starts)
            raise UserError(f"model.rig: control '{control}' is of no known region; its name must begin with {known}")
        regions[region].append(number)
    found = {name: indices for name, indices in regions.items() if indices}
    if len(found) < 2:
        raise UserError(f"model.rig: controls of {', '.join(found) or 'no region'} alone; expected two regions or more")
    return found
