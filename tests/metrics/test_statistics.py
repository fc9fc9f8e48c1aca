import numpy as np
import pytest
from scipy import stats

from metrics.statistics import bootstrap_mean, holm, paired_bootstrap, ranks


def test_interval_covers_a_known_mean_at_its_nominal_rate():
    generator = np.random.default_rng(0)
    covered = [bootstrap_mean(generator.normal(3, 2, size=100), resamples=500, seed=i).covers(3) for i in range(400)]
    assert 0.92 <= np.mean(covered) <= 0.98


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
