"""Checks one after the other: what each finds is kept, and none stops the others."""

from __future__ import annotations

import gc
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

PASSED, FAILED, NOT_HERE, NOT_REACHED = "passed", "FAILED", "not possible here", "not reached"
Figures = dict[str, Any]


class NotHere(Exception):
    """A check cannot be done on this machine, for this reason."""


@dataclass(frozen=True)
class Place:
    """Where is asked: a device that stands for the GPU, and whether little will do."""

    device: str = "cuda"
    quick: bool = False

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU indeed."""
        return torch.device(self.device).type == "cuda"

    @property
    def large(self) -> tuple[str, str | None]:
        """Name and weights of the backbone that speed is of."""
        return ("bundled", None) if self.quick else ("ViT-B-16", "random")

    def require_gpu(self, what: str) -> None:
        """Raise `NotHere` where another device stands for the GPU."""
        if not self.cuda:
            raise NotHere(f"{what} is a GPU's, and the device is {self.device}")


@dataclass(frozen=True)
class Check:
    """One question; ``ask`` gives figures, and a sentence of what is wrong, empty where nothing is.

    ``part`` is what it belongs to, for ``--only``.
    """

    part: str
    what: str
    ask: Callable[[Place], tuple[Figures, str]]

    @property
    def name(self) -> str:
        """By which a report knows it."""
        return f"{self.part} {self.what}".strip()


@dataclass
class Found:
    """What came of a check."""

    verdict: str
    reason: str = ""
    figures: Figures | None = None
    seconds: float = 0.0


def asked(check: Check, place: Place) -> Found:
    """What comes of a check, whatever it raises."""
    started, figures, verdict = time.perf_counter(), None, PASSED
    try:
        figures, reason = check.ask(place)
        verdict = FAILED if reason else PASSED
    except NotHere as error:
        verdict, reason = NOT_HERE, str(error)
    except ModuleNotFoundError as error:
        ours = (error.name or "").partition(".")[0] in ("dapt", "benchmarks")
        verdict, reason = FAILED if ours else NOT_HERE, f"needs the package {error.name}"
    except Exception as error:
        verdict, reason = FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    free(place)
    return Found(verdict, reason, figures, time.perf_counter() - started)


def free(place: Place) -> None:
    """Give back what nobody uses any more."""
    gc.collect()
    if place.cuda:
        torch.cuda.empty_cache()


class Report:
    """A JSON file of what was found, written after each check; by itself, nothing is kept.

    A `ValueError` says that the file is of something else.
    """

    def __init__(self, file: Path | None, place: Place) -> None:
        self.file, self.known = file, dict[str, Found]()
        self.about: Figures = {"asked": asdict(place), "machine": machine(place)}
        if file is not None and file.is_file():
            found = json.loads(file.read_text())
            if {name: found.get(name) for name in self.about} != self.about:
                raise ValueError(f"{file} is of another machine or other options; delete it")
            self.known = {name: Found(**row) for name, row in found["checks"].items()}

    def add(self, name: str, found: Found) -> None:
        """Keep what came of a check, on disk too."""
        self.known[name] = found
        if self.file is None:
            return
        rows = {name: asdict(found) for name, found in self.known.items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_name(f".{self.file.name}.new")
        beside.write_text(json.dumps(_plain(self.about | {"checks": rows}), indent=1) + "\n")
        os.replace(beside, self.file)


def ask_all(
    checks: Iterable[Check], place: Place, report: Report, seconds: float
) -> dict[str, Found]:
    """What came of each check, in order; those not begun within so many seconds are not reached.

    What the report has already is not asked again.
    """
    until, found = time.perf_counter() + seconds, dict[str, Found]()
    for check in checks:
        if (known := report.known.get(check.name)) is None:
            if time.perf_counter() >= until:
                found[check.name] = Found(NOT_REACHED)
                continue
            report.add(check.name, known := asked(check, place))
            said = ": ".join(filter(None, (known.verdict, known.reason)))
            print(f"{check.name}: {said} ({known.seconds:.1f} s)", flush=True)
        found[check.name] = known
    return found


def machine(place: Place) -> Figures:
    """What figures depend on."""
    found: Figures = {"torch": torch.__version__, "python": platform.python_version()}
    if place.cuda and torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(place.device), "cuda": torch.version.cuda}
        found["gpus"] = torch.cuda.device_count()
    return found


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no number that is not finite."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value
