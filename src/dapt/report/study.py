"""Runs put in order: which are repeats of one another by seed, and which vary a setting.

Two runs of one dataset, method, number of shots and seed that differ can only differ in other
settings. Those settings are what the study *varies*; runs are then told apart by their values,
everywhere. Each method's most frequent values make its main runs, which the comparison of
methods is made of; the rest are ablations.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from dapt.errors import UserError, nearest
from dapt.methods import METHODS, ZERO_SHOT, Method
from dapt.report import figures, tables
from dapt.report.collect import Measure, Run
from dapt.report.tables import HIGHER, KINDS, POINTS, Column, Named, Row, Samples, Table
from dapt.run.train import FREE_ON_RESUME
from dapt.settings import all_fields, default_settings, idle_settings

# What identifies a run, and what decides its cost or place, not its result.
_IDENTITY = {"dataset", "domain", "class_names", "classes", "method", "shots", "seed"}
_NO_RESULT = {*FREE_ON_RESUME, "device", "root", "eval_batch_size", "text_memory"}
_ABSENT = ("", "null")
# Datasets that get figures of their own; drawing takes a fifth of a second each. All have tables.
MOST_DATASETS = 12
# Name, share of the images that were named right, and some that were not: data URI, what it was
# taken for and how sure that was.
HardClass = tuple[str, float, list[tuple[str, str, float]]]
_Seeds = list[int] | None
# Groups of methods, by what they tune, with their headings.
KINDS_OF_METHODS = {"nothing": "others", "prompts": "prompts", "weights": "weights",
                    "heads": "heads"}  # fmt: skip
Variant = tuple[tuple[str, str], ...]  # (varied setting, its value as JSON or ""), by name


def row_of(method: str) -> Method:
    """A method's row in the table; of one that this installation lacks only the name is known."""
    return METHODS.get(method) or Method(method)


def loss_title(term: str) -> str:
    """A loss term in words."""
    return f"{term}-dispersion" if term in ("inter", "intra") else term.replace("_", "-")


@dataclass
class Block:
    """Figures and tables that belong together."""

    title: str = ""  # none where the section's says it already
    note: str = ""
    drawings: list[figures.Drawing] = field(default_factory=list)
    tables: Sequence[Table] = ()
    legend: Sequence[figures.Entry] = ()  # what the colours of the figures mean
    hardest: Sequence[HardClass] = ()
    beside: bool = False  # figures and tables stand side by side where there is room
    kind: str = ""  # of the figures: "", "natural", "pairs" (feature maps), "small" (reliability)
    runs: tuple[int, ...] = ()  # what the figures are drawn from

    @property
    def items(self) -> list[figures.Drawing | Table]:
        """Its figures, and tables that are not empty."""
        return [*self.drawings, *filter(None, self.tables)]


class Scope(NamedTuple):
    """Where methods are compared; on the study's classes unless others are named."""

    datasets: Sequence[str]
    shots: int  # 0 for any
    classes: str | None = None
    variant: Variant | None = None  # of a method, its main one if none is given

    @property
    def at(self) -> str:
        """Its number of shots in words."""
        return f"{self.shots} shot" if self.shots == 1 else f"{self.shots} shots"


class Study:
    """All runs of a report, the numbers of its main ones, and what the page is made with.

    The ``baseline`` is the method that others are compared with, if None zero-shot or the first
    present; a `UserError` says that no run is of it.
    """

    def __init__(self, runs: Sequence[Run], baseline: str | None = None) -> None:
        self.runs, finished = runs, [run for run in runs if run.finished]
        self.warnings: list[str] = []  # on what is not counted, or not alike
        self._settings = {run.number: _comparable(run) for run in finished}
        self._sort(finished)
        present = {run.classes for run in finished}
        # Fewer classes are another, easier task: they stand in only where there is no other.
        self.classes = next((c for c in ("all", "base", "new") if c in present), "all")
        whole = [run for run in finished if run.classes == self.classes]
        self.datasets = sorted({run.dataset for run in whole})
        self.shots = sorted({run.shots for run in whole})
        # In the order of their table, unknown ones after them by name.
        methods = {run.method for run in finished}
        self.methods = [m for m in METHODS if m in methods] + sorted(methods - METHODS.keys())
        for name in ("backbone", "epochs", "precision", "support_set"):
            if name not in self.varied:
                self._compare(name, whole)
            elif name == "backbone":  # of those that are swept, the variants that tables show
                self._compare(name, [run for run in whole if not self.differing(run)])
        if baseline is not None and finished and baseline not in methods:
            raise UserError(
                f"`baseline` {baseline}: no finished run is of this method"
                f"{nearest(baseline, self.methods)}; use one of {', '.join(self.methods)}"
            )
        # The table begins with zero-shot.
        self.baseline = baseline or next(iter(self.methods), ZERO_SHOT)
        # What was found with the backbone, if anything: drawings by dataset and kind, and the
        # hardest classes by number of the run.
        self.looked: dict[tuple[str, str], Block] = defaultdict(Block)
        self.hardest: dict[int, list[HardClass]] = defaultdict(list)
        self.drawn = self.datasets[:MOST_DATASETS]  # get figures
        self.foretold = any("expected" in run.figures for run in finished)
        self._taken: set[str] = set()

    def _sort(self, runs: Iterable[Run]) -> None:
        """Find the settings that tell runs apart, main variants, and runs that count."""
        first: dict[object, dict[str, tuple[str, str]]] = {}
        apart: set[tuple[str, tuple[str, str]]] = set()
        for run in runs:
            own = self._settings[run.number]
            apart |= own.items() ^ first.setdefault(run.place, own).items()
        self.varied = sorted({name for name, _ in apart})
        # Runs on other classes belong to another experiment, which may have settings of its own.
        counts: dict[tuple[str, str], Counter[Variant]] = defaultdict(Counter)
        for run in runs:
            counts[run.method, run.classes][self.variant(run)] += 1
        # Of equally frequent ones that nearest to defaults.
        self._main = {
            key: min(found, key=lambda v: (-found[v], sum(bool(value) for _, value in v), v))
            for key, found in counts.items()
        }
        distinct: dict[object, Run] = {}
        for run in runs:
            one = distinct.setdefault(key := (run.place, self.variant(run)), run)
            if _result(run) == _result(one):
                # One run that several suites share, each with evaluations of its own.
                distinct[key] = replace(one, evaluations={**run.evaluations, **one.evaluations})
            else:
                which = f"run {run.number} ({tables.clean(run.path, 400)})"
                self.warnings.append(
                    f"{which} repeats run {one.number} at the same settings with another result; "
                    f"only run {one.number} is counted"
                )
        self._counted: dict[tuple[str, str], list[Run]] = defaultdict(list)
        for run in distinct.values():
            self._counted[run.dataset, run.method].append(run)

    def _compare(self, name: str, runs: Iterable[Run]) -> None:
        """Warn if methods have not a setting in common, as they should to be compared."""
        found: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
        for run in runs:
            if name not in _idle(run):
                value = full_settings(run).get(name)
                known = run.environment.backbone_sha256 if name == "backbone" else None
                # Zero-shot's one run stands for all shots; epochs and support sets go by them.
                group = found[run.dataset, run.shots if name in ("epochs", "support_set") else 0]
                said = f"{row_of(run.method).title} {tables.shown(value)}"
                group.setdefault(known or _json(value), said)
        # Of several numbers of shots the first.
        groups = reversed(found.items())
        apart = {dataset: ", ".join(g.values()) for (dataset, _), g in groups if len(g) > 1}
        self.warnings += (
            f"{dataset}: methods differ in {name} ({values}), so their differences are not the "
            "methods' alone"
            for dataset, values in sorted(apart.items())
        )

    def label(self, dataset: str) -> str:
        """A dataset's name, with the classes that are compared where they are not all."""
        return dataset if self.classes == "all" else f"{dataset} ({self.classes} classes)"

    def variant(self, run: Run) -> Variant:
        """Values of the varied settings of a finished run."""
        own = self._settings[run.number]
        return tuple((name, own.get(name, _ABSENT)[0]) for name in self.varied)

    def main(self, method: str, **changed: object) -> Variant | None:
        """The method's main variant, or with other values; None where there can be no run of it."""
        main = self._main.get((method, self.classes))
        if main is None or not changed.keys() <= set(self.varied):
            return None
        return tuple({**dict(main), **{name: _json(v) for name, v in changed.items()}}.items())

    def differing(self, run: Run, variant: Variant | None = None) -> tuple[str, ...]:
        """Settings in which a finished run is not of a variant: its method's main one, if None.

        A default equals its value: 0.01 of a sweep is the default of one dataset, not of another.
        """
        own = self._settings[run.number]
        wanted = self._main[run.method, run.classes] if variant is None else variant
        return tuple(name for name, value in wanted if value not in own.get(name, _ABSENT))

    def runs_in(self, scope: Scope, method: str) -> list[Run]:
        """The method's runs in a scope."""
        return [
            run
            for dataset in scope.datasets
            for run in self._counted[dataset, method]
            if scope.shots in (0, run.shots)
            and run.classes == (scope.classes or self.classes)
            and not self.differing(run, scope.variant)
        ]

    def main_runs(self, dataset: str, method: str, classes: str | None = None) -> list[Run]:
        """The method's main runs on a dataset: those with most shots first, then by seed."""
        runs = self.runs_in(Scope([dataset], 0, classes), method)
        return sorted(runs, key=lambda run: (-run.shots, run.seed))

    def sources(self, classes: str) -> Iterator[tuple[Scope, list[Run]]]:
        """Each dataset and number of shots with its main runs; zero-shot's alone if all are.

        Elsewhere it stands in for any number of shots.
        """
        found: dict[tuple[str, int], list[Run]] = defaultdict(list)
        for run in (run for own in self._counted.values() for run in own):
            if run.classes == classes and not self.differing(run):
                found[run.dataset, run.shots].append(run)
        tuned = {place for place, runs in found.items() if {r.method for r in runs} - {ZERO_SHOT}}
        for dataset, shots in sorted(found):
            if (dataset, shots) in tuned or dataset not in {d for d, _ in tuned}:
                yield Scope([dataset], shots, classes), found[dataset, shots]

    def best(self, datasets: Sequence[str]) -> Scope:
        """At the number of shots that most methods have runs of; of equals, the largest.

        Zero-shot has none of its own.
        """
        scopes = [Scope(datasets, shots) for shots in self.shots]
        tuned = [method for method in self.methods if method != ZERO_SHOT]
        return max(scopes, key=lambda s: (sum(bool(self.runs_in(s, m)) for m in tuned), s.shots))

    def samples(
        self, scope: Scope, method: str, measure: Measure = "accuracy", seeds: _Seeds = None
    ) -> Samples:
        """Mean of a measure over the scope's datasets by seed, for the seeds that all have.

        Zero-shot learns nothing and so is the same for every seed and number of shots: where
        ``seeds`` asks for one that was not run, a run of it on the dataset stands in.
        """

        def of(dataset: str, seeds: _Seeds) -> Samples:
            runs = self.runs_in(scope._replace(datasets=[dataset]), method)
            looked = [(run.seed, run.look(measure)) for run in runs]
            found = {n: own for n, own in looked if own and (seeds is None or n in seeds)}
            if method == ZERO_SHOT and scope.variant is None:
                for run in self.main_runs(dataset, method, scope.classes):
                    if sample := run.look(measure):
                        wanted = seeds if seeds is not None else [] if found else [run.seed]
                        return Samples({**dict.fromkeys(wanted, sample), **found})
            return Samples(found)

        parts = [of(dataset, seeds) for dataset in scope.datasets]
        if method == ZERO_SHOT and seeds is None:
            every = [seed for part in parts for seed in part]
            parts = [of(dataset, every) for dataset in scope.datasets]
        return tables.mean_by_seed(parts)

    def differences(self, scope: Scope, method: str, measure: Measure = "accuracy") -> Samples:
        """Method minus baseline, seed by seed, each averaged over datasets; none to itself."""
        if method == self.baseline:
            return Samples()
        # Zero-shot, which stands in for any seed, takes the other's.
        if method == ZERO_SHOT:
            theirs = self.samples(scope, self.baseline, measure)
            return self.samples(scope, method, measure, list(theirs)) - theirs
        ours = self.samples(scope, method, measure)
        return ours - self.samples(scope, self.baseline, measure, list(ours))

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

    def entry(self, method: str) -> figures.Entry:
        """A method's line of a legend."""
        return figures.Entry(figures.method_colour(method, self.methods), row_of(method).title)

    def column(self, title: str, scope: Scope, measure: Measure = "accuracy") -> Column:
        """A measure of each method in a scope."""
        samples = partial(self.samples, scope, measure=measure)
        return Column(title, samples, KINDS.get(str(measure), HIGHER))

    def difference(self, title: str, scope: Scope, measure: Measure = "accuracy") -> Column:
        """Each method's to the baseline in a scope, paired."""
        return Column(title, partial(self.differences, scope, measure=measure), POINTS)

    def by_method(
        self, about: Named, columns: list[Column], note: str = "", methods: Iterable[str] = ()
    ) -> Table:
        """A table with a row for each method, or for some."""
        shown = list(methods or self.methods)
        if len(shown) > tables.MOST_ROWS:  # in groups, which have headings then
            shown.sort(key=lambda m: [*KINDS_OF_METHODS].index(row_of(m).kind))
        rows = [Row(row_of(m).title, m, m) for m in shown]
        return Table(about, "method", columns, rows, note)


def _result(run: Run) -> object:
    """What repeats of a finished run have in common: its test or, without one, its forecast.

    To six digits: the last bits go by the number of threads, and so by that of workers.
    """
    found = run.metrics and (run.metrics.test or run.metrics.forecast)
    return found and json.loads(found.model_dump_json(), parse_float=lambda n: round(float(n), 6))


def _idle(run: Run) -> frozenset[str]:
    """Settings that cannot change a run's result."""
    added = full_settings(run)["loss_weights"]
    found = idle_settings(run.method, added if isinstance(added, dict) else ())
    return found | ({"support_set"} if run.method == ZERO_SHOT else set())


def full_settings(run: Run) -> dict[str, Any]:
    """The run's settings with defaults where it was begun before a setting existed."""
    fields = all_fields().items()
    usual = {name: None if field.is_required() else field.default for name, field in fields}
    return {**usual, **run.settings}


def _comparable(run: Run) -> dict[str, tuple[str, str]]:
    """Settings that may change the run's result, as JSON: "" for a default, and in full.

    Defaults go by dataset, shots and method.
    """
    settings = full_settings(run)
    given = {"dataset": str(settings["dataset"]), "shots": run.shots, "method": run.method}
    usual = {**full_settings(replace(run, settings={})), **default_settings(given)}
    names = settings.keys() - _IDENTITY - _NO_RESULT - _idle(run)
    found = {name: (_json(settings[name]), _json(usual.get(name))) for name in names}
    known = {name: ("" if own == usual else own, own) for name, (own, usual) in found.items()}
    return {name: value for name, value in known.items() if value != _ABSENT}


def _json(value: object) -> str:
    """A setting's value to compare: 0 and 0.0 are one."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        value = float(value)
    return json.dumps(value, sort_keys=True, default=str)
