import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from datamodules.errors import UserError
from metrics.protocols import Protocol
from metrics.samples import shuffled
from metrics.score_speech import Clip, Judges, mean_motion, mean_offset, neutral_motion, score_speech

REGIONS = {"lips": [0, 1], "upper_face": [2], "upper_lip_inner": [0], "lower_lip_inner": [1]}
TEMPLATE = torch.zeros(4, 3)


def speech_protocol(**changes):
    protocol = Protocol.read("demo-speech")
    spec = {**protocol.spec, "vertices": 4, "judges": {}, **changes}
    return Protocol(protocol.name, protocol.task, spec)


def clip(key, frames, offset, truth_frames=None):
    """Truth at the template; vertex 0 of the prediction ``offset`` millimetres above it."""
    predicted = torch.zeros(frames, 4, 3)
    predicted[:, 0, 1] = offset / 1000
    audio = torch.sin(torch.arange(frames * 16000 // 30) ** 2 / 1e4)
    return Clip(key, predicted, torch.zeros(truth_frames or frames, 4, 3), TEMPLATE, audio, [("m", 0.0, 0.1)], 30)


def metrics(*names):
    """The demo protocol with these metrics alone: the others need clips of a certain length."""
    found = Protocol.read("demo-speech").metrics
    return {"metrics": {name: found[name] for name in names}}


WITHOUT_SYNC = ("lve_l2", "lve_squared", "lve_centred", "lve_mean", "lve_clips", "mve", "mod", "fdd_abs", "fdd_signed")


def test_speech_scores_by_hand():
    scores = score_speech(
        [clip("a", 1, 2.0), clip("b", 3, 4.0)], speech_protocol(**metrics(*WITHOUT_SYNC)), REGIONS
    ).metrics
    assert scores["lve_l2"]["per_sample"] == pytest.approx({"a": 2, "b": 4})
    assert scores["lve_l2"]["weights"] == {"a": 1, "b": 3}
    assert scores["lve_l2"]["value"] == pytest.approx((2 + 3 * 4) / 4)
    assert scores["lve_l2"]["unit"] == "mm"
    assert scores["lve_squared"]["value"] == pytest.approx((4 + 3 * 16) / 4)
    assert scores["lve_squared"]["unit"] == "mm²"
    assert scores["lve_centred"]["value"] == pytest.approx(3.5 / 2)  # half goes with the centroid of two vertices
    assert scores["lve_mean"]["value"] == pytest.approx(3.5 / 2)
    assert scores["lve_clips"]["value"] == pytest.approx((2 + 4) / 2)
    assert "weights" not in scores["lve_clips"]
    assert scores["mve"]["value"] == pytest.approx(3.5 / 4)
    assert scores["mod"]["value"] == pytest.approx(3.5)
    assert scores["fdd_abs"]["value"] == 0
    assert "weights" not in scores["fdd_abs"]
    assert scores["fdd_signed"]["higher_is_better"] is None
    assert scores["fdd_abs"]["higher_is_better"] is False


def test_clips_may_stream():
    scores = score_speech((clip(str(i), 2, i) for i in range(3)), speech_protocol(**metrics("lve_l2")), REGIONS)
    assert scores.metrics["lve_l2"]["value"] == pytest.approx(1)


def test_other_length_is_cut_and_counted(caplog):
    clips = [clip("a", 5, 1.0, truth_frames=3), clip("b", 2, 1.0, truth_frames=4), clip("c", 2, 1.0)]
    with caplog.at_level(logging.WARNING):
        scores = score_speech(clips, speech_protocol(**metrics("lve_l2")), REGIONS)
    assert scores.dropped_frames == {"a": 2, "b": 2}
    assert scores.metrics["lve_l2"]["weights"] == {"a": 3, "b": 2, "c": 2}
    assert "2 of 3 clips had another length than the truth; 4 frames cut off" in caplog.text


@pytest.mark.parametrize(
    ("rule", "frames", "message"),
    [
        ("cut the prediction", 2, "2 frames predicted, expected 3"),
        ("cut the truth", 4, "4 frames predicted, expected 3"),
        ("refuse", 4, "4 frames predicted, expected 3"),
    ],
)
def test_length_rules(rule, frames, message):
    with pytest.raises(UserError, match=message):
        score_speech([clip("a", frames, 1.0, truth_frames=3)], speech_protocol(length_mismatch=rule), REGIONS)


def test_bad_clips():
    def score(*clips, **changes):
        return score_speech(clips, speech_protocol(**metrics("lve_l2", "mod"), **changes), REGIONS)

    good = clip("bad", 2, 1.0)
    predicted = good.predicted.clone()
    predicted[1, 3, 0] = float("nan")
    with pytest.raises(UserError, match="clip 'bad': prediction holds values that are not finite"):
        score(replace(good, predicted=predicted))
    with pytest.raises(UserError, match=r"clip 'bad': prediction has shape \(2, 5, 3\).*demo-head"):
        score(replace(good, predicted=torch.zeros(2, 5, 3)))
    with pytest.raises(UserError, match=r"clip 'bad': prediction has shape \(2, 12\)"):
        score(replace(good, predicted=torch.zeros(2, 12)))
    with pytest.raises(UserError, match="clip 'bad': prediction has no frames"):
        score(replace(good, predicted=torch.zeros(0, 4, 3)))
    with pytest.raises(UserError, match=r"clip 'bad': 25 frames per second, protocol 'demo-speech' is for 30"):
        score(replace(good, fps=25.0))
    with pytest.raises(UserError, match="at least 2 clips, found 1"):
        score(clip("a", 2, 1.0))
    with pytest.raises(UserError, match="at least 2 clips, found 0"):
        score()
    with pytest.raises(UserError, match="clip 'a': predicted twice"):
        score(clip("a", 2, 1.0), clip("a", 2, 1.0))
    with pytest.raises(UserError, match="region 'lips': empty"):
        score_speech([], speech_protocol(), {**REGIONS, "lips": []})
    with pytest.raises(UserError, match="clip 'a': 1 samples predicted, protocol 'demo-speech' takes 2"):
        score(clip("a", 2, 1.0), samples=2)


def test_what_a_metric_needs_is_asked_for():
    def score(clip, *names):
        return score_speech([clip], speech_protocol(**metrics(*names)), REGIONS)

    with pytest.raises(UserError, match="clip 'a': metric 'closure' needs phonemes"):
        score(replace(clip("a", 30, 1.0), phonemes=None), "closure")
    with pytest.raises(UserError, match="clip 'a': metric 'sync_offset' needs the sound"):
        score(replace(clip("a", 30, 1.0), audio=None), "sync_offset")
    with pytest.raises(UserError, match=r"clip 'a': metric 'sync_offset' .*5 frames are too few"):
        score(clip("a", 5, 1.0), "sync_offset")
    surface = {"surface": {"measure": "surface_distance", "pooling": "clips"}}
    with pytest.raises(UserError, match="metric 'surface' needs the triangles"):
        score_speech([clip("a", 2, 1.0)], speech_protocol(metrics=surface), REGIONS)
    silent = [replace(clip(key, 9, 1.0), phonemes=[("a", 0.0, 0.1)]) for key in "ab"]
    with pytest.raises(UserError, match=r"metric 'closure': no clip has what it counts \(bilabials\)"):
        score_speech(silent, speech_protocol(**metrics("closure")), REGIONS)


def test_closure_and_sync_by_hand():
    """Inner lips 3 mm apart, in a closed frame 0.5 mm; the sound is as loud as the mouth is open."""

    def mouth(*closed):
        vertices = torch.zeros(30, 4, 3)
        vertices[:, 0, 1] = 0.003
        vertices[list(closed), 0, 1] = 0.0005
        return vertices

    phonemes = [("m", 10 / 30, 12 / 30), ("p", 20 / 30, 22 / 30), ("a", 0.1, 0.2)]
    truth = mouth(11, 21)
    audio = torch.zeros(16000)
    for frame in range(30):
        start, stop = round(frame * 16000 / 30), round((frame + 1) * 16000 / 30)
        audio[start:stop] = truth[frame, 0, 1]
    clips = [
        Clip("a", mouth(12, 26), truth, TEMPLATE, audio, phonemes, 30),
        Clip("b", mouth(11), truth, TEMPLATE, audio, phonemes[:1], 30),
        Clip("c", mouth(13, 23), truth, TEMPLATE, audio, [], 30),
    ]
    names = ("closure", "closure_offset", "sync_offset", "sync_correlation")
    scores = score_speech(clips, speech_protocol(**metrics(*names)), REGIONS).metrics
    assert scores["closure"]["per_sample"] == {"a": 0.5, "b": 1.0}
    assert scores["closure"]["weights"] == {"a": 2, "b": 1}
    assert scores["closure"]["value"] == pytest.approx(2 / 3)
    assert scores["closure"]["higher_is_better"] is True
    # a: m one frame late; p not closed within 17 .. 24, whose middle is half a frame before frame 21
    assert scores["closure_offset"]["per_sample"] == pytest.approx({"a": 1000 * (1 + 0.5) / 2 / 30, "b": 0})
    assert scores["sync_offset"]["per_sample"]["c"] == pytest.approx(2000 / 30)
    assert scores["sync_offset"]["per_sample"]["b"] == 0
    assert scores["sync_correlation"]["per_sample"]["c"] == pytest.approx(1)


def probtalk(**changes):
    protocol = Protocol.read("probtalk3d-3dmead")
    small = {
        "vertices": 4,
        "regions": {"lips": {"count": 2, "sha256": None}, "upper_face": {"count": 1, "sha256": None}},
    }
    return Protocol(protocol.name, protocol.task, {**protocol.spec, **small, **changes})


def test_several_samples_by_hand():
    """Ten samples, the whole face of sample i at i millimetres along x; the truth at 4."""
    place = torch.arange(10.0)[:, None, None, None] * torch.tensor([0.001, 0, 0])
    samples, truth = place.expand(10, 2, 4, 3), torch.tensor([0.004, 0, 0]).expand(2, 4, 3)
    clips = [Clip(key, samples, truth, TEMPLATE, fps=25) for key in "ab"]
    scores = score_speech(clips, probtalk(), REGIONS).metrics
    assert scores["lve"]["value"] == pytest.approx(16, rel=1e-5)  # the first sample's
    assert scores["mve"]["value"] == pytest.approx(4, rel=1e-5)
    assert scores["mee"]["value"] == pytest.approx(0.5**2, rel=1e-5)  # their mean is at 4.5
    assert scores["ce"]["value"] == pytest.approx(0, abs=1e-9)
    assert scores["diversity_all"]["value"] == pytest.approx(11 / 3, rel=1e-5)  # mean |i − j| of ten
    for key, value in scores["diversity"]["per_sample"].items():
        order = shuffled(10, 0, key).tolist()
        assert value == pytest.approx(
            np.mean([abs(a - b) for a, b in zip(order[:5], order[5:], strict=True)]), rel=1e-5
        )
    assert scores["diversity"]["higher_is_better"] is None
    assert scores["mee"]["unit"] == "mm²"


def test_one_sample_is_too_few_and_more_are_left_out():
    one = Clip("a", torch.zeros(2, 4, 3), torch.zeros(2, 4, 3), TEMPLATE)
    with pytest.raises(UserError, match="clip 'a': 1 samples predicted, protocol 'probtalk3d-3dmead' takes 10"):
        score_speech([one], probtalk(), REGIONS)
    more = replace(clip("a", 2, 1.0), predicted=clip("a", 2, 1.0).predicted.expand(3, 2, 4, 3))
    clips = [more, clip("b", 2, 1.0)]
    scores = score_speech(clips, speech_protocol(**metrics("lve_l2")), REGIONS).metrics
    assert scores["lve_l2"]["per_sample"] == pytest.approx({"a": 1, "b": 1})


def test_normalised_coordinates_are_left_as_they_are():
    protocol = Protocol.read("codetalker-biwi")
    regions = {"lips": {"count": None, "sha256": None}, "upper_face": {"count": None, "sha256": None}}
    small = Protocol(protocol.name, protocol.task, {**protocol.spec, "vertices": 4, "regions": regions})
    clips = [replace(clip(key, 2, 3000.0), fps=25) for key in "ab"]
    scores = score_speech(clips, small, REGIONS).metrics
    assert scores["lve"]["value"] == pytest.approx(9)
    assert scores["lve"]["unit"] == "normalised²"


def test_official_regions_must_have_their_count():
    with pytest.raises(UserError, match=r"codetalker-biwi': regions\.lips\.count is 4996, but 2 was used"):
        score_speech([], Protocol.read("codetalker-biwi"), REGIONS)


def test_reference_motions():
    truth = torch.ones(3, 4, 3)
    assert torch.equal(neutral_motion(truth, TEMPLATE), torch.zeros(3, 4, 3))
    offset = mean_offset([(torch.ones(1, 4, 3), TEMPLATE), (torch.full((3, 4, 3), 5.0), TEMPLATE + 1)])
    assert torch.equal(offset, torch.full((4, 3), (1 + 3 * 4) / 4))
    assert torch.equal(mean_motion(truth, TEMPLATE, offset), offset.expand(3, 4, 3))


def in_three_styles(key: str, offsets: list[float]) -> Clip:
    """A clip predicted in three styles, each ``offset`` millimetres off."""
    clips = [clip(key, 2, offset) for offset in offsets]
    return replace(clips[0], predicted=torch.stack([each.predicted for each in clips]))


@pytest.mark.parametrize(("policy", "expected"), [("all-mean", (3, 5)), ("best", (1, 2)), ("fixed:1", (3, 11))])
def test_policies_for_speakers_never_seen(policy: str, expected: tuple[float, float]):
    axis = {"unseen_speaker": policy, "samples": 3, "sample_axis": "styles", "single_sample": 1}
    protocol = speech_protocol(**axis, **metrics("lve_l2", "mve"))
    clips = [in_three_styles("a", [5, 3, 1]), in_three_styles("b", [2, 11, 2])]
    scores = score_speech(clips, protocol, REGIONS).metrics
    assert tuple(scores["lve_l2"]["per_sample"].values()) == pytest.approx(expected)
    assert tuple(scores["mve"]["per_sample"].values()) == pytest.approx([value / 4 for value in expected])


JUDGE = {"motion": {"name": "demo:somebody", "sha256": "0"}}


def curve_metrics(**choices):
    """A protocol of one metric."""
    return {"metrics": {"value": {"title": "", "description": "", **choices}}, "primary": "value"}


def test_a_judge_says_which_emotion_is_shown() -> None:
    protocol = speech_protocol(judges=JUDGE, **curve_metrics(measure="emotion_accuracy", pooling="clips"))
    judges = Judges(emotion=lambda clip, vertices: "happy" if vertices[0, 0, 1] > 0.002 else "sad")
    clips = [replace(clip(key, 2, offset), emotion="happy") for key, offset in (("a", 3.0), ("b", 1.0), ("c", 4.0))]
    scores = score_speech(clips, protocol, REGIONS, judges=judges).metrics["value"]
    assert scores["per_sample"] == {"a": 1, "b": 0, "c": 1}
    assert (scores["unit"], scores["higher_is_better"]) == ("share", True)
    with pytest.raises(UserError, match="clip 'a': metric 'value' needs the clip's emotion"):
        score_speech([replace(clips[0], emotion=None), clips[1]], protocol, REGIONS, judges=judges)


def test_motions_are_compared_as_sets_by_the_judges_features() -> None:
    protocol = speech_protocol(judges=JUDGE, **curve_metrics(measure="motion_frechet_distance"))
    judges = Judges(features=lambda clip, vertices: 1000 * vertices[0, 0, 1:2].double())
    offsets = torch.tensor([1.0, 2.0, 4.0])
    clips = [clip(key, 2, offset) for key, offset in zip("abc", offsets.tolist(), strict=True)]
    value = score_speech(clips, protocol, REGIONS, judges=judges).metrics["value"]["value"]
    # Of one dimension it is (m1 - m2)^2 + (s1 - s2)^2; the truth stays at the template.
    assert value == pytest.approx((offsets.mean() ** 2 + offsets.var()).item(), rel=1e-5)


@pytest.mark.parametrize(("policy", "chosen"), [("all-mean", [0, 1, 2]), ("best", [2, 0]), ("fixed:1", [1])])
def test_sets_of_motions_follow_the_policy_for_speakers_never_seen(policy: str, chosen: list[int]) -> None:
    axis = {"unseen_speaker": policy, "samples": 3, "sample_axis": "styles", "single_sample": 1, "judges": JUDGE}
    both = metrics("lve_l2")["metrics"] | curve_metrics(measure="motion_frechet_distance")["metrics"]
    protocol = speech_protocol(**axis, metrics=both, primary="lve_l2")
    offsets = torch.tensor([[5.0, 3, 1], [2, 11, 4]])
    clips = [in_three_styles(key, row) for key, row in zip("ab", offsets.tolist(), strict=True)]
    judges = Judges(features=lambda clip, vertices: 1000 * vertices[0, 0, 1:2].double())
    value = score_speech(clips, protocol, REGIONS, judges=judges).metrics["value"]["value"]
    sets = offsets[[0, 1], chosen][None] if policy == "best" else offsets.T[chosen]
    distances = [(each.mean() ** 2 + each.var()).item() for each in sets]
    assert value == pytest.approx(sum(distances) / len(distances), rel=1e-5)


def test_rig_controls_by_hand() -> None:
    predicted = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 12.0]])
    with_controls = [replace(clip(k, 2, 0.0), controls=predicted, true_controls=torch.zeros(2, 3)) for k in "ab"]

    def value(clips=with_controls, **choices) -> float:
        return score_speech(clips, speech_protocol(**curve_metrics(**choices)), REGIONS).metrics["value"]["value"]

    assert value(measure="control_error", controls="all", pooling="frames") == pytest.approx((5 + 12) / 2)
    assert value(measure="control_error", controls=[0], pooling="frames") == pytest.approx(3 / 2)
    dynamics = {"measure": "control_dynamics_deviation", "controls": "all", "pooling": "clips"}
    assert value(**dynamics, signed=True) == pytest.approx(-(144 - 25) / 2)
    assert value(**dynamics, signed=False) == pytest.approx((144 - 25) / 2)
    draws = [replace(each, controls=torch.stack([predicted, 2 * predicted])) for each in with_controls]
    assert value(draws, measure="control_error", controls=[0], pooling="frames") == pytest.approx(3 / 2)
    with pytest.raises(UserError, match="clip 'a': metric 'value' needs rig controls, which the system"):
        value([clip("a", 2, 0.0), clip("b", 2, 0.0)], measure="control_error", controls="all", pooling="frames")
    with pytest.raises(UserError, match=r"got controls of shape \(2, 2\), expected \(2, 3\)"):
        value(
            [replace(each, controls=predicted[:, :2]) for each in with_controls],
            measure="control_error",
            controls="all",
            pooling="frames",
        )


def test_head_motion_by_hand() -> None:
    turning = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.4, 0.0], [0.0, 0.0, 0.0]])
    clips = [replace(clip(key, 3, 0.0), pose=turning) for key in "ab"]

    def value(**choices) -> float:
        return score_speech(clips, speech_protocol(**curve_metrics(**choices)), REGIONS).metrics["value"]["value"]

    assert value(measure="rotation_speed", pooling="frames") == pytest.approx(0.5 * 30)
    expected = (turning.std(0, correction=0).sum() / 3).item()
    assert value(measure="rotation_deviation", pooling="clips") == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UserError, match="needs the pose of the head, which the system does not predict"):
        score_speech(
            [clip("a", 2, 0.0), clip("b", 2, 0.0)],
            speech_protocol(**curve_metrics(measure="rotation_speed", pooling="frames")),
            REGIONS,
        )


def test_data_of_rig_controls_alone_is_scored() -> None:
    controls = torch.rand(4, 3)
    empty = {"predicted": torch.zeros(4, 0, 3), "truth": torch.zeros(4, 0, 3), "template": torch.zeros(0, 3)}
    clips = [Clip(key=key, **empty, controls=controls + 1, true_controls=controls, fps=30) for key in "ab"]
    only = curve_metrics(measure="control_error", controls="all", pooling="clips")
    protocol = speech_protocol(vertices=0, regions={}, **only)
    assert score_speech(clips, protocol, {}).metrics["value"]["value"] == pytest.approx(3**0.5)
