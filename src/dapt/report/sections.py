"""What a part of the page is made of, and what all parts are made with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dapt.report.features import HardClass, Inside
from dapt.report.figures import Drawing, Entry, method_colour
from dapt.report.rows import method_title
from dapt.report.study import ACCURACY, Measure, Study
from dapt.report.tables import Column, Named, Row, Table

# Datasets that get figures of their own; drawing takes a fifth of a second each. All have tables.
MOST_DATASETS = 12


@dataclass
class Block:
    """Figures and tables that belong together.

    Attributes:
        title: its heading; none where the section's says it already.
        legend: what the colours of the figures mean.
        beside: whether figures and tables stand side by side where there is room.
        size: of the figures: "", "small", "pairs" or "natural".
        runs: what the figures are drawn from.
    """

    title: str = ""
    note: str = ""
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    legend: Sequence[Entry] = ()
    examples: list[HardClass] = field(default_factory=list)
    beside: bool = False
    size: str = ""
    runs: tuple[int, ...] = ()


class Section:
    """A part of the report; ``absent`` says what it would need, where it is empty."""

    def __init__(self, id: str, title: str, lead: str, blocks: Iterable[Block], absent: str):
        self.id, self.title, self.lead, self.absent = id, title, lead, absent
        self.blocks = []
        for block in blocks:
            block.tables = [table for table in block.tables if table]
            if block.drawings or block.tables or block.examples:
                self.blocks.append(block)


class Maker:
    """What sections are made with.

    Args:
        study: the runs.

    Attributes:
        inside: what was found with the backbone, if anything.
        warnings: on what could not be read.
        drawn: datasets that get figures.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.inside: list[Inside] = []
        self.warnings: list[str] = []
        self.drawn = study.datasets[:MOST_DATASETS]
        self._taken: set[str] = set()

    def named(self, *parts: object, title: str, caption: str = "") -> Named:
        """A name for files that no other has, of letters, digits and hyphens; and a title."""
        text = "-".join(map(str, parts)).lower()
        base = re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:80] or "figure"
        name, again = base, 2
        while name in self._taken:
            name, again = f"{base}-{again}", again + 1
        self._taken.add(name)
        return Named(name, title, caption or title)

    def entry(self, method: str) -> Entry:
        """A method's line of a legend."""
        return Entry(method_colour(method, self.study.methods), method_title(method))

    def column(
        self,
        title: str,
        datasets: Sequence[str],
        shots: int,
        measure: Measure = ACCURACY,
        kind: str = "percent",
        better: str | None = "high",
        classes: str | None = None,
    ) -> Column:
        """A measure of each method's main runs."""
        return Column(
            title,
            lambda method: self.study.samples(datasets, method, shots, measure, classes=classes),
            kind,
            better,
        )

    def difference(
        self,
        title: str,
        datasets: Sequence[str],
        shots: int,
        measure: Measure = ACCURACY,
        classes: str | None = None,
    ) -> Column:
        """Each method's to the baseline, paired."""
        return Column(
            title,
            lambda method: self.study.differences(datasets, method, shots, measure, classes),
            "points",
        )

    def by_method(
        self,
        about: Named,
        columns: list[Column],
        note: str = "",
        methods: Iterable[str] | None = None,
    ) -> Table:
        """A table with a row for each method."""
        shown = self.study.methods if methods is None else methods
        rows = [Row(method_title(m), m, m) for m in shown]
        return Table(about, "method", columns, rows, note)


def shots_of(number: int) -> str:
    """A number of shots in words."""
    return f"{number} shot" if number == 1 else f"{number} shots"
