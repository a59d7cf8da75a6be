"""The parts of a report, each made of what runs there are; a part without any is left out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dapt.engine.evaluate import ECE_BINS
from dapt.progress import Reporter
from dapt.report.collect import (
    Confusion,
    Damaged,
    Run,
    clean,
    read_confusion,
    read_log,
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
from dapt.report.statistics import CONFIDENCE, Estimate
from dapt.report.study import (
    ACCURACY,
    ZERO_SHOT,
    Samples,
    Study,
    Variant,
    base_and_new,
    base_classes,
    dispersion,
    elsewhere,
    full_settings,
    learned,
    mean,
    method_title,
    minus,
    new_classes,
    score,
    shown,
    spent,
)
from dapt.report.tables import Cell, Column, Row, Table, number, single, words

# Datasets that get figures of their own; drawing takes a fifth of a second each. All have tables.
MOST_DATASETS = 12
MATRIX_CLASSES = 60  # more cannot be read; the hardest are shown
LISTED = 10  # hardest classes and most frequent confusions


# A row of an ablation: label, method, its variant, and the method whose colour it has.
_Compared = tuple[str, str, Variant, str | None]


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
                d: sum(bool(study.samples(d, m, shots, ACCURACY)) for m in study.methods)
                for d in study.datasets
            }
            names = [d for d in study.datasets if present[d] == max(present.values())]
            where = f"the mean over {len(names)} datasets"
            if len(names) == 1:
                where = study.label(names[0])
            elif study.classes != "all":
                where += f" ({study.classes} classes)"
            if len(names) < len(study.datasets):
                where += " (elsewhere some of the methods have no run at these shots)"
            lead = (
                f"Every method at {_shots(shots)}, on {where}. The difference is to "
                f"{method_title(study.baseline)}, paired by dataset and seed."
            )

            def cells(method: str) -> list[Cell]:
                accuracy, *figures = (
                    number("percent", study.average(names, method, shots, score(key)))
                    for key in ("accuracy", "top5", "macro_f1", "ece")
                )
                counts = [study.samples(d, method, shots, learned) for d in names]
                values = {sample.value for part in counts for sample in part.values()}
                seconds = number("seconds", study.average(names, method, shots, spent))
                return [
                    accuracy,
                    number("points", study.differences(names, method, shots, ACCURACY)),
                    *figures,
                    single("count", values.pop() if len(values) == 1 else None, _runs(*counts)),
                    _without_interval(seconds),
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
                                number("percent", study.samples(d, m, shots, ACCURACY))
                                for d in every
                            ),
                            number("percent", study.average(every, m, shots, ACCURACY)),
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
            label = study.label(f"Average over {len(group)} datasets" if whole else group[0])
            short = "average" if whole else group[0]

            samples = {
                (m, k): study.average(group, m, k, ACCURACY)
                for m in study.methods
                for k in study.shots
            }
            # Zero-shot would stand in for shots that no other method has.
            compared = {k for (m, k), found in samples.items() if found and m != ZERO_SHOT}
            samples = {
                (m, k): found for (m, k), found in samples.items() if k in compared or not compared
            }
            tables = self._accuracy_tables(group, samples, label, short)
            # Beside the curves there is room for so many columns.
            block = Block(label, tables=tables, beside=len(tables[0].columns) <= 4)
            if whole or group[0] in self.drawn:
                block.drawings = self._accuracy_figure(samples, label, short)
                block.runs = _runs(*samples.values())
                if sum(bool(s) for s in samples.values()) > len(study.methods):
                    block.legend = self.legend([m for (m, _), s in samples.items() if s])
            blocks.append(block)
        lead = (
            f"Mean over seeds ± half of the {100 * CONFIDENCE:g} % interval (Student's t); bands "
            "show it where there are three seeds or more. Differences are paired: the same "
            "dataset, number of shots and seed, hence the same support images. A coloured "
            "difference has an interval that excludes zero."
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
                [number("points", study.differences(group, m, k, ACCURACY)) for k in shots],
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
        tables = self._targets("domains", domains=True)
        return Section(
            "domains",
            "Domain generalisation",
            "Tuned on the source alone, evaluated on each target without further tuning.",
            [Block(tables=tables)],
            "no evaluation on another domain ('dapt eval RUN --domain …')",
        )

    def cross_dataset(self) -> Section:
        """Prompts tuned on one dataset, evaluated on others with other classes."""
        tables = self._targets("cross-dataset", domains=False)
        return Section(
            "cross-dataset",
            "Cross-dataset transfer",
            "Tuned on the source alone, evaluated on each target with classes of its own.",
            [Block(tables=tables)],
            "no evaluation on another dataset ('dapt eval RUN --dataset …')",
        )

    def _targets(self, name: str, *, domains: bool) -> list[Table]:
        """For each source and number of shots, methods by targets.

        A domain has the source's family and classes; anything else outside the source's own
        images is another dataset.
        """
        study, tables = self.study, []
        for classes in ("all", "base"):
            for dataset, shots, by_method in _sources(study, classes):
                targets = sorted(
                    {
                        (e.dataset, e.classes)
                        for runs in by_method.values()
                        for run in runs.values()
                        for e in run.evaluations
                        if e.dataset != dataset
                        and domains
                        is (_family(e.dataset) == _family(dataset) and e.classes == classes)
                    }
                )
                if targets:
                    tables.append(self._transfer(name, dataset, classes, shots, targets))
        return tables

    def _transfer(
        self, name: str, dataset: str, classes: str, shots: int, targets: list[tuple[str, str]]
    ) -> Table:
        study, rows = self.study, []
        whole = elsewhere(*targets)
        heads = [f"source: {_of(dataset, classes)}"]
        heads += [_of(_within(target, dataset), c) for target, c in targets]
        measures = [ACCURACY, *map(elsewhere, targets)]
        note = f"The difference is to {method_title(study.baseline)}, paired by seed."
        if len(targets) > 1:
            heads.append("average of targets")
            measures.append(whole)
            note = (
                "The average is of runs that were evaluated on every target. The difference is "
                f"the average's, to {method_title(study.baseline)}, paired by seed."
            )
        for method in study.methods:
            parts = [study.samples(dataset, method, shots, m, classes=classes) for m in measures]
            gap = study.differences([dataset], method, shots, whole, classes)
            cells = [*(number("percent", part) for part in parts), number("points", gap)]
            if any(parts[1:]):
                rows.append(Row(method_title(method), cells, method))
        return Table(
            self.file(name, dataset, *([] if classes == "all" else [classes]), f"{shots}-shots"),
            f"From {_of(dataset, classes)}, {_shots(shots)}",
            "method",
            [*(Column(h, better="high") for h in heads), Column("difference", "points")],
            rows,
            note if len(rows) > 1 else "",
        )

    def base_to_new(self) -> Section:
        """Prompts tuned on the base classes, evaluated on base and on new ones."""
        study = self.study
        by_shots: dict[int, list[str]] = defaultdict(list)
        for dataset, shots, by_method in _sources(study, "base"):
            if any(new_classes(run) for runs in by_method.values() for run in runs.values()):
                by_shots[shots].append(dataset)
        tables = []
        columns = [
            Column("base", better="high"),
            Column("new", better="high"),
            Column("harmonic mean", better="high"),
            Column("difference", "points"),
        ]
        for shots, datasets in sorted(by_shots.items()):
            groups = [[d] for d in datasets]
            if len(datasets) > 1:
                groups.insert(0, datasets)
            for group in groups:
                label = f"average over {len(group)} datasets" if len(group) > 1 else group[0]

                def cells(method: str, group: list[str] = group, shots: int = shots) -> list[Cell]:
                    gap = study.differences(group, method, shots, base_and_new, "base")
                    found = (
                        study.average(group, method, shots, measure, classes="base")
                        for measure in (base_classes, new_classes, base_and_new)
                    )
                    return [*(number("percent", part) for part in found), number("points", gap)]

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
            "is taken run by run, then averaged; the difference is the harmonic mean's, to "
            f"{method_title(study.baseline)}, paired by dataset and seed.",
            [Block(tables=tables)],
            "no run with classes=base that was evaluated on the new classes",
        )

    # ------------------------------------------------------------------------- ablations

    def ablations(self) -> Section:
        """Main runs beside those that differ in other settings, which are named."""
        study = self.study
        found: dict[tuple[str, tuple[str, ...], int], dict[Variant, set[str]]]
        found = defaultdict(lambda: defaultdict(set))
        for run in study.runs:
            if run.finished and run.classes == study.classes and (names := study.differing(run)):
                found[run.method, names, run.shots][study.variant(run)].add(run.dataset)
        tables = [table for shots in study.shots for table in self._parts(shots)]
        for (method, names, shots), variants in sorted(
            found.items(), key=lambda g: (study.methods.index(g[0][0]), g[0][1:])
        ):
            tables.append(self._ablation(method, names, shots, variants))
        lead = "What each part of a method does. "
        if study.varied:
            lead += (
                "Some runs share dataset, method, shots and seed with others and differ in "
                f"{', '.join(map(clean, study.varied))}. Each method's most frequent values are "
                "its main ones, used in all other parts of the report. "
            )
        return Section(
            "ablations",
            "Ablations",
            f"{lead}Differences are paired by dataset and seed.",
            [Block(tables=tables)],
            "no runs that differ in a setting other than dataset, method, shots and seed",
        )

    def _parts(self, shots: int) -> list[Table]:
        """DAPT's losses and prompts on and off, where any runs have some of them off."""
        study = self.study
        main = study.main
        losses = [
            ("none (VLPT)", "vlpt", main("vlpt")),
            ("inter-dispersion only", "dapt", study.changed("dapt", beta_visual=0)),
            ("intra-dispersion only", "dapt", study.changed("dapt", beta_text=0)),
            ("both (DAPT)", "dapt", main("dapt")),
        ]
        prompts = [
            ("text prompt only, inter-dispersion", "dapt-text", main("dapt-text")),
            ("visual prompt only, intra-dispersion", "dapt-visual", main("dapt-visual")),
            ("both (DAPT)", "dapt", main("dapt")),
        ]
        tables = []
        for what, columns, reference in (("losses", losses, 0), ("prompts", prompts, 2)):
            rows = [
                (label, method, variant, method if variant == main(method) else None)
                for label, method, variant in columns
                if variant is not None
            ]
            to = columns[reference][0]
            made = self._compared(
                self.file("ablation", what, f"{shots}-shots"),
                f"{what.capitalize()} on and off, {_shots(shots)}",
                what,
                shots,
                study.datasets,
                rows,
                next((i for i, row in enumerate(rows) if row[0] == to), None),
                f"The difference is to {to}.",
            )
            if {row.label for row in made.rows} - {"none (VLPT)", "both (DAPT)"}:
                tables.append(made)
        return tables

    def _ablation(
        self, method: str, names: tuple[str, ...], shots: int, variants: dict[Variant, set[str]]
    ) -> Table:
        """Values of some settings; a dataset whose main runs have a row's value stands in it."""
        study = self.study
        datasets = sorted(set().union(*variants.values()))
        main = study.main(method) or ()
        rows: list[tuple[list[tuple[int, float, str]], _Compared]] = []
        for variant in (main, *variants):
            groups = (study.group(d, method, shots, variant=variant) for d in datasets)
            settings = [full_settings(run) for group in groups for run in group.values()]
            if not settings:
                continue
            values = [shown(settings[0].get(name)) for name in names]
            label = " · ".join(f"{clean(n)} = {v}" for n, v in zip(names, values, strict=True))
            # A default that depends on the dataset has no one value.
            if len({shown([s.get(n) for n in names]) for s in settings}) > 1:
                label = " · ".join(f"{clean(n)} by default" for n in names)
            colour = None
            if variant == main:
                label, colour = f"{label} (main)", method
            rows.append(([_order(v) for v in values], (label, method, variant, colour)))
        ordered = [row for _, row in sorted(rows, key=lambda r: r[0])]
        return self._compared(
            self.file("ablation", method, *names, f"{shots}-shots"),
            f"{method_title(method)}, {_shots(shots)}: {', '.join(map(clean, names))}",
            "setting",
            shots,
            datasets,
            ordered,
            next((i for i, row in enumerate(ordered) if row[2] == main), None),
        )

    def _compared(
        self,
        name: str,
        title: str,
        corner: str,
        shots: int,
        datasets: Sequence[str],
        rows: Sequence[_Compared],
        reference: int | None,
        note: str = "",
    ) -> Table:
        """Accuracy by dataset, and the difference to the row of number ``reference``."""
        parts = [
            {d: self.study.samples(d, m, shots, ACCURACY, variant=v) for d in datasets}
            for _, m, v, _ in rows
        ]
        datasets = [d for d in datasets if any(part[d] for part in parts)]
        several = len(datasets) > 1
        made = []
        for i, (own, (label, _, _, colour)) in enumerate(zip(parts, rows, strict=True)):
            gap: Samples = {}
            if reference is not None and i != reference:
                other = parts[reference]
                shared = [d for d in datasets if own[d] and other[d]]
                gap = minus(mean([own[d] for d in shared]), mean([other[d] for d in shared]))
            cells = [number("percent", own[d]) for d in datasets]
            if several:
                cells.append(number("percent", mean([own[d] for d in datasets])))
            made.append(Row(label, [*cells, number("points", gap)], colour))
        heads = [*map(self.study.label, datasets), *(["average"] if several else [])]
        columns = [*(Column(h, better="high") for h in heads), Column("difference", "points")]
        return Table(name, title, corner, columns, made, note)

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
                    f"{_term(term)} by epoch, {study.label(dataset)}, {_shots(shots)}",
                    _term(term),
                    curves,
                    _term(term).capitalize(),
                )
                for term, curves in list(by_term.items())[:8]
            ]
            blocks.append(
                Block(
                    f"{study.label(dataset)}, {_shots(shots)}",
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
            parts = {
                (m, head): study.samples(dataset, m, shots, dispersion(head))
                for m in study.methods
                for head in _DISPERSIONS
            }
            label = study.label(dataset)
            table = self.by_method(
                self.file("dispersion", dataset),
                f"Dispersion, {label}, {_shots(shots)}",
                [Column(head, "number", better) for head, better in _DISPERSIONS.items()],
                lambda m, parts=parts: [  # type: ignore[misc]
                    number("number", parts[m, head]) for head in _DISPERSIONS
                ],
                caption="Dispersion",
            )
            block = Block(f"{label}, {_shots(shots)}", tables=[table])
            if table and dataset in self.drawn:
                for kind in ("inter", "intra"):
                    changes = []
                    for method in study.methods:
                        ends = [parts[method, f"{kind} {time}"] for time in ("before", "after")]
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
                            f"{kind.capitalize()}-dispersion before and after, {label}",
                            f"{kind}-dispersion",
                            changes,
                            f"{kind.capitalize()}-dispersion, before (hollow) and after tuning",
                        )
                    )
                block.runs = _runs(*parts.values())
            blocks.append(block)
            pairs = [(i, pair) for i in self.inside if i.run.dataset == dataset for pair in i.maps]
            blocks.append(
                Block(
                    f"Feature maps, {label}",
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
                if (cell := number("percent", self.study.samples(dataset, m, shots, ACCURACY)))
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
            what = (
                f"{self.study.label(dataset)}: {method_title(run.method)}, {_shots(run.shots)}, "
                f"seed {run.seed}"
            )
            kept = _most_missed(confusion)
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
                        confusion.shares(kept),
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
        names, images, right = confusion.class_names, confusion.images, confusion.right
        source = (run.number,)
        wrong = confusion.mistakes()
        taken: dict[int, tuple[int, int]] = {}
        for true, named, count in wrong:
            taken.setdefault(true, (named, count))
        rows = [
            Row(
                names[c],
                [
                    single("percent", right[c] / images[c], source),
                    single("count", images[c], source),
                    words(f"{names[taken[c][0]]} ({taken[c][1]})", source),
                ],
            )
            for c in confusion.hardest()[:LISTED]
        ]
        columns = [
            Column("accuracy"),
            Column("images", "count"),
            Column("mostly taken for", "text"),
        ]
        hardest = Table(
            self.file("hardest", dataset),
            f"Hardest classes, {self.study.label(dataset)}",
            "class",
            columns,
            rows,
            caption="Hardest classes",
        )
        confused = Table(
            self.file("confused", dataset),
            f"Most frequent confusions, {self.study.label(dataset)}",
            "true class",
            [Column("named", "text"), Column("images", "count"), Column("of class", "percent")],
            [
                Row(
                    names[true],
                    [
                        words(names[named], source),
                        single("count", count, source),
                        single("percent", count / images[true], source),
                    ],
                )
                for true, named, count in wrong[:LISTED]
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
                f"ECE, {study.label(dataset)}",
                [Column(_shots(k), better="low") for k in study.shots],
                lambda m, d=dataset: [  # type: ignore[misc]
                    number("percent", study.samples(d, m, k, score("ece"))) for k in study.shots
                ],
                caption="ECE",
            )
            blocks.append(Block(study.label(dataset), tables=[table]))
            looked = [i for i in self.inside if i.run.dataset == dataset and i.reliability]
            drawings = [i.reliability for i in looked if i.reliability]
            blocks.append(
                Block(
                    f"Reliability, {study.label(dataset)}",
                    "Accuracy by confidence; below the dashed line it is too sure of itself. The "
                    "more solid a bar, the more images it stands for.",
                    drawings,
                    size="small",
                    runs=tuple(i.run.number for i in looked),
                )
            )
        lead = (
            f"Expected calibration error: the gap between confidence and accuracy, over {ECE_BINS} "
            "bins of equal width. Lower is better."
        )
        return Section("calibration", "Calibration", lead, blocks, "no run with an ECE")


# Higher or lower is what the losses aim at; before tuning there is nothing to be best at.
_DISPERSIONS = {
    "inter before": None,
    "inter after": "high",
    "intra before": None,
    "intra after": "low",
}
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


def _of(dataset: str, classes: str) -> str:
    """A dataset with the classes meant, where they are not all."""
    return dataset if classes == "all" else f"{dataset} ({classes})"


def _sources(study: Study, classes: str) -> Iterator[tuple[str, int, dict[str, dict[int, Run]]]]:
    """Dataset, shots and main runs by method and seed; of zero-shot alone only if all are.

    Elsewhere it stands in for any number of shots.
    """
    found: dict[tuple[str, int], dict[str, dict[int, Run]]] = defaultdict(dict)
    for dataset, method, shots, runs in study.groups(classes):
        found[dataset, shots][method] = runs
    tuned = {dataset for (dataset, _), methods in found.items() if set(methods) - {ZERO_SHOT}}
    for (dataset, shots), methods in found.items():
        if set(methods) - {ZERO_SHOT} or dataset not in tuned:
            yield dataset, shots, methods


def _runs(*samples: Samples) -> tuple[int, ...]:
    """Runs that any of the samples came from."""
    return tuple(sorted({n for group in samples for s in group.values() for n in s.runs}))


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


def _most_missed(confusion: Confusion) -> list[int]:
    """Classes with the most misnamed images, as many as can be read, in label order."""
    wrong = confusion.images - confusion.right
    return sorted(np.argsort(-wrong, kind="stable")[:MATRIX_CLASSES].tolist())
