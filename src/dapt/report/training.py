"""What happens inside a run: loss terms by epoch, dispersion, and maps of the features."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from dapt.errors import UserError
from dapt.report.collect import read_log, warning
from dapt.report.figures import Entry, before_and_after, training_curves
from dapt.report.rows import loss_title
from dapt.report.sections import Block, Maker, Section, shots_of
from dapt.report.statistics import estimate, runs_of
from dapt.report.study import dispersion as measured

_MOST_TERMS = 8
# Higher or lower is what the losses aim at; before tuning there is nothing to be best at.
_BETTER = {("inter", "after"): "high", ("intra", "after"): "low"}


def curves(maker: Maker) -> Section:
    """Every loss term by epoch, at the number of shots that most methods have."""
    return Section(
        "curves",
        "Training curves",
        "Mean of each loss term over an epoch's steps, before it is weighted, and over seeds; "
        "bands reach from the lowest seed to the highest.",
        [_curves(maker, dataset) for dataset in maker.drawn],
        "no run with a log.csv",
    )


def _curves(maker: Maker, dataset: str) -> Block:
    study, label = maker.study, maker.study.label(dataset)
    shots = study.best_represented_shots([dataset])
    logs: dict[str, dict[Entry, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    numbers: set[int] = set()
    for method in study.methods:
        for run in study.group(dataset, method, shots).values():
            try:
                log = read_log(run)
            except UserError as error:
                maker.warnings.append(warning(run.path, error, "its curves are left out"))
                continue
            for term, values in log.items():
                logs[term][maker.entry(method)].append(values)
                numbers.add(run.number)
    block = Block(f"{label}, {shots_of(shots)}", runs=tuple(sorted(numbers)))
    for name, found in list(logs.items())[:_MOST_TERMS]:
        term = loss_title(name)
        title = f"{term} by epoch, {label}, {shots_of(shots)}"
        about = maker.named("curve", name, dataset, title=title, caption=term.capitalize())
        stacked = {entry: _stacked(rows) for entry, rows in found.items()}
        block.drawings.append(training_curves(about, term, stacked))
    having = {entry for found in logs.values() for entry in found}
    block.legend = [entry for entry in map(maker.entry, study.methods) if entry in having]
    return block


def _stacked(logs: list[np.ndarray]) -> np.ndarray:
    """Rows of different length as one array, NaN where a row has ended."""
    longest = max(map(len, logs))
    return np.stack([np.pad(log, (0, longest - len(log)), constant_values=np.nan) for log in logs])


def dispersion(maker: Maker) -> Section:
    """Inter- and intra-dispersion before and after, and maps of the features themselves."""
    return Section(
        "dispersion",
        "Dispersion and feature maps",
        "Inter-dispersion is the mean distance between two classes' text features (larger is "
        "further apart), intra-dispersion the mean distance of support images to their class "
        "prototype (smaller is tighter).",
        [
            block
            for dataset in maker.study.datasets
            for block in (_dispersion(maker, dataset), _maps(maker, dataset))
        ],
        "no run that learned a prompt",
    )


def _dispersion(maker: Maker, dataset: str) -> Block:
    study, label = maker.study, maker.study.label(dataset)
    shots = study.best_represented_shots([dataset])
    of = [(kind, time) for kind in ("inter", "intra") for time in ("before", "after")]
    title = f"Dispersion, {label}, {shots_of(shots)}"
    about = maker.named("dispersion", dataset, title=title, caption="Dispersion")
    columns = [
        maker.column(" ".join(key), [dataset], shots, measured(*key), "number", _BETTER.get(key))
        for key in of
    ]
    table = maker.by_method(about, columns)
    block = Block(f"{label}, {shots_of(shots)}", tables=[table])
    if not table or dataset not in maker.drawn:
        return block
    samples = {
        (method, key): list(study.samples([dataset], method, shots, measured(*key)).values())
        for method in study.methods
        for key in of
    }
    block.runs = runs_of(sample for found in samples.values() for sample in found)
    for kind in ("inter", "intra"):
        changes = {}
        for method in study.methods:
            ends = [samples[method, (kind, time)] for time in ("before", "after")]
            if all(ends):
                before, after = (estimate([s.value for s in found]).mean for found in ends)
                changes[maker.entry(method)] = (before, after)
        about = maker.named(
            "dispersion",
            kind,
            dataset,
            title=f"{kind.capitalize()}-dispersion before and after, {label}",
            caption=f"{kind.capitalize()}-dispersion, before (hollow) and after tuning",
        )
        block.drawings.append(before_and_after(about, f"{kind}-dispersion", changes))
    return block


def _maps(maker: Maker, dataset: str) -> Block:
    looked = [inside for inside in maker.inside if inside.run.dataset == dataset and inside.maps]
    return Block(
        f"Feature maps, {maker.study.label(dataset)}",
        "Before and after tuning by one t-SNE fit for each pair, so that places are "
        "comparable within it. Classes with the most test images have colours; the "
        "run of a method is the one with the most shots and the lowest seed.",
        [drawing for inside in looked for drawing in inside.maps],
        legend=looked[0].legend if looked else [],
        size="pairs",
        runs=tuple(sorted(inside.run.number for inside in looked)),
    )
