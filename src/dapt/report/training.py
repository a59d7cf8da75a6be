"""What happens inside a run: loss terms by epoch, dispersion, and maps of the features."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from dapt.errors import UserError
from dapt.report.collect import read_log, warning
from dapt.report.figures import Entry, before_and_after, training_curves
from dapt.report.rows import loss_title
from dapt.report.sections import Block, Maker

_MOST_TERMS = 8
_DISPERSION = [f"{kind} {time}" for kind in ("inter", "intra") for time in ("before", "after")]


def curves(maker: Maker) -> list[Block]:
    """Every loss term by epoch, at the number of shots that most methods have."""
    return [_curves(maker, dataset) for dataset in maker.drawn]


def _curves(maker: Maker, dataset: str) -> Block:
    study, scope = maker.study, maker.study.best([dataset])
    label = f"{study.label(dataset)}, {scope.at}"
    logs: dict[str, dict[Entry, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    legend, numbers = dict[Entry, None](), set[int]()
    for method in study.methods:
        for run in study.runs_in(scope, method):
            try:
                log = read_log(run)
            except UserError as error:
                maker.warnings.append(warning(run.path, error, "its curves are left out"))
                continue
            for term, values in log.items():
                logs[term][maker.entry(method)].append(values)
                legend[maker.entry(method)] = None
                numbers.add(run.number)
    block = Block(label, legend=list(legend), runs=tuple(sorted(numbers)))
    for name, found in list(logs.items())[:_MOST_TERMS]:
        term = loss_title(name)
        title = f"{term} by epoch, {label}"
        about = maker.named("curve", name, dataset, caption=term.capitalize(), title=title)
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
    scope, label = maker.study.best([dataset]), maker.study.label(dataset)
    about = maker.named("dispersion", dataset, caption="Dispersion", of=f"{label}, {scope.at}")
    table = maker.by_method(about, [maker.column(name, scope, name) for name in _DISPERSION])
    block = Block(f"{label}, {scope.at}", tables=[table], runs=table.runs)
    if dataset not in maker.drawn:
        return block
    for kind in ("inter", "intra"):
        changes = {}
        for i, (_, method) in enumerate(table.rows):
            known = {column.title: column.cells[i].known for column in table.columns}
            before, after = known.get(f"{kind} before"), known.get(f"{kind} after")
            if before and after:
                changes[maker.entry(str(method))] = (before.mean, after.mean)
        if changes:
            what = f"{kind.capitalize()}-dispersion"
            about = maker.named(
                "dispersion",
                kind,
                dataset,
                caption=f"{what}, before (hollow) and after tuning",
                title=f"{what} before and after, {label}",
            )
            block.drawings.append(before_and_after(about, f"{kind}-dispersion", changes))
    return block


def _maps(maker: Maker, dataset: str) -> Block:
    looked = [inside for inside in maker.inside if inside.run.dataset == dataset and inside.maps]
    return Block(
        f"Feature maps, {maker.study.label(dataset)}",
        drawings=[drawing for inside in looked for drawing in inside.maps],
        legend=looked[0].legend if looked else [],
        kind="pairs",
        runs=tuple(sorted(inside.run.number for inside in looked)),
    )
