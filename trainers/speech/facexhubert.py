"""FaceXHuBERT: text-less speech-driven expressive 3D facial animation (Haque and Yumak, ICMI 2023, arXiv 2303.05416).

The claim: HuBERT's states need no transcript and no large decoder. A small GRU over them animates the whole face, and
a binary emotion flag, multiplied into its output beside the speaker's code, switches between a neutral and an
expressive way of saying the same.

What stands here follows the official code (galib360/FaceXHuBERT, commit aecbc12): two neighbouring states of HuBERT
for each frame (``alignment="pair_states"`` at 25 fps, ``"resample_pairs"`` at any other rate), two GRU layers, the
product with both codes, one linear layer to vertex offsets, a Huber loss on all coordinates. The convolutions, the
projection and the first two layers of the encoder are frozen (``train_encoder="upper"``).

Deliberate differences, none of which changes what an evaluated network gives:

- The emotion is binary; data with named emotions counts all but ``neutral`` as emotional.
- Batches of several clips; the loss is the mean over their real frames.
- At 25 fps audio can end a frame before the mesh does. As in the official code such frames have no loss;
  :meth:`FaceXHuBERT.animate` holds the last pose for them. The official prediction is as long as the audio, and always
  at 25 fps.
- No SpecAugment on the speech features.
- Vertices are normalised by the data set, not here (``datamodules.sources.biwi``, normalisation ``facexhubert``).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import huber_loss

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers.measuring import clip_errors
from trainers.nets import speech_encoder
from trainers.nets.motion_codes import hold_last
from trainers.nets.speech_encoder import STATES_PER_FRAME, TrainedPart
from trainers.tasks import Condition, SpeechToMesh, SystemInfo


class FaceXHuBERT(SpeechToMesh):
    """FaceXHuBERT as a trainable system.

    Args:
        num_vertices: V of the mesh.
        subjects: training subjects in the order of their one-hot codes.
        encoder: backbone specification of the speech encoder.
        emotions: names of the data's emotions; one of them is ``neutral``.
        alignment: ``pair_states`` (25 fps) or ``resample_pairs`` (any frame rate).
        dim: width of the GRU.
        layers: of the GRU.
        dropout: between them, while training.
        train_encoder: which part of the encoder is trained: ``none``, or all but its first layers (``upper``).
        unit: metres; offsets are learned and the loss measured in it, 0.001 for millimetres.
        lr: learning rate of Adam.
        unseen: whose style stands in for a speaker never seen, see :class:`trainers.tasks.SpeechToMesh`.

    Raises:
        UserError: no emotion is called neutral.
    """

    info = SystemInfo(
        name="facexhubert",
        title="FaceXHuBERT",
        task="speech-to-mesh",
        paper="Haque and Yumak, FaceXHuBERT: Text-less Speech-driven E(X)pressive 3D Facial Animation Synthesis, ICMI",
        year=2023,
        url="https://arxiv.org/abs/2303.05416",
        basis="official code",
    )
    conditions: ClassVar[tuple[Condition, ...]] = ("subject", "emotion")

    def __init__(
        self,
        num_vertices: int,
        subjects: list[str],
        encoder: str,
        emotions: list[str],
        alignment: Literal["pair_states", "resample_pairs"] = "pair_states",
        dim: int = 256,
        layers: int = 2,
        dropout: float = 0.3,
        train_encoder: TrainedPart = "upper",
        unit: float = 1.0,
        lr: float = 1e-4,
        unseen: str = "fixed:0",
    ) -> None:
        super().__init__(num_vertices, subjects, encoder, alignment, train_encoder, unseen, emotions)
        self.save_hyperparameters()
        if "neutral" not in emotions:
            raise UserError(
                f"model.emotions: {emotions}, expected one of them to be 'neutral': all others are emotional"
            )
        self.neutral = emotions.index("neutral")
        self.unit = unit
        self.lr = lr
        self.encoder.classifier = None
        audio_dim = self.encoder.dim * STATES_PER_FRAME[alignment]
        self.decoder = ExpressiveGRU(num_vertices, len(subjects), audio_dim, dim, layers, dropout)

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """The Huber loss on vertices."""
        speech, frames = self.hear(batch)
        loss = self.loss(speech, frames, batch)
        self.log("train/loss", loss, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on all that is trained."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def animate(self, batch: SpeechBatch) -> Tensor:
        """Animation with the clips' own emotion; see :meth:`SpeechToMesh.animate`."""
        return self.animate_as(self.emotional(batch), batch)

    @torch.no_grad()
    def animate_as(self, emotional: Tensor, batch: SpeechBatch) -> Tensor:
        """As :meth:`animate`, with another flag (B, 2); see :meth:`emotional`."""
        speech, frames = self.hear(batch)
        offsets = hold_last(self.decoder(speech, self.style(batch), emotional), frames, batch.vertices.shape[1])
        return batch.template[:, None] + self.unit * offsets.unflatten(-1, (self.num_vertices, 3))

    def measurements(self, data: SpeechDataModule) -> dict[str, dict[str, float]]:
        """The emotion switch on the upper face, mm, data in metres.

        Returns:
            ``true_emotion`` and ``other_emotion``: the error with the flag of the clip and with the other; ``moved``:
            how far apart the two motions are. All are means over the region and the frames of a clip.
        """
        region = data.region("upper_face")
        series: dict[str, dict[str, float]] = {"true_emotion": {}, "other_emotion": {}, "moved": {}}
        for batch in data.loader("test"):
            emotional = self.emotional(batch)
            true, other = self.animate_as(emotional, batch), self.animate_as(emotional.flip(-1), batch)
            series["true_emotion"] |= clip_errors(true, batch, region, "mean")
            series["other_emotion"] |= clip_errors(other, batch, region, "mean")
            series["moved"] |= clip_errors(other, replace(batch, vertices=true), region, "mean")
        return series

    def emotional(self, batch: SpeechBatch) -> Tensor:
        """The official two-digit code, (B, 2) float32: [1, 0] for neutral clips, [0, 1] for all others."""
        neutral = self.emotion(batch)[:, self.neutral]
        return torch.stack([neutral, 1 - neutral], dim=-1)

    def hear(self, batch: SpeechBatch) -> tuple[Tensor, Tensor]:
        """Speech states of each frame side by side (B, T, 2·D), and how many frames have them, (B,) int64."""
        states, lengths = self.encode(batch)
        per_frame = STATES_PER_FRAME[self.alignment]
        return states.unflatten(1, (-1, per_frame)).flatten(2), lengths // per_frame

    def loss(self, speech: Tensor, frames: Tensor, batch: SpeechBatch) -> Tensor:
        """The Huber loss (delta 1) on the coordinates of all frames that are real and have speech.

        Args:
            speech: (B, T, 2·D) states of :meth:`hear`.
            frames: (B,) int64, frames that have them.
            batch: the clips.
        """
        predicted = self.decoder(speech, self.style(batch), self.emotional(batch))
        count = predicted.shape[1]
        target = ((batch.vertices[:, :count] - batch.template[:, None]) / self.unit).flatten(2)
        real = torch.arange(count, device=frames.device) < frames[:, None]
        return huber_loss(predicted[real], target[real])


class ExpressiveGRU(nn.Module):
    """Speech states, a speaker and an emotion flag in, vertex offsets out.

    Args:
        num_vertices: V of the mesh.
        num_subjects: length of the one-hot code of the speakers.
        audio_dim: width of a frame's speech states.
        dim: of the GRU.
        layers: of the GRU.
        dropout: between them, while training.
    """

    def __init__(
        self,
        num_vertices: int,
        num_subjects: int,
        audio_dim: int,
        dim: int = 256,
        layers: int = 2,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.gru = nn.GRU(audio_dim, dim, layers, batch_first=True, dropout=dropout)
        self.style = nn.Linear(num_subjects, dim, bias=False)
        self.emotion = nn.Linear(2, dim, bias=False)
        self.vertex_decoder = nn.Linear(dim, num_vertices * 3)
        nn.init.zeros_(self.vertex_decoder.weight)
        nn.init.zeros_(self.vertex_decoder.bias)

    def forward(self, speech: Tensor, style: Tensor, emotional: Tensor) -> Tensor:
        """Offsets of all frames.

        Args:
            speech: (B, T, audio_dim).
            style: (B, num_subjects).
            emotional: (B, 2).

        Returns:
            (B, T, V·3) offsets from the template.
        """
        hidden, _ = self.gru(speech)
        return self.vertex_decoder(hidden * (self.style(style) * self.emotion(emotional))[:, None])


OFFICIAL_NAMES = {
    "gru": "decoder.gru",
    "fc": "decoder.vertex_decoder",
    "obj_vector": "decoder.style",
    "emo_vector": "decoder.emotion",
}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the state dict of an official checkpoint to :class:`FaceXHuBERT`'s.

    ======================  =======================================================================
    official                here
    ======================  =======================================================================
    ``audio_encoder.*``     ``encoder.*``, see :func:`trainers.nets.speech_encoder.from_official`
    ``gru.*``               ``decoder.gru.*``
    ``fc.*``                ``decoder.vertex_decoder.*``
    ``obj_vector.weight``   ``decoder.style.weight``
    ``emo_vector.weight``   ``decoder.emotion.weight``
    ======================  =======================================================================

    Use: ``FaceXHuBERT(...).load_state_dict(from_official(torch.load(file, weights_only=True)))``.
    """
    return {official_name(key): value for key, value in state.items()}


def official_name(key: str) -> str:
    """What the official weight ``key`` is called here; see :func:`from_official`."""
    module, _, rest = key.partition(".")
    if module == "audio_encoder":
        return "encoder." + speech_encoder.official_name(rest)
    return f"{OFFICIAL_NAMES[module]}.{rest}"
