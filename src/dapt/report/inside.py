"""What happens inside runs: loss terms, dispersion, features, mistakes, and confidence."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

import numpy as np

from dapt.errors import UserError
from dapt.methods import METHODS
from dapt.report import figures
from dapt.report.collect import ConfusionMatrix, Run, read_confusion, read_log, warning
from dapt.report.sections import Block, Maker, loss_title
from dapt.report.study import Scope, row_of
from dapt.report.tables import PLAIN, Cell, Column, Row, Sample, Samples, Table

MATRIX_CLASSES = 60  # more cannot be read; the hardest are shown
LISTED = 10  # hardest classes and most frequent confusions
_MOST_TERMS = 8  # of the loss


def curves(maker: Maker) -> Iterator[Block]:
    """Every loss term by epoch, at the number of shots that most methods have."""
    for dataset in maker.drawn:
        scope = maker.best([dataset])
        label = f"{maker.label(dataset)}, {scope.at}"
        logs: dict[str, dict[figures.Entry, list[np.ndarray]]] = {}
        legend, numbers = dict[figures.Entry, None](), set[int]()
        for method in maker.methods:
            for run in maker.runs_in(scope, method):
                try:
                    log = read_log(run)
                except UserError as error:
                    maker.warnings.append(warning(run.path, error, "its curves are left out"))
                    continue
                for term, values in log.items():
                    entry = maker.entry(method)
                    logs.setdefault(term, {}).setdefault(entry, []).append(values)
                    legend[entry] = None
                    numbers.add(run.number)
        block = Block(label, legend=list(legend), runs=tuple(sorted(numbers)))
        for name, found in list(logs.items())[:_MOST_TERMS]:
            term = loss_title(name)
            title = f"{term} by epoch, {label}"
            about = maker.named("curve", name, dataset, caption=term.capitalize(), title=title)
            stacked = {
                # Of rows of different length, NaN where one has ended.
                entry: np.array(list(zip_longest(*rows, fillvalue=np.nan))).T
                for entry, rows in found.items()
            }
            block.drawings.append(figures.draw(figures.training_curves, about, term, stacked))
        yield block


def dispersion(maker: Maker) -> Iterator[Block]:
    """Inter- and intra-dispersion before and after, and maps of the features themselves."""
    kinds, times = ("inter", "intra"), ("before", "after")
    names = [f"{kind} {time}" for kind in kinds for time in times]
    for dataset in maker.datasets:
        scope, label = maker.best([dataset]), maker.label(dataset)
        about = maker.named("dispersion", dataset, caption="Dispersion", of=f"{label}, {scope.at}")
        table = maker.by_method(about, [maker.column(name, scope, name) for name in names])
        block = Block(f"{label}, {scope.at}", tables=[table], runs=table.runs)
        for kind in kinds if dataset in maker.drawn else ():
            changes = {}
            for method in maker.methods:
                change = [maker.samples(scope, method, f"{kind} {time}") for time in times]
                if all(change):
                    before, after = (samples.estimate().mean for samples in change)
                    changes[maker.entry(method)] = (before, after)
            if changes:
                what = f"{kind}-dispersion"
                caption = f"{what.capitalize()}, before (hollow) and after tuning"
                title = f"{what.capitalize()} before and after, {label}"
                about = maker.named("dispersion", kind, dataset, caption=caption, title=title)
                drawing = figures.draw(figures.before_and_after, about, what, changes)
                block.drawings.append(drawing)
        yield block
        yield maker.looked[dataset, "pairs"]


def featured(maker: Maker) -> list[Run]:
    """For each dataset the run whose mistakes are shown.

    It is of the method with the highest mean accuracy at the number of shots that most methods
    have, of those that learn a prompt if there are any; its representative run.
    """
    found = []
    for dataset in maker.drawn:
        scope = maker.best([dataset])
        learning = [m for m in maker.methods if m not in METHODS or METHODS[m].learns]
        tuned = [m for m in learning if maker.runs_in(scope, m)]
        samples = {method: maker.samples(scope, method) for method in tuned or maker.methods}
        means = {m: own.estimate().mean for m, own in samples.items() if own}
        if means:
            found.append(maker.main_runs(dataset, max(means, key=lambda m: means[m]))[0])
    return found


def mistakes(maker: Maker) -> Iterator[Block]:
    """Confusion matrix, hardest classes and most frequent confusions of one run a dataset."""
    for run in featured(maker):
        try:
            confusion = read_confusion(run)
        except UserError as error:
            maker.warnings.append(warning(run.path, error, "its mistakes are left out"))
            continue
        label, size = maker.label(run.dataset), len(confusion.class_names)
        what = f"{label}: {row_of(run.method).title}, {Scope([], run.shots).at}, seed {run.seed}"
        note = f"The matrix shows the {MATRIX_CLASSES} hardest of {size} classes."
        # Classes with the most misnamed images, in label order.
        wrong, images = confusion.images - confusion.right, confusion.images
        kept = np.sort(np.argsort(-wrong, kind="stable")[:MATRIX_CLASSES])
        about = maker.named("confusion", run.dataset, caption="Confusion matrix", of=what)
        names = [confusion.class_names[c] for c in kept]
        shares = confusion.counts[kept][:, kept].toarray() / np.maximum(images[kept, None], 1)
        yield Block(
            what,
            note if size > MATRIX_CLASSES else "",
            [figures.draw(figures.confusion_matrix, about, names, shares)],
            _tables(maker, run, confusion),
            hardest=maker.hardest[run.number],
            beside=size <= 36,
            kind="natural",
            runs=(run.number,),
        )


def _tables(maker: Maker, run: Run, confusion: ConfusionMatrix) -> list[Table]:
    names, images, right = confusion.class_names, confusion.images, confusion.right
    wrong, source, label = confusion.mistakes(), (run.number,), maker.label(run.dataset)
    # Of each class the name that it was given most.
    taken = {true: f"{names[named]} ({count})" for true, named, count in reversed(wrong)}

    def one(value: float) -> Samples:
        return Samples({run.seed: Sample(value, source)})

    hardest = [
        Column("accuracy", lambda c: one(right[c] / images[c])),
        Column("images", lambda c: one(images[c]), PLAIN),
        Column("mostly taken for", lambda c: Cell(taken[c], source), PLAIN),
    ]
    confused = [
        Column("named", lambda cell: Cell(names[cell[1]], source), PLAIN),
        Column("images", lambda cell: one(cell[2]), PLAIN),
        Column("of class", lambda cell: one(cell[2] / images[cell[0]])),
    ]
    about = maker.named("hardest", run.dataset, caption="Hardest classes", of=label)
    rows = [Row(names[c], c) for c in confusion.hardest()[:LISTED]]
    mixed = maker.named("confused", run.dataset, caption="Most frequent confusions", of=label)
    pairs = [Row(names[cell[0]], cell) for cell in wrong[:LISTED]]
    return [Table(about, "class", hardest, rows), Table(mixed, "true class", confused, pairs)]


def calibration(maker: Maker) -> Iterator[Block]:
    """Expected calibration error, and reliability diagrams where confidences are known."""
    for dataset in maker.datasets:
        label, scopes = maker.label(dataset), [Scope([dataset], k) for k in maker.shots]
        about = maker.named("ece", dataset, caption="ECE", of=label)
        columns = [maker.column(scope.at, scope, "ece") for scope in scopes]
        yield Block(label, tables=[maker.by_method(about, columns)])
        yield maker.looked[dataset, "small"]
