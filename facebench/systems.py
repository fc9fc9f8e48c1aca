"""``facebench systems``: every system with its task, paper, year and status."""

from rich.console import Console
from rich.table import Table

from facebench.command import run_command


def systems(task: str | None = None) -> None:
    """Lists the installed systems, ours and third parties'.

    Example:
        facebench systems --task speech-to-mesh

    Args:
        task: show one task only.
    """
    from trainers.tasks import registry

    table = Table("system", "task", "paper", "year", "status", "takes, beside sound or image")
    for name, system in registry().items():
        info = system.info
        takes = ", ".join(getattr(system, "conditions", ()))
        if task in (None, info.task):
            table.add_row(name, info.task, f"{info.title}\n[dim]{info.paper}[/dim]", str(info.year), info.basis, takes)
    Console().print(table)


def main(args: list[str]) -> None:
    """Parses the arguments and runs the verb."""
    run_command(systems, "facebench systems", args)
