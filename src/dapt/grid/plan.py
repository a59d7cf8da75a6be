"""From a suite to a list of runs, and what has been done of each."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from glob import escape
from itertools import product
from operator import attrgetter
from pathlib import Path

from dapt.errors import UserError
from dapt.grid.suite import Suite
from dapt.methods import get_method
from dapt.run.directory import RunDirectory
from dapt.run.train import check_output
from dapt.run.transfer import Target, recorded
from dapt.safe.files import user_path
from dapt.settings import Settings, absolute_paths, make_settings

DONE, FAILED, BEGUN, NEW = "done", "failed", "unfinished", "to do"


# What decides which backbone settings load, and which task they open.
backbone_key = attrgetter("backbone", "pretrained", "device", "precision")
task_key = attrgetter("dataset", "root", "domain", "class_names", "classes")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a grid: where it goes, its settings, and the evaluations after it.

    The path is its identity.
    """

    path: Path
    title: str = field(compare=False)
    settings: Settings = field(compare=False)
    targets: tuple[Target, ...] = field(compare=False)

    @property
    def directory(self) -> RunDirectory:
        """Its run directory."""
        return RunDirectory(self.path)

    @property
    def group(self) -> tuple[str | None, ...]:
        """Runs that are equal in this share a backbone and a task."""
        return backbone_key(self.settings) + task_key(self.settings)

    def elsewhere(self) -> list[tuple[Settings, bool]]:
        """Settings of each target, and whether its dataset is only evaluated on."""
        return [(t.settings(self.settings), t.dataset is not None) for t in self.targets]

    def twin(self) -> RunDirectory | None:
        """A finished run of the same settings that another suite left in the same results.

        Suites that tune on the same source differ in what they evaluate on alone.
        """
        dataset, _, leaf = self.path.parts[-3:]
        for path in sorted(self.path.parents[3].glob(f"*/{escape(dataset)}/*/{escape(leaf)}")):
            other = RunDirectory(path)
            if path == self.path or not (other.exists and other.finished):
                continue
            with suppress(UserError):  # written by another version
                if other.read_settings() == self.settings:
                    return other
        return None

    def state(self) -> str:
        """`DONE` with all its evaluations, given up (`FAILED`), `BEGUN` or `NEW`."""
        run = self.directory
        if run.exists and run.finished and all(recorded(run, t) for t in self.targets):
            return DONE
        if run.failure_file.is_file():
            return FAILED
        return BEGUN if run.exists else NEW


@dataclass(frozen=True)
class Plan:
    """Runs of a grid, in the order they are done; those that share the most stand together."""

    name: str
    folder: Path
    runs: tuple[PlannedRun, ...]
    same: int = 0  # runs left out, as an earlier column has the same settings


def make_plan(suite: Suite, output: Path | str) -> Plan:
    """Lay a suite out under ``output``: ``<suite>/<dataset>/<column>/<k>shots-seed<s>``.

    Zero-shot learns nothing, so one run of it stands for every number of shots and every seed.

    Raises:
        UserError: settings are impossible, two datasets share a name, or a run directory holds a
            run with other settings.
    """
    folder = user_path(output).resolve() / suite.name
    datasets: dict[str, str] = {}  # name of its folder -> dataset
    for dataset in suite.datasets:
        name = user_path(dataset).resolve().stem
        if datasets.setdefault(name, dataset) != dataset:
            raise UserError(
                f"datasets {datasets[name]} and {dataset} would share the folder {folder / name}; "
                "rename one"
            )
    runs: dict[tuple[str, tuple[Target, ...]], PlannedRun] = {}  # one of each settings
    same = 0
    axes = (dict.fromkeys(suite.shots), dict.fromkeys(suite.seeds), suite.columns().items())
    for (name, dataset), shots, seed, (column, changes) in product(datasets.items(), *axes):
        # A column that sets its own number of shots has one run a seed.
        first = shots == suite.shots[0]
        if "shots" in changes and not first:
            continue
        grid = {"dataset": dataset, "shots": shots, "seed": seed}
        settings = make_settings(absolute_paths({**suite.settings, **grid, **changes}))
        if get_method(settings.method).still and not (first and seed == suite.seeds[0]):
            continue
        targets = _targets(suite, settings)
        key = (settings.model_dump_json(), targets)
        if key in runs:
            same += 1
            continue
        place = Path(name, column, f"{settings.shots}shots-seed{seed}")
        runs[key] = PlannedRun(folder / place, place.as_posix(), settings, targets)
    for run in runs.values():
        check_output(run.directory, run.settings, resume=True, overwrite=False)
    return Plan(suite.name, folder, tuple(runs.values()), same)


def _targets(suite: Suite, settings: Settings) -> tuple[Target, ...]:
    """Where to evaluate a run with these settings; its own test images are left out."""
    targets = []
    for evaluation in suite.evaluations:
        target = Target(**absolute_paths(evaluation.model_dump()))
        there = target.settings(settings)
        if task_key(there) == task_key(settings):
            continue
        if (
            get_method(settings.method).head.closed
            and not target.dataset
            and there.classes != settings.classes
        ):
            raise UserError(
                f"method '{settings.method}' knows only the classes it was fitted on and cannot be "
                f"evaluated on {there.classes} ones; take it out of the suite's methods"
            )
        targets.append(target)
    return tuple(targets)
