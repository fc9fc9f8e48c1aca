"""``facebench bench``: a suite of systems, seeds and data, each cell computed once."""

from pathlib import Path

from facebench.command import run_command


def bench(suite: Path, out: Path, jobs: int = 2) -> None:
    """Trains, predicts and scores every system of a suite with every seed, and prints the leaderboard.

    Interrupted, the same command goes on where it stopped; what has not changed is not computed again.

    Example:
        facebench bench configs/suites/demo.yaml --out runs/demo

    Args:
        suite: suite file: name, seeds, data and systems.
        out: folder of the suite; gets cells/ and results.jsonl.
        jobs: cells that run at a time; the cores are shared out among them.
    """
    from sweeps.suite import Suite, run_suite

    run_suite(Suite.read(suite), out, jobs)


def main(args: list[str]) -> None:
    """Parses the arguments and runs the verb; the suite may stand first, without its option."""
    if args and not args[0].startswith("-"):
        args = ["--suite", *args]
    run_command(bench, "facebench bench", args)
