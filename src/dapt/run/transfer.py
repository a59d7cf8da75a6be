"""A finished run's prompts on other images: another dataset, domain, or set of classes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dapt.data import Task, load_support_set
from dapt.engine.data import Data, task_of, tell_notes, tell_of_overlap
from dapt.engine.evaluate import evaluate_task
from dapt.engine.features import Shared
from dapt.errors import UserError
from dapt.progress import Reporter
from dapt.run.directory import RunDirectory
from dapt.run.load import load_classifier
from dapt.run.records import EvaluationRecord
from dapt.safe.files import file_digest, write_json
from dapt.settings import Settings

# Seconds to wait for who else writes an evaluation into the run.
_PATIENCE = 10


@dataclass(frozen=True)
class Target:
    """Where else to evaluate; what is None is as in the run.

    Another dataset's root is the run's; its domain and class names are its own, its classes all.
    """

    dataset: str | None = None
    root: str | None = None
    domain: str | None = None
    class_names: str | None = None
    classes: str | None = None

    @property
    def elsewhere(self) -> bool:
        """Whether anything but the run's own test images is meant."""
        return (self.dataset, self.domain, self.classes) != (None, None, None)

    def settings(self, settings: Settings) -> Settings:
        """The run's settings, changed to open the target's task."""
        own = {"domain": None, "class_names": None, "classes": "all"}
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return settings.model_copy(update={**(own if "dataset" in given else {}), **given})

    def place(self, settings: Settings) -> dict[str, Any]:
        """What says which images and classes are meant, for a run with these settings."""
        return {name: getattr(self.settings(settings), name) for name in asdict(self)}


def recorded(run: RunDirectory, target: Target) -> tuple[Path, EvaluationRecord] | None:
    """The run's evaluation on ``target`` and its file, if there is one that counts."""
    place = target.place(run.read_settings())
    for file, found in run.evaluations():
        if isinstance(found, EvaluationRecord) and found.settings == place:
            return file, found
    return None


def evaluate_run(
    run: RunDirectory,
    target: Target,
    *,
    device: str | None = None,
    strict: bool = False,
    shared: Shared | None = None,
    open_task: Callable[..., Task] = task_of,
    held: bool = False,
    reporter: Reporter | None = None,
) -> tuple[str, dict[str, Any]]:
    """Evaluate a finished run's prompts on a target, and leave ``eval-<name>.json`` in the run.

    On the run's own test images nothing is written. Several processes may evaluate a run at once.

    Args:
        device: to run on, if not the one it was tuned on.
        strict: an unreadable image is an error, whatever the run's settings say.
        shared: the run's backbone, already loaded, and what was read with it.
        open_task: as `task_of`; one that remembers shares tasks.
        held: whether the caller holds the run's lock; it is taken to write, if not.

    Returns the target task's name and `metrics`. A `UserError` says that there is no finished run,
    the target cannot be read, or another run has taken this one's place meanwhile.
    """
    reporter = reporter or Reporter()
    run.require()
    identity, own = _identity(run), run.read_settings()
    settings = target.settings(own)
    task = open_task(settings, evaluate=target.dataset is not None)
    backbone = shared.backbone if shared else None
    names, template = task.class_names, task.template
    classifier = load_classifier(run, names, template, backbone=backbone, device=device)
    tell_notes(task, reporter)
    settings = settings.model_copy(update={"strict": strict or settings.strict})
    result = evaluate_task(classifier, task, settings, reporter, shared)
    if not target.elsewhere:
        return task.name, result
    twice = None  # where the images it was tuned on are not at hand
    with suppress(UserError):
        tuned_on = open_task(own, evaluate=False)
        data = Data(tuned_on, load_support_set(run.support_file, tuned_on))
        twice = tell_of_overlap(data, task, reporter)
    record = {
        "dataset": task.name,
        "domain": settings.domain,
        "classes": settings.classes,
        "settings": target.place(own),
        "also_tested": twice,
        "test": result,
    }
    with nullcontext() if held else run.locked(patience=_PATIENCE):
        if _identity(run) != identity:
            raise UserError(f"the run in {run.path} was replaced meanwhile; evaluate it again")
        write_json(_file_for(run, target, own), record)
    return task.name, result


def _identity(run: RunDirectory) -> tuple[bytes, bytes]:
    """What tells a run from another that takes its place."""
    return run.settings_file.read_bytes(), file_digest(run.prompts_file)


def _file_for(run: RunDirectory, target: Target, own: Settings) -> Path:
    """Its earlier record, or ``eval-<dataset>[-<domain>][-<classes>].json``, numbered if taken."""
    if before := recorded(run, target):
        return before[0]
    dataset = Path(target.dataset or own.dataset).stem
    name = "-".join(filter(None, ("eval", dataset, target.domain, target.classes)))
    file, number = run.path / f"{name}.json", 2
    while file.exists():
        file, number = run.path / f"{name}-{number}.json", number + 1
    return file
