"""The one place that resolves pretrained networks.

A specification is ``demo:<name>`` (small weights that ship with facebench, trained by it on the demo corpus),
``path:<file>`` (a safetensors file written by :func:`save`) or ``hub:<name>`` (transformers, lpips). What cannot
be had is an error that says what to do; nothing is ever replaced by random weights.

The kinds, and what each gives:

=============  ==========================================================================================
``generator``   :class:`trainers.nets.stylegan2.Generator`
``inverter``    image (B, 3, H, W) in [-1, 1] -> W+ (B, L, D)
``attributes``  image -> logits (B, A), names in ``.attributes``
``identity``    image -> unit vectors (B, d)
``perceptual``  two images -> distance (B,); ``.layers`` of an image, distance ``.between`` two images' layers
``features``    ``.features``: image -> (B, d), for distances of two sets; any attribute classifier has them too
``clip``        ``.encode_image``: image -> (B, D); ``.encode_text``: captions -> (B, D)
``landmarks``   image -> (B, 68, 2), x and y in pixels
``parser``      image -> (B, H, W) int64, a part of the face for each pixel, names in ``.parts``
``speech``      :class:`trainers.nets.speech_encoder.SpeechEncoder`; ``mel:80`` gives log-mel energies in its form
``text``        :class:`trainers.nets.text_encoder.TextEncoder`: lists of words -> one state for each word
                (``mel100:80`` those of :class:`trainers.nets.audio_windows.WindowMel`, at 100 Hz)
``motion``      :class:`trainers.nets.motion_judge.MotionJudge`: vertices of a clip -> logits of emotions, features
``lip_sync``    :class:`trainers.nets.syncnet.SyncNet`: pictures of a face and sound -> embeddings of both
=============  ==========================================================================================

The encoder that guides a training and the one that judges its result are different networks, always:
:func:`check_judge` holds that.
"""

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from datamodules.errors import UserError
from datamodules.shards import file_sha256
from trainers.nets.audio_windows import WindowMel
from trainers.nets.speech_encoder import MelEncoder

WEIGHTS = Path(__file__).parent / "weights"

# A file says its kind, never its class: a downloaded file cannot name code to be run.
CLASSES = {
    "generator": "trainers.nets.stylegan2:Generator",
    "inverter": "trainers.nets.inverter:InversionEncoder",
    "attributes": "trainers.nets.face_encoders:AttributeClassifier",
    "identity": "trainers.nets.face_encoders:IdentityEncoder",
    "perceptual": "trainers.nets.face_encoders:PerceptualDistance",
    "speech": "trainers.nets.speech_encoder:SpeechEncoder",
    "text": "trainers.nets.text_encoder:TextEncoder",
    "features": "trainers.nets.extractors:InceptionFeatures",
    "clip": "trainers.nets.extractors:CLIPEncoder",
    "landmarks": "trainers.nets.extractors:DlibLandmarks",
    "parser": "trainers.nets.extractors:FaceParser",
    "motion": "trainers.nets.motion_judge:MotionJudge",
    "lip_sync": "trainers.nets.syncnet:SyncNet",
}

# How to get weights that others publish, by file name.
PUBLISHED = {
    "inception-2015-12-05.pt": "clean-fid downloads it: cleanfid.downloads_helper.check_download_inception('FOLDER')",
    "shape_predictor_68_face_landmarks.dat": "dlib publishes it; hub:dlib-68 takes it from facebench[dlib]",
    "syncnet_v2.model": "its authors publish it: download_model.sh of github.com/joonson/syncnet_python",
}


def load(spec: str, kind: str) -> Any:
    """Builds a pretrained network, frozen and in evaluation mode.

    Raises:
        UserError: a specification of another form, a missing file, or weights of another kind.
    """
    source, _, name = spec.partition(":")
    if source == "hub":
        network = _class(kind).from_hub(name)
    elif (source, kind) == ("mel", "speech"):
        network = MelEncoder.from_name(name)
    elif (source, kind) == ("mel100", "speech"):
        network = WindowMel.from_name(name)
    elif source in ("demo", "path"):
        path = find(spec)
        foreign = source == "path" and (Path(name).is_dir() or path.suffix != ".safetensors")
        read = getattr(_class(kind), "from_file", None) if foreign else None
        network = _load_file(path, kind) if read is None else read(path)
    else:
        raise UserError(f"backbone '{spec}': expected demo:<name>, path:<file> or hub:<name>")
    return network.eval().requires_grad_(False)


def find(spec: str) -> Path:
    """The file behind ``demo:<name>`` or ``path:<file>``; of a folder its ``model.safetensors``.

    Raises:
        UserError: there is none.
    """
    source, _, name = spec.partition(":")
    path = WEIGHTS / f"{name}.safetensors" if source == "demo" else Path(name)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in WEIGHTS.glob("*.safetensors")))
        advice = PUBLISHED.get(path.name, "download it or train it with 'facebench fit'")
        hint = f"demo weights here: {known}" if source == "demo" else advice
        raise UserError(f"backbone '{spec}': no such weights; {hint}")
    return path


def weight_hash(spec: str) -> str:
    """SHA-256 of the weights, part of every protocol that uses them; ``hub:`` and ``mel:`` stand for themselves."""
    return spec if spec.startswith(("hub:", "mel:", "mel100:")) else file_sha256(find(spec))


def named_in(config: Any) -> Iterator[str]:
    """All specifications in a config, or in a system's arguments."""
    if isinstance(config, Mapping):
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from named_in(value)
    elif isinstance(config, str) and config.startswith(("demo:", "path:", "hub:")):
        yield config


def judge_hash(spec: str, kind: str) -> str:
    """As :func:`weight_hash`; of a hub network the SHA-256 of the weights it has on this machine, whatever its name."""
    return _hub_hash(spec, kind) if spec.startswith("hub:") else weight_hash(spec)


@lru_cache
def _hub_hash(spec: str, kind: str) -> str:
    state = load(spec, kind).state_dict()
    if not state:  # dlib's predictors have no weights that PyTorch knows
        return spec
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def kind_of(spec: str) -> str:
    """The kind that the weights say they are.

    Raises:
        UserError: there is no such file, or a hub name, whose kind nobody has written down.
    """
    if spec.startswith("hub:"):
        raise UserError(f"backbone '{spec}': of what kind? give --kind, one of {', '.join(CLASSES)}")
    return _read_metadata(find(spec))["kind"]


def card(spec: str) -> dict[str, Any]:
    """What the weights say of themselves: config, code commit, data and scores."""
    return _read_metadata(find(spec))["card"]


def check_judge(guide: str, judge: str) -> None:
    """Raises:
    UserError: judge and guide are the same weights.
    """
    if weight_hash(guide) == weight_hash(judge):
        raise UserError(f"judge '{judge}' is the network that guided the training; judge with another one")


def save(network: nn.Module, path: Path, kind: str, init: dict[str, Any], card: dict[str, Any]) -> None:
    """Writes a network as safetensors with its kind, constructor arguments and card, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    state = {key: value.detach().cpu().contiguous().clone() for key, value in network.state_dict().items()}
    described = json.dumps({"kind": kind, "init": init, "card": card}, sort_keys=True)
    save_file(state, partial, metadata={"facebench": described})
    partial.replace(path)


def _load_file(path: Path, kind: str) -> nn.Module:
    metadata = _read_metadata(path)
    # An attribute classifier gives features as well.
    if (metadata["kind"], kind) != ("attributes", "features") and metadata["kind"] != kind:
        raise UserError(f"{path}: weights of kind '{metadata['kind']}', expected '{kind}'")
    make = _class(metadata["kind"])
    network = getattr(make, "from_config", make)(**metadata["init"])
    with safe_open(path, framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path}: weights do not fit their description; download or train them again") from error
    return network


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["facebench"])
    except (SafetensorError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not weights written by facebench ({type(error).__name__})") from error


def _class(kind: str) -> Any:
    if kind not in CLASSES:
        raise UserError(f"backbone kind '{kind}': expected one of {', '.join(CLASSES)}")
    module, _, name = CLASSES[kind].partition(":")
    return getattr(importlib.import_module(module), name)
