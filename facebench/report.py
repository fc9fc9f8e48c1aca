"""``facebench report``: the leaderboard page of a suite's results."""

from pathlib import Path

from facebench.command import run_command


def report(suite: Path, out: Path | None = None) -> None:
    """Writes the leaderboard as one HTML page, CSV and Markdown, and prints it.

    Example:
        facebench report runs/demo

    Args:
        suite: folder of a suite, with its results.jsonl.
        out: folder to write; by default report/ in the suite's folder.
    """
    from sweeps.leaderboard import leaderboard, print_tables
    from sweeps.report import write_report
    from sweeps.results import read_results

    results = suite / "results.jsonl"
    page = write_report(results, out or suite / "report")
    print_tables(leaderboard(read_results(results)))
    print(f"report: {page}\nresults: {results}")


def main(args: list[str]) -> None:
    """Parses the arguments and runs the verb; the suite's folder may stand first, without its option."""
    if args and not args[0].startswith("-"):
        args = ["--suite", *args]
    run_command(report, "facebench report", args)
