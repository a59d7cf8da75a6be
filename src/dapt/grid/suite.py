"""Suites: what a grid of runs is made of, read from YAML and checked before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dapt.data import BENCHMARKS
from dapt.errors import UserError, nearest, shown
from dapt.methods import METHODS
from dapt.safe.files import read_yaml, user_path
from dapt.settings import make_settings

# Those that ship with the package, by name.
SUITES = {f.stem: f for f in sorted(Path(__file__).resolve().parent.glob("suites/*.yaml"))}

# What a suite has lists for is not set by hand.
_LISTED = {"dataset": "datasets", "method": "methods", "shots": "shots", "seed": "seeds"}
# Names become folders, on any system.
_NAME = re.compile(r"[\w=+-][\w.=+-]{0,79}")

Shots = Annotated[int, Field(strict=True, ge=1)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Kind = TypeVar("Kind", bound=_Model)


class Evaluation(_Model):
    """What to evaluate each run on besides its own test images."""

    dataset: str | None = None
    domain: str | None = None
    classes: Literal["all", "base", "new"] | None = None


class Axes(_Model):
    """What a grid has runs of."""

    datasets: list[str] = []  # to tune on; each one's name or path
    methods: list[str] = []  # rows of the method table
    variants: dict[str, dict[str, Any]] = {}  # further columns beside these: name -> settings
    sweeps: dict[str, list[Any]] = {}  # setting -> values, each a variant named setting=value
    shots: list[Shots] = [16]  # support images a class
    seeds: list[Seed] = [1, 2, 3]  # of support set, prompts and order
    settings: dict[str, Any] = {}  # fixed for all runs
    evaluations: list[Evaluation] = []  # to do after each run


class Suite(Axes):
    """A grid, and how it changes on the bundled task (``bundled``) or in a hurry (``quick``)."""

    name: str  # folder of its runs; the file's name, if not given
    about: str = ""  # what it is for
    bundled: dict[str, Any] = {}  # changes where benchmarks are meant but no root is given
    quick: dict[str, Any] = {}  # changes for --quick

    @model_validator(mode="after")
    def _sound(self) -> Suite:
        """Check what makes sense only together; pydantic lets a `UserError` through as it is."""
        columns = self.columns()
        for axis in ("datasets", "shots", "seeds"):
            if not getattr(self, axis):
                raise UserError(f"{axis} is empty; list at least one")
        if not columns:
            raise UserError("no methods and no variants; list at least one")
        if clash := self.variants.keys() & METHODS:
            raise UserError(f"variant '{min(clash)}' has the name of a method; give it another")
        fixed = [(self.settings, {"method", "shots"}), (self.sweeps, {"method"})]
        fixed += [(given, set()) for given in self.variants.values()]
        for given, more in fixed:
            for name in sorted(given.keys() & {"dataset", "seed", *more}):
                axis = _LISTED[name]
                raise UserError(f"'{name}' is no fixed setting here; list it under {axis}")
        named = {f"variant '{name}' must be named by": name for name in columns}
        for rule, name in {f"name '{self.name}' must be": self.name, **named}.items():
            if not _NAME.fullmatch(name):
                raise UserError(
                    f"{rule} letters, digits and . _ = + - (runs get a folder of this name); give "
                    "it another, under variants where it comes of a sweep"
                )
        for given in columns.values():
            make_settings({"dataset": self.datasets[0], **self.settings, **given})
        return self

    def changed(self, part: dict[str, Any], where: str) -> Suite:
        """This suite with a part's keys in place of its own; ``settings`` are merged.

        Raises:
            UserError: the part is wrong, or what comes out; ``where`` tells the user what is meant.
        """
        given = _checked(Axes, part, where).model_dump(exclude_unset=True)
        merged = {**self.settings, **given.get("settings", {})}
        return _checked(Suite, {**self.model_dump(), **given, "settings": merged}, where)

    def needs_root(self) -> bool:
        """Whether a dataset is a benchmark and no setting says where benchmarks are."""
        asked = [*self.datasets, *(e.dataset for e in self.evaluations if e.dataset)]
        return not self.settings.get("root") and any(name in BENCHMARKS for name in asked)

    def select(self, names: list[str], where: str) -> Suite:
        """This suite with only the columns named: its variants, or any method.

        Raises:
            UserError: a name is neither.
        """
        columns = self.columns()
        known = list(dict.fromkeys([*columns, *METHODS]))
        for name in names:
            if name not in known:
                raise UserError(
                    f"{where}: '{name}' is no method and no variant of the suite"
                    f"{nearest(name, known)}; use some of {', '.join(known)}"
                )
        methods = [name for name in names if name in METHODS]
        variants = {name: columns[name] for name in names if name not in METHODS}
        return self.changed({"methods": methods, "variants": variants, "sweeps": {}}, where)

    def columns(self) -> dict[str, dict[str, Any]]:
        """Methods, variants and sweeps as name -> settings, in this order."""
        found: dict[str, dict[str, Any]] = {name: {"method": name} for name in self.methods}
        swept = {
            f"{setting}={value}": {setting: value}
            for setting, values in self.sweeps.items()
            for value in values
        }
        return {**found, **self.variants, **swept}


def suite_file(suite: str) -> Path:
    """The file of a suite: one that ships with the package, or a path.

    Raises:
        UserError: there is neither.
    """
    path = SUITES.get(suite) or user_path(suite)
    if not path.is_file():
        raise UserError(
            f"unknown suite '{suite}'{nearest(suite, list(SUITES))}, and a file of this name does "
            f"not exist; give a YAML file, or one of {', '.join(SUITES)}"
        )
    return path


def read_suite(file: Path) -> Suite:
    """Read and check a suite.

    Raises:
        UserError: the file cannot be read, or holds an unknown key, setting or method (with the
            nearest known one), or an impossible value.
    """
    values = read_yaml(file, "suite file")
    where = f"suite file {file}"
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise UserError(f"{where} must map keys such as datasets and methods to values")
    suite = _checked(Suite, {"name": file.stem, **values}, where)
    for part in ("bundled", "quick"):
        suite.changed(getattr(suite, part), f"{where}, {part}")
    return suite


def _checked(model: type[Kind], values: dict[str, Any], where: str) -> Kind:
    """The model of these values, or one sentence on what is wrong with them."""
    try:
        return model.model_validate(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        *path, last = map(str, first["loc"])
        if first["type"] != "extra_forbidden":
            place, value = ".".join([*path, last]), shown(first["input"])
            raise UserError(f"{where}: {place}: {value}: {first['msg'].lower()}") from error
        names = list((Evaluation if path else model).model_fields)
        inside = f" in {'.'.join(path)}" if path else ""
        raise UserError(
            f"{where}: unknown key '{last}'{inside}{nearest(last, names)}; use one of "
            f"{', '.join(names)}"
        ) from error
