"""Work of many requests done in batches, in one thread that owns the model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from starlette.exceptions import HTTPException

from dapt.serve.served import Answer, Served

AGAIN = {"Retry-After": "1"}

# Seconds that a batch is kept open for others.
_WAIT = 0.003


class Batcher:
    """Batches what several requests ask, and bounds how much of it there may be.

    A batch is whatever is waiting once the model is free: alone, an image waits for nobody but
    some milliseconds; under load batches fill up by themselves.

    Args:
        served: the model; only ever called in one thread.
        size: most images a batch.
        limit: most images that have been admitted and not left yet.
        observe: is told the size of each batch.
    """

    def __init__(
        self, served: Served, *, size: int, limit: int, observe: Callable[[int], None]
    ) -> None:
        self._served, self._size, self._limit, self._observe = served, size, limit, observe
        # Views, each with what says which batch it is in, at which place, once that has begun.
        self._waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future]] = asyncio.Queue()
        self.admitted = 0

    @contextmanager
    def admission(self, count: int) -> Iterator[None]:
        """Room for ``count`` images until the block is left.

        Raises:
            HTTPException: 429, there is none.
        """
        if self.admitted + count > self._limit:
            raise HTTPException(429, "too many images are waiting; try again", AGAIN)
        self.admitted += count
        try:
            yield
        finally:
            self.admitted -= count

    async def answer(self, view: np.ndarray) -> Answer:
        """What the model makes of a view; to cancel this spares the work if that has not begun."""
        begun = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((view, begun))
        batch, place = await begun
        return (await asyncio.shield(batch))[place]

    async def run(self) -> None:
        """Do the work, until this is cancelled. A batch that fails, fails those who wait for it."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "dapt-model") as model:
            while True:
                found = [await self._waiting.get()]
                if self._waiting.qsize() < self._size - 1:
                    await asyncio.sleep(_WAIT)
                while len(found) < self._size and not self._waiting.empty():
                    found.append(self._waiting.get_nowait())
                if wanted := [one for one in found if not one[1].cancelled()]:
                    self._observe(len(wanted))
                    views = [view for view, _ in wanted]
                    batch = loop.run_in_executor(model, self._served.answers, views)
                    for place, (_, begun) in enumerate(wanted):
                        begun.set_result((batch, place))
                    await asyncio.wait([batch])
