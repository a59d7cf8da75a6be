"""Suites, read from YAML and checked before anything runs, and the runs that they plan."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from glob import escape
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from dapt.data import BENCHMARKS
from dapt.errors import UserError, nearest, shown
from dapt.methods import GROUPS, METHODS, get_method, load_plugins
from dapt.run.directory import RunDirectory
from dapt.run.train import Target, check_output, recorded
from dapt.safe.files import read_yaml, user_path
from dapt.settings import Settings, absolute_paths, make_settings

# Files of those that ship with the package.
SUITES = {f.stem: f for f in sorted(Path(__file__).resolve().parent.glob("suites/*.yaml"))}

# Names become folders, on any system.
_NAME = re.compile(r"[\w=+-][\w.=+-]{0,79}")

# What has been done of a run.
STATES = DONE, BEGUN, FAILED, NEW = ("done", "unfinished", "failed", "to do")

# What decides which backbone settings load, and which task they open.
backbone_key = attrgetter("backbone", "pretrained", "device", "precision")
task_key = attrgetter(
    "dataset",
    "root",
    "domain",
    "class_names",
    "classes",
    "grey_range",
    "multi_label",
    "test_fraction",
)


class Evaluation(BaseModel, extra="forbid", frozen=True):
    """What to evaluate each run on besides its own test images."""

    dataset: str | None = None
    domain: str | None = None
    classes: Literal["all", "base", "new"] | None = None


class Suite(BaseModel, extra="forbid", frozen=True):
    """A grid, and how it changes on the bundled task (``bundled``) or in a hurry (``quick``)."""

    name: str  # folder for its runs; default: the file's name
    about: str = ""  # what the suite is for
    plugins: list[str] = []  # files with your own methods, which are executed
    bundled: dict[str, Any] = {}  # changes if no --root is given
    quick: dict[str, Any] = {}  # changes with --quick
    datasets: list[str] = []  # names or paths of the datasets to tune on
    methods: list[str] = []  # names of methods
    variants: dict[str, dict[str, Any]] = {}  # further columns: name -> settings
    sweeps: dict[str, list[Any]] = {}  # setting -> values: variants named setting=value
    shots: list[Annotated[int, Field(strict=True, ge=1)]] = [16]  # support images per class
    seeds: list[Annotated[int, Field(strict=True, ge=0, lt=2**32)]] = [1, 2, 3]  # one run per seed
    settings: dict[str, Any] = {}  # settings of all runs
    evaluations: list[Evaluation] = []  # what else to evaluate each run on

    @model_validator(mode="after")
    def _sound(self) -> Suite:
        """Check what makes sense only together; pydantic lets a `UserError` through as it is."""
        columns = self.columns()
        axes = {f"{axis} is empty": getattr(self, axis) for axis in ("datasets", "shots", "seeds")}
        axes["no methods and no variants"] = columns
        if empty := [fault for fault, values in axes.items() if not values]:
            raise UserError(f"{empty[0]}; list at least one")
        if clash := self.variants.keys() & METHODS:
            raise UserError(f"variant '{min(clash)}' has the name of a method; give it another")
        # What a suite has lists for is not set by hand; only variants choose a method.
        fixed = [(name, "dataset seed method shots") for name in self.settings]
        fixed += [(name, "dataset seed method") for name in self.sweeps]
        fixed += [(name, "dataset seed") for given in self.variants.values() for name in given]
        for name, listed in fixed:
            if name in listed.split():
                axis = f"{name.rstrip('s')}s"
                raise UserError(f"'{name}' is no fixed setting here; list it under {axis}")
        named = {f"name '{self.name}' must be": self.name}
        named |= {f"variant '{name}' must be named by": name for name in columns}
        if wrong := [rule for rule, name in named.items() if not _NAME.fullmatch(name)]:
            raise UserError(
                f"{wrong[0]} letters, digits and . _ = + - (runs get a folder of this name); give "
                "it another, under variants where it comes of a sweep"
            )
        for given in columns.values():
            make_settings({"dataset": self.datasets[0], **self.settings, **given})
        return self

    def changed(self, part: dict[str, Any], where: str) -> Suite:
        """This suite with a part's keys in place of its own; ``settings`` are merged.

        A `UserError` where the part or what comes out is wrong, which ``where`` names to the user.
        """
        values, settings = {**self.model_dump(), **part}, part.get("settings", {})
        if isinstance(settings, dict):
            values["settings"] = {**self.settings, **settings}
        return _checked(values, where)

    def needs_root(self) -> bool:
        """Whether a dataset is a benchmark and no setting says where benchmarks are."""
        asked = [*self.datasets, *(e.dataset for e in self.evaluations if e.dataset)]
        return not self.settings.get("root") and any(name in BENCHMARKS for name in asked)

    def select(self, names: list[str], where: str) -> Suite:
        """This suite with only the columns named, or a `UserError`: its variants, or any method.

        A name in `GROUPS` stands for methods: for those that can be evaluated wherever it asks.
        """
        columns = {**self.columns(), **{name: {"method": name} for name in METHODS}}
        groups = {name: self.group(name) for name in names if name in GROUPS.keys() - columns}
        names = list(dict.fromkeys(n for name in names for n in groups.get(name, [name])))
        for name in names:
            if name not in columns:
                known = [*columns, *GROUPS]
                near = f"{nearest(name, known)}; use some of {', '.join(known)}"
                raise UserError(f"{where}: '{name}' is no method and no variant of the suite{near}")
        methods = [name for name in names if name in METHODS]
        variants = {name: columns[name] for name in names if name not in METHODS}
        return self.changed({"methods": methods, "variants": variants, "sweeps": {}}, where)

    def group(self, name: str) -> list[str]:
        """The methods that a name in `GROUPS` stands for.

        Where there are evaluations on other classes, or on datasets that may have others, without
        those that know their own alone.
        """
        own = self.settings.get("classes", "all")
        elsewhere = any(e.dataset or (e.classes or own) != own for e in self.evaluations)
        given = {"dataset": self.datasets[0], **self.settings}
        return [
            method for method, row in METHODS.items()
            if GROUPS[name](row)
            and not (elsewhere and row.closed(make_settings({**given, "method": method})))
        ]  # fmt: skip

    def columns(self) -> dict[str, dict[str, Any]]:
        """Methods, variants and sweeps as name -> settings, in this order."""
        methods = {name: {"method": name} for name in self.methods}
        swept = {
            f"{s}={value}": {s: value} for s, values in self.sweeps.items() for value in values
        }
        return {**methods, **self.variants, **swept}


def suite_file(suite: str) -> Path:
    """The file of a suite that ships with the package, or at a path; a `UserError` without one."""
    path = SUITES.get(suite) or user_path(suite)
    if not path.is_file():
        said = f"unknown suite '{suite}'{nearest(suite, list(SUITES))}, and the file does not exist"
        raise UserError(f"{said}; give a YAML file, or one of {', '.join(SUITES)}")
    return path


def read_suite(file: Path) -> Suite:
    """Read and check a suite: a `UserError`, where it holds what is unknown or impossible."""
    values, where = read_yaml(file, "suite file"), f"suite file {file}"
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise UserError(f"{where} must map keys such as datasets and methods to values")
    if isinstance(own := values.get("plugins"), list) and all(isinstance(f, str) for f in own):
        load_plugins(own)  # before its methods are looked up
    suite = _checked({"name": file.stem, **values}, where)
    for part in ("bundled", "quick"):
        suite.changed(getattr(suite, part), f"{where}, {part}")
    return suite


def _checked(values: dict[str, Any], where: str) -> Suite:
    """The suite of these values, or one sentence on what is wrong with them."""
    try:
        return Suite.model_validate(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        *path, last = map(str, first["loc"])
        said = f"{'.'.join([*path, last])}: {shown(first['input'])}: {first['msg'].lower()}"
        if first["type"] == "extra_forbidden":
            known = list((Evaluation if path else Suite).model_fields)
            inside = f" in {'.'.join(path)}" if path else ""
            said = f"unknown key '{last}'{inside}{nearest(last, known)}; use {', '.join(known)}"
        raise UserError(f"{where}: {said}") from error


@dataclass(frozen=True)
class PlannedRun:
    """One run of a grid, known by its path: its settings, and the evaluations after it."""

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
        dataset, _, leaf = map(escape, self.path.parts[-3:])
        for path in sorted(self.path.parents[3].glob(f"*/{dataset}/*/{leaf}")):
            other = RunDirectory(path)
            with suppress(UserError):  # written by another version
                done = path != self.path and other.exists and other.finished
                if done and other.read_settings() == self.settings:
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

    folder: Path
    runs: tuple[PlannedRun, ...]
    same: int  # runs left out, as an earlier column has the same settings


def make_plan(suite: Suite, output: Path | str) -> Plan:
    """Lay a suite out under ``output``: ``<suite>/<dataset>/<column>/<k>shots-seed<s>``.

    Zero-shot learns nothing, so one run of it stands for every number of shots and every seed. A
    `UserError` where settings are impossible, two datasets share a name, or a run directory holds a
    run with other settings.
    """
    folder = user_path(output).resolve() / suite.name
    datasets: dict[str, str] = {}  # name of its folder -> dataset
    for dataset in suite.datasets:
        name = user_path(dataset).resolve().stem
        if datasets.setdefault(name, dataset) != dataset:
            both = f"{datasets[name]} and {dataset}"
            raise UserError(f"datasets {both} would share the folder {folder / name}; rename one")
    runs: dict[tuple[str, tuple[Target, ...]], PlannedRun] = {}  # one of each settings
    same = 0
    axes = (dict.fromkeys(suite.shots), dict.fromkeys(suite.seeds), suite.columns().items())
    for (name, dataset), shots, seed, (column, changes) in product(datasets.items(), *axes):
        grid = {"dataset": dataset, "shots": shots, "seed": seed}
        settings = make_settings(absolute_paths({**suite.settings, **grid, **changes}))
        still = get_method(settings.method).still
        # A column that sets its own number of shots has one run a seed.
        again = shots != suite.shots[0] and (still or "shots" in changes)
        if again or (seed != suite.seeds[0] and still):
            continue
        place = Path(name, column, f"{settings.shots}shots-seed{seed}")
        run = PlannedRun(folder / place, place.as_posix(), settings, _targets(suite, settings))
        same += runs.setdefault((settings.model_dump_json(), run.targets), run) is not run
    for run in runs.values():
        check_output(run.directory, run.settings, resume=True, overwrite=False)
    return Plan(folder, tuple(runs.values()), same)


def _targets(suite: Suite, settings: Settings) -> tuple[Target, ...]:
    """Where to evaluate a run with these settings; its own test images are left out."""
    asked = [Target(**absolute_paths(evaluation.model_dump())) for evaluation in suite.evaluations]
    there = {target: target.settings(settings) for target in asked}
    for target, other in there.items():
        own = target.dataset or other.classes == settings.classes
        if get_method(settings.method).closed(settings) and not own:
            raise UserError(
                f"method '{settings.method}' knows only the classes it was fitted on and cannot be "
                f"evaluated on {other.classes} ones; take it out of the suite's methods"
            )
    return tuple(t for t in asked if task_key(there[t]) != task_key(settings))
