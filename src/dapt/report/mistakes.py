"""Where runs go wrong: confusions, hardest classes, and confidence that is not earned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dapt.engine.evaluate import ECE_BINS
from dapt.errors import UserError
from dapt.report.collect import ConfusionMatrix, Run, read_confusion, warning
from dapt.report.comparison import NO_RUN
from dapt.report.figures import confusion_matrix
from dapt.report.rows import learns, method_title
from dapt.report.sections import Block, Maker, Section, shots_of
from dapt.report.statistics import Sample, Samples, estimate
from dapt.report.study import ACCURACY, Study, score
from dapt.report.tables import Column, Row, Table, words

MATRIX_CLASSES = 60  # more cannot be read; the hardest are shown
LISTED = 10  # hardest classes and most frequent confusions


def featured(study: Study, datasets: Sequence[str]) -> dict[str, Run]:
    """For each dataset the run whose mistakes are shown.

    It is of the method with the highest mean accuracy at the number of shots that most methods
    have, of those that learn a prompt if there are any; its representative run.
    """
    found = {}
    for dataset in datasets:
        shots = study.best_represented_shots([dataset])
        tuned = [m for m in study.methods if learns(m) and study.group(dataset, m, shots)]
        means = {
            method: estimate([sample.value for sample in samples.values()]).mean
            for method in tuned or study.methods
            if (samples := study.samples([dataset], method, shots, ACCURACY))
        }
        best = max(means, key=lambda method: means[method], default=None)
        if best and (run := study.representative(dataset, best)):
            found[dataset] = run
    return found


def mistakes(maker: Maker) -> Section:
    """Confusion matrix, hardest classes and most frequent confusions of one run a dataset."""
    blocks = []
    for dataset, run in featured(maker.study, maker.drawn).items():
        try:
            confusion = read_confusion(run)
        except UserError as error:
            maker.warnings.append(warning(run.path, error, "its mistakes are left out"))
            continue
        blocks.append(_mistakes(maker, dataset, run, confusion))
    return Section(
        "mistakes",
        "Confusions and hardest classes",
        "One run a dataset: of the prompt method with the highest accuracy, the one with most "
        "shots and the lowest seed. Rows are true classes, columns what they were named; the "
        "diagonal is what is right.",
        blocks,
        NO_RUN,
    )


def _mistakes(maker: Maker, dataset: str, run: Run, confusion: ConfusionMatrix) -> Block:
    label, size = maker.study.label(dataset), len(confusion.class_names)
    what = f"{label}: {method_title(run.method)}, {shots_of(run.shots)}, seed {run.seed}"
    note = f"The matrix shows the {MATRIX_CLASSES} hardest of {size} classes."
    # Classes with the most misnamed images, in label order.
    wrong = confusion.images - confusion.right
    kept = sorted(np.argsort(-wrong, kind="stable")[:MATRIX_CLASSES].tolist())
    title, caption = f"Confusion matrix, {what}", "Confusion matrix"
    about = maker.named("confusion", dataset, title=title, caption=caption)
    names = [confusion.class_names[i] for i in kept]
    return Block(
        what,
        note if size > MATRIX_CLASSES else "",
        [confusion_matrix(about, names, confusion.shares(kept))],
        _tables(maker, dataset, run, confusion),
        examples=[hard for inside in maker.inside if inside.run == run for hard in inside.hardest],
        beside=size <= 36,
        size="natural",
        runs=(run.number,),
    )


def _tables(maker: Maker, dataset: str, run: Run, confusion: ConfusionMatrix) -> list[Table]:
    names, images, right = confusion.class_names, confusion.images, confusion.right
    wrong, source = confusion.mistakes(), (run.number,)
    # Of each class the name that it was given most.
    taken = {true: (named, count) for true, named, count in reversed(wrong)}

    def one(value: float) -> Samples:
        return {run.seed: Sample(value, source)}

    titles = ("Hardest classes", "Most frequent confusions")
    hardest, confused = (
        maker.named(name, dataset, title=f"{title}, {maker.study.label(dataset)}", caption=title)
        for name, title in zip(("hardest", "confused"), titles, strict=True)
    )
    return [
        Table(
            hardest,
            "class",
            [
                Column("accuracy", lambda c: one(right[c] / images[c])),
                Column("images", lambda c: one(images[c]), "count"),
                Column(
                    "mostly taken for",
                    lambda c: words(f"{names[taken[c][0]]} ({taken[c][1]})", source),
                    "text",
                ),
            ],
            [Row(names[c], c) for c in confusion.hardest()[:LISTED]],
        ),
        Table(
            confused,
            "true class",
            [
                Column("named", lambda cell: words(names[cell[1]], source), "text"),
                Column("images", lambda cell: one(cell[2]), "count"),
                Column("of class", lambda cell: one(cell[2] / images[cell[0]])),
            ],
            [Row(names[cell[0]], cell) for cell in wrong[:LISTED]],
        ),
    ]


def calibration(maker: Maker) -> Section:
    """Expected calibration error, and reliability diagrams where confidences are known."""
    study, blocks = maker.study, []
    for dataset in study.datasets:
        label = study.label(dataset)
        about = maker.named("ece", dataset, title=f"ECE, {label}", caption="ECE")
        columns = [
            maker.column(shots_of(k), [dataset], k, score("ece"), better="low") for k in study.shots
        ]
        blocks.append(Block(label, tables=[maker.by_method(about, columns)]))
        looked = [i for i in maker.inside if i.run.dataset == dataset and i.reliability]
        blocks.append(
            Block(
                f"Reliability, {label}",
                "Accuracy by confidence; below the dashed line it is too sure of itself. The "
                "more solid a bar, the more images it stands for.",
                [drawing for inside in looked for drawing in inside.reliability],
                size="small",
                runs=tuple(inside.run.number for inside in looked),
            )
        )
    return Section(
        "calibration",
        "Calibration",
        f"Expected calibration error: the gap between confidence and accuracy, over {ECE_BINS} "
        "bins of equal width. Lower is better.",
        blocks,
        "no run with an ECE",
    )
