import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from datamodules.errors import UserError
from metrics.alignment import caption_numbers, r_precision
from metrics.distribution import (
    frechet_distance,
    jackknife_groups,
    kernel_distance,
    mean_and_covariance,
    neighbour_scores,
)
from metrics.protocols import Protocol
from metrics.references import Reference, ReferenceKey
from metrics.score_faces import GeneratedImages, JudgedImages, score_editing, score_generation, score_inversion

ATTRIBUTES = ["Young", "Eyeglasses", "Male"]
KEYS = [f"photo-{i}" for i in range(4)]


def editing_protocol(images=4):
    protocol = Protocol.read("demo-editing")
    spec = copy.deepcopy({**protocol.spec, "images": images})
    spec["metrics"]["fid"]["jackknife_groups"] = 2
    return Protocol(protocol.name, protocol.task, spec)


def judged(flipped, angle, attribute=None, shift=0.0):
    """Photos are all without attributes; the first ``flipped`` images gain one; identity is turned by an angle."""
    probabilities = torch.full((4, 3), 0.1)
    if attribute:
        probabilities[:flipped, ATTRIBUTES.index(attribute)] = 0.9
    radians = torch.deg2rad(torch.tensor(float(angle)))
    identity = torch.stack([radians.cos(), radians.sin()]).expand(4, 2)
    features = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]]) + shift
    return JudgedImages(KEYS, probabilities, identity, features, torch.full((4,), float(angle) / 100))


def edits(most=4):
    for attribute in ("Eyeglasses", "Male", "Young"):
        yield attribute, 1.0, judged(2, 60, attribute, shift=1.0)
        yield attribute, 2.0, judged(most, 90, attribute, shift=2.0)


def test_editing_scores_by_hand():
    scores = score_editing(judged(0, 0), judged(0, 0), edits(), editing_protocol(), ATTRIBUTES)
    # Accuracy 0, 0.5, 1 at strengths 0, 1, 2: 0.9 lies at four fifths of the second step.
    assert scores.metrics["identity"]["value"] == pytest.approx(0.5 * 0.2, abs=1e-6)
    assert scores.metrics["identity"]["per_sample"] == pytest.approx(dict.fromkeys(KEYS, 0.1), abs=1e-6)
    assert scores.metrics["preservation"]["value"] == 1
    assert scores.metrics["accuracy"]["value"] == 1
    # The features are shifted by (1, 1) and (2, 2): distance 2 and 8.
    assert scores.metrics["fid"]["value"] == pytest.approx(0.2 * 2 + 0.8 * 8)
    assert scores.metrics["fid"]["per_sample"] == {}
    assert scores.metrics["lpips"]["value"] == pytest.approx(0.2 * 0.6 + 0.8 * 0.9, abs=1e-6)
    # Identity falls from 1 to 0.5 at an accuracy of 0.5, and to 0.1 at 0.9.
    area = (0.5 * 0.75 + 0.4 * 0.3) / 0.9
    assert scores.metrics["identity_area"]["value"] == pytest.approx(area, abs=1e-6)
    assert scores.metrics["identity_area"]["per_sample"] == pytest.approx(dict.fromkeys(KEYS, area), abs=1e-6)
    assert scores.metrics["identity_area"]["higher_is_better"] is True
    assert scores.metrics["preservation_area"]["value"] == pytest.approx(1)
    # Each photo's part: the first two are edited at strength 1 already. From 0.5 to 1 the identity falls by 1 a unit
    # of accuracy, so photos above the mean accuracy of 0.9 raise it, by 0.1, and the others lower it by as much.
    drawn = [0.1 + 0.1, 0.1 + 0.1, 0.1 - 0.1, 0.1 - 0.1]
    assert list(scores.metrics["identity"]["drawn"].values()) == pytest.approx(drawn, abs=1e-6)
    assert [row["accuracy"] for row in scores.curve if row["attribute"] == "Male"] == [0, 0.5, 1]
    assert len(scores.curve) == 9


def test_standard_error_of_fid_is_a_jackknife_from_scratch():
    photos, protocol = judged(0, 0), editing_protocol()
    found = score_editing(photos, photos, edits(), protocol, ATTRIBUTES).metrics["fid"]["standard_error"]
    groups = jackknife_groups(4, 2)
    left_out = []
    for group in range(2):
        kept = groups != group
        at = [photos.features[kept] + shift for shift in (0.0, 1.0, 2.0)]
        reference = mean_and_covariance(photos.features)
        distances = [frechet_distance(*reference, *mean_and_covariance(side)).item() for side in at]
        half = (torch.arange(4) < 2)[kept].double().mean().item()  # the accuracy of those that are left at strength 1
        left_out.append(np.interp(0.9, [0, half, 1], distances))
    # Of two values, √(1/2 · 2 · (half the difference)²).
    assert found == pytest.approx(abs(left_out[0] - left_out[1]) / 2, rel=1e-6)


def test_accuracy_that_is_not_reached_gives_none():
    scores = score_editing(judged(0, 0), judged(0, 0), edits(most=3), editing_protocol(), ATTRIBUTES).metrics
    assert scores["identity"]["value"] is None
    assert scores["fid"]["value"] is None
    assert "standard_error" not in scores["fid"]
    assert scores["identity_area"]["value"] is None
    assert scores["accuracy"]["value"] == 0.75


def test_inversion_is_scored_without_an_edit():
    scores = score_inversion(judged(0, 0), judged(0, 60), editing_protocol(), ATTRIBUTES).metrics
    assert scores["identity"]["value"] == pytest.approx(0.5)
    assert scores["identity_area"]["value"] == pytest.approx(0.5)
    assert scores["identity_to_inversion"]["value"] == pytest.approx(1)
    assert scores["accuracy"]["value"] == 0
    assert scores["preservation"]["value"] == 1


def test_bad_images():
    photos, protocol = judged(0, 0), editing_protocol()
    with pytest.raises(UserError, match="judge does not know Eyeglasses"):
        score_editing(photos, photos, edits(), protocol, ["Young", "Bald", "Male"])
    with pytest.raises(UserError, match="attribute 'Bald': protocol 'demo-editing' scores Eyeglasses"):
        score_editing(photos, photos, [("Bald", 1.0, photos)], protocol, ATTRIBUTES)
    with pytest.raises(UserError, match="no edits to score"):
        score_editing(photos, photos, [], protocol, ATTRIBUTES)
    with pytest.raises(UserError, match="does not rise"):
        score_editing(photos, photos, [("Male", 1.0, photos)] * 2, protocol, ATTRIBUTES)
    broken = judged(0, 0)
    broken.features[2, 0] = float("nan")
    with pytest.raises(UserError, match=r"edits of 'Male' at strength 1.0: features of image 'photo-2'"):
        score_editing(photos, photos, [("Male", 1.0, broken)], protocol, ATTRIBUTES)
    other = JudgedImages(["x"] * 4, photos.probabilities, photos.identity, photos.features)
    with pytest.raises(UserError, match="inversions: 4 images with other keys"):
        score_editing(photos, other, edits(), protocol, ATTRIBUTES)
    one = JudgedImages(["a"], *(torch.zeros(1, 3),) * 3)
    with pytest.raises(UserError, match="4 images, but protocol 'demo-editing' scores 256"):
        score_editing(photos, photos, edits(), editing_protocol(images=256), ATTRIBUTES)
    with pytest.raises(UserError, match="at least 2 images, found 1"):
        score_editing(one, one, edits(), protocol, ATTRIBUTES)


NUMBER = 30


def generation_protocol(**changes):
    """The large protocol at a small size."""
    protocol = Protocol.read("mm-celeba-hq-6k")
    spec = copy.deepcopy({**protocol.spec, "images": NUMBER, **changes})
    spec["judges"]["features"]["sha256"] = "e" * 64
    spec["metrics"]["fid_3k"]["images"] = 20
    spec["metrics"]["fid_50"]["images"] = NUMBER
    spec["metrics"]["fid_infinity"] |= {"smallest": 10, "points": 5}
    spec["metrics"]["kid"]["subset_size"] = 10
    for name in ("r_precision", "r_precision_batches"):
        spec["metrics"][name]["candidates"] = 8
    return Protocol(protocol.name, protocol.task, spec)


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def real_set(extractor="e" * 64):
    features = random(40, 4, seed=0)
    key = ReferenceKey("d", "test", 40, 256, "PIL bicubic", extractor)
    return Reference(key, features, *mean_and_covariance(features))


def generated(number=NUMBER):
    text = random(number, 6, seed=2)
    return GeneratedImages(
        key=[f"face-{i:02d}" for i in range(number)],
        caption=[f"a face number {i}" for i in range(number)],
        extractor="e" * 64,
        features=random(number, 4, seed=1) + 0.5,
        image_embedding=text + random(number, 6, seed=3),
        text_embedding=text,
        distance_to_real=torch.linspace(0, 1, number),
    )


def test_generation_scores_are_the_metrics():
    real, images = real_set(), generated()
    scores = score_generation(real, images, generation_protocol()).metrics
    assert list(scores) == list(Protocol.read("mm-celeba-hq-6k").metrics)
    fid = frechet_distance(*mean_and_covariance(real.features), *mean_and_covariance(images.features)).item()
    assert scores["fid"]["value"] == pytest.approx(fid, rel=1e-6)
    assert scores["fid"]["standard_error"] > 0
    assert scores["fid_50"]["value"] == pytest.approx(fid, rel=1e-6)  # all of the images, in another order
    assert scores["fid_3k"]["value"] != scores["fid_50"]["value"]
    assert scores["fid_infinity"]["value"] is not None
    everything = kernel_distance(real.features, images.features).item() * 1000
    assert scores["kid"]["value"] == pytest.approx(everything, rel=0.3)
    for name, k in (("precision", 3), ("recall", 3), ("density", 5), ("coverage", 5)):
        expected = getattr(neighbour_scores(real.features, images.features, k), name).item()
        assert scores[name]["value"] == expected
    cosine = torch.nn.functional.cosine_similarity(images.image_embedding, images.text_embedding)
    assert list(scores["clip_cosine"]["per_sample"].values()) == pytest.approx(cosine.tolist(), abs=1e-6)
    assert scores["clip_score"]["value"] == pytest.approx(100 * cosine.clamp(min=0).mean().item(), rel=1e-6)
    found = r_precision(images.image_embedding, images.text_embedding, caption_numbers(images.caption), 8)
    assert scores["r_precision"]["value"] == pytest.approx(found.mean().item())
    assert len(scores["r_precision_batches"]["per_sample"]) == 24  # three full batches of 8
    assert scores["lpips"]["value"] == pytest.approx(0.5)
    assert scores["lpips"]["higher_is_better"] is False


def test_landmarks_are_measured_between_the_eyes_that_the_protocol_names():
    metrics = {name: {"measure": "landmark_error", "eyes": eyes} for name, eyes in (("a", [0, 1]), ("b", [0, 2]))}
    truth = torch.tensor([[0.0, 0], [4, 0], [8, 0]]).expand(NUMBER, 3, 2)
    images = replace(generated(), landmarks=torch.stack([truth + torch.tensor([3.0, 4.0]), truth], 1))
    protocol = generation_protocol()
    protocol = replace(protocol, spec={**protocol.spec, "metrics": metrics})
    scores = score_generation(real_set(), images, protocol).metrics
    assert (scores["a"]["value"], scores["b"]["value"]) == pytest.approx((1.25, 0.625))


def test_bad_generation():
    real, images, protocol = real_set(), generated(), generation_protocol()
    with pytest.raises(UserError, match="29 images, but protocol 'mm-celeba-hq-6k' scores 30"):
        score_generation(real, generated(29), protocol)
    with pytest.raises(UserError, match="at least 2 images, found 1"):
        score_generation(real, generated(1), generation_protocol(images=1))
    with pytest.raises(UserError, match="made with extractor aaaaaaaaaaaa"):
        score_generation(real_set("a" * 64), images, protocol)
    images.features[4, 2] = torch.nan
    with pytest.raises(UserError, match="features of image 'face-04' is not finite"):
        score_generation(real, images, protocol)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mm-celeba-hq-6k", lambda spec: spec["judges"].pop("clip"), "needs judges.clip, a network"),
        ("mm-celeba-hq-6k", lambda spec: spec.update(resizer="nearest"), "resizer is 'nearest', expected one of PIL"),
        ("demo-generation", lambda spec: spec.update(samples=1), "diversity needs at least 2"),
        ("demo-generation", lambda spec: spec["metrics"]["recall"].update(part="f1"), "part is 'f1', expected one of"),
        ("demo-editing", lambda spec: spec["metrics"]["identity_area"].update(of="x"), "of is 'x', expected a metric"),
        ("demo-editing", lambda spec: spec["metrics"]["lpips"].update(reference="photo"), "expected inversion"),
        ("demo-editing", lambda spec: spec.update(matching="last crossing"), "matching is 'last crossing', expected"),
        ("demo-editing", lambda spec: spec.update(source="edit"), "source is 'edit', expected photo or inversion"),
        ("demo-editing", lambda spec: spec["judges"].pop("features"), "judges.features missing"),
        ("demo-editing", lambda spec: spec["preserved"].pop("Male"), "expected the attributes"),
    ],
)
def test_open_choices_of_face_protocols_are_refused(tmp_path, name, change, message):
    spec = copy.deepcopy(Protocol.read(name).spec)
    change(spec)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(spec))
    with pytest.raises(UserError, match=message):
        Protocol.read(path)
