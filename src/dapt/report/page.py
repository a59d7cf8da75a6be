"""The page: sections, the list of runs, and a link from every number to the runs it came from."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dapt.report.collect import Failure, Run, clean, seconds
from dapt.report.figures import MARKERS, PALETTE, method_colour
from dapt.report.sections import Section
from dapt.report.study import Study, full_settings, method_title, shown
from dapt.safe.files import open_regular

_FOLDER = Path(__file__).parent / "page"
# Said in columns of their own, or different in every run.
_OWN_COLUMNS = {"dataset", "classes", "method", "shots", "seed"}
_ENVIRONMENT = ("commit", "backbone_sha256", "device", "threads", "machine", "platform", "python")


class Sources:
    """Anchors of runs, and of each set of runs that a number came from."""

    def __init__(self) -> None:
        self.sets: dict[tuple[int, ...], int] = {}

    def anchor(self, runs: Sequence[int]) -> str:
        """Id of the list entry for these runs; a single run has its own."""
        key = tuple(runs)
        if len(key) == 1:
            return f"run-{key[0]}"
        return f"runs-{self.sets.setdefault(key, len(self.sets) + 1)}"


# By which a page is known for a report's.
_GENERATOR = '<meta name="generator" content="dapt report">'


def is_page(path: Path) -> bool:
    """Whether a file is a page that `render` made."""
    try:
        with open_regular(path) as file:
            return _GENERATOR.encode() in file.read(1000)
    except OSError:
        return False


def render(
    study: Study,
    sections: Sequence[Section],
    failures: Sequence[Failure],
    warnings: Sequence[str],
    notes: Sequence[str],
    *,
    features: bool,
    folder: str,
) -> str:
    """The whole page as HTML; every text in it that was read from a run is escaped.

    Args:
        study: the runs.
        sections: parts of the page; empty ones are only named.
        failures: runs that were given up, and why.
        warnings: what could not be read.
        notes: what could not be had with the backbone.
        features: whether that was asked for.
        folder: name of the folder beside the page.
    """
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sources = Sources()
    return environment.get_template("page.html").render(
        study=study,
        sections=[section for section in sections if section.blocks],
        absent=[section for section in sections if not section.blocks],
        warnings=warnings,
        notes=notes,
        features=features,
        folder=folder,
        sources=sources,
        cards=_cards(study, failures),
        runs=_run_list(study.runs, failures),
        palette=PALETTE,
        colours={m: method_colour(m, study.methods) for m in study.methods},
        markers=MARKERS,
        method_title=method_title,
        generator=Markup(_GENERATOR),
        markup=Markup,
        script=Markup(script),
        script_hash=digest,
    )


def _cards(study: Study, failures: Sequence[Failure]) -> list[tuple[str, str]]:
    """The figures that say what the report is of."""
    finished = sum(run.finished for run in study.runs)
    unfinished = sum(not (run.finished or run.failure) for run in study.runs)
    spent = sum(
        seconds(run, name) or 0.0
        for run in study.runs
        if "copied_from" not in run.environment  # its time is counted where it was spent
        for name in ("tuning_seconds", "evaluation_seconds")
    )
    cards = [
        ("runs", f"{finished:,}" + (f" + {unfinished} unfinished" if unfinished else "")),
        ("failed", f"{len(failures):,}" if failures else ""),
        ("datasets", f"{len({run.dataset for run in study.runs}):,}"),
        ("methods", f"{len({run.method for run in study.runs}):,}"),
        ("shots", _list(sorted({run.shots for run in study.runs}))),
        ("seeds", _list(sorted({run.seed for run in study.runs}))),
        ("computed in", _duration(spent)),
    ]
    return [card for card in cards if card[1] not in ("", "0 s")]


def _list(numbers: Sequence[int]) -> str:
    if len(numbers) > 6:
        return f"{numbers[0]} … {numbers[-1]} ({len(numbers)})"
    return ", ".join(map(str, numbers))


def _duration(value: float) -> str:
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _run_list(runs: Sequence[Run], failures: Sequence[Failure]) -> dict[str, Any]:
    """Entries of all runs, and what all of them share, which is said once."""
    details = [
        {
            **{n: shown(v) for n, v in full_settings(run).items() if n not in _OWN_COLUMNS},
            **_environment(run),
        }
        for run in runs
    ]
    names = list(dict.fromkeys(name for values in details for name in values))
    shared = {
        name: details[0][name]
        for name in names
        if details and len({values.get(name) for values in details}) == 1
    }
    paths = [run.path.absolute() for run in runs]
    paths += [failure.path.absolute() for failure in failures]
    folder = os.path.commonpath([path.parent for path in paths]) if paths else ""

    def relative(path: Path) -> str:
        return clean(os.path.relpath(path.absolute(), folder), 400)

    return {
        "folder": clean(folder, 400),
        "failures": [(relative(failure.path), failure.error) for failure in failures],
        "shared": {clean(name): value for name, value in shared.items()},
        "entries": [
            {
                "run": run,
                "path": relative(run.path),
                "tuning": seconds(run, "tuning_seconds"),
                "evaluation": seconds(run, "evaluation_seconds"),
                "own": {clean(n): v for n, v in values.items() if n not in shared},
            }
            for run, values in zip(runs, details, strict=True)
        ],
    }


def _environment(run: Run) -> dict[str, str]:
    """What is worth knowing of the environment, flat."""
    found = {name: shown(run.environment.get(name)) for name in _ENVIRONMENT}
    found["commit"] = found["commit"][:12]
    versions = run.environment.get("versions")
    if isinstance(versions, dict):
        found |= {str(name): shown(value) for name, value in versions.items()}
    elif versions is not None:
        found["versions"] = clean(json.dumps(versions))
    return found
