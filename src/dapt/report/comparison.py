"""The comparison of methods: at a glance, over shots, and on what they were not tuned on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial

from dapt.methods import ZERO_SHOT
from dapt.report import figures
from dapt.report.collect import Measure
from dapt.report.sections import Block, Maker, averaged
from dapt.report.statistics import Sample, Samples, runs_of
from dapt.report.study import Scope, Study, row_of
from dapt.report.tables import PLAIN, Column, Table

_AVERAGE = "Averages are over seeds that every dataset has; a method that lacks one has none."


def best_compared(study: Study) -> Scope:
    """The datasets with the most methods at the number of shots that most of them have."""
    shots = study.best(study.datasets).shots
    present = {
        dataset: sum(bool(study.samples(Scope([dataset], shots), m)) for m in study.methods)
        for dataset in study.datasets
    }
    return Scope([d for d, count in present.items() if count == max(present.values())], shots)


def overview(maker: Maker) -> list[Block]:
    """All methods at the number of shots that most of them have."""
    study = maker.study
    if not study.datasets:
        return []
    scope = best_compared(study)

    def learned(method: str) -> Samples:
        alone = [scope._replace(datasets=[dataset]) for dataset in scope.datasets]
        found = [s for one in alone for s in study.samples(one, method, "learned").values()]
        alike = len({sample.value for sample in found}) == 1
        return Samples({0: Sample(found[0].value, runs_of(found))} if alike else {})

    columns = [
        maker.column("accuracy", scope),
        maker.difference("difference", scope),
        maker.column("top-5", scope, "top5"),
        maker.column("macro-F1", scope, "macro_f1"),
        maker.column("ECE", scope, "ece"),
        Column("learned", learned, PLAIN),
        maker.column("tuning", scope, "tuning"),
    ]
    about = maker.named("overview", caption=f"All methods at {scope.at}")
    tables = [maker.by_method(about, columns)]
    if len(study.datasets) > 1:
        columns = [maker.column(d, Scope([d], scope.shots)) for d in study.datasets]
        whole = scope.datasets == study.datasets
        if whole:
            columns.append(maker.column("average", scope))
        caption = f"Accuracy by dataset at {scope.at}"
        about = maker.named("overview-by-dataset", caption=caption)
        tables.append(maker.by_method(about, columns, _AVERAGE if whole else ""))
    return [Block(tables=tables)]


def accuracy(maker: Maker) -> list[Block]:
    """Accuracy over shots and paired differences, on average and by dataset."""
    return [_accuracy(maker, datasets) for datasets in averaged(maker.study.datasets)]


def _accuracy(maker: Maker, datasets: Sequence[str]) -> Block:
    study, average = maker.study, len(datasets) > 1
    short = "average" if average else datasets[0]
    label = study.label(f"Average over {len(datasets)} datasets" if average else short)
    scopes = [Scope(datasets, shots) for shots in study.shots]
    # Zero-shot would stand in for shots that no other method has.
    tuned = [method for method in study.methods if method != ZERO_SHOT]
    scopes = [s for s in scopes if any(study.samples(s, m) for m in tuned)] or scopes
    to = f"Difference to {row_of(study.baseline).title}"
    accuracy = maker.by_method(
        maker.named("accuracy", short, caption="Accuracy", of=label),
        [maker.column(scope.at, scope) for scope in scopes],
        _AVERAGE if average else "",
    )
    difference = maker.by_method(
        maker.named("difference", short, caption=to, of=label),
        [maker.difference(scope.at, scope) for scope in scopes],
    )
    # Beside the curves there is room for so many columns.
    block = Block(label, tables=[accuracy, difference], beside=len(accuracy.columns) <= 4)
    if accuracy and (average or short in maker.drawn):
        lines = {
            maker.entry(row.key): {
                scope.shots: known
                for scope, column in zip(scopes, accuracy.columns, strict=True)
                if (known := column.cells[i].known)
            }
            for i, row in enumerate(accuracy.rows)
        }
        block.runs = accuracy.runs
        block.legend = list(lines) if sum(map(len, lines.values())) > len(study.methods) else []
        caption, figure = "Accuracy over shots", figures.accuracy_over_shots
        if len({shots for line in lines.values() for shots in line}) == 1:
            caption, figure = f"Accuracy at {scopes[0].at}", figures.accuracy_by_method
        about = maker.named("figure-accuracy", short, caption=caption, of=label)
        block.drawings.append(figures.draw(figure, about, lines))
    return block


# -------------------------------------------------- what prompts were not tuned on


def _targets(maker: Maker, name: str) -> list[Block]:
    """For each source and number of shots, methods by targets.

    A domain has the source's family and classes; anything else outside the source's own images is
    another dataset.
    """
    tables = []
    for classes in ("all", "base"):
        for scope, runs in maker.study.sources(classes):
            source = scope.datasets[0]
            targets = {
                (target, c)
                for target, c in {key for run in runs for key in run.evaluations}
                if target != source
                and (name == "domains") is (_family(target) == _family(source) and c == classes)
            }
            if targets:
                tables.append(_transfer(maker, name, scope, sorted(targets)))
    return [Block(tables=tables)]


domains = partial(_targets, name="domains")
cross_dataset = partial(_targets, name="cross-dataset")


def _transfer(maker: Maker, name: str, scope: Scope, targets: list[tuple[str, str]]) -> Table:
    """Accuracy on the source, each target and all of them."""
    study, source, apart = maker.study, scope.datasets[0], scope.classes != "all"
    label = _of(source, scope.classes)
    measures: list[tuple[str, Measure]] = [(f"source: {label}", "accuracy")]
    for target, classes in targets:
        dataset, _, domain = target.partition(":")
        own = domain and dataset == source.partition(":")[0]
        head = _of(domain if own else target, classes)
        measures.append((head, ((target, classes),)))
    whose = "the average's, " if len(targets) > 1 else ""
    note = f"The difference is {whose}to {row_of(study.baseline).title}, paired by seed."
    if whose:
        measures.append(("average of targets", tuple(targets)))
        note = f"The average is of runs that were evaluated on every target. {note}"
    there = [m for m in study.methods if any(study.samples(scope, m, x) for _, x in measures[1:])]
    columns = [maker.column(head, scope, measure) for head, measure in measures]
    columns.append(maker.difference("difference", scope, tuple(targets)))
    parts = [name, source, *([scope.classes] if apart else []), f"{scope.shots}-shots"]
    about = maker.named(*parts, caption=f"From {label}, {scope.at}")
    return maker.by_method(about, columns, note if len(there) > 1 else "", there)


def base_to_new(maker: Maker) -> list[Block]:
    """Prompts tuned on the base classes, evaluated on base and on new ones."""
    by_shots: dict[int, list[str]] = defaultdict(list)
    for scope, runs in maker.study.sources("base"):
        if any("new" in run.figures for run in runs):
            by_shots[scope.shots] += scope.datasets
    tables = []
    for shots, every in sorted(by_shots.items()):
        for datasets in averaged(every):
            several = len(datasets) > 1
            label = f"average over {len(datasets)} datasets" if several else datasets[0]
            scope = Scope(datasets, shots, "base")
            caption = f"Base to new, {label}, {scope.at}"
            about = maker.named("base-to-new", label, f"{shots}-shots", caption=caption)
            columns = [
                maker.column("base", scope, "base"),
                maker.column("new", scope, "new"),
                maker.column("harmonic mean", scope, "harmonic"),
                maker.difference("difference", scope, "harmonic"),
            ]
            tables.append(maker.by_method(about, columns))
    return [Block(tables=tables)]


def _family(dataset: str) -> str:
    """What the domains of one dataset have in common."""
    name = dataset.partition(":")[0]
    return "imagenet" if name.startswith("imagenet") else name


def _of(dataset: str, classes: str | None) -> str:
    """A dataset with the classes meant, where they are not all."""
    return dataset if classes == "all" else f"{dataset} ({classes})"
