"""The routes: predictions, classes, support images, health, metrics, and the pages."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import anyio
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile

from dapt import __version__
from dapt.data import TooManyPixels
from dapt.errors import UserError
from dapt.predict import best
from dapt.serve.batching import Batcher
from dapt.serve.served import Served
from dapt.serve.uploads import AGAIN, MULTIPART, Limits, uploaded

_STATIC = Path(__file__).with_name("static")


class Photos(BaseModel):
    """What is sent."""

    images: list[bytes] = Field(description="JPEG, PNG, WebP, GIF, BMP or AVIF files.")


class RankedClass(BaseModel):
    """A class and how probable it is."""

    name: str = Field(serialization_alias="class")
    probability: float


class Neighbour(BaseModel):
    """A support image and the cosine of its features with the photo's."""

    image: str = Field(description="Where the picture is.")
    name: str = Field(serialization_alias="class")
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
_CONTENT = {MULTIPART: {"schema": Photos.model_json_schema()}}
_BODY = {"requestBody": {"required": True, "content": _CONTENT}}
_PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/jpeg": {}}},
    401: _PROBLEMS[401],
    404: {"model": Problem, "description": "There is no such support image."},
}


def create_app(
    served: Served, limits: Limits, registry: CollectorRegistry, ready: Callable[[], None]
) -> FastAPI:
    """The application; its lifespan starts and ends the threads that do the work.

    Metrics are of ``registry``, and ``ready`` is called once requests can be answered. Long,
    because the routes share what is made here.
    """
    shown = served.support
    names, pictures = (shown.class_names, shown.pictures) if shown else ((), ())
    batcher = Batcher(served, limits, registry)
    about = "Images received, by what came of them."
    counted = Counter("dapt_images", about, ("result",), registry=registry)
    decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "dapt-images")

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        model = asyncio.create_task(batcher.run())
        ready()
        yield
        decoders.shutdown(wait=True, cancel_futures=True)
        model.cancel()

    app = FastAPI(
        title="dapt",
        version=__version__,
        description=f"Classifies images into the {len(served.class_names):,} classes of the run "
        f"'{served.name}'.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")

    async def entry(file: UploadFile, place: int, top: int, near: int, alone: bool) -> Prediction:
        name = "".join(c for c in (file.filename or "")[:200] if c.isprintable()) or str(place)
        loop = asyncio.get_running_loop()
        try:
            view = await loop.run_in_executor(decoders, served.view, file.file, name, limits.pixels)
            probabilities, cosines = await batcher.answer(view)
        except UserError as error:
            counted.labels("error").inc()
            if alone:
                status = 413 if isinstance(error, TooManyPixels) else 400
                raise HTTPException(status, str(error)) from error
            return Prediction(file=name, error=str(error))
        counted.labels("ok").inc()
        (classes,) = best(probabilities[None], served.class_names, top)
        (places,) = best(cosines[None], range(len(cosines)), near)
        ranked = [RankedClass(name=name, probability=p) for name, p in classes]
        nearest = [Neighbour(image=f"/support/{i}", name=names[i], cosine=c) for i, c in places]
        return Prediction(file=name, classes=ranked, nearest=nearest)

    @app.post(
        "/predict", responses=_PROBLEMS, openapi_extra=_BODY, response_model_exclude_defaults=True
    )
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1, description="Classes to name for each image.")] = 5,
        nearest: Annotated[int, Query(ge=0, le=50, description="Support images to name.")] = 0,
    ) -> Predictions:
        """Classify images.

        An image that cannot be read has an error in its entry; if it is the only one, the request
        is refused with 400, or with 413 if it has too many pixels.
        """
        until = anyio.current_time() + limits.timeout
        with batcher.admission(1):  # a full server says so before it reads an upload
            pass
        try:
            async with uploaded(request, limits) as files:
                with batcher.admission(len(files)), anyio.fail_after(until - anyio.current_time()):
                    alone = len(files) == 1
                    work = (entry(f, i, top, nearest, alone) for i, f in enumerate(files, 1))
                    return Predictions(predictions=await asyncio.gather(*work))
        except TimeoutError:
            said = f"no answer within {limits.timeout:g} s; try again"
            raise HTTPException(503, said, AGAIN) from None

    @app.get("/classes", responses={401: _PROBLEMS[401]})
    async def classes() -> Classes:
        """Class names in label order, and what a request may hold."""
        return Classes(
            run=served.name,
            method=served.method,
            backbone=served.backbone,
            classes=list(served.class_names),
            support_images=len(pictures),
            limits=Bounds(upload_bytes=limits.upload, images=limits.images, pixels=limits.pixels),
        )

    @app.get("/support/{number}", response_class=Response, responses=_PICTURE)
    async def picture(number: int) -> Response:
        """A support image, small, as the model sees it."""
        if not 0 <= number < len(pictures):
            raise HTTPException(404, f"there is no support image {number}")
        return Response(pictures[number], media_type="image/jpeg")

    @app.get("/healthz")
    async def healthz() -> Health:
        """Whether the server answers; for load balancers."""
        return Health(status="ok")

    @app.get("/metrics", response_class=PlainTextResponse, responses={401: _PROBLEMS[401]})
    async def prometheus() -> Response:
        """Metrics for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def page(request: Request) -> FileResponse:
        return FileResponse(_STATIC / ("docs.html" if request.url.path == "/docs" else "page.html"))

    return app
