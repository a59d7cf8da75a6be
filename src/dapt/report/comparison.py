"""Methods compared, also on what they were not tuned on, and their parts and settings."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial

from dapt.methods import METHODS, ZERO_SHOT
from dapt.report import figures
from dapt.report.collect import Measure
from dapt.report.study import Block, Scope, Study, Variant, full_settings, loss_title, row_of
from dapt.report.tables import HIGHER, POINTS, Column, Named, Row, Samples, Table, clean, shown

_AVERAGE = "Averages are over seeds that every dataset has; a method that lacks one has none."

_COST = (
    "A step is a mean over tuning, with all around it; an image is predicted decoded, four at a "
    "time; peak memory is the process's in the run."
)


def averaged(datasets: Sequence[str]) -> list[Sequence[str]]:
    """All datasets, if there are several, and each alone."""
    alone: list[Sequence[str]] = [[dataset] for dataset in datasets]
    return [datasets, *alone] if len(alone) > 1 else alone


def overview(study: Study) -> Iterator[Block]:
    """All methods at the number of shots that most of them have."""
    if not study.datasets:
        return
    scope = study.best_compared()
    columns = [study.column("accuracy", scope), study.difference("difference", scope)]
    columns += [study.column(title, scope, title) for title in ("expected", "from", "to")]
    several = any(run.metrics and run.metrics.multilabel for run in study.runs)
    note = "Where images have several labels, accuracy is of all labels right." if several else ""
    more = {
        "mAP": "map",
        "micro-F1": "micro_f1",
        "top-5": "top5",
        "macro-F1": "macro_f1",
        "ECE": "ece",
        "learned": "learned",
    }
    cost = {"tuning": "tuning", "a step": "step", "an image": "predict", "peak memory": "peak"}
    for title, measure in (more | cost).items():
        columns.append(study.column(title, scope, measure))
    if any("peak" in run.figures for run in study.runs):
        note = f"{note} {_COST}".strip()
    about = study.named("overview", caption=f"All methods at {scope.at}")
    tables = [study.by_method(about, columns, note)]
    if len(study.datasets) > 1:
        columns = [study.column(d, Scope([d], scope.shots)) for d in study.datasets]
        whole = scope.datasets == study.datasets
        if whole:
            columns.append(study.column("average", scope))
        caption = f"Accuracy by dataset at {scope.at}"
        about = study.named("overview-by-dataset", caption=caption)
        tables.append(study.by_method(about, columns, _AVERAGE if whole else ""))
    yield Block(tables=tables)


def accuracy(study: Study) -> Iterator[Block]:
    """Accuracy over shots and paired differences, on average and by dataset."""
    for datasets in averaged(study.datasets):
        average = len(datasets) > 1
        short = "average" if average else datasets[0]
        label = study.label(f"Average over {len(datasets)} datasets" if average else short)
        scopes = [Scope(datasets, shots) for shots in study.shots]
        # Zero-shot would stand in for shots that no other method has.
        tuned = [method for method in study.methods if method != ZERO_SHOT]
        scopes = [s for s in scopes if any(study.samples(s, m) for m in tuned)] or scopes
        about = study.named("accuracy", short, caption="Accuracy", of=label)
        columns = [study.column(scope.at, scope) for scope in scopes]
        table = study.by_method(about, columns, _AVERAGE if average else "")
        caption = f"Difference to {row_of(study.baseline).title}"
        about = study.named("difference", short, caption=caption, of=label)
        gaps = study.by_method(about, [study.difference(scope.at, scope) for scope in scopes])
        # Beside the curves there is room for so many columns.
        block = Block(label, tables=[table, gaps], beside=len(table.columns) <= 4)
        if table and (average or short in study.drawn):
            lines = {
                study.entry(row.key): {
                    scope.shots: known
                    for scope, column in zip(scopes, table.columns, strict=True)
                    if (known := column.cells[i].known)
                }
                for i, row in enumerate(table.rows)
            }
            block.runs = table.runs
            block.legend = list(lines) if sum(map(len, lines.values())) > len(study.methods) else []
            caption, figure = "Accuracy over shots", figures.accuracy_over_shots
            if len({shots for line in lines.values() for shots in line}) == 1:
                caption, figure = f"Accuracy at {scopes[0].at}", figures.accuracy_by_method
            about = study.named("figure-accuracy", short, caption=caption, of=label)
            block.drawings.append(figures.draw(figure, about, lines))
        yield block


def _targets(study: Study, name: str) -> Iterator[Block]:
    """For each source and number of shots, methods by targets.

    A domain has the source's family and classes; anything else outside the source's own images is
    another dataset.
    """
    tables = []
    for classes in ("all", "base"):
        for scope, runs in study.sources(classes):
            source = scope.datasets[0]
            targets = {
                (target, c)
                for target, c in {key for run in runs for key in run.evaluations}
                if target != source
                and (name == "domains") is (_family(target) == _family(source) and c == classes)
            }
            if targets:
                tables.append(_transfer(study, name, scope, sorted(targets)))
    yield Block(tables=tables)


domains = partial(_targets, name="domains")
cross_dataset = partial(_targets, name="cross-dataset")


def _transfer(study: Study, name: str, scope: Scope, targets: list[tuple[str, str]]) -> Table:
    """Accuracy on the source, each target and all of them."""
    source, label = scope.datasets[0], _of(scope.datasets[0], scope.classes)
    measures: list[tuple[str, Measure]] = [(f"source: {label}", "accuracy")]
    for target, classes in targets:
        dataset, _, domain = target.partition(":")
        own = domain and dataset == source.partition(":")[0]
        measures.append((_of(domain if own else target, classes), ((target, classes),)))
    whose, note = "", ""
    if len(targets) > 1:
        measures.append(("average of targets", tuple(targets)))
        note = "The average is of runs that were evaluated on every target. "
        whose = "the average's, "
    note += f"The difference is {whose}to {row_of(study.baseline).title}, paired by seed."
    there = [m for m in study.methods if any(study.samples(scope, m, x) for _, x in measures[1:])]
    columns = [study.column(head, scope, measure) for head, measure in measures]
    columns.append(study.difference("difference", scope, tuple(targets)))
    parts = [name, source, *{scope.classes} - {"all"}, f"{scope.shots}-shots"]
    about = study.named(*parts, caption=f"From {label}, {scope.at}")
    return study.by_method(about, columns, note if len(there) > 1 else "", there)


def base_to_new(study: Study) -> Iterator[Block]:
    """Prompts tuned on the base classes, evaluated on base, on new ones and on all together."""
    by_shots: dict[int, list[str]] = defaultdict(list)
    known: set[str] = set()
    for scope, runs in study.sources("base"):
        figures = {"new", "all"} & {name for run in runs for name in run.figures}
        if figures:
            by_shots[scope.shots] += scope.datasets
        known |= figures
    tables = []
    for shots, every in sorted(by_shots.items()):
        for datasets in averaged(every):
            several, scope = len(datasets) > 1, Scope(datasets, shots, "base")
            label = f"average over {len(datasets)} datasets" if several else datasets[0]
            caption = f"Base to new, {label}, {scope.at}"
            about = study.named("base-to-new", label, f"{shots}-shots", caption=caption)
            kinds = {"base": "base"}
            kinds |= {"new": "new", "harmonic mean": "harmonic"} if "new" in known else {}
            kinds |= {"all classes": "all"} if "all" in known else {}
            columns = [study.column(title, scope, measure) for title, measure in kinds.items()]
            last = "harmonic" if "new" in known else "all"
            columns.append(study.difference("difference", scope, last))
            tables.append(study.by_method(about, columns))
    yield Block(tables=tables)


def _family(dataset: str) -> str:
    """What the domains of one dataset have in common."""
    name = dataset.partition(":")[0]
    return "imagenet" if name.startswith("imagenet") else name


def _of(dataset: str, classes: str | None) -> str:
    """A dataset with the classes meant, where they are not all."""
    return dataset if classes == "all" else f"{dataset} ({classes})"


def ablations(study: Study) -> Iterator[Block]:
    """Main runs beside those that differ in other settings, which are named."""
    found: dict[tuple[str, tuple[str, ...], int], dict[Variant, set[str]]]
    found = defaultdict(lambda: defaultdict(set))
    for run in study.runs:
        if run.finished and run.classes == study.classes and (names := study.differing(run)):
            found[run.method, names, run.shots][study.variant(run)].add(run.dataset)
    tables = [t for shots in study.shots for m in METHODS for t in _parts(study, m, shots)]
    for key in sorted(found, key=lambda key: (study.methods.index(key[0]), *key[1:])):
        tables.append(_settings(study, *key, found[key]))
    yield Block(tables=tables)


def _parts(study: Study, method: str, shots: int) -> Iterator[Table]:
    """A method's losses and prompts on and off, where any runs have some of them off."""
    own, scope = METHODS[method], Scope(study.datasets, shots)
    weights = {term.name: term.weight for term in own.losses}
    if len(weights) < 2:
        return

    def row(label: str, method: str, **changed: object) -> list[Row]:
        variant = study.main(method, **changed)
        return [] if variant is None else [Row(label, (method, variant))]

    none, losses, parts, both = [], [], [], row(f"both ({own.title})", method)
    for off, setting in weights.items():
        left = " and ".join(loss_title(term) for term in weights if term != off)
        losses += row(f"{left} only", method, **{setting: 0})
    for name, other in METHODS.items():
        terms, learned = [term.name for term in other.losses], set(other.parts)
        if learned == set(own.parts) and not terms:
            none += row(f"none ({other.title})", name)
        if learned < set(own.parts) and terms and weights.keys() >= set(terms):
            towers = {"text": "text", "image": "visual"}
            left = " and ".join(what for tower, what in towers.items() if other.changes(tower))
            parts += row(f"{left} prompt only, {', '.join(map(loss_title, terms))}", name)
    for what, rows, some, reference in (
        ("losses", [*none, *losses, *both], losses, none),
        ("prompts", [*parts, *both], parts, both),
    ):
        caption = f"{what.capitalize()} on and off, {scope.at}"
        about = study.named("ablation", what, f"{shots}-shots", caption=caption)
        note = f"The difference is to {reference[0].label}." if reference else ""
        table = _compared(study, about, what, scope, rows, reference, note)
        if {row.key for row in table.rows} & {row.key for row in some}:
            yield table


def _settings(
    study: Study, method: str, names: Sequence[str], shots: int, variants: dict[Variant, set[str]]
) -> Table:
    """Values of some settings; a dataset whose main runs have a row's value stands in it."""
    scope = Scope(sorted(set().union(*variants.values())), shots)
    main, rows = study.main(method) or (), []
    for variant in (main, *variants):
        runs = study.runs_in(scope._replace(variant=variant), method)
        if not (settings := [full_settings(run) for run in runs]):
            continue
        values = [shown(settings[0].get(name)) for name in names]
        label = " · ".join(f"{clean(n)} = {v}" for n, v in zip(names, values, strict=True))
        # A default that depends on the dataset has no one value.
        if len({shown([s.get(n) for n in names]) for s in settings}) > 1:
            label = " · ".join(f"{clean(n)} by default" for n in names)
        label += " (main)" if variant == main else ""
        numbers = [re.fullmatch(r"-?\d+(\.\d+)?(e[-+]?\d+)?", value) for value in values]
        # Numbers by size, then words.
        order = [(not n, float(n[0]) if n else v) for n, v in zip(numbers, values, strict=True)]
        rows.append((order, Row(label, (method, variant))))
    ordered = [row for _, row in sorted(rows, key=lambda row: row[0])]
    caption = f"{row_of(method).title}, {scope.at}: {', '.join(map(clean, names))}"
    about = study.named("ablation", method, *names, f"{shots}-shots", caption=caption)
    reference = [row for row in ordered if row.key == (method, main)]
    return _compared(study, about, "setting", scope, ordered, reference)


def _compared(
    study: Study,
    about: Named,
    corner: str,
    scope: Scope,
    rows: list[Row],
    reference: list[Row],
    note: str = "",
) -> Table:
    """Accuracy by dataset, and the difference to the ``reference``, if there is such a row."""

    def accuracy(datasets: Sequence[str], key: tuple[str, Variant]) -> Samples:
        return study.samples(scope._replace(datasets=datasets, variant=key[1]), key[0])

    def gap(key: tuple[str, Variant]) -> Samples:
        if not reference or key == (theirs := reference[0].key):
            return Samples()
        shared = [d for d in datasets if accuracy([d], key) and accuracy([d], theirs)]
        return accuracy(shared, key) - accuracy(shared, theirs)

    # Main runs have their method's colour.
    rows = [Row(label, (m, v), m if v == study.main(m) else None) for label, (m, v), _ in rows]
    datasets = [d for d in scope.datasets if any(accuracy([d], row.key) for row in rows)]
    columns = [Column(study.label(d), partial(accuracy, [d]), HIGHER) for d in datasets]
    if len(datasets) > 1:
        columns.append(Column("average", partial(accuracy, datasets), HIGHER))
    return Table(about, corner, [*columns, Column("difference", gap, POINTS)], rows, note)
