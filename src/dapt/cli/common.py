"""What every command shares: the application, options, and errors told in one sentence."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Argument, Context, Exit, Option, Typer, echo

import dapt
from dapt.cli.usage import OneSentence, as_options
from dapt.errors import PictureWarning, UserError, readable
from dapt.progress import console, errors, say, table
from dapt.run.hub import find_run

if TYPE_CHECKING:
    from dapt.run.directory import RunDirectory
    from dapt.run.records import Metrics

# PIL's warning of a large image: whether it is too large, dapt says itself.
warnings.filterwarnings("ignore", "Image size .* exceeds limit", RuntimeWarning)


def _is_there(run: Path) -> Path:
    """A run's folder, looked for before anything that takes seconds is imported."""
    return find_run(run)


# Options of more than one command. Those that are called like a setting are one.
RunArgument = Annotated[
    Path,
    Argument(help="Run that 'dapt train' wrote, or org/name on the hub.", callback=_is_there),
]
RootOption = Annotated[Path | None, Option(help="Folder with the benchmarks.")]
DomainOption = Annotated[str | None, Option(help="Style of the bundled task.")]
NamesOption = Annotated[Path | None, Option(help="JSON file from folder names to class names.")]
MethodOption = Annotated[str | None, Option("--method", "-m", help="See 'dapt methods'.")]
ShotsOption = Annotated[int | None, Option(help="Support images per class.", show_default="16")]
SeedOption = Annotated[
    int | None, Option(help="Seed of support set, prompts and order.", show_default="1")
]
EpochsOption = Annotated[
    int | None, Option(help="Passes over the support set.", show_default="the method's")
]
_BACKBONES = "'bundled', 'auto', open_clip name, timm:NAME, hub id or file."
BACKBONES = f"{_BACKBONES} Give several to join them."
BackboneOption = Annotated[list[str] | None, Option("--backbone", "-b", help=BACKBONES)]
OneBackboneOption = Annotated[str, Option("--backbone", "-b", help=_BACKBONES)]
_TAGS = "An open_clip tag, a file, or 'random'."
PretrainedOption = Annotated[
    list[str] | None, Option(help=f"{_TAGS} One per backbone, or 'default'.")
]
OnePretrainedOption = Annotated[str | None, Option("--pretrained", help=_TAGS)]
PrecisionOption = Annotated[str | None, Option(help="fp32, bf16 or fp16.", show_default="fp32")]
_DEVICES = "auto, cpu, cuda, cuda:N or mps."
DeviceOption = Annotated[str | None, Option(help=_DEVICES, show_default="auto")]
RunDeviceOption = Annotated[str | None, Option("--device", help=_DEVICES, show_default="the run's")]
StrictOption = Annotated[bool, Option("--strict", help="Stop at an unreadable image.")]
OverwriteOption = Annotated[bool, Option("--overwrite", help="Discard an existing run.")]
PluginOption = Annotated[
    list[Path] | None, Option("--plugin", help="Your Python file with methods; it is executed.")
]
SetOption = Annotated[
    list[str] | None, Option("--set", "-s", help="Any setting, as name=value; see 'dapt settings'.")
]


def given_settings(
    context: Context, names: Iterable[str] = (), assignments: Iterable[str] | None = None
) -> dict[str, Any]:
    """Settings that a command was given, with absolute paths of what exists.

    Of its options those count that are called like a setting, or ``names`` alone, if there are
    some; ``assignments``, which are ``--set``'s, go before them.
    """
    from dapt.settings import absolute_paths, all_fields, parse_assignment

    wanted = set(names or all_fields())
    given = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in context.params.items()
        if name in wanted and value is not False and value not in (None, [], ())
    }
    return absolute_paths(given | dict(map(parse_assignment, assignments or ())))


def listed(context: Context, name: str) -> list[Any] | None:
    """What stands between an option's commas; None where it is not given."""
    if (text := context.params[name]) is None:
        return None
    kind = int if name in ("shots", "seeds") else str
    try:
        return [kind(value.strip()) for value in text.split(",") if value.strip()]
    except ValueError as error:
        raise UserError(f"--{name} {text}: give numbers with commas between, as 1,2,4") from error


say_error = partial(say, to=errors)  # a line on standard error, as it stands

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
    run: Path | None = None, again: str = "", interrupted: type[BaseException] = KeyboardInterrupt
) -> Iterator[None]:
    """Turn what a user can mend into one sentence and exit code 2; all commands are in this.

    If there is anything in the directory ``run``, the command that goes on with it is told,
    ``again``. Other than by Ctrl-C, ``interrupted`` is raised where the work was asked to stop.
    """

    def hint(start: str) -> str:
        return f"{start}{again}" if run is not None and _begun(run) else ""

    try:
        with _stopping(run is not None):
            yield
        return
    except UserError as error:
        said = as_options(str(error))
    except (interrupted, KeyboardInterrupt):
        say_error(f"stopped{hint('; go on with: ')}")
        raise Exit(130) from None
    except OSError as error:
        if error.errno in (None, errno.EPIPE):  # a mistake of ours; a reader who has had enough
            raise
        where = error.filename or run
        told = _STORAGE.get(error.errno, str(error.strerror).lower())
        said = f"{f'{where}: ' if where else ''}{told}{hint(', then: ')}"
    except (MemoryError, RuntimeError) as error:
        if not (said := _short_of_memory(error)):
            raise
    say_error(f"dapt: {said}")
    raise Exit(2)


def _short_of_memory(error: Exception) -> str:
    """A sentence where an error is want of memory, for which torch has its own; else nothing."""
    if type(error).__name__ == "OutOfMemoryError":  # torch is not imported for the sake of it
        what = "the GPU has not enough memory; take a smaller batch, --precision bf16"
        return f"{what} or --device cpu"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "there is not enough memory; take a smaller batch or fewer threads"
    return ""


def _begun(folder: Path) -> bool:
    """Whether a run, or the search for its method, was begun here, or in a folder right here."""
    names = ("settings.json", "effort.json", "*/settings.json")
    return any(next(folder.glob(name), None) for name in names)


@contextmanager
def _stopping(asked: bool) -> Iterator[None]:
    """If ``asked``, SIGTERM is as Ctrl-C inside: what may go on says so."""
    if not asked or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


app = Typer(
    cls=OneSentence,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Distribution-aware prompt tuning: a good classifier from CLIP and a few photos.",
)
_TEXT = Path(__file__).with_name("help.md").read_text("utf-8")
_HELP = dict(re.findall(r"^# (.+)\n((?:(?!# ).*\n)*)", _TEXT, re.M))


def command(name: str, group: Typer = app, **how: Any) -> Callable[..., Any]:
    """Make a function a command, whose docstring says what it does and ``help.md`` the rest."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        told = f"{function.__doc__}\n{_HELP.get(name, '')}"

        @wraps(function)
        def with_plugins(**given: Any) -> None:
            if files := given.get("plugin"):
                from dapt.methods import load_plugins

                load_plugins(files)
            function(**given)

        return group.command(name, help=told, **how)(readable_errors()(with_plugins))

    return add


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, Option("--version", help="Print the version.")] = False) -> None:
    if version:
        echo(dapt.__version__)
        raise Exit


def _yield_cores() -> None:
    """Threads of torch that wait for each other sleep after microseconds, not milliseconds.

    GNU's OpenMP spins for 300,000 rounds, and while other programs want the cores, the thread that
    is waited for cannot run meanwhile: VLPT took seven times as long (load 20 on two cores). What
    is computed stays the same to the bit. What the user sets goes first.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "1000"


def main() -> None:
    """Entry point of the ``dapt`` command."""
    _yield_cores()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A class name may hold what the terminal's encoding has not.
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = partial(_show_warning, warnings.showwarning)
    app(prog_name="dapt")


def _show_warning(usual: Callable[..., None], message: Any, category: Any, *where: Any) -> None:
    """Tell one of ours as any other warning of a command, not as a line of code."""
    if issubclass(category, PictureWarning):
        say_error(f"dapt: warning: {message}")
    else:
        usual(message, category, *where)


def show_run(run: RunDirectory, *notes: str) -> Metrics:
    """Print the figures of a run, and return them; to be asked at once when it is finished.

    A `UserError` where another process, told to overwrite, has replaced the run meanwhile.
    """
    try:
        result, spent = run.read_metrics(), run.read_environment()
    except UserError as error:
        if run.finished:
            raise
        raise UserError(
            f"{run.path} is in use by another process, which has replaced the run that was made "
            "here; give each its own --output"
        ) from error
    title = ", ".join((readable(result.dataset), result.method, *notes))
    if result.test is not None:
        console.print(metrics_table(title, result.test.model_dump()))
    else:
        say(f"{title}: no image was held out to test on, so there is no test accuracy")
    if result.effort is not None:
        say(result.effort.told)
    for name, change in result.dispersion.items():
        say(f"{name}-dispersion {change.before:.3f} before, {change.after:.3f} after")
    tuned = f", tuned in {spent.tuning_seconds:g} s" if spent.tuning_seconds else ""
    if (told := result.forecast) is not None:
        between = f"between {100 * told.low:.0f} and {100 * told.high:.0f} %"
        say(
            f"expected on new photos like these: {100 * told.accuracy:.0f} % right, most likely "
            f"{between} ({told.images:,} photos held out)"
        )
        for pair in told.confused[:3]:
            one, other = map(readable, pair.classes)
            say(f"most confused: '{one}' and '{other}' ({pair.images} of those)")
        say(told.advice)
    if (mapped := result.map_forecast) is not None:
        between = f"between {100 * mapped.low:.0f} and {100 * mapped.high:.0f} %"
        say(
            f"expected on new photos like these: mAP {100 * mapped.map:.0f} %, most likely "
            f"{between} ({mapped.images:,} photos held out)"
        )
        say(mapped.advice)
    if not (result.test or told or mapped):
        say(
            "how well it does is not known: nothing was held out. --method auto tells it by photos "
            "held out in turn (two or more in a class); without --all, some are kept to test on"
        )
    say(f"{result.learned_parameters:,} learned parameters{tuned}; everything is in {run.path}")
    return result


def metrics_table(title: str, values: Mapping[str, Any]) -> Table:
    """A row of the figures that sum an evaluation up."""
    labels = {"accuracy": "top-1", "top5": "top-5", "macro_f1": "macro-F1", "ece": "ECE"}
    if values.get("map") is not None:  # several labels an image
        labels = {"map": "mAP", "micro_f1": "micro-F1", "macro_f1": "macro-F1",
                  "accuracy": "all right"}  # fmt: skip
    known = {label: values[name] for name, label in labels.items() if values.get(name) is not None}
    made = table(figures=("images", *known), title=title)
    made.add_row(f"{values['images']:,}", *(f"{100 * value:.1f} %" for value in known.values()))
    return made
