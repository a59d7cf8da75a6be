"""The ``dapt`` command: each module reads arguments, calls the package, prints what came of it."""

from dapt.cli.common import app, main

# Importing a module adds its commands, in the order of 'dapt --help'.
from dapt.cli import train, compare, use, words, data, backbones  # noqa: F401

__all__ = ["app", "main"]
