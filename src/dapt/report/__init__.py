"""``dapt report``: tables and figures of any set of runs, on one page that needs nothing else.

collect.py     run directories -> runs, with mistrust
study.py       which runs repeat one another, which vary a setting; numbers by seed
rows.py        what is asked of a method's row in the table
statistics.py  samples by seed: means, intervals, differences
tables.py      a table, and its Markdown, CSV and LaTeX
figures.py     a figure for the page, and its SVG and PNG
features.py    what only the backbone and the images can tell
sections.py    what the parts of the page are made of, and made with; the parts are in
               comparison.py, ablation.py and inside.py
page.py        the page itself; page/ has its words, templates, colours, style and script
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dapt.errors import UserError
from dapt.progress import Reporter
from dapt.report.ablation import ablations
from dapt.report.collect import collect
from dapt.report.comparison import accuracy, base_to_new, cross_dataset, domains, overview
from dapt.report.features import look_inside
from dapt.report.figures import Drawing
from dapt.report.inside import calibration, curves, dispersion, featured, mistakes
from dapt.report.page import is_page, render
from dapt.report.sections import Block, Maker
from dapt.report.study import Study
from dapt.report.tables import Table
from dapt.safe.files import TEMPORARY, read_json, write_atomic, write_json

__all__ = ["Report", "write_report"]

# In the page's order.
_PARTS: dict[str, Callable[[Maker], list[Block]]] = {
    "overview": overview, "accuracy": accuracy, "domains": domains, "base-to-new": base_to_new,
    "cross-dataset": cross_dataset, "ablations": ablations, "curves": curves,
    "dispersion": dispersion, "mistakes": mistakes, "calibration": calibration,
}  # fmt: skip
_CONTENTS = "contents.json"


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
        reporter: is told the progress.

    Raises:
        UserError: no run is found, the baseline has none, or ``out`` cannot be written or is
            something else than a report.
    """
    reporter = reporter or Reporter()
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: give a file that ends in .html")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: its folder does not exist, or it is one; give a file")
    if out.exists() and not is_page(out):
        raise UserError(f"--out {out} is there and not a report; choose another")
    folder = out.with_name(f"{out.stem}-files")
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, which may lead anywhere; delete it")
    runs, failures, warnings = collect(paths)
    maker = Maker(study := Study(runs, baseline))
    notes: list[str] = []
    if features:
        shown = featured(study, maker.drawn)
        maker.inside, notes = look_inside(study, maker.drawn, shown, reporter)
    parts = {}
    with reporter.stage("drawing", len(_PARTS)) as advance:
        for name, make in _PARTS.items():
            parts[name] = [block for block in make(maker) if block.items]
            advance(1)
    _write_files(folder, [item for blocks in parts.values() for b in blocks for item in b.items])
    written = Report(
        out,
        folder,
        runs=len(runs),
        unfinished=sum(not (run.finished or run.failure) for run in runs),
        failed=len(failures),
        warnings=(*warnings, *study.warnings, *maker.warnings),
    )
    page = render(study, parts, failures, report=written, notes=notes, features=features)
    write_atomic(out, page)
    return written


def _write_files(folder: Path, items: Sequence[Drawing | Table]) -> None:
    """Tables and figures as files; those of an earlier report that are no more are deleted."""
    before: set[str] = set()
    if (folder / _CONTENTS).is_file():
        known = read_json(folder / _CONTENTS, "contents of an earlier report")
        # What is deleted is only ever a file that a report wrote.
        names = known if isinstance(known, dict) else ()
        before = {n for n in names if re.fullmatch(r"[a-z0-9-]+\.(png|svg|md|csv|tex)", n)}
    elif folder.is_dir() and any(p.suffix != TEMPORARY for p in folder.iterdir()):
        raise UserError(
            f"{folder} is there and not from a report; move it, or choose another --out"
        )
    folder.mkdir(exist_ok=True)
    files = {
        f"{item.about.name}.{kind}": (item.about.title, content)
        for item in items
        for kind, content in item.files.items()
    }
    titles = {name: title for name, (title, _) in files.items()}
    # First of all the folder says what is a report's, so that the next one may replace it.
    write_json(folder / _CONTENTS, {**dict.fromkeys(sorted(before), ""), **titles})
    for name, (_, content) in files.items():
        write_atomic(folder / name, content)
    for name in before - set(titles):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / _CONTENTS, titles)
