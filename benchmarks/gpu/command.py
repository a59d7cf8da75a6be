"""The command: what to ask, the table of what came of it, and exit code 1 where something is wrong.

It is of argparse, as typer may be one of the packages that are missing.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch

from benchmarks.gpu import same, speed, whole
from benchmarks.gpu.checks import FAILED, Check, Figures, Found, Place, Report, ask_all


def all_checks(place: Place) -> list[Check]:
    """Those that tell most come first."""
    return [
        *whole.devices(), *same.features(), *same.gradients("bundled"), *same.accuracy(),
        *speed.attention(), *speed.steps(place, ["dapt"]), *same.gradients("large"),
        *same.heads(), *whole.runs(), *speed.copies(), *speed.steps(place, None),
    ]  # fmt: skip


def main(given: list[str] | None = None) -> int:
    """Ask, say what came of it; 1 where something FAILED, 2 where nothing can be asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu in a GPU's place")
    parser.add_argument("--quick", action="store_true", help="small models, a few steps")
    parser.add_argument("--json", type=Path, help="keep what is found here, and go on from it")
    parser.add_argument("--only", help="one part, such as gradients, or one check's whole name")
    parser.add_argument("--minutes", type=float, default=8, help="begin no check after so many")
    options = parser.parse_args(given)
    place = Place(options.device, options.quick)
    if place.cuda and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU here; --device cpu asks the same of the CPU")
        return 2
    checks = all_checks(place)
    if options.only:
        parts = sorted({check.part for check in checks})
        checks = [c for c in checks if options.only in (c.part, c.name)]
        if not checks:
            print(f"--only {options.only}: there is no such part; use one of {', '.join(parts)}")
            return 2
    try:
        report = Report(options.json, place)
    except ValueError as error:
        print(error)
        return 2
    if kept := sum(check.name in report.known for check in checks):
        print(f"{kept} checks are known from {options.json}; delete it to ask all anew")
    found = ask_all(checks, place, report, 60 * options.minutes)
    show(found)
    counts = Counter(one.verdict for one in found.values())
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(FAILED in counts)


def show(found: dict[str, Found]) -> None:
    """A table; lines where the library for tables is missing."""
    rows = [
        (name, one.verdict, f"{one.seconds:.1f}", one.reason or in_short(one.figures or {}))
        for name, one in found.items()
    ]
    try:
        from dapt.progress import cell, console, table
    except ModuleNotFoundError:
        for row in rows:
            print("  ".join(row))
        return
    made = table("check", "verdict", "s", "found")
    for row in rows:
        made.add_row(*map(cell, row))
    console.print(made)


def in_short(figures: Figures) -> str:
    """Numbers with their names; what is nested is in the JSON."""
    flat = {name: one for name, one in figures.items() if not isinstance(one, dict | list)}
    return ", ".join(
        f"{name} {one:.3g}" if isinstance(one, float) else f"{name} {one}"
        for name, one in flat.items()
    )
