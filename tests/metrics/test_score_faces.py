import copy

import pytest
import torch

from datamodules.errors import UserError
from metrics.distribution import frechet_distance, jackknife_groups, mean_and_covariance
from metrics.protocols import Protocol
from metrics.score_faces import JudgedImages, score_editing, score_inversion

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
    assert [row["accuracy"] for row in scores.curve if row["attribute"] == "Male"] == [0, 0.5, 1]
    assert len(scores.curve) == 9


def test_standard_error_of_fid_is_a_jackknife_from_scratch():
    photos, protocol = judged(0, 0), editing_protocol()
    found = score_editing(photos, photos, edits(), protocol, ATTRIBUTES).metrics["fid"]["standard_error"]
    groups = jackknife_groups(4, 2)
    left_out = []
    for group in range(2):
        kept = groups != group
        at = [photos.features[kept] + shift for shift in (1.0, 2.0)]
        reference = mean_and_covariance(photos.features)
        first, second = (frechet_distance(*reference, *mean_and_covariance(side)).item() for side in at)
        left_out.append(0.2 * first + 0.8 * second)
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
