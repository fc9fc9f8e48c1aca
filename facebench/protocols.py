"""``facebench protocols``: list, show and compare the protocols, and convert between lip vertex errors."""

from collections.abc import Callable
from pathlib import Path

from datamodules.errors import UserError
from facebench.command import run_command


def list_protocols(task: str | None = None) -> None:
    """Lists the protocols: task, the metric that ranks, all metrics, id.

    An id is a hash of every choice. Where a protocol leaves one to be bound, such as the hash of a region or of a
    judge's weights, it has its id when something is scored.

    Example:
        facebench protocols list --task speech-to-mesh

    Args:
        task: list one task only.
    """
    from rich.console import Console
    from rich.table import Column, Table

    from metrics.protocols import GENERAL, Protocol, available

    if task not in (None, *GENERAL):
        raise UserError(f"no protocols of task '{task}'; there are those of {', '.join(GENERAL)}")
    protocols = [Protocol.read(name) for name in available()]
    for title in GENERAL if task is None else [task]:
        table = Table(
            Column("protocol", no_wrap=True), "ranks by", "metrics", Column("id", overflow="fold"), title=title
        )
        for protocol in protocols:
            if protocol.task == title:
                identity = protocol.id if protocol.bound else "bound when scored"
                table.add_row(protocol.name, protocol.spec["primary"], ", ".join(protocol.metrics), identity)
        Console().print(table)


def show(name: str) -> None:
    """Prints a protocol: every choice, and the sentence that says what each metric is.

    Example:
        facebench protocols show codetalker-biwi

    Args:
        name: of a protocol, or the path of a protocol file.
    """
    import yaml

    from metrics.protocols import Protocol

    print(yaml.safe_dump(Protocol.read(name).spec, sort_keys=False, allow_unicode=True, width=110).rstrip())


def diff(first: str, second: str) -> None:
    """Says in words where two protocols differ, and so why their scores can't be compared.

    Example:
        facebench protocols diff codetalker-biwi facediffuser-biwi

    Args:
        first: name of a protocol, or the path of a protocol file.
        second: another one.
    """
    from metrics.differences import differences
    from metrics.protocols import Protocol

    sentences = differences(Protocol.read(first), Protocol.read(second))
    print("\n".join(sentences) if sentences else f"{first} and {second} measure the same")


def convert(predictions: Path, data: str, regions: dict[str, str] | None = None) -> None:
    """Prints the lip vertex error of one set of predictions in every variant that papers report.

    Squared, plain or centred distance; the worst vertex of a frame or the mean over the lips; every frame or every clip
    alike: twelve numbers for the same motion.

    Example:
        facebench predict --config configs/demo/voca.yaml --run runs/voca
        facebench protocols convert --predictions runs/voca/predictions --data data/demo/talking

    Args:
        predictions: folder written by 'facebench predict'.
        data: folder of the data that was predicted.
        regions: file of the lips' vertex indices, as '{lips: lve.txt}'; by default the data's own lips.
    """
    from rich.console import Console
    from rich.table import Table

    from metrics.motion import POOLINGS, REDUCTIONS, VARIANTS
    from sweeps.score import convert_lip_errors

    scores, bound = convert_lip_errors(predictions, data, regions)
    lips = bound.spec["regions"]["lips"]
    columns = [f"{over} over lips, {pooling} alike" for over in REDUCTIONS for pooling in POOLINGS]
    table = Table(
        "distance", *columns, "unit", title=f"Lip vertex error: {lips['count']} vertices, {lips['sha256'][:12]}"
    )
    for variant in VARIANTS:
        entries = [scores.metrics[f"{variant}-{over}-{pooling}"] for over in REDUCTIONS for pooling in POOLINGS]
        table.add_row(variant, *(f"{entry['value']:.4g}" for entry in entries), entries[0]["unit"])
    Console().print(table)


ACTIONS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "list": (list_protocols, ()),
    "show": (show, ("name",)),
    "diff": (diff, ("first", "second")),
    "convert": (convert, ()),
}

HELP = """usage: facebench protocols [list | show NAME | diff A B | convert ...]

Protocols: everything that must be equal for two scores to be comparable.

  list      every protocol: task, the metric that ranks, all metrics, id (the default)
  show      every choice of one protocol
  diff      where two protocols differ, in words
  convert   one set of predictions under every variant of the lip vertex error

example:
  facebench protocols
  facebench protocols diff codetalker-biwi facediffuser-biwi

'facebench protocols ACTION --help' says more."""


def main(args: list[str]) -> None:
    """The first argument names what to do; names of protocols may follow it."""
    if args and args[0] in ("-h", "--help"):
        print(HELP)
        return
    action, *rest = args or ["list"]
    if action.startswith("-"):
        action, rest = "list", args
    if action not in ACTIONS:
        raise UserError(f"no action '{action}'; known: {', '.join(ACTIONS)}")
    function, positional = ACTIONS[action]
    given = [arg for arg in rest[: len(positional)] if not arg.startswith("-")]
    named = [part for name, value in zip(positional, given, strict=False) for part in (f"--{name}", value)]
    run_command(function, f"facebench protocols {action}", [*named, *rest[len(given) :]])
