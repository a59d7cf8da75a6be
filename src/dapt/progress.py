"""Progress of long work, shown by whoever calls: the computing code only says how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dapt.errors import printable

Advance = Callable[[int], None]

console = Console()
errors = Console(stderr=True)


def cell(text: str) -> str:
    """``text``, a name of someone's, as a table's cell or title shows it: as it stands."""
    return escape(printable(text))


def nothing(_count: int) -> None:
    """Advance nobody is watching."""


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
    """A bar with time left on a terminal; a line a stage where output is a file.

    A warning is told once, however many parts of a command come upon it.
    """

    def __init__(self) -> None:
        self._warned: set[str] = set()

    @contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Callable[..., None]]:
        """Show a bar for ``total`` units of work; it goes when the work is done."""
        if not errors.is_terminal:
            yield _Lines(title, total)
            return
        with Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=errors,
            transient=True,
        ) as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda count, note="": bar.update(task, advance=count, note=note)

    def say(self, line: str) -> None:
        """Print one line."""
        console.print(printable(line), highlight=False, markup=False, emoji=False, soft_wrap=True)

    def warn(self, line: str) -> None:
        """Print one line on standard error, unless it was printed before."""
        if line in self._warned:
            return
        self._warned.add(line)
        errors.print(
            f"dapt: warning: {printable(line)}",
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=True,
        )


class _Lines:
    """A line a tenth of the work, and not too often: for a log file in place of a terminal."""

    def __init__(self, title: str, total: int | None) -> None:
        self.title, self.total, self.done = title, total, 0
        self.step = (total or 0) / 10
        self.next, self.spoke = self.step, time.monotonic()

    def __call__(self, count: int, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        finished = self.total is not None and self.done >= self.total
        if finished or (self.done >= self.next and now - self.spoke > 5):
            self.next, self.spoke = self.done + self.step, now
            among = "" if self.total is None else f" of {self.total}"
            line = printable(f"{self.title}: {self.done}{among} {note}".rstrip())
            errors.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
