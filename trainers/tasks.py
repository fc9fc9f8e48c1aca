"""The tasks: what makes systems comparable. A system's file holds only its network, losses and optimisers.

A system derives from the abstract Lightning module of its task, sets :attr:`System.info` and implements the
one method the task asks for. Data checks, checkpoint identity, validation, test and prediction stand here.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import MeanMetric

from datamodules.batches import FaceBatch, SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from metrics.motion import LipVertexError, MeanVertexError
from trainers import backbones
from trainers.features import matching_column
from trainers.nets.rig import load_rig
from trainers.nets.speech_encoder import SAMPLE_RATE, Alignment, TrainedPart

Condition = Literal["subject", "emotion", "intensity", "transcript", "words", "prompt", "prompt image", "reference"]
Task = Literal["text-to-face", "face-editing", "speech-to-mesh", "mesh-retargeting"]
# Levels of an emotion, as in MEAD.
INTENSITIES = 3
# The feature column of speech states that :meth:`SpeechToMesh.predictions` computes.
HEARD = "heard"
# Bytes of a frozen encoder's states that training keeps in memory.
KEPT_STATES = 4 << 30
# Seconds of a person that a system can adapt to.
SHORTEST_REFERENCE = 1.0


@dataclass(frozen=True)
class SystemInfo:
    """What a table says of a system.

    Attributes:
        name: the command-line and file name, ``faceformer``.
        title: the name to print, ``FaceFormer``; "after X" where the system is a reconstruction.
        task: the task whose contract it fulfils.
        paper: authors (first et al.), title, venue.
        year: of publication.
        url: of the paper.
        basis: what it follows: the official code, or the paper's description alone.
    """

    name: str
    title: str
    task: Task
    paper: str
    year: int
    url: str
    basis: Literal["official code", "reconstruction"]


class System(pl.LightningModule):
    """Base of every surveyed system.

    Constructor arguments must be plain numbers, strings, lists and dicts: they are stored in the checkpoint
    (``save_hyperparameters``) and rebuild the network. Pretrained parts come from :mod:`trainers.backbones` by
    specification, are listed in :attr:`frozen` and are not stored again.
    """

    info: ClassVar[SystemInfo]
    frozen: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # frozen parts are absent from checkpoints; see load_state_dict

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """All weights but those of the frozen backbones."""
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not self._is_frozen(key)}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads weights; every weight that is not a frozen backbone's must be there.

        Raises:
            UserError: the weights are those of another network.
        """
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [key for key in result.missing_keys if not self._is_frozen(key)]
        if missing or result.unexpected_keys:
            strange = (missing + list(result.unexpected_keys))[0]
            raise UserError(
                f"checkpoint: weights do not fit {self.info.title} ({len(missing)} missing, "
                f"{len(result.unexpected_keys)} unexpected, first '{strange}'); use the checkpoint's own config"
            )
        return result

    def _is_frozen(self, key: str) -> bool:
        return key.split(".", 1)[0] in self.frozen

    def train(self, mode: bool = True) -> "System":
        """Frozen backbones stay in evaluation mode."""
        super().train(mode)
        for name in self.frozen:
            getattr(self, name).eval()
        return self

    @cached_property
    def weights_taken(self) -> dict[str, str]:
        """Specification to hash of all pretrained weights that the system was built with."""
        return {spec: backbones.weight_hash(spec) for spec in backbones.named_in(self.hparams)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Writes down whose checkpoint this is, and which pretrained weights it goes with."""
        init = {name: value for name, value in self.hparams.items() if not name.startswith("_")}
        checkpoint["facebench"] = {"system": self.info.name, "init": init, "weights": self.weights_taken}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the checkpoint of another system, or of one with other pretrained weights.

        Raises:
            UserError: it is another system's, or the file of a frozen backbone has changed since.
        """
        stored = checkpoint.get("facebench", {})
        if stored.get("system") != self.info.name:
            raise UserError(f"checkpoint: is one of '{stored.get('system')}', expected '{self.info.name}'")
        # What is trained along is in the checkpoint, and where its training began no longer matters.
        for spec, trained_with in stored.get("weights", {}).items() if self.frozen else ():
            found = self.weights_taken.get(spec, trained_with)
            if found != trained_with:
                raise UserError(
                    f"checkpoint: goes with other weights than '{spec}' has now (SHA-256 {trained_with[:12]}, now "
                    f"{found[:12]}); bring the old ones back, or train again"
                )


def registry() -> dict[str, type[System]]:
    """All systems by name: our own and third parties', from the entry points ``facebench.systems``."""
    found = {point.name: point.load() for point in entry_points(group="facebench.systems")}
    return dict(sorted(found.items()))


def load_system(checkpoint: str | Path) -> System:
    """Rebuilds a trained system from a checkpoint, in evaluation mode on the CPU.

    Raises:
        UserError: no such file, not a facebench checkpoint, or a system that is not installed.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train one with 'facebench fit'")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        stored = state["facebench"]
    except Exception as error:
        raise UserError(f"{path}: not a readable facebench checkpoint ({type(error).__name__})") from error
    systems = registry()
    if stored["system"] not in systems:
        raise UserError(f"{path}: system '{stored['system']}' is not installed; known: {', '.join(systems)}")
    system = systems[stored["system"]](**stored["init"])
    system.on_load_checkpoint(state)
    system.load_state_dict(state["state_dict"])
    return system.eval()


class SpeechToMesh(System):
    """Speech to vertices.

    Args:
        num_vertices: V of the mesh; 0 for systems in the space of rig controls, on data without meshes.
        subjects: training subjects in the order of their one-hot codes.
        encoder: backbone specification of the speech encoder.
        alignment: how its states meet frames, see :data:`trainers.nets.speech_encoder.Alignment`.
        train_encoder: which part of it is trained, see :data:`trainers.nets.speech_encoder.TrainedPart`. A frozen
            encoder's states are computed once for a training clip, as far as memory goes, or read from a feature
            column of the data.
        unseen: whose style stands in for a speaker never seen: ``fixed:k``, the k-th training subject's;
            ``all-mean`` or ``best``, everybody's: a clip then has a prediction for each, and the protocol takes the
            mean of their errors, or the best one's.
        emotions: names of the emotions it is conditioned on, in the order of their codes; those of the data.
        samples: predictions to draw for each clip, where the system is stochastic.

    Attributes:
        conditions: what it takes beside sound and neutral mesh.
        draw: number of the sample that :meth:`animate` draws next, from 0; see :meth:`generators`.
    """

    conditions: ClassVar[tuple[Condition, ...]] = ("subject",)

    def __init__(
        self,
        num_vertices: int,
        subjects: list[str],
        encoder: str,
        alignment: Alignment,
        train_encoder: TrainedPart = "none",
        unseen: str = "fixed:0",
        emotions: list[str] | None = None,
        samples: int = 1,
    ) -> None:
        super().__init__()
        kind, _, number = unseen.partition(":")
        self.every_style = unseen in ("all-mean", "best")
        if not self.every_style and (kind != "fixed" or not number.isdigit() or int(number) >= len(subjects)):
            raise UserError(
                f"model.unseen: '{unseen}', expected fixed:k with k below {len(subjects)}, all-mean or best"
            )
        if self.every_style and samples > 1:
            raise UserError(
                f"model.samples: {samples}, but unseen '{unseen}' predicts one sample in every style; set it to 1"
            )
        self.num_vertices = num_vertices
        self.subjects = subjects
        self.unseen = unseen
        self.unseen_index = 0 if self.every_style else int(number)
        self.emotions = emotions or []
        self.samples = samples
        self.draw = 0
        self.lip_error = LipVertexError(variant="l2")
        self.vertex_error = MeanVertexError()
        self.alignment: Alignment = alignment
        self.train_encoder = train_encoder
        self.encoder = backbones.load(encoder, "speech")
        self.encoder.train_part(train_encoder)
        if train_encoder == "none":
            self.frozen = (*self.frozen, "encoder")
        self._encoder_spec = encoder
        self._column: str | None = None
        self._states: dict[str, Tensor] = {}
        self._kept_bytes = 0

    @property
    def frame_rate(self) -> float | None:
        """The one frame rate that the system is for; None where it takes any."""
        return 25.0 if self.alignment in ("pairs", "pair_states") else None

    def check_frame_rate(self, data: SpeechDataModule) -> None:
        """Compares the data's frame rate with the system's.

        Raises:
            UserError: they differ.
        """
        if self.frame_rate not in (None, data.fps):
            raise UserError(
                f"{data.root}: {data.fps:g} frames per second, but this {self.info.title} is for {self.frame_rate:g} "
                "(model.fps, or model.alignment: pairs and pair_states are for 25, others for any)"
            )

    @abstractmethod
    def animate(self, batch: SpeechBatch) -> Tensor:
        """Animates ``batch.template`` by ``batch.audio`` for ``batch.lengths`` frames.

        Never looks at ``batch.vertices``, ``weights`` or ``pose`` but for their number of frames. A clip gives the
        same alone and in any batch.

        Returns:
            vertices: (B, T, V, 3) float32, metres; what lies beyond a clip's length is undefined.
        """

    def adapt(self, reference: SpeechBatch) -> "SpeechToMesh":
        """A copy of the system that speaks like the person of the reference clips (one subject, with their motion).

        Raises:
            UserError: the system takes no reference clip.
        """
        raise UserError(f"{self.info.title}: takes no reference clip; it takes {', '.join(self.conditions)}")

    def check_reference(self, reference: SpeechBatch) -> None:
        """Refuses clips that no one could be known by.

        Raises:
            UserError: clips of several persons, or less than a second of them.
        """
        people = sorted(set(reference.subject))
        if len(people) != 1:
            raise UserError(f"reference: clips of {', '.join(people)}; expected one person's")
        seconds = int(reference.audio_lengths.sum()) / SAMPLE_RATE
        if seconds < SHORTEST_REFERENCE:
            raise UserError(
                f"reference: lasts {seconds:.2f} s, expected at least {SHORTEST_REFERENCE:g} s (about 10 s are best)"
            )

    def measurements(self, data: SpeechDataModule) -> dict[str, dict[str, float]]:
        """What the paper claims of this system, measured on the test split: series name -> clip -> number.

        Claims of a suite compare these series; see :mod:`sweeps.claims`.
        """
        return {}

    def encode(self, batch: SpeechBatch) -> tuple[Tensor, Tensor]:
        """States of the speech encoder.

        Returns:
            (B, N, D), undefined where padded, and how many of each clip are real, (B,) int64.
        """
        for column in (HEARD, self._column):
            if column in batch.features:
                return batch.features[column], batch.feature_lengths[column]
        if not self.training or self.train_encoder != "none":
            return self.encoder(batch.audio, batch.audio_lengths, self.alignment, batch.lengths)
        if not all(key in self._states for key in batch.key):
            with torch.no_grad():
                states, lengths = self.encoder(batch.audio, batch.audio_lengths, self.alignment, batch.lengths)
            if self._kept_bytes > KEPT_STATES:
                return states, lengths
            for key, clip, length in zip(batch.key, states, lengths.tolist(), strict=True):
                self._states[key] = clip[:length].cpu().clone()
                self._kept_bytes += self._states[key].nbytes
            if self._kept_bytes > KEPT_STATES:
                rank_zero_warn(
                    f"{self.info.title}: states of the frozen speech encoder fill {KEPT_STATES >> 30} GiB; those of "
                    "further clips are computed in every epoch. Compute all once with 'facebench data features'"
                )
        clips = [self._states[key].to(self.device) for key in batch.key]
        lengths = torch.tensor([len(clip) for clip in clips], device=self.device)
        return pad_sequence(clips, batch_first=True), lengths

    def style_index(self, batch: SpeechBatch) -> Tensor:
        """(B,) int64: the training subject whose style to use."""
        return torch.where(batch.subject_index < 0, self.unseen_index, batch.subject_index)

    def style(self, batch: SpeechBatch) -> Tensor:
        """One-hot codes of the speakers, (B, subjects) float32."""
        return one_hot(self.style_index(batch), len(self.subjects)).float()

    def emotion(self, batch: SpeechBatch) -> Tensor:
        """One-hot codes of the emotions, (B, emotions) float32.

        Raises:
            UserError: a clip's emotion is not known.
        """
        unknown = (batch.emotion < 0) & batch.real
        if unknown.any():
            key = batch.key[int(unknown.nonzero()[0])]
            raise UserError(f"clip '{key}': no emotion, but {self.info.title} takes one of {', '.join(self.emotions)}")
        return one_hot(batch.emotion.clamp(min=0), len(self.emotions)).float()

    def intensity(self, batch: SpeechBatch) -> Tensor:
        """One-hot codes of how strong the emotions are, (B, 3) float32.

        Raises:
            UserError: a clip's intensity is not known.
        """
        unknown = ((batch.intensity < 0) | (batch.intensity >= INTENSITIES)) & batch.real
        if unknown.any():
            key = batch.key[int(unknown.nonzero()[0])]
            raise UserError(f"clip '{key}': no intensity, but {self.info.title} takes one of 0, 1, 2")
        return one_hot(batch.intensity.clamp(min=0), INTENSITIES).float()

    def generators(self, batch: SpeechBatch) -> list[torch.Generator]:
        """One CPU generator for each clip: a clip's :attr:`draw`-th sample is the same in any batch and any run."""
        digests = (hashlib.sha256(f"{key}/{self.draw}".encode()).digest() for key in batch.key)
        return [torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1) for digest in digests]

    def setup(self, stage: str) -> None:
        """Compares the data with the network before any work, and looks whether it gives the encoder's states.

        Raises:
            UserError: another mesh or frame rate, other training subjects or emotions.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.num_vertices != self.num_vertices:
            raise UserError(
                f"model.num_vertices: {self.num_vertices}, but {data.root} holds meshes of "
                f"{data.num_vertices} vertices; set it to {data.num_vertices} or use other data"
            )
        self.check_frame_rate(data)
        if stage == "fit" and data.train_subjects != self.subjects:
            raise UserError(
                f"model.subjects: {self.subjects}, but {data.root} trains on {data.train_subjects}; "
                "list the same names in the same order"
            )
        if self.emotions and data.manifest.fields["emotions"] != self.emotions:
            raise UserError(
                f"model.emotions: {self.emotions}, but {data.root} has {data.manifest.fields['emotions']}; "
                "list the same names in the same order"
            )
        if self.num_vertices:
            self.lips = data.region("lips")
        in_metres = data.manifest.fields["unit"] == "metre"
        self.lip_error.scale = self.vertex_error.scale = 1e3 if in_metres else 1.0
        self.suffix = "_mm" if in_metres else ""
        if self.train_encoder == "none":
            self._column = matching_column(data, self._encoder_spec, "speech", self.alignment)

    def validation_step(self, batch: SpeechBatch, batch_idx: int) -> None:
        """Free-running: logs the lip-vertex error (L2, maximum over lips, mean over frames).

        In mm where the data is in metres, else in the data's own unit.
        """
        self._measure(batch, "val")

    def test_step(self, batch: SpeechBatch, batch_idx: int) -> None:
        """As validation, on the test split."""
        self._measure(batch, "test")

    def _measure(self, batch: SpeechBatch, split: str) -> None:
        # Of several samples the first is measured; of styles all: which is the best cannot be told without the truth.
        predicted = self.predictions(batch, self.animate) if self.every_style else self.animate(batch)[None]
        for i in batch.real.nonzero()[:, 0].tolist():
            truth = batch.vertices[i, : batch.lengths[i]]
            for clip in predicted[:, i, : batch.lengths[i]]:
                self.lip_error.update(clip, truth, self.lips)
                self.vertex_error.update(clip, truth)
        self.log(f"{split}/lve_l2{self.suffix}", self.lip_error, batch_size=len(batch), prog_bar=True)
        self.log(f"{split}/mve{self.suffix}", self.vertex_error, batch_size=len(batch))

    def predict_step(self, batch: SpeechBatch, batch_idx: int) -> dict[str, Tensor]:
        """Key -> (T, V, 3) vertices in metres of the real clips, or (S, T, V, 3) of several samples or styles.

        ``key.pose`` -> (T, 3) or (S, T, 3) likewise, of a system that turns the head: one that has ``head_pose``.
        """
        found = {"": self.predictions(batch, self.animate)}
        turn: Any = getattr(self, "head_pose", None)
        if turn is not None:
            found[".pose"] = self.predictions(batch, turn)
        return self.by_clip(batch, found)

    def by_clip(self, batch: SpeechBatch, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Ending -> (S, B, T, ...) as key with ending -> (T, ...), or (S, T, ...) where S is above 1."""
        clips = {}
        for i in batch.real.nonzero()[:, 0].tolist():
            for ending, values in found.items():
                clip = values[:, i, : batch.lengths[i]]
                clips[batch.key[i] + ending] = clip[0] if len(clip) == 1 else clip
        return clips

    def predictions(self, batch: SpeechBatch, function: Callable[[SpeechBatch], Tensor]) -> Tensor:
        """Every sample, or every training subject's style where the policy for unseen speakers asks for it.

        Args:
            batch: the clips.
            function: :meth:`animate`, or another that gives (B, T, ...).

        Returns:
            (S, B, T, ...).
        """
        # The encoder hears a clip once, however many predictions there are of it.
        states, lengths = self.encode(batch)
        batch = replace(
            batch,
            features={**batch.features, HEARD: states},
            feature_lengths={**batch.feature_lengths, HEARD: lengths},
        )
        if not self.every_style:
            return torch.stack([self._drawn(batch, function, number) for number in range(self.samples)])
        styles = (torch.full_like(batch.subject_index, number) for number in range(len(self.subjects)))
        return torch.stack([function(replace(batch, subject_index=style)) for style in styles])

    def _drawn(self, batch: SpeechBatch, function: Callable[[SpeechBatch], Tensor], number: int) -> Tensor:
        self.draw = number
        try:
            return function(batch)
        finally:
            self.draw = 0


class SpeechToRig(SpeechToMesh):
    """Speech to rig controls, and through a rig's linear basis to vertices.

    Args:
        rig: specification of the controls, see :func:`trainers.nets.rig.load_rig`.
        others: as in :class:`SpeechToMesh`.
    """

    def __init__(self, rig: str, num_vertices: int, subjects: list[str], **others: Any) -> None:
        super().__init__(num_vertices, subjects, **others)
        self.rig = load_rig(rig)
        self.frozen = (*self.frozen, "rig")
        self.control_error = MeanMetric()

    def check_reference(self, reference: SpeechBatch) -> None:
        """Also compares the controls.

        Raises:
            UserError: as in :meth:`SpeechToMesh.check_reference`, or other controls than the rig's.
        """
        super().check_reference(reference)
        if reference.weights.shape[-1] != len(self.rig.controls):
            raise UserError(
                f"reference: has {reference.weights.shape[-1]} controls, expected the {len(self.rig.controls)} of "
                "model.rig; fit them to the clips"
            )

    @abstractmethod
    def control(self, batch: SpeechBatch) -> Tensor:
        """As :meth:`animate`, but the values of the controls: (B, T, C) float32."""

    def animate(self, batch: SpeechBatch) -> Tensor:
        """The controls' mesh; see :meth:`SpeechToMesh.animate`."""
        return self.rig(batch.template, self.control(batch))

    def setup(self, stage: str) -> None:
        """Also compares the controls.

        Raises:
            UserError: the data has other controls, or a mesh that the rig does not move.
        """
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.check_controls(data)
        moved = 0 if self.rig.offsets is None else self.rig.offsets.shape[1]
        if self.num_vertices and moved != self.num_vertices:
            raise UserError(
                f"model.rig: moves {moved} vertices, but {data.root} holds meshes of {self.num_vertices}; name the rig "
                "of these meshes, or build the data without meshes"
            )

    def check_controls(self, data: SpeechDataModule) -> None:
        """Compares the names of the data's controls with the rig's.

        Raises:
            UserError: names the first that differs.
        """
        found, expected = data.manifest.fields["controls"], self.rig.controls
        if len(found) != len(expected):
            raise UserError(
                f"model.rig: {len(expected)} controls, but {data.root} has {len(found)}; name the data's rig"
            )
        for number, (there, here) in enumerate(zip(found, expected, strict=True)):
            if there != here:
                raise UserError(
                    f"model.rig: control {number} is '{here}', but '{there}' in {data.root}; name the data's rig"
                )

    def predict_step(self, batch: SpeechBatch, batch_idx: int) -> dict[str, Tensor]:
        """As :meth:`SpeechToMesh.predict_step`, and ``key.controls`` -> (T, C) or (S, T, C)."""
        controls = self.predictions(batch, self.control)
        found = {"": torch.stack([self.rig(batch.template, draw) for draw in controls]), ".controls": controls}
        turn: Any = getattr(self, "head_pose", None)
        if turn is not None:
            found[".pose"] = self.predictions(batch, turn)
        return self.by_clip(batch, found)

    def _measure(self, batch: SpeechBatch, split: str) -> None:
        if self.num_vertices:
            super()._measure(batch, split)
            return
        error = (self.control(batch) - batch.weights).abs().mean(-1)
        self.control_error.update(error[batch.frame_mask & batch.real[:, None]])
        self.log(f"{split}/control_error", self.control_error, batch_size=len(batch), prog_bar=True)


class FaceEditing(System):
    """Attribute editing in the latent space of a frozen StyleGAN2.

    Args:
        attributes: the attributes it can edit, CelebA names.
        strengths: the values its strength knob takes in a benchmark, weakest first.
        generator: backbone specification of the StyleGAN2 generator.
        inverter: backbone specification of the encoder image -> W+.
    """

    frozen: tuple[str, ...] = ("generator", "inverter")

    def __init__(self, attributes: list[str], strengths: list[float], generator: str, inverter: str) -> None:
        super().__init__()
        self.attributes = attributes
        self.strengths = strengths
        self.generator = backbones.load(generator, "generator")
        self.inverter = backbones.load(inverter, "inverter")

    @abstractmethod
    def edit(self, w_plus: Tensor, attribute: str, target: Tensor, strength: float) -> Tensor:
        """Moves codes toward (or away from) an attribute.

        Args:
            w_plus: (B, L, D) float32 codes.
            attribute: one of :attr:`attributes`.
            target: (B,) float32, +1 to give the attribute, -1 to take it away.
            strength: how far; the unit is the system's own, larger is stronger.

        Returns:
            (B, L, D) float32 edited codes.
        """

    def invert(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> W+ code (B, L, D)."""
        return self.inverter(image)

    def synthesise(self, w_plus: Tensor) -> Tensor:
        """W+ code (B, L, D) -> image (B, 3, H, W) clipped to [-1, 1], with constant noise."""
        return self.generator.synthesis(w_plus, noise_mode="const").clamp(-1, 1)

    def check_attribute(self, attribute: str) -> None:
        """Raises:
        UserError: the system does not edit this attribute.
        """
        if attribute not in self.attributes:
            raise UserError(f"attribute '{attribute}': this {self.info.title} edits {', '.join(self.attributes)}")

    def setup(self, stage: str) -> None:
        """Compares the data with the network before any work.

        Raises:
            UserError: another image size, or an attribute that the data does not label.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.size != self.generator.resolution:
            raise UserError(
                f"{data.root}: images of {data.size} pixels, but the generator makes {self.generator.resolution}; "
                "build the shards at that size or use another generator"
            )
        unknown = [name for name in self.attributes if name not in data.attributes]
        if unknown:
            raise UserError(f"model.attributes: {data.root} does not label {', '.join(unknown)}")

    def predict_step(self, batch: FaceBatch, batch_idx: int) -> dict[str, Tensor]:
        """Edits every attribute to the opposite of its label at every strength.

        Returns:
            ``inversion``: (B, 3, H, W), and for each attribute (S, B, 3, H, W), all in [-1, 1].
        """
        names = self.trainer.datamodule.attributes  # type: ignore[attr-defined]
        w_plus = self.invert(batch.image)
        result = {"inversion": self.synthesise(w_plus)}
        for attribute in self.attributes:
            target = 1 - 2 * batch.attributes[:, names.index(attribute)]
            edits = [self.synthesise(self.edit(w_plus, attribute, target, s)) for s in self.strengths]
            result[attribute] = torch.stack(edits)
        return result
