"""The tasks: what makes systems comparable. A system's file holds only its network, losses and optimisers.

A system derives from the abstract Lightning module of its task, sets :attr:`System.info` and implements the
one method the task asks for. Data checks, checkpoint identity, validation, test and prediction stand here.
"""

from abc import abstractmethod
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodules.batches import FaceBatch, SpeechBatch
from datamodules.errors import UserError
from metrics.motion import LipVertexError, MeanVertexError
from trainers import backbones

Task = Literal["text-to-face", "face-editing", "speech-to-mesh", "mesh-retargeting"]


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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Writes down whose checkpoint this is."""
        init = {name: value for name, value in self.hparams.items() if not name.startswith("_")}
        checkpoint["facebench"] = {"system": self.info.name, "init": init}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the checkpoint of another system.

        Raises:
            UserError: it is another system's.
        """
        found = checkpoint.get("facebench", {}).get("system")
        if found != self.info.name:
            raise UserError(f"checkpoint: is one of '{found}', expected '{self.info.name}'")


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
    system.load_state_dict(state["state_dict"])
    return system.eval()


class SpeechToMesh(System):
    """Speech to vertices.

    Args:
        num_vertices: V of the mesh.
        subjects: training subjects in the order of their one-hot codes.
        unseen: which training subject's style stands in for a speaker never seen: ``fixed:k``.
    """

    def __init__(self, num_vertices: int, subjects: list[str], unseen: str = "fixed:0") -> None:
        super().__init__()
        kind, _, number = unseen.partition(":")
        if kind != "fixed" or not number.isdigit() or int(number) >= len(subjects):
            raise UserError(f"model.unseen: '{unseen}', expected fixed:k with k below {len(subjects)}")
        self.num_vertices = num_vertices
        self.subjects = subjects
        self.unseen = unseen
        self.unseen_index = int(number)
        self.lip_error = LipVertexError(variant="l2")
        self.vertex_error = MeanVertexError()

    @abstractmethod
    def animate(self, batch: SpeechBatch) -> Tensor:
        """Animates ``batch.template`` by ``batch.audio`` for ``batch.lengths`` frames.

        Never looks at ``batch.vertices`` but for its number of frames.

        Returns:
            vertices: (B, T, V, 3) float32, metres; what lies beyond a clip's length is undefined.
        """

    def style_index(self, batch: SpeechBatch) -> Tensor:
        """(B,) int64: the training subject whose style to use."""
        return torch.where(batch.subject_index < 0, self.unseen_index, batch.subject_index)

    def setup(self, stage: str) -> None:
        """Compares the data with the network before any work.

        Raises:
            UserError: another mesh, or other training subjects.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.num_vertices != self.num_vertices:
            raise UserError(
                f"model.num_vertices: {self.num_vertices}, but {data.root} holds meshes of "
                f"{data.num_vertices} vertices; set it to {data.num_vertices} or use other data"
            )
        if stage == "fit" and data.train_subjects != self.subjects:
            raise UserError(
                f"model.subjects: {self.subjects}, but {data.root} trains on {data.train_subjects}; "
                "list the same names in the same order"
            )
        if "lips" not in data.regions:
            raise UserError(f"{data.root}: no region 'lips' to measure; build the shards with --regions.lips FILE")
        self.lips = torch.as_tensor(data.regions["lips"])
        in_metres = data.manifest.fields["unit"] == "metre"
        self.lip_error.scale = self.vertex_error.scale = 1e3 if in_metres else 1.0
        self.suffix = "_mm" if in_metres else ""

    def validation_step(self, batch: SpeechBatch, batch_idx: int) -> None:
        """Free-running: logs the lip-vertex error (L2, maximum over lips, mean over frames).

        In mm where the data is in metres, else in the data's own unit.
        """
        self._measure(batch, "val")

    def test_step(self, batch: SpeechBatch, batch_idx: int) -> None:
        """As validation, on the test split."""
        self._measure(batch, "test")

    def _measure(self, batch: SpeechBatch, split: str) -> None:
        predicted = self.animate(batch)
        for i in batch.real.nonzero()[:, 0].tolist():
            length = int(batch.lengths[i])
            self.lip_error.update(predicted[i, :length], batch.vertices[i, :length], self.lips)
            self.vertex_error.update(predicted[i, :length], batch.vertices[i, :length])
        self.log(f"{split}/lve_l2{self.suffix}", self.lip_error, batch_size=len(batch), prog_bar=True)
        self.log(f"{split}/mve{self.suffix}", self.vertex_error, batch_size=len(batch))

    def predict_step(self, batch: SpeechBatch, batch_idx: int) -> dict[str, Tensor]:
        """Key -> (T, V, 3) vertices in metres, of the real clips."""
        predicted = self.animate(batch)
        return {batch.key[i]: predicted[i, : batch.lengths[i]] for i in batch.real.nonzero()[:, 0].tolist()}


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
