"""Runs put in order: which are repeats of one another by seed, and which vary a setting.

Two runs of one dataset, method, number of shots and seed that differ can only differ in other
settings. Those settings are what the study *varies*; runs are then told apart by their values,
everywhere. Each method's most frequent values make its main runs, which the comparison of
methods is made of; the rest are ablations.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dapt.errors import UserError, nearest
from dapt.methods import METHODS
from dapt.report.collect import Run, clean, seconds
from dapt.report.statistics import harmonic_mean
from dapt.run.train import FREE_ON_RESUME
from dapt.settings import Settings, default_settings

ZERO_SHOT = "zero-shot"

# What identifies a run, and what decides its cost or place, not its result.
_IDENTITY = {"dataset", "domain", "class_names", "classes", "method", "shots", "seed"}
_NO_RESULT = {*FREE_ON_RESUME, "device", "root", "eval_batch_size", "text_memory"}

Variant = tuple[tuple[str, str], ...]  # (varied setting, its value as JSON), by name
_Key = tuple[str, str, str, int]  # dataset, classes, method, shots


@dataclass(frozen=True)
class Sample:
    """One number, and the runs it came from."""

    value: float
    runs: tuple[int, ...]


Samples = dict[int, Sample]  # by seed
Measure = Callable[[Run], Sample | None]  # what is looked at of a run, where the run has it


def method_title(method: str) -> str:
    """How tables call a method; one that this installation does not know keeps its name."""
    return METHODS[method].title if method in METHODS else method


class Study:
    """All runs of a report, and the numbers of its main ones.

    Args:
        runs: from `collect`.
        baseline: method that others are compared with; zero-shot or the first present, if None.

    Attributes:
        classes: what runs are of that are compared by default, "all" wherever there are such.

    Raises:
        UserError: no run is of the baseline.
    """

    def __init__(self, runs: Sequence[Run], baseline: str | None = None) -> None:
        self.runs = list(runs)
        self.warnings: list[str] = []
        finished = [run for run in runs if run.finished]
        self.varied = _varied(finished)
        self._variants = {run.number: _variant(run, self.varied) for run in finished}
        self._values = {run.number: _values(run, self.varied) for run in finished}
        self._main = self._most_frequent(finished)
        self._by_key: dict[_Key, dict[tuple[int, Variant], Run]] = defaultdict(dict)
        for run in finished:
            group = self._by_key[run.dataset, run.classes, run.method, run.shots]
            own = (run.seed, self.variant(run))
            first = group.setdefault(own, run)
            if first is run:
                continue
            if run.scores == first.scores:
                # One run that several suites share, each with evaluations of its own.
                known = {(e.dataset, e.classes) for e in first.evaluations}
                more = (e for e in run.evaluations if (e.dataset, e.classes) not in known)
                group[own] = replace(first, evaluations=(*first.evaluations, *more))
            else:
                self.warnings.append(
                    f"run {run.number} ({clean(run.path, 400)}) repeats run {first.number} at the "
                    f"same settings with another result; only run {first.number} is counted"
                )
        present = {run.classes for run in finished}
        # Fewer classes are another, easier task: they stand in only where there is no other.
        self.classes = next((c for c in ("all", "base", "new") if c in present), "all")
        whole = [run for run in finished if run.classes == self.classes]
        self.warnings += _unlike(whole, self.varied)
        self.methods = _in_order({run.method for run in finished})
        self.datasets = sorted({run.dataset for run in whole})
        self.shots = sorted({run.shots for run in whole})
        if baseline is not None and finished and baseline not in self.methods:
            raise UserError(
                f"--baseline {baseline}: no finished run is of this method"
                f"{nearest(baseline, self.methods)}; use one of {', '.join(self.methods)}"
            )
        usual = ZERO_SHOT if ZERO_SHOT in self.methods else next(iter(self.methods), ZERO_SHOT)
        self.baseline = baseline or usual

    def label(self, dataset: str) -> str:
        """A dataset's name, with the classes that are compared where they are not all."""
        return dataset if self.classes == "all" else f"{dataset} ({self.classes} classes)"

    def variant(self, run: Run) -> Variant:
        """Values of the varied settings of a finished run."""
        return self._variants[run.number]

    def main(self, method: str, classes: str | None = None) -> Variant | None:
        """The method's main variant on the compared classes, or on others; None without runs."""
        return self._main.get((method, classes or self.classes))

    def changed(self, method: str, **values: object) -> Variant | None:
        """The method's main variant with other values; None where these were not varied."""
        main = self.main(method)
        if main is None or not values.keys() <= set(self.varied):
            return None
        return tuple({**dict(main), **{name: _json(v) for name, v in values.items()}}.items())

    def differing(self, run: Run) -> tuple[str, ...]:
        """Settings in which a finished run is not one of its method's main ones."""
        return self._unlike(run, self._main[run.method, run.classes])

    def _unlike(self, run: Run, variant: Variant) -> tuple[str, ...]:
        """Settings whose values are not the variant's.

        A default equals its value: 0.01 of a sweep is the default of one dataset, not of another.
        """
        values = zip(variant, self.variant(run), self._values[run.number], strict=True)
        return tuple(n for (n, wanted), (_, own), value in values if wanted not in (own, value))

    def _most_frequent(self, runs: Iterable[Run]) -> dict[tuple[str, str], Variant]:
        """Main variants by method and classes; of equally frequent ones that nearest to defaults.

        Runs on other classes belong to another experiment, which may have settings of its own.
        """
        counts: dict[tuple[str, str], Counter[Variant]] = defaultdict(Counter)
        for run in runs:
            counts[run.method, run.classes][self.variant(run)] += 1
        return {
            key: min(
                found,
                key=lambda v: (-found[v], sum(value != _DEFAULT for _, value in v), v),
            )
            for key, found in counts.items()
        }

    # ----------------------------------------------------------------------------- runs

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
        if variant is None:
            variant = self.main(method, classes) or ()
        runs = self._by_key.get((dataset, classes or self.classes, method, shots), {})
        return {seed: run for (seed, _), run in runs.items() if not self._unlike(run, variant)}

    def groups(self, classes: str) -> list[tuple[str, str, int, dict[int, Run]]]:
        """Main runs as (dataset, method, shots, runs by seed), in the order of tables."""
        found = [
            (dataset, method, shots, runs)
            for dataset, c, method, shots in self._by_key
            if c == classes and (runs := self.group(dataset, method, shots, classes=c))
        ]
        return sorted(found, key=lambda g: (g[0], g[2], self.methods.index(g[1])))

    def main_runs(self, dataset: str, method: str, classes: str | None = None) -> list[Run]:
        """The method's main runs on a dataset: those with most shots first, then by seed."""
        classes = classes or self.classes
        shots = (k for d, c, m, k in self._by_key if (d, c, m) == (dataset, classes, method))
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
        dataset: str,
        method: str,
        shots: int,
        measure: Measure,
        seeds: Sequence[int] | None = None,
        *,
        classes: str | None = None,
        variant: Variant | None = None,
    ) -> Samples:
        """A measure by seed, of runs on the dataset: `group`'s.

        Zero-shot learns nothing and so is the same for every seed and number of shots: where
        ``seeds`` asks for one that was not run, a run of it on the dataset stands in.
        """
        runs = self.group(dataset, method, shots, classes=classes, variant=variant)
        found = {s: sample for s, run in runs.items() if (sample := measure(run)) is not None}
        if seeds is not None:
            found = {s: sample for s, sample in found.items() if s in seeds}
        if method == ZERO_SHOT and variant is None:
            others = self.main_runs(dataset, method, classes)
            stand_in = ((r.seed, sample) for r in others if (sample := measure(r)) is not None)
            if first := next(stand_in, None):
                wanted = seeds if seeds is not None else [] if found else [first[0]]
                found = {**dict.fromkeys(wanted, first[1]), **found}
        return dict(sorted(found.items()))

    def average(
        self,
        datasets: Sequence[str],
        method: str,
        shots: int,
        measure: Measure,
        seeds: Sequence[int] | None = None,
        classes: str | None = None,
    ) -> Samples:
        """Mean over ``datasets`` by seed, for the seeds that all of them have."""

        def parts(seeds: Sequence[int] | None) -> list[Samples]:
            return [
                self.samples(d, method, shots, measure, seeds, classes=classes) for d in datasets
            ]

        found = parts(seeds)
        if method == ZERO_SHOT and seeds is None:
            found = parts(sorted({seed for part in found for seed in part}))
        return mean(found)

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
        one = self.average(datasets, first, shots, measure, classes=classes)
        other = self.average(datasets, second, shots, measure, list(one), classes)
        return minus(one, other) if first == method else minus(other, one)


# ------------------------------------------------------------------------------ measures


def score(name: str) -> Measure:
    """A figure of `Scores` on the run's own test images."""

    def measure(run: Run) -> Sample | None:
        return _sample(run, getattr(run.scores, name, None))

    return measure


def spent(run: Run) -> Sample | None:
    """Seconds of tuning."""
    return _sample(run, seconds(run, "tuning_seconds"))


def learned(run: Run) -> Sample | None:
    """Number of learned parameters."""
    return _sample(run, run.parameters)


def dispersion(name: str) -> Measure:
    """Such as "inter before"."""
    return lambda run: _sample(run, run.dispersion.get(name))


def elsewhere(*targets: tuple[str, str]) -> Measure:
    """Accuracy on a (dataset, classes), or the mean over several that the run must all have."""

    def measure(run: Run) -> Sample | None:
        found = {(e.dataset, e.classes): e for e in run.evaluations}
        if not all(target in found for target in targets):
            return None
        used = [found[target] for target in targets]
        value = sum(e.scores.accuracy for e in used) / len(used)
        return Sample(value, tuple(sorted({e.run for e in used})))

    return measure


def new_classes(run: Run) -> Sample | None:
    """Accuracy on the new classes of the run's own dataset."""
    return elsewhere((run.dataset, "new"))(run)


def base_classes(run: Run) -> Sample | None:
    """Accuracy on the base classes, of a run that was evaluated on the new ones too."""
    return ACCURACY(run) if new_classes(run) else None


def base_and_new(run: Run) -> Sample | None:
    """Harmonic mean of both accuracies."""
    base, new = base_classes(run), new_classes(run)
    if base is None or new is None:
        return None
    runs = tuple(sorted({*base.runs, *new.runs}))
    return Sample(harmonic_mean(base.value, new.value), runs)


ACCURACY = score("accuracy")


def _sample(run: Run, value: float | None) -> Sample | None:
    return None if value is None else Sample(value, (run.number,))


# ------------------------------------------------------------------------------- samples


def mean(parts: Sequence[Samples]) -> Samples:
    """Mean by seed, for the seeds that all parts have."""
    if not parts:
        return {}
    return {
        seed: Sample(
            sum(part[seed].value for part in parts) / len(parts),
            tuple(sorted({n for part in parts for n in part[seed].runs})),
        )
        for seed in sorted(set.intersection(*(set(part) for part in parts)))
    }


def minus(ours: Samples, theirs: Samples) -> Samples:
    """Differences of what has the same seed."""
    return {
        seed: Sample(
            sample.value - theirs[seed].value,
            tuple(sorted({*sample.runs, *theirs[seed].runs})),
        )
        for seed, sample in ours.items()
        if seed in theirs
    }


# ------------------------------------------------------------------------ varied settings

_DEFAULT = ""  # in a variant, in place of the value


def full_settings(run: Run) -> dict[str, Any]:
    """The run's settings with defaults where it was begun before a setting existed."""
    values = {
        name: None if field.is_required() else field.default
        for name, field in Settings.model_fields.items()
    }
    return {**values, **run.settings}


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
    groups: dict[tuple[object, ...], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        groups[run.dataset, run.classes, run.method, run.shots, run.seed].append(full_settings(run))
    varied: set[str] = set()
    for (_, _, method, _, _), settings in groups.items():
        for name in {n for s in settings for n in s} - _IDENTITY - _NO_RESULT - _idle(str(method)):
            if len({_json(s.get(name)) for s in settings}) > 1:
                varied.add(name)
    return tuple(sorted(varied))


def _unlike(runs: Sequence[Run], varied: Sequence[str]) -> Iterator[str]:
    """Sentences on what methods should have in common where they are compared, and have not."""
    for name in sorted({"backbone", "precision", "epochs", "support_set"} - set(varied)):
        # Zero-shot's one run stands for all shots; epochs go by them.
        of_shots = name in ("epochs", "support_set")
        found: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
        for run in runs:
            if name in _idle(run.method) or (run.method == ZERO_SHOT and name == "support_set"):
                continue
            value = full_settings(run).get(name)
            own = run.environment.get("backbone_sha256") if name == "backbone" else None
            group = found[run.dataset, run.shots if of_shots else 0]
            group.setdefault(_json(own or value), f"{method_title(run.method)} {shown(value)}")
        for dataset in sorted({dataset for (dataset, _), group in found.items() if len(group) > 1}):
            apart = next(g for (d, _), g in found.items() if d == dataset and len(g) > 1)
            yield (
                f"{dataset}: methods differ in {name} ({', '.join(apart.values())}), so their "
                "differences are not the methods' alone"
            )


_TEXT = {"text_vectors", "text_init"}
_VISUAL = {"visual_vectors", "visual_dropout"}
_WEIGHTS = {"beta_visual", "beta_text"}
_TUNING = {"epochs", "lr", "momentum", "weight_decay", "batch_size", "crop_min", "rbf_t"}


def _idle(method: str) -> set[str]:
    """Settings of what a method does not learn, which cannot change its result."""
    row = METHODS.get(method)
    if row is None:
        return set()
    if not row.learns_prompts:
        return _TEXT | _VISUAL | _WEIGHTS | _TUNING
    idle = _WEIGHTS - set(map(str, row.terms.values()))
    return idle | (set() if row.text else _TEXT) | (set() if row.visual else _VISUAL)


def _variant(run: Run, varied: Sequence[str]) -> Variant:
    """Varied settings with their values; a default depends on dataset and shots, and is one.

    So is any value of a setting that does not touch the method.
    """
    if not varied:
        return ()
    settings = full_settings(run)
    defaults = {
        name: field.default
        for name, field in Settings.model_fields.items()
        if not field.is_required()
    } | default_settings({"dataset": str(settings["dataset"]), "shots": run.shots})
    idle = _idle(run.method)

    def default(name: str) -> str | None:
        return _json(defaults[name]) if name in defaults else None

    values = zip(varied, _values(run, varied), strict=True)
    return tuple(
        (name, _DEFAULT if name in idle or value == default(name) else value)
        for name, value in values
    )


def _values(run: Run, varied: Sequence[str]) -> tuple[str, ...]:
    """Values of the varied settings, defaults too."""
    settings = full_settings(run)
    return tuple(_json(settings.get(name)) for name in varied)


def _in_order(methods: set[str]) -> list[str]:
    """Methods in the order of their table, unknown ones after them by name."""
    known = list(METHODS)
    return sorted(methods, key=lambda m: (known.index(m) if m in known else len(known), m))
