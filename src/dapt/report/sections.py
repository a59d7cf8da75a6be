"""The parts of a report, each made of what runs there are; a part without any is left out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dapt.progress import Reporter
from dapt.report.collect import (
    Confusion,
    Damaged,
    Evaluation,
    Run,
    clean,
    read_confusion,
    read_log,
    seconds,
)
from dapt.report.features import HardClass, Inside
from dapt.report.figures import (
    Change,
    Curve,
    Drawing,
    Entry,
    Series,
    accuracy_by_method,
    accuracy_over_shots,
    before_and_after,
    confusion_matrix,
    method_colour,
    training_curves,
)
from dapt.report.statistics import Estimate, harmonic_mean
from dapt.report.study import (
    ZERO_SHOT,
    Sample,
    Samples,
    Study,
    Variant,
    full_settings,
    mean,
    method_title,
    minus,
    shown,
)
from dapt.report.tables import Cell, Column, Row, Table, number, single, words

# Datasets that get figures of their own; drawing takes a fifth of a second each. All have tables.
MOST_DATASETS = 12
MATRIX_CLASSES = 60  # more cannot be read; the hardest are shown
LISTED = 10  # hardest classes and most frequent confusions


@dataclass
class Block:
    """Figures and tables that belong together.

    Attributes:
        title: its heading; none where the section's says it already.
        legend: what the colours of the figures mean.
        beside: whether figures and tables stand side by side where there is room.
        runs: what the figures are drawn from.
    """

    title: str = ""
    note: str = ""
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    legend: list[Entry] = field(default_factory=list)
    examples: list[HardClass] = field(default_factory=list)
    beside: bool = False
    size: str = ""  # of the figures: "", "small", "pairs" or "natural"
    runs: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.drawings or self.tables or self.examples)


@dataclass
class Section:
    """A part of the report; ``absent`` says what it would need, where it is empty."""

    id: str
    title: str
    lead: str
    blocks: list[Block]
    absent: str
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for block in self.blocks:
            block.tables = [table for table in block.tables if table]
        self.blocks = [block for block in self.blocks if block]


class Sections:
    """Makes the parts for one study.

    Args:
        study: the runs.
        inside: what was found with the backbone, if anything.
    """

    def __init__(self, study: Study, inside: Sequence[Inside] = ()) -> None:
        self.study = study
        self.inside = inside
        self.warnings: list[str] = []
        self.drawn = study.datasets[:MOST_DATASETS]
        self.taken: set[str] = set()

    def all(self, reporter: Reporter) -> list[Section]:
        """Every part in the page's order, empty ones too."""
        parts = (
            self.overview,
            self.accuracy,
            self.domains,
            self.base_to_new,
            self.cross_dataset,
            self.ablations,
            self.curves,
            self.dispersion,
            self.mistakes,
            self.calibration,
        )
        made = []
        with reporter.stage("drawing", len(parts)) as advance:
            for part in parts:
                made.append(part())
                advance(1)
        return made

    # -------------------------------------------------------------------------- helpers

    def file(self, *parts: object) -> str:
        """A file name of its own, of letters, digits and hyphens."""
        text = "-".join(str(part) for part in parts).lower()
        base = re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:80] or "figure"
        name, again = base, 2
        while name in self.taken:
            name, again = f"{base}-{again}", again + 1
        self.taken.add(name)
        return name

    def colour(self, method: str) -> str:
        """Name of a method's colour."""
        return method_colour(method, self.study.methods)

    def legend(self, methods: Sequence[str]) -> list[Entry]:
        """Entries of methods, in order."""
        return [Entry(self.colour(m), method_title(m)) for m in self.study.methods if m in methods]

    def by_method(
        self,
        name: str,
        title: str,
        columns: list[Column],
        cells: Callable[[str], list[Cell]],
        note: str = "",
        caption: str = "",
    ) -> Table:
        """A table with a row for each method."""
        rows = [Row(method_title(m), cells(m), m) for m in self.study.methods]
        return Table(name, title, "method", columns, rows, note, caption)

    def runs_of(self, *samples: Samples) -> tuple[int, ...]:
        """Runs that any of the samples came from."""
        return tuple(sorted({n for group in samples for s in group.values() for n in s.runs}))

    # ---------------------------------------------------------------------- comparisons

    def overview(self) -> Section:
        """All methods at the number of shots that most of them have."""
        study, tables = self.study, []
        lead = ""
        if study.datasets and any(
            study.group(d, m, k) for d in study.datasets for m in study.methods for k in study.shots
        ):
            shots = study.best_represented_shots(study.datasets)
            present = {
                d: sum(bool(study.group(d, m, shots)) for m in study.methods)
                for d in study.datasets
            }
            names = [d for d in study.datasets if present[d] == max(present.values())]
            where = names[0] if len(names) == 1 else f"the mean over {len(names)} datasets"
            if len(names) < len(study.datasets):
                where += " (elsewhere some of the methods have no run at these shots)"
            lead = (
                f"Every method at {_shots(shots)}, on {where}. The difference is to "
                f"{method_title(study.baseline)}, paired by dataset and seed."
            )

            def cells(method: str) -> list[Cell]:
                groups = [study.group(d, method, shots) for d in names]
                runs = [run for group in groups for run in group.values()]
                figures = [
                    number(kind, study.average(names, method, shots, key))
                    for key, kind in (("accuracy", "percent"),)
                ]
                gap: Samples = {}
                if method != study.baseline:
                    gap = study.differences(names, method, shots, "accuracy", study.baseline)
                rest = [
                    number("percent", study.average(names, method, shots, key))
                    for key in ("top5", "macro_f1", "ece")
                ]
                learned = {r.parameters for r in runs}
                spent = {
                    r.number: Sample(value, (r.number,))
                    for r in runs
                    if (value := seconds(r, "tuning_seconds")) is not None
                }
                count = learned.pop() if len(learned) == 1 else None
                return [
                    *figures,
                    number("points", gap),
                    *rest,
                    single("count", count, (r.number for r in runs)),
                    _without_interval(number("seconds", spent)),
                ]

            columns = [
                Column("accuracy", better="high"),
                Column("difference", "points"),
                Column("top-5", better="high"),
                Column("macro-F1", better="high"),
                Column("ECE", better="low"),
                Column("learned", "count"),
                Column("tuning", "seconds"),
            ]
            title = f"All methods at {_shots(shots)}"
            tables.append(self.by_method(self.file("overview"), title, columns, cells))
            if len(study.datasets) > 1:
                every = study.datasets
                columns = [Column(d, better="high") for d in every]
                if names == every:
                    columns.append(Column("average", better="high"))
                tables.append(
                    self.by_method(
                        self.file("overview-by-dataset"),
                        f"Accuracy by dataset at {_shots(shots)}",
                        columns,
                        lambda m: [
                            *(
                                number("percent", study.samples(d, m, shots, "accuracy"))
                                for d in every
                            ),
                            number("percent", study.average(every, m, shots, "accuracy")),
                        ][: len(columns)],
                        _AVERAGE if names == every else "",
                    )
                )
        return Section(
            "overview",
            "At a glance",
            lead,
            [Block(tables=tables)],
            "no finished run on the classes of a whole dataset",
        )

    def accuracy(self) -> Section:
        """Accuracy over shots and paired differences, on average and by dataset."""
        study, blocks = self.study, []
        names = study.datasets
        groups = [[d] for d in names]
        if len(names) > 1:
            groups.insert(0, names)
        for group in groups:
            whole = len(group) > 1
            label = f"Average over {len(group)} datasets" if whole else group[0]
            short = "average" if whole else group[0]

            samples = {
                (m, k): study.average(group, m, k, "accuracy")
                for m in study.methods
                for k in study.shots
            }
            # Zero-shot would stand in for shots that no other method has.
            compared = {k for (m, k), found in samples.items() if found and m != ZERO_SHOT}
            samples = {
                (m, k): found for (m, k), found in samples.items() if k in compared or not compared
            }
            tables = self._accuracy_tables(group, samples, label, short)
            block = Block(label, tables=tables, beside=True)
            if whole or group[0] in self.drawn:
                block.drawings = self._accuracy_figure(samples, label, short)
                block.runs = self.runs_of(*samples.values())
                if sum(bool(s) for s in samples.values()) > len(study.methods):
                    block.legend = self.legend([m for (m, _), s in samples.items() if s])
            blocks.append(block)
        lead = (
            "Mean over seeds ± half of the 95 % interval (Student's t). Bands show the same "
            "interval. Differences are paired: the same dataset, number of shots and seed, hence "
            "the same support images. A coloured difference has an interval that excludes zero."
        )
        if ZERO_SHOT in study.methods:
            lead += (
                " Zero-shot CLIP learns nothing, so one run of it stands for any shots and seed."
            )
        return Section(
            "accuracy",
            "Accuracy over shots",
            lead,
            blocks,
            "no finished run on the classes of a whole dataset",
        )

    def _accuracy_tables(
        self,
        group: Sequence[str],
        samples: dict[tuple[str, int], Samples],
        label: str,
        short: str,
    ) -> list[Table]:
        study = self.study
        shots = sorted({k for _, k in samples})
        accuracy = self.by_method(
            self.file("accuracy", short),
            f"Accuracy, {label}",
            [Column(_shots(k), better="high") for k in shots],
            lambda m: [number("percent", samples[m, k]) for k in shots],
            _AVERAGE if len(group) > 1 else "",
            "Accuracy",
        )
        baseline = method_title(study.baseline)
        rows = [
            Row(
                method_title(m),
                [
                    number("points", study.differences(group, m, k, "accuracy", study.baseline))
                    for k in shots
                ],
                m,
            )
            for m in study.methods
            if m != study.baseline
        ]
        difference = Table(
            self.file("difference", short),
            f"Difference to {baseline}, {label}",
            "method",
            [Column(_shots(k), "points") for k in shots],
            rows,
            caption=f"Difference to {baseline}",
        )
        return [accuracy, difference]

    def _accuracy_figure(
        self, samples: dict[tuple[str, int], Samples], label: str, short: str
    ) -> list[Drawing]:
        study = self.study
        series = []
        for method in study.methods:
            points: dict[int, Estimate] = {}
            for shots in sorted({k for m, k in samples if m == method}):
                cell = number("percent", samples[method, shots])
                if cell.value is not None:
                    points[shots] = Estimate(cell.value, cell.half, cell.count)
            if points:
                series.append(
                    Series(self.colour(method), method_title(method), points, method == ZERO_SHOT)
                )
        if not series:
            return []
        kinds = {k for s in series for k in s.points}
        figure = accuracy_over_shots if len(kinds) > 1 else accuracy_by_method
        what = "Accuracy over shots" if len(kinds) > 1 else f"Accuracy at {_shots(kinds.pop())}"
        return [figure(self.file("figure-accuracy", short), f"{what}, {label}", series, what)]

    # -------------------------------------------------------------------------- transfer

    def domains(self) -> Section:
        """Prompts tuned on a source domain, evaluated on others."""
        tables = self._targets("domains", same_family=True)
        return Section(
            "domains",
            "Domain generalisation",
            "Tuned on the source alone, evaluated on each target without further tuning; the "
            "average is over targets.",
            [Block(tables=tables)],
            "no evaluation on another domain ('dapt eval RUN --domain …')",
        )

    def cross_dataset(self) -> Section:
        """Prompts tuned on one dataset, evaluated on others with other classes."""
        tables = self._targets("cross-dataset", same_family=False)
        return Section(
            "cross-dataset",
            "Cross-dataset transfer",
            "Tuned on the source dataset, evaluated on others with their own classes; the average "
            "is over targets.",
            [Block(tables=tables)],
            "no evaluation on another dataset ('dapt eval RUN --dataset …')",
        )

    def _targets(self, name: str, *, same_family: bool) -> list[Table]:
        """For each source and number of shots, methods by targets."""
        groups: dict[tuple[str, int], dict[str, dict[int, Run]]] = defaultdict(dict)
        for dataset, method, shots, runs in self.study.groups():
            groups[dataset, shots][method] = runs
        tables = []
        for (dataset, shots), by_method in groups.items():

            def wanted(run: Run, evaluation: Evaluation) -> bool:
                related = _family(evaluation.dataset) == _family(run.dataset)
                other = evaluation.dataset != run.dataset and evaluation.classes == "all"
                return other and related is same_family

            found = [
                e.dataset
                for runs in by_method.values()
                for run in runs.values()
                for e in run.evaluations
                if wanted(run, e)
            ]
            targets = sorted(set(found))
            if not targets:
                continue
            rows = []
            for method in self.study.methods:
                runs = by_method.get(method, {})
                per_target = [_evaluated(runs, t, "all") for t in targets]
                if not any(per_target):
                    continue
                source = {
                    s: Sample(r.scores.accuracy, (r.number,)) for s, r in runs.items() if r.scores
                }
                cells = [number("percent", part) for part in (source, *per_target)]
                if len(targets) > 1:
                    cells.append(number("percent", mean(per_target)))
                rows.append(Row(method_title(method), cells, method))
            heads = [f"source: {dataset}", *(_within(t, dataset) for t in targets)]
            if len(targets) > 1:
                heads.append("average of targets")
            tables.append(
                Table(
                    self.file(name, dataset, f"{shots}-shots"),
                    f"From {dataset}, {_shots(shots)}",
                    "method",
                    [Column(head, better="high") for head in heads],
                    rows,
                    "The average is of runs that were evaluated on every target."
                    if len(targets) > 1
                    else "",
                )
            )
        return tables

    def base_to_new(self) -> Section:
        """Prompts tuned on the base classes, evaluated on base and on new ones."""
        study = self.study
        found: dict[tuple[int, str], dict[str, tuple[Samples, Samples, Samples]]]
        found = defaultdict(dict)
        for dataset, method, shots, runs in study.groups("base"):
            new = _evaluated(runs, dataset, "new")
            base = {
                s: Sample(r.scores.accuracy, (r.number,))
                for s, r in runs.items()
                if r.scores and s in new
            }
            both = {
                s: Sample(harmonic_mean(base[s].value, new[s].value), base[s].runs) for s in base
            }
            if both:
                found[shots, dataset][method] = (base, new, both)
        by_shots: dict[int, list[str]] = defaultdict(list)
        for shots, dataset in sorted(found):
            by_shots[shots].append(dataset)
        tables = []
        columns = [
            Column("base", better="high"),
            Column("new", better="high"),
            Column("harmonic mean", better="high"),
        ]
        for shots, datasets in by_shots.items():
            groups = [[d] for d in datasets]
            if len(datasets) > 1:
                groups.insert(0, datasets)
            for group in groups:
                label = f"average over {len(group)} datasets" if len(group) > 1 else group[0]

                def cells(method: str, group: list[str] = group, shots: int = shots) -> list[Cell]:
                    parts = [found[shots, d].get(method) for d in group]
                    if any(part is None for part in parts):
                        return [Cell("percent")] * 3
                    return [
                        number("percent", mean([part[i] for part in parts if part]))
                        for i in range(3)
                    ]

                tables.append(
                    self.by_method(
                        self.file("base-to-new", label, f"{shots}-shots"),
                        f"Base to new, {label}, {_shots(shots)}",
                        columns,
                        cells,
                    )
                )
        return Section(
            "base-to-new",
            "Base to new classes",
            "Tuned on the first half of the classes, evaluated on both halves. The harmonic mean "
            "is taken run by run, then averaged.",
            [Block(tables=tables)],
            "no run with classes=base that was evaluated on the new classes",
        )

    # ------------------------------------------------------------------------- ablations

    def ablations(self) -> Section:
        """Main runs beside those that differ in other settings, which are named."""
        study = self.study
        groups: dict[tuple[str, tuple[str, ...], int], dict[Variant, dict[str, dict[int, Run]]]]
        groups = defaultdict(lambda: defaultdict(dict))
        for run in study.runs:
            if not run.finished or run.classes != "all":
                continue
            variant, main = study.variant(run), study.main_variant[run.method]
            names = tuple(n for (n, a), (_, b) in zip(variant, main, strict=True) if a != b)
            if names:
                group = study.group(run.dataset, run.method, run.shots, variant=variant)
                groups[run.method, names, run.shots][variant][run.dataset] = group
        tables = []
        for (method, names, shots), variants in sorted(
            groups.items(), key=lambda g: (study.methods.index(g[0][0]), g[0][1:])
        ):
            tables.append(self._ablation(method, names, shots, variants))
        varied = ", ".join(study.varied)
        lead = (
            f"Runs that share dataset, method, shots and seed with others and differ in {varied}. "
            "Each method's most frequent values are its main ones, used in all other parts; the "
            "difference is to these, paired by dataset and seed."
        )
        return Section(
            "ablations",
            "Ablations",
            lead,
            [Block(tables=tables)],
            "no runs that differ in a setting other than dataset, method, shots and seed",
        )

    def _ablation(
        self,
        method: str,
        names: tuple[str, ...],
        shots: int,
        variants: dict[Variant, dict[str, dict[int, Run]]],
    ) -> Table:
        study = self.study
        datasets = sorted({d for by_dataset in variants.values() for d in by_dataset})
        main = {d: study.group(d, method, shots) for d in datasets}
        every = [(main, True), *((v, False) for v in variants.values())]
        rows: list[tuple[list[tuple[int, float, str]], Row]] = []
        for by_dataset, is_main in every:
            runs = [r for group in by_dataset.values() for r in group.values()]
            if not runs:
                continue
            parts = {d: _accuracies(by_dataset.get(d, {})) for d in datasets}
            cells = [number("percent", parts[d]) for d in datasets]
            if len(datasets) > 1:
                cells.append(number("percent", mean(list(parts.values()))))
            shared = [d for d in datasets if parts[d] and main[d]]
            gap: Samples = {}
            if shared and not is_main:
                gap = minus(
                    mean([parts[d] for d in shared]),
                    mean([_accuracies(main[d]) for d in shared]),
                )
            settings = full_settings(runs[0])
            values = [shown(settings.get(name)) for name in names]
            # A default that depends on the dataset has no one value.
            label = " · ".join(f"{n} = {v}" for n, v in zip(names, values, strict=True))
            if len({shown([full_settings(r).get(n) for n in names]) for r in runs}) > 1:
                label = " · ".join(f"{n} by default" for n in names)
            numbers = [number("points", gap)]
            rows.append(
                (
                    [_order(v) for v in values],
                    Row(
                        f"{label} (main)" if is_main else label,
                        [*cells, *numbers],
                        method if is_main else None,
                    ),
                )
            )
        heads = [*datasets, *(["average"] if len(datasets) > 1 else [])]
        title = f"{method_title(method)}, {_shots(shots)}: {', '.join(names)}"
        return Table(
            self.file("ablation", method, *names, f"{shots}-shots"),
            title,
            "setting",
            [*(Column(h, better="high") for h in heads), Column("difference", "points")],
            [row for _, row in sorted(rows, key=lambda r: r[0])],
        )

    # ------------------------------------------------------------------- inside training

    def curves(self) -> Section:
        """Every loss term by epoch, at the number of shots that most methods have."""
        study, blocks = self.study, []
        for dataset in self.drawn:
            shots = study.best_represented_shots([dataset])
            by_term: dict[str, list[Curve]] = defaultdict(list)
            numbers: list[int] = []
            methods = []
            for method in study.methods:
                logs = []
                for run in study.group(dataset, method, shots).values():
                    try:
                        if log := read_log(run):
                            logs.append(log)
                            numbers.append(run.number)
                    except Damaged as error:
                        self.warnings.append(
                            f"{clean(run.path, 400)}: {clean(error, 400)}; its curves are left out"
                        )
                if logs:
                    methods.append(method)
                for term in dict.fromkeys(name for log in logs for name in log):
                    values = _stack([log[term] for log in logs if term in log])
                    by_term[term].append(Curve(self.colour(method), method_title(method), values))
            drawings = [
                training_curves(
                    self.file("curve", term, dataset),
                    f"{_term(term)} by epoch, {dataset}, {_shots(shots)}",
                    _term(term),
                    curves,
                    _term(term).capitalize(),
                )
                for term, curves in list(by_term.items())[:8]
            ]
            blocks.append(
                Block(
                    f"{dataset}, {_shots(shots)}",
                    drawings=drawings,
                    legend=self.legend(methods),
                    runs=tuple(sorted(numbers)),
                )
            )
        lead = (
            "Mean of each loss term over an epoch's steps, before it is weighted, and over seeds; "
            "bands reach from the lowest seed to the highest."
        )
        return Section("curves", "Training curves", lead, blocks, "no run with a log.csv")

    def dispersion(self) -> Section:
        """Inter- and intra-dispersion before and after, and maps of the features themselves."""
        study, blocks = self.study, []
        for dataset in study.datasets:
            shots = study.best_represented_shots([dataset])
            groups = {m: study.group(dataset, m, shots) for m in study.methods}
            table = self._dispersion_table(dataset, shots, groups)
            block = Block(f"{dataset}, {_shots(shots)}", tables=[table])
            if table and dataset in self.drawn:
                for kind in ("inter", "intra"):
                    changes = []
                    for method, runs in groups.items():
                        ends = [
                            _dispersions(runs, f"{kind} {time}") for time in ("before", "after")
                        ]
                        if all(ends):
                            before, after = (
                                float(np.mean([s.value for s in e.values()])) for e in ends
                            )
                            changes.append(
                                Change(self.colour(method), method_title(method), before, after)
                            )
                    block.drawings.append(
                        before_and_after(
                            self.file("dispersion", kind, dataset),
                            f"{kind.capitalize()}-dispersion before and after, {dataset}",
                            f"{kind}-dispersion",
                            changes,
                            f"{kind.capitalize()}-dispersion, before (hollow) and after tuning",
                        )
                    )
                block.runs = tuple(r.number for runs in groups.values() for r in runs.values())
            blocks.append(block)
            pairs = [(i, pair) for i in self.inside if i.run.dataset == dataset for pair in i.maps]
            blocks.append(
                Block(
                    f"Feature maps, {dataset}",
                    "Before and after tuning by one t-SNE fit for each pair, so that places are "
                    "comparable within it. Classes with the most test images have colours; the "
                    "run of a method is the one with the most shots and the lowest seed.",
                    [drawing for _, pair in pairs for drawing in (pair.before, pair.after)],
                    legend=pairs[0][1].legend if pairs else [],
                    size="pairs",
                    runs=tuple(sorted({i.run.number for i, _ in pairs})),
                )
            )
        lead = (
            "Inter-dispersion is the mean distance between two classes' text features (larger is "
            "further apart), intra-dispersion the mean distance of support images to their class "
            "prototype (smaller is tighter)."
        )
        return Section(
            "dispersion",
            "Dispersion and feature maps",
            lead,
            blocks,
            "no run that learned a prompt",
        )

    def _dispersion_table(
        self, dataset: str, shots: int, groups: dict[str, dict[int, Run]]
    ) -> Table:
        heads = [f"{kind} {time}" for kind in ("inter", "intra") for time in ("before", "after")]
        better = {"inter after": "high", "intra after": "low"}

        return self.by_method(
            self.file("dispersion", dataset),
            f"Dispersion, {dataset}, {_shots(shots)}",
            [Column(head, "number", better.get(head)) for head in heads],
            lambda m: [number("number", _dispersions(groups[m], head)) for head in heads],
            caption="Dispersion",
        )

    # -------------------------------------------------------------------------- mistakes

    def featured(self) -> dict[str, Run]:
        """For each drawn dataset the run whose mistakes are shown.

        It is of the method with the highest mean accuracy at the number of shots that most
        methods have, of those that learn a prompt if there are any; its representative run.
        """
        found = {}
        for dataset in self.drawn:
            shots = self.study.best_represented_shots([dataset])
            tuned = [m for m in self.study.methods if m not in (ZERO_SHOT, "linear-probe")]
            tuned = [m for m in tuned if self.study.group(dataset, m, shots)]
            means = {
                m: cell.value
                for m in tuned or self.study.methods
                if (cell := number("percent", self.study.samples(dataset, m, shots, "accuracy")))
                and cell.value is not None
            }
            if means:
                best = max(means, key=lambda m: means[m])
                found[dataset] = self.study.representative(dataset, best)
        return {d: run for d, run in found.items() if run is not None}

    def mistakes(self) -> Section:
        """Confusion matrix, hardest classes and most frequent confusions of one run a dataset."""
        blocks = []
        for dataset, run in self.featured().items():
            try:
                confusion = read_confusion(run)
            except Damaged as error:
                self.warnings.append(
                    f"{clean(run.path, 400)}: {clean(error, 400)}; its mistakes are left out"
                )
                continue
            what = f"{dataset}: {method_title(run.method)}, {_shots(run.shots)}, seed {run.seed}"
            kept = _hardest(confusion)
            shares = confusion.counts / np.maximum(confusion.counts.sum(1, keepdims=True), 1)
            size = len(confusion.class_names)
            note = (
                f"The matrix shows the {MATRIX_CLASSES} hardest of {size} classes."
                if size > MATRIX_CLASSES
                else ""
            )
            block = Block(
                what,
                note,
                [
                    confusion_matrix(
                        self.file("confusion", dataset),
                        f"Confusion matrix, {what}",
                        [confusion.class_names[i] for i in kept],
                        shares[np.ix_(kept, kept)],
                        "Confusion matrix",
                    )
                ],
                self._mistake_tables(dataset, run, confusion),
                beside=size <= 36,
                size="natural",
                runs=(run.number,),
            )
            for inside in self.inside:
                if inside.run == run:
                    block.examples = inside.hardest
            blocks.append(block)
        lead = (
            "One run a dataset: of the prompt method with the highest accuracy, the one with most "
            "shots and the lowest seed. Rows are true classes, columns what they were named; the "
            "diagonal is what is right."
        )
        return Section(
            "mistakes",
            "Confusions and hardest classes",
            lead,
            blocks,
            "no finished run on the classes of a whole dataset",
        )

    def _mistake_tables(self, dataset: str, run: Run, confusion: Confusion) -> list[Table]:
        counts, names = confusion.counts, confusion.class_names
        source = (run.number,)
        totals, right = counts.sum(1), counts.diagonal()
        wrong = counts - np.diag(right)
        order = sorted(
            np.flatnonzero((totals > 0) & (right < totals)),
            key=lambda c: (right[c] / totals[c], c),
        )
        rows = []
        for c in order[:LISTED]:
            taken = int(wrong[c].argmax())
            rows.append(
                Row(
                    names[c],
                    [
                        single("percent", float(right[c] / totals[c]), source),
                        single("count", int(totals[c]), source),
                        words(f"{names[taken]} ({wrong[c, taken]})"),
                    ],
                )
            )
        columns = [
            Column("accuracy"),
            Column("images", "count"),
            Column("mostly taken for", "text"),
        ]
        hardest = Table(
            self.file("hardest", dataset),
            f"Hardest classes, {dataset}",
            "class",
            columns,
            rows,
            caption="Hardest classes",
        )
        flat = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
        pairs = [divmod(int(i), len(names)) for i in flat]
        confused = Table(
            self.file("confused", dataset),
            f"Most frequent confusions, {dataset}",
            "true class",
            [Column("named", "text"), Column("images", "count"), Column("of class", "percent")],
            [
                Row(
                    names[a],
                    [
                        words(names[b]),
                        single("count", int(wrong[a, b]), source),
                        single("percent", float(wrong[a, b] / totals[a]), source),
                    ],
                )
                for a, b in pairs
                if wrong[a, b]
            ],
            caption="Most frequent confusions",
        )
        return [hardest, confused]

    def calibration(self) -> Section:
        """Expected calibration error, and reliability diagrams where confidences are known."""
        study, blocks = self.study, []
        for dataset in study.datasets:
            table = self.by_method(
                self.file("ece", dataset),
                f"ECE, {dataset}",
                [Column(_shots(k), better="low") for k in study.shots],
                lambda m, d=dataset: [  # type: ignore[misc]
                    number("percent", study.samples(d, m, k, "ece")) for k in study.shots
                ],
                caption="ECE",
            )
            blocks.append(Block(dataset, tables=[table]))
            looked = [i for i in self.inside if i.run.dataset == dataset and i.reliability]
            drawings = [i.reliability for i in looked if i.reliability]
            blocks.append(
                Block(
                    f"Reliability, {dataset}",
                    "Accuracy by confidence; below the dashed line it is too sure of itself. The "
                    "more solid a bar, the more images it stands for.",
                    drawings,
                    size="small",
                    runs=tuple(i.run.number for i in looked),
                )
            )
        lead = (
            "Expected calibration error: the gap between confidence and accuracy, over 15 bins of "
            "equal width. Lower is better."
        )
        return Section("calibration", "Calibration", lead, blocks, "no run with an ECE")


_AVERAGE = "Averages are over seeds that every dataset has; a method that lacks one has none."


def _shots(shots: int) -> str:
    return f"{shots} shot" if shots == 1 else f"{shots} shots"


def _term(name: str) -> str:
    words = {"inter": "inter-dispersion", "intra": "intra-dispersion"}
    return words.get(name, name.replace("_", "-"))


def _family(dataset: str) -> str:
    """What the domains of one dataset have in common."""
    name = dataset.partition(":")[0]
    return "imagenet" if name.startswith("imagenet") else name


def _within(target: str, source: str) -> str:
    """A target's name, without the dataset's where it is the source's."""
    dataset, _, domain = target.partition(":")
    return domain if domain and dataset == source.partition(":")[0] else target


def _accuracies(runs: dict[int, Run]) -> Samples:
    return {s: Sample(r.scores.accuracy, (r.number,)) for s, r in runs.items() if r.scores}


def _dispersions(runs: dict[int, Run], key: str) -> Samples:
    return {
        s: Sample(r.dispersion[key], (r.number,)) for s, r in runs.items() if key in r.dispersion
    }


def _evaluated(runs: dict[int, Run], dataset: str, classes: str) -> Samples:
    """Accuracy of runs on another dataset, domain or set of classes, by seed."""
    return {
        seed: Sample(e.scores.accuracy, (e.run,))
        for seed, run in runs.items()
        for e in run.evaluations
        if (e.dataset, e.classes) == (dataset, classes)
    }


def _without_interval(cell: Cell) -> Cell:
    return Cell(cell.kind, cell.value, None, cell.count, runs=cell.runs)


def _order(value: str) -> tuple[int, float, str]:
    """Numbers by size, then words."""
    try:
        return 0, float(value), ""
    except ValueError:
        return 1, 0.0, value


def _stack(logs: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of different length as one array, NaN where a row has ended."""
    longest = max(map(len, logs))
    return np.stack([np.pad(log, (0, longest - len(log)), constant_values=np.nan) for log in logs])


def _hardest(confusion: Confusion) -> list[int]:
    """Classes with the most misnamed images, as many as can be read, in label order."""
    wrong = confusion.counts.sum(1) - confusion.counts.diagonal()
    return sorted(map(int, np.argsort(-wrong, kind="stable")[:MATRIX_CLASSES]))
