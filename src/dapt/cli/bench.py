"""``dapt bench``: the door to the yardsticks, which are in the repository and not in the wheel."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

import dapt
from dapt.cli.common import app, readable_errors
from dapt.errors import UserError

# Whatever follows the command's name, --help too, is for the yardsticks to read.
_UNREAD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_UNREAD)
def bench(context: typer.Context) -> None:
    """Time a training step and an evaluation, the plain way and ours, in one run."""
    with readable_errors():
        sources = Path(dapt.__file__).resolve().parents[1]
        if sources.name != "src" or not (sources.parent / "benchmarks").is_dir():
            raise UserError(
                "the yardsticks of 'dapt bench' are in the repository and not in the wheel; "
                "run it with dapt installed from a checkout (pip install -e .)"
            )
        sys.path.insert(0, str(sources.parent))
        from benchmarks.command import app as yardsticks

        yardsticks(context.args, prog_name="dapt bench")
