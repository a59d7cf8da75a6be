"""Who does the runs: this process, several, or a Ray cluster; all look the same from outside."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from dapt.errors import UserError, reason_of
from dapt.grid.plan import PlannedRun
from dapt.grid.work import Outcome, Session, execute, threads
from dapt.progress import Reporter
from dapt.run.train import Interrupted

READY = Outcome("ready")
DIED = Outcome("died")
STOPPED = Outcome("stopped")

# Seconds that workers get to reach the end of a step.
_PATIENCE = 60


class Crew(Protocol):
    """Workers that do runs. A worker is a number; what becomes of its work is told by `wait`."""

    def hire(self) -> None:
        """Start one more worker; `wait` tells when it is `READY`, or that it `DIED`."""

    def give(self, worker: int, run: PlannedRun) -> None:
        """Let a ready worker do a run."""

    def wait(self, seconds: float) -> list[tuple[int, Outcome]]:
        """What happened, for at most so many seconds if nothing does."""

    def dismiss(self) -> None:
        """Stop all workers between two steps, as far as they can."""


class Alone:
    """This process does the runs, one after another."""

    def __init__(self, session: Session, reporter: Reporter) -> None:
        self.session, self.reporter = session, reporter
        self._told: list[tuple[int, Outcome]] = []

    def hire(self) -> None:
        """This process is ready at once."""
        self._told.append((0, READY))

    def give(self, worker: int, run: PlannedRun) -> None:
        """Do it now."""
        self._told.append((worker, execute(run, self.session, self.reporter)))

    def wait(self, seconds: float) -> list[tuple[int, Outcome]]:
        """What `give` found."""
        told, self._told = self._told, []
        return told

    def dismiss(self) -> None:
        """Nothing to stop."""


class Processes:
    """Processes of this machine, each with its own backbone and ``count`` threads."""

    def __init__(self, count: int) -> None:
        self.threads = count
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, tuple[Any, Connection]] = {}
        self._hired = 0

    def hire(self) -> None:
        """Start a process; it dies with this one."""
        here, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there, self.threads), daemon=True)
        # Ctrl-C reaches the whole process group; who is not tuning must not die of it with a
        # traceback, and is told to stop by this process.
        with _ignoring_interrupts():
            process.start()
        there.close()
        self._workers[self._hired] = process, here
        self._hired += 1

    def give(self, worker: int, run: PlannedRun) -> None:
        """Send the run; a worker that is gone is noticed by `wait`."""
        with suppress(OSError):
            self._workers[worker][1].send(run)

    def wait(self, seconds: float) -> list[tuple[int, Outcome]]:
        """Outcomes, and deaths: the pipe of a dead process is at its end."""
        told: list[tuple[int, Outcome]] = []
        pipes = {pipe: worker for worker, (_, pipe) in self._workers.items()}
        for pipe in wait(list(pipes), seconds):
            assert isinstance(pipe, Connection)
            worker = pipes[pipe]
            try:
                outcome = pipe.recv()
            except (EOFError, OSError):
                process, _ = self._workers.pop(worker)
                process.join()
                outcome = DIED
            if outcome == STOPPED:  # Ctrl-C reached it before it reached us
                raise Interrupted
            if isinstance(outcome, BaseException):
                raise outcome
            told.append((worker, outcome))
        return told

    def dismiss(self) -> None:
        """Ask all to stop, and end those that do not."""
        for process, pipe in self._workers.values():
            pipe.close()
            process.terminate()
        for process, _ in self._workers.values():
            process.join(_PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers.clear()


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(pipe: Connection, count: int) -> None:
    """A worker process: do what comes through the pipe until it is closed."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    session = Session()
    with threads(count):
        pipe.send(READY)
        while True:
            try:
                run = pipe.recv()
            except (EOFError, OSError):
                return
            told: Outcome | Exception
            try:
                told = execute(run, session, Reporter())
            except (Interrupted, KeyboardInterrupt):
                told = STOPPED
            except OSError as error:  # nothing can be written: for the whole grid to know
                told = error
            with suppress(OSError):
                pipe.send(told)


def _die_with_parent() -> None:
    """A grid that was killed leaves no process behind; a run may be cut off at any moment."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class RayCrew:
    """Actors on a Ray cluster whose nodes share the results folder.

    Args:
        address: of the cluster; ``local`` starts one on this machine.
        count: threads of a worker; by default all cores of the smallest node.

    Raises:
        UserError: Ray is not installed or does not answer.
    """

    def __init__(self, address: str, count: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError("--ray needs Ray: pip install 'dapt[ray]'") from error
        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
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
        cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node.get("Alive")]
        cores = [c for c in cores if c] or [1]
        self.threads = count or min(cores)
        self.room = sum(c // self.threads for c in cores)
        if not self.room:
            self.dismiss()
            raise UserError(
                f"no node of the cluster has {self.threads} CPUs; give a smaller --threads"
            )
        self._actor: Any = ray.remote(
            num_cpus=self.threads,
            # Ray hides GPUs from those that ask for none.
            num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
            max_restarts=0,
            max_task_retries=0,
        )(_Actor)
        self._actors: dict[int, Any] = {}
        self._asked: dict[Any, int] = {}
        self._hired = 0

    def hire(self) -> None:
        """Ask for an actor; it is ready when some node has room for it."""
        actor = self._actor.remote(self.threads)
        self._actors[self._hired] = actor
        self._asked[actor.ready.remote()] = self._hired
        self._hired += 1

    def give(self, worker: int, run: PlannedRun) -> None:
        """Send the run."""
        self._asked[self._actors[worker].run.remote(run)] = worker

    def wait(self, seconds: float) -> list[tuple[int, Outcome]]:
        """Outcomes, and deaths: of an actor, by a lack of memory too, or of the node it was on."""
        from ray.exceptions import RayError, RayTaskError

        told: list[tuple[int, Outcome]] = []
        ready, _ = self._ray.wait(list(self._asked), timeout=seconds)
        for reference in ready:
            worker = self._asked.pop(reference)
            try:
                outcome = self._ray.get(reference)
            except RayTaskError as error:
                raise error.as_instanceof_cause() from None
            except RayError:
                self._ray.kill(self._actors.pop(worker))  # as a node may only be out of reach
                outcome = DIED
            told.append((worker, outcome))
        return told

    def dismiss(self) -> None:
        """End the actors where they are (the last checkpoint stays), and leave the cluster."""
        for actor in getattr(self, "_actors", {}).values():
            with suppress(Exception):
                self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()


class _Actor:
    """A worker on a node of a Ray cluster."""

    def __init__(self, count: int) -> None:
        # For as long as the actor lives.
        threads(count).__enter__()
        self.session = Session()

    def ready(self) -> Outcome:
        """Answers once the actor is there."""
        return READY

    def run(self, run: PlannedRun) -> Outcome:
        """Do a run."""
        return execute(run, self.session, Reporter())
