"""``facebench report``: the leaderboard page of a suite's results."""

from pathlib import Path
from typing import Literal

from facebench.command import run_command


def report(
    suite: Path, out: Path | None = None, assets: bool = False, over: Literal["samples", "people"] | None = None
) -> None:
    """Writes the leaderboard as one HTML page, CSV, Markdown, LaTeX and model cards, and prints it.

    Example:
        facebench report runs/demo

    Args:
        suite: folder of a suite, with its results.jsonl.
        out: folder to write; by default report/ in the suite's folder.
        assets: put images and videos into a folder beside the page, for large suites; by default into the page.
        over: what error bars draw beside seeds: samples (clips, images) or the people in them, drawn whole; by
            default what the protocol says.
    """
    from sweeps.claims import judge, print_verdicts, read_claims
    from sweeps.leaderboard import leaderboard, print_tables
    from sweeps.report import write_report
    from sweeps.results import read_results

    results = suite / "results.jsonl"
    page = write_report(results, out or suite / "report", assets, over)
    lines = read_results(results)
    print_tables(leaderboard(lines, over))
    print_verdicts(judge(read_claims(suite), lines), lines[0].data["name"])
    print(f"report: {page}\nresults: {results}")


def main(args: list[str]) -> None:
    """Parses the arguments and runs the verb; the suite's folder may stand first, and --assets alone means yes."""
    if args and not args[0].startswith("-"):
        args = ["--suite", *args]
    args = ["--assets=true" if arg == "--assets" else arg for arg in args]
    run_command(report, "facebench report", args)
