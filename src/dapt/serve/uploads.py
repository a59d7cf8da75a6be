"""What a request may send, and how it is read: counted as it arrives, never past a limit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from dapt.errors import printable

FIELD = "images"
MULTIPART = "multipart/form-data"
AGAIN = {"Retry-After": "1"}


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


@asynccontextmanager
async def uploaded(request: Request, limits: Limits) -> AsyncIterator[list[UploadFile]]:
    """The image files of a multipart request, in order; parts over 1 MB wait on disk.

    Raises:
        HTTPException: 400, 408, 413 or 415, with a sentence.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != MULTIPART:
        raise HTTPException(415, f"send images as {MULTIPART}, in fields named '{FIELD}'")
    too_large = HTTPException(
        413, f"a request may hold {limits.upload:,} bytes; send smaller images, or fewer at a time"
    )
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

    try:
        with anyio.fail_after(limits.timeout):
            # Other fields are not kept, so a few are no harm; what they hold is bounded too.
            form = await Request(request.scope, receive).form(
                max_files=limits.images, max_fields=16, max_part_size=2**16
            )
    except TimeoutError:
        raise HTTPException(
            408, f"the request did not arrive within {limits.timeout:g} s; send less at a time"
        ) from None
    except ClientDisconnect:
        raise HTTPException(400, "the request ended early") from None
    except (HTTPException, FormParserError) as error:  # not every starlette makes them the first
        if error is too_large:
            raise
        said = error.detail if isinstance(error, HTTPException) else str(error)
        if said.startswith("Too many files"):
            raise HTTPException(
                413, f"a request may hold {limits.images} images; send the others in another"
            ) from error
        raise HTTPException(400, f"the form cannot be read: {printable(said)}") from error
    try:
        files = []
        for name, value in form.multi_items():
            if name != FIELD or not isinstance(value, UploadFile):
                said = f"field '{printable(name[:40])}' is no image"
                raise HTTPException(400, f"{said}; send files in fields named '{FIELD}'")
            files.append(value)
        if not files:
            raise HTTPException(400, f"no images given; send files in fields named '{FIELD}'")
        yield files
    finally:
        await form.close()
