"""The page: its parts, the list of runs, and a link from every number to the runs it came from."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dapt.engine.evaluate import ECE_BINS
from dapt.report.collect import Run, clean
from dapt.report.comparison import best_compared
from dapt.report.figures import PALETTE, marker, method_colour
from dapt.report.rows import method_title
from dapt.report.sections import Block
from dapt.report.statistics import CONFIDENCE
from dapt.report.study import Study, full_settings, shown
from dapt.report.tables import PAGE, TEMPLATES
from dapt.safe.files import open_regular

# By which a page is known for a report's.
_GENERATOR = '<meta name="generator" content="dapt report">'
# Said in columns of their own, or different in every run.
_OWN_COLUMNS = {"dataset", "classes", "method", "shots", "seed"}
_ENVIRONMENT = ("commit", "backbone_sha256", "device", "threads", "machine", "platform", "python")


def is_page(path: Path) -> bool:
    """Whether a file is a page that `render` made."""
    try:
        with open_regular(path) as file:
            return _GENERATOR.encode() in file.read(1000)
    except OSError:
        return False


def render(
    study: Study, parts: Mapping[str, Sequence[Block]], failures: Mapping[Path, str], **more: object
) -> str:
    """The whole page as HTML; every text in it that was read from a run is escaped.

    Args:
        study: the runs.
        parts: of the page, by id; empty ones are only named.
        failures: runs that were given up, and why.
        more: what is told in the ``report``, ``notes`` on what could not be had with the
            backbone, and ``features``: whether that was asked for.
    """
    sets: dict[tuple[int, ...], int] = {}

    def anchor(runs: tuple[int, ...]) -> str:
        """Id of the list entry for these runs; a single run has its own."""
        if len(runs) == 1:
            return f"run-{runs[0]}"
        return f"runs-{sets.setdefault(runs, len(sets) + 1)}"

    script = (PAGE / "page.js").read_text(encoding="utf-8")
    return TEMPLATES.get_template("page.html").render(
        study=study,
        parts=parts,
        best=best_compared(study) if study.datasets else None,
        confidence=CONFIDENCE,
        ece_bins=ECE_BINS,
        anchor=anchor,
        sets=sets,
        runs=_run_list(study.runs, failures),
        palette=PALETTE,
        colours={m: method_colour(m, study.methods) for m in study.methods},
        marker=marker,
        method_title=method_title,
        generator=Markup(_GENERATOR),
        markup=Markup,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **more,
    )


def _run_list(runs: Sequence[Run], failures: Mapping[Path, str]) -> dict[str, Any]:
    """Entries of all runs, and what all of them share, which is said once."""
    details = [_details(run) for run in runs]
    first = details[0] if details else {}
    shared = {n: v for n, v in first.items() if all(own.get(n) == v for own in details)}
    paths = [path.absolute() for path in (*(run.path for run in runs), *failures)]
    folder = os.path.commonpath([path.parent for path in paths]) if paths else ""
    shown = [clean(os.path.relpath(path, folder), 400) for path in paths]
    own = [{n: v for n, v in own.items() if n not in shared} for own in details]
    return {
        "folder": clean(folder, 400),
        "failures": list(zip(shown[len(runs) :], failures.values(), strict=True)),
        "shared": shared,
        "entries": list(zip(runs, shown, own, strict=False)),
    }


def _details(run: Run) -> dict[str, str]:
    """Settings, and what is worth knowing of the environment."""
    settings = {n: v for n, v in full_settings(run).items() if n not in _OWN_COLUMNS}
    known = dict(run.environment)
    found = {**settings, **{name: known.get(name) for name in _ENVIRONMENT}}
    versions = known.get("versions") or {}
    found |= versions if isinstance(versions, dict) else {"versions": json.dumps(versions)}
    details = {clean(name): shown(value) for name, value in found.items()}
    return {**details, "commit": details["commit"][:12]}
