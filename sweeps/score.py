"""From a folder of predictions and a data set to scores under a protocol."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cleanfid.resize import make_resizer
from numpy.typing import ArrayLike
from torch import Tensor

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from datamodules.speech import SpeechDataModule
from metrics.alignment import chosen_caption
from metrics.editing import identity_similarity, mask_accuracy
from metrics.perceptual import pairwise_distance
from metrics.protocols import MEASURES, Protocol, lip_error_variants, read_region
from metrics.references import ReferenceKey, cached
from metrics.score_faces import (
    GeneratedImages,
    JudgedImages,
    score_editing,
    score_generation,
    score_inversion,
)
from metrics.score_speech import Clip, Judges, score_speech
from metrics.scoring import Scores
from sweeps.lip_sync import LipSyncJudge
from trainers import backbones
from trainers.nets.extractors import to_bytes
from trainers.predictions import read_curves, read_description, read_images, read_vertices

BATCH = 64
COORDINATES = {"metre": "m", "millimetre": "mm", "dimensionless": "normalised"}


def score(
    predictions: Path, root: str, protocol: Protocol, regions: Mapping[str, str] | None = None
) -> tuple[Scores, Protocol]:
    """Scores a folder of predictions.

    Args:
        predictions: as written by ``facebench predict``.
        root: folder of the data that was predicted.
        protocol: of the predictions' task.
        regions: for speech, name to file of vertex indices, in place of the data's own or besides them.

    Returns:
        the scores, and the protocol bound to regions and judges.

    Raises:
        UserError: predictions of another task, data or split than the protocol and ``root`` say.
    """
    description = read_description(predictions, protocol.task)
    path = predictions / "predictions.json"
    if description["split"] != protocol.spec["split"]:
        raise UserError(f"{path}: of split '{description['split']}', protocol scores '{protocol.spec['split']}'")
    if protocol.task == "speech-to-mesh":
        speech = SpeechDataModule(root, batch_size=1)
        _same_data(path, description["data"], speech.manifest.sha256, root)
        unseen = protocol.spec["unseen_speaker"]
        if unseen != "none" and description["unseen"] not in (None, unseen):
            raise UserError(
                f"{path}: unseen speakers as '{description['unseen']}', "
                f"protocol says '{unseen}'; predict again with model.unseen set to it"
            )
        return _score_speech(predictions, speech, protocol, regions or {})

    faces = FaceDataModule(root, batch_size=BATCH)
    _same_data(path, description["data"], faces.manifest.sha256, root)
    if protocol.task == "text-to-face":
        if description["caption"] != protocol.spec["caption"]:
            raise UserError(
                f"{path}: captions chosen as '{description['caption']}', protocol says '{protocol.spec['caption']}'; "
                "generate again from the captions that the protocol names"
            )
        return _score_generation(read_images(predictions), str(predictions), faces, protocol)
    protocol = _whole_split(protocol, faces)
    judges = ImageJudges(protocol)
    photos = judges.photos(faces)
    if description["keys"] != list(photos.key):
        raise UserError(f"{path}: {len(description['keys'])} images, protocol scores the first {len(photos.key)}")
    parts: dict[tuple[str, float], list[JudgedImages]] = defaultdict(list)
    for batch in read_images(predictions):
        keys, inversion = batch.pop("keys").tolist(), _images(batch.pop("inversion"))
        layers = judges.layers(inversion)
        parts["", 0.0].append(judges(keys, inversion, layers))
        for attribute, images in batch.items():
            for strength, edited in zip(description["strengths"], images, strict=True):
                parts[attribute, strength].append(judges(keys, _images(edited), layers))
    judged = {name: _joined(batches) for name, batches in parts.items()}
    inversions = judged.pop(("", 0.0))
    edits = ((attribute, strength, images) for (attribute, strength), images in judged.items())
    return score_editing(photos, inversions, edits, judges.protocol, judges.attributes), judges.protocol


def convert_lip_errors(
    predictions: Path, root: str, regions: Mapping[str, str] | None = None
) -> tuple[Scores, Protocol]:
    """Scores a folder of predicted motion by every variant of the lip vertex error.

    Args:
        predictions, root, regions: as in :func:`score`.

    Returns:
        the scores, named as in :func:`metrics.protocols.lip_error_variants`, and the protocol with the lips' hash.

    Raises:
        UserError: predictions of another task or data, or no lips.
    """
    description = read_description(predictions, "speech-to-mesh")
    speech = SpeechDataModule(root, batch_size=1)
    _same_data(predictions / "predictions.json", description["data"], speech.manifest.sha256, root)
    coordinates = _coordinates(speech)
    protocol = lip_error_variants(
        {
            "topology": speech.manifest.fields["topology"],
            "vertices": speech.num_vertices,
            "coordinates": coordinates,
            "unit": "normalised" if coordinates == "normalised" else "mm",
            "fps": speech.fps,
            "split": description["split"],
            "unseen_speaker": description["unseen"] or "none",  # a system that knows no speakers
        }
    )
    return _score_speech(predictions, speech, protocol, regions or {})


def _score_speech(
    predictions: Path, speech: SpeechDataModule, protocol: Protocol, regions: Mapping[str, str]
) -> tuple[Scores, Protocol]:
    here = {"topology": speech.manifest.fields["topology"], "coordinates": _coordinates(speech)}
    for field, found in here.items():
        if found != protocol.spec[field]:
            raise UserError(
                f"{speech.root}: {field} {found}, but protocol '{protocol.name}' is for {protocol.spec[field]}; "
                "score with a protocol of this data"
            )
    given = speech.regions | {name: read_region(name, file) for name, file in regions.items()}
    bound = bind_judges(protocol.bind_regions(given))

    def curves(key: str, kind: str) -> Tensor | None:
        array = read_curves(predictions, key, kind)
        return None if array is None else torch.from_numpy(array)

    clips = (
        replace(
            truth,
            predicted=torch.from_numpy(read_vertices(predictions, truth.key)),
            controls=curves(truth.key, "controls"),
            pose=curves(truth.key, "pose"),
        )
        for truth in truths(speech, protocol.spec["split"])
    )
    judges = speech_judges(bound, speech, given)
    return score_speech(clips, bound, given, speech.topology.get("triangles"), judges), bound


def speech_judges(protocol: Protocol, data: SpeechDataModule, regions: Mapping[str, ArrayLike]) -> Judges:
    """The networks that judge motion, as the protocol names them; ``data`` and ``regions`` say what is drawn for them.

    Raises:
        UserError: a judge of pictures, and a protocol that does not name the region of the face.
    """
    needed = {MEASURES[protocol.task][metric["measure"]].judge for metric in protocol.metrics.values()}
    lip_sync = None
    if "lip_sync" in needed:
        if "face" not in protocol.spec["regions"]:
            raise UserError(f"protocol '{protocol.name}': judges.lip_sync looks at region 'face'; name it in regions")
        network = backbones.load(protocol.spec["judges"]["lip_sync"]["name"], "lip_sync")
        lip_sync = LipSyncJudge(network, data, regions["face"])
    if "motion" not in needed:
        return Judges(lip_sync=lip_sync)
    network = backbones.load(protocol.spec["judges"]["motion"]["name"], "motion")

    @torch.inference_mode()
    def emotion(clip: Clip, vertices: Tensor) -> str:
        return network.emotions[int(network(vertices, clip.template).argmax())]

    @torch.inference_mode()
    def features(clip: Clip, vertices: Tensor) -> Tensor:
        return network.features(vertices, clip.template)

    return Judges(emotion, features, lip_sync)


def _coordinates(speech: SpeechDataModule) -> str:
    """The unit of the data's vertices as protocols name it."""
    unit = speech.manifest.fields["unit"]
    if unit not in COORDINATES:
        raise UserError(f"{speech.root}: in {unit}, which is not scored; expected {', '.join(COORDINATES)}")
    return COORDINATES[unit]


def truths(data: SpeechDataModule, split: str) -> Iterator[Clip]:
    """Every clip of a split, with the truth as its prediction."""
    for batch in data.loader(split):
        for i, key in enumerate(batch.key):
            vertices = batch.vertices[i, : batch.lengths[i]]
            controls, pose = batch.weights[i, : batch.lengths[i]], batch.pose[i, : batch.lengths[i]]
            number = int(batch.emotion[i])
            yield Clip(
                key=key,
                predicted=vertices,
                truth=vertices,
                template=batch.template[i],
                audio=batch.audio[i, : batch.audio_lengths[i]],
                phonemes=batch.phonemes[i],
                fps=data.fps,
                emotion=None if number < 0 else data.manifest.fields["emotions"][number],
                controls=controls,
                true_controls=controls,
                pose=pose,
                subject=batch.subject[i],
            )


def score_reconstruction(generator: str, inverter: str, root: str, protocol: Protocol) -> tuple[Scores, Protocol]:
    """Scores inversions without an edit: what an editor of this latent space starts from.

    Args:
        generator, inverter: backbone specifications.
        root: data folder.
        protocol: of the task face-editing.
    """
    judges = ImageJudges(_whole_split(protocol, FaceDataModule(root, batch_size=BATCH)))
    synthesis, invert = backbones.load(generator, "generator").synthesis, backbones.load(inverter, "inverter")
    faces = FaceDataModule(root, batch_size=BATCH)

    def reconstruct(image: Tensor) -> Tensor:
        return synthesis(invert(image), noise_mode="const").clamp(-1, 1)

    photos, inversions = judges.photos(faces), judges.photos(faces, reconstruct)
    return score_inversion(photos, inversions, judges.protocol, judges.attributes), judges.protocol


def score_photos(root: str, protocol: Protocol, change: Callable[[Tensor], Tensor]) -> tuple[Scores, Protocol]:
    """Scores what needs no generator, made from the photos that the captions are of.

    Args:
        root: data folder.
        protocol: of the task text-to-face.
        change: photos (B, 3, H, W) in [-1, 1] -> images (S, B, 3, H, W), S as the protocol says.
    """
    faces = FaceDataModule(root, batch_size=BATCH)
    protocol = _whole_split(protocol, faces)

    def images() -> Iterator[dict[str, np.ndarray]]:
        wanted = protocol.spec["images"]
        for batch in faces.loader(protocol.spec["split"]):
            number = min(wanted, len(batch.key))
            changed = to_bytes(change(batch.image[:number]).flatten(0, 1)).movedim(1, -1).numpy()
            yield {"keys": np.array(batch.key[:number]), "images": changed.reshape(-1, number, *changed.shape[1:])}
            wanted -= number
            if not wanted:
                return

    return _score_generation(images(), root, faces, protocol)


@torch.inference_mode()
def _score_generation(
    images: Iterable[dict[str, np.ndarray]], origin: str, faces: FaceDataModule, protocol: Protocol
) -> tuple[Scores, Protocol]:
    """One pass over the real and the generated images, in step, through every judge that the protocol names."""
    protocol = bind_judges(_whole_split(protocol, faces))
    spec = protocol.spec
    judges = {role: backbones.load(judge["name"], role) for role, judge in spec["judges"].items()}

    def real_features() -> Iterator[Tensor]:
        wanted = spec["reference_images"]
        for batch in faces.loader(spec["split"]):
            if wanted:
                image = batch.image[:wanted]
                wanted -= len(image)
                yield judges["features"].features(_resized(image, protocol))

    extractor = spec["judges"]["features"]["sha256"]
    identity = ReferenceKey(
        faces.manifest.sha256, spec["split"], spec["reference_images"], spec["image_size"], spec["resizer"], extractor
    )
    reference = cached(identity, real_features)

    samples = _samples(faces, spec["split"])
    keys: list[str] = []
    captions: list[str] = []
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for stored in images:
        number = len(stored["keys"])
        batch = list(islice(samples, number))
        if stored["keys"].tolist() != [sample.key for sample in batch]:
            raise UserError(
                f"{origin}: images from '{stored['keys'][0]}' on are not those of split '{spec['split']}' in its "
                "order; generate again from the data"
            )
        if len(stored["images"]) != spec["samples"]:
            raise UserError(f"{origin}: {len(stored['images'])} images of a caption, protocol scores {spec['samples']}")
        keys += [sample.key for sample in batch]
        chosen = [chosen_caption(sample.captions, sample.key, spec["caption"]) for sample in batch]
        captions += chosen
        generated = torch.stack([_resized(_images(images), protocol) for images in stored["images"]])
        real = _resized(torch.stack([sample.image for sample in batch]), protocol)
        parts["features"].append(judges["features"].features(generated[0]))
        if "clip" in judges:
            parts["image_embedding"].append(judges["clip"].encode_image(generated[0]))
            parts["text_embedding"].append(judges["clip"].encode_text(chosen))
        if "identity" in judges:
            embeddings = judges["identity"](real), judges["identity"](generated[0])
            parts["identity"].append(identity_similarity(*embeddings))
        if "perceptual" in judges:
            network = judges["perceptual"]
            parts["distance_to_real"].append(network.between(network.layers(generated[0]), network.layers(real)))
            if spec["samples"] > 1:
                pairs = [pairwise_distance(network, images) for images in generated.unbind(1)]
                parts["diversity"].append(torch.stack(pairs))
        if "landmarks" in judges:
            truth = torch.stack([sample.landmarks for sample in batch]) * (spec["image_size"] / faces.size)
            parts["landmarks"].append(torch.stack([judges["landmarks"](generated[0]), truth], 1))
        if "parser" in judges:
            parsed = _in_classes(judges["parser"](generated[0]), judges["parser"].parts, faces)
            masks = torch.stack([sample.mask for sample in batch])[:, None]
            asked = F.interpolate(masks, generated.shape[-2:], mode="nearest-exact")[:, 0]
            parts["mask_accuracy"].append(mask_accuracy(parsed, asked))
    seen = GeneratedImages(keys, captions, extractor, **{name: torch.cat(values) for name, values in parts.items()})
    return score_generation(reference, seen, protocol), protocol


@dataclass(frozen=True)
class _Sample:
    """One real image, its captions, its landmarks and its mask."""

    key: str
    image: Tensor
    captions: list[str]
    landmarks: Tensor
    mask: Tensor


def _samples(faces: FaceDataModule, split: str) -> Iterator[_Sample]:
    for batch in faces.loader(split):
        for i, key in enumerate(batch.key):
            yield _Sample(key, batch.image[i], batch.captions[i], batch.landmarks[i], batch.mask[i])


def _in_classes(parsed: Tensor, parts: list[str], faces: FaceDataModule) -> Tensor:
    """A parser's numbers of parts as the numbers that the data's masks use.

    Raises:
        UserError: the data has no masks, or they have other classes.
    """
    classes = faces.manifest.fields["mask_classes"]
    if not classes:
        raise UserError(f"{faces.root}: has no masks, which mask accuracy compares with; score without judges.parser")
    missing = [part for part in parts if part not in classes]
    if missing:
        raise UserError(f"{faces.root}: masks of {', '.join(classes)}, but judges.parser sees '{missing[0]}' as well")
    return torch.tensor([classes.index(part) for part in parts], device=parsed.device)[parsed]


def _resized(images: Tensor, protocol: Protocol) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] at the protocol's size, by clean-fid's resizer and rounded to 8 bits."""
    size = protocol.spec["image_size"]
    if images.shape[-2] != images.shape[-1]:
        raise UserError(f"images of {images.shape[-2]} x {images.shape[-1]} pixels, expected square ones")
    if images.shape[-1] == size:
        return images
    library, kernel = protocol.spec["resizer"].split()
    resize = make_resizer(library, True, kernel, (size, size))
    return _images(np.stack([resize(pixels) for pixels in to_bytes(images).movedim(1, -1).numpy()]))


def _whole_split(protocol: Protocol, faces: FaceDataModule) -> Protocol:
    """A protocol that leaves the number of images open scores the whole split."""
    number = sum(len(shard.keys) for shard in faces.manifest.split(protocol.spec["split"]))
    fields = [name for name in ("images", "reference_images") if protocol.spec.get(name, 0) is None]
    return protocol.bind(dict.fromkeys(fields, number))


def bind_judges(protocol: Protocol) -> Protocol:
    """Binds the hash of every judge's weights.

    Raises:
        UserError: weights that cannot be had; says how to get them.
    """
    judges = protocol.spec.get("judges", {}).items()
    hashes = {f"judges.{role}.sha256": backbones.judge_hash(judge["name"], role) for role, judge in judges}
    return protocol.bind(hashes)


class ImageJudges:
    """The networks that judge edited images, as the protocol names them.

    Attributes:
        protocol: bound to the judges' weights.
        attributes: what the attribute judge knows.
    """

    def __init__(self, protocol: Protocol) -> None:
        named = {role: judge["name"] for role, judge in protocol.spec["judges"].items()}
        self.protocol = bind_judges(protocol)
        self.classifier = backbones.load(named["attributes"], "attributes")
        self.identity = backbones.load(named["identity"], "identity")
        shared = named["features"] == named["attributes"]
        self.extractor = self.classifier if shared else backbones.load(named["features"], "features")
        self.perceptual = backbones.load(named["perceptual"], "perceptual") if "perceptual" in named else None
        self.attributes: list[str] = self.classifier.attributes  # type: ignore[assignment]

    @torch.inference_mode()
    def layers(self, images: Tensor) -> list[Tensor] | None:
        """What the perceptual judge sees in images (N, 3, H, W) in [-1, 1]; None without such a judge."""
        return None if self.perceptual is None else self.perceptual.layers(images)

    @torch.inference_mode()
    def __call__(self, keys: list[str], images: Tensor, inversion: list[Tensor] | None = None) -> JudgedImages:
        """Judges images (N, 3, H, W) in [-1, 1], with what the perceptual judge sees in their inversions.

        Raises:
            UserError: images of another size than the protocol's.
        """
        size = self.protocol.spec["image_size"]
        if images.shape[-2:] != (size, size):
            raise UserError(
                f"images of {images.shape[-1]} x {images.shape[-2]} pixels, protocol '{self.protocol.name}' scores "
                f"{size} x {size}: another size gives other scores; build the data with --size {size}"
            )
        perceptual = None
        if self.perceptual is not None and inversion is not None:
            perceptual = self.perceptual.between(self.perceptual.layers(images), inversion)
        features = self.extractor.features(images)
        shared = self.extractor is self.classifier
        logits = self.classifier.classify(features) if shared else self.classifier(images)
        return JudgedImages(
            key=keys,
            probabilities=logits.sigmoid(),
            identity=self.identity(images),
            features=features,
            perceptual=perceptual,
        )

    @torch.inference_mode()
    def photos(self, data: FaceDataModule, change: Callable[[Tensor], Tensor] | None = None) -> JudgedImages:
        """Judges the first photos of the protocol's split, as many as it says, after an optional change."""
        wanted, parts = self.protocol.spec["images"], []
        for batch in data.loader(self.protocol.spec["split"]):
            number = min(wanted, len(batch.key))
            image = batch.image[:number]
            if change is None:
                parts.append(self(batch.key[:number], image))
            else:
                changed = change(image)
                parts.append(self(batch.key[:number], changed, self.layers(changed)))
            wanted -= number
            if not wanted:
                return _joined(parts)
        raise UserError(f"{data.root}: {wanted} images fewer than protocol '{self.protocol.name}' scores")


def _images(pixels: object) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1]."""
    return torch.as_tensor(pixels).movedim(-1, 1).float() / 127.5 - 1


def _joined(parts: list[JudgedImages]) -> JudgedImages:
    perceptual = [part.perceptual for part in parts]
    return JudgedImages(
        key=[key for part in parts for key in part.key],
        probabilities=torch.cat([part.probabilities for part in parts]),
        identity=torch.cat([part.identity for part in parts]),
        features=torch.cat([part.features for part in parts]),
        perceptual=None if None in perceptual else torch.cat([part for part in perceptual if part is not None]),
    )


def _same_data(path: Path, predicted: str, given: str, root: str) -> None:
    if predicted != given:
        raise UserError(f"{path}: predicted from other data than {root}; give the data that was predicted")
