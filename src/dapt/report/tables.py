"""Numbers by seed, and tables of them as data, Markdown, CSV and LaTeX, and on the page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from scipy.stats import t as student

from dapt.errors import UserError, spreadsheet_cell
from dapt.safe.files import open_regular

PAGE = Path(__file__).parent / "page"  # templates and data
CONFIDENCE = 0.95
MOST_ROWS = 8  # of a table of methods that needs no groups
_INTERVAL = (
    f"Mean over seeds ± half of its {100 * CONFIDENCE:g} % interval (Student's t), which is no "
    "standard deviation."
)


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its interval, which one value alone does not have."""

    mean: float
    half: float | None
    count: int


def estimate(values: Sequence[float], factor: float = 1.0) -> Estimate:
    """Mean of ``values`` with Student's t interval, n - 1 degrees of freedom, times a factor."""
    count, mean = len(values), factor * float(np.mean(values))
    if count < 2:
        return Estimate(mean, None, count)
    spread = float(np.std(values, ddof=1)) / count**0.5
    half = float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread
    return Estimate(mean, factor * half, count)


class Sample(NamedTuple):
    """One number, and the runs it came from."""

    value: float
    runs: tuple[int, ...]


class Samples(dict[int, Sample]):
    """Samples by seed."""

    def estimate(self, factor: float = 1.0) -> Estimate:
        """Their mean with its interval, times a factor."""
        return estimate([sample.value for sample in self.values()], factor)

    def __sub__(self, other: Samples) -> Samples:
        """Differences of what has the same seed."""
        pairs = [(seed, own, other[seed]) for seed, own in self.items() if seed in other]
        return Samples({seed: Sample(a.value - b.value, runs_of((a, b))) for seed, a, b in pairs})


def runs_of(parts: Iterable[Any]) -> tuple[int, ...]:
    """Runs that any of the parts came from: samples by seed or alone, or cells of a table."""
    return tuple(sorted({n for part in parts for n in part.runs}))


def mean(samples: Sequence[Sample]) -> Sample:
    """Their mean."""
    return Sample(sum(s.value for s in samples) / len(samples), runs_of(samples))


def mean_by_seed(parts: Sequence[Samples]) -> Samples:
    """Mean by seed, for the seeds that all parts have."""
    seeds = sorted(set.intersection(*map(set, parts))) if parts else ()
    return Samples({seed: mean([part[seed] for part in parts]) for seed in seeds})


class Named(NamedTuple):
    """What a table or figure is called: its files, and in one line."""

    name: str
    title: str
    caption: str  # the part of the title that its surroundings do not say already


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
        text, runs = self._text(known.mean, self.signed), runs_of(found.values())
        return Cell(text, runs, known, interval, sign)

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
# Of a run's figures that are no shares, of which more is better.
KINDS = {
    "ece": LOWER,
    "expected": SHARE,  # of new photos, and the interval of that
    **dict.fromkeys(("from", "to"), SHARE._replace(spread=False)),
    "tuning": Kind(digits=1, unit="s", spread=False),
    "step": Kind(1e3, 1, "ms", spread=False),
    "predict": Kind(1e3, 2, "ms", spread=False),
    "peak": Kind(1e-9, 2, "GB", spread=False),
    "learned": Kind(spread=False),
    **dict.fromkeys(("inter before", "intra before"), Kind(digits=3)),
    "inter after": Kind(digits=3, best=max),
    "intra after": Kind(digits=3, best=min),
}


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
        self, about: Named, corner: str, columns: list[Column], rows: list[Row], note: str = ""
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
        made = {kind: TEMPLATES.get_template(f"table.{kind}") for kind in ("md", "csv", "tex")}
        # The page says it once for all; a file goes into a paper alone.
        intervals = any(cell.interval for column in self.columns for cell in column.cells)
        note = " ".join(filter(None, (self.note, _INTERVAL if intervals else "")))
        return {kind: template.render(table=self, note=note) for kind, template in made.items()}


# Control and surrogate characters, what XML does not take, and what makes text after it run the
# other way: a name could rearrange the line it stands in.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def clean(value: object, limit: int = 120) -> str:
    """One short printable line."""
    text = _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", str(value)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def shown(value: object) -> str:
    """A setting's value as tables show it."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return str(value).removesuffix(".0")  # as people write it: 10
    return clean(value if isinstance(value, str) else json.dumps(value, default=str))


def _csv(text: str) -> str:
    """A field of text that no spreadsheet takes for a formula."""
    text = spreadsheet_cell(text)
    return '"' + text.replace('"', '""') + '"' if re.search('[,"\r\n]', text) else text


_MARKDOWN = {c: f"\\{c}" for c in r"\`*_[]|#"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_LATEX = {c: f"\\{c}" for c in "{}$&#%_"} | {
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "–": "--",
    "…": r"\ldots{}", "→": r"$\rightarrow$", "−": "$-$", "·": r"$\cdot$",
}  # fmt: skip
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(PAGE),
    autoescape=lambda name: str(name).endswith(".html"),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.tests["of_kind"] = lambda method, row_of, kind: row_of(method).kind == kind
TEMPLATES.filters |= {
    "csv": _csv,
    "clean": clean,
    "markdown": lambda text: text.translate(str.maketrans(_MARKDOWN)),
    "latex": lambda text: text.translate(str.maketrans(_LATEX)),
}


def require_page(path: Path, option: str, generator: str) -> None:
    """Refuse, as a `UserError`, a path that is no place for a page, or holds something else.

    A page that may be replaced is known by ``generator``, an element of its head.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{option} {path}: give a file that ends in .html")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: its folder does not exist, or it is one; give a file")
    known = False
    with suppress(OSError), open_regular(path) as file:
        known = generator.encode() in file.read(1000)
    if path.exists() and not known:
        raise UserError(f"{option} {path} is there and not a report; choose another")
