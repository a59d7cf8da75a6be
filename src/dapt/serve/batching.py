"""Work of many requests done in batches, in one thread that owns the model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from prometheus_client import CollectorRegistry, Gauge, Histogram
from starlette.exceptions import HTTPException

from dapt.serve.served import Answer, Served
from dapt.serve.uploads import AGAIN, Limits


class Batcher:
    """Batches what several requests ask, and bounds how much of it there may be.

    A batch is whatever is waiting once the model is free: alone, an image waits for nobody but
    some milliseconds; under load batches fill up by themselves.

    Args:
        served: the model; only ever called in one thread.
        limits: most images a batch, and most that have been admitted and not left yet.
        registry: of metrics, which get to know both.
    """

    def __init__(self, served: Served, limits: Limits, registry: CollectorRegistry) -> None:
        self._served, self._limits, self._admitted = served, limits, 0
        # Views, each with what says which batch it is in, at which place, once that has begun.
        self._waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future]] = asyncio.Queue()
        about = "Images admitted that wait for an answer."
        gauge = Gauge("dapt_queue_images", about, registry=registry)
        gauge.set_function(lambda: self._admitted)
        about, sizes = "Images the model took at a time.", [2**i for i in range(8)]
        self._sizes = Histogram("dapt_batch_images", about, buckets=sizes, registry=registry)

    @contextmanager
    def admission(self, count: int) -> Iterator[None]:
        """Room for ``count`` images until the block is left.

        Raises:
            HTTPException: 429, there is none.
        """
        if self._admitted + count > self._limits.queue:
            raise HTTPException(429, "too many images are waiting; try again", AGAIN)
        self._admitted += count
        try:
            yield
        finally:
            self._admitted -= count

    async def answer(self, view: np.ndarray) -> Answer:
        """What the model makes of a view; to cancel this spares the work if that has not begun."""
        begun = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((view, begun))
        batch, place = await begun
        return (await asyncio.shield(batch))[place]

    async def run(self) -> None:
        """Do the work, until this is cancelled. A batch that fails, fails those who wait for it."""
        loop, size = asyncio.get_running_loop(), self._limits.batch
        with ThreadPoolExecutor(1, "dapt-model") as model:
            while True:
                found = [await self._waiting.get()]
                if self._waiting.qsize() < size - 1:
                    await asyncio.sleep(0.003)  # for others
                while len(found) < size and not self._waiting.empty():
                    found.append(self._waiting.get_nowait())
                if wanted := [one for one in found if not one[1].cancelled()]:
                    self._sizes.observe(len(wanted))
                    views = [view for view, _ in wanted]
                    batch = loop.run_in_executor(model, self._served.answers, views)
                    for place, (_, begun) in enumerate(wanted):
                        begun.set_result((batch, place))
                    await asyncio.wait([batch])
