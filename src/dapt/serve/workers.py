"""Several processes that answer at one address, each with a model of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from prometheus_client.multiprocess import mark_process_dead

from dapt.errors import UserError
from dapt.methods import load_plugins
from dapt.progress import Reporter, RichReporter, errors, say
from dapt.run.directory import RunDirectory
from dapt.serve.app import Limits
from dapt.serve.served import load_served
from dapt.serve.server import SHARED_METRICS, make_server

_LOOK = 0.5  # seconds between two looks at whether to stop


@dataclass(frozen=True)
class Work:
    """What a worker serves, and how; ``who`` has what else `make_server` takes."""

    run: Path
    device: str | None
    nearest: bool
    limits: Limits
    who: dict[str, Any]
    plugins: Sequence[str] = ()  # files of the user's own methods


def serve(work: Work, count: int, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Serve in ``count`` processes until SIGINT or SIGTERM; all then finish what they accepted.

    ``ready`` is called once all answer. One that dies later is replaced; a `UserError` says why one
    could not begin. Bounds are those of each worker; metrics are of all.
    """
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    with TemporaryDirectory(prefix="dapt-metrics-") as folder:
        os.environ[SHARED_METRICS] = folder  # they all write there
        workers = _Workers(work, count, listening)
        try:
            workers.begin(stopping)
            if not stopping.is_set():
                ready()
            while not stopping.wait(_LOOK):
                workers.replace_dead()
        finally:
            workers.end()
            del os.environ[SHARED_METRICS]


class _Workers:
    def __init__(self, work: Work, count: int, listening: socket.socket) -> None:
        self.work, self.listening = work, listening
        self.threads = max(1, torch.get_num_threads() // count)
        self.pipes: dict[SpawnProcess, Connection] = {}
        for place in range(count):
            self.start(tells=place == 0)

    def start(self, tells: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        how = (self.work, self.listening, theirs, self.threads, tells)
        process = context.Process(target=_work, args=how, daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends where the process does
        self.pipes[process] = ours

    def begin(self, stopping: threading.Event) -> None:
        """Wait until all answer."""
        waiting = set(self.pipes.values())
        while waiting and not stopping.is_set():
            for pipe in waiting & set(wait(waiting, _LOOK)):
                waiting.discard(pipe)
                try:
                    said = str(pipe.recv())
                except EOFError:
                    said = "a worker ended before it could answer; start fewer with --workers"
                if said:
                    raise UserError(said)

    def replace_dead(self) -> None:
        for process in [one for one in self.pipes if not one.is_alive()]:
            del self.pipes[process]
            mark_process_dead(process.pid)
            say(f"dapt: a worker ended ({process.exitcode}); another is started", to=errors)
            self.start()

    def end(self) -> None:
        self.listening.close()  # with theirs, so that who comes now is refused
        for process in self.pipes:
            process.terminate()
        for process in self.pipes:
            process.join()


def _work(
    work: Work, listening: socket.socket, pipe: Connection, threads: int, tells: bool
) -> None:
    """A worker process: it tells that it answers, or a sentence of why it cannot."""

    def end() -> None:  # with a parent that was killed
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end, daemon=True).start()
    torch.set_num_threads(threads)
    how: dict[str, Any] = {"device": work.device, "nearest": work.nearest}
    try:
        load_plugins(work.plugins)
        told = RichReporter() if tells else Reporter()
        served = load_served(RunDirectory(work.run), reporter=told, **how)
    except UserError as error:
        pipe.send(str(error))
        return
    ready = lambda: pipe.send("")  # noqa: E731
    made = make_server(served, listening, work.limits, **work.who, ready=ready)
    made.run(sockets=[listening])
