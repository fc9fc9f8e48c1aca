from dataclasses import replace

import pytest
import yaml

from datamodules.errors import UserError
from sweeps.claims import Claim, judge, read_claims, write_claims
from sweeps.results import Result

PROTOCOL = {"name": "p", "id": "p-1", "spec": {}}


def run(system: str, seed: int, series: dict[str, dict[str, float]], lve: dict[str, float] | None = None) -> Result:
    metric = {"value": 0.0, "unit": "mm", "higher_is_better": False, "per_sample": lve or {}}
    data = {"name": "demo corpus", "sha256": "0"}
    return Result(
        "speech-to-mesh", system, system, "system", seed, data, "test", PROTOCOL, {"lve": metric}, series=series
    )


def clips(*values: float) -> dict[str, float]:
    return {f"clip{i}": value for i, value in enumerate(values)}


def verdict(relation: str, than, results: list[Result], margin: float = 0.0, series: str = "a/error"):
    (found,) = judge([Claim("A claim", series, relation, than, margin)], results)
    return found


TWO = [
    run("a", 1, {"error": clips(1.0, 2.0, 3.0, 4.0)}),
    run("a", 2, {"error": clips(1.1, 2.1, 3.1, 4.1)}),
    run("b", 1, {"error": clips(2.0, 3.0, 4.0, 5.0, 9.0)}),
]


def test_difference_is_that_of_paired_means_over_seeds_and_common_clips() -> None:
    found = verdict("lower", "b/error", TWO)
    assert (found.first, found.second) == (pytest.approx(2.55), pytest.approx(3.5))
    assert found.difference.value == pytest.approx(-0.95)
    assert (found.seeds, found.samples, found.word) == (2, 4, "reproduced")
    assert found.difference.low == pytest.approx(-1.0)  # clips are paired: what is left is between seeds
    assert found.difference.high == pytest.approx(-0.9)
    assert verdict("higher", "b/error", TWO).word == "not reproduced"


def test_two_series_of_one_system_are_paired_by_seed() -> None:
    seeds = [
        run("a", seed, {"ce": clips(level - 0.1, level + 0.9), "lve": clips(level, level + 1.0)})
        for seed, level in enumerate((2.1, 3.1, 2.6))
    ]
    found = verdict("at_most", "a/lve", seeds, 0.0, series="a/ce")
    assert found.difference.bounds == pytest.approx((-0.1, -0.1, -0.1))
    assert found.reproduced


def test_results_of_different_protocols_are_not_mixed() -> None:
    other = replace(TWO[1], protocol=PROTOCOL | {"id": "p-2"})
    with pytest.raises(UserError, match="different protocol ids"):
        verdict("lower", 3.0, [TWO[0], other])


def test_one_sample_says_nothing() -> None:
    with pytest.raises(UserError, match="at least 2"):
        verdict("lower", 3.0, [run("a", 1, {"error": clips(1.0)})])


def test_a_difference_within_noise_is_not_reproduced() -> None:
    noisy = [run("a", 1, {"error": clips(1, 5, 2, 6)}), run("b", 1, {"error": clips(2, 4, 3, 5.5)})]
    assert not verdict("lower", "b/error", noisy).reproduced
    assert not verdict("higher", "b/error", noisy).reproduced


def test_margins_are_shares_of_the_other() -> None:
    pair = [run("a", 1, {"error": clips(10.2, 20.4)}), run("b", 1, {"error": clips(10.0, 20.0)})]
    assert verdict("at_most", "b/error", pair, 0.05).reproduced
    assert verdict("ties", "b/error", pair, 0.05).reproduced
    assert not verdict("at_most", "b/error", pair, 0.01).reproduced
    better = [run("a", 1, {"error": clips(5.0, 10.0)}), pair[1]]
    assert verdict("at_most", "b/error", better, 0.05).reproduced
    assert not verdict("ties", "b/error", better, 0.05).reproduced


def test_numbers_and_protocol_metrics_are_series_too() -> None:
    found = verdict("higher", 0.125, [run("a", 1, {"right": clips(1, 1, 0, 1, 1, 1, 1, 1)})], series="a/right")
    assert found.reproduced
    assert found.difference.value == pytest.approx(0.875 - 0.125)
    assert verdict("lower", 3.0, [run("a", 1, {}, clips(1, 2))], series="a/lve").reproduced


def test_what_nobody_measured_is_an_error() -> None:
    with pytest.raises(UserError, match="nobody measured 'c/error'; known systems: a, b"):
        verdict("lower", "c/error", TWO)
    with pytest.raises(UserError, match="nobody measured 'a/speed'; known series: error, lve"):
        verdict("lower", "b/error", TWO, series="a/speed")
    with pytest.raises(UserError, match="no sample in common"):
        verdict("lower", "b/error", [TWO[0], run("b", 1, {"error": {"other": 1.0}})])


def test_claims_of_a_suite_come_back(tmp_path) -> None:
    assert read_claims(tmp_path) == []
    claims = [
        Claim("x", "a/e", "lower", "b/e"),
        Claim("y", "a/e", "at_most", 0.5, 0.05),
        Claim("z", "a/e", "ties", "b/e"),
    ]
    write_claims(tmp_path, claims)
    assert read_claims(tmp_path) == claims
    assert claims[1].comparison == "a/e at most 0.5 + 5%"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"text": "x", "series": "a/e"}, "expected text, series, one of lower"),
        ({"text": "x", "series": "a/e", "lower": 1, "higher": 2}, "expected text"),
        ({"text": "x", "series": "a/e", "ties": 1}, "margin goes with"),
        ({"text": "x", "series": "a/e", "lower": 1, "margin": 0.1}, "margin goes with"),
        ("x", "expected text"),
    ],
)
def test_claims_of_another_form_are_refused(tmp_path, raw, reason: str) -> None:
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump([raw]))
    with pytest.raises(UserError, match=rf"claims\.yaml, claim 1: {reason}"):
        read_claims(tmp_path)
