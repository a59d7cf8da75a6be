"""The comparison of methods: at a glance, and over shots."""

from __future__ import annotations

from collections.abc import Sequence

from dapt.methods import ZERO_SHOT
from dapt.report.figures import accuracy_by_method, accuracy_over_shots
from dapt.report.rows import method_title
from dapt.report.sections import Block, Maker, averaged
from dapt.report.statistics import Sample, Samples, runs_of
from dapt.report.study import Scope, Study
from dapt.report.tables import PLAIN, Column

_AVERAGE = "Averages are over seeds that every dataset has; a method that lacks one has none."


def best_compared(study: Study) -> Scope:
    """The datasets with the most methods at the number of shots that most of them have."""
    shots = study.best(study.datasets).shots
    scopes = [Scope([dataset], shots) for dataset in study.datasets]
    present = [sum(bool(study.samples(scope, m)) for m in study.methods) for scope in scopes]
    pairs = zip(study.datasets, present, strict=True)
    return Scope([dataset for dataset, count in pairs if count == max(present)], shots)


def overview(maker: Maker) -> list[Block]:
    """All methods at the number of shots that most of them have."""
    study = maker.study
    if not study.datasets:
        return []
    scope = best_compared(study)

    def learned(method: str) -> Samples:
        alone = (scope._replace(datasets=[dataset]) for dataset in scope.datasets)
        parts = [study.samples(place, method, "learned") for place in alone]
        found = [sample for part in parts for sample in part.values()]
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
    to = f"Difference to {method_title(study.baseline)}"
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
            maker.entry(str(method)): {
                scope.shots: known
                for scope, column in zip(scopes, accuracy.columns, strict=True)
                if (known := column.cells[i].known)
            }
            for i, (_, method) in enumerate(accuracy.rows)
        }
        block.runs = accuracy.runs
        block.legend = list(lines) if sum(map(len, lines.values())) > len(study.methods) else []
        caption, figure = "Accuracy over shots", accuracy_over_shots
        if len({shots for line in lines.values() for shots in line}) == 1:
            caption, figure = f"Accuracy at {scopes[0].at}", accuracy_by_method
        about = maker.named("figure-accuracy", short, caption=caption, of=label)
        block.drawings.append(figure(about, lines))
    return block
