"""What happens inside a run: loss terms by epoch, dispersion, and maps of the features."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from dapt.errors import UserError
from dapt.report.collect import read_log, warning
from dapt.report.figures import Entry, before_and_after, training_curves
from dapt.report.rows import loss_title
from dapt.report.sections import Block, Maker, shots_of
from dapt.report.statistics import runs_of

_MOST_TERMS = 8
_DISPERSION = [f"{kind} {time}" for kind in ("inter", "intra") for time in ("before", "after")]


def curves(maker: Maker) -> list[Block]:
    """Every loss term by epoch, at the number of shots that most methods have."""
    return [_curves(maker, dataset) for dataset in maker.drawn]


def _curves(maker: Maker, dataset: str) -> Block:
    study, scope = maker.study, maker.study.best([dataset])
    label = f"{study.label(dataset)}, {shots_of(scope.shots)}"
    logs: dict[str, dict[Entry, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    numbers: set[int] = set()
    for method in study.methods:
        for run in study.runs_in(scope, method):
            try:
                log = read_log(run)
            except UserError as error:
                maker.warnings.append(warning(run.path, error, "its curves are left out"))
                continue
            for term, values in log.items():
                logs[term][maker.entry(method)].append(values)
                numbers.add(run.number)
    having = {entry for found in logs.values() for entry in found}
    legend = [entry for entry in map(maker.entry, study.methods) if entry in having]
    block = Block(label, legend=legend, runs=tuple(sorted(numbers)))
    for name, found in list(logs.items())[:_MOST_TERMS]:
        term = loss_title(name)
        caption, title = term.capitalize(), f"{term} by epoch, {label}"
        about = maker.named("curve", name, dataset, caption=caption, title=title)
        stacked = {entry: _stacked(rows) for entry, rows in found.items()}
        block.drawings.append(training_curves(about, term, stacked))
    return block


def _stacked(logs: list[np.ndarray]) -> np.ndarray:
    """Rows of different length as one array, NaN where a row has ended."""
    longest = max(map(len, logs))
    return np.stack([np.pad(log, (0, longest - len(log)), constant_values=np.nan) for log in logs])


def dispersion(maker: Maker) -> list[Block]:
    """Inter- and intra-dispersion before and after, and maps of the features themselves."""
    parts = ((_dispersion(maker, d), _maps(maker, d)) for d in maker.study.datasets)
    return [block for pair in parts for block in pair]


def _dispersion(maker: Maker, dataset: str) -> Block:
    study, scope, label = maker.study, maker.study.best([dataset]), maker.study.label(dataset)
    where = f"{label}, {shots_of(scope.shots)}"
    about = maker.named("dispersion", dataset, caption="Dispersion", of=where)
    columns = [maker.column(name, scope, name) for name in _DISPERSION]
    block = Block(where, tables=[maker.by_method(about, columns)])
    if not block.items or dataset not in maker.drawn:
        return block
    found = {m: {n: study.samples(scope, m, n) for n in _DISPERSION} for m in study.methods}
    every = [samples for own in found.values() for samples in own.values()]
    block.runs = runs_of(every)
    for kind in ("inter", "intra"):
        ends = {m: (own[f"{kind} before"], own[f"{kind} after"]) for m, own in found.items()}
        changes = {
            maker.entry(m): (before.estimate().mean, after.estimate().mean)
            for m, (before, after) in ends.items()
            if before and after
        }
        if not changes:
            continue
        about = maker.named(
            "dispersion",
            kind,
            dataset,
            caption=f"{kind.capitalize()}-dispersion, before (hollow) and after tuning",
            title=f"{kind.capitalize()}-dispersion before and after, {label}",
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
