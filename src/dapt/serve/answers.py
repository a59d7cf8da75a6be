"""How the images of requests wait for decoders and the model, and what they are answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import anyio
import numpy as np
from fastapi import Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from dapt.data import TooManyPixels
from dapt.errors import UserError
from dapt.predict import best, named
from dapt.serve.decoders import Decoders
from dapt.serve.feedback import Feedback
from dapt.serve.served import Answer, Served
from dapt.serve.uploads import Limits, uploaded

_AGAIN = {"Retry-After": "1"}


class Batcher:
    """Does what requests ask in one thread that owns the model, and bounds how much that may be.

    A batch is whatever is waiting once the model is free: alone, an image waits for nobody but
    some milliseconds; under load batches fill up by themselves.
    """

    def __init__(self, served: Served, limits: Limits, registry: CollectorRegistry) -> None:
        self._served, self._limits, self._admitted = served, limits, 0
        # Views, each with what says which batch it is in, at which place, once that has begun.
        self._waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future]] = asyncio.Queue()
        about = "Images admitted that wait for an answer."
        how: dict[str, Any] = {"registry": registry, "multiprocess_mode": "livesum"}
        self._gauge = Gauge("dapt_queue_images", about, **how)
        about, sizes = "Images the model took at a time.", [2**i for i in range(8)]
        self._sizes = Histogram("dapt_batch_images", about, buckets=sizes, registry=registry)

    @contextmanager
    def admission(self, count: int) -> Iterator[None]:
        """Room for ``count`` images until the block is left; an `HTTPException` without."""
        if self._admitted + count > self._limits.queue:
            raise HTTPException(429, "too many images are waiting; try again", _AGAIN)
        self._admitted += count
        self._gauge.set(self._admitted)
        try:
            yield
        finally:
            self._admitted -= count
            self._gauge.set(self._admitted)

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


class Answers:
    """The threads that answer the requests of one server, from a body to what is sent back."""

    def __init__(self, served: Served, limits: Limits, registry: CollectorRegistry) -> None:
        self._served, self._limits = served, limits
        self.batcher = Batcher(served, limits, registry)
        times = {"seconds": limits.decode, "patience": limits.timeout}
        views = served.classifier.of_views()
        self.decoders = Decoders(views, limits.pixels, registry, **times)
        about = "Images received, by what came of them."
        self._counted = Counter("dapt_images", about, ("result",), registry=registry)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Its threads and processes live as long as this block."""
        self.decoders.start()
        model = asyncio.create_task(self.batcher.run())
        yield
        self.decoders.close()
        model.cancel()

    @asynccontextmanager
    async def images(self, request: Request) -> AsyncIterator[list[UploadFile]]:
        """A request's image files, while there is room and time for them.

        What is wrong with them (400, 413), a full server (429) and one that takes too long (503)
        are each an `HTTPException`.
        """
        until = anyio.current_time() + self._limits.timeout
        with self.batcher.admission(1):  # a full server says so before it reads an upload
            pass
        try:
            async with uploaded(request, self._limits) as files:
                left = until - anyio.current_time()
                with self.batcher.admission(len(files)), anyio.fail_after(left):
                    yield files
        except UserError as error:
            status = 413 if isinstance(error, TooManyPixels) else 400
            raise HTTPException(status, str(error)) from error
        except TimeoutError:
            said = f"no answer within {self._limits.timeout:g} s; try again"
            raise HTTPException(503, said, _AGAIN) from None

    async def predict(self, request: Request, top: int, nearest: int) -> list[dict[str, Any]]:
        """What each image of a request most likely shows, and the support images like it."""
        async with self.images(request) as files:
            how = (top, nearest, len(files) == 1, request.scope["root_path"])
            return await asyncio.gather(*(self._entry(f, i, *how) for i, f in enumerate(files, 1)))

    async def keep(self, request: Request, feedback: Feedback, name: str) -> int:
        """Keep a request's photos as ones of a class; how many. None is kept if one is no image."""
        async with self.images(request) as files:
            for place, file in enumerate(files, 1):
                await self._view(file, f"{place}")
            photos = [(file.file.seek(0), file.file.read())[1] for file in files]
            kept = await anyio.to_thread.run_sync(feedback.keep, photos, name)
        if not kept:
            raise HTTPException(507, "there is no more room for photos; tell who runs the server")
        return len(photos)

    async def _view(self, file: UploadFile, name: str) -> np.ndarray:
        work = partial(self.decoders.view, file.file, name)
        return await asyncio.get_running_loop().run_in_executor(self.decoders.threads, work)

    async def _entry(
        self, file: UploadFile, place: int, top: int, near: int, alone: bool, below: str
    ) -> dict[str, Any]:
        """One image's part of an answer, links ``below`` a path; of several, errors are told."""
        name = "".join(c for c in (file.filename or "")[:200] if c.isprintable()) or str(place)
        try:
            probabilities, cosines = await self.batcher.answer(await self._view(file, name))
        except UserError as error:
            self._counted.labels("error").inc()
            if alone:
                raise
            return {"file": name, "error": str(error)}
        self._counted.labels("ok").inc()
        served = self._served
        (classes,) = named(probabilities[None], served.class_names, served.thresholds, top)
        (places,) = best(cosines[None], range(len(cosines)), near)
        ranked = [{"class": name, "probability": p} for name, p in classes]
        names = served.support.class_names if served.support else ()
        nearest = [
            {"image": f"{below}/support/{i}", "class": names[i], "cosine": c} for i, c in places
        ]
        return {"file": name, "classes": ranked} | ({"nearest": nearest} if nearest else {})
