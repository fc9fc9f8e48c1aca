import logging

import pytest
import torch

from datamodules.errors import UserError
from metrics.protocols import Protocol
from metrics.scoring import (
    JudgedImages,
    mean_motion,
    mean_offset,
    neutral_motion,
    score_editing,
    score_inversion,
    score_speech,
)

REGIONS = {"lips": [0, 1], "upper_face": [2], "upper_lip_inner": [0], "lower_lip_inner": [1]}
TEMPLATE = torch.zeros(4, 3)


def speech_protocol(**changes):
    protocol = Protocol.read("demo-speech")
    return Protocol(protocol.name, protocol.task, {**protocol.spec, "vertices": 4, **changes})


def clip(key, frames, offset, truth_frames=None):
    """Truth at the template; vertex 0 of the prediction ``offset`` millimetres above it."""
    predicted = torch.zeros(frames, 4, 3)
    predicted[:, 0, 1] = offset / 1000
    return key, predicted, torch.zeros(truth_frames or frames, 4, 3), TEMPLATE


def test_speech_scores_by_hand():
    scores = score_speech([clip("a", 1, 2.0), clip("b", 3, 4.0)], speech_protocol(), REGIONS).metrics
    assert scores["lve_l2"]["per_sample"] == pytest.approx({"a": 2, "b": 4})
    assert scores["lve_l2"]["weights"] == {"a": 1, "b": 3}
    assert scores["lve_l2"]["value"] == pytest.approx((2 + 3 * 4) / 4)
    assert scores["lve_l2"]["unit"] == "mm"
    assert scores["lve_squared"]["value"] == pytest.approx((4 + 3 * 16) / 4)
    assert scores["lve_squared"]["unit"] == "mm²"
    assert scores["lve_centred"]["value"] == pytest.approx(3.5 / 2)  # half goes with the centroid of two vertices
    assert scores["mve"]["value"] == pytest.approx(3.5 / 4)
    assert scores["mod"]["value"] == pytest.approx(3.5)
    assert scores["fdd_abs"]["value"] == 0
    assert "weights" not in scores["fdd_abs"]
    assert scores["fdd_signed"]["higher_is_better"] is None
    assert scores["fdd_abs"]["higher_is_better"] is False


def test_clips_may_stream():
    scores = score_speech((clip(str(i), 2, i) for i in range(3)), speech_protocol(), REGIONS)
    assert scores.metrics["lve_l2"]["value"] == pytest.approx(1)


def test_other_length_is_cut_and_counted(caplog):
    clips = [clip("a", 5, 1.0, truth_frames=3), clip("b", 2, 1.0, truth_frames=4), clip("c", 2, 1.0)]
    with caplog.at_level(logging.WARNING):
        scores = score_speech(clips, speech_protocol(), REGIONS)
    assert scores.dropped_frames == {"a": 2, "b": 2}
    assert scores.metrics["lve_l2"]["weights"] == {"a": 3, "b": 2, "c": 2}
    assert "2 of 3 clips had another length than the truth; 4 frames cut off" in caplog.text


@pytest.mark.parametrize(
    ("rule", "frames", "message"),
    [("cut the prediction", 2, "2 frames predicted, expected 3"), ("refuse", 4, "4 frames predicted, expected 3")],
)
def test_length_rules(rule, frames, message):
    with pytest.raises(UserError, match=message):
        score_speech([clip("a", frames, 1.0, truth_frames=3)], speech_protocol(length_mismatch=rule), REGIONS)


def test_bad_clips():
    def score(*clips):
        return score_speech(clips, speech_protocol(), REGIONS)

    key, predicted, truth, template = clip("bad", 2, 1.0)
    predicted[1, 3, 0] = float("nan")
    with pytest.raises(UserError, match="clip 'bad': prediction holds values that are not finite"):
        score((key, predicted, truth, template))
    with pytest.raises(UserError, match=r"clip 'bad': prediction has shape \(2, 5, 3\).*demo-head"):
        score((key, torch.zeros(2, 5, 3), truth, template))
    with pytest.raises(UserError, match="at least 2 clips, found 1"):
        score(clip("a", 2, 1.0))
    with pytest.raises(UserError, match="clip 'a': predicted twice"):
        score(clip("a", 2, 1.0), clip("a", 2, 1.0))
    with pytest.raises(UserError, match="region 'lips': empty"):
        score_speech([], speech_protocol(), {**REGIONS, "lips": []})


def test_reference_motions():
    truth = torch.ones(3, 4, 3)
    assert torch.equal(neutral_motion(truth, TEMPLATE), torch.zeros(3, 4, 3))
    offset = mean_offset([(torch.ones(1, 4, 3), TEMPLATE), (torch.full((3, 4, 3), 5.0), TEMPLATE + 1)])
    assert torch.equal(offset, torch.full((4, 3), (1 + 3 * 4) / 4))
    assert torch.equal(mean_motion(truth, TEMPLATE, offset), offset.expand(3, 4, 3))


ATTRIBUTES = ["Young", "Eyeglasses", "Male"]
KEYS = [f"photo-{i}" for i in range(4)]


def editing_protocol(images=4):
    protocol = Protocol.read("demo-editing")
    return Protocol(protocol.name, protocol.task, {**protocol.spec, "images": images})


def judged(flipped, angle, attribute=None, shift=0.0):
    """Photos are all without attributes; the first ``flipped`` images gain one; identity is turned by an angle."""
    probabilities = torch.full((4, 3), 0.1)
    if attribute:
        probabilities[:flipped, ATTRIBUTES.index(attribute)] = 0.9
    radians = torch.deg2rad(torch.tensor(float(angle)))
    identity = torch.stack([radians.cos(), radians.sin()]).expand(4, 2)
    features = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]]) + shift
    return JudgedImages(KEYS, probabilities, identity, features)


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
    assert [row["accuracy"] for row in scores.curve if row["attribute"] == "Male"] == [0, 0.5, 1]
    assert len(scores.curve) == 9


def test_accuracy_that_is_not_reached_gives_none():
    scores = score_editing(judged(0, 0), judged(0, 0), edits(most=3), editing_protocol(), ATTRIBUTES).metrics
    assert scores["identity"]["value"] is None
    assert scores["fid"]["value"] is None
    assert scores["accuracy"]["value"] == 0.75


def test_inversion_is_scored_without_an_edit():
    scores = score_inversion(judged(0, 0), judged(0, 60), editing_protocol(), ATTRIBUTES).metrics
    assert scores["identity"]["value"] == pytest.approx(0.5)
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
