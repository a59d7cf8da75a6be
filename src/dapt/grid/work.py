"""A worker of a grid: what it does, and where it is: in this process, in another, on a cluster."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from dapt.clip.known import Each
from dapt.data import Task
from dapt.engine.data import Data, support_of, task_of, tell_notes
from dapt.engine.features import Shared, backbone_of
from dapt.engine.fit import Interrupted
from dapt.errors import UserError, install, reason_of
from dapt.grid.plan import DONE, FAILED, NEW, PlannedRun, backbone_key, task_key
from dapt.methods import load_plugins, plugins
from dapt.progress import Reporter
from dapt.run.directory import InUse
from dapt.run.load import same_images
from dapt.run.records import EvaluationRecord, Metrics
from dapt.run.train import evaluate_run, recorded, train
from dapt.settings import Settings

# What became of a run: `DONE` with figures, `FAILED` with a sentence, `BUSY`, or what stops all.
Outcome = tuple[str, str] | BaseException
READY, BUSY = ("ready", ""), ("busy in another process", "")
Answer = Future[Outcome]  # where the future itself fails, the worker died

# No later run would fare better, so the grid stops instead of failing one run after another.
_NO_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}

_TASKS_KEPT = 16  # listings, not images: a source and its targets, whatever the suite


class Session:
    """What a worker does runs with: the backbone in use with what it saw, and tasks.

    Each run's ``progress`` is told; ``threads`` are given where the process is all its own, and
    files of the user's ``plugins`` where it does not know them yet.
    """

    def __init__(
        self,
        progress: Reporter | None = None,
        threads: int | None = None,
        plugins: Sequence[str] = (),
    ) -> None:
        load_plugins(plugins)  # before runs come, whose settings may be of theirs
        self.progress = progress or Reporter()
        self.backbones, self._tasks = dict[object, Shared](), dict[object, Task]()
        if threads is not None:
            torch.set_num_threads(threads)
            threadpool_limits(threads)

    def shared(self, settings: Settings, revision: Each = None) -> Shared:
        """The settings' backbone and what runs with it have in common; one is kept at a time.

        Of a hub's repository it is the commit ``revision``, if a run was begun with one.
        """
        kept = self.backbones.get(key := backbone_key(settings))
        if kept is None or revision not in (None, kept.backbone.revision):
            self.backbones.clear()  # there may be no room for two
            kept = self.backbones[key] = Shared(backbone_of(settings, revision=revision))
        return kept

    def task(self, settings: Settings, *, evaluate: bool = False) -> Task:
        """The settings' task, as `task_of` opens it."""
        key = (*task_key(settings), evaluate)
        task = self._tasks.pop(key, None) or task_of(settings, evaluate=evaluate)
        self._tasks[key] = task  # the latest stands last
        if len(self._tasks) > _TASKS_KEPT:
            del self._tasks[next(iter(self._tasks))]
        return task

    def open_tasks(self, runs: Sequence[PlannedRun], reporter: Reporter) -> None:
        """Open what runs are tuned and evaluated on, before any is begun, and tell what is odd.

        A `UserError` where no run has all it needs; else it is told that some will fail.
        """
        wrong, good = dict[str, UserError](), 0
        for run in {(run.group, run.targets): run for run in runs}.values():
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

    def do(self, run: PlannedRun | None) -> Outcome:
        """What became of a run, or what stops the whole grid; without a run, that this is here."""
        try:
            return READY if run is None else self._do(run)
        except BaseException as error:  # to be raised where the grid is
            return error

    def _do(self, run: PlannedRun) -> Outcome:
        """Do a run with its evaluations, as far as they are not done; what fails is recorded."""
        settings, directory, told = run.settings, run.directory, self.progress
        try:
            state = run.state()
            if state == FAILED:
                return FAILED, directory.read_failure() or ""
            if state == DONE:
                return DONE, summary(run)
            task, shared = self.task(settings), self.shared(settings, directory.revision())
            data = Data(task, support_of(settings, task))
            if state == NEW and (twin := run.twin()) is not None and same_images(twin, data):
                directory.copy_from(twin)
            else:
                train(settings, run.path, resume=True, shared=shared, data=data, reporter=told)
            how: dict[str, Any] = {"shared": shared, "open_task": self.task, "reporter": told}
            with directory.locked():
                for target in run.targets:
                    if recorded(directory, target) is None:
                        evaluate_run(directory, target, held=True, **how)
            return DONE, summary(run)
        except InUse:
            return BUSY
        except Exception as error:
            if isinstance(error, Interrupted) or getattr(error, "errno", None) in _NO_STORAGE:
                raise
            expected = isinstance(error, UserError)
            note = str(error) if expected else f"{type(error).__name__}: {error}"
            directory.fail(note, None if expected else traceback.format_exc())
            return FAILED, note


def summary(run: PlannedRun) -> str:
    """Accuracy (or mAP) of a run, and on its targets, in one line, and what was odd about it."""
    metrics = run.directory.read_metrics()
    records: dict[str, Metrics | EvaluationRecord] = {"": metrics}
    for file, record in filter(None, (recorded(run.directory, target) for target in run.targets)):
        records[f"{file.stem.removeprefix('eval-')} "] = record
    tests = {name: record.test for name, record in records.items() if record.test}
    parts = [
        f"{name}{t.accuracy:.1%}" if t.map is None else f"{name}mAP {t.map:.1%}"
        for name, t in tests.items()
    ]
    if metrics.test is None and metrics.forecast is not None:
        parts.insert(0, f"{metrics.forecast.accuracy:.1%} expected")
    if metrics.test is None and metrics.map_forecast is not None:
        parts.insert(0, f"mAP {metrics.map_forecast.map:.1%} expected")
    lists = (metrics.skipped, *(test.skipped for test in tests.values()))
    skipped = {image["image"] for images in lists for image in images}
    twice = {pair["support"] for record in records.values() for pair in record.also_tested or ()}
    odd = {"images skipped": skipped, "support images tested too": twice}
    parts += [f"{what}: {len(images):,}" for what, images in odd.items() if images]
    return ", ".join([*parts, "its loss rose"] if metrics.rose else parts)


@contextmanager
def computing_with(count: int) -> Iterator[None]:
    """Compute with so many threads: the number may change the last bits of a result."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


@dataclass(eq=False)
class Worker:
    """Does runs, one at a time."""

    do: Callable[[PlannedRun | None], Answer]  # asks for what `Session.do` returns
    stop: Callable[[], object] = lambda: None  # between two steps, as far as it can
    kill: Callable[[], object] = lambda: None  # at once
    run: PlannedRun | None = None  # what it was last asked to do; None: whether it is there
    since: float = 0.0  # when that was


def here(session: Session) -> Worker:
    """This process: what it is asked is done at once."""

    def do(run: PlannedRun | None) -> Answer:
        told: Answer = Future()
        told.set_result(session.do(run))
        return told

    return Worker(do)


def process(threads: int) -> Worker:
    """A process of this machine with its own backbone; it dies with this one."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    started = context.Process(target=_serve, args=(theirs, threads, plugins.files()), daemon=True)
    # Ctrl-C reaches the whole process group; who is not tuning must not die of it with a
    # traceback, and is told to stop by this process.
    with answering(signal.SIGINT, signal.SIG_IGN):
        started.start()
    theirs.close()  # so that the pipe ends where the process does
    thread = ThreadPoolExecutor(1)

    def ask(run: PlannedRun | None) -> Outcome:
        pipe.send(run)
        return pipe.recv()

    return Worker(lambda run: thread.submit(ask, run), started.terminate, started.kill)


def _serve(pipe: Connection, threads: int, plugins: Sequence[str]) -> None:
    """A worker process: do what comes through the pipe, until something stops the grid."""

    def end() -> None:  # with a grid that was killed; a run may be cut off at any moment
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end, daemon=True).start()
    session, told = Session(threads=threads, plugins=plugins), None
    with suppress(EOFError, OSError):  # nobody is there any more
        while not isinstance(told, BaseException):
            told = session.do(pipe.recv())
            pipe.send(told)


@contextmanager
def answering(number: signal.Signals, answer: Any) -> Iterator[None]:
    """Answer a signal otherwise for a while; only the main thread can."""
    able = threading.current_thread() is threading.main_thread()
    before = signal.signal(number, answer) if able else None
    try:
        yield
    finally:
        if able:
            signal.signal(number, before)


@contextmanager
def cluster(address: str, threads: int | None) -> Iterator[tuple[Callable[[], Worker], int]]:
    """How to hire actors on a Ray cluster whose nodes share the results folder, and how many.

    The address ``local`` starts one on this machine. By default a worker has as many threads as
    the smallest node has cores. A `UserError`, if Ray is not installed, does not answer, or has no
    node with so many cores.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(f"`ray` needs Ray: {install('ray')}") from error
    if begun := not ray.is_initialized():
        dashboard = False if address == "local" else None
        quiet: Any = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            ray.init(address, include_dashboard=dashboard, **quiet)
        except Exception as error:  # where it takes too long to start, of no kind of its own
            reason = reason_of(error)
            raise UserError(f"`ray` {address}: no cluster answers there ({reason})") from error
    try:
        cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node.get("Alive")]
        each = threads or min((c for c in cores if c), default=1)
        room = sum(c // each for c in cores)
        if not room:
            raise UserError(f"no node of the cluster has {each} CPUs; give fewer `threads`")
        # Ray hides GPUs from those that ask for none.
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        remote = ray.remote(num_cpus=each, num_gpus=gpus, max_restarts=0, max_task_retries=0)

        def hire() -> Worker:  # ready when some node has room for it
            actor: Any = remote(Session).remote(threads=each, plugins=plugins.files())

            def end() -> None:  # where it is: the last checkpoint stays
                with suppress(Exception):
                    ray.kill(actor)

            return Worker(lambda run: actor.do.remote(run).future(), end, end)

        yield hire, room
    finally:
        if begun:
            ray.shutdown()
