"""After Joint Audio-Text (Fan et al., I3D 2022, arXiv 2112.02214): what is said moves the upper face.

The claim: sound alone says little about brows and eyes. Contextual embeddings of the transcript, from a language model
that was trained on far more text than any set of scans holds, settle what the sound leaves open, so that the upper face
becomes more accurate while the lips stay as they are.

A reconstruction: of the paper only abstract and list of references were at hand, and no code was published. From them
come the inputs (sound, transcript, neutral mesh), the pretrained language model (GPT-2, by the survey) and its
combination with acoustic features. What follows is ours:

- Text: the state of each word is the mean of its sub-tokens' last hidden states, GPT-2 frozen (the demo's small model
  gives those of all its layers). It stands in every frame
  in which the word is said, zeros where nothing is said; a convolution over three frames narrows it.
- Sound: one second of mel energies around each frame through MeshTalk's dilated convolutions (``mel100:80``). Any other
  speech encoder's states, interpolated to the frames and narrowed by a linear layer, can stand in their place.
- Fusion: ``concat`` and a linear layer; ``gated``, a mixture whose shares follow from both; or ``tensor``, the outer
  product of both with a 1 appended (Zadeh et al. 2017, Tensor Fusion Network, which the paper refers to).
- Decoder: a code of the speaker is added, and where ``emotions`` are named, one of the emotion and its intensity; then
  residual dilated convolutions over time look as far ahead as back, since brows move before the word that moves them;
  one linear layer gives the offsets from the template. The paper names no emotion as input; the demo gives it, as it
  moves the upper face of that corpus far more than words do, and few sentences can be learned by heart with theirs.
- Losses: squared error on vertices and, ten times as much, on their frame-to-frame differences (VOCA's weights).
- Word times come with the data or from a file (:func:`datamodules.words.read_words`). A transcript without times is
  spread over the clip, each word as long as any other, and a warning says so; a clip without transcript is refused.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from datamodules.words import Word, timed_words, words_at_frames
from trainers import backbones
from trainers.measuring import SPLIT, clip_errors
from trainers.nets.audio_windows import WindowEncoder
from trainers.nets.speech_encoder import Alignment
from trainers.nets.text_encoder import Layers
from trainers.tasks import INTENSITIES, SpeechToMesh, SystemInfo

Fusing = Literal["concat", "gated", "tensor"]


class JointAudioText(SpeechToMesh):
    """Joint audio-text as a trainable system.

    Args:
        num_vertices: V of the mesh.
        subjects: training subjects in the order of their one-hot codes.
        encoder: of the sound: ``mel100:80``, or backbone specification of a speech encoder, frozen.
        text: backbone specification of the language model, frozen.
        text_layers: whose states are read: its ``last`` one's, or ``all`` layers' side by side.
        modality: what it is given: both (``joint``), or as ablations ``audio`` or ``text`` alone.
        fusion: how both are joined: ``concat``, ``gated`` or ``tensor``.
        fps: frames per second of the data.
        dim: width of the features of sound and text, and of the decoder.
        layers: convolutions of the decoder; the dilation doubles from each to the next.
        dropout: in sound encoder and decoder, while training.
        velocity_weight: of the squared error of frame-to-frame differences.
        region_weights: region of the data -> weight of its vertices in both losses; 1 for all others.
        unit: metres; offsets are learned and losses measured in it, 0.001 for millimetres.
        lr: learning rate of Adam.
        unseen: who stands in for a speaker never seen, see :class:`trainers.tasks.SpeechToMesh`.
        emotions: the data's, in order, to be told which of them a clip has; None not to be told, as in the paper.
    """

    info = SystemInfo(
        name="joint_audio_text",
        title="after Joint Audio-Text",
        task="speech-to-mesh",
        paper="Fan et al., Joint Audio-Text Model for Expressive Speech-Driven 3D Facial Animation, I3D",
        year=2022,
        url="https://arxiv.org/abs/2112.02214",
        basis="reconstruction",
    )
    conditions = ("subject", "emotion", "intensity", "transcript", "words")
    vertex_weights: Tensor

    def __init__(
        self,
        num_vertices: int,
        subjects: list[str],
        encoder: str = "mel100:80",
        text: str = "hub:gpt2",
        text_layers: Layers = "last",
        modality: Literal["joint", "audio", "text"] = "joint",
        fusion: Fusing = "tensor",
        fps: float = 30.0,
        dim: int = 64,
        layers: int = 4,
        dropout: float = 0.1,
        velocity_weight: float = 10.0,
        region_weights: dict[str, float] | None = None,
        unit: float = 1.0,
        lr: float = 1e-4,
        unseen: str = "fixed:0",
        emotions: list[str] | None = None,
    ) -> None:
        windows = encoder.startswith("mel100:")
        alignment: Alignment = "native" if windows else "interpolate_states"
        super().__init__(num_vertices, subjects, encoder, alignment, unseen=unseen, emotions=emotions)
        self.save_hyperparameters()
        self.modality = modality
        self.text_layers: Layers = text_layers
        self.fps = fps
        self.velocity_weight = velocity_weight
        self.region_weights = region_weights or {}
        self.unit = unit
        self.lr = lr
        if modality != "text":
            self.sound = (
                WindowEncoder(self.encoder.dim, dim=dim, dropout=dropout)
                if windows
                else nn.Linear(self.encoder.dim, dim)
            )
        if modality != "audio":
            self.language = backbones.load(text, "text")
            self.frozen = (*self.frozen, "language")
            self.meaning = nn.Conv1d(self.language.width(text_layers), dim, kernel_size=3, padding=1)
        if modality == "joint":
            self.fusion = Fusion(dim, fusion)
        self.decoder = TemporalDecoder(
            num_vertices, len(subjects) + INTENSITIES * len(self.emotions), dim, layers, dropout
        )
        self.register_buffer("vertex_weights", torch.ones(num_vertices, 1), persistent=False)

    @property
    def frame_rate(self) -> float:
        """That of the audio windows and word times."""
        return self.fps

    def setup(self, stage: str) -> None:
        """Also looks the weighted regions up.

        Raises:
            UserError: no such region.
        """
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        for name, weight in self.region_weights.items():
            if name not in data.regions:
                raise UserError(
                    f"model.region_weights: {data.root} has no region '{name}'; name some of {', '.join(data.regions)}"
                )
            self.vertex_weights[data.region(name)] = weight

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """Weighted squared errors of vertices and of their frame-to-frame differences."""
        error = self(batch) - (batch.vertices - batch.template[:, None]) / self.unit
        real = batch.frame_mask
        step, both = error.diff(dim=1), real[:, 1:]
        losses = {
            "reconstruction": (self.vertex_weights * error[real].square()).mean(),
            "velocity": self.velocity_weight * (self.vertex_weights * step[both].square()).mean(),
        }
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, batch_size=len(batch))
        return torch.stack(list(losses.values())).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on all that is trained."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    @torch.no_grad()
    def animate(self, batch: SpeechBatch) -> Tensor:
        """All frames at once; see :meth:`SpeechToMesh.animate`.

        Raises:
            UserError: a clip has neither words nor transcript, but the system reads.
        """
        return batch.template[:, None] + self.unit * self(batch)

    @torch.no_grad()
    def measurements(self, data: SpeechDataModule) -> dict[str, dict[str, float]]:
        """Errors in mm of each test clip: ``lips``, the maximum over the lips, and ``upper_face``, the mean over it."""
        series: dict[str, dict[str, float]] = {"lips": {}, "upper_face": {}}
        lips, upper_face = (data.region(name) for name in series)
        for batch in data.loader(SPLIT):
            predicted = self.animate(batch)
            series["lips"] |= clip_errors(predicted, batch, lips)
            series["upper_face"] |= clip_errors(predicted, batch, upper_face, over_vertices="mean")
        return series

    def forward(self, batch: SpeechBatch) -> Tensor:
        """Offsets from the template in :attr:`unit`, (B, T, V, 3)."""
        if self.modality == "audio":
            features = self.hear(batch)
        elif self.modality == "text":
            features = self.read(batch)
        else:
            features = self.fusion(self.hear(batch), self.read(batch))
        return self.decoder(features, self.manner(batch), batch.frame_mask)

    def manner(self, batch: SpeechBatch) -> Tensor:
        """Code of the speaker and, where they are told, of emotion and intensity side by side, (B, codes)."""
        if not self.emotions:
            return self.style(batch)
        felt = self.emotion(batch)[:, :, None] * self.intensity(batch)[:, None]
        return torch.cat([self.style(batch), felt.flatten(1)], dim=-1)

    def hear(self, batch: SpeechBatch) -> Tensor:
        """Features of the sound at frames, (B, T, dim), undefined beyond a clip's end."""
        states, lengths = self.encode(batch)
        if isinstance(self.sound, WindowEncoder):
            return self.sound.at_frames(states, lengths, batch.vertices.shape[1], self.fps)
        return self.sound(states)

    def read(self, batch: SpeechBatch) -> Tensor:
        """Features of the text at frames, (B, T, dim), undefined beyond a clip's end."""
        frames = batch.vertices.shape[1]
        clips = [self.words(batch, i) for i in range(len(batch))]
        states, _ = self.language([[word for word, _, _ in words] for words in clips], self.text_layers)
        # One scale for all layers of all language models.
        states = states.unflatten(-1, (-1, self.language.dim))
        states = pad(layer_norm(states, states.shape[-1:]).flatten(2), (0, 0, 0, 1))
        said = torch.stack([torch.from_numpy(words_at_frames(words, frames, self.fps)) for words in clips])
        said = said.masked_fill(~batch.frame_mask.cpu(), -1).to(states.device)
        silent = states.shape[1] - 1
        at_frames = states.take_along_dim(torch.where(said < 0, silent, said)[..., None], dim=1)
        return self.meaning(at_frames.mT).mT

    def words(self, batch: SpeechBatch, i: int) -> list[Word]:
        """Words of a clip with their times; with the transcript's punctuation where it has as many words."""
        timed, transcript = batch.words[i], batch.transcript[i]
        if not timed and transcript and not transcript.strip():
            return []  # a blank: known to be silent
        if not timed and not transcript:
            raise UserError(
                f"clip '{batch.key[i]}': neither transcript nor words, but {self.info.title} reads what is said; give "
                "a transcript or, better, a file of word times"
            )
        return timed_words(timed, transcript, int(batch.lengths[i]) / self.fps)


class Fusion(nn.Module):
    """Joins the features of sound and text.

    Args:
        dim: of both and of the result.
        kind: ``concat``, ``gated`` or ``tensor``.
    """

    def __init__(self, dim: int, kind: Fusing) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear((dim + 1) ** 2 if kind == "tensor" else 2 * dim, dim)

    def forward(self, sound: Tensor, text: Tensor) -> Tensor:
        """Two of (..., dim) -> (..., dim)."""
        if self.kind == "tensor":
            sound, text = pad(sound, (0, 1), value=1.0), pad(text, (0, 1), value=1.0)
            return self.linear((sound[..., :, None] * text[..., None, :]).flatten(-2))
        joined = self.linear(torch.cat([sound, text], dim=-1))
        return torch.lerp(sound, text, joined.sigmoid()) if self.kind == "gated" else joined


class TemporalDecoder(nn.Module):
    """Features of frames and a code of the manner in, vertex offsets out: residual dilated convolutions over time.

    Args:
        num_vertices: V of the mesh.
        code_size: length of the code of the manner.
        dim: width.
        layers: convolutions over three frames with dilations 1, 2, 4 ...
        dropout: while training.
    """

    def __init__(self, num_vertices: int, code_size: int, dim: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.style = nn.Linear(code_size, dim, bias=False)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(dim, dim, kernel_size=3, padding=2**i, dilation=2**i) for i in range(layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.offsets = nn.Linear(dim, num_vertices * 3)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offsets.bias)

    def forward(self, features: Tensor, style: Tensor, mask: Tensor) -> Tensor:
        """Offsets of all frames.

        Args:
            features: (B, T, dim).
            style: (B, code_size), who speaks and how.
            mask: (B, T) bool, True where a frame is real.

        Returns:
            (B, T, V, 3), undefined where a frame is not real.
        """
        x = (features + self.style(style)[:, None]).mT
        for convolution in self.convolutions:
            x = x + self.dropout(convolution(x.masked_fill(~mask[:, None], 0.0)).relu())
        return self.offsets(x.mT).unflatten(-1, (-1, 3))
