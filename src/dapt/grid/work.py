"""One process's part of a grid: runs one after another, sharing what they have in common."""

from __future__ import annotations

import errno
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from threadpoolctl import threadpool_limits

from dapt.data import Task
from dapt.engine.features import Shared, backbone_of
from dapt.errors import UserError
from dapt.grid.plan import DONE, FAILED, NEW, PlannedRun, task_key
from dapt.progress import Reporter
from dapt.run.directory import InUse
from dapt.run.train import Interrupted, task_of, train
from dapt.run.transfer import evaluate_run, recorded
from dapt.safe.files import read_json
from dapt.settings import Settings

BUSY = "busy"

# No later run would fare better, so the grid stops instead of failing one run after another.
_NO_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}

# Tasks are listings, not images: a source and its targets are kept, whatever the suite.
_TASKS_KEPT = 16


@dataclass(frozen=True)
class Outcome:
    """What became of a run: `DONE`, `FAILED` with a sentence, or `BUSY` in another process."""

    state: str
    note: str = ""


class Session:
    """What the runs of one process share: the backbone in use with what it saw, and tasks."""

    def __init__(self) -> None:
        self._shared: tuple[tuple[str | None, ...], Shared] | None = None
        self._tasks: OrderedDict[tuple[object, ...], Task] = OrderedDict()

    def clear(self) -> None:
        """Let the backbone go."""
        self._shared = None

    def shared(self, settings: Settings) -> Shared:
        """The settings' backbone and what runs with it have in common; one is kept at a time."""
        s = settings
        key = (s.backbone, s.pretrained, s.device, s.precision)
        if self._shared is None or self._shared[0] != key:
            self._shared = None  # there may be no room for two
            self._shared = key, Shared(backbone_of(settings))
        return self._shared[1]

    def task(self, settings: Settings, *, evaluate: bool = False) -> Task:
        """The settings' task, as `task_of` opens it."""
        key = (*task_key(settings), evaluate)
        if key not in self._tasks:
            self._tasks[key] = task_of(settings, evaluate=evaluate)
            if len(self._tasks) > _TASKS_KEPT:
                self._tasks.popitem(last=False)
        self._tasks.move_to_end(key)
        return self._tasks[key]


def execute(run: PlannedRun, session: Session, reporter: Reporter) -> Outcome:
    """Do one run with its evaluations, as far as they are not done; what fails is recorded.

    Raises:
        Interrupted: the process was asked to stop; the run can be resumed.
        OSError: nothing more can be written.
    """
    directory = run.directory
    try:
        state = run.state()
        if state == FAILED:
            return Outcome(FAILED, directory.read_failure() or "")
        if state != DONE:
            task, shared = session.task(run.settings), session.shared(run.settings)
            twin = run.twin() if state == NEW else None
            if twin is not None:
                directory.copy_from(twin)
            else:
                train(
                    run.settings,
                    run.path,
                    resume=True,
                    shared=shared,
                    task=task,
                    reporter=reporter,
                )
            with directory.locked():
                for target in run.targets:
                    if recorded(directory, target) is None:
                        evaluate_run(
                            directory,
                            target,
                            shared=shared,
                            open_task=session.task,
                            held=True,
                            reporter=reporter,
                        )
        return Outcome(DONE, summary(run))
    except Interrupted:
        raise
    except InUse:
        return Outcome(BUSY)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_STORAGE:
            raise
        expected = isinstance(error, UserError)
        note = str(error) if expected else f"{type(error).__name__}: {error}"
        directory.fail(note, None if expected else traceback.format_exc())
        return Outcome(FAILED, note)


def summary(run: PlannedRun) -> str:
    """Accuracy of a finished run, and on its targets, in one line, and what was odd about it."""
    metrics = run.directory.read_metrics()
    parts = [f"{metrics['test']['accuracy']:.1%}"]
    records = [metrics]
    for target in run.targets:
        if (file := recorded(run.directory, target)) is not None:
            records.append(read_json(file, "evaluation"))
            accuracy = records[-1]["test"]["accuracy"]
            parts.append(f"{file.stem.removeprefix('eval-')} {accuracy:.1%}")
    skipped = list(metrics.get("skipped") or ())
    skipped += [image for record in records for image in record["test"].get("skipped") or ()]
    twice = [pair for record in records for pair in record.get("also_tested") or ()]
    if skipped:
        parts.append(f"images skipped: {len({entry['image'] for entry in skipped}):,}")
    if twice:
        parts.append(f"support images tested too: {len({pair['support'] for pair in twice}):,}")
    if metrics.get("rose"):
        parts.append("its loss rose")
    return ", ".join(parts)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with ``count`` threads: the number may change the last bits of a result."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        with suppress(RuntimeError):
            torch.set_num_threads(before)
