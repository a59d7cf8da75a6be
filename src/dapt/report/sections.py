"""What the parts of the page are made of, and made with."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dapt.report.collect import Measure, Run
from dapt.report.figures import Drawing, Entry, method_colour
from dapt.report.study import Scope, Study, row_of
from dapt.report.tables import HIGHER, LOWER, POINTS, Column, Kind, Named, Row, Table

# Datasets that get figures of their own; drawing takes a fifth of a second each. All have tables.
MOST_DATASETS = 12
# How figures are shown that are no shares, of which more is better.
_KINDS: dict[Measure, Kind] = {
    "ece": LOWER,
    "tuning": Kind(digits=1, unit="s", spread=False),
    "learned": Kind(spread=False),
    **dict.fromkeys(("inter before", "intra before"), Kind(digits=3)),
    "inter after": Kind(digits=3, best=max),
    "intra after": Kind(digits=3, best=min),
}
# Name, share of the images that were named right, and some that were not: data URI, what it was
# taken for and how sure that was.
HardClass = tuple[str, float, list[tuple[str, str, float]]]


@dataclass
class Block:
    """Figures and tables that belong together."""

    title: str = ""  # none where the section's says it already
    note: str = ""
    drawings: list[Drawing] = field(default_factory=list)
    tables: Sequence[Table] = ()
    legend: Sequence[Entry] = ()  # what the colours of the figures mean
    hardest: Sequence[HardClass] = ()
    beside: bool = False  # figures and tables stand side by side where there is room
    kind: str = ""  # of the figures: "", "natural", "pairs" (feature maps), "small" (reliability)
    runs: tuple[int, ...] = ()  # what the figures are drawn from

    @property
    def items(self) -> list[Drawing | Table]:
        """Its figures, and tables that are not empty."""
        return [*self.drawings, *filter(None, self.tables)]


class Maker(Study):
    """A study, and what the parts of the page are made with."""

    def __init__(self, runs: Sequence[Run], baseline: str | None = None) -> None:
        super().__init__(runs, baseline)
        # What was found with the backbone, if anything: drawings by dataset and kind, and the
        # hardest classes by number of the run.
        self.looked: dict[tuple[str, str], Block] = defaultdict(Block)
        self.hardest: dict[int, list[HardClass]] = defaultdict(list)
        self.drawn = self.datasets[:MOST_DATASETS]  # get figures
        self._taken: set[str] = set()

    def named(self, *parts: object, caption: str, title: str = "", of: str = "") -> Named:
        """A name for files after ``parts``, which no other has, and titles.

        By default a title is the caption and what it is ``of``.
        """
        base = re.sub(r"[^a-z0-9]+", "-", "-".join(map(str, parts)).lower()).strip("-")[:80]
        name, again = base or "figure", 2
        while name in self._taken:
            name, again = f"{base or 'figure'}-{again}", again + 1
        self._taken.add(name)
        return Named(name, title or (f"{caption}, {of}" if of else caption), caption)

    def best_compared(self) -> Scope:
        """The datasets with the most methods at the number of shots that most of them have."""
        scopes = [Scope([d], self.best(self.datasets).shots) for d in self.datasets]
        present = [sum(bool(self.samples(scope, m)) for m in self.methods) for scope in scopes]
        chosen = [s for s, count in zip(scopes, present, strict=True) if count == max(present)]
        return chosen[0]._replace(datasets=[d for scope in chosen for d in scope.datasets])

    def entry(self, method: str) -> Entry:
        """A method's line of a legend."""
        return Entry(method_colour(method, self.methods), row_of(method).title)

    def column(self, title: str, scope: Scope, measure: Measure = "accuracy") -> Column:
        """A measure of each method in a scope."""
        kind = _KINDS.get(measure, HIGHER)
        return Column(title, lambda m: self.samples(scope, m, measure), kind)

    def difference(self, title: str, scope: Scope, measure: Measure = "accuracy") -> Column:
        """Each method's to the baseline in a scope, paired."""
        return Column(title, lambda m: self.differences(scope, m, measure), POINTS)

    def by_method(
        self, about: Named, columns: Sequence[Column], note: str = "", methods: Iterable[str] = ()
    ) -> Table:
        """A table with a row for each method, or for some."""
        rows = [Row(row_of(m).title, m, m) for m in methods or self.methods]
        return Table(about, "method", columns, rows, note)


def loss_title(term: str) -> str:
    """A loss term in words."""
    return f"{term}-dispersion" if term in ("inter", "intra") else term.replace("_", "-")


def averaged(datasets: Sequence[str]) -> list[Sequence[str]]:
    """All datasets, if there are several, and each alone."""
    alone: list[Sequence[str]] = [[dataset] for dataset in datasets]
    return [datasets, *alone] if len(alone) > 1 else alone
