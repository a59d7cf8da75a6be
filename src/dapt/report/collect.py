"""Run directories found under given paths, read with mistrust: they may come from anywhere.

Only what the files say counts, not how directories are named or nested. A run that cannot be
read is named in a warning and left out; no file is ever executed or unpickled.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, StringConstraints
from scipy.sparse import csr_array

from dapt.errors import UserError
from dapt.report.tables import Sample, clean, mean, runs_of
from dapt.run import records
from dapt.run.directory import RunDirectory
from dapt.run.records import Count, Environment, Record, read_record
from dapt.safe.files import read_text
from dapt.settings import FITTED

# Bytes and rows of a log, which take many times the memory that they take on disk.
_LARGEST_LOG = 2**26
_MOST_STEPS = 1_000_000


def warning(folder: Path, problem: object, consequence: str = "this run is left out") -> str:
    """A sentence on what is wrong with a run, and what the report makes of it."""
    said = str(problem)
    where = "" if str(folder) in said else f"{clean(folder, 400)}: "
    return f"{where}{clean(said, 800)}; {consequence}"


# Of one argument: early versions of pydantic would give `clean` more in place of its limit.
_CLEAN = AfterValidator(lambda text: clean(text))
_Name = Annotated[str, StringConstraints(pattern=r"\S"), _CLEAN]
_Unread = Annotated[Any, BeforeValidator(lambda _: None)]


class _Test(records.Test):
    """What one evaluation found, but for what is large and may be damaged by itself."""

    model_config = ConfigDict(extra="ignore")
    per_class: _Unread = None
    confusion: _Unread = None
    skipped: _Unread = None


class _Metrics(records.Metrics):
    method: _Name
    dataset: _Name
    test: _Test | None = None


class _Settings(Record):
    """Those that tell runs apart; the rest may be of any version."""

    method: _Name
    shots: Annotated[int, Field(ge=1, lt=2**53)]
    seed: Count
    classes: _Name = "all"


class _Task(Record):
    """Names are as they may be shown, not as a prompt needs them."""

    dataset: _Name
    class_names: list[Annotated[str, _CLEAN]]


Target = tuple[str, str]  # a dataset, and which of its classes: "all", "base" or "new"
# What is looked at of a run: a figure by name, or accuracy elsewhere, the mean over several.
Measure = str | tuple[Target, ...]


@dataclass(frozen=True)
class Run:
    """One run directory."""

    number: int  # how the report refers to it, counted from 1
    path: Path
    settings: dict[str, Any]
    environment: Environment
    failure: str | None  # why an experiment gave it up, or its evaluations elsewhere
    metrics: _Metrics | None  # of a finished run
    evaluations: dict[Target, Sample]  # accuracy elsewhere
    method: str
    shots: int
    seed: int
    classes: str
    dataset: str
    class_names: list[str]

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return self.metrics is not None

    @property
    def untested(self) -> bool:
        """Whether it is a classifier that was fitted and saved in Python, without a test."""
        return not self.finished and self.settings.get("dataset") == FITTED

    @property
    def place(self) -> tuple[str, str, str, int, int]:
        """What it has in common with repeats of it, and with runs at other settings."""
        return self.dataset, self.classes, self.method, self.shots, self.seed

    @cached_property
    def figures(self) -> dict[str, Sample]:
        """Of a finished run, by name; of base, new and all classes where it was evaluated."""
        if self.metrics is None:
            return {}
        values: dict[str, Any] = dict(self.metrics.test or {})
        values["learned"] = self.metrics.learned_parameters
        made = self.environment
        values |= {"tuning": made.tuning_seconds, "step": made.step_seconds,
                   "predict": made.predict_seconds, "peak": made.peak_bytes}  # fmt: skip
        if (told := self.metrics.forecast) is not None:
            values |= {"expected": told.accuracy, "from": told.low, "to": told.high}
        for kind, change in self.metrics.dispersion.items():
            values |= {f"{kind} before": change.before, f"{kind} after": change.after}
        found = {name: Sample(x, (self.number,)) for name, x in values.items() if x is not None}
        base = found.get("accuracy")
        if base and self.classes == "base":
            every = self.evaluations.get((self.dataset, "all"))
            found |= {"base": base, "all": every} if every else {}
        if base and (new := self.evaluations.get((self.dataset, "new"))):
            total = base.value + new.value
            harmonic = 2 * base.value * new.value / total if total else 0.0
            found |= {"base": base, "new": new, "harmonic": Sample(harmonic, runs_of((base, new)))}
        return found

    def look(self, measure: Measure) -> Sample | None:
        """A measure, if it is known; a mean only if all that it is of is."""
        if isinstance(measure, str):
            return self.figures.get(measure)
        found = [self.evaluations[target] for target in measure if target in self.evaluations]
        return mean(found) if len(found) == len(measure) else None


def collect(paths: Iterable[Path]) -> tuple[list[Run], dict[Path, str], list[str]]:
    """Read every run under ``paths``, in order of path.

    Returned are the runs; the folders of failed ones, which may hold no run, and why; what was not
    read. A `UserError` says that a path does not exist, or no run directory is found.
    """
    given, runs = list(paths), list[Run]()
    failures: dict[Path, str] = {}
    warnings: list[str] = []
    for folder in dict.fromkeys(f for path in given for f in _run_folders(path)):
        try:
            (files := RunDirectory(folder)).tidy()
            if (error := files.read_failure()) is not None:
                failures[folder] = clean(error, 400)
            if error is None or files.exists:  # or else it failed before it began
                runs.append(_read_run(files, len(runs) + 1, failures.get(folder), warnings))
        except UserError as problem:
            warnings.append(warning(folder, problem))
    if not runs and not failures and not warnings:
        where = ", ".join(map(str, given)) or "no path"
        raise UserError(f"no run directory is in {where}; give folders that 'dapt train' wrote to")
    return _distinct_datasets(runs), failures, warnings


def _run_folders(path: Path) -> Iterator[Path]:
    """Directories that hold a run, sorted; links to directories are not followed."""
    if not path.is_dir():
        raise UserError(f"{path} is no folder; give run directories, or folders of them")
    # Other programs write a settings.json too.
    others = {"task.json", "environment.json", "support_set.json"}
    for folder, inner, files in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        begun = "settings.json" in files and others & set(files)
        if begun or {"metrics.json", "failure.json"} & set(files):
            yield Path(os.path.normpath(folder))


def _read_run(files: RunDirectory, number: int, failure: str | None, warnings: list[str]) -> Run:
    settings = read_record(files.settings_file, _Settings, "settings")
    task = read_record(files.task_file, _Task, "task")
    try:
        environment = files.read_environment()
    except UserError as error:
        environment = Environment.model_validate({})
        warnings.append(warning(files.path, error, "shown without it"))
    known = {name: getattr(r, name) for r in (settings, task) for name in type(r).model_fields}
    metrics, evaluations = None, {}
    if files.finished:
        metrics = read_record(files.metrics_file, _Metrics, "metrics")
        for name in {"method", "shots", "seed"} & metrics.model_fields_set:
            if (said := getattr(metrics, name)) != known[name]:
                raise UserError(f"metrics.json says {name} {said}, settings.json {known[name]}")
        known["dataset"] = metrics.dataset
        evaluations = _evaluations(files, number, warnings)
    kept = (dict(settings), environment, failure, metrics, evaluations)
    return Run(number, files.path, *kept, **known)


def _evaluations(files: RunDirectory, number: int, warnings: list[str]) -> dict[Target, Sample]:
    found: dict[Target, Sample] = {}
    for file, read in files.evaluations():
        if isinstance(read, UserError):
            warnings.append(warning(files.path, read, "this evaluation is left out"))
            continue
        dataset, sample = clean(read.dataset), Sample(read.test.accuracy, (number,))
        if found.setdefault((dataset, clean(read.classes or "all")), sample) != sample:
            same = f"{file.name} and an earlier file evaluate the same ({dataset})"
            problem = f"{same} with other results"
            warnings.append(warning(files.path, problem, "the earlier one is shown"))
    return found


def _distinct_datasets(runs: Iterable[Run]) -> list[Run]:
    """Datasets of one name but other classes get a number behind their name.

    What a run says of its own dataset's other classes and domains keeps belonging to it.
    """
    seen: dict[Target, list[list[str]]] = defaultdict(list)
    distinct = []
    for run in runs:
        known = seen[run.dataset, run.classes]
        if run.class_names not in known:
            known.append(run.class_names)
        if place := known.index(run.class_names):
            old, new = run.dataset, f"{run.dataset} ({place + 1})"
            evaluations = {
                (f"{new}{d[len(old) :]}" if f"{d}:".startswith(f"{old}:") else d, classes): sample
                for (d, classes), sample in run.evaluations.items()
            }
            run = replace(run, dataset=new, evaluations=evaluations)
        distinct.append(run)
    return distinct


class ConfusionMatrix(NamedTuple):
    """Test images by true and named class."""

    class_names: list[str]  # C in label order
    counts: csr_array  # (C, C) true (rows) and named (columns), mostly zeros
    images: np.ndarray  # (C,) of each class
    right: np.ndarray  # (C,) of these, named right

    def hardest(self) -> list[int]:
        """Classes with misnamed images, by the share that was named right, then by label."""
        missed = np.flatnonzero(self.right < self.images)
        return missed[np.argsort(self.right[missed] / self.images[missed], kind="stable")].tolist()

    def mistakes(self) -> list[tuple[int, int, int]]:
        """(true class, named class, images) of what is wrong, the most frequent first."""
        cells = self.counts.tocoo()
        found = zip(cells.row.tolist(), cells.col.tolist(), cells.data.tolist(), strict=True)
        return sorted((c for c in found if c[0] != c[1]), key=lambda c: (-c[2], *c[:2]))


def read_confusion(run: Run) -> ConfusionMatrix:
    """The confusion matrix of a finished run, which is too large to keep for each.

    A `UserError` says that it is missing, not square, or no matrix of counts.
    """
    test = RunDirectory(run.path).read_metrics().test
    scores = test.per_class if test else []
    names = [clean(score.name.replace("_", " ")) for score in scores]
    try:
        if not names or test is None or (entries := test.confusion) is None:
            raise ValueError("it has no classes, or no such entry")
        columns = (entries.true, entries.predicted, entries.images)
        true, named, images = (np.array(column, np.int64) for column in columns)
        # What is no label of these classes is refused here.
        counts = csr_array((images, (true, named)), shape=(len(names),) * 2)
    except ValueError as error:
        raise UserError(f"metrics.json holds no confusion matrix ({error})") from error
    return ConfusionMatrix(names, counts, np.asarray(counts.sum(axis=1)), counts.diagonal())


def read_log(run: Run) -> dict[str, np.ndarray]:
    """Mean of each loss term by epoch: name -> (epochs,); empty where there is no log.

    A `UserError` says that log.csv has no such columns, or other than finite numbers.
    """
    file = RunDirectory(run.path).log_file
    try:
        header, _, rows = read_text(file, limit=_LARGEST_LOG).partition("\n")
        if rows.count("\n") > _MOST_STEPS:
            raise UserError(f"log.csv has more than {_MOST_STEPS:,} steps")
        if not rows.strip():
            return {}
        lines = rows.splitlines()[:_MOST_STEPS]
        values = np.loadtxt(lines, delimiter=",", comments=None, ndmin=2)
        names = header.strip().split(",")
        if values.shape[1] != len(names) or not np.isfinite(values).all():
            raise ValueError("it holds something else than finite numbers")
        epochs = values[:, names.index("epoch")]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"log.csv is no table of numbers by epoch ({error})") from error
    _, index, counts = np.unique(epochs, return_inverse=True, return_counts=True)
    return {
        clean(name): np.bincount(index, values[:, column]) / counts
        for column, name in enumerate(names)
        if name not in ("step", "epoch", "lr", "loss", "accuracy")
    }
