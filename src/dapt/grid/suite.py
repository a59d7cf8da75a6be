"""Suites: what a grid of runs is made of, read from YAML and checked before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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

Shots = Annotated[int, Field(strict=True, ge=1)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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

    def changed(self, part: dict[str, Any], where: str) -> Suite:
        """This suite with a part's keys in place of its own; ``settings`` are merged.

        Raises:
            UserError: the part is wrong, or what comes out; ``where`` tells the user what is meant.
        """
        _checked(Grid, part, where)
        values = {**self.model_dump(), **part}
        values["settings"] = {**self.settings, **part.get("settings", {})}
        suite = _checked(Suite, values, where)
        check_suite(suite, where)
        return suite

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
    check_suite(suite, where)
    for part in ("bundled", "quick"):
        suite.changed(getattr(suite, part), f"{where}, {part}")
    return suite


def _checked(model: type[Any], values: dict[str, Any], where: str) -> Any:
    try:
        return model(**values)
    except (ValidationError, TypeError) as error:
        if isinstance(error, TypeError):  # keys that are no text
            raise UserError(f"{where} must map names to values") from error
        first = error.errors()[0]
        *path, last = map(str, first["loc"] or ("it",))
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


def check_suite(suite: Suite, where: str) -> None:
    """Check what makes sense only together; ``where`` tells the user what is meant.

    Raises:
        UserError: an unknown setting or method, a name that cannot be a folder's, or nothing
            to run.
    """
    if not _NAME.fullmatch(suite.name):
        raise UserError(
            f"{where}: name '{suite.name}' must be letters, digits and . _ = + - to name a folder"
        )
    for method in suite.methods:
        get_method(method)
    _check_settings(suite.settings, where, set(_LISTED))
    for name, given in suite.variants.items():
        inside = f"{where}, variant '{name}'"
        if name in METHODS:
            raise UserError(f"{inside} has the name of a method; give it another")
        _check_settings(given, inside, {"dataset", "seed"})
    for setting in suite.sweeps:
        _check_settings({setting: None}, f"{where}, sweeps", {"dataset", "seed", "method"})
    for name in suite.columns():
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{where}: variant '{name}' must be named by letters, digits and . _ = + - "
                "(its runs get a folder of this name); give it a name under variants"
            )
    for axis in ("datasets", "shots", "seeds"):
        if not getattr(suite, axis):
            raise UserError(f"{where}: {axis} is empty; list at least one")
    if not suite.columns():
        raise UserError(f"{where} has no methods and no variants; list at least one")


def _check_settings(given: dict[str, Any], where: str, listed: set[str]) -> None:
    for name in given:
        if name in listed:
            axis = _LISTED.get(name)
            way = f"list it under {axis}" if axis else "give it under variants"
            raise UserError(f"{where}: '{name}' is no fixed setting here; {way}")
        if name not in Settings.model_fields:
            raise UserError(
                f"{where}: unknown setting '{name}'{nearest(name, list(Settings.model_fields))}; "
                "'dapt settings' lists all"
            )
