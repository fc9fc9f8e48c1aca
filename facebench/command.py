"""A verb from a function: its signature gives the options, its docstring the help."""

import inspect
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of examples."""


def run_command(function: Callable[..., Any], prog: str, args: list[str]) -> None:
    """Parses ``args`` by the signature of ``function`` and calls it; wrong arguments exit with 2."""
    description = inspect.getdoc(function) or ""
    parser = ArgumentParser(
        prog=prog, description=description.split("\nArgs:")[0], formatter_class=_Formatter, default_env=False
    )
    parser.add_function_arguments(function, as_group=False)
    function(**parser.parse_args(args).as_dict())
