"""The comparison of methods: at a glance, over shots, and to the baseline."""

from __future__ import annotations

from dapt.report.figures import accuracy_by_method, accuracy_over_shots
from dapt.report.rows import ZERO_SHOT, method_title
from dapt.report.sections import Block, Maker, Section, shots_of
from dapt.report.statistics import CONFIDENCE, Sample, Samples, runs_of
from dapt.report.study import ACCURACY, learned_parameters, score, tuning_seconds
from dapt.report.tables import Column, number

NO_RUN = "no finished run on the classes of a whole dataset"
_AVERAGE = "Averages are over seeds that every dataset has; a method that lacks one has none."


def overview(maker: Maker) -> Section:
    """All methods at the number of shots that most of them have."""
    study, every = maker.study, maker.study.datasets
    if not every:
        return Section("overview", "At a glance", "", [], NO_RUN)
    shots = study.best_represented_shots(every)
    present = {
        d: sum(bool(study.samples([d], m, shots, ACCURACY)) for m in study.methods) for d in every
    }
    names = [d for d in every if present[d] == max(present.values())]
    where = f"the mean over {len(names)} datasets"
    if len(names) == 1:
        where = study.label(names[0])
    elif study.classes != "all":
        where += f" ({study.classes} classes)"
    if len(names) < len(every):
        where += " (elsewhere some of the methods have no run at these shots)"

    def learned(method: str) -> Samples:
        parts = [study.samples([d], method, shots, learned_parameters) for d in names]
        found = [sample for part in parts for sample in part.values()]
        alike = len({sample.value for sample in found}) == 1
        return {0: Sample(found[0].value, runs_of(found))} if alike else {}

    columns = [
        maker.column("accuracy", names, shots),
        maker.difference("difference", names, shots),
        maker.column("top-5", names, shots, score("top5")),
        maker.column("macro-F1", names, shots, score("macro_f1")),
        maker.column("ECE", names, shots, score("ece"), better="low"),
        Column("learned", learned, "count"),
        maker.column("tuning", names, shots, tuning_seconds, "seconds", better=None),
    ]
    title = f"All methods at {shots_of(shots)}"
    tables = [maker.by_method(maker.named("overview", title=title), columns)]
    if len(every) > 1:
        columns = [maker.column(d, [d], shots) for d in every]
        if whole := names == every:
            columns.append(maker.column("average", every, shots))
        about = maker.named(
            "overview-by-dataset", title=f"Accuracy by dataset at {shots_of(shots)}"
        )
        tables.append(maker.by_method(about, columns, _AVERAGE if whole else ""))
    return Section(
        "overview",
        "At a glance",
        f"Every method at {shots_of(shots)}, on {where}. The difference is to "
        f"{method_title(study.baseline)}, paired by dataset and seed.",
        [Block(tables=tables)],
        NO_RUN,
    )


def accuracy(maker: Maker) -> Section:
    """Accuracy over shots and paired differences, on average and by dataset."""
    study = maker.study
    groups = [[d] for d in study.datasets]
    if len(groups) > 1:
        groups.insert(0, study.datasets)
    lead = (
        f"Mean over seeds ± half of the {100 * CONFIDENCE:g} % interval (Student's t); bands "
        "show it where there are three seeds or more. Differences are paired: the same "
        "dataset, number of shots and seed, hence the same support images. A coloured "
        "difference has an interval that excludes zero."
    )
    if ZERO_SHOT in study.methods:
        lead += " Zero-shot CLIP learns nothing, so one run of it stands for any shots and seed."
    blocks = [_accuracy(maker, group) for group in groups]
    return Section("accuracy", "Accuracy over shots", lead, blocks, NO_RUN)


def _accuracy(maker: Maker, datasets: list[str]) -> Block:
    study, several = maker.study, len(datasets) > 1
    short = "average" if several else datasets[0]
    label = study.label(f"Average over {len(datasets)} datasets" if several else short)
    points = {
        method: {
            shots: samples
            for shots in study.shots
            if (samples := study.samples(datasets, method, shots, ACCURACY))
        }
        for method in study.methods
    }
    # Zero-shot would stand in for shots that no other method has.
    compared = {k for method, found in points.items() if method != ZERO_SHOT for k in found}
    shots = [k for k in study.shots if k in compared or not compared]
    baseline = method_title(study.baseline)
    tables = [
        maker.by_method(
            maker.named("accuracy", short, title=f"Accuracy, {label}", caption="Accuracy"),
            [maker.column(shots_of(k), datasets, k) for k in shots],
            _AVERAGE if several else "",
        ),
        maker.by_method(
            maker.named(
                "difference",
                short,
                title=f"Difference to {baseline}, {label}",
                caption=f"Difference to {baseline}",
            ),
            [maker.difference(shots_of(k), datasets, k) for k in shots],
        ),
    ]
    # Beside the curves there is room for so many columns.
    block = Block(label, tables=tables, beside=len(tables[0].columns) <= 4)
    lines = {
        maker.entry(method): {k: number("percent", found[k]) for k in shots if k in found}
        for method, found in points.items()
    }
    lines = {entry: line for entry, line in lines.items() if line}
    if lines and (several or short in maker.drawn):
        block.runs = runs_of(
            s for found in points.values() for k in shots for s in found.get(k, {}).values()
        )
        if sum(map(len, lines.values())) > len(study.methods):
            block.legend = list(lines)
        over, paint = "over shots", accuracy_over_shots
        if len(kinds := {k for line in lines.values() for k in line}) == 1:
            over, paint = f"at {shots_of(kinds.pop())}", accuracy_by_method
        title = f"Accuracy {over}"
        about = maker.named("figure-accuracy", short, title=f"{title}, {label}", caption=title)
        block.drawings.append(paint(about, lines))
    return block
