"""A worker's part of a grid: runs one after another, sharing what they have in common."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from threadpoolctl import threadpool_limits

from dapt.data import Task
from dapt.engine.shared import Shared, backbone_of
from dapt.errors import UserError
from dapt.grid.plan import DONE, FAILED, NEW, PlannedRun, backbone_key, task_key
from dapt.progress import Reporter
from dapt.run.directory import InUse
from dapt.run.records import EvaluationRecord, Metrics, read_record
from dapt.run.train import Interrupted, task_of, tell_notes, train
from dapt.run.transfer import evaluate_run, recorded
from dapt.settings import Settings

READY, BUSY = "ready", "busy"

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
    """What a worker does runs with: the backbone in use with what it saw, and tasks.

    Args:
        reporter: is told the progress of each run.
        threads: to compute with for as long as the process lives; as it did, if not given.
    """

    def __init__(self, reporter: Reporter | None = None, threads: int | None = None) -> None:
        self.reporter = reporter or Reporter()
        self._shared: tuple[tuple[str | None, ...], Shared] | None = None
        self._tasks: dict[tuple[object, ...], Task] = {}
        if threads is not None:
            torch.set_num_threads(threads)
            threadpool_limits(threads)

    def clear(self) -> None:
        """Let the backbone go."""
        self._shared = None

    def shared(self, settings: Settings) -> Shared:
        """The settings' backbone and what runs with it have in common; one is kept at a time."""
        key = backbone_key(settings)
        if self._shared is None or self._shared[0] != key:
            self._shared = None  # there may be no room for two
            self._shared = key, Shared(backbone_of(settings))
        return self._shared[1]

    def task(self, settings: Settings, *, evaluate: bool = False) -> Task:
        """The settings' task, as `task_of` opens it."""
        key = (*task_key(settings), evaluate)
        task = self._tasks.pop(key, None) or task_of(settings, evaluate=evaluate)
        self._tasks[key] = task  # the latest stands last
        if len(self._tasks) > _TASKS_KEPT:
            del self._tasks[next(iter(self._tasks))]
        return task

    def open_tasks(self, runs: Sequence[PlannedRun], reporter: Reporter) -> None:
        """Open what runs are tuned and evaluated on, before any is begun.

        What cannot be opened is told, and what is odd; the runs that need the one will fail, the
        others go on.

        Raises:
            UserError: no run has all it needs.
        """
        wrong: dict[str, UserError] = {}
        alike = {(run.group, run.targets): run for run in runs}
        good = 0
        for run in alike.values():
            try:
                for settings, evaluate in ((run.settings, False), *run.elsewhere()):
                    tell_notes(self.task(settings, evaluate=evaluate), reporter)
                good += 1
            except UserError as error:
                wrong[str(error)] = error
        for sentence, first in wrong.items():
            if not good:
                raise first
            reporter.warn(f"{sentence}; the runs that need it will fail")

    def do(self, run: PlannedRun | None) -> Outcome | BaseException:
        """What became of a run, or what stops the whole grid; without a run, that this is here."""
        try:
            return Outcome(READY) if run is None else execute(run, self)
        except BaseException as error:  # to be raised where the grid is
            return error


def execute(run: PlannedRun, session: Session) -> Outcome:
    """Do one run with its evaluations, as far as they are not done; what fails is recorded.

    Raises:
        Interrupted: the process was asked to stop; the run can be resumed.
        OSError: nothing more can be written.
    """
    try:
        state = run.state()
        if state == FAILED:
            return Outcome(FAILED, run.directory.read_failure() or "")
        if state != DONE:
            _tune_and_evaluate(run, state, session)
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
        run.directory.fail(note, None if expected else traceback.format_exc())
        return Outcome(FAILED, note)


def _tune_and_evaluate(run: PlannedRun, state: str, session: Session) -> None:
    settings, directory, reporter = run.settings, run.directory, session.reporter
    task, shared = session.task(settings), session.shared(settings)
    if state == NEW and (twin := run.twin()) is not None:
        directory.copy_from(twin)
    else:
        train(settings, run.path, resume=True, shared=shared, task=task, reporter=reporter)
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


def summary(run: PlannedRun) -> str:
    """Accuracy of a finished run, and on its targets, in one line, and what was odd about it."""
    metrics = read_record(run.directory.metrics_file, Metrics, "metrics of the run")
    files = [file for target in run.targets if (file := recorded(run.directory, target))]
    others = [read_record(file, EvaluationRecord, "evaluation") for file in files]
    parts = [f"{metrics.test.accuracy:.1%}"]
    for file, other in zip(files, others, strict=True):
        parts.append(f"{file.stem.removeprefix('eval-')} {other.test.accuracy:.1%}")
    records = [metrics, *others]
    skipped = [*metrics.skipped, *(image for r in records for image in r.test.skipped)]
    twice = {pair["support"] for r in records for pair in r.also_tested or ()}
    if skipped:
        parts.append(f"images skipped: {len({entry['image'] for entry in skipped}):,}")
    if twice:
        parts.append(f"support images tested too: {len(twice):,}")
    if metrics.rose:
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
