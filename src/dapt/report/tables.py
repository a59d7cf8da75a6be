"""A table as data, and as Markdown, CSV and LaTeX. The page shows the same cells."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from dapt.report.collect import clean
from dapt.report.statistics import Estimate, Samples, runs_of

PAGE = Path(__file__).parent / "page"  # templates and data


class Named(NamedTuple):
    """What a table or figure is called: its files, and in one line.

    The caption is the part of the title that its surroundings do not say already.
    """

    name: str
    title: str
    caption: str


class Cell(NamedTuple):
    """A text, or a number with half its interval, as shown and in full; and its runs."""

    text: str
    runs: tuple[int, ...] = ()
    known: Estimate | None = None  # in the column's unit
    interval: str = ""
    sign: str = ""  # "gain" or "loss" for a difference whose interval excludes zero
    best: bool = False


NOTHING = Cell("–")


class Kind(NamedTuple):
    """How numbers are shown."""

    factor: float = 1.0
    digits: int = 0
    unit: str = ""
    best: Callable[[Iterable[float]], float] | None = None  # max or min, where a row is the best
    signed: bool = False  # a difference
    spread: bool = True  # the interval of a mean says something

    def cells(self, found: Iterable[Samples | Cell]) -> list[Cell]:
        """A column's; the best as shown are marked, all of them where some are equal."""
        cells = [one if isinstance(one, Cell) else self._cell(one) for one in found]
        shown = [round(c.known.mean, self.digits) if c.known else None for c in cells]
        known = [value for value in shown if value is not None]
        if self.best is None or len(known) < 2:
            return cells
        best = self.best(known)
        return [c._replace(best=v == best) for c, v in zip(cells, shown, strict=True)]

    def _cell(self, found: Samples) -> Cell:
        if not found:
            return NOTHING
        known, interval, sign = found.estimate(self.factor), "", ""
        if known.half is not None and self.spread:
            interval = self._text(known.half)
            if self.signed and abs(known.mean) > known.half:
                sign = "gain" if known.mean > 0 else "loss"
        return Cell(self._text(known.mean, self.signed), found.runs, known, interval, sign)

    def _text(self, value: float, signed: bool = False) -> str:
        """A number as text, a zero without a sign."""
        text = f"{value:{'+' if signed else ''},.{self.digits}f}"
        if float(text.replace(",", "")) == 0:
            text = text.lstrip("+-")
        return text.replace("-", "\N{MINUS SIGN}")


PLAIN = Kind()  # counts and texts
SHARE = Kind(100.0, 1, "%")
HIGHER, LOWER = SHARE._replace(best=max), SHARE._replace(best=min)  # are better
POINTS = Kind(100.0, 1, "points", signed=True)


class Column(NamedTuple):
    """A column: its head, what stands in it by a row's key, and in a table its cells."""

    title: str
    of: Callable[[Any], Samples | Cell]
    kind: Kind = SHARE
    cells: Sequence[Cell] = ()

    @property
    def head(self) -> str:
        """Its title with the unit."""
        return f"{self.title} ({self.kind.unit})" if self.kind.unit else self.title


class Row(NamedTuple):
    """What a row is called, what its cells are looked up by, and whose colour it has, if any."""

    label: str
    key: Any
    method: str | None = None


class Table:
    """Rows of cells under columns; rows and columns without any are left out."""

    def __init__(
        self,
        about: Named,
        corner: str,
        columns: Iterable[Column],
        rows: Sequence[Row],
        note: str = "",
    ) -> None:
        self.about, self.corner, self.note = about, corner, note
        filled = [c._replace(cells=c.kind.cells(c.of(row.key) for row in rows)) for c in columns]
        filled = [column for column in filled if set(column.cells) - {NOTHING}]
        kept = [i for i in range(len(rows)) if any(c.cells[i] != NOTHING for c in filled)]
        self.columns = [column._replace(cells=[column.cells[i] for i in kept]) for column in filled]
        self.rows = [rows[i] for i in kept]

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def runs(self) -> tuple[int, ...]:
        """Those that any of its numbers came from."""
        return runs_of(cell for column in self.columns for cell in column.cells)

    @property
    def files(self) -> dict[str, bytes | str]:
        """Content by kind of file."""
        markdown, latex = map(TEMPLATES.get_template, ("table.md", "table.tex"))
        made = {"md": markdown.render(table=self), "csv": self._csv()}
        return {**made, "tex": latex.render(table=self)}

    def _csv(self) -> str:
        """Numbers in full; the interval and the number of values have columns of their own."""
        made: list[list[Any]] = [[self.corner, *(row.label for row in self.rows)]]
        for column in self.columns:
            known = [cell.known for cell in column.cells]
            texts = [cell.text for cell in column.cells]
            made.append([column.head, *([k and k.mean for k in known] if any(known) else texts)])
            if any(cell.interval for cell in column.cells):
                made.append([f"{column.head} ±", *(k and k.half for k in known)])
                made.append([f"{column.head} n", *(k and k.count for k in known)])
        text, lines = io.StringIO(), zip(*made, strict=True)
        csv.writer(text, lineterminator="\n").writerows(
            [_inert(value) if isinstance(value, str) else value for value in line] for line in lines
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
