"""What a request may send, how its images wait for the model, and the routes that answer it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import anyio
import numpy as np
import yaml
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, exposition
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message

from dapt import __version__
from dapt.data import TooManyPixels
from dapt.errors import UserError, printable
from dapt.predict import best, named
from dapt.serve import bodies
from dapt.serve.decoders import Decoders
from dapt.serve.feedback import Feedback
from dapt.serve.served import Answer, Served

_STATIC = Path(__file__).with_name("static")
_FIELD, _MULTIPART = "images", "multipart/form-data"
_AGAIN = {"Retry-After": "1"}
_FORECAST = {"images", "accuracy", "low", "high", "confused", "advice"}  # of its record, told
_Json = dict[str, Any]  # of the shape that api.yaml tells


@dataclass(frozen=True)
class Limits:
    """Bounds of a server."""

    upload: int = 20 * 2**20  # bytes of a request
    pixels: int = 50_000_000  # width x height of an image
    images: int = 32  # of a request
    queue: int = 128  # images of all requests that wait for an answer
    batch: int = 32  # images that the model takes at a time
    timeout: float = 30.0  # seconds that a request may take in all
    connections: int = 128  # clients at a time
    decode: float = 10.0  # seconds of computing that an image may take to decode


def _kind(request: Request) -> str:
    """The media type of a body that holds images; an `HTTPException` (415) of others."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (_MULTIPART, bodies.JSON) and not bodies.is_whole(kind):
        said = f"send images as {_MULTIPART}, in fields named '{_FIELD}'; one image as it is, "
        raise HTTPException(415, f"{said}with a type such as image/jpeg; or base64 in JSON")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise HTTPException(415, "send the body as it is, without a Content-Encoding")
    return kind


@asynccontextmanager
async def uploaded(request: Request, limits: Limits) -> AsyncIterator[list[UploadFile]]:
    """The image files of a request, in order; what is over 1 MB waits on disk.

    They come as multipart, in JSON, or one as it is. Bytes are counted as they arrive. An
    `HTTPException` (400, 408, 413, 415) has a sentence.
    """
    kind = _kind(request)
    said = f"a request may hold {limits.upload:,} bytes; send smaller images, or fewer at a time"
    too_large = HTTPException(413, said)
    length, seen = request.headers.get("content-length", ""), 0
    if length.isdecimal() and int(length) > limits.upload:
        raise too_large

    async def receive() -> Message:
        nonlocal seen
        message = await request.receive()
        seen += len(message.get("body", b""))
        if seen > limits.upload:
            raise too_large
        return message

    # Other fields are not kept, so a few are no harm; what they hold is bounded too.
    most = {"max_files": limits.images, "max_fields": 16, "max_part_size": 2**16}
    inner, whole, form = Request(request.scope, receive), bodies.on_disk(), FormData()
    try:
        with anyio.fail_after(limits.timeout):
            if kind == _MULTIPART:
                form = await inner.form(**most)
            else:
                async for piece in inner.stream():
                    whole.write(piece)
    except TimeoutError:
        said = f"the request did not arrive within {limits.timeout:g} s; send less at a time"
        raise HTTPException(408, said) from None
    except ClientDisconnect:
        raise HTTPException(400, "the request ended early") from None
    except (HTTPException, FormParserError) as error:  # not every starlette makes them the first
        if error is too_large:
            raise
        said = error.detail if isinstance(error, HTTPException) else str(error)
        if said.startswith("Too many files"):
            said = f"a request may hold {limits.images} images; send the others in another"
            raise HTTPException(413, said) from error
        raise HTTPException(400, f"the form cannot be read: {printable(said)}") from error
    whole.seek(0)
    files = [UploadFile(whole)] if bodies.is_whole(kind) else []
    try:
        if kind == bodies.JSON:
            sent = partial(bodies.images_in_json, whole, limits.images)
            files += await anyio.to_thread.run_sync(sent, limiter=request.app.state.few)
        for name, value in form.multi_items():
            if name != _FIELD or not isinstance(value, UploadFile):
                said = f"field '{printable(name[:40])}' is no image"
                raise HTTPException(400, f"{said}; send files in fields named '{_FIELD}'")
            files.append(value)
        if not files:
            raise HTTPException(400, f"no images given; send files in fields named '{_FIELD}'")
        yield files
    finally:
        for opened in (*files, UploadFile(whole)):
            await opened.close()
        await form.close()


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


def _page(name: str, request: Request) -> Response:
    """A page, whose links are relative; where its path is known, to that."""
    if not (below := request.scope["root_path"]):
        return FileResponse(_STATIC / name)
    text = (_STATIC / name).read_text("utf-8")
    return HTMLResponse(text.replace("<head>", f'<head>\n<base href="{below}/">', 1))


def create_app(
    served: Served,
    limits: Limits,
    registry: CollectorRegistry,
    ready: Callable[[], None],
    feedback: Feedback | None = None,
) -> FastAPI:
    """The application, as ``api.yaml`` describes it; its lifespan is that of its threads.

    Metrics are of ``registry``, and ``ready`` is called once requests can be answered. Corrected
    photos go to ``feedback``. Long, because the routes share what is made here.
    """
    shown = served.support
    names, pictures = (shown.class_names, shown.pictures) if shown else ((), ())
    batcher = Batcher(served, limits, registry)
    about = "Images received, by what came of them."
    counted = Counter("dapt_images", about, ("result",), registry=registry)
    times = {"seconds": limits.decode, "patience": limits.timeout}
    decoders = Decoders(served.classifier.of_views(), limits.pixels, registry, **times)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        decoders.start()
        model = asyncio.create_task(batcher.run())
        ready()
        yield
        decoders.close()
        model.cancel()

    about = f"Classifies images into the {len(served.class_names):,} classes of the run"
    info = {"title": "dapt", "version": __version__, "description": f"{about} '{served.name}'."}
    described = {"info": info, **yaml.safe_load(_STATIC.with_name("api.yaml").read_text("utf-8"))}
    how: dict[str, Any] = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}
    app = FastAPI(**how, lifespan=lifespan)
    app.state.decoders = decoders
    # Bodies of JSON that are taken apart at a time: each stands in memory, and again decoded.
    app.state.few = anyio.CapacityLimiter(2)
    app.openapi = lambda: described  # type: ignore[method-assign]
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")

    async def entry(
        file: UploadFile, place: int, top: int, near: int, alone: bool, below: str
    ) -> _Json:
        name = "".join(c for c in (file.filename or "")[:200] if c.isprintable()) or str(place)
        loop = asyncio.get_running_loop()
        try:
            view = await loop.run_in_executor(decoders.threads, decoders.view, file.file, name)
            probabilities, cosines = await batcher.answer(view)
        except UserError as error:
            counted.labels("error").inc()
            if alone:
                status = 413 if isinstance(error, TooManyPixels) else 400
                raise HTTPException(status, str(error)) from error
            return {"file": name, "error": str(error)}
        counted.labels("ok").inc()
        (classes,) = named(probabilities[None], served.class_names, served.thresholds, top)
        (places,) = best(cosines[None], range(len(cosines)), near)
        ranked = [{"class": name, "probability": p} for name, p in classes]
        nearest = [
            {"image": f"{below}/support/{i}", "class": names[i], "cosine": c} for i, c in places
        ]
        return {"file": name, "classes": ranked} | ({"nearest": nearest} if nearest else {})

    @app.post("/predict")
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1)] = 5,
        nearest: Annotated[int, Query(ge=0, le=50)] = 0,
    ) -> _Json:
        until = anyio.current_time() + limits.timeout
        with batcher.admission(1):  # a full server says so before it reads an upload
            pass
        try:
            async with uploaded(request, limits) as files:
                with batcher.admission(len(files)), anyio.fail_after(until - anyio.current_time()):
                    how = (top, nearest, len(files) == 1, request.scope["root_path"])
                    work = (entry(f, i, *how) for i, f in enumerate(files, 1))
                    return {"predictions": await asyncio.gather(*work)}
        except TimeoutError:
            said = f"no answer within {limits.timeout:g} s; try again"
            raise HTTPException(503, said, _AGAIN) from None

    @app.post("/feedback")
    async def correct(request: Request, name: Annotated[str, Query(alias="class")]) -> _Json:
        if feedback is None:
            said = "this server keeps no photos; 'dapt serve --feedback FOLDER' would"
            raise HTTPException(404, said)
        if name not in served.class_names:
            raise HTTPException(400, f"'{printable(name[:40])}' is no class; /classes lists them")
        with batcher.admission(1):
            pass
        until, loop = anyio.current_time() + limits.timeout, asyncio.get_running_loop()
        try:
            async with uploaded(request, limits) as files:
                with batcher.admission(len(files)), anyio.fail_after(until - anyio.current_time()):
                    for place, file in enumerate(files, 1):  # none is kept if one is no image
                        decode = partial(decoders.view, file.file, f"{place}")
                        await loop.run_in_executor(decoders.threads, decode)
                    photos = [(file.file.seek(0), file.file.read())[1] for file in files]
                    kept = await anyio.to_thread.run_sync(feedback.keep, photos, name)
        except UserError as error:
            status = 413 if isinstance(error, TooManyPixels) else 400
            raise HTTPException(status, str(error)) from error
        except TimeoutError:
            said = f"not kept within {limits.timeout:g} s; try again"
            raise HTTPException(503, said, _AGAIN) from None
        if not kept:
            raise HTTPException(507, "there is no more room for photos; tell who runs the server")
        return {"kept": len(photos)}

    @app.get("/classes")
    async def classes() -> _Json:
        bounds = {"upload_bytes": limits.upload, "images": limits.images, "pixels": limits.pixels}
        about = {"run": served.name, "method": served.method, "backbone": served.backbone}
        found: _Json = {"classes": served.class_names, "support_images": len(pictures)}
        if (told := served.forecast) is not None:
            found["forecast"] = told.model_dump(include=_FORECAST)
        if served.warning:
            found["warning"] = served.warning
        return {**about, **found, "feedback": feedback is not None, "limits": bounds}

    @app.get("/support/{number}")
    async def picture(number: int) -> Response:
        if not 0 <= number < len(pictures):
            raise HTTPException(404, f"there is no support image {number}")
        return Response(pictures[number], media_type="image/jpeg")

    @app.get("/healthz")
    async def healthz(response: Response) -> _Json:
        if not (stuck := decoders.stuck):
            return {"status": "ok"}
        response.status_code = 503 if stuck == decoders.count else 200  # nobody else is answered
        return {"status": "stuck", "stuck_decoders": stuck, "decoders": decoders.count}

    @app.get("/metrics")
    async def metrics() -> Response:
        latest = exposition.generate_latest(registry)
        return Response(latest, media_type=exposition.CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return _page("page.html", request)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return _page("docs.html", request)

    # To what is meant, by a name that is right below any path that a proxy may have taken off.
    @app.api_route("/{name}/", methods=["GET", "POST"], include_in_schema=False)
    async def slash(name: str, request: Request) -> Response:
        if f"/{name}" not in {"/docs", app.openapi_url, *described["paths"]}:
            raise HTTPException(404)
        query = f"?{request.url.query}" if request.url.query else ""
        return Response(status_code=307, headers={"location": f"../{name}{query}"})

    return app
