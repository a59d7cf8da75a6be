"""What each part of a method does, and each setting that was varied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial

from dapt.methods import METHODS
from dapt.report.collect import clean
from dapt.report.sections import Block, Maker, loss_title
from dapt.report.statistics import Samples
from dapt.report.study import Scope, Variant, full_settings, row_of, shown
from dapt.report.tables import HIGHER, POINTS, Column, Named, Row, Table

_Key = tuple[str, Variant]  # of a row: a method's variant


def ablations(maker: Maker) -> Iterator[Block]:
    """Main runs beside those that differ in other settings, which are named."""
    found: dict[tuple[str, tuple[str, ...], int], dict[Variant, set[str]]]
    found = defaultdict(lambda: defaultdict(set))
    for run in maker.runs:
        if run.finished and run.classes == maker.classes and (names := maker.differing(run)):
            found[run.method, names, run.shots][maker.variant(run)].add(run.dataset)
    tables = [t for shots in maker.shots for m in METHODS for t in _parts(maker, m, shots)]
    for key in sorted(found, key=lambda key: (maker.methods.index(key[0]), *key[1:])):
        tables.append(_settings(maker, *key, found[key]))
    yield Block(tables=tables)


def _parts(maker: Maker, method: str, shots: int) -> list[Table]:
    """A method's losses and prompts on and off, where any runs have some of them off."""
    own = METHODS[method]
    weights = {term.name: term.weight for term in own.losses}
    if len(weights) < 2:
        return []

    def row(label: str, method: str, **changed: object) -> list[Row]:
        variant = maker.main(method, **changed)
        return [] if variant is None else [_row(maker, label, method, variant)]

    none, losses, parts = [], [], []
    for off, setting in weights.items():
        left = " and ".join(loss_title(term) for term in weights if term != off)
        losses += row(f"{left} only", method, **{setting: 0})
    for name, other in METHODS.items():
        terms, learned = {term.name for term in other.losses}, set(other.parts)
        if learned == set(own.parts) and not terms:
            none += row(f"none ({other.title})", name)
        if learned < set(own.parts) and terms and terms <= weights.keys():
            towers = {"text": "text", "image": "visual"}
            left = " and ".join(what for tower, what in towers.items() if other.changes(tower))
            parts += row(f"{left} prompt only, {', '.join(map(loss_title, terms))}", name)
    scope, tables = Scope(maker.datasets, shots), []
    both = row(f"both ({own.title})", method)
    for what, rows, some, reference in (
        ("losses", [*none, *losses, *both], losses, none),
        ("prompts", [*parts, *both], parts, both),
    ):
        caption = f"{what.capitalize()} on and off, {scope.at}"
        about = maker.named("ablation", what, f"{shots}-shots", caption=caption)
        note = f"The difference is to {reference[0].label}." if reference else ""
        table = _compared(maker, about, what, scope, rows, reference, note)
        if {row.label for row in table.rows} & {row.label for row in some}:
            tables.append(table)
    return tables


def _settings(
    maker: Maker, method: str, names: Sequence[str], shots: int, variants: dict[Variant, set[str]]
) -> Table:
    """Values of some settings; a dataset whose main runs have a row's value stands in it."""
    scope = Scope(sorted(set().union(*variants.values())), shots)
    main = maker.main(method) or ()
    rows: list[tuple[list[tuple[int, float, str]], Row]] = []
    for variant in (main, *variants):
        settings = [full_settings(run) for run in maker.runs_in(scope, method, variant)]
        if not settings:
            continue
        values = [shown(settings[0].get(name)) for name in names]
        label = " · ".join(f"{clean(n)} = {v}" for n, v in zip(names, values, strict=True))
        # A default that depends on the dataset has no one value.
        if len({shown([s.get(n) for n in names]) for s in settings}) > 1:
            label = " · ".join(f"{clean(n)} by default" for n in names)
        label += " (main)" if variant == main else ""
        rows.append(([_order(value) for value in values], _row(maker, label, method, variant)))
    ordered = [row for _, row in sorted(rows, key=lambda row: row[0])]
    caption = f"{row_of(method).title}, {scope.at}: {', '.join(map(clean, names))}"
    about = maker.named("ablation", method, *names, f"{shots}-shots", caption=caption)
    reference = [row for row in ordered if row.key == (method, main)]
    return _compared(maker, about, "setting", scope, ordered, reference)


def _order(value: str) -> tuple[int, float, str]:
    """Numbers by size, then words."""
    try:
        return 0, float(value), ""
    except ValueError:
        return 1, 0.0, value


def _row(maker: Maker, label: str, method: str, variant: Variant) -> Row:
    """A row of a variant's runs; main ones have the method's colour."""
    return Row(label, (method, variant), method if variant == maker.main(method) else None)


def _compared(
    maker: Maker,
    about: Named,
    corner: str,
    scope: Scope,
    rows: Sequence[Row],
    reference: Sequence[Row],
    note: str = "",
) -> Table:
    """Accuracy by dataset, and the difference to the ``reference``, if there is such a row."""

    def accuracy(datasets: Sequence[str], key: _Key) -> Samples:
        return maker.samples(scope._replace(datasets=datasets), key[0], variant=key[1])

    def gap(key: _Key) -> Samples:
        if not reference or key == (theirs := reference[0].key):
            return Samples()
        shared = [d for d in datasets if accuracy([d], key) and accuracy([d], theirs)]
        return accuracy(shared, key) - accuracy(shared, theirs)

    datasets = [d for d in scope.datasets if any(accuracy([d], row.key) for row in rows)]
    columns = [Column(maker.label(d), partial(accuracy, [d]), HIGHER) for d in datasets]
    if len(datasets) > 1:
        columns.append(Column("average", partial(accuracy, datasets), HIGHER))
    columns.append(Column("difference", gap, POINTS))
    return Table(about, corner, columns, rows, note)
