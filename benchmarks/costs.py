"""What methods cost beside each other and beside the plain way: numbers, steps, memory, images.

Methods take turns where all stay in memory (``--together``); else each is measured by itself, and
what is in the JSON file already is not measured again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bench import SETTING, run_bench
from benchmarks.worker import PLAIN
from dapt.errors import UserError
from dapt.methods import METHODS, get_method
from dapt.progress import RichReporter, console, say, table
from dapt.safe.files import read_json, write_json

Row = dict[str, Any]
# Asked for: so many times as fast as the plain way, and so near to a step of DAPT's.
BARS = (3.0, 1.3)


def bench_methods(asked: str, file: Path | None, what: dict[str, Any]) -> dict[str, Any]:
    """Measure the methods ``asked`` for, "all" or a list with commas, as `run_bench` does.

    ``what`` are its arguments. The report is written after each method, and what an earlier one
    in ``file`` has of the same arguments is kept.
    """
    names = list(METHODS) if asked == "all" else [n.strip() for n in asked.split(",") if n.strip()]
    for name in names:
        get_method(name)
    said = {name: what[name] for name in what if name != "class_names"}
    report: dict[str, Any] = {"asked": said, "cases": []}
    if file is not None and file.is_file():
        found = read_json(file, "earlier figures")
        if not isinstance(found, dict) or found.get("asked") != said:
            raise UserError(f"--json {file} holds figures of something else; give another file")
        report = found
    known = {row["method"] for row in report["cases"]}
    left = [name for name in names if name not in known]
    groups = [left] if what["together"] and left else [[name] for name in left]
    turns = (what["rounds"] + 1) * len(what["variants"]) * len(what["batch_sizes"]) * len(left)
    with RichReporter().stage("bench", turns * len(what["backbones"])) as advance:
        for group in groups:
            try:
                cases = run_bench(**what, methods=group, advance=advance)["cases"]
            except UserError as error:  # of all variants of one method
                cases = [{"method": name, "variant": "", "error": str(error)} for name in group]
            report["cases"] += cases
            if file is not None:
                write_json(file, report)
    return report


_FORMS: dict[str, Callable[[Any], str]] = {
    "learned": lambda v: f"{v:,}",
    "step": lambda v: f"{1000 * v:,.1f}",
    "fit": lambda v: f"{v:.2f}",
    "predict": lambda v: f"{1000 * v:.2f}",
    "peak_bytes": lambda v: f"{v / 1e9:.2f}",
}


def show_costs(report: dict[str, Any]) -> None:
    """A row a method and variant, with how it stands to the plain way and to DAPT's step."""
    done = [row for row in report["cases"] if "error" not in row]
    rows = list[dict[str, str]]()
    for row in done:
        plain = _step_of(done, row, variant=PLAIN)
        dapt = _step_of(done, row, method="dapt")
        step = row.get("step")
        said = {name: form(row[name]) if row.get(name) is not None else "" for name, form in
                _FORMS.items()}  # fmt: skip
        rows.append({
            "method": row["method"], "variant": row["variant"], "batch": str(row["batch_size"]),
            "numbers": said["learned"], "step ms": said["step"],
            "× plain": f"{plain / step:.1f}" if plain and step and row["variant"] != PLAIN else "",
            "÷ DAPT": f"{step / dapt:.2f}" if dapt and step else "",
            "fit s": said["fit"], "image ms": said["predict"], "GB": said["peak_bytes"],
        })  # fmt: skip
    # What nothing was measured of takes no room: a terminal has 80 columns.
    there = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    made = table(*there[:2], figures=there[2:])
    for row in rows:
        made.add_row(*(row[name] for name in there))
    console.print(made)
    say(
        f"asked of a step: at least {BARS[0]:g} times as fast as the plain way (77 tokens, fp32) "
        f"in bf16, at most {BARS[1]:g} of DAPT's; an image is predicted in batches"
    )
    for row in report["cases"]:
        if "error" in row:
            say(f"{row['method']} {row['variant']}: {row['error']}")


def _step_of(rows: list[Row], like: Row, **other: str) -> float | None:
    """The step of a row that differs from another in what is given alone."""
    wanted = {name: like[name] for name in (*SETTING, "variant")} | other
    found = (row for row in rows if all(row[name] == v for name, v in wanted.items()))
    return next((row.get("step") for row in found), None)
