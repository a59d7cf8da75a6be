"""Progress of long work, shown by whoever calls: the computing code only says how far it is."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console
from rich.table import Column, Table

from dapt.errors import printable

Advance = Callable[[int], None]

# What is printed are names of someone's, so nothing in them is markup.
console = Console(highlight=False, markup=False, emoji=False)
errors = Console(highlight=False, markup=False, emoji=False, stderr=True)

cell = printable  # a name of someone's as a table's cell or title shows it


def say(line: str, to: Console = console) -> None:
    """Print one line, as it stands."""
    to.print(printable(line), soft_wrap=True)


def table(*columns: str, figures: Iterable[str] = (), title: str | None = None) -> Table:
    """An empty table: columns of text, then columns of figures, which stand to the right."""
    numbers = (Column(header, justify="right") for header in figures)
    return Table(*columns, *numbers, title=title and cell(title), title_justify="left")


def duration(seconds: float) -> str:
    """``"about 5 min"``, in the unit a reader would use."""
    for unit, size, most in (("s", 1, 90), ("min", 60, 90 * 60)):
        if seconds < most:
            return f"about {max(1, seconds / size):.0f} {unit}"
    hours = seconds / 3600
    return f"about {hours:.1f} h" if hours < 48 else f"about {hours // 24:.0f} days"


def counted(count: int, what: str) -> str:
    """Such as "1 run" or "1,200 runs"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def nothing(_count: int) -> None:
    """Advance nobody is watching."""


@contextmanager
def quietly() -> Iterator[None]:
    """Without other libraries' log lines and warnings, of which nothing follows for a user."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class Reporter:
    """What training and evaluation tell while they run; silent by itself."""

    @contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Callable[..., None]]:
        """Announce work of ``total`` units, None if unknown; yields ``advance(count, note="")``."""
        yield lambda count, note="": None

    def say(self, line: str) -> None:
        """Tell one line of result or warning."""

    def warn(self, line: str) -> None:
        """Tell one line of something that is not as it should be."""


class RichReporter(Reporter):
    """A bar with time left on a terminal or in a notebook; a line a stage where output is a file.

    A warning is told once, however many parts of a command come upon it.
    """

    def __init__(self) -> None:
        self._warned: set[str] = set()

    @contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Callable[..., None]]:
        """Show a bar for ``total`` units of work; it goes when the work is done."""
        if errors.is_jupyter:
            with _notebook_bar(title, total) as advance:
                yield advance
            return
        if not errors.is_terminal:
            yield _lines(title, total)
            return
        with progress.Progress(*_columns(errors.width), console=errors, transient=True) as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda count, note="": bar.update(task, advance=count, note=note)

    def say(self, line: str) -> None:
        """Print one line."""
        say(line)

    def warn(self, line: str) -> None:
        """Print one line on standard error, unless it was printed before."""
        if line not in self._warned:
            self._warned.add(line)
            say(f"dapt: warning: {line}", to=errors)


def _columns(width: int) -> Iterator[progress.ProgressColumn]:
    """Of a bar; in 80 columns the bar itself stays legible, and only a note is cut short."""
    wide, whole = width >= 100, Column(no_wrap=True)
    yield progress.TextColumn("{task.description}", markup=False, table_column=whole)
    yield progress.BarColumn(bar_width=24 if wide else 12)
    yield progress.MofNCompleteColumn(table_column=Column(no_wrap=True))
    if wide:
        yield progress.TimeElapsedColumn()
    yield progress.TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True))
    yield progress.TextColumn("left")
    note = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    yield progress.TextColumn("{task.fields[note]}", markup=False, table_column=note)


@contextmanager
def _notebook_bar(title: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar of widgets where a notebook has them, else one of text; by tqdm, which knows."""
    with quietly():
        from tqdm.auto import tqdm

    with tqdm(total=total, desc=title, leave=False) as bar:

        def advance(count: int, note: str = "") -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update(count)

        yield advance


def _lines(title: str, total: int | None) -> Callable[..., None]:
    """A line a tenth of the work, and not too often: for a log file in place of a terminal."""
    step, done = (total or 0) / 10, 0
    due, spoke = step, time.monotonic()

    def advance(count: int, note: str = "") -> None:
        nonlocal done, due, spoke
        done, now = done + count, time.monotonic()
        finished = total is not None and done >= total
        if finished or (done >= due and now - spoke > 5):
            due, spoke = done + step, now
            among = "" if total is None else f" of {total}"
            say(f"{title}: {done}{among} {note}".rstrip(), to=errors)

    return advance
