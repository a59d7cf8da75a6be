"""Work of many requests done in batches, by one thread that owns the model."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Generic, TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


class QueueFull(Exception):
    """There is no room for more; try again later."""


class Batcher(Generic[Given, Made]):
    """Batches what several threads submit, and bounds how much of it there may be.

    A batch is whatever is waiting once the model is free: alone, an item waits for nobody but
    ``wait`` seconds; under load batches fill up by themselves.

    Args:
        work: n items -> n results in their order; only ever called in the batcher's thread.
        size: most items a batch.
        limit: most items that have been admitted and not left yet.
        wait: seconds that a batch is kept open for others.
        observe: is told the size of each batch.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Given]], Sequence[Made]],
        *,
        size: int,
        limit: int,
        wait: float = 0.003,
        observe: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._work, self._size, self._limit, self._wait = work, size, limit, wait
        self._observe = observe
        self._waiting: queue.SimpleQueue[tuple[Given, Future[Made]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._admitted = 0
        self._thread = threading.Thread(target=self._run, name="dapt-model", daemon=True)

    @property
    def admitted(self) -> int:
        """Items that have been admitted and not left yet."""
        return self._admitted

    @property
    def alive(self) -> bool:
        """Whether the thread is there to do the work."""
        return self._thread.is_alive()

    @contextmanager
    def admission(self, count: int) -> Iterator[None]:
        """Room for ``count`` items until the block is left.

        Raises:
            QueueFull: there is none.
        """
        with self._lock:
            if self._admitted + count > self._limit:
                raise QueueFull
            self._admitted += count
        try:
            yield
        finally:
            with self._lock:
                self._admitted -= count

    def submit(self, item: Given) -> Future[Made]:
        """The result that will be; cancelling it spares the work if that has not begun."""
        future: Future[Made] = Future()
        self._waiting.put((item, future))
        return future

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """Finish what was submitted, and end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        last = False
        while not last:
            first = self._waiting.get()
            if first is None:
                return
            batch, until = [first], time.monotonic() + self._wait
            while len(batch) < self._size:
                try:
                    found = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if found is None:
                    last = True
                    break
                batch.append(found)
            self._do([one for one in batch if one[1].set_running_or_notify_cancel()])

    def _do(self, batch: list[tuple[Given, Future[Made]]]) -> None:
        if not batch:
            return
        self._observe(len(batch))
        try:
            made = self._work([item for item, _ in batch])
        except Exception as error:  # told to those who wait; the next batch may do better
            for _, future in batch:
                future.set_exception(error)
        else:
            for (_, future), result in zip(batch, made, strict=True):
                future.set_result(result)
