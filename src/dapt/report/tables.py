"""A table as data, and as Markdown, CSV and LaTeX. The page shows the same cells."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dapt.report.collect import clean
from dapt.report.statistics import estimate
from dapt.report.study import Samples

_FACTOR = {"percent": 100.0, "points": 100.0}
_DIGITS = {"percent": 1, "points": 1, "seconds": 1, "number": 3, "count": 0}
_UNIT = {"percent": "%", "points": "points", "seconds": "s"}

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """A column of numbers (or of text).

    Attributes:
        title: its head.
        kind: percent (a share), points (a difference of shares), seconds, number, count, text.
        better: "high" or "low", where one of the rows is the best.
    """

    title: str
    kind: str = "percent"
    better: str | None = None

    @property
    def unit(self) -> str:
        """What its numbers are in; empty where they have no unit."""
        return _UNIT.get(self.kind, "")


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

    @property
    def number(self) -> str:
        """The number as shown; a difference has its sign."""
        return MISSING if self.value is None else self._format(self.value, self.kind == "points")

    @property
    def interval(self) -> str:
        """Half the interval as shown, or nothing."""
        return "" if self.half is None else self._format(self.half)

    @property
    def shown(self) -> str:
        """All of it, as plain text."""
        if self.kind == "text":
            return self.text
        return f"{self.number} ± {self.interval}" if self.interval else self.number

    @property
    def sign(self) -> str:
        """ "gain" or "loss" for a difference whose interval excludes zero."""
        if self.kind != "points" or self.value is None or self.half is None:
            return ""
        return "" if abs(self.value) <= self.half else "gain" if self.value > 0 else "loss"

    def _format(self, value: float, signed: bool = False) -> str:
        digits = _DIGITS[self.kind]
        text = f"{value:{'+' if signed else ''},.{digits}f}"
        if float(text.replace(",", "")) == 0:  # no minus before a zero
            text = text.lstrip("+-")
        return text.replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Row:
    """A row: what it is called, its cells, and the method whose colour it has, if any."""

    label: str
    cells: Sequence[Cell]
    method: str | None = None


@dataclass
class Table:
    """Rows of cells under columns.

    Attributes:
        name: of its files.
        title: one line.
        corner: what the row labels are.
        note: how to read it.
        caption: the title where its surroundings say the rest already.
    """

    name: str
    title: str
    corner: str
    columns: list[Column]
    rows: list[Row]
    note: str = ""
    caption: str = ""

    def __post_init__(self) -> None:
        filled = [
            i
            for i, column in enumerate(self.columns)
            if any(row.cells[i].value is not None or row.cells[i].text for row in self.rows)
        ]
        self.columns = [self.columns[i] for i in filled]
        self.rows = [
            Row(row.label, [row.cells[i] for i in filled], row.method)
            for row in self.rows
            if any(row.cells[i].value is not None or row.cells[i].text for i in filled)
        ]
        for i, column in enumerate(self.columns):
            self._mark_best(i, column)

    def __bool__(self) -> bool:
        return bool(self.rows)

    def _mark_best(self, index: int, column: Column) -> None:
        """The best of a column as shown, all of them where some are equal."""
        values = [row.cells[index].value for row in self.rows]
        known = [round(v, _DIGITS[column.kind]) for v in values if v is not None]
        if column.better is None or len(known) < 2:
            return
        best = max(known) if column.better == "high" else min(known)
        for i, row in enumerate(self.rows):
            cell = row.cells[index]
            if cell.value is not None and round(cell.value, _DIGITS[column.kind]) == best:
                cells = list(row.cells)
                cells[index] = replace(cell, best=True)
                self.rows[i] = replace(row, cells=cells)

    def has_interval(self, index: int) -> bool:
        """Whether any number of a column has one."""
        return any(row.cells[index].half is not None for row in self.rows)

    def interval_width(self, index: int) -> int:
        """Characters of a column's longest interval, which the others are aligned with."""
        return max(len(row.cells[index].interval) for row in self.rows)

    @property
    def unit(self) -> str:
        """The unit that all columns have in common, if they do."""
        units = {column.unit for column in self.columns}
        return units.pop() if len(units) == 1 else ""

    def heads(self) -> list[str]:
        """Column titles with units."""
        return [f"{c.title} ({c.unit})" if c.unit else c.title for c in self.columns]

    def to_csv(self) -> str:
        """Numbers in full; the interval and the number of values have columns of their own."""
        head = [self.corner]
        for i, title in enumerate(self.heads()):
            head += [title, f"{title} ±", f"{title} n"] if self.has_interval(i) else [title]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(map(_inert, head))
        for row in self.rows:
            line: list[str] = [_inert(row.label)]
            for i, cell in enumerate(row.cells):
                if cell.kind == "text":
                    line.append(_inert(cell.text))
                    continue
                line.append("" if cell.value is None else repr(cell.value))
                if self.has_interval(i):
                    line.append("" if cell.half is None else repr(cell.half))
                    line.append(str(cell.count) if cell.count else "")
            writer.writerow(line)
        return text.getvalue()

    def to_markdown(self) -> str:
        """A GitHub-flavoured table with its title and note, the best in bold."""
        aligned = ["---", *("---" if c.kind == "text" else "---:" for c in self.columns)]
        lines = [[_markdown(h) for h in (self.corner, *self.heads())], aligned]
        for row in self.rows:
            cells = [_markdown(c.shown) for c in row.cells]
            bold = [f"**{t}**" if c.best else t for c, t in zip(row.cells, cells, strict=True)]
            lines.append([_markdown(row.label), *bold])
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        note = f"\n{_markdown(self.note)}\n" if self.note else ""
        return f"**{_markdown(self.title)}**\n\n{body}\n{note}"

    def to_latex(self) -> str:
        """A ``table`` with booktabs rules."""
        align = "l" + "".join("l" if c.kind == "text" else "r" for c in self.columns)
        lines = [" & ".join(_latex(h) for h in (self.corner, *self.heads())) + r" \\", r"\midrule"]
        for row in self.rows:
            cells = [_latex_cell(cell) for cell in row.cells]
            lines.append(" & ".join([_latex(row.label), *cells]) + r" \\")
        body = "\n".join(lines)
        note = f"\n\\smallskip\n{{\\footnotesize {_latex(self.note)}}}\n" if self.note else ""
        return (
            "% needs \\usepackage{booktabs}\n\\begin{table}\n\\centering\n"
            f"\\caption{{{_latex(self.title)}}}\n"
            f"\\begin{{tabular}}{{{align}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"
            f"{note}\\end{{table}}\n"
        )


def number(kind: str, samples: Samples) -> Cell:
    """The mean of samples as a cell, with its interval and runs."""
    if not samples:
        return Cell(kind)
    factor = _FACTOR.get(kind, 1.0)
    found = estimate([sample.value for sample in samples.values()])
    return Cell(
        kind,
        factor * found.mean,
        None if found.half is None else factor * found.half,
        found.count,
        runs=tuple(sorted({n for sample in samples.values() for n in sample.runs})),
    )


def single(kind: str, value: float | None, runs: Iterable[int] = ()) -> Cell:
    """One number as a cell, without an interval."""
    if value is None:
        return Cell(kind)
    return Cell(kind, _FACTOR.get(kind, 1.0) * float(value), None, 1, runs=tuple(sorted(runs)))


def words(text: object, runs: Iterable[int] = ()) -> Cell:
    """A text as a cell."""
    return Cell(text=clean(text), runs=tuple(runs))


def _inert(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _markdown(text: str) -> str:
    escaped = re.sub(r"([\\`*_\[\]|#])", r"\\\1", text)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "±": r"$\pm$",
    "–": "--",
    "…": r"\ldots{}",
    "→": r"$\rightarrow$",
    "−": "$-$",
    "·": r"$\cdot$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)


def _latex_cell(cell: Cell) -> str:
    if cell.kind == "text":
        return _latex(cell.text)
    number = _latex(cell.number)
    bold = rf"\textbf{{{number}}}" if cell.best else number
    return rf"{bold} $\pm$ {cell.interval}" if cell.interval else bold
