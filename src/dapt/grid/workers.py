"""Who does the runs: this process, processes of its own, or actors on a Ray cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

from dapt.errors import UserError, reason_of
from dapt.grid.plan import PlannedRun
from dapt.grid.work import Outcome, Session

# A run's outcome or, as a value too, what stops the whole grid.
Told = Outcome | BaseException


class Worker(Protocol):
    """Does runs, one at a time."""

    def do(self, run: PlannedRun | None) -> Future[Told]:
        """What `Session.do` finds of a run; a future that fails says that the worker died."""

    def end(self, *, now: bool = False) -> None:
        """Stop between two steps, as far as it can, or now; this does not wait for it."""


class Crew(NamedTuple):
    """How workers are hired, how many there is room for, and the threads of each."""

    hire: Callable[[], Worker]
    room: int
    threads: int


class Here:
    """This process: it is done when it is asked."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def do(self, run: PlannedRun | None) -> Future[Told]:
        """Do it now."""
        told: Future[Told] = Future()
        told.set_result(self.session.do(run))
        return told

    def end(self, *, now: bool = False) -> None:
        """Nothing to stop."""


class Process:
    """A process of this machine with its own backbone; it dies with this one."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        # Ctrl-C reaches the whole process group; who is not tuning must not die of it with a
        # traceback, and is told to stop by this process.
        with answering(signal.SIGINT, signal.SIG_IGN):
            self._process.start()
        theirs.close()  # so that the pipe ends where the process does
        self._thread = ThreadPoolExecutor(1)

    def do(self, run: PlannedRun | None) -> Future[Told]:
        """Send the run, and wait for the answer in a thread."""
        return self._thread.submit(self._ask, run)

    def _ask(self, run: PlannedRun | None) -> Told:
        self._pipe.send(run)
        return self._pipe.recv()

    def end(self, *, now: bool = False) -> None:
        """Send a signal."""
        (self._process.kill if now else self._process.terminate)()


def _serve(pipe: Connection, threads: int) -> None:
    """A worker process: do what comes through the pipe, until something stops the grid."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    session, told = Session(threads=threads), None
    with suppress(EOFError, OSError):  # this grid is no more
        while not isinstance(told, BaseException):
            told = session.do(pipe.recv())
            pipe.send(told)


def _die_with_parent() -> None:
    """A grid that was killed leaves no process behind; a run may be cut off at any moment."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


@contextmanager
def answering(number: signal.Signals, answer: Any) -> Iterator[None]:
    """Answer a signal otherwise for a while; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, answer)
    try:
        yield
    finally:
        signal.signal(number, before)


class Actor:
    """A worker on some node of a Ray cluster, ready when there is room for it."""

    def __init__(self, remote: Any, threads: int) -> None:
        self._actor = remote.remote(threads=threads)

    def do(self, run: PlannedRun | None) -> Future[Told]:
        """Send the run; Ray tells of a lack of memory, or of a lost node."""
        return self._actor.do.remote(run).future()

    def end(self, *, now: bool = False) -> None:
        """End it where it is: the last checkpoint stays."""
        import ray

        with suppress(Exception):
            ray.kill(self._actor)


@contextmanager
def cluster(address: str, threads: int | None = None) -> Iterator[Crew]:
    """Actors on a Ray cluster whose nodes share the results folder.

    Args:
        address: of the cluster; ``local`` starts one on this machine.
        threads: of a worker; by default all cores of the smallest node.

    Raises:
        UserError: Ray is not installed or does not answer, or no node has so many cores.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray needs Ray: pip install 'dapt[ray]'") from error
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(
                address=address,
                include_dashboard=False if address == "local" else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--ray {address}: no cluster answers there ({reason_of(error)})"
            ) from error
    try:
        cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node.get("Alive")]
        cores = [c for c in cores if c] or [1]
        threads = threads or min(cores)
        room = sum(c // threads for c in cores)
        if not room:
            raise UserError(f"no node of the cluster has {threads} CPUs; give a smaller --threads")
        # Ray hides GPUs from those that ask for none.
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        options = {"num_cpus": threads, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
        yield Crew(partial(Actor, ray.remote(**options)(Session), threads), room, threads)
    finally:
        if started:
            ray.shutdown()
