"""What papers claim, tested on what a suite measured: each claim is reproduced or not, with its interval.

A claim compares two series, each of one number for every clip (or prompt): ``system/name``, where the name is that of
a protocol's metric or of what the system measured of itself (:meth:`trainers.tasks.SpeechToMesh.measurements`). In a
suite file::

    claims:
      - text: Words let the model move the brows
        series: joint_audio_text/upper_face_error
        lower: joint_audio_text-audio/upper_face_error
      - text: A prompt costs at most 5 % of lip error
        series: expclip/lip_error_prompted
        at_most: expclip/lip_error
        margin: 0.05

============  ======================================================================================
``lower``     the series is lower: the whole interval of the difference lies below 0
``higher``    the series is higher: the whole interval lies above 0
``at_most``   the series is no higher than the other by more than ``margin``, a share of the other's mean
``ties``      the whole interval lies within ``margin`` on both sides
============  ======================================================================================

The other side can be a number, such as chance. Clips are paired and drawn together, and so are the seeds where both
series are of one system (see :mod:`metrics.statistics`). Each interval stands for itself, not corrected for the number
of claims. A claim that is not reproduced is not refuted: the interval says how sure that is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from datamodules.errors import UserError
from datamodules.shards import write_atomic
from metrics.statistics import Interval, bootstrap_mean, paired_bootstrap
from sweeps.leaderboard import check_comparable
from sweeps.results import Result, drawn_of

RELATIONS = {"lower": "lower than", "higher": "higher than", "at_most": "at most", "ties": "equal to"}
WITH_MARGIN = ("at_most", "ties")


@dataclass(frozen=True)
class Claim:
    """A claim of a suite file.

    Attributes:
        text: what is claimed, in a sentence.
        series: what is compared, ``system/name``.
        relation: one of :data:`RELATIONS`.
        than: the other series, or a number.
        margin: share of the other's mean, for relations that take one.
    """

    text: str
    series: str
    relation: str
    than: str | float
    margin: float = 0.0

    @classmethod
    def parse(cls, raw: dict[str, Any], where: str) -> "Claim":
        """Reads a claim of a suite file.

        Raises:
            UserError: fields missing or unknown.
        """
        relations = [name for name in RELATIONS if name in raw] if isinstance(raw, dict) else []
        if len(relations) != 1 or {"text", "series"} - set(raw) or set(raw) - {"text", "series", "margin", *relations}:
            raise UserError(
                f"{where}: expected text, series, one of {', '.join(RELATIONS)}, and margin for "
                f"{' and '.join(WITH_MARGIN)}"
            )
        (relation,) = relations
        if ("margin" in raw) != (relation in WITH_MARGIN):
            raise UserError(f"{where}: margin goes with {' and '.join(WITH_MARGIN)}, and they need it")
        return cls(raw["text"], raw["series"], relation, raw[relation], raw.get("margin", 0.0))

    @property
    def comparison(self) -> str:
        """``a/x lower than b/x``."""
        margin = f" {'+' if self.relation == 'at_most' else '±'} {self.margin:.0%}" if self.margin else ""
        return f"{self.series} {RELATIONS[self.relation]} {self.than}{margin}"


@dataclass(frozen=True)
class Verdict:
    """What a claim came to.

    Attributes:
        claim: the claim.
        first: mean of the series.
        second: mean of the other.
        difference: the first less the second, with its interval.
        reproduced: whether the claim holds.
        seeds: training seeds of the series.
        samples: clips that both have.
    """

    claim: Claim
    first: float
    second: float
    difference: Interval
    reproduced: bool
    seeds: int
    samples: int

    @property
    def word(self) -> str:
        """How it is printed."""
        return "reproduced" if self.reproduced else "not reproduced"


def judge(claims: Iterable[Claim], results: Sequence[Result]) -> list[Verdict]:
    """Tests every claim on the results of a suite.

    Raises:
        UserError: a series that nobody measured, or two without common samples.
    """
    return [_judge(claim, results) for claim in claims]


def _judge(claim: Claim, results: Sequence[Result]) -> Verdict:
    first = _series(claim.series, results, claim)
    if isinstance(claim.than, str):
        second = _series(claim.than, results, claim)
        keys = [key for key in first[0] if all(key in seed for seed in (*first, *second))]
        if not keys:
            raise UserError(f"claim '{claim.text}': {claim.series} and {claim.than} have no sample in common")
        matrices = {"first": _matrix(first, keys), "second": _matrix(second, keys)}
        other = float(matrices["second"].mean())
        if claim.series.partition("/")[0] == claim.than.partition("/")[0]:  # the same networks: seeds are paired
            difference = bootstrap_mean(matrices["first"] - matrices["second"])
        else:
            (comparison,) = paired_bootstrap(matrices, higher_is_better=False)
            difference = comparison.difference
    else:
        keys = [key for key in first[0] if all(key in seed for seed in first)]
        matrices, other = {"first": _matrix(first, keys)}, float(claim.than)
        difference = bootstrap_mean(matrices["first"] - other)
    if len(keys) < 2:
        raise UserError(f"claim '{claim.text}': {len(keys)} samples, expected at least 2; one says nothing of chance")
    margin = claim.margin * abs(other)
    reproduced = {
        "lower": difference.high < 0,
        "higher": difference.low > 0,
        "at_most": difference.high <= margin,
        "ties": -margin <= difference.low and difference.high <= margin,
    }[claim.relation]
    return Verdict(claim, float(matrices["first"].mean()), other, difference, bool(reproduced), len(first), len(keys))


def _series(name: str, results: Sequence[Result], claim: Claim) -> list[dict[str, float]]:
    """The series of every seed."""
    system, _, series = name.partition("/")
    runs = [result for result in results if result.system == system]
    if runs:
        check_comparable(runs)
    found = [
        run.series.get(series) or drawn_of(run.metrics.get(series, {}))
        for run in sorted(runs, key=lambda run: run.seed)
    ]
    if not found or not all(found):
        known = sorted({*runs[0].series, *runs[0].metrics}) if runs else sorted({result.system for result in results})
        raise UserError(
            f"claim '{claim.text}': nobody measured '{name}'; "
            f"known {'series' if runs else 'systems'}: {', '.join(known)}"
        )
    return [dict(values) for values in found if values]


def _matrix(seeds: list[dict[str, float]], keys: list[str]) -> NDArray[np.float64]:
    return np.array([[seed[key] for key in keys] for seed in seeds])


def write_claims(folder: Path, claims: Iterable[Claim]) -> None:
    """Puts a suite's claims beside its results, as ``claims.yaml``."""
    raw = [
        {
            "text": c.text,
            "series": c.series,
            c.relation: c.than,
            **({"margin": c.margin} if c.relation in WITH_MARGIN else {}),
        }
        for c in claims
    ]
    write_atomic(folder / "claims.yaml", yaml.safe_dump(raw, sort_keys=False, allow_unicode=True).encode())


def read_claims(folder: Path) -> list[Claim]:
    """The claims beside a suite's results; none where it has none.

    Raises:
        UserError: a file of another form.
    """
    path = folder / "claims.yaml"
    if not path.is_file():
        return []
    return [Claim.parse(raw, f"{path}, claim {i}") for i, raw in enumerate(yaml.safe_load(path.read_text()) or [], 1)]


def print_verdicts(verdicts: Sequence[Verdict], data: str, console: Console | None = None) -> None:
    """Prints every claim, whether it is reproduced, and the interval of the difference."""
    if not verdicts:
        return
    table = Table(
        title=f"What the papers claim, measured on the {data}",
        title_justify="left",
        caption=f"Each interval stands for itself: not corrected for {len(verdicts)} claims.",
    )
    for heading in ("Claim", "Compared", "Difference [95 %]", f"On the {data}"):
        table.add_column(heading)
    for verdict in verdicts:
        compared = f"{verdict.claim.comparison}; {verdict.seeds} seeds, {verdict.samples} samples"
        table.add_row(*map(escape, (verdict.claim.text, compared, format_difference(verdict), verdict.word)))
    (console or Console()).print(table)


def format_difference(verdict: Verdict) -> str:
    """``0.61 vs 0.84: -0.23 [-0.31, -0.15]``."""
    low, value, high = (f"{number:+.3g}" for number in verdict.difference.bounds)
    return f"{verdict.first:.3g} vs {verdict.second:.3g}: {value} [{low}, {high}]"
