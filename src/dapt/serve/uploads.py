"""What a request may send, and its image files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import anyio
from fastapi import Request
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message

from dapt.errors import printable
from dapt.serve import bodies

_FIELD, _MULTIPART = "images", "multipart/form-data"
# Bodies of JSON that are taken apart at a time: each stands in memory, and again decoded.
FEW = 2


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
