"""What each part of a method does, and each setting that was varied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from dapt.methods import METHODS
from dapt.report.collect import clean
from dapt.report.rows import loss_settings, loss_title, method_title, prompts
from dapt.report.sections import Block, Maker
from dapt.report.statistics import Samples, minus
from dapt.report.study import Scope, Variant, full_settings, shown
from dapt.report.tables import HIGHER, POINTS, Column, Named, Table

_Varied = tuple[str, tuple[str, ...], int]  # method, settings, shots


class _Compared(NamedTuple):
    """A row, of the runs of a method's variant."""

    label: str
    method: str
    variant: Variant


def ablations(maker: Maker) -> list[Block]:
    """Main runs beside those that differ in other settings, which are named."""
    study = maker.study
    found: dict[_Varied, dict[Variant, set[str]]] = defaultdict(lambda: defaultdict(set))
    for run in study.runs:
        if run.finished and run.classes == study.classes and (names := study.differing(run)):
            found[run.method, names, run.shots][study.variant(run)].add(run.dataset)
    tables = [t for shots in study.shots for m in METHODS for t in _parts(maker, m, shots)]
    for key in sorted(found, key=lambda key: (study.methods.index(key[0]), *key[1:])):
        tables.append(_settings(maker, key, found[key]))
    return [Block(tables=tables)]


def _parts(maker: Maker, method: str, shots: int) -> list[Table]:
    """A method's losses and prompts on and off, where any runs have some of them off."""
    study, weights, own = maker.study, loss_settings(method), set(METHODS[method].parts)
    if len(weights) < 2:
        return []

    def row(label: str, method: str, **changed: object) -> list[_Compared]:
        variant = study.main(method, **changed)
        return [] if variant is None else [_Compared(label, method, variant)]

    none, losses, parts = [], [], []
    for off, setting in weights.items():
        left = " and ".join(loss_title(term) for term in weights if term != off)
        losses += row(f"{left} only", method, **{setting: 0})
    for other in METHODS:
        terms, learned = loss_settings(other).keys(), set(METHODS[other].parts)
        if learned == own and not terms:
            none += row(f"none ({method_title(other)})", other)
        if learned < own and terms and terms <= weights.keys():
            left = f"{' and '.join(sorted(prompts(other)))} prompt only"
            parts += row(f"{left}, {', '.join(map(loss_title, terms))}", other)
    scope = Scope(study.datasets, shots)
    both = row(f"both ({method_title(method)})", method)
    tables = []
    for what, rows, some, reference in (
        ("losses", [*none, *losses, *both], losses, none),
        ("prompts", [*parts, *both], parts, both),
    ):
        caption = f"{what.capitalize()} on and off, {scope.at}"
        about = maker.named("ablation", what, f"{shots}-shots", caption=caption)
        note = f"The difference is to {reference[0].label}." if reference else ""
        table = _compared(maker, about, what, scope, rows, reference, note)
        if {label for label, _ in table.rows} & {row.label for row in some}:
            tables.append(table)
    return tables


def _settings(maker: Maker, varied: _Varied, variants: dict[Variant, set[str]]) -> Table:
    """Values of some settings; a dataset whose main runs have a row's value stands in it."""
    method, names, shots = varied
    study, scope = maker.study, Scope(sorted(set().union(*variants.values())), shots)
    main = study.main(method) or ()
    rows: list[tuple[list[tuple[int, float, str]], _Compared]] = []
    for variant in (main, *variants):
        settings = [full_settings(run) for run in study.runs_in(scope, method, variant)]
        if not settings:
            continue
        values = [shown(settings[0].get(name)) for name in names]
        label = " · ".join(f"{clean(n)} = {v}" for n, v in zip(names, values, strict=True))
        # A default that depends on the dataset has no one value.
        if len({shown([s.get(n) for n in names]) for s in settings}) > 1:
            label = " · ".join(f"{clean(n)} by default" for n in names)
        label += " (main)" if variant == main else ""
        rows.append(([_order(value) for value in values], _Compared(label, method, variant)))
    ordered = [row for _, row in sorted(rows, key=lambda row: row[0])]
    caption = f"{method_title(method)}, {scope.at}: {', '.join(map(clean, names))}"
    about = maker.named("ablation", method, *names, f"{shots}-shots", caption=caption)
    reference = [row for row in ordered if row.variant == main]
    return _compared(maker, about, "setting", scope, ordered, reference)


def _order(value: str) -> tuple[int, float, str]:
    """Numbers by size, then words."""
    try:
        return 0, float(value), ""
    except ValueError:
        return 1, 0.0, value


def _compared(
    maker: Maker,
    about: Named,
    corner: str,
    scope: Scope,
    rows: Sequence[_Compared],
    reference: Sequence[_Compared],
    note: str = "",
) -> Table:
    """Accuracy by dataset, and the difference to the ``reference``, if there is such a row."""
    study = maker.study

    def accuracy(datasets: Sequence[str], row: _Compared) -> Samples:
        place = scope._replace(datasets=datasets)
        return study.samples(place, row.method, variant=row.variant)

    def gap(row: _Compared) -> Samples:
        if not reference or row == reference[0]:
            return Samples()
        shared = [d for d in datasets if accuracy([d], row) and accuracy([d], reference[0])]
        return minus(accuracy(shared, row), accuracy(shared, reference[0]))

    datasets = [d for d in scope.datasets if any(accuracy([d], row) for row in rows)]
    columns = [Column(study.label(d), partial(accuracy, [d]), HIGHER) for d in datasets]
    if len(datasets) > 1:
        columns.append(Column("average", partial(accuracy, datasets), HIGHER))
    columns.append(Column("difference", gap, POINTS))
    whole = {row: row.method for row in rows if row.variant == study.main(row.method)}
    return Table(about, corner, columns, [(row.label, row, whole.get(row)) for row in rows], note)
