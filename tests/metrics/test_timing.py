import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics import timing

FPS = 10
OPEN, CLOSED = 5.0, 0.0


def opening(*closed_frames, frames=20):
    values = torch.full((frames,), OPEN)
    values[list(closed_frames)] = CLOSED
    return values


def closures(predicted, truth, *phonemes, window=0.1):
    return timing.lip_closures(predicted, truth, CLOSED, phonemes, FPS, tolerance=0.5, window=window)


def test_closure_by_hand():
    truth = opening(5, 6, 12)
    found = closures(opening(6, 7), truth, ("b", 0.5, 0.7), ("ə", 0.7, 0.9), ("p", 1.2, 1.3))
    assert found.closed.tolist() == [1, 0]
    # closed in frames 6 and 7 instead of 5 and 6; the p stays open: its moment is the middle of the span 11 .. 13
    assert found.offset.tolist() == pytest.approx([0.1, 0.0])


def test_only_bilabials_within_the_clip_count():
    found = closures(opening(), opening(), ("t", 0.1, 0.2), ("bʲ", 0.1, 0.2), ("m", 9.0, 9.1))
    assert len(found.closed) == 1
    assert closures(opening(), opening(), ("a", 0.1, 0.2)).closed.shape == (0,)


def test_nearly_closed_lips_have_a_moment_but_are_not_closed():
    nearly = opening()
    nearly[8] = 2.0
    found = closures(nearly, opening(8), ("m", 0.7, 1.0))
    assert found.closed.tolist() == [0]
    assert found.offset.tolist() == [0]


def test_window():
    early = opening(4)
    assert closures(early, early, ("m", 0.5, 0.6), window=0.1).closed.tolist() == [1]
    assert closures(early, early, ("m", 0.5, 0.6), window=0.0).closed.tolist() == [0]


def test_share_and_offset_over_a_test_set():
    share, late = (
        timing.BilabialClosure(tolerance=0.5, window=0.1),
        timing.ClosureOffset(tolerance=0.5, window=0.2, scale=1000),
    )
    for metric in (share, late):
        metric.update(opening(5), opening(5), CLOSED, [("m", 0.5, 0.6)], FPS)
        metric.update(opening(6, 11), opening(5, 12), CLOSED, [("m", 0.5, 0.6), ("p", 1.2, 1.3), ("b", 1.6, 1.7)], FPS)
        metric.update(opening(5), opening(5), CLOSED, [], FPS)
    assert share.compute() == 3 / 4  # frames 5, 6 and 11 lie in the spans 4 .. 6, 4 .. 6 and 11 .. 13; the b stays open
    assert late.compute().item() == pytest.approx((0 + 100 + 100 + 0) / 4)
    assert share.higher_is_better
    assert not late.higher_is_better


def test_sound_energy_against_numpy():
    audio = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    energy = timing.sound_energy(audio, 1000, 30, 31)
    for t in range(30):
        samples = audio[round(t * 1000 / 30) : round((t + 1) * 1000 / 30)].double().numpy()
        assert energy[t].item() == pytest.approx(np.sqrt(np.mean(samples**2)), rel=1e-6)
    assert energy[30] == 0  # no sound is left


@given(st.integers(-6, 6), st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=25, deadline=None)
def test_sync_finds_the_shift_whatever_scale_and_level(shift, scale, level):
    energy = torch.rand(60, generator=torch.Generator().manual_seed(1))
    found = timing.audio_motion_sync(scale * energy.roll(shift) + level, energy, fps=30, largest=0.2)
    assert found.offset.item() == pytest.approx(shift / 30)
    assert found.correlation.item() == pytest.approx(1)


def test_sync_against_numpy():
    generator = torch.Generator().manual_seed(2)
    mouth, energy = torch.rand(40, generator=generator), torch.rand(40, generator=generator)
    found = timing.audio_motion_sync(mouth, energy, fps=10, largest=0.3)
    correlations = {
        lag: np.corrcoef(mouth[max(lag, 0) : 40 + min(lag, 0)], energy[max(-lag, 0) : 40 - max(lag, 0)])[0, 1]
        for lag in range(-3, 4)
    }
    best = max(correlations, key=correlations.get)
    assert found.offset.item() == pytest.approx(best / 10)
    assert found.correlation.item() == pytest.approx(correlations[best], rel=1e-6)


def test_still_mouth_is_in_sync_with_nothing():
    found = timing.audio_motion_sync(torch.full((20,), 0.1), torch.rand(20), fps=10, largest=0.5)
    assert (found.offset, found.correlation) == (0.5, 0)
    with pytest.raises(ValueError, match=r"7 frames are too few for offsets up to 0\.5 s"):
        timing.audio_motion_sync(torch.rand(7), torch.rand(7), fps=10, largest=0.5)


def test_lip_sync_error_by_hand():
    audio = torch.tensor([[0.0], [1.0], [3.0], [6.0]])
    video = torch.tensor([[1.0], [3.0], [6.0], [1.0]])  # one frame ahead of the sound, which is 0 beyond its ends
    # Sound one frame later: (0 + 0 + 0 + 1) / 4; together: (1 + 2 + 3 + 5) / 4; one earlier: (1 + 3 + 5 + 2) / 4
    found = timing.lip_sync_error(video, audio, largest=1)
    assert found.distance == 0.25
    assert found.confidence == 2.5
    distance, confidence = timing.LipSyncDistance(largest=1), timing.LipSyncConfidence(largest=1)
    for metric in (distance, confidence):
        metric.update(video, audio)
        metric.update(audio, audio)  # 0 together; the others (1 + 2 + 3 + 6) / 4 and (0 + 1 + 2 + 3) / 4
    assert distance.compute() == 0.25 / 2
    assert confidence.compute() == (2.5 + 1.5) / 2
    with pytest.raises(ValueError, match="4 frames are too few for offsets up to 15 frames"):
        timing.lip_sync_error(video, audio)


def test_beat_alignment_by_hand():
    aligned = timing.beat_alignment(torch.tensor([10, 40]), torch.tensor([10, 43]), fps=30, sigma=0.1)
    assert aligned.item() == pytest.approx((1 + np.exp(-0.5)) / 2)
    assert timing.beat_alignment(torch.tensor([]), torch.tensor([1]), fps=30) == 0
    with pytest.raises(ValueError, match="no beat"):
        timing.beat_alignment(torch.tensor([1]), torch.tensor([]), fps=30)


def test_beats_and_onsets():
    assert timing.beats(torch.tensor([1.0, 0.0, 1.0, 0.5, 0.5, 2.0])).tolist() == [1]
    assert timing.onsets(torch.tensor([0.0, 5.0, 5.0, 5.1, 5.0, 9.0, 9.0])).tolist() == [1, 5]


def test_head_statistics_by_hand():
    rotations = [torch.tensor([[0.0, 0.0, 0.0], [3.0, 4.0, 0.0]]), torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]])]
    deviation, speed = timing.RotationDeviation(), timing.RotationSpeed()
    for clip in rotations:
        deviation.update(clip)
        speed.update(clip, 2)
    assert deviation.compute().item() == pytest.approx(np.concatenate(rotations).std(0).mean())
    assert speed.compute() == 10
