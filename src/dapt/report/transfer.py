"""Prompts on what they were not tuned on: other domains, other datasets, new classes."""

from __future__ import annotations

from collections import defaultdict

from dapt.report.rows import method_title
from dapt.report.sections import Block, Maker, Section, shots_of
from dapt.report.study import ACCURACY, base_and_new, base_classes, elsewhere, new_classes
from dapt.report.tables import Table


def domains(maker: Maker) -> Section:
    """Prompts tuned on a source domain, evaluated on others."""
    return Section(
        "domains",
        "Domain generalisation",
        "Tuned on the source alone, evaluated on each target without further tuning.",
        [Block(tables=_by_source(maker, "domains", domains=True))],
        "no evaluation on another domain ('dapt eval RUN --domain …')",
    )


def cross_dataset(maker: Maker) -> Section:
    """Prompts tuned on one dataset, evaluated on others with other classes."""
    return Section(
        "cross-dataset",
        "Cross-dataset transfer",
        "Tuned on the source alone, evaluated on each target with classes of its own.",
        [Block(tables=_by_source(maker, "cross-dataset", domains=False))],
        "no evaluation on another dataset ('dapt eval RUN --dataset …')",
    )


def _by_source(maker: Maker, name: str, *, domains: bool) -> list[Table]:
    """For each source and number of shots, methods by targets.

    A domain has the source's family and classes; anything else outside the source's own images is
    another dataset.
    """
    tables = []
    for classes in ("all", "base"):
        for dataset, shots, runs in maker.study.sources(classes):
            targets = {
                (target, c)
                for target, c in {key for run in runs for key in run.evaluations}
                if target != dataset
                and domains is (_family(target) == _family(dataset) and c == classes)
            }
            if targets:
                tables.append(_transfer(maker, name, dataset, classes, shots, sorted(targets)))
    return tables


def _transfer(
    maker: Maker,
    name: str,
    dataset: str,
    classes: str,
    shots: int,
    targets: list[tuple[str, str]],
) -> Table:
    study, source, whole = maker.study, _of(dataset, classes), elsewhere(*targets)
    measures = [(f"source: {source}", ACCURACY)]
    measures += [(_of(_within(d, dataset), c), elsewhere((d, c))) for d, c in targets]
    note = f"The difference is to {method_title(study.baseline)}, paired by seed."
    if len(targets) > 1:
        measures.append(("average of targets", whole))
        note = (
            "The average is of runs that were evaluated on every target. The difference is "
            f"the average's, to {method_title(study.baseline)}, paired by seed."
        )
    there = [
        method
        for method in study.methods
        if any(
            study.samples([dataset], method, shots, elsewhere(target), classes=classes)
            for target in targets
        )
    ]
    columns = [
        maker.column(head, [dataset], shots, measure, classes=classes) for head, measure in measures
    ]
    columns.append(maker.difference("difference", [dataset], shots, whole, classes))
    apart = [] if classes == "all" else [classes]
    about = maker.named(
        name, dataset, *apart, f"{shots}-shots", title=f"From {source}, {shots_of(shots)}"
    )
    return maker.by_method(about, columns, note if len(there) > 1 else "", there)


def base_to_new(maker: Maker) -> Section:
    """Prompts tuned on the base classes, evaluated on base and on new ones."""
    by_shots: dict[int, list[str]] = defaultdict(list)
    for dataset, shots, runs in maker.study.sources("base"):
        if any(map(new_classes, runs)):
            by_shots[shots].append(dataset)
    tables = []
    for shots, datasets in sorted(by_shots.items()):
        groups = [[d] for d in datasets]
        if len(datasets) > 1:
            groups.insert(0, datasets)
        for group in groups:
            label = f"average over {len(group)} datasets" if len(group) > 1 else group[0]
            title = f"Base to new, {label}, {shots_of(shots)}"
            columns = [
                maker.column("base", group, shots, base_classes, classes="base"),
                maker.column("new", group, shots, new_classes, classes="base"),
                maker.column("harmonic mean", group, shots, base_and_new, classes="base"),
                maker.difference("difference", group, shots, base_and_new, "base"),
            ]
            about = maker.named("base-to-new", label, f"{shots}-shots", title=title)
            tables.append(maker.by_method(about, columns))
    return Section(
        "base-to-new",
        "Base to new classes",
        "Tuned on the first half of the classes, evaluated on both halves. The harmonic mean "
        "is taken run by run, then averaged; the difference is the harmonic mean's, to "
        f"{method_title(maker.study.baseline)}, paired by dataset and seed.",
        [Block(tables=tables)],
        "no run with classes=base that was evaluated on the new classes",
    )


def _family(dataset: str) -> str:
    """What the domains of one dataset have in common."""
    name = dataset.partition(":")[0]
    return "imagenet" if name.startswith("imagenet") else name


def _within(target: str, source: str) -> str:
    """A target's name, without the dataset's where it is the source's."""
    dataset, _, domain = target.partition(":")
    return domain if domain and dataset == source.partition(":")[0] else target


def _of(dataset: str, classes: str) -> str:
    """A dataset with the classes meant, where they are not all."""
    return dataset if classes == "all" else f"{dataset} ({classes})"
