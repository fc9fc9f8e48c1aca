from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from metrics.statistics import bootstrap_mean, holm, jackknife, paired_bootstrap, rank_intervals, ranks


def is_nominal(covered, confidence):
    """Whether a number of hits out of so many trials is what a binomial of that rate would give (99.9 %)."""
    low, high = stats.binom.interval(0.999, len(covered), confidence)
    return low <= np.sum(covered) <= high


@settings(max_examples=8, derandomize=True, deadline=None)
@given(
    mean=st.floats(-100, 100),
    deviation=st.floats(0.1, 50),
    confidence=st.sampled_from([0.8, 0.9, 0.95]),
    seed=st.integers(0, 10),
)
def test_interval_covers_a_known_mean_at_its_nominal_rate(mean, deviation, confidence, seed):
    generator = np.random.default_rng(seed)
    covered = [
        bootstrap_mean(generator.normal(mean, deviation, size=150), None, None, 400, confidence, seed=i).covers(mean)
        for i in range(200)
    ]
    assert is_nominal(covered, confidence)


def test_interval_over_subjects_covers_where_one_over_clips_does_not():
    # Clips of a subject share its difficulty, which is larger than what tells clips apart.
    generator, subjects = np.random.default_rng(1), np.repeat(np.arange(60), 5)
    by_subject, by_clip = [], []
    for seed in range(200):
        scores = np.repeat(generator.normal(2, 1, size=60), 5) + generator.normal(0, 0.3, size=300)
        by_subject.append(bootstrap_mean(scores, groups=subjects, resamples=400, seed=seed).covers(2))
        by_clip.append(bootstrap_mean(scores, resamples=400, seed=seed).covers(2))
    assert is_nominal(by_subject, 0.95)
    assert np.mean(by_clip) < 0.75


def test_interval_agrees_with_scipy():
    scores = np.random.default_rng(1).exponential(size=80)
    theirs = stats.bootstrap((scores,), np.mean, method="percentile", n_resamples=20_000, rng=0)
    ours = bootstrap_mean(scores, resamples=20_000)
    assert ours.value == pytest.approx(scores.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.01)


def test_seeds_widen_the_interval():
    clips = np.random.default_rng(2).normal(size=200)
    alike = bootstrap_mean(np.stack([clips, clips, clips]))
    apart = bootstrap_mean(np.stack([clips - 1, clips, clips + 1]))
    assert apart.high - apart.low > 3 * (alike.high - alike.low)


def test_weights_pool_frames():
    assert bootstrap_mean([1.0, 4.0], weights=[1, 3]).value == (1 + 3 * 4) / 4


def test_groups_are_drawn_whole():
    # Within a subject all clips are equal: the clips say nothing more than the subject does.
    scores, subjects = np.repeat([0.0, 1.0, 2.0, 3.0], 25), np.repeat(list("abcd"), 25)
    by_clip, by_subject = bootstrap_mean(scores), bootstrap_mean(scores, groups=subjects)
    assert by_subject.value == by_clip.value == 1.5
    assert by_subject.high - by_subject.low > 3 * (by_clip.high - by_clip.low)


def test_paired_comparison_sees_what_separate_intervals_do_not():
    generator = np.random.default_rng(3)
    difficulty = generator.normal(0, 5, size=60)
    good = difficulty + generator.normal(0, 0.1, size=60)
    bad = difficulty + 0.5 + generator.normal(0, 0.1, size=60)
    assert bootstrap_mean(good).high > bootstrap_mean(bad).low
    (comparison,) = paired_bootstrap({"good": good, "bad": bad}, higher_is_better=False)
    assert comparison.better == "good"
    assert comparison.difference.value == pytest.approx(good.mean() - bad.mean())
    assert paired_bootstrap({"good": good, "bad": bad}, higher_is_better=True)[0].better == "bad"


def test_many_distant_systems_are_told_apart():
    rng = np.random.default_rng(0)
    systems = {f"system{i}": i + 0.1 * rng.standard_normal(20) for i in range(20)}
    comparisons = paired_bootstrap(systems, higher_is_better=False)
    assert all(pair.better == pair.first for pair in comparisons), "190 comparisons, corrected"
    assert ranks(list(systems), comparisons) == {f"system{i}": i + 1 for i in range(20)}


def test_equal_systems_tie():
    scores = np.random.default_rng(4).normal(size=(3, 40))
    noise = np.random.default_rng(5).normal(size=(3, 40))
    comparisons = paired_bootstrap({"a": scores, "b": scores + 1e-3 * (noise - noise.mean())}, higher_is_better=True)
    assert comparisons[0].better is None
    assert ranks(["a", "b"], comparisons) == {"a": 1, "b": 1}


def test_ranks():
    base = np.random.default_rng(6).normal(size=50)
    systems = {"worst": base + 2, "tied": base + 0.001 * np.sign(base), "best": base}
    comparisons = paired_bootstrap(systems, higher_is_better=False)
    assert ranks(list(systems), comparisons) == {"worst": 3, "tied": 1, "best": 1}


def test_holm_equals_a_worked_example():
    # Holm's procedure at 0.05 on these four rejects the first and the second only.
    corrected = holm([0.01, 0.04, 0.03, 0.005])
    assert corrected == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("scores", [[], [1.0, float("nan")]])
def test_bad_scores(scores):
    with pytest.raises(ValueError, match="finite and not empty"):
        bootstrap_mean(scores)


def test_pairs_need_the_same_samples():
    with pytest.raises(ValueError, match="same samples"):
        paired_bootstrap({"a": [1.0, 2.0], "b": [1.0, 2.0, 3.0]}, higher_is_better=True)


def test_rank_intervals_equal_all_resamples_enumerated():
    systems = {"a": np.array([1.0, 5.0, 2.0]), "b": np.array([3.0, 2.0, 2.5]), "c": np.array([9.0, 9.0, 9.0])}
    drawn = [list(indices) for indices in product(range(3), repeat=3)]
    means = np.array([[values[indices].mean() for indices in drawn] for values in systems.values()])
    places = 1 + (means[:, None] > means[None]).sum(1)  # lower is better
    assert set(places[0]) == {1, 2}
    for confidence in (0.2, 0.8):
        intervals = rank_intervals(systems, higher_is_better=False, confidence=confidence, resamples=20_000)
        for name, place in zip(systems, places, strict=True):
            bounds = np.quantile(place, [(1 - confidence) / 2, (1 + confidence) / 2], method="inverted_cdf")
            assert [intervals[name].low, intervals[name].high] == list(bounds), (name, confidence)
    assert {name: interval.value for name, interval in intervals.items()} == {"a": 2, "b": 1, "c": 3}


def test_rank_intervals_of_equal_and_of_distant_systems():
    scores = np.random.default_rng(7).normal(size=(3, 40))
    systems = {"twin": scores, "other": scores[:, ::-1], "far": scores + 50}
    best_is_high = rank_intervals(systems, higher_is_better=True)
    assert best_is_high["far"].bounds == (1, 1, 1)
    assert (best_is_high["twin"].low, best_is_high["twin"].high) == (2, 3)
    assert rank_intervals({}, higher_is_better=True) == {}


def test_jackknife_of_a_mean_is_its_standard_error():
    scores = np.random.default_rng(8).exponential(size=30)
    without = [np.delete(scores, i).mean() for i in range(30)]
    assert jackknife(without) == pytest.approx(stats.sem(scores), rel=1e-12)
    with pytest.raises(ValueError, match="at least two finite values"):
        jackknife([1.0])


def test_resamples_are_drawn_in_blocks_of_any_number():
    scores = np.random.default_rng(9).normal(size=(2, 25))
    assert bootstrap_mean(scores, resamples=251).value == pytest.approx(scores.mean())


def test_groups_need_a_name_for_each_score():
    with pytest.raises(ValueError, match="3 scores, but 2 groups"):
        bootstrap_mean([1.0, 2.0, 3.0], groups=["a", "b"])
