"""A search for a run's method, kept in the run's directory before there is a run."""

from __future__ import annotations

from pathlib import Path

from dapt.data import support_digest
from dapt.engine.data import Data
from dapt.engine.effort import choose, new_search, settings_to_begin_with
from dapt.engine.features import Shared
from dapt.errors import UserError
from dapt.progress import Reporter
from dapt.run.directory import RunDirectory
from dapt.run.records import SearchRecord
from dapt.run.train import check_output, other_setting
from dapt.safe.files import write_json
from dapt.settings import Settings, kept_values, make_settings


def choose_method(
    settings: Settings,
    effort: str | None,
    output: Path | str,
    *,
    data: Data,
    shared: Shared,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Settings:
    """Settings of the run that `dapt.engine.effort.choose` finds best; `train` resumes with them.

    Args:
        settings: of the automatic head; of a run that is resumed, its own, which are returned.
        effort: as ``--effort``, or None for that of the search that is resumed.
        data, shared: opened as the settings say.

    Raises:
        UserError: bad input, or a directory that is in use or holds something else.
        Interrupted: the process got SIGINT or SIGTERM; ``resume`` continues.
    """
    run = RunDirectory(output)
    with run.locked():
        check_output(run, settings, resume=resume, overwrite=overwrite)
        kept = run.read_search() if resume and run.search_file.is_file() else None
        if resume and effort and (kept or run.exists):
            before = kept.search.effort if kept else None
            if effort != before:
                what = f"cannot resume {run.path} with `effort` {effort}: it was started with"
                raise UserError(f"{what} {before or 'none'}; leave it out")
        if resume and run.exists:
            return settings
        found = _begun(kept, settings_to_begin_with(settings), effort, data, shared)
        if overwrite:
            run.clear()

        def keep() -> None:
            write_json(run.search_file, found.model_dump())

        keep()
        return choose(found.search, settings, data, shared=shared, keep=keep, reporter=reporter)


def _begun(
    kept: SearchRecord | None, settings: Settings, effort: str | None, data: Data, shared: Shared
) -> SearchRecord:
    """What was kept, if it is of the same settings, images and weights; else a new one."""
    digest, weights = support_digest(data.task, data.support), shared.backbone.fingerprint
    if kept is None:
        search = new_search(effort or "")
        return SearchRecord(
            settings=kept_values(settings), support_sha256=digest, backbone_sha256=weights,
            search=search,
        )  # fmt: skip
    what = other_setting(make_settings(kept.settings), settings)
    if (kept.support_sha256, kept.backbone_sha256) != (digest, weights):
        what = what or "support images or backbone"
    if what:
        raise UserError(
            f"cannot resume the search for a method: its {what} was another; restore it, or start "
            "anew with `overwrite`"
        )
    return kept
