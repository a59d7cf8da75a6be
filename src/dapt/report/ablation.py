"""What each part of a method does, and each setting that was varied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from dapt.methods import METHODS
from dapt.report.collect import clean
from dapt.report.rows import loss_settings, loss_title, method_title, prompts
from dapt.report.sections import Block, Maker, Section, shots_of
from dapt.report.statistics import Samples, minus
from dapt.report.study import ACCURACY, Variant, full_settings, shown
from dapt.report.tables import Column, Named, Row, Table


class _Compared(NamedTuple):
    """A row, of the runs of a method's variant."""

    label: str
    method: str
    variant: Variant


def ablations(maker: Maker) -> Section:
    """Main runs beside those that differ in other settings, which are named."""
    study = maker.study
    found: dict[tuple[str, tuple[str, ...], int], dict[Variant, set[str]]]
    found = defaultdict(lambda: defaultdict(set))
    for run in study.runs:
        if run.finished and run.classes == study.classes and (names := study.differing(run)):
            found[run.method, names, run.shots][study.variant(run)].add(run.dataset)
    tables = [t for shots in study.shots for m in METHODS for t in _parts(maker, m, shots)]
    for key in sorted(found, key=lambda key: (study.methods.index(key[0]), *key[1:])):
        tables.append(_settings(maker, *key, found[key]))
    lead = "What each part of a method does. "
    if study.varied:
        lead += (
            "Some runs share dataset, method, shots and seed with others and differ in "
            f"{', '.join(map(clean, study.varied))}. Each method's most frequent values are "
            "its main ones, used in all other parts of the report. "
        )
    return Section(
        "ablations",
        "Ablations",
        f"{lead}Differences are paired by dataset and seed.",
        [Block(tables=tables)],
        "no runs that differ in a setting other than dataset, method, shots and seed",
    )


def _parts(maker: Maker, method: str, shots: int) -> list[Table]:
    """A method's losses and prompts on and off, where any runs have some of them off."""
    study, weights = maker.study, loss_settings(method)
    if len(weights) < 2:
        return []

    def row(label: str, method: str, **changed: object) -> list[_Compared]:
        variant = study.changed(method, **changed)
        return [] if variant is None else [_Compared(label, method, variant)]

    none, losses, parts = [], [], []
    for off, setting in weights.items():
        left = " and ".join(loss_title(term) for term in weights if term != off)
        losses += row(f"{left} only", method, **{setting: 0})
    for other in METHODS:
        terms = loss_settings(other).keys()
        if prompts(other) == prompts(method) and not terms:
            none += row(f"none ({method_title(other)})", other)
        if prompts(other) < prompts(method) and terms and terms <= weights.keys():
            left = " and ".join(f"{prompt} prompt" for prompt in prompts(other))
            parts += row(f"{left} only, {', '.join(map(loss_title, terms))}", other)
    both = row(f"both ({method_title(method)})", method)
    tables = []
    for what, rows, between, reference in (
        ("losses", [*none, *losses, *both], losses, none),
        ("prompts", [*parts, *both], parts, both),
    ):
        title = f"{what.capitalize()} on and off, {shots_of(shots)}"
        about = maker.named("ablation", what, f"{shots}-shots", title=title)
        note = f"The difference is to {reference[0].label}." if reference else ""
        made = _compared(maker, about, what, shots, study.datasets, rows, reference, note)
        if {row.label for row in made.rows} & {row.label for row in between}:
            tables.append(made)
    return tables


def _settings(
    maker: Maker,
    method: str,
    names: tuple[str, ...],
    shots: int,
    variants: dict[Variant, set[str]],
) -> Table:
    """Values of some settings; a dataset whose main runs have a row's value stands in it."""
    study = maker.study
    datasets = sorted(set().union(*variants.values()))
    main = study.main(method) or ()
    rows: list[tuple[list[tuple[int, float, str]], _Compared]] = []
    for variant in (main, *variants):
        groups = (study.group(d, method, shots, variant=variant) for d in datasets)
        settings = [full_settings(run) for group in groups for run in group.values()]
        if not settings:
            continue
        values = [shown(settings[0].get(name)) for name in names]
        label = " · ".join(f"{clean(n)} = {v}" for n, v in zip(names, values, strict=True))
        # A default that depends on the dataset has no one value.
        if len({shown([s.get(n) for n in names]) for s in settings}) > 1:
            label = " · ".join(f"{clean(n)} by default" for n in names)
        label += " (main)" if variant == main else ""
        rows.append(([_order(v) for v in values], _Compared(label, method, variant)))
    ordered = [row for _, row in sorted(rows, key=lambda row: row[0])]
    title = f"{method_title(method)}, {shots_of(shots)}: {', '.join(map(clean, names))}"
    about = maker.named("ablation", method, *names, f"{shots}-shots", title=title)
    reference = [row for row in ordered if row.variant == main]
    return _compared(maker, about, "setting", shots, datasets, ordered, reference)


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
    shots: int,
    datasets: Sequence[str],
    rows: Sequence[_Compared],
    reference: Sequence[_Compared],
    note: str = "",
) -> Table:
    """Accuracy by dataset, and the difference to the ``reference``, if there is such a row."""
    study = maker.study

    def accuracy(names: Sequence[str], row: _Compared) -> Samples:
        return study.samples(names, row.method, shots, ACCURACY, variant=row.variant)

    def gap(row: _Compared) -> Samples:
        if not reference or row == reference[0]:
            return {}
        shared = [d for d in datasets if accuracy([d], row) and accuracy([d], reference[0])]
        return minus(accuracy(shared, row), accuracy(shared, reference[0]))

    datasets = [d for d in datasets if any(accuracy([d], row) for row in rows)]
    columns = [Column(study.label(d), partial(accuracy, [d]), better="high") for d in datasets]
    if len(datasets) > 1:
        columns.append(Column("average", partial(accuracy, datasets), better="high"))
    columns.append(Column("difference", gap, "points"))
    mains = {row: row.method for row in rows if row.variant == study.main(row.method)}
    made = [Row(row.label, row, mains.get(row)) for row in rows]
    return Table(about, corner, columns, made, note)
