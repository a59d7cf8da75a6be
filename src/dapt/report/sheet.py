"""The contact sheet of ``dapt data check``: photos that need a second look, on one page."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

from dapt.data import Task
from dapt.engine.photos import Findings, Photo
from dapt.errors import UserError
from dapt.report import figures
from dapt.report.inside import THUMBNAIL, thumbnail
from dapt.report.tables import TEMPLATES, require_page
from dapt.safe.files import write_atomic

_GENERATOR = '<meta name="generator" content="dapt data check">'
_SHOWN = 60  # findings of a kind, so that the page stays of a few megabytes


def require_sheet(path: Path) -> None:
    """Refuse, as a `UserError`, a path that a sheet cannot be written to."""
    require_page(path, "`report`", _GENERATOR)


def write_sheet(path: Path, task: Task, found: Findings) -> None:
    """Write one HTML page with small copies of the photos, which needs nothing else.

    A `UserError` says that ``path`` is no place for it.
    """
    require_sheet(path)
    told = {name: getattr(found, name) for name in ("copies", "labels", "outliers", "classes")}
    page = TEMPLATES.get_template("sheet.html").render(
        task=task,
        found=found,
        told=told,
        most=_SHOWN,
        picture=cache(partial(_picture, task)),
        side=THUMBNAIL,
        figures=figures,
        generator=_GENERATOR,
    )
    write_atomic(path, page)


def _picture(task: Task, photo: Photo) -> str:
    """A small copy as a data URI; nothing where the file has gone since."""
    try:
        return thumbnail(task.root / photo.path, task.grey)
    except UserError:
        return ""
