"""``facebench systems``: every system with its task, paper, year and status."""

from rich.console import Console
from rich.table import Column, Table

from facebench.command import run_command


def systems(task: str | None = None, papers: bool = False) -> None:
    """Lists the installed systems, ours and third parties'.

    Example:
        facebench systems --task speech-to-mesh --papers

    Args:
        task: show one task only.
        papers: print the full citation of each paper.
    """
    from trainers.tasks import registry

    shown = {name: system for name, system in registry().items() if task in (None, system.info.task)}
    table = Table(
        Column("system", no_wrap=True),
        Column("task", no_wrap=True),
        Column("paper", overflow="fold"),
        "year",
        Column("status", overflow="fold"),
        Column("takes, beside sound", overflow="fold"),
    )
    for name, system in shown.items():
        info = system.info
        paper = f"{info.title}\n[dim]{info.paper}[/dim]" if papers else info.title
        takes = ", ".join(getattr(system, "conditions", ()))
        table.add_row(name, info.task, paper, str(info.year), info.basis, takes)
    Console().print(table)


def main(args: list[str]) -> None:
    """Parses the arguments and runs the verb."""
    run_command(systems, "facebench systems", args)
