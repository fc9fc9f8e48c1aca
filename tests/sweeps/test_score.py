"""Generated and edited faces on disk, through judges, to scores: on tiny images and tiny random judges."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from cleanfid import fid as cleanfid
from cleanfid.resize import make_resizer

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from metrics.protocols import Protocol
from sweeps.score import score
from trainers import backbones


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FACEBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


def images_of(root):
    data = FaceDataModule(str(root), batch_size=100)
    (batch,) = data.loader("test")
    return data.manifest.sha256, batch


@pytest.fixture
def protocol(tmp_path, tiny):
    spec = Protocol.read("demo-generation").spec
    spec |= {"images": None, "reference_images": None, "image_size": 32}
    kinds = {"features": "attributes", "identity": "identity", "perceptual": "perceptual"}
    spec["judges"] = {role: {"name": tiny[kind], "sha256": None} for role, kind in kinds.items()}
    spec["metrics"]["fid"]["jackknife_groups"] = 4
    spec["metrics"]["fid_50"]["images"] = 6
    spec["metrics"]["density"]["k"] = spec["metrics"]["coverage"]["k"] = 3
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(spec))
    return Protocol.read(path)


def write(folder, root, size=32, keys=None, samples=2, **changes):
    """Predictions of noise, in two batches."""
    sha256, batch = images_of(root)
    keys = keys or batch.key
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (samples, len(keys), size, size, 3), np.uint8)
    folder.mkdir(exist_ok=True)
    for i, part in enumerate((slice(0, 5), slice(5, None))):
        np.savez(folder / f"batch-{i:05d}.npz", keys=np.array(keys[part]), images=pixels[:, part])
    description = {"task": "text-to-face", "system": "x", "title": "X", "data": sha256, "split": "test"}
    description |= {"keys": keys, "caption": "fixed:0"} | changes
    (folder / "predictions.json").write_text(json.dumps(description))
    return batch, pixels


def as_images(pixels):
    return torch.from_numpy(pixels).movedim(-1, -3).float() / 127.5 - 1


def test_generated_faces_are_scored(tmp_path, faces_root, protocol, tiny, cache):
    batch, pixels = write(tmp_path / "predictions", faces_root)
    scores, bound = score(tmp_path / "predictions", str(faces_root), protocol)
    assert bound.spec["images"] == bound.spec["reference_images"] == 8
    assert bound.id.startswith("demo-generation-")
    extractor = backbones.load(tiny["attributes"], "features")
    network = backbones.load(tiny["perceptual"], "perceptual")
    identity = backbones.load(tiny["identity"], "identity")
    first, second = as_images(pixels)
    with torch.inference_mode():
        expected = cleanfid.fid_from_feats(extractor.features(batch.image).numpy(), extractor.features(first).numpy())
        lpips, diversity = network(first, batch.image), network(first, second)
        same = F.cosine_similarity(identity(first), identity(batch.image))
    assert scores.metrics["fid"]["value"] == pytest.approx(expected, rel=1e-5)
    assert list(scores.metrics["lpips"]["per_sample"].values()) == pytest.approx(lpips.tolist(), rel=1e-5)
    assert list(scores.metrics["diversity"]["per_sample"].values()) == pytest.approx(diversity.tolist(), rel=1e-5)
    assert list(scores.metrics["identity"]["per_sample"]) == batch.key
    assert scores.metrics["identity"]["value"] == pytest.approx(same.mean().item(), rel=1e-5)
    assert len(list(cache.iterdir())) == 1


def test_masks_are_compared_with_what_a_parser_sees(tmp_path, faces_root, protocol, monkeypatch):
    class Halves(torch.nn.Module):
        """Sees skin on the left, and background on the right."""

        parts = ("skin", "background")

        def forward(self, image):
            parsed = torch.ones(len(image), *image.shape[-2:], dtype=torch.int64)
            parsed[:, :, : image.shape[-1] // 4] = 0
            return parsed

    load = backbones.load
    monkeypatch.setattr(backbones, "load", lambda spec, kind: Halves() if kind == "parser" else load(spec, kind))
    judges = protocol.spec["judges"] | {"parser": {"name": "hub:halves", "sha256": None}}
    asked = {"masks": {"measure": "mask_accuracy"}, "fid": protocol.metrics["fid"]}
    protocol = replace(protocol, spec={**protocol.spec, "judges": judges, "metrics": asked})
    write(tmp_path / "predictions", faces_root)
    with pytest.raises(UserError, match=r"masks of background, but judges.parser sees 'skin' as well"):
        score(tmp_path / "predictions", str(faces_root), protocol)
    Halves.parts = ("background", "background")
    assert score(tmp_path / "predictions", str(faces_root), protocol)[0].metrics["masks"]["value"] == 1
    root = shutil.copytree(faces_root, tmp_path / "faces")
    manifest = root / "manifest.json"
    manifest.write_text(manifest.read_text().replace('["background"]', '["background", "skin"]'))
    data = FaceDataModule(str(root), batch_size=1).manifest.sha256
    write(tmp_path / "predictions", root, data=data)
    Halves.parts = ("skin", "background")  # and the masks are all background
    assert score(tmp_path / "predictions", str(root), protocol)[0].metrics["masks"]["value"] == 0.75


def test_the_real_side_is_computed_once(tmp_path, faces_root, protocol, monkeypatch):
    write(tmp_path / "predictions", faces_root)
    first, _ = score(tmp_path / "predictions", str(faces_root), protocol)
    monkeypatch.setattr("metrics.references.mean_and_covariance", None)  # cannot be computed again
    again, _ = score(tmp_path / "predictions", str(faces_root), protocol)
    assert again.metrics == first.metrics


def test_images_of_another_size_are_resized_as_clean_fid_does(tmp_path, faces_root, protocol, tiny):
    batch, pixels = write(tmp_path / "predictions", faces_root, size=48)
    scores, _ = score(tmp_path / "predictions", str(faces_root), protocol)
    resize = make_resizer("PIL", True, "bicubic", (32, 32))
    small = as_images(np.stack([resize(image) for image in pixels[0]]))
    network = backbones.load(tiny["perceptual"], "perceptual")
    with torch.inference_mode():
        expected = network(small, batch.image)
    assert list(scores.metrics["lpips"]["per_sample"].values()) == pytest.approx(expected.tolist(), rel=1e-5)


def test_bad_predictions(tmp_path, faces_root, protocol):
    folder = tmp_path / "predictions"
    batch, _ = write(folder, faces_root, caption="fixed:1")
    with pytest.raises(UserError, match="captions chosen as 'fixed:1', protocol says 'fixed:0'"):
        score(folder, str(faces_root), protocol)
    write(folder, faces_root, keys=batch.key[::-1])
    with pytest.raises(UserError, match="images from 'face-037' on are not those of split 'test'"):
        score(folder, str(faces_root), protocol)
    write(folder, faces_root, samples=1)
    with pytest.raises(UserError, match="1 images of a caption, protocol scores 2"):
        score(folder, str(faces_root), protocol)
    write(folder, faces_root, split="val")
    with pytest.raises(UserError, match="of split 'val', protocol scores 'test'"):
        score(folder, str(faces_root), protocol)


@pytest.mark.parametrize(
    ("role", "name", "message"),
    [
        ("features", "path:weights/inception-2015-12-05.pt", "no such weights; clean-fid downloads it"),
        ("features", "hub:vgg", "unknown feature extractor; expected path:"),
        ("perceptual", "demo:nothing", "no such weights; demo weights here"),
    ],
)
def test_a_judge_that_cannot_be_had(tmp_path, faces_root, protocol, role, name, message):
    write(tmp_path / "predictions", faces_root)
    protocol.spec["judges"][role]["name"] = name
    with pytest.raises(UserError, match=message):
        score(tmp_path / "predictions", str(faces_root), protocol)


def test_edited_faces_are_scored_over_the_whole_split(tmp_path, faces_root, tiny):
    sha256, batch = images_of(faces_root)
    spec = Protocol.read("demo-editing").spec | {"images": None, "image_size": 32}
    roles = {"attributes": "attributes", "identity": "identity", "features": "attributes", "perceptual": "perceptual"}
    spec["judges"] = {role: {"name": tiny[kind], "sha256": None} for role, kind in roles.items()}
    spec["metrics"]["fid"]["jackknife_groups"] = 4
    spec["matched_accuracy"] = 0.0  # reached without an edit: the values are those of the inversion
    folder = tmp_path / "predictions"
    folder.mkdir()
    pixels = ((batch.image + 1) * 127.5).round().byte().movedim(1, -1).numpy()
    edits = dict.fromkeys(spec["attributes"], 255 - pixels[None])
    np.savez(folder / "batch-00000.npz", keys=np.array(batch.key), inversion=pixels, **edits)
    description = {"task": "face-editing", "data": sha256, "split": "test", "keys": batch.key, "strengths": [1.0]}
    (folder / "predictions.json").write_text(json.dumps(description))
    scores, bound = score(folder, str(faces_root), Protocol("demo-editing", "face-editing", spec))
    assert bound.spec["images"] == 8
    assert scores.metrics["lpips"]["value"] == 0
    assert scores.metrics["identity"]["value"] == pytest.approx(1, abs=1e-6)
    edited = [row for row in scores.curve if row["strength"] == 1.0]
    network = backbones.load(tiny["perceptual"], "perceptual")
    with torch.inference_mode():
        expected = network(as_images(255 - pixels), as_images(pixels)).mean().item()
    assert [row["lpips"] for row in edited] == pytest.approx([expected] * 3, rel=1e-5)
