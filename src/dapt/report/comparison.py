"""The comparison of methods: at a glance, over shots, and on what they were not tuned on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial

from dapt.methods import ZERO_SHOT
from dapt.report import figures
from dapt.report.collect import Measure
from dapt.report.sections import Block, Maker, averaged
from dapt.report.study import Scope, Study, row_of
from dapt.report.tables import Table

_AVERAGE = "Averages are over seeds that every dataset has; a method that lacks one has none."


def best_compared(study: Study) -> Scope:
    """The datasets with the most methods at the number of shots that most of them have."""
    shots = study.best(study.datasets).shots
    present = {
        dataset: sum(bool(study.samples(Scope([dataset], shots), m)) for m in study.methods)
        for dataset in study.datasets
    }
    return Scope([d for d, count in present.items() if count == max(present.values())], shots)


def overview(maker: Maker) -> Iterator[Block]:
    """All methods at the number of shots that most of them have."""
    if not maker.datasets:
        return
    scope = best_compared(maker)
    columns = [
        maker.column("accuracy", scope),
        maker.difference("difference", scope),
        maker.column("top-5", scope, "top5"),
        maker.column("macro-F1", scope, "macro_f1"),
        maker.column("ECE", scope, "ece"),
        maker.column("learned", scope, "learned"),
        maker.column("tuning", scope, "tuning"),
    ]
    about = maker.named("overview", caption=f"All methods at {scope.at}")
    tables = [maker.by_method(about, columns)]
    if len(maker.datasets) > 1:
        columns = [maker.column(d, Scope([d], scope.shots)) for d in maker.datasets]
        whole = scope.datasets == maker.datasets
        if whole:
            columns.append(maker.column("average", scope))
        caption = f"Accuracy by dataset at {scope.at}"
        about = maker.named("overview-by-dataset", caption=caption)
        tables.append(maker.by_method(about, columns, _AVERAGE if whole else ""))
    yield Block(tables=tables)


def accuracy(maker: Maker) -> Iterator[Block]:
    """Accuracy over shots and paired differences, on average and by dataset."""
    for datasets in averaged(maker.datasets):
        average = len(datasets) > 1
        short = "average" if average else datasets[0]
        label = maker.label(f"Average over {len(datasets)} datasets" if average else short)
        scopes = [Scope(datasets, shots) for shots in maker.shots]
        # Zero-shot would stand in for shots that no other method has.
        tuned = [method for method in maker.methods if method != ZERO_SHOT]
        scopes = [s for s in scopes if any(maker.samples(s, m) for m in tuned)] or scopes
        about = maker.named("accuracy", short, caption="Accuracy", of=label)
        columns = [maker.column(scope.at, scope) for scope in scopes]
        table = maker.by_method(about, columns, _AVERAGE if average else "")
        caption = f"Difference to {row_of(maker.baseline).title}"
        about = maker.named("difference", short, caption=caption, of=label)
        gaps = maker.by_method(about, [maker.difference(scope.at, scope) for scope in scopes])
        # Beside the curves there is room for so many columns.
        block = Block(label, tables=[table, gaps], beside=len(table.columns) <= 4)
        if table and (average or short in maker.drawn):
            lines = {
                maker.entry(row.key): {
                    scope.shots: known
                    for scope, column in zip(scopes, table.columns, strict=True)
                    if (known := column.cells[i].known)
                }
                for i, row in enumerate(table.rows)
            }
            block.runs = table.runs
            block.legend = list(lines) if sum(map(len, lines.values())) > len(maker.methods) else []
            caption, figure = "Accuracy over shots", figures.accuracy_over_shots
            if len({shots for line in lines.values() for shots in line}) == 1:
                caption, figure = f"Accuracy at {scopes[0].at}", figures.accuracy_by_method
            about = maker.named("figure-accuracy", short, caption=caption, of=label)
            block.drawings.append(figures.draw(figure, about, lines))
        yield block


# -------------------------------------------------- what prompts were not tuned on


def _targets(maker: Maker, name: str) -> Iterator[Block]:
    """For each source and number of shots, methods by targets.

    A domain has the source's family and classes; anything else outside the source's own images is
    another dataset.
    """
    tables = []
    for classes in ("all", "base"):
        for scope, runs in maker.sources(classes):
            source = scope.datasets[0]
            targets = {
                (target, c)
                for target, c in {key for run in runs for key in run.evaluations}
                if target != source
                and (name == "domains") is (_family(target) == _family(source) and c == classes)
            }
            if targets:
                tables.append(_transfer(maker, name, scope, sorted(targets)))
    yield Block(tables=tables)


domains = partial(_targets, name="domains")
cross_dataset = partial(_targets, name="cross-dataset")


def _transfer(maker: Maker, name: str, scope: Scope, targets: list[tuple[str, str]]) -> Table:
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
    note += f"The difference is {whose}to {row_of(maker.baseline).title}, paired by seed."
    there = [m for m in maker.methods if any(maker.samples(scope, m, x) for _, x in measures[1:])]
    columns = [maker.column(head, scope, measure) for head, measure in measures]
    columns.append(maker.difference("difference", scope, tuple(targets)))
    parts = [name, source, *{scope.classes} - {"all"}, f"{scope.shots}-shots"]
    about = maker.named(*parts, caption=f"From {label}, {scope.at}")
    return maker.by_method(about, columns, note if len(there) > 1 else "", there)


def base_to_new(maker: Maker) -> Iterator[Block]:
    """Prompts tuned on the base classes, evaluated on base and on new ones."""
    by_shots: dict[int, list[str]] = defaultdict(list)
    for scope, runs in maker.sources("base"):
        if any("new" in run.figures for run in runs):
            by_shots[scope.shots] += scope.datasets
    tables = []
    for shots, every in sorted(by_shots.items()):
        for datasets in averaged(every):
            several, scope = len(datasets) > 1, Scope(datasets, shots, "base")
            label = f"average over {len(datasets)} datasets" if several else datasets[0]
            caption = f"Base to new, {label}, {scope.at}"
            about = maker.named("base-to-new", label, f"{shots}-shots", caption=caption)
            columns = [
                maker.column("base", scope, "base"),
                maker.column("new", scope, "new"),
                maker.column("harmonic mean", scope, "harmonic"),
                maker.difference("difference", scope, "harmonic"),
            ]
            tables.append(maker.by_method(about, columns))
    yield Block(tables=tables)


def _family(dataset: str) -> str:
    """What the domains of one dataset have in common."""
    name = dataset.partition(":")[0]
    return "imagenet" if name.startswith("imagenet") else name


def _of(dataset: str, classes: str | None) -> str:
    """A dataset with the classes meant, where they are not all."""
    return dataset if classes == "all" else f"{dataset} ({classes})"
