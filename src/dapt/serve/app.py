"""The routes: predictions, classes, support images, health, metrics, and the pages."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import anyio
import numpy as np
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from dapt import __version__
from dapt.data import TooManyPixels
from dapt.errors import UserError
from dapt.predict import best_classes
from dapt.serve.batching import Batcher, QueueFull
from dapt.serve.gate import Gate, Metrics
from dapt.serve.served import Answer, Served
from dapt.serve.uploads import FIELD, Limits, uploaded

_STATIC = Path(__file__).with_name("static")
_AGAIN = {"Retry-After": "1"}


class RankedClass(BaseModel):
    """A class and how probable it is."""

    name: str = Field(alias="class")
    probability: float


class Neighbour(BaseModel):
    """A support image and the cosine of its features with the photo's."""

    image: str = Field(description="Where the picture is.")
    name: str = Field(alias="class")
    cosine: float


class Prediction(BaseModel):
    """What came of one image: classes, best first, or an error."""

    file: str
    classes: list[RankedClass] = []
    nearest: list[Neighbour] = []
    error: str | None = Field(default=None, description="Why the image could not be classified.")


class Predictions(BaseModel):
    """One entry an image, in the order they were sent."""

    predictions: list[Prediction]


class Problem(BaseModel):
    """Why a request was refused, in a sentence."""

    detail: str


class Bounds(BaseModel):
    """What a request may hold."""

    upload_bytes: int
    images: int
    pixels: int


class Classes(BaseModel):
    """What is served."""

    run: str
    method: str
    backbone: str
    classes: list[str]
    support_images: int
    limits: Bounds


class Health(BaseModel):
    """Whether predictions are made."""

    status: str


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The only image, or the form, cannot be read."},
    401: {"model": Problem, "description": "The token is missing or wrong."},
    408: {"model": Problem, "description": "The request arrived too slowly."},
    413: {"model": Problem, "description": "Too many bytes, images or pixels."},
    415: {"model": Problem, "description": "The body is no form."},
    422: {"description": "A parameter is wrong."},
    429: {"model": Problem, "description": "Too much is waiting; see Retry-After."},
    503: {"model": Problem, "description": "It took too long; see Retry-After."},
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {
                        FIELD: {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "JPEG, PNG, WebP, GIF, BMP or AVIF files.",
                        }
                    },
                }
            }
        },
    }
}


def create_app(
    served: Served,
    limits: Limits | None = None,
    *,
    token: str | None = None,
    hosts: frozenset[str] = frozenset(),
    addresses: bool = False,
) -> FastAPI:
    """The application; its lifespan starts and ends the threads that do the work.

    Args:
        served: from `load_served`.
        limits: bounds; the defaults if not given.
        token, hosts, addresses: as for `Gate`.
    """
    limits = limits or Limits()
    metrics = Metrics()
    batcher: Batcher[np.ndarray, Answer] = Batcher(
        served.answers, size=limits.batch, limit=limits.queue, observe=metrics.batch.observe
    )
    metrics.queue.set_function(lambda: batcher.admitted)
    decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="dapt-images")

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        try:
            yield
        finally:
            decoders.shutdown(wait=True, cancel_futures=True)
            batcher.close()

    app = FastAPI(
        title="dapt",
        version=__version__,
        description=f"Classifies images into the {len(served.class_names):,} classes of the run "
        f"'{served.name}'.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )

    async def predicted(file: UploadFile, name: str, top: int, nearest: int) -> Prediction:
        loop = asyncio.get_running_loop()
        view = await loop.run_in_executor(decoders, served.view, file.file, name, limits.pixels)
        answer = await asyncio.wrap_future(batcher.submit(view))
        ranked = best_classes(answer.probabilities[None], served.class_names, top)[0]
        classes = [RankedClass.model_validate({"class": c, "probability": p}) for c, p in ranked]
        return Prediction(file=name, classes=classes, nearest=_nearest(served, answer, nearest))

    async def entry(file: UploadFile, name: str, top: int, nearest: int) -> Prediction | UserError:
        try:
            found: Prediction | UserError = await predicted(file, name, top, nearest)
        except UserError as error:
            found = error
        metrics.images.labels("error" if isinstance(found, UserError) else "ok").inc()
        return found

    @app.post(
        "/predict", responses=_PROBLEMS, openapi_extra=_BODY, response_model_exclude_defaults=True
    )
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1, description="Classes to name for each image.")] = 5,
        nearest: Annotated[
            int, Query(ge=0, le=50, description="Support images to name for each image.")
        ] = 0,
    ) -> Predictions:
        """Classify images.

        An image that cannot be read has an error in its entry; if it is the only one, the request
        is refused with 400, or with 413 if it has too many pixels.
        """
        until = anyio.current_time() + limits.timeout
        try:
            with batcher.admission(1):  # a full server says so before it reads an upload
                pass
            arrived = False
            with anyio.fail_after(until - anyio.current_time()):
                async with uploaded(request, limits) as files:
                    arrived = True
                    with batcher.admission(len(files)):
                        names = [_name(file, i) for i, file in enumerate(files, 1)]
                        work = zip(files, names, strict=True)
                        found = await asyncio.gather(*(entry(*w, top, nearest) for w in work))
        except QueueFull:
            raise HTTPException(429, "too many images are waiting; try again", _AGAIN) from None
        except TimeoutError:
            if not arrived:
                raise HTTPException(
                    408, f"the request did not arrive within {limits.timeout:g} s; send less at "
                    "a time"
                ) from None  # fmt: skip
            raise HTTPException(
                503, f"no answer within {limits.timeout:g} s; try again", _AGAIN
            ) from None
        if len(found) == 1 and isinstance(found[0], UserError):
            status = 413 if isinstance(found[0], TooManyPixels) else 400
            raise HTTPException(status, str(found[0]))
        entries = [
            Prediction(file=name, error=str(one)) if isinstance(one, UserError) else one
            for name, one in zip(names, found, strict=True)
        ]
        return Predictions(predictions=entries)

    @app.get("/classes", responses={401: _PROBLEMS[401]})
    async def classes() -> Classes:
        """Class names in label order, and what a request may hold."""
        return Classes(
            run=served.name,
            method=served.method,
            backbone=served.backbone,
            classes=list(served.class_names),
            support_images=len(served.support.pictures) if served.support else 0,
            limits=Bounds(upload_bytes=limits.upload, images=limits.images, pixels=limits.pixels),
        )

    @app.get(
        "/support/{number}",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}}, 401: _PROBLEMS[401],
                   404: {"model": Problem, "description": "There is no such support image."}},
    )  # fmt: skip
    async def support(number: int) -> Response:
        """A support image, small, as the model sees it."""
        pictures = served.support.pictures if served.support else ()
        if not 0 <= number < len(pictures):
            raise HTTPException(404, f"there is no support image {number}")
        return Response(pictures[number], media_type="image/jpeg")

    @app.get("/healthz", responses={503: {"model": Health, "description": "It does not."}})
    async def healthz(response: Response) -> Health:
        """Whether the server makes predictions; for load balancers."""
        response.status_code = 200 if batcher.alive else 503
        return Health(status="ok" if batcher.alive else "the model's thread has ended")

    @app.get("/metrics", response_class=PlainTextResponse, responses={401: _PROBLEMS[401]})
    async def prometheus() -> Response:
        """Metrics for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_STATIC / "page.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(_STATIC / "docs.html")

    app.mount("/static", StaticFiles(directory=_STATIC), name="static")

    @app.exception_handler(ClientDisconnect)
    async def gone(_request: Request, _error: Exception) -> Response:
        return JSONResponse({"detail": "the request ended early"}, 400)

    paths = ["/", "/docs", "/openapi.json", "/predict", "/classes", "/healthz", "/metrics"]
    app.add_middleware(
        Gate, metrics=metrics, paths=paths, token=token, hosts=hosts, addresses=addresses
    )
    return app


def _nearest(served: Served, answer: Answer, count: int) -> list[Neighbour]:
    """The ``count`` support images with the largest cosine, where there are any."""
    if served.support is None:
        return []
    cosines, places = answer.cosines.topk(min(count, len(answer.cosines)))
    names = served.support.class_names
    return [
        Neighbour.model_validate({"image": f"/support/{i}", "class": names[i], "cosine": cosine})
        for i, cosine in zip(places.tolist(), cosines.tolist(), strict=True)
    ]


def _name(file: UploadFile, number: int) -> str:
    """What the client calls a file, fit to be shown; its number where it has no name."""
    text = "".join(c for c in (file.filename or "")[:200] if c.isprintable())
    return text or str(number)
