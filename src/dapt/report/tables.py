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
from dapt.report.statistics import Estimate, Samples

PAGE = Path(__file__).parent / "page"  # templates and data


class _Kind(NamedTuple):
    """How numbers are shown: what they are multiplied by, digits, unit."""

    factor: float = 1.0
    digits: int = 0
    unit: str = ""

    def shown(self, value: float, signed: bool = False) -> str:
        """A number as text, a zero without a sign."""
        text = f"{value:{'+' if signed else ''},.{self.digits}f}"
        if float(text.replace(",", "")) == 0:
            text = text.lstrip("+-")
        return text.replace("-", "\N{MINUS SIGN}")


_KINDS = {
    "percent": _Kind(100.0, 1, "%"),  # a share
    "points": _Kind(100.0, 1, "points"),  # a difference of shares
    "seconds": _Kind(digits=1, unit="s"),
    "number": _Kind(digits=3),
    "count": _Kind(),
    "text": _Kind(),
}


class Named(NamedTuple):
    """What a table or figure is called: its files, and in one line.

    The caption is the part of the title that its surroundings do not say already.
    """

    name: str
    title: str
    caption: str


@dataclass(frozen=True)
class Cell:
    """A text, or a number with half its interval; and its runs.

    Attributes:
        text, interval: as shown.
        known: the number in the column's unit.
        sign: "gain" or "loss" for a difference whose interval excludes zero.
    """

    text: str
    runs: tuple[int, ...] = ()
    known: Estimate | None = None
    interval: str = ""
    sign: str = ""
    best: bool = False


NOTHING = Cell("–")


def words(text: object, runs: tuple[int, ...] = ()) -> Cell:
    """A text as a cell."""
    return Cell(clean(text), runs)


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

    def cell(self, key: Any) -> Cell:
        """The mean of samples with interval and runs, or a text."""
        found, how, interval, sign = self.of(key), _KINDS[self.kind], "", ""
        if isinstance(found, Cell):
            return found
        if not found:
            return NOTHING
        known, points = found.estimate(how.factor), self.kind == "points"
        if known.half is not None and self.kind != "seconds":  # which go by more than the seed
            interval = how.shown(known.half)
            if points and abs(known.mean) > known.half:
                sign = "gain" if known.mean > 0 else "loss"
        return Cell(how.shown(known.mean, points), found.runs, known, interval, sign)

    def cells(self, keys: Iterable[Any]) -> list[Cell]:
        """Its cells; the best as shown are marked, all of them where some are equal."""
        cells, digits = [self.cell(key) for key in keys], _KINDS[self.kind].digits
        known = [round(cell.known.mean, digits) for cell in cells if cell.known]
        if self.better is None or len(known) < 2:
            return cells
        best = max(known) if self.better == "high" else min(known)
        return [
            replace(cell, best=cell.known is not None and round(cell.known.mean, digits) == best)
            for cell in cells
        ]


class Row(NamedTuple):
    """A row: what it is called, the method whose colour it has, if any, and its cells."""

    label: str
    method: str | None
    cells: list[Cell]


class Table:
    """Rows of cells under columns; rows and columns without any are left out.

    Args:
        about: its name and title.
        corner: what the row labels are.
        columns: say what stands in them.
        rows: label, key and, if it has the colour of one, method of each.
        note: how to read it.

    Attributes:
        unit: that all columns have in common, if they do.
        heads: the corner, and column titles with units.
        widths: characters of each column's longest interval, which the others are aligned with.
    """

    def __init__(
        self,
        about: Named,
        corner: str,
        columns: Iterable[Column],
        rows: Sequence[tuple[str, Any, str | None]],
        note: str = "",
    ) -> None:
        self.about, self.note = about, note
        made = [(column, column.cells(key for _, key, _ in rows)) for column in columns]
        made = [(column, cells) for column, cells in made if set(cells) - {NOTHING}]
        self.columns = [column for column, _ in made]
        lines = zip(rows, *(cells for _, cells in made), strict=True)
        found = [Row(label, method, cells) for (label, _, method), *cells in lines]
        self.rows = [row for row in found if set(row.cells) - {NOTHING}]
        units = {column.unit for column in self.columns}
        self.unit = units.pop() if len(units) == 1 else ""
        self.heads = [corner]
        self.heads += (f"{c.title} ({c.unit})" if c.unit else c.title for c in self.columns)
        self.widths = [max(len(cell.interval) for cell in cells) for _, cells in made]

    def __bool__(self) -> bool:
        return bool(self.rows)

    def files(self) -> dict[str, str]:
        """Content by kind of file."""
        markdown, latex = map(TEMPLATES.get_template, ("table.md", "table.tex"))
        made = {"md": markdown.render(table=self), "csv": self.to_csv()}
        return {**made, "tex": latex.render(table=self)}

    def to_csv(self) -> str:
        """Numbers in full; the interval and the number of values have columns of their own."""
        made: list[list[Any]] = [[self.heads[0], *(row.label for row in self.rows)]]
        for i, (column, head) in enumerate(zip(self.columns, self.heads[1:], strict=True)):
            cells = [row.cells[i] for row in self.rows]
            if column.kind == "text":
                made.append([head, *(cell.text for cell in cells)])
                continue
            made.append([head, *(cell.known and cell.known.mean for cell in cells)])
            if self.widths[i]:
                made.append([f"{head} ±", *(cell.known and cell.known.half for cell in cells)])
                made.append([f"{head} n", *(cell.known and cell.known.count for cell in cells)])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [_inert(value) if isinstance(value, str) else value for value in line]
            for line in zip(*made, strict=True)
        )
        return text.getvalue()


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
    loader=jinja2.FileSystemLoader(PAGE),
    autoescape=lambda name: str(name).endswith(".html"),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"markdown": _markdown, "latex": _latex, "clean": clean}
