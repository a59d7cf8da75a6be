"""What every command shares: the application, options, and errors told in one sentence."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from dapt.errors import UserError
from dapt.progress import errors, say, table

# PIL's warning of a large image: whether it is too large, dapt says itself.
warnings.filterwarnings("ignore", "Image size .* exceeds limit", RuntimeWarning)


class _Commands(TyperGroup):
    """Commands whose errors are told in one sentence."""

    def invoke(self, ctx: Any) -> Any:
        with readable_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Distribution-aware prompt tuning: a good classifier from CLIP and a few photos.",
)

# Options of more than one command; see `given_settings` for those that are settings.
RunArgument = Annotated[Path, typer.Argument(help="Run directory that 'dapt train' wrote.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Run directory to write.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Discard the run there.")]
MethodOption = Annotated[str | None, typer.Option("--method", "-m", help="See 'dapt methods'.")]
RootOption = Annotated[
    Path | None, typer.Option("--root", help="Folder that holds the benchmarks.")
]
DomainOption = Annotated[str | None, typer.Option(help="Style of the bundled task.")]
NamesOption = Annotated[
    Path | None, typer.Option("--class-names", help="JSON file: folder name -> class name.")
]
BackboneOption = Annotated[
    str | None,
    typer.Option("--backbone", "-b", help="'bundled', open_clip name, hub id, or file."),
]
PretrainedOption = Annotated[
    str | None, typer.Option(help="Tag of the open_clip model, a file, or 'random'.")
]
PrecisionOption = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="An image that cannot be read is an error, not skipped.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Any setting as name=value; see 'dapt settings'."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")]


def given_settings(
    context: typer.Context,
    names: Iterable[str] | None = None,
    assignments: Iterable[str] | None = None,
) -> dict[str, Any]:
    """The settings that a command was given; files and folders that exist by absolute paths.

    Args:
        context: the command's: an option that is called like a setting is one.
        names: settings that count; all if not given.
        assignments: what ``--set`` was given, which goes before options.
    """
    from dapt.settings import Settings, absolute_paths, parse_assignment

    wanted = Settings.model_fields if names is None else set(names)
    given = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in context.params.items()
        if name in wanted and value is not None and value is not False
    }
    return absolute_paths({**given, **dict(map(parse_assignment, assignments or ()))})


# What the operating system says when there is no room or no right to write.
_STORAGE: dict[int | None, str] = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file size limit is reached; raise it",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EACCES: "permission is denied; change it, or use another path",
    errno.EPERM: "permission is denied; change it, or use another path",
}


@contextmanager
def readable_errors(
    run: Path | None = None,
    again: str = "",
    interrupted: type[BaseException] = KeyboardInterrupt,
) -> Iterator[None]:
    """Turn what a user can mend into one sentence and exit code 2; all commands have this.

    Args:
        run: directory that is written to.
        again: command that goes on with what is there; told if there is anything.
        interrupted: what is raised, other than by Ctrl-C, where the work was asked to stop.
    """

    def hint(start: str) -> str:
        return f"{start}{again}" if run is not None and run.exists() else ""

    try:
        yield
    except UserError as error:
        stop(str(error))
    except (interrupted, KeyboardInterrupt):
        say_error(f"stopped{hint('; go on with: ')}")
        raise typer.Exit(130) from None
    except OSError as error:
        if error.errno in (None, errno.EPIPE):  # a mistake of ours; a reader who has had enough
            raise
        where = error.filename or run
        told = _STORAGE.get(error.errno, str(error.strerror).lower())
        stop(f"{f'{where}: ' if where else ''}{told}{hint(', then: ')}")
    except MemoryError:
        stop("there is not enough memory; take a smaller batch or fewer threads")


def stop(sentence: str) -> None:
    """Say it and exit with code 2."""
    say_error(f"dapt: {sentence}")
    raise typer.Exit(2)


def say_error(line: str) -> None:
    """A line on standard error, as it stands."""
    say(line, to=errors)


def say_json(value: Any) -> None:
    """A value on standard output, as one line of JSON in UTF-8."""
    from dapt.safe.files import to_json

    typer.echo(to_json(value))


def metrics_table(title: str, values: Mapping[str, Any]) -> Table:
    """A row of the figures that sum an evaluation up."""
    labels = {"accuracy": "top-1", "top5": "top-5", "macro_f1": "macro-F1", "ece": "ECE"}
    known = {label: values[name] for name, label in labels.items() if values.get(name) is not None}
    made = table(figures=("images", *known), title=title)
    made.add_row(f"{values['images']:,}", *(f"{100 * value:.1f} %" for value in known.values()))
    return made
