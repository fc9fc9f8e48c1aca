import logging

import pytest
import torch

from datamodules.errors import UserError
from metrics.protocols import Protocol
from metrics.score_speech import mean_motion, mean_offset, neutral_motion, score_speech

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
