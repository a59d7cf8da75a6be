"""Images of a request's body that is no form: one as it is, or some in base64 in JSON."""

from __future__ import annotations

import base64
import re
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO, cast

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from dapt.errors import printable, reason_of
from dapt.safe.files import parse_json

JSON = "application/json"
# What is said of a body that is one image: nothing, that it is bytes, or what curl says by itself.
_WHOLE = {"", "application/octet-stream", "application/x-www-form-urlencoded"}
_FORM = """{"images": ["<base64>", ...]}"""
_IN_MEMORY = 2**20  # bytes; what is more waits on disk
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.I)
_URL_SAFE = str.maketrans("-_", "+/", " \t\r\n=")


def is_whole(kind: str) -> bool:
    """Whether a body of this media type is one image."""
    return kind in _WHOLE or kind.startswith("image/")


def on_disk(content: bytes = b"") -> BinaryIO:
    """A file of this content, at its start, on disk where it is large or grows to be."""
    file = cast(BinaryIO, SpooledTemporaryFile(_IN_MEMORY))  # noqa: SIM115
    file.write(content)
    file.seek(0)
    return file


def images_in_json(file: BinaryIO, most: int) -> list[UploadFile]:
    """The images of ``{"images": [...]}``, or ``{"image": ...}``, in order.

    Each is base64, of either alphabet, or a data URL; or an object of that as ``data`` and a name
    as ``file``. An `HTTPException` (400, 413) has a sentence.
    """
    try:
        given = parse_json(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _bad(f"the body is no JSON ({reason_of(error)})") from error
    if not isinstance(given, dict) or len(given.keys() & {"images", "image"}) != 1:
        raise _bad("the body holds no images")
    if odd := sorted(given.keys() - {"images", "image"}):
        way = "; 'top' and 'nearest' go in the address, as in /predict?top=3"
        raise _bad(f"the body holds '{printable(odd[0][:40])}', which is no image{way}")
    entries = given["images"] if "images" in given else [given["image"]]
    if not isinstance(entries, list) or not entries:
        raise _bad("no images given")
    if len(entries) > most:
        raise HTTPException(413, f"a request may hold {most} images; send the others in another")
    return [_image(entry, place) for place, entry in enumerate(entries, 1)]


def _image(entry: Any, place: int) -> UploadFile:
    name, text = None, entry
    if isinstance(entry, dict) and entry.keys() <= {"data", "file"}:
        name, text = entry.get("file"), entry.get("data")
    if not isinstance(text, str) or not isinstance(name, str | None):
        raise _bad(f"image {place} is no text")
    text = text[found.end() :] if (found := _DATA_URL.match(text)) else text
    text = text.translate(_URL_SAFE)
    try:
        content = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:  # letters of no base64, or a number of them that cannot be
        raise _bad(f"image {place} is no base64") from error
    return UploadFile(on_disk(content), filename=name)


def _bad(what: str) -> HTTPException:
    return HTTPException(400, f"{what}; send {_FORM}")
