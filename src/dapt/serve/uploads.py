"""What a request may send, and how it is read: counted as it arrives, never past a limit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from dapt.errors import printable

FIELD = "images"
_MULTIPART = "multipart/form-data"


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes:
        upload: bytes of a request.
        pixels: width x height of an image.
        images: images of a request.
        queue: images of all requests that wait for an answer.
        batch: images that the model takes at a time.
        timeout: seconds that a request may take in all.
        connections: clients at a time.
    """

    upload: int = 20 * 2**20
    pixels: int = 50_000_000
    images: int = 32
    queue: int = 128
    batch: int = 32
    timeout: float = 30.0
    connections: int = 128


@asynccontextmanager
async def uploaded(request: Request, limits: Limits) -> AsyncIterator[list[UploadFile]]:
    """The image files of a multipart request, in order; parts over 1 MB wait on disk.

    Raises:
        HTTPException: 400, 413 or 415, with a sentence.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _MULTIPART:
        raise HTTPException(415, f"send images as {_MULTIPART}, in fields named '{FIELD}'")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.upload:
        raise _too_large(limits)
    bounded = Request(request.scope, _Bounded(request, limits))
    try:
        # Other fields are not kept, so a few are no harm; what they hold is bounded too.
        form = await bounded.form(max_files=limits.images, max_fields=16, max_part_size=2**16)
    except HTTPException as error:
        if error.status_code == 400 and error.detail.startswith("Too many files"):
            raise HTTPException(
                413, f"a request may hold {limits.images} images; send the others in another"
            ) from error
        if error.status_code == 400:
            raise HTTPException(
                400, f"the form cannot be read: {printable(error.detail)}"
            ) from error
        raise
    except FormParserError as error:  # which not every starlette turns into a 400
        raise HTTPException(400, f"the form cannot be read: {printable(str(error))}") from error
    try:
        parts = form.multi_items()
        files = [value for _, value in parts if isinstance(value, UploadFile)]
        if stray := [name for name, value in parts if name != FIELD or value not in files]:
            name = printable(stray[0][:40])
            raise HTTPException(
                400, f"field '{name}' is no image; send files in fields named '{FIELD}'"
            )
        if not files:
            raise HTTPException(400, f"no images given; send files in fields named '{FIELD}'")
        yield files
    finally:
        await form.close()


class _Bounded:
    """What a request receives, until it is more than may be."""

    def __init__(self, request: Request, limits: Limits) -> None:
        self._receive, self._limits, self._seen = request.receive, limits, 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        if self._seen > self._limits.upload:
            raise _too_large(self._limits)
        return message


def _too_large(limits: Limits) -> HTTPException:
    return HTTPException(
        413, f"a request may hold {limits.upload:,} bytes; send smaller images, or fewer at a time"
    )
