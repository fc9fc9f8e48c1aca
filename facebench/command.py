"""A verb from a function: its signature gives the options, its docstring the help."""

import inspect
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from datamodules.errors import parsing_error


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of examples."""


def run_command(function: Callable[..., Any], prog: str, args: list[str]) -> None:
    """Parses ``args`` by the signature of ``function`` and calls it; ``--world-size`` is ``--world_size``.

    Raises:
        UserError: wrong arguments.
    """
    description = inspect.getdoc(function) or ""
    parser = ArgumentParser(
        prog=prog,
        description=description.split("\nArgs:")[0],
        formatter_class=_Formatter,
        default_env=False,
        exit_on_error=False,
    )
    parser.add_function_arguments(function, as_group=False)
    try:
        options = parser.parse_args([_underscored(arg) for arg in args]).as_dict()
    except ArgumentError as error:
        raise parsing_error(error) from error
    function(**options)


def _underscored(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else arg
