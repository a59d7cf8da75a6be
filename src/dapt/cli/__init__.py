"""The ``dapt`` command: each module reads arguments, calls the package, prints what came of it."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

# Importing a module adds its commands, in the order of 'dapt --help'.
from dapt.cli import train, use, experiment, data  # noqa: F401
from dapt.cli.common import app

__all__ = ["app", "main"]


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from dapt import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the ``dapt`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A class name may hold what the terminal's encoding has not.
            stream.reconfigure(errors="backslashreplace")
    app()
