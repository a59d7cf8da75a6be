"""A table as data, and as Markdown, CSV and LaTeX. The page shows the same cells."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from dapt.report.collect import clean
from dapt.report.statistics import Samples, estimate, runs_of, values_of

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


class Cell(NamedTuple):
    """A text, or a number in the column's unit with half its interval; and its runs.

    Attributes:
        text, interval: as shown.
        value, half, count: in full, and of how many values.
        sign: "gain" or "loss" for a difference whose interval excludes zero.
    """

    text: str
    runs: tuple[int, ...] = ()
    value: float | None = None
    half: float | None = None
    count: int = 0
    interval: str = ""
    sign: str = ""
    best: bool = False


NOTHING = Cell("–")


def words(text: object, runs: Iterable[int] = ()) -> Cell:
    """A text as a cell."""
    return Cell(clean(text), tuple(runs))


def number(kind: str, samples: Samples) -> Cell:
    """The mean of samples as a cell, with its interval and runs."""
    if not samples:
        return NOTHING
    how, runs, interval, sign = _KINDS[kind], runs_of(samples.values()), "", ""
    value, half, count = estimate(values_of(samples), how.factor)
    if half is not None:
        # Seconds depend on more than the seed.
        interval = how.shown(half) if kind != "seconds" else ""
        if kind == "points" and abs(value) > half:
            sign = "gain" if value > 0 else "loss"
    return Cell(how.shown(value, kind == "points"), runs, value, half, count, interval, sign)


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
        rounded = [round(c.value or 0.0, _KINDS[self.kind].digits) for c in cells]
        known = [value for value, cell in zip(rounded, cells, strict=True) if cell != NOTHING]
        if self.better is None or len(known) < 2:
            return cells
        best = max(known) if self.better == "high" else min(known)
        pairs = zip(cells, rounded, strict=True)
        return [
            c._replace(best=True) if value == best and c != NOTHING else c for c, value in pairs
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
        self.about, self.corner, self.note = about, corner, note
        made = [(column, column.cells(key for _, key, _ in rows)) for column in columns]
        made = [(column, cells) for column, cells in made if set(cells) - {NOTHING}]
        self.columns = [column for column, _ in made]
        lines = zip(rows, *(cells for _, cells in made), strict=True)
        found = [Row(label, method, cells) for (label, _, method), *cells in lines]
        self.rows = [row for row in found if set(row.cells) - {NOTHING}]
        units = {column.unit for column in self.columns}
        self.unit = units.pop() if len(units) == 1 else ""
        heads = (f"{c.title} ({c.unit})" if c.unit else c.title for c in self.columns)
        self.heads = [corner, *heads]
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
        lines = [[_inert(self.corner)], *([_inert(row.label)] for row in self.rows)]
        for i, (column, width) in enumerate(zip(self.columns, self.widths, strict=True)):
            head = _inert(self.heads[i + 1])
            lines[0] += [head, f"{head} ±", f"{head} n"][: 3 if width else 1]
            for line, row in zip(lines[1:], self.rows, strict=True):
                cell = row.cells[i]
                line += [_inert(cell.text) if column.kind == "text" else _in_full(cell.value)]
                line += [_in_full(cell.half), str(cell.count or "")] if width else []
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
    loader=jinja2.FileSystemLoader(PAGE),
    autoescape=lambda name: str(name).endswith(".html"),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"markdown": _markdown, "latex": _latex, "clean": clean}
