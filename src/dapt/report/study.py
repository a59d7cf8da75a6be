"""Runs put in order: which are repeats of one another by seed, and which vary a setting.

Two runs of one dataset, method, number of shots and seed that differ can only differ in other
settings. Those settings are what the study *varies*; runs are then told apart by their values,
everywhere. Each method's most frequent values make its main runs, which the comparison of
methods is made of; the rest are ablations.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dapt.errors import UserError, nearest
from dapt.methods import METHODS
from dapt.report.collect import Run, Scores, clean
from dapt.settings import Settings, default_settings
from dapt.train import FREE_ON_RESUME

ZERO_SHOT = "zero-shot"

# What identifies a run, and what decides its cost or place, not its result.
_IDENTITY = {"dataset", "domain", "class_names", "classes", "method", "shots", "seed"}
_NO_RESULT = {*FREE_ON_RESUME, "device", "root", "eval_batch_size", "text_memory"}

Variant = tuple[tuple[str, str], ...]  # (varied setting, its value as JSON), by name


@dataclass(frozen=True)
class Sample:
    """One number, and the runs it came from."""

    value: float
    runs: tuple[int, ...]


Samples = dict[int, Sample]  # by seed


def method_title(method: str) -> str:
    """How tables call a method; one that this installation does not know keeps its name."""
    return METHODS[method].title if method in METHODS else method


class Study:
    """All runs of a report, and the numbers of its main ones.

    Args:
        runs: from `collect`.
        baseline: method that others are compared with; zero-shot or the first present, if None.

    Raises:
        UserError: no run is of the baseline.
    """

    def __init__(self, runs: Sequence[Run], baseline: str | None = None) -> None:
        self.runs = list(runs)
        self.warnings: list[str] = []
        finished = [run for run in runs if run.finished]
        self.varied = _varied(finished)
        self._variants = {run.number: _variant(run, self.varied) for run in finished}
        self.main_variant = self._most_frequent(finished)
        self._by_key: dict[tuple[str, str, str, int, Variant], dict[int, Run]] = defaultdict(dict)
        for run in finished:
            key = (run.dataset, run.classes, run.method, run.shots, self.variant(run))
            first = self._by_key[key].setdefault(run.seed, run)
            if first is run:
                continue
            if run.scores == first.scores:
                # One run that several suites share, each with evaluations of its own.
                known = {(e.dataset, e.classes) for e in first.evaluations}
                more = (e for e in run.evaluations if (e.dataset, e.classes) not in known)
                both = replace(first, evaluations=(*first.evaluations, *more))
                self._by_key[key][run.seed] = both
            else:
                self.warnings.append(
                    f"run {run.number} ({clean(run.path, 400)}) repeats run {first.number} at the "
                    "same settings with another result; only the latter is counted"
                )
        whole = [run for run in finished if run.classes == "all"] or finished
        self.methods = _in_order({run.method for run in finished})
        self.datasets = sorted({run.dataset for run in whole})
        self.shots = sorted({run.shots for run in whole})
        self.seeds = sorted({run.seed for run in finished})
        if baseline is not None and finished and baseline not in self.methods:
            raise UserError(
                f"--baseline {baseline}: no finished run is of this method"
                f"{nearest(baseline, self.methods)}; use one of {', '.join(self.methods)}"
            )
        usual = ZERO_SHOT if ZERO_SHOT in self.methods else next(iter(self.methods), ZERO_SHOT)
        self.baseline = baseline or usual

    def variant(self, run: Run) -> Variant:
        """Values of the varied settings of a finished run."""
        return self._variants[run.number]

    def _most_frequent(self, runs: Iterable[Run]) -> dict[str, Variant]:
        """Each method's main variant; of equally frequent ones that nearest to the defaults."""
        counts: dict[str, Counter[Variant]] = defaultdict(Counter)
        for run in runs:
            counts[run.method][self.variant(run)] += 1
        return {
            method: min(
                found,
                key=lambda v: (-found[v], sum(value != _DEFAULT for _, value in v), v),
            )
            for method, found in counts.items()
        }

    # ----------------------------------------------------------------------------- runs

    def group(
        self,
        dataset: str,
        method: str,
        shots: int,
        *,
        classes: str = "all",
        variant: Variant | None = None,
    ) -> dict[int, Run]:
        """Runs by seed, of the method's main variant if none is given."""
        if variant is None:
            variant = self.main_variant.get(method, ())
        return self._by_key.get((dataset, classes, method, shots, variant), {})

    def groups(self, classes: str = "all") -> list[tuple[str, str, int, dict[int, Run]]]:
        """Main runs as (dataset, method, shots, runs by seed), in the order of tables."""
        found = [
            (dataset, method, shots, runs)
            for (dataset, c, method, shots, variant), runs in self._by_key.items()
            if c == classes and variant == self.main_variant[method]
        ]
        return sorted(found, key=lambda g: (g[0], g[2], self.methods.index(g[1])))

    def representative(self, dataset: str, method: str) -> Run | None:
        """The main run with the most shots and, of these, the lowest seed."""
        for shots in reversed(self.shots):
            if runs := self.group(dataset, method, shots):
                return runs[min(runs)]
        return None

    def best_represented_shots(self, datasets: Sequence[str]) -> int:
        """The number of shots that most methods have runs of; of equals, the largest."""
        methods = {
            shots: sum(any(self.group(d, m, shots) for d in datasets) for m in self.methods)
            for shots in self.shots
        }
        return max(methods, key=lambda shots: (methods[shots], shots))

    # -------------------------------------------------------------------------- numbers

    def samples(
        self, dataset: str, method: str, shots: int, key: str, seeds: Sequence[int] | None = None
    ) -> Samples:
        """A figure of `Scores` by seed, of main runs on the dataset itself.

        Zero-shot learns nothing and so is the same for every seed and number of shots: where
        ``seeds`` asks for one that was not run, a run of it on the dataset stands in.
        """
        runs = dict(self.group(dataset, method, shots))
        if method == ZERO_SHOT:
            stand_in = self.representative(dataset, method)
            wanted = seeds if seeds is not None else [] if runs or not stand_in else [stand_in.seed]
            for seed in wanted:
                if stand_in and seed not in runs:
                    runs[seed] = stand_in
        found = {s: _sample(r, r.scores, key) for s, r in runs.items()}
        return {
            s: sample
            for s, sample in sorted(found.items())
            if sample is not None and (seeds is None or s in seeds)
        }

    def average(
        self,
        datasets: Sequence[str],
        method: str,
        shots: int,
        key: str,
        seeds: Sequence[int] | None = None,
    ) -> Samples:
        """Mean over ``datasets`` by seed, for the seeds that all of them have."""
        parts = [self.samples(d, method, shots, key, seeds) for d in datasets]
        if method == ZERO_SHOT and seeds is None:
            seeds = sorted({seed for part in parts for seed in part})
            parts = [self.samples(d, method, shots, key, seeds) for d in datasets]
        return mean(parts)

    def differences(
        self, datasets: Sequence[str], method: str, shots: int, key: str, baseline: str
    ) -> Samples:
        """``method`` minus ``baseline``, seed by seed, each averaged over ``datasets``."""
        if method == ZERO_SHOT:  # the one that stands in for any seed takes the other's
            theirs = self.average(datasets, baseline, shots, key)
            ours = self.average(datasets, method, shots, key, list(theirs))
        else:
            ours = self.average(datasets, method, shots, key)
            theirs = self.average(datasets, baseline, shots, key, list(ours))
        return minus(ours, theirs)


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


def _sample(run: Run, scores: Scores | None, key: str) -> Sample | None:
    value = getattr(scores, key, None)
    return None if value is None else Sample(value, (run.number,))


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
    return clean(value if isinstance(value, str) else json.dumps(value, default=str))


def _varied(runs: Sequence[Run]) -> tuple[str, ...]:
    """Settings that differ between runs of one dataset, method, number of shots and seed."""
    groups: dict[tuple[object, ...], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        groups[run.dataset, run.classes, run.method, run.shots, run.seed].append(full_settings(run))
    varied: set[str] = set()
    for settings in groups.values():
        for name in {n for s in settings for n in s} - _IDENTITY - _NO_RESULT:
            if len({json.dumps(s.get(name), sort_keys=True, default=str) for s in settings}) > 1:
                varied.add(name)
    return tuple(sorted(varied))


def _variant(run: Run, varied: Sequence[str]) -> Variant:
    """Varied settings with their values; a default depends on dataset and shots, and is one."""
    if not varied:
        return ()
    settings = full_settings(run)
    defaults = {
        name: field.default
        for name, field in Settings.model_fields.items()
        if not field.is_required()
    } | default_settings({"dataset": str(settings["dataset"]), "shots": run.shots})
    return tuple(
        (
            clean(name),
            _DEFAULT
            if name in defaults and settings.get(name) == defaults[name]
            else json.dumps(settings.get(name), sort_keys=True, default=str),
        )
        for name in varied
    )


def _in_order(methods: set[str]) -> list[str]:
    """Methods in the order of their table, unknown ones after them by name."""
    known = list(METHODS)
    return sorted(methods, key=lambda m: (known.index(m) if m in known else len(known), m))
