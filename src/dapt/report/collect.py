"""Run directories found under given paths, read with mistrust: they may come from anywhere.

Only what the files say counts, not how directories are named or nested. A run that cannot be
read is named in a warning and left out; no file is ever executed or unpickled.
"""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from dapt.errors import UserError
from dapt.run.directory import RunDirectory
from dapt.safe.files import read_json

# No run writes a file of this size (1,000 classes make a metrics.json of about 8 MB).
_LARGEST = 200 * 2**20
# Of a log, whose rows and cells take many times the memory that they take on disk.
_LARGEST_LOG = 2**26
_MOST_STEPS = 1_000_000
_TEXT = 120  # longest name or value shown
# What makes text after it run the other way: a name could rearrange the line it stands in.
_TURNING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Damaged(Exception):
    """A run's file does not hold what it should."""


@dataclass(frozen=True)
class Scores:
    """What one evaluation found; all but images are fractions."""

    images: int
    accuracy: float
    top5: float | None
    macro_f1: float | None
    ece: float | None


@dataclass(frozen=True)
class Evaluation:
    """A run's prompts on another dataset, domain or set of classes; ``run`` is its number."""

    dataset: str
    classes: str
    scores: Scores
    run: int


@dataclass(frozen=True)
class Run:
    """One run directory. ``number`` is how the report refers to it, counted from 1."""

    number: int
    path: Path
    method: str
    dataset: str
    classes: str  # "all", "base" or "new"
    shots: int
    seed: int
    settings: dict[str, Any]
    environment: dict[str, Any]
    class_names: tuple[str, ...]
    finished: bool = False
    scores: Scores | None = None
    evaluations: tuple[Evaluation, ...] = ()
    dispersion: dict[str, float] = field(default_factory=dict)  # "inter before", …
    parameters: int | None = None
    failure: str | None = None  # why an experiment gave it up, or its evaluations elsewhere


@dataclass(frozen=True)
class Failure:
    """A run that an experiment gave up, and why; it may have left nothing else."""

    path: Path
    error: str


def clean(value: object, limit: int = _TEXT) -> str:
    """One short printable line: no control, bidirectional or surrogate characters, nor what XML
    does not take.
    """
    text = "".join(
        "\N{REPLACEMENT CHARACTER}"
        if c in _TURNING or unicodedata.category(c) in ("Cc", "Cs") or c in "\ufffe\uffff"
        else c
        for c in str(value)[: limit + 1]
    )
    return text if len(text) <= limit else text[: limit - 1] + "…"


def collect(paths: Iterable[Path]) -> tuple[list[Run], list[Failure], list[str]]:
    """Read every run under ``paths``, in order of path.

    Returns:
        The runs, those of them and others that failed, and what could not be read.

    Raises:
        UserError: a path does not exist, or no run directory is found.
    """
    given = list(paths)
    runs: list[Run] = []
    failures: list[Failure] = []
    warnings: list[str] = []
    for folder in dict.fromkeys(f for path in given for f in _run_folders(path)):
        try:
            if (error := _failure(folder)) is not None:
                failures.append(Failure(folder, error))
                if not RunDirectory(folder).exists:  # it failed before it began
                    continue
            runs.append(_read_run(folder, len(runs) + 1, error, warnings))
        except (Damaged, UserError) as problem:
            warnings.append(f"{clean(folder, 400)}: {clean(problem, 400)}; this run is left out")
    if not runs and not failures and not warnings:
        where = ", ".join(map(str, given)) or "no path"
        raise UserError(f"no run directory is in {where}; give folders that 'dapt train' wrote to")
    return _distinct_datasets(runs), failures, warnings


def _run_folders(path: Path) -> Iterator[Path]:
    """Directories that hold a run, sorted; links to directories are not followed."""
    if not path.is_dir():
        raise UserError(f"{path} is no folder; give run directories, or folders of them")
    for folder, inner, files in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        # Other programs write a settings.json too.
        others = {"task.json", "environment.json", "metrics.json", "support_set.json"}
        begun = "settings.json" in files and others & set(files)
        if begun or "metrics.json" in files or "failure.json" in files:
            yield Path(os.path.normpath(folder))


def _failure(folder: Path) -> str | None:
    error = RunDirectory(folder).read_failure()
    return None if error is None else clean(error, 400)


def _read_run(folder: Path, number: int, failure: str | None, warnings: list[str]) -> Run:
    files = RunDirectory(folder)
    settings = _mapping(files.settings_file, "settings")
    method = _text(settings.get("method"), "settings.json: method")
    shots = _count(settings.get("shots"), "settings.json: shots", least=1)
    seed = _count(settings.get("seed"), "settings.json: seed")
    classes = _text(settings.get("classes") or "all", "settings.json: classes")
    try:
        environment = _mapping(files.environment_file, "environment")
    except (Damaged, UserError) as error:
        environment = {}
        warnings.append(f"{clean(folder, 400)}: {clean(error, 400)}; shown without it")
    task = _optional(files.task_file, "task")
    names = task.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise Damaged("task.json: class_names is no list of names")
    run = Run(
        number=number,
        path=folder,
        method=method,
        dataset=_text(task.get("dataset") or settings.get("dataset"), "dataset"),
        classes=classes,
        shots=shots,
        seed=seed,
        settings=settings,
        environment=environment,
        class_names=tuple(clean(name) for name in names),
        failure=failure,
    )
    if not files.finished:
        return run
    metrics = _mapping(files.metrics_file, "metrics")
    for name, known in (("method", method), ("shots", shots), ("seed", seed)):
        if metrics.get(name, known) not in (known, settings[name]):
            raise Damaged(f"metrics.json says {name} {clean(metrics[name])}, settings.json {known}")
    parameters = metrics.get("learned_parameters")
    return replace(
        run,
        dataset=_text(metrics.get("dataset", run.dataset), "metrics.json: dataset"),
        finished=True,
        scores=_scores(metrics.get("test"), "metrics.json"),
        evaluations=tuple(_evaluations(folder, number, warnings)),
        dispersion=_dispersion(metrics.get("dispersion")),
        parameters=None if parameters is None else _count(parameters, "learned_parameters"),
    )


def _evaluations(folder: Path, number: int, warnings: list[str]) -> Iterator[Evaluation]:
    seen: dict[tuple[str, str], Scores] = {}
    for file in sorted(folder.glob("eval-*.json")):
        try:
            value = _mapping(file, "evaluation")
            dataset = _text(value.get("dataset"), f"{file.name}: dataset")
            classes = _text(value.get("classes") or "all", f"{file.name}: classes")
            scores = _scores(value.get("test"), file.name)
        except (Damaged, UserError) as error:
            warnings.append(
                f"{clean(folder, 400)}: {clean(error, 400)}; this evaluation is left out"
            )
            continue
        key = (dataset, classes)
        if key not in seen:
            seen[key] = scores
            yield Evaluation(dataset, classes, scores, number)
        elif seen[key] != scores:
            warnings.append(
                f"{clean(folder, 400)}: {clean(file.name)} and an earlier file evaluate the same "
                f"({dataset}) with other results; the earlier one is shown"
            )


def _scores(value: object, where: str) -> Scores:
    if not isinstance(value, dict):
        raise Damaged(f"{where}: test is no mapping of figures")

    def share(name: str) -> float | None:
        return None if value.get(name) is None else _share(value[name], f"{where}: {name}")

    return Scores(
        images=_count(value.get("images"), f"{where}: images"),
        accuracy=_share(value.get("accuracy"), f"{where}: accuracy"),
        top5=share("top5"),
        macro_f1=share("macro_f1"),
        ece=share("ece"),
    )


def _dispersion(value: object) -> dict[str, float]:
    if value is None or value == {}:
        return {}
    found = {}
    try:
        for kind in ("inter", "intra"):
            for time in ("before", "after"):
                found[f"{kind} {time}"] = _number(
                    value[kind][time],  # type: ignore[index]
                    f"metrics.json: {kind}-dispersion {time}",
                )
    except (KeyError, TypeError, IndexError) as error:
        raise Damaged("metrics.json: dispersion is incomplete") from error
    return found


def _distinct_datasets(runs: list[Run]) -> list[Run]:
    """Datasets of one name but other classes get a number behind their name.

    What a run says of its own dataset's other classes and domains keeps belonging to it.
    """
    seen: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    distinct = []
    for run in runs:
        known = seen.setdefault((run.dataset, run.classes), [])
        if run.class_names not in known:
            known.append(run.class_names)
        if place := known.index(run.class_names):
            old, new = run.dataset, f"{run.dataset} ({place + 1})"
            evaluations = (
                replace(e, dataset=new + e.dataset.removeprefix(old))
                if e.dataset == old or e.dataset.startswith(f"{old}:")
                else e
                for e in run.evaluations
            )
            run = replace(run, dataset=new, evaluations=tuple(evaluations))
        distinct.append(run)
    return distinct


# ------------------------------------------------------------------ read where it is needed


@dataclass(frozen=True)
class Confusion:
    """Test images by true class (rows) and named class (columns), (C, C), mostly zeros."""

    class_names: tuple[str, ...]
    counts: csr_array

    @property
    def images(self) -> np.ndarray:
        """Test images of each class, (C,)."""
        return np.asarray(self.counts.sum(axis=1))

    @property
    def right(self) -> np.ndarray:
        """How many of them were named right, (C,)."""
        return np.asarray(self.counts.diagonal())

    def hardest(self) -> list[int]:
        """Classes with misnamed images, by the share that was named right, then by label."""
        images, right = self.images, self.right
        missed = np.flatnonzero(right < images).tolist()
        return sorted(missed, key=lambda c: (right[c] / images[c], c))

    def mistakes(self) -> list[tuple[int, int, int]]:
        """(true class, named class, images) of what is wrong, the most frequent first."""
        cells = self.counts.tocoo()
        wrong = cells.row != cells.col
        found = zip(*(a[wrong].tolist() for a in (cells.row, cells.col, cells.data)), strict=True)
        return sorted(found, key=lambda cell: (-cell[2], cell[0], cell[1]))

    def shares(self, classes: Sequence[int]) -> np.ndarray:
        """Of some classes' images the share named as each of these, (n, n)."""
        part = self.counts[classes][:, classes].toarray()
        return part / np.maximum(self.images[classes, None], 1)


def read_confusion(run: Run) -> Confusion:
    """The confusion matrix of a finished run, which is too large to keep for each.

    Raises:
        Damaged: it is missing, not square, or no matrix of counts.
    """
    try:
        test = _mapping(RunDirectory(run.path).metrics_file, "metrics")["test"]
        entries = [test["confusion"][name] for name in ("true", "predicted", "images")]
        names = [clean(entry["class"].replace("_", " ")) for entry in test["per_class"]]
        true, predicted, images = (np.array(column) for column in entries)
        if any(c.dtype.kind != "i" for c in (true, predicted, images)) or (images < 0).any():
            raise ValueError("its entries are no counts")
        # What is no label of these classes is refused here.
        counts = csr_array((images, (true, predicted)), shape=(len(names),) * 2)
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged("metrics.json holds no confusion matrix") from error
    return Confusion(tuple(names), counts)


def read_log(run: Run) -> dict[str, np.ndarray]:
    """Mean of each loss term by epoch: name -> (epochs,); empty where there is no log.

    Raises:
        Damaged: log.csv has no such columns, or anything in it is no finite number.
    """
    file = RunDirectory(run.path).log_file
    if not file.is_file() or file.stat().st_size == 0:
        return {}
    if file.stat().st_size > _LARGEST_LOG:
        raise Damaged("log.csv is too large")
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(islice(csv.reader(lines), _MOST_STEPS + 1))
        if len(rows) > _MOST_STEPS:
            raise Damaged(f"log.csv has more than {_MOST_STEPS:,} steps")
        header = rows[0]
        values = np.array(rows[1:], dtype=float)
        if len(values) == 0:
            return {}
        epochs = values[:, header.index("epoch")]
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, IndexError) as error:
        raise Damaged("log.csv is no table of numbers with a column 'epoch'") from error
    if values.shape[1] != len(header) or not np.isfinite(values).all():
        raise Damaged("log.csv holds something else than finite numbers")
    _, index, counts = np.unique(epochs, return_inverse=True, return_counts=True)
    return {
        clean(name): np.bincount(index, values[:, column]) / counts
        for column, name in enumerate(header)
        if name not in ("step", "epoch", "lr", "loss", "accuracy")
    }


def seconds(run: Run, name: str) -> float | None:
    """``tuning_seconds`` or ``evaluation_seconds`` of a run, where it says."""
    try:
        return _number(run.environment.get(name), name, least=0)
    except Damaged:
        return None


# ------------------------------------------------------------------------- single values


def _mapping(file: Path, what: str) -> dict[str, Any]:
    if file.exists() and (not file.is_file() or file.stat().st_size > _LARGEST):
        raise Damaged(f"{file.name} is no ordinary file of sensible size")
    value = read_json(file, what)
    if not isinstance(value, dict):
        raise Damaged(f"{file.name} holds no mapping")
    return value


def _optional(file: Path, what: str) -> dict[str, Any]:
    return _mapping(file, what) if file.exists() else {}


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not re.search(r"\S", value):
        raise Damaged(f"{where} is no name")
    return clean(value)


def _count(value: object, where: str, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**53:
        raise Damaged(f"{where} is {clean(value, 40)!r}, no whole number from {least} on")
    return value


def _number(value: object, where: str, least: float = -1e300) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < 1e300:
        raise Damaged(f"{where} is {clean(value, 40)!r}, no finite number in its range")
    return float(value)


def _share(value: object, where: str) -> float:
    number = _number(value, where)
    if not 0 <= number <= 1:
        raise Damaged(f"{where} is {number:g}, not between 0 and 1")
    return number
