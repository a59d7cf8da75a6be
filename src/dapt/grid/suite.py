"""Suites: what a grid of runs is made of, read from YAML and checked before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dapt.data import BENCHMARKS
from dapt.errors import UserError, nearest, shown
from dapt.methods import METHODS, get_method
from dapt.safe.files import read_yaml, user_path
from dapt.settings import Settings

SUITES = Path(__file__).resolve().parent / "suites"

# What a suite has lists for is not set by hand.
_LISTED = {"dataset": "datasets", "method": "methods", "shots": "shots", "seed": "seeds"}
# Names become folders, on any system.
_NAME = re.compile(r"[\w=+-][\w.=+-]{0,79}")
_LETTERS = "letters, digits and . _ = + -"

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


class Grid(_Model):
    """The axes of a grid. Field descriptions are the user's reference."""

    datasets: list[str] = Field([], description="to tune on; each one's name or path")
    methods: list[str] = Field([], description="rows of the method table")
    variants: dict[str, dict[str, Any]] = Field(
        {}, description="further columns beside the methods: name -> settings"
    )
    sweeps: dict[str, list[Any]] = Field(
        {}, description="setting -> values, each a variant named setting=value"
    )
    shots: list[Shots] = Field([16], description="support images a class")
    seeds: list[Seed] = Field([1, 2, 3], description="of support set, prompts and order")
    settings: dict[str, Any] = Field({}, description="fixed for all runs")
    evaluations: list[Evaluation] = Field([], description="to do after each run")


class Suite(Grid):
    """A grid, and how it changes on the bundled task (``bundled``) or in a hurry (``quick``)."""

    name: str = Field("", description="folder of its runs; the file's name, if not given")
    about: str = Field("", description="what it is for")
    bundled: dict[str, Any] = Field(
        {}, description="what to change where benchmarks are meant but no root is given"
    )
    quick: dict[str, Any] = Field({}, description="what to change for --quick")

    @model_validator(mode="after")
    def _sound(self) -> Suite:
        """Check what makes sense only together; pydantic lets a `UserError` through as it is."""
        if not _NAME.fullmatch(self.name):
            raise UserError(f"name '{self.name}' must be {_LETTERS} to name a folder")
        for method in self.methods:
            get_method(method)
        _check_settings(self.settings, set(_LISTED))
        for name, given in self.variants.items():
            if name in METHODS:
                raise UserError(f"variant '{name}' has the name of a method; give it another")
            _check_settings(given, {"dataset", "seed"}, f"variant '{name}': ")
        _check_settings(self.sweeps, {"dataset", "seed", "method"}, "sweeps: ")
        for name in self.columns():
            if not _NAME.fullmatch(name):
                raise UserError(
                    f"variant '{name}' must be named by {_LETTERS} (its runs get a folder of this "
                    "name); give it a name under variants"
                )
        for axis in ("datasets", "shots", "seeds"):
            if not getattr(self, axis):
                raise UserError(f"{axis} is empty; list at least one")
        if not self.columns():
            raise UserError("no methods and no variants; list at least one")
        return self

    def changed(self, part: dict[str, Any], where: str) -> Suite:
        """This suite with a part's keys in place of its own; ``settings`` are merged.

        Raises:
            UserError: the part is wrong, or what comes out; ``where`` tells the user what is meant.
        """
        given = _checked(Grid, part, where).model_dump(exclude_unset=True)
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
        for name in names:
            if name not in columns and name not in METHODS:
                known = list(dict.fromkeys([*columns, *METHODS]))
                raise UserError(
                    f"{where}: '{name}' is no method and no variant of the suite"
                    f"{nearest(name, known)}; use some of {', '.join(known)}"
                )
        part = {
            "methods": [name for name in names if name in METHODS],
            "variants": {n: columns[n] for n in names if n not in METHODS},
            "sweeps": {},
        }
        return self.changed(part, where)

    def columns(self) -> dict[str, dict[str, Any]]:
        """Methods, variants and sweeps as name -> settings, in this order."""
        found: dict[str, dict[str, Any]] = {name: {"method": name} for name in self.methods}
        swept = {
            f"{setting}={value}": {setting: value}
            for setting, values in self.sweeps.items()
            for value in values
        }
        return {**found, **self.variants, **swept}


def suite_names() -> list[str]:
    """Names of the suites that ship with the package."""
    return sorted(file.stem for file in SUITES.glob("*.yaml"))


def suite_file(suite: str) -> Path:
    """The file of a suite: one that ships with the package, or a path.

    Raises:
        UserError: there is neither.
    """
    names = suite_names()
    if suite in names:
        return SUITES / f"{suite}.yaml"
    path = user_path(suite)
    if path.is_file():
        return path
    if path.suffix.lower() in (".yaml", ".yml", ".json") or len(path.parts) > 1:
        raise UserError(f"suite file {suite} does not exist; check the path")
    raise UserError(
        f"unknown suite '{suite}'{nearest(suite, names)}; give a YAML file, or one of "
        f"{', '.join(names)}"
    )


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
        if first["type"] == "extra_forbidden":
            inside = " in " + ".".join(path) if path else ""
            known = Evaluation if path and path[0] == "evaluations" else model
            names = list(known.model_fields)
            raise UserError(
                f"{where}: unknown key '{last}'{inside}{nearest(last, names)}; use one of "
                f"{', '.join(names)}"
            ) from error
        place = ".".join([*path, last])
        raise UserError(
            f"{where}: {place}: {shown(first['input'])}: {first['msg'].lower()}"
        ) from error


def _check_settings(given: dict[str, Any], listed: set[str], where: str = "") -> None:
    """Refuse names that are no setting, or that a suite lists elsewhere."""
    known = list(Settings.model_fields)
    for name in given:
        if name in listed:
            raise UserError(
                f"{where}'{name}' is no fixed setting here; list it under {_LISTED[name]}"
            )
        if name not in known:
            raise UserError(
                f"{where}unknown setting '{name}'{nearest(name, known)}; 'dapt settings' lists all"
            )
