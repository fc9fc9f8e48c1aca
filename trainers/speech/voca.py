"""VOCA: voice operated character animation (Cudeiro et al., CVPR 2019, arXiv 1905.03079).

The claim: features of a speech recogniser generalise over speakers, and a one-hot code of the speaking style separates
how someone moves from what is said, so that one small network animates any voice on any face.

What stands here follows the official code (TimoBolkart/voca, commit 50bf785): a window of 16 recogniser features
around each frame, four strided convolutions over time, two dense layers, and an expression layer that turns 50
coefficients into vertex offsets; reconstruction and velocity losses on windows of consecutive frames.

Deliberate differences:

- **The recogniser.** VOCA reads the logits of DeepSpeech 0.1.0 (29 characters), which runs on no current TensorFlow.
  Here the features are the logits of a frozen speech encoder: CTC characters of wav2vec 2.0 at the paper's scale,
  phonemes in the demo. Every number of this system is VOCA's with that substitute.
- The expression layer starts from the principal components of the training offsets, scaled to unit variance, and its
  bias from their mean; officially from FLAME's expression basis and zero.
- The windows of a step are drawn from the clips of one batch, officially from all clips.
- Features are interpolated to the frames first on first and last on last, so that the frame rate need not be known.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.stream import Loader
from trainers.nets.speech_encoder import interpolate_features
from trainers.tasks import SpeechToMesh, SystemInfo


class VOCA(SpeechToMesh):
    """VOCA as a trainable system, with a named substitute for DeepSpeech's features.

    Args:
        num_vertices: V of the mesh.
        subjects: training subjects in the order of their one-hot codes.
        encoder: backbone specification of a speech encoder with a phoneme or character classifier.
        components: coefficients of the expression layer.
        velocity_weight: of the velocity loss.
        acceleration_weight: of the acceleration loss; above 0, windows hold three frames instead of two.
        regulariser_weight: of the absolute offsets.
        absolute: absolute instead of squared differences.
        windows: windows of consecutive frames in a training step.
        unit: metres; offsets are learned and losses measured in it, 0.001 for millimetres.
        lr: learning rate of Adam.
        unseen: the training subject whose style stands in for a speaker never seen, ``fixed:k``.

    Raises:
        UserError: the speech encoder has no classifier.
    """

    info = SystemInfo(
        name="voca",
        title="VOCA (wav2vec 2.0 for DeepSpeech)",
        task="speech-to-mesh",
        paper="Cudeiro et al., Capture, Learning, and Synthesis of 3D Speaking Styles, CVPR",
        year=2019,
        url="https://arxiv.org/abs/1905.03079",
        basis="official code",
    )

    def __init__(
        self,
        num_vertices: int,
        subjects: list[str],
        encoder: str,
        components: int = 50,
        velocity_weight: float = 10.0,
        acceleration_weight: float = 0.0,
        regulariser_weight: float = 0.0,
        absolute: bool = False,
        windows: int = 64,
        unit: float = 1.0,
        lr: float = 1e-4,
        unseen: str = "fixed:0",
    ) -> None:
        super().__init__(num_vertices, subjects, encoder, "native", unseen=unseen)
        self.save_hyperparameters()
        self.velocity_weight = velocity_weight
        self.acceleration_weight = acceleration_weight
        self.regulariser_weight = regulariser_weight
        self.absolute = absolute
        self.windows = windows
        self.unit = unit
        self.consecutive = 3 if acceleration_weight else 2
        self.lr = lr
        if not self.encoder.classes:
            raise UserError(
                f"model.encoder: '{encoder}' classifies neither phonemes nor characters; use demo:speech or a CTC "
                "model such as hub:facebook/wav2vec2-base-960h"
            )
        self.network = VOCANetwork(len(self.encoder.classes), len(subjects), num_vertices, components)

    def setup(self, stage: str) -> None:
        """Also gives a new expression layer its basis."""
        super().setup(stage)
        if stage == "fit":
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            offsets = sample_offsets(data.loader("train", whole=True))
            self.network.initialise_expressions(offsets / self.unit)

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """Reconstruction, velocity and, where weighted, acceleration and regulariser."""
        clip, frame = self.draw_windows(batch.lengths)
        features = audio_windows(self.hear(batch))[clip, frame]
        offsets = self.network(features.flatten(0, 1), self.style(batch)[clip].flatten(0, 1))
        offsets = offsets.unflatten(0, clip.shape)
        error = offsets - (batch.vertices[clip, frame] - batch.template[clip]) / self.unit
        losses = {
            "reconstruction": reconstruction_loss(error, self.absolute),
            "velocity": self.velocity_weight * velocity_loss(error, self.absolute),
        }
        if self.acceleration_weight:
            losses["acceleration"] = self.acceleration_weight * acceleration_loss(error, self.absolute)
        if self.regulariser_weight:
            losses["regulariser"] = self.regulariser_weight * offset_regulariser(offsets)
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, batch_size=len(batch))
        return torch.stack(list(losses.values())).sum()

    def draw_windows(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Windows of consecutive frames at random: the clip and the frame of each, two of (windows, consecutive)."""
        ends = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        clip, end = ends.nonzero(as_tuple=True)
        drawn = torch.randperm(len(end), device=lengths.device)[: self.windows]
        frame = window_indices(end[drawn], self.consecutive)
        return clip[drawn, None].expand_as(frame), frame

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.network.parameters(), lr=self.lr)

    @torch.no_grad()
    def animate(self, batch: SpeechBatch) -> Tensor:
        """Frame by frame, each from its window; see :meth:`SpeechToMesh.animate`."""
        windows = audio_windows(self.hear(batch))
        style = self.style(batch).repeat_interleave(windows.shape[1], dim=0)
        offsets = self.network(windows.flatten(0, 1), style)
        return batch.template[:, None] + self.unit * offsets.unflatten(0, windows.shape[:2])

    @torch.no_grad()
    def hear(self, batch: SpeechBatch) -> Tensor:
        """Logits of the speech encoder at the frame rate, (B, T, C), zero where padded."""
        states, lengths = self.encode(batch)
        logits = self.encoder.classifier(states)
        counts = zip(lengths.tolist(), batch.lengths.tolist(), strict=True)
        clips = [interpolate_features(clip[:n], frames) for clip, (n, frames) in zip(logits, counts, strict=True)]
        return pad_sequence(clips, batch_first=True)


class VOCANetwork(nn.Module):
    """A window of speech features and a style in, vertex offsets out.

    With 29 features, 8 subjects, 5,023 vertices and 50 components it has the 809,563 parameters of the official model.

    Args:
        num_features: C, speech features of a frame.
        num_subjects: length of the one-hot style code.
        num_vertices: V of the mesh.
        components: coefficients of the expression layer.
    """

    WINDOW = 16

    def __init__(self, num_features: int, num_subjects: int, num_vertices: int, components: int = 50) -> None:
        super().__init__()
        # One scale and one statistic for all features: officially the features are the width of a one-channel image.
        self.batch_norm = nn.BatchNorm2d(1)
        self.conv1 = nn.Conv1d(num_features + num_subjects, 32, kernel_size=3, stride=2)
        self.conv2 = nn.Conv1d(32, 32, kernel_size=3, stride=2)
        self.conv3 = nn.Conv1d(32, 64, kernel_size=3, stride=2)
        self.conv4 = nn.Conv1d(64, 64, kernel_size=3, stride=2)
        self.fc1 = nn.Linear(64 + num_subjects, 128)
        self.fc2 = nn.Linear(128, components)
        self.expression = nn.Linear(components, num_vertices * 3)
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            for parameter in convolution.parameters():
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
        for dense in (self.fc1, self.fc2):
            nn.init.trunc_normal_(dense.weight, std=0.1, a=-0.2, b=0.2)
            nn.init.zeros_(dense.bias)
        nn.init.zeros_(self.expression.weight)
        nn.init.zeros_(self.expression.bias)

    def forward(self, windows: Tensor, style: Tensor) -> Tensor:
        """Offsets of frames.

        Args:
            windows: (N, 16, C) speech features around each frame.
            style: (N, num_subjects).

        Returns:
            (N, V, 3) offsets from the template.
        """
        features = self.batch_norm(windows[:, None])[:, 0]
        x = torch.cat([features, style[:, None].expand(-1, self.WINDOW, -1)], dim=-1).mT
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            # TensorFlow's SAME padding, for an even length and stride 2, is all on the right.
            x = convolution(pad(x, (0, 1))).relu()
        x = self.fc1(torch.cat([x.flatten(1), style], dim=-1)).tanh()
        return self.expression(self.fc2(x)).unflatten(-1, (-1, 3))

    @torch.no_grad()
    def initialise_expressions(self, offsets: Tensor) -> None:
        """Principal components of offsets (N, V, 3), scaled to unit variance, become the expression layer."""
        offsets = offsets.flatten(1)
        mean = offsets.mean(0)
        count = min(self.expression.in_features, *offsets.shape)
        _, scale, directions = torch.pca_lowrank(offsets - mean, q=count, center=False)
        self.expression.bias.copy_(mean)
        self.expression.weight[:, :count] = directions * scale / len(offsets) ** 0.5


def audio_windows(features: Tensor) -> Tensor:
    """(B, T, C) -> (B, T, 16, C): eight frames before each frame to seven after it, zeros beyond the clip."""
    half = VOCANetwork.WINDOW // 2
    return pad(features, (0, 0, half, half - 1)).unfold(1, VOCANetwork.WINDOW, 1).mT


def window_indices(ends: Tensor, consecutive: int) -> Tensor:
    """Frames of the windows that end at the frames ``ends`` (N,): (N, consecutive); frame 0 fills what lacks."""
    return (ends[:, None] + torch.arange(1 - consecutive, 1, device=ends.device)).clamp(min=0)


def reconstruction_loss(error: Tensor, absolute: bool = False) -> Tensor:
    """Summed over x, y, z; mean over all frames of all windows and over vertices.

    Args:
        error: (N, consecutive, V, 3), predicted minus true.
        absolute: absolute instead of squared differences.
    """
    return _distance(error, absolute)


def velocity_loss(error: Tensor, absolute: bool = False) -> Tensor:
    """As :func:`reconstruction_loss`, of the step from the last but one to the last frame of each window."""
    return _distance(error[:, -1] - error[:, -2], absolute)


def acceleration_loss(error: Tensor, absolute: bool = False) -> Tensor:
    """As :func:`velocity_loss`, of the second difference of the last three frames of each window."""
    return _distance(error[:, -1] - 2 * error[:, -2] + error[:, -3], absolute)


def offset_regulariser(offsets: Tensor) -> Tensor:
    """Absolute offsets, summed over x, y, z; mean over the rest."""
    return _distance(offsets, absolute=True)


def _distance(difference: Tensor, absolute: bool) -> Tensor:
    return (difference.abs() if absolute else difference.square()).sum(-1).mean()


def sample_offsets(loader: Loader, frames: int = 1000) -> Tensor:
    """About ``frames`` offsets (N, V, 3), spread evenly over the batches of a loader."""
    per_batch = -(-frames // len(loader))
    found = []
    for batch in loader:
        clip, frame = batch.frame_mask.nonzero(as_tuple=True)
        chosen = torch.linspace(0, len(clip) - 1, min(per_batch, len(clip))).long()
        found.append(batch.vertices[clip[chosen], frame[chosen]] - batch.template[clip[chosen]])
    return torch.cat(found)


def from_official(variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns the variables of an official TensorFlow checkpoint into the state dict of :class:`VOCANetwork`.

    ======================================================  =======================================
    official, below ``VOCA/``                               here
    ======================================================  =======================================
    ``SpeechEncoder/batch_norm/gamma, beta``                ``batch_norm.weight, bias``
    ``SpeechEncoder/batch_norm/moving_mean``                ``batch_norm.running_mean``
    ``SpeechEncoder/batch_norm/moving_variance``            ``batch_norm.running_var``
    ``SpeechEncoder/conv1..4/weights`` (3, 1, in, out)      ``conv1..4.weight`` (out, in, 3)
    ``SpeechEncoder/fc1, fc2/weights`` (in, out)            ``fc1, fc2.weight`` (out, in)
    ``ExpressionLayer/expression_offset/weights``           ``expression.weight``, transposed
    ``.../biases``                                          ``.../bias``
    ======================================================  =======================================

    Such a network wants DeepSpeech's 29 logits: compute them with the official code.
    """
    names = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
    names |= {"weights": "weight", "biases": "bias"}
    state = {"batch_norm.num_batches_tracked": torch.tensor(0)}
    for variable, value in variables.items():
        layer, name = variable.split("/")[-2:]
        if name == "weights":
            value = value.squeeze(1).permute(2, 1, 0) if layer.startswith("conv") else value.T
        layer = "expression" if layer == "expression_offset" else layer
        state[f"{layer}.{names[name]}"] = value
    return state
