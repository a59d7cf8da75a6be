"""Prompts on what they were not tuned on: other domains, other datasets, new classes."""

from __future__ import annotations

from collections import defaultdict
from functools import partial

from dapt.report.rows import method_title
from dapt.report.sections import Block, Maker, averaged
from dapt.report.study import (
    Measure,
    Scope,
    base_and_new,
    base_classes,
    elsewhere,
    new_classes,
)
from dapt.report.tables import Table


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
    measures += [(_of(_within(d, source), c), elsewhere((d, c))) for d, c in targets]
    note, whose = "", ""
    if len(targets) > 1:
        measures.append(("average of targets", elsewhere(*targets)))
        note, whose = (
            "The average is of runs that were evaluated on every target. ",
            "the average's, ",
        )
    note += f"The difference is {whose}to {method_title(study.baseline)}, paired by seed."
    there = [m for m in study.methods if any(study.samples(scope, m, x) for _, x in measures[1:])]
    columns = [maker.column(head, scope, measure) for head, measure in measures]
    columns.append(maker.difference("difference", scope, elsewhere(*targets)))
    parts = [name, source, *([scope.classes] if apart else []), f"{scope.shots}-shots"]
    about = maker.named(*parts, caption=f"From {label}, {scope.at}")
    return maker.by_method(about, columns, note if len(there) > 1 else "", there)


def base_to_new(maker: Maker) -> list[Block]:
    """Prompts tuned on the base classes, evaluated on base and on new ones."""
    by_shots: dict[int, list[str]] = defaultdict(list)
    for scope, runs in maker.study.sources("base"):
        if any(map(new_classes, runs)):
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
                maker.column("base", scope, base_classes),
                maker.column("new", scope, new_classes),
                maker.column("harmonic mean", scope, base_and_new),
                maker.difference("difference", scope, base_and_new),
            ]
            tables.append(maker.by_method(about, columns))
    return [Block(tables=tables)]


def _family(dataset: str) -> str:
    """What the domains of one dataset have in common."""
    name = dataset.partition(":")[0]
    return "imagenet" if name.startswith("imagenet") else name


def _within(target: str, source: str) -> str:
    """A target's name, without the dataset's where it is the source's."""
    dataset, _, domain = target.partition(":")
    return domain if domain and dataset == source.partition(":")[0] else target


def _of(dataset: str, classes: str | None) -> str:
    """A dataset with the classes meant, where they are not all."""
    return dataset if classes == "all" else f"{dataset} ({classes})"
