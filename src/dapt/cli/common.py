"""What every command shares: the application, options, and errors told in one sentence."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dapt.errors import UserError, printable
from dapt.progress import cell, console, errors

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Distribution-aware prompt tuning: a good classifier from CLIP and a few photos.",
)

RunArgument = Annotated[Path, typer.Argument(help="Run directory that 'dapt train' wrote.")]
RootOption = Annotated[
    Path | None, typer.Option("--root", help="Folder that holds the benchmarks.")
]
DomainOption = Annotated[str | None, typer.Option(help="Style of the bundled task.")]
NamesOption = Annotated[
    Path | None, typer.Option("--class-names", help="JSON file: folder name -> class name.")
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="An image that cannot be read is an error, not skipped.")
]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]

# What the operating system says when there is no room or no right to write.
_STORAGE: dict[int | None, str] = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file size limit is reached; raise it",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EACCES: "permission is denied; change it, or use another path",
    errno.EPERM: "permission is denied; change it, or use another path",
}


# PIL's warning of a large image: whether it is too large, dapt says itself.
warnings.filterwarnings("ignore", "Image size .* exceeds limit", RuntimeWarning)


@contextmanager
def readable_errors(run: Path | None = None, command: str = "train") -> Iterator[None]:
    """Turn what a user can mend into one sentence and exit code 2.

    Args:
        run: directory that ``command`` writes to; a hint says how to go on with what is there.
        command: "train" or "demo".
    """
    from dapt.engine.fit import Interrupted

    def again(start: str) -> str:
        if run is None or not run.exists():
            return ""
        return f"{start}dapt {command} --output {run}{' --resume' if command == 'train' else ''}"

    try:
        yield
    except UserError as error:
        stop(str(error))
    except (Interrupted, KeyboardInterrupt):
        say_error(f"stopped{again('; go on with: ')}")
        raise typer.Exit(130) from None
    except OSError as error:
        if error.errno in (None, errno.EPIPE):  # a mistake of ours; a reader who has had enough
            raise
        where = error.filename or run
        told = _STORAGE.get(error.errno, str(error.strerror).lower())
        stop(f"{f'{where}: ' if where else ''}{told}{again(', then: ')}")
    except MemoryError:
        stop("there is not enough memory; take a smaller batch or fewer threads")


def stop(sentence: str) -> None:
    """Say it and exit with code 2."""
    say_error(f"dapt: {sentence}")
    raise typer.Exit(2)


def say_error(line: str) -> None:
    """A line on standard error, as it stands."""
    errors.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def say(line: str) -> None:
    """A line on standard output, as it stands."""
    console.print(printable(line), highlight=False, markup=False, emoji=False, soft_wrap=True)


def say_json(value: Any) -> None:
    """A value on standard output, as one line of JSON in UTF-8."""
    from dapt.safe.files import to_json

    typer.echo(to_json(value))


def metrics_table(title: str, values: dict[str, Any]) -> Table:
    """A row of the figures that sum an evaluation up."""
    table = Table(title=cell(title), title_justify="left")
    columns = {"accuracy": "top-1", "top5": "top-5", "macro_f1": "macro-F1", "ece": "ECE"}
    cells = [f"{values['images']:,}"]
    table.add_column("images", justify="right")
    for name, label in columns.items():
        if name in values:
            table.add_column(label, justify="right")
            cells.append(f"{100 * values[name]:.1f} %")
    table.add_row(*cells)
    return table
