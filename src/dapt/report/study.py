"""Runs put in order: which are repeats of one another by seed, and which vary a setting.

Two runs of one dataset, method, number of shots and seed that differ can only differ in other
settings. Those settings are what the study *varies*; runs are then told apart by their values,
everywhere. Each method's most frequent values make its main runs, which the comparison of
methods is made of; the rest are ablations.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from dapt.errors import UserError, nearest
from dapt.methods import METHODS
from dapt.report.collect import Run, clean
from dapt.report.rows import ZERO_SHOT, idle_settings, method_title, setting_defaults
from dapt.report.statistics import Sample, Samples, harmonic_mean, mean, mean_by_seed, minus
from dapt.run.train import FREE_ON_RESUME
from dapt.settings import default_settings

# What identifies a run, and what decides its cost or place, not its result.
_IDENTITY = {"dataset", "domain", "class_names", "classes", "method", "shots", "seed"}
_NO_RESULT = {*FREE_ON_RESUME, "device", "root", "eval_batch_size", "text_memory"}
_DEFAULT = ""  # in a variant, in place of the value

Variant = tuple[tuple[str, str], ...]  # (varied setting, its value as JSON), by name
Measure = Callable[[Run], Sample | None]  # what is looked at of a run, where the run has it


class Study:
    """All runs of a report, and the numbers of its main ones.

    Args:
        runs: from `collect`.
        baseline: method that others are compared with; zero-shot or the first present, if None.

    Attributes:
        varied: settings that tell runs apart.
        classes: what runs are of that are compared by default, "all" wherever there are such.
        methods, datasets, shots: that there are finished runs of, in order.
        warnings: on what is not counted, or not alike.

    Raises:
        UserError: no run is of the baseline.
    """

    def __init__(self, runs: Sequence[Run], baseline: str | None = None) -> None:
        self.runs, finished = list(runs), [run for run in runs if run.finished]
        self.warnings: list[str] = []
        self.varied = _varied(finished)
        self._values = {run.number: _values(run, self.varied) for run in finished}
        self._main = self._most_frequent(finished)
        self._groups: dict[tuple[str, str, str, int], dict[tuple[int, Variant], Run]]
        self._groups = defaultdict(dict)
        for run in finished:
            self._add(run)
        present = {run.classes for run in finished}
        # Fewer classes are another, easier task: they stand in only where there is no other.
        self.classes = next((c for c in ("all", "base", "new") if c in present), "all")
        whole = [run for run in finished if run.classes == self.classes]
        self.warnings += _unlike(whole, self.varied)
        known = list(METHODS)
        self.methods = sorted(  # in the order of their table, unknown ones after them by name
            {run.method for run in finished},
            key=lambda m: (known.index(m) if m in known else len(known), m),
        )
        self.datasets = sorted({run.dataset for run in whole})
        self.shots = sorted({run.shots for run in whole})
        if baseline is not None and finished and baseline not in self.methods:
            raise UserError(
                f"--baseline {baseline}: no finished run is of this method"
                f"{nearest(baseline, self.methods)}; use one of {', '.join(self.methods)}"
            )
        usual = ZERO_SHOT if ZERO_SHOT in self.methods else next(iter(self.methods), ZERO_SHOT)
        self.baseline = baseline or usual

    def _add(self, run: Run) -> None:
        """To the runs of its kind, unless it repeats one."""
        group = self._groups[run.dataset, run.classes, run.method, run.shots]
        own = (run.seed, self.variant(run))
        first = group.setdefault(own, run)
        if run.scores == first.scores:
            # One run that several suites share, each with evaluations of its own.
            group[own] = replace(first, evaluations={**run.evaluations, **first.evaluations})
        else:
            problem = f"repeats run {first.number} at the same settings with another result"
            self.warnings.append(
                f"run {run.number} ({clean(run.path, 400)}) {problem}; only run {first.number} is "
                "counted"
            )

    def _most_frequent(self, runs: Sequence[Run]) -> dict[tuple[str, str], Variant]:
        """Main variants by method and classes; of equally frequent ones that nearest to defaults.

        Runs on other classes belong to another experiment, which may have settings of its own.
        """
        counts: dict[tuple[str, str], Counter[Variant]] = defaultdict(Counter)
        for run in runs:
            counts[run.method, run.classes][self.variant(run)] += 1
        return {
            key: min(found, key=lambda v: (-found[v], sum(x != _DEFAULT for _, x in v), v))
            for key, found in counts.items()
        }

    # ----------------------------------------------------------------------------- runs

    def label(self, dataset: str) -> str:
        """A dataset's name, with the classes that are compared where they are not all."""
        return dataset if self.classes == "all" else f"{dataset} ({self.classes} classes)"

    def variant(self, run: Run) -> Variant:
        """Values of the varied settings of a finished run."""
        return tuple((name, value) for name, (value, _) in self._values[run.number].items())

    def main(self, method: str, classes: str | None = None) -> Variant | None:
        """The method's main variant on the compared classes, or on others; None without runs."""
        return self._main.get((method, classes or self.classes))

    def changed(self, method: str, **values: object) -> Variant | None:
        """The method's main variant with other values; None where these were not varied."""
        main = self.main(method)
        if main is None or not values.keys() <= set(self.varied):
            return None
        return tuple({**dict(main), **{name: _json(v) for name, v in values.items()}}.items())

    def differing(self, run: Run, variant: Variant | None = None) -> tuple[str, ...]:
        """Settings in which a finished run is not of a variant: its method's main one.

        A default equals its value: 0.01 of a sweep is the default of one dataset, not of another.
        """
        if variant is None:
            variant = self._main[run.method, run.classes]
        values = self._values[run.number]
        return tuple(name for name, wanted in variant if wanted not in values[name])

    def group(
        self,
        dataset: str,
        method: str,
        shots: int,
        *,
        classes: str | None = None,
        variant: Variant | None = None,
    ) -> dict[int, Run]:
        """Runs by seed, of the compared classes and the method's main variant if none are given."""
        runs = self._groups.get((dataset, classes or self.classes, method, shots), {})
        if variant is None:
            variant = self.main(method, classes) or ()
        return {seed: run for (seed, _), run in runs.items() if not self.differing(run, variant)}

    def sources(self, classes: str) -> Iterator[tuple[str, int, list[Run]]]:
        """Dataset, shots and main runs; those of zero-shot alone only where all are.

        Elsewhere it stands in for any number of shots.
        """
        found: dict[tuple[str, int], dict[str, list[Run]]] = defaultdict(dict)
        for dataset, c, method, shots in self._groups:
            if c == classes and (runs := self.group(dataset, method, shots, classes=c)):
                found[dataset, shots][method] = list(runs.values())
        tuned = {dataset for (dataset, _), methods in found.items() if set(methods) - {ZERO_SHOT}}
        for (dataset, shots), methods in sorted(found.items(), key=lambda source: source[0]):
            if set(methods) - {ZERO_SHOT} or dataset not in tuned:
                yield dataset, shots, [run for runs in methods.values() for run in runs]

    def main_runs(self, dataset: str, method: str, classes: str | None = None) -> list[Run]:
        """The method's main runs on a dataset: those with most shots first, then by seed."""
        classes = classes or self.classes
        shots = (k for d, c, m, k in self._groups if (d, c, m) == (dataset, classes, method))
        groups = (self.group(dataset, method, k, classes=classes) for k in sorted(shots)[::-1])
        return [group[seed] for group in groups for seed in sorted(group)]

    def representative(self, dataset: str, method: str) -> Run | None:
        """The main run with the most shots and, of these, the lowest seed."""
        return next(iter(self.main_runs(dataset, method)), None)

    def best_represented_shots(self, datasets: Sequence[str]) -> int:
        """The number of shots that most methods have runs of; of equals, the largest.

        Zero-shot has none of its own.
        """
        tuned = [m for m in self.methods if m != ZERO_SHOT]
        methods = {
            shots: sum(any(self.group(d, m, shots) for d in datasets) for m in tuned)
            for shots in self.shots
        }
        return max(methods, key=lambda shots: (methods[shots], shots))

    # -------------------------------------------------------------------------- numbers

    def samples(
        self,
        datasets: Sequence[str],
        method: str,
        shots: int,
        measure: Measure,
        seeds: Sequence[int] | None = None,
        *,
        classes: str | None = None,
        variant: Variant | None = None,
    ) -> Samples:
        """Mean of a measure over ``datasets`` by seed, of `group`'s runs and seeds all have.

        Zero-shot learns nothing and so is the same for every seed and number of shots: where
        ``seeds`` asks for one that was not run, a run of it on the dataset stands in.
        """

        def of(dataset: str, seeds: Sequence[int] | None) -> Samples:
            runs = self.group(dataset, method, shots, classes=classes, variant=variant)
            found = {
                seed: sample
                for seed, run in runs.items()
                if (seeds is None or seed in seeds) and (sample := measure(run)) is not None
            }
            if method == ZERO_SHOT and variant is None:
                for run in self.main_runs(dataset, method, classes):
                    if (sample := measure(run)) is not None:
                        wanted = seeds if seeds is not None else [] if found else [run.seed]
                        return {**dict.fromkeys(wanted, sample), **found}
            return found

        parts = [of(dataset, seeds) for dataset in datasets]
        if method == ZERO_SHOT and seeds is None:
            every = {seed for part in parts for seed in part}
            parts = [of(dataset, list(every)) for dataset in datasets]
        return mean_by_seed(parts)

    def differences(
        self,
        datasets: Sequence[str],
        method: str,
        shots: int,
        measure: Measure,
        classes: str | None = None,
    ) -> Samples:
        """Method minus baseline, seed by seed, each averaged over ``datasets``; none to itself."""
        if method == self.baseline:
            return {}
        # The one that stands in for any seed takes the other's.
        first, second = method, self.baseline
        if method == ZERO_SHOT:
            first, second = second, first
        one = self.samples(datasets, first, shots, measure, classes=classes)
        other = self.samples(datasets, second, shots, measure, list(one), classes=classes)
        return minus(one, other) if first == method else minus(other, one)


# ------------------------------------------------------------------------------ measures


def of_run(figure: Callable[[Run], float | None]) -> Measure:
    """A figure of a run itself."""

    def measure(run: Run) -> Sample | None:
        value = figure(run)
        return None if value is None else Sample(value, (run.number,))

    return measure


def score(name: str) -> Measure:
    """A figure of `Scores` on the run's own test images."""
    return of_run(lambda run: getattr(run.scores, name, None))


ACCURACY = score("accuracy")
tuning_seconds = of_run(lambda run: run.environment.tuning_seconds)
learned_parameters = of_run(lambda run: run.parameters)


def dispersion(kind: str, time: str) -> Measure:
    """Such as "inter", "before"."""
    return of_run(lambda run: getattr(run.dispersion.get(kind), time, None))


def elsewhere(*targets: tuple[str, str]) -> Measure:
    """Accuracy on a (dataset, classes), or the mean over several that the run must all have."""

    def measure(run: Run) -> Sample | None:
        found = [run.evaluations[target] for target in targets if target in run.evaluations]
        return mean(found) if len(found) == len(targets) else None

    return measure


def new_classes(run: Run) -> Sample | None:
    """Accuracy on the new classes of the run's own dataset."""
    return run.evaluations.get((run.dataset, "new"))


def base_classes(run: Run) -> Sample | None:
    """Accuracy on the base classes, of a run that was evaluated on the new ones too."""
    return ACCURACY(run) if new_classes(run) else None


def base_and_new(run: Run) -> Sample | None:
    """Harmonic mean of both accuracies."""
    base, new = base_classes(run), new_classes(run)
    return harmonic_mean(base, new) if base and new else None


# ------------------------------------------------------------------------ varied settings


def full_settings(run: Run) -> dict[str, Any]:
    """The run's settings with defaults where it was begun before a setting existed."""
    return {**setting_defaults(), **run.settings}


def shown(value: object) -> str:
    """A setting's value as tables show it."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return str(value).removesuffix(".0")  # as people write it: 10
    return clean(value if isinstance(value, str) else json.dumps(value, default=str))


def _json(value: object) -> str:
    """A setting's value to compare: 0 and 0.0 are one."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        value = float(value)
    return json.dumps(value, sort_keys=True, default=str)


def _varied(runs: Sequence[Run]) -> tuple[str, ...]:
    """Settings that differ between runs of one dataset, method, number of shots and seed."""
    groups: dict[tuple[str, str, str, int, int], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        groups[run.dataset, run.classes, run.method, run.shots, run.seed].append(full_settings(run))
    varied: set[str] = set()
    for (_, _, method, _, _), settings in groups.items():
        for name in set().union(*settings) - _IDENTITY - _NO_RESULT - idle_settings(method):
            if len({_json(s.get(name)) for s in settings}) > 1:
                varied.add(name)
    return tuple(sorted(varied))


def _values(run: Run, varied: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Of varied settings the value as a variant has it, and the run's own.

    A default depends on dataset and shots, and is one; so is any value of a setting that does not
    touch the method.
    """
    settings, idle = full_settings(run), idle_settings(run.method)
    given = {"dataset": str(settings["dataset"]), "shots": run.shots}
    defaults = {**setting_defaults(), **default_settings(given)}
    found = {}
    for name in varied:
        own = _json(settings.get(name))
        usual = name in idle or (name in defaults and own == _json(defaults[name]))
        found[name] = (_DEFAULT if usual else own, own)
    return found


def _unlike(runs: Sequence[Run], varied: Sequence[str]) -> Iterator[str]:
    """Sentences on what methods should have in common where they are compared, and have not."""
    for name in sorted({"backbone", "precision", "epochs", "support_set"} - set(varied)):
        # Zero-shot's one run stands for all shots; epochs go by them.
        of_shots = name in ("epochs", "support_set")
        found: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
        for run in runs:
            if name in idle_settings(run.method) or (run.method, name) == (
                ZERO_SHOT,
                "support_set",
            ):
                continue
            value = full_settings(run).get(name)
            own = run.environment.backbone_sha256 if name == "backbone" else None
            group = found[run.dataset, run.shots if of_shots else 0]
            group.setdefault(_json(own or value), f"{method_title(run.method)} {shown(value)}")
        apart: dict[str, str] = {}
        for (dataset, _), group in found.items():
            if len(group) > 1:
                apart.setdefault(dataset, ", ".join(group.values()))
        for dataset, values in sorted(apart.items()):
            yield (
                f"{dataset}: methods differ in {name} ({values}), so their differences are not "
                "the methods' alone"
            )
