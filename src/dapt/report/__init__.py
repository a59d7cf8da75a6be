"""``dapt report``: tables and figures of any set of runs, on one page that needs nothing else.

From runs (collect.py) and their numbers (study.py) to parts of the page (comparison.py, inside.py).
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapt.engine.evaluate import ECE_BINS
from dapt.errors import UserError
from dapt.progress import Reporter
from dapt.report import comparison, figures, inside
from dapt.report.collect import Run, collect
from dapt.report.study import KINDS_OF_METHODS, Block, Study, full_settings, row_of
from dapt.report.tables import (
    CONFIDENCE,
    MOST_ROWS,
    PAGE,
    TEMPLATES,
    Table,
    clean,
    require_page,
    shown,
)
from dapt.safe.files import TEMPORARY, read_json, write_atomic, write_json

__all__ = ["Report", "write_report"]

# In the page's order; page/words.html has their titles.
_PARTS: dict[str, Callable[[Study], Iterator[Block]]] = {
    "overview": comparison.overview, "accuracy": comparison.accuracy,
    "domains": comparison.domains, "base-to-new": comparison.base_to_new,
    "cross-dataset": comparison.cross_dataset, "ablations": comparison.ablations,
    "curves": inside.curves, "dispersion": inside.dispersion,
    "mistakes": inside.mistakes, "calibration": inside.calibration,
}  # fmt: skip
_CONTENTS = "contents.json"
# By which a page is known for a report's.
_GENERATOR = '<meta name="generator" content="dapt report">'
# Said in columns of their own, or different in every run.
_OWN_COLUMNS = {"dataset", "classes", "method", "shots", "seed"}
_ENVIRONMENT = ("commit", "backbone_sha256", "device", "threads", "machine", "platform", "python")


@dataclass(frozen=True)
class Report:
    """What was written: the page, the folder beside it, and what to tell of the runs."""

    page: Path
    folder: Path
    runs: int
    unfinished: int
    failed: int
    warnings: tuple[str, ...]


def write_report(
    paths: Sequence[Path],
    out: Path,
    *,
    baseline: str | None = None,
    features: bool = False,
    reporter: Reporter | None = None,
) -> Report:
    """Write one HTML page of all runs under ``paths``, and its tables and figures beside it.

    Args:
        paths: run directories, or folders that hold some at any depth.
        out: the page; the files go to a folder of its name with ``-files``.
        baseline: method that differences are to; zero-shot or the first present, if None.
        features: also load the backbones, for what metrics do not tell.

    Raises:
        UserError: no run is found, the baseline has none, or ``out`` cannot be written or is
            something else than a report.
    """
    reporter = reporter or Reporter()
    require_page(out, "`out`", _GENERATOR)
    folder = out.with_name(f"{out.stem}-files")
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, which may lead anywhere; delete it")
    runs, failures, warnings = collect(paths)
    study = Study(runs, baseline)
    notes = inside.look_inside(study, reporter) if features else []
    parts = {}
    with reporter.stage("drawing", len(_PARTS)) as advance:
        for name, make in _PARTS.items():
            parts[name] = [block for block in make(study) if block.items]
            advance(1)
    _write_files(folder, [item for blocks in parts.values() for b in blocks for item in b.items])
    unfinished = sum(not (run.finished or run.failure or run.untested) for run in runs)
    said = (*warnings, *study.warnings)
    written = Report(out, folder, len(runs), unfinished, len(failures), said)
    told = {"parts": parts, "report": written, "notes": notes, "features": features}
    write_atomic(out, _page(study, failures, **told))
    return written


def _write_files(folder: Path, items: Sequence[figures.Drawing | Table]) -> None:
    """Tables and figures as files; those of an earlier report that are no more are deleted."""
    before: set[str] = set()
    if (folder / _CONTENTS).is_file():
        known = read_json(folder / _CONTENTS, "contents of an earlier report")
        # What is deleted is only ever a file that a report wrote.
        names = known if isinstance(known, dict) else ()
        before = {n for n in names if re.fullmatch(r"[a-z0-9-]+\.(png|svg|md|csv|tex)", n)}
    elif folder.is_dir() and any(p.suffix != TEMPORARY for p in folder.iterdir()):
        why = "is there and not from a report; move it, or choose another `out`"
        raise UserError(f"{folder} {why}")
    folder.mkdir(exist_ok=True)
    files = {f"{item.about.name}.{kind}": c for item in items for kind, c in item.files.items()}
    titles = {
        f"{item.about.name}.{kind}": item.about.title for item in items for kind in item.files
    }
    # First of all the folder says what is a report's, so that the next one may replace it.
    write_json(folder / _CONTENTS, {**dict.fromkeys(sorted(before), ""), **titles})
    for name, content in files.items():
        write_atomic(folder / name, content)
    for name in before - set(titles):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / _CONTENTS, titles)


def _page(study: Study, failures: Mapping[Path, str], **told: object) -> str:
    """The whole page as HTML; every text in it that was read from a run is escaped."""
    sets: dict[tuple[int, ...], int] = {}

    def anchor(runs: tuple[int, ...]) -> str:
        """Id of the list entry for these runs; a single run has its own."""
        if len(runs) == 1:
            return f"run-{runs[0]}"
        return f"runs-{sets.setdefault(runs, len(sets) + 1)}"

    digest = hashlib.sha256((PAGE / "page.js").read_bytes()).digest()
    return TEMPLATES.get_template("page.html").render(
        **told,
        study=study,
        runs=_run_list(study.runs, failures),
        sets=sets,
        anchor=anchor,
        figures=figures,
        row_of=row_of,
        kinds=KINDS_OF_METHODS,
        most_rows=MOST_ROWS,
        confidence=CONFIDENCE,
        ece_bins=ECE_BINS,
        generator=_GENERATOR,
        script_hash=base64.b64encode(digest).decode(),
    )


def _run_list(runs: Sequence[Run], failures: Mapping[Path, str]) -> dict[str, Any]:
    """Entries of all runs, and what all of them share, which is said once."""
    details = [_details(run) for run in runs]
    first = details[0] if details else {}
    shared = {n: v for n, v in first.items() if all(own.get(n) == v for own in details)}
    own = [{n: v for n, v in own.items() if n not in shared} for own in details]
    paths = [path.absolute() for path in (*(run.path for run in runs), *failures)]
    folder = os.path.commonpath([path.parent for path in paths]) if paths else ""
    named = [clean(os.path.relpath(path, folder), 400) for path in paths]
    return {
        "folder": clean(folder, 400),
        "failures": list(zip(named[len(runs) :], failures.values(), strict=True)),
        "shared": shared,
        "entries": list(zip(runs, named, own, strict=False)),
    }


def _details(run: Run) -> dict[str, str]:
    """Settings, and what is worth knowing of the environment."""
    known = dict(run.environment)
    found = {n: v for n, v in full_settings(run).items() if n not in _OWN_COLUMNS}
    found |= {name: known.get(name) for name in _ENVIRONMENT}
    versions = known.get("versions") or {}
    found |= versions if isinstance(versions, dict) else {"versions": versions}
    details = {clean(name): shown(value) for name, value in found.items()}
    return {**details, "commit": details["commit"][:12]}
