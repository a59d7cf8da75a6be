"""The routes of the server, as ``api.yaml`` describes them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import anyio
import yaml
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CollectorRegistry, exposition
from starlette.exceptions import HTTPException

from dapt import __version__
from dapt.errors import printable
from dapt.serve.answers import Answers
from dapt.serve.feedback import Feedback
from dapt.serve.served import Served
from dapt.serve.uploads import FEW, Limits

_STATIC = Path(__file__).with_name("static")
_FORECAST = {"images", "accuracy", "low", "high", "confused", "advice"}  # of its record, told
_Json = dict[str, Any]  # of the shape that api.yaml tells


def create_app(
    served: Served,
    limits: Limits,
    registry: CollectorRegistry,
    ready: Callable[[], None],
    feedback: Feedback | None = None,
) -> FastAPI:
    """The application; its lifespan is that of its threads.

    Metrics are of ``registry``, and ``ready`` is called once requests can be answered. Corrected
    photos go to ``feedback``.
    """
    answers = Answers(served, limits, registry)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with answers.running():
            ready()
            yield

    about = f"Classifies images into the {len(served.class_names):,} classes of the run"
    info = {"title": "dapt", "version": __version__, "description": f"{about} '{served.name}'."}
    described = {"info": info, **yaml.safe_load(_STATIC.with_name("api.yaml").read_text("utf-8"))}
    how: dict[str, Any] = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}
    app = FastAPI(**how, lifespan=lifespan)
    app.state.decoders = answers.decoders
    app.state.few = anyio.CapacityLimiter(FEW)
    app.openapi = lambda: described  # type: ignore[method-assign]
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
    _add_answers(app, served, answers, feedback)
    _add_facts(app, served, limits, feedback is not None)
    _add_state(app, answers, registry)
    _add_pages(app, {"/docs", app.openapi_url, *described["paths"]})
    return app


def _add_answers(app: FastAPI, served: Served, answers: Answers, feedback: Feedback | None) -> None:
    """What images are sent to."""

    @app.post("/predict")
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1)] = 5,
        nearest: Annotated[int, Query(ge=0, le=50)] = 0,
    ) -> _Json:
        return {"predictions": await answers.predict(request, top, nearest)}

    @app.post("/feedback")
    async def correct(request: Request, name: Annotated[str, Query(alias="class")]) -> _Json:
        if feedback is None:
            said = "this server keeps no photos; 'dapt serve --feedback FOLDER' would"
            raise HTTPException(404, said)
        if name not in served.class_names:
            raise HTTPException(400, f"'{printable(name[:40])}' is no class; /classes lists them")
        return {"kept": await answers.keep(request, feedback, name)}


def _add_facts(app: FastAPI, served: Served, limits: Limits, feedback: bool) -> None:
    """What the run is, and its support images."""
    pictures = served.support.pictures if served.support else ()

    @app.get("/classes")
    async def classes() -> _Json:
        bounds = {"upload_bytes": limits.upload, "images": limits.images, "pixels": limits.pixels}
        about = {"run": served.name, "method": served.method, "backbone": served.backbone}
        found: _Json = {"classes": served.class_names, "support_images": len(pictures)}
        if (told := served.forecast) is not None:
            found["forecast"] = told.model_dump(include=_FORECAST)
        if served.warning:
            found["warning"] = served.warning
        return {**about, **found, "feedback": feedback, "limits": bounds}

    @app.get("/support/{number}")
    async def picture(number: int) -> Response:
        if not 0 <= number < len(pictures):
            raise HTTPException(404, f"there is no support image {number}")
        return Response(pictures[number], media_type="image/jpeg")


def _add_state(app: FastAPI, answers: Answers, registry: CollectorRegistry) -> None:
    """How the server does."""

    @app.get("/healthz")
    async def healthz(response: Response) -> _Json:
        decoders = answers.decoders
        if not (stuck := decoders.stuck):
            return {"status": "ok"}
        response.status_code = 503 if stuck == decoders.count else 200  # nobody else is answered
        return {"status": "stuck", "stuck_decoders": stuck, "decoders": decoders.count}

    @app.get("/metrics")
    async def metrics() -> Response:
        latest = exposition.generate_latest(registry)
        return Response(latest, media_type=exposition.CONTENT_TYPE_LATEST)


def _add_pages(app: FastAPI, known: set[str | None]) -> None:
    """What a browser shows."""

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return _page("page.html", request)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return _page("docs.html", request)

    # To what is meant, by a name that is right below any path that a proxy may have taken off.
    @app.api_route("/{name}/", methods=["GET", "POST"], include_in_schema=False)
    async def slash(name: str, request: Request) -> Response:
        if f"/{name}" not in known:
            raise HTTPException(404)
        query = f"?{request.url.query}" if request.url.query else ""
        return Response(status_code=307, headers={"location": f"../{name}{query}"})


def _page(name: str, request: Request) -> Response:
    """A page, whose links are relative; where its path is known, to that."""
    if not (below := request.scope["root_path"]):
        return FileResponse(_STATIC / name)
    text = (_STATIC / name).read_text("utf-8")
    return HTMLResponse(text.replace("<head>", f'<head>\n<base href="{below}/">', 1))
