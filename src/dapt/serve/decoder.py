"""One decoder of strangers' pictures, in a process that can be ended: picture files in, views out.

It reads requests from standard input and answers on standard output, each a line of JSON and the
bytes that this tells of; it ends with its input.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from dapt.data import pictures
from dapt.data.views import centre_view
from dapt.errors import UserError

# What cameras, phones and browsers write. PIL reads more, but a server should not for strangers: of
# a TIFF, libtiff decodes tiles of any size, which tags that PIL does not understand can tell it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "HEIF")

_MEMORY = 4 * 2**30  # bytes of addresses for programs, beside those for each pixel and core
_PER_PIXEL, _PER_CORE = 32, 2**27


def main() -> None:
    """Answer requests until there are no more.

    A request has ``name``, ``bytes`` and ``max_pixels``, the ``seconds`` of computing that it may
    take, ``views`` as `centre_view` has them, and ``grey``. Its answer has ``size``, the side of
    the view (S, S, 3) of uint8 that follows; or ``error``, and whether pixels are too ``many``.
    """
    place = sys.argv[1]
    pictures.one_large = FileLock(place)  # among all decoders
    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not stand among answers
    while line := asked.readline():
        request = json.loads(line)
        answer, view = _answer(request, io.BytesIO(asked.read(request["bytes"])))
        answers.write(json.dumps(answer).encode() + b"\n" + view)
        answers.flush()


def _answer(request: dict[str, Any], file: BinaryIO) -> tuple[dict[str, Any], bytes]:
    name, grey = request["name"], request["grey"]
    how = {"formats": FORMATS, "max_pixels": request["max_pixels"], "grey": grey and tuple(grey)}
    _limit(request["seconds"], request["max_pixels"])
    try:
        view = centre_view(pictures.decode_image(file, name, **how), **request["views"])
    except UserError as error:
        return {"error": str(error), "many": isinstance(error, pictures.TooManyPixels)}, b""
    except MemoryError:
        said = f"image {name} takes too much memory to decode; make it smaller"
        return {"error": said, "many": False}, b""
    finally:
        _limit(0, request["max_pixels"])
    return {"size": view.width}, np.asarray(view).tobytes()


def _limit(seconds: float, pixels: int) -> None:
    """Have the system end this process after so much computing (never for 0) or memory."""
    with suppress(ImportError, AttributeError, ValueError, OSError):  # not everywhere
        import resource

        signal.setitimer(signal.ITIMER_PROF, seconds)
        most = _MEMORY + _PER_PIXEL * pixels + _PER_CORE * (os.cpu_count() or 1)
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
