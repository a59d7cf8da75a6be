"""A table as data, and as Markdown, CSV and LaTeX. The page shows the same cells."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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


@dataclass(frozen=True)
class Named:
    """What a table or figure is called.

    Attributes:
        name: of its files.
        title: one line, of which ``caption`` is what its surroundings do not say already.
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
    half = None if found.half is None else factor * found.half
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

    @property
    def head(self) -> str:
        """Its title with the unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def cells(self, keys: Iterable[Any]) -> list[Cell]:
        """Its cells; the best as shown are marked, all of them where some are equal."""
        found = [self.of(key) for key in keys]
        cells = [cell if isinstance(cell, Cell) else number(self.kind, cell) for cell in found]
        if self.kind == "seconds":  # that depend on the machine more than on the seed
            cells = [replace(cell, half=None) for cell in cells]
        digits = _KINDS[self.kind].digits
        known = [round(cell.value, digits) for cell in cells if cell.value is not None]
        if self.better is None or len(known) < 2:
            return cells
        best = max(known) if self.better == "high" else min(known)
        return [replace(c, best=bool(c) and round(c.value or 0.0, digits) == best) for c in cells]


@dataclass(frozen=True)
class Row:
    """A row: what it is called, its key, and the method whose colour it has, if any."""

    label: str
    key: Any
    method: str | None = None
    cells: tuple[Cell, ...] = ()


class Table:
    """Rows of cells under columns; rows and columns without any are left out.

    Args:
        about: its name and title.
        corner: what the row labels are.
        columns: say what stands in them.
        rows: without cells.
        note: how to read it.
    """

    def __init__(
        self, about: Named, corner: str, columns: list[Column], rows: list[Row], note: str = ""
    ) -> None:
        self.about, self.corner, self.note = about, corner, note
        made = [(column, column.cells([row.key for row in rows])) for column in columns]
        made = [(column, cells) for column, cells in made if any(cells)]
        self.columns = [column for column, _ in made]
        lines = zip(*(cells for _, cells in made), strict=True)
        self.rows = [replace(row, cells=c) for row, c in zip(rows, lines, strict=False) if any(c)]

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

    def files(self) -> dict[str, bytes | str]:
        """Content by kind of file."""
        return {"md": self.to_markdown(), "csv": self.to_csv(), "tex": self.to_latex()}

    def to_csv(self) -> str:
        """Numbers in full; the interval and the number of values have columns of their own."""
        head, lines = [_inert(self.corner)], [[_inert(row.label)] for row in self.rows]
        for i, column in enumerate(self.columns):
            more = self.interval_width(i) > 0
            titles = (column.head, f"{column.head} ±", f"{column.head} n")
            head += map(_inert, titles[: 3 if more else 1])
            for line, row in zip(lines, self.rows, strict=True):
                cell = row.cells[i]
                line.append(_inert(cell.text) if column.kind == "text" else _in_full(cell.value))
                line += (_in_full(cell.half), str(cell.count or "")) if more else ()
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([head, *lines])
        return text.getvalue()

    def to_markdown(self) -> str:
        """A GitHub-flavoured table with its title and note, the best in bold."""

        def shown(cell: Cell) -> str:
            text = _markdown(f"{cell.number} ± {cell.interval}" if cell.interval else cell.number)
            return f"**{text}**" if cell.best else text

        head, *rows = self._lines(_markdown, shown)
        rule = ["---", *("---" if c.kind == "text" else "---:" for c in self.columns)]
        body = "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))
        note = f"\n{_markdown(self.note)}\n" if self.note else ""
        return f"**{_markdown(self.about.title)}**\n\n{body}\n{note}"

    def to_latex(self) -> str:
        """A ``table`` with booktabs rules."""

        def shown(cell: Cell) -> str:
            bold = rf"\textbf{{{_latex(cell.number)}}}" if cell.best else _latex(cell.number)
            return rf"{bold} $\pm$ {cell.interval}" if cell.interval else bold

        head, *rows = (" & ".join(line) + r" \\" for line in self._lines(_latex, shown))
        align = "l" + "".join("l" if c.kind == "text" else "r" for c in self.columns)
        body = "\n".join([head, r"\midrule", *rows])
        note = f"\n\\smallskip\n{{\\footnotesize {_latex(self.note)}}}\n" if self.note else ""
        return (
            "% needs \\usepackage{booktabs}\n\\begin{table}\n\\centering\n"
            f"\\caption{{{_latex(self.about.title)}}}\n"
            f"\\begin{{tabular}}{{{align}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"
            f"{note}\\end{{table}}\n"
        )

    def _lines(self, text: Callable[[str], str], cell: Callable[[Cell], str]) -> list[list[str]]:
        """The head and the rows, as another format writes texts and cells."""
        head = [self.corner, *(column.head for column in self.columns)]
        rows = ([text(row.label), *map(cell, row.cells)] for row in self.rows)
        return [[text(title) for title in head], *rows]


def _in_full(value: float | None) -> str:
    return "" if value is None else repr(value)


def _inert(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _markdown(text: str) -> str:
    escaped = re.sub(r"([\\`*_\[\]|#])", r"\\\1", text)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


_LATEX = {c: f"\\{c}" for c in "{}$&#%_"} | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "±": r"$\pm$", "–": "--", "…": r"\ldots{}", "→": r"$\rightarrow$", "−": "$-$",
    "·": r"$\cdot$"}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)
