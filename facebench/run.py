"""``facebench fit | validate | test | predict``: LightningCLI over one system, one data set, one run folder."""

from trainers.cli import RunCLI


def main(args: list[str]) -> None:
    """Runs the subcommand named by the first argument."""
    RunCLI(args)
