"""A table as data, and as Markdown, CSV and LaTeX. The page shows the same cells."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from dapt.report.collect import clean
from dapt.report.statistics import Samples, estimate, runs_of


class _Kind(NamedTuple):
    """How numbers are shown: what they are multiplied by, digits, unit."""

    factor: float = 1.0
    digits: int = 0
    unit: str = ""


_KINDS = {
    "percent": _Kind(100.0, 1, "%"),  # a share
    "points": _Kind(100.0, 1, "points"),  # a difference of shares
    "seconds": _Kind(digits=1, unit="s"),
    "number": _Kind(digits=3),
    "count": _Kind(),
    "text": _Kind(),
}


class Named(NamedTuple):
    """What a table or figure is called.

    Attributes:
        name: of its files.
        title: one line.
        caption: the part of it that its surroundings do not say already.
    """

    name: str
    title: str
    caption: str


@dataclass(frozen=True)
class Cell:
    """A number with half its interval in the column's unit, or a text; and its runs."""

    kind: str = "text"
    value: float | None = None
    half: float | None = None
    count: int = 0
    text: str = ""
    runs: tuple[int, ...] = ()
    best: bool = False

    def __bool__(self) -> bool:
        return self.value is not None or bool(self.text)

    @property
    def number(self) -> str:
        """The number as shown, a difference with its sign; or the text."""
        if self.kind == "text":
            return self.text
        return "–" if self.value is None else self._format(self.value, self.kind == "points")

    @property
    def interval(self) -> str:
        """Half the interval as shown, or nothing."""
        return "" if self.half is None else self._format(self.half)

    @property
    def sign(self) -> str:
        """ "gain" or "loss" for a difference whose interval excludes zero."""
        if self.kind != "points" or self.value is None or self.half is None:
            return ""
        return "" if abs(self.value) <= self.half else "gain" if self.value > 0 else "loss"

    def _format(self, value: float, signed: bool = False) -> str:
        text = f"{value:{'+' if signed else ''},.{_KINDS[self.kind].digits}f}"
        if float(text.replace(",", "")) == 0:  # no minus before a zero
            text = text.lstrip("+-")
        return text.replace("-", "\N{MINUS SIGN}")


def number(kind: str, samples: Samples) -> Cell:
    """The mean of samples as a cell, with its interval and runs."""
    if not samples:
        return Cell(kind)
    factor, found = _KINDS[kind].factor, estimate([s.value for s in samples.values()])
    # Seconds depend on the machine more than on the seed.
    half = None if found.half is None or kind == "seconds" else factor * found.half
    return Cell(kind, factor * found.mean, half, found.count, runs=runs_of(samples.values()))


def words(text: object, runs: Iterable[int] = ()) -> Cell:
    """A text as a cell."""
    return Cell(text=clean(text), runs=tuple(runs))


@dataclass(frozen=True)
class Column:
    """A column of numbers (or of text).

    Attributes:
        title: its head.
        of: what stands in it, by the row's key.
        kind: percent (a share), points (a difference of shares), seconds, number, count, text.
        better: "high" or "low", where one of the rows is the best.
    """

    title: str
    of: Callable[[Any], Samples | Cell]
    kind: str = "percent"
    better: str | None = None

    @property
    def unit(self) -> str:
        """What its numbers are in; empty where they have no unit."""
        return _KINDS[self.kind].unit

    def cells(self, keys: Iterable[Any]) -> list[Cell]:
        """Its cells; the best as shown are marked, all of them where some are equal."""
        found = [self.of(key) for key in keys]
        cells = [cell if isinstance(cell, Cell) else number(self.kind, cell) for cell in found]
        digits = _KINDS[self.kind].digits
        known = [round(cell.value, digits) for cell in cells if cell.value is not None]
        if self.better is None or len(known) < 2:
            return cells
        best = max(known) if self.better == "high" else min(known)
        return [replace(c, best=bool(c) and round(c.value or 0.0, digits) == best) for c in cells]


class Row(NamedTuple):
    """A row: what it is called, the method whose colour it has, if any, and its cells."""

    label: str
    method: str | None
    cells: tuple[Cell, ...]


class Table:
    """Rows of cells under columns; rows and columns without any are left out.

    Args:
        about: its name and title.
        corner: what the row labels are.
        columns: say what stands in them.
        rows: label, key and, if it has the colour of one, method of each.
        note: how to read it.
    """

    def __init__(
        self,
        about: Named,
        corner: str,
        columns: Sequence[Column],
        rows: Sequence[tuple[str, Any, str | None]],
        note: str = "",
    ) -> None:
        self.about, self.corner, self.note = about, corner, note
        made = [(column, column.cells(key for _, key, _ in rows)) for column in columns]
        made = [(column, cells) for column, cells in made if any(cells)]
        self.columns = [column for column, _ in made]
        lines = zip(rows, *(cells for _, cells in made), strict=True)
        found = [Row(label, method, tuple(cells)) for (label, _, method), *cells in lines]
        self.rows = [row for row in found if any(row.cells)]

    def __bool__(self) -> bool:
        return bool(self.rows)

    def interval_width(self, index: int) -> int:
        """Characters of a column's longest interval, which the others are aligned with."""
        return max(len(row.cells[index].interval) for row in self.rows)

    @property
    def unit(self) -> str:
        """The unit that all columns have in common, if they do."""
        units = {column.unit for column in self.columns}
        return units.pop() if len(units) == 1 else ""

    def heads(self) -> list[str]:
        """The corner, and column titles with units."""
        units = (f" ({column.unit})" if column.unit else "" for column in self.columns)
        return [self.corner, *(c.title + u for c, u in zip(self.columns, units, strict=True))]

    def files(self) -> dict[str, str]:
        """Content by kind of file."""
        markdown, latex = map(TEMPLATES.get_template, ("table.md", "table.tex"))
        made = {"md": markdown.render(table=self), "csv": self.to_csv()}
        return {**made, "tex": latex.render(table=self)}

    def to_csv(self) -> str:
        """Numbers in full; the interval and the number of values have columns of their own."""
        corner, *heads = map(_inert, self.heads())
        lines = [[corner], *([_inert(row.label)] for row in self.rows)]
        for i, head in enumerate(heads):
            more = self.interval_width(i) > 0
            lines[0] += [head, f"{head} ±", f"{head} n"][: 3 if more else 1]
            for line, row in zip(lines[1:], self.rows, strict=True):
                cell = row.cells[i]
                line.append(_inert(cell.text) if cell.kind == "text" else _in_full(cell.value))
                line += (_in_full(cell.half), str(cell.count or "")) if more else ()
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        return text.getvalue()


def _in_full(value: float | None) -> str:
    return "" if value is None else repr(value)


def _inert(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _markdown(text: str) -> str:
    escaped = re.sub(r"([\\`*_\[\]|#])", r"\\\1", text)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


_LATEX = {c: f"\\{c}" for c in "{}$&#%_"} | {
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "–": "--",
    "…": r"\ldots{}", "→": r"$\rightarrow$", "−": "$-$", "·": r"$\cdot$",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "page"),
    autoescape=lambda name: str(name).endswith(".html"),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"markdown": _markdown, "latex": _latex, "clean": clean}
