"""Where runs go wrong: confusions, hardest classes, and confidence that is not earned."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dapt.errors import UserError
from dapt.report.collect import ConfusionMatrix, Run, read_confusion, warning
from dapt.report.figures import confusion_matrix
from dapt.report.rows import learns, method_title
from dapt.report.sections import Block, Maker
from dapt.report.statistics import Sample, Samples
from dapt.report.study import Scope, Study
from dapt.report.tables import PLAIN, Cell, Column, Table

MATRIX_CLASSES = 60  # more cannot be read; the hardest are shown
LISTED = 10  # hardest classes and most frequent confusions


def featured(study: Study, datasets: Iterable[str]) -> list[Run]:
    """For each dataset the run whose mistakes are shown.

    It is of the method with the highest mean accuracy at the number of shots that most methods
    have, of those that learn a prompt if there are any; its representative run.
    """
    found = []
    for dataset in datasets:
        scope = study.best([dataset])
        tuned = [m for m in study.methods if learns(m) and study.runs_in(scope, m)]
        samples = {method: study.samples(scope, method) for method in tuned or study.methods}
        means = {m: own.estimate().mean for m, own in samples.items() if own}
        if means:
            best = max(means, key=lambda method: means[method])
            found.append(study.main_runs(dataset, best)[0])
    return found


def mistakes(maker: Maker) -> list[Block]:
    """Confusion matrix, hardest classes and most frequent confusions of one run a dataset."""
    blocks = []
    for run in featured(maker.study, maker.drawn):
        try:
            blocks.append(_mistakes(maker, run, read_confusion(run)))
        except UserError as error:
            maker.warnings.append(warning(run.path, error, "its mistakes are left out"))
    return blocks


def _mistakes(maker: Maker, run: Run, confusion: ConfusionMatrix) -> Block:
    label, size = maker.study.label(run.dataset), len(confusion.class_names)
    what = f"{label}: {method_title(run.method)}, {Scope([], run.shots).at}, seed {run.seed}"
    note = f"The matrix shows the {MATRIX_CLASSES} hardest of {size} classes."
    # Classes with the most misnamed images, in label order.
    wrong = confusion.images - confusion.right
    kept = np.sort(np.argsort(-wrong, kind="stable")[:MATRIX_CLASSES])
    about = maker.named("confusion", run.dataset, caption="Confusion matrix", of=what)
    shares = confusion.counts[kept][:, kept].toarray() / np.maximum(confusion.images[kept, None], 1)
    return Block(
        what,
        note if size > MATRIX_CLASSES else "",
        [confusion_matrix(about, [confusion.class_names[c] for c in kept], shares)],
        _tables(maker, run, confusion),
        examples=[hard for inside in maker.inside if inside.run == run for hard in inside.hardest],
        beside=size <= 36,
        kind="natural",
        runs=(run.number,),
    )


def _tables(maker: Maker, run: Run, confusion: ConfusionMatrix) -> list[Table]:
    names, images, right = confusion.class_names, confusion.images, confusion.right
    wrong, source, label = confusion.mistakes(), (run.number,), maker.study.label(run.dataset)
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
    return [
        Table(
            maker.named("hardest", run.dataset, caption="Hardest classes", of=label),
            "class",
            hardest,
            [(names[c], c, None) for c in confusion.hardest()[:LISTED]],
        ),
        Table(
            maker.named("confused", run.dataset, caption="Most frequent confusions", of=label),
            "true class",
            confused,
            [(names[cell[0]], cell, None) for cell in wrong[:LISTED]],
        ),
    ]


def calibration(maker: Maker) -> list[Block]:
    """Expected calibration error, and reliability diagrams where confidences are known."""
    study = maker.study
    blocks: list[Block] = []
    for dataset in study.datasets:
        label, scopes = study.label(dataset), [Scope([dataset], k) for k in study.shots]
        about = maker.named("ece", dataset, caption="ECE", of=label)
        columns = [maker.column(s.at, s, "ece") for s in scopes]
        looked = [i for i in maker.inside if i.run.dataset == dataset and i.reliability]
        blocks += (
            Block(label, tables=[maker.by_method(about, columns)]),
            Block(
                f"Reliability, {label}",
                drawings=[drawing for inside in looked for drawing in inside.reliability],
                kind="small",
                runs=tuple(inside.run.number for inside in looked),
            ),
        )
    return blocks
