"""Whether a picture's file costs its decoder about as much as its pixels, looked at beforehand.

What lies beside the pixels (texts, camera data, profiles) costs decoders some microseconds a piece,
or time and memory that grow with the square of it, and a file of 20 MB holds millions of pieces.
Here pieces are counted. What says nothing of the pixels is left out where it is much; where there
is too much even to count, it is a `ValueError`.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO

_PIECES = 2**16  # segments, chunks or blocks of a file; ordinary ones have some hundreds at most
_FEW = 2**8  # pieces beside the pixels that any decoder takes without delay
_BESIDE = 2**22  # bytes of them
EXIF = 2**18  # bytes of camera data; those that matter are among the first
_PROFILE = 2**22  # bytes of a colour profile
_XMP = 2**24  # bytes of a text that may say which side is up

# Segments of a JPEG that a length follows, as PIL takes them until the pixels begin.
_SEGMENT = re.compile(rb"\xff([\xc0-\xc7\xc9-\xcf\xda-\xef\xfe])(..)", re.DOTALL)
# From there on: the marker that ends it, or one with a length; FF00 and restarts are of the pixels.
_MARKER = re.compile(rb"\xff(?:\xd9|[\xc0-\xcf\xda-\xfe](..))", re.DOTALL)
_MOST_JPEG_BYTES = 2**28
_TABLES = 2**17  # bytes of a JPEG's quantisation and Huffman tables; a few hundred are usual
# A progressive JPEG is decoded scan by scan over all its pixels, and a scan may take a few bytes.
_MOST_SCANS = 256  # encoders write about ten; PIL sets no limit
_USUAL_SCANS = 32
_MORE_PIXELS = 2**30  # that all scans beyond those may go over: a second


@dataclass(frozen=True)
class Bounded:
    """A picture's file to decode, and of what was left out, what says something of the pixels."""

    file: BinaryIO
    info: dict[str, Any] = field(default_factory=dict)  # by PIL's names


def bounded(file: BinaryIO) -> Bounded:
    """The same picture, whose decoding takes time and memory in proportion to its pixels.

    That is the file itself unless there is too much beside the pixels. Of formats that are not
    known here, and of damaged files, nothing is said. A `ValueError` has the words of a sentence.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    for start, look in _LOOKS.items():
        if head.startswith(start) or head[4:8] == start:
            file.seek(0)
            return look(file, size) or Bounded(file)
    return Bounded(file)


def _too_many(what: str) -> ValueError:
    return ValueError(f"it has more than {_PIECES:,} {what}")


def _without(file: BinaryIO, kept: list[tuple[int, int]]) -> BinaryIO:
    """What lies between these places (from, to) of a file, one behind the other."""
    whole = io.BytesIO()
    for start, end in kept:
        file.seek(start)
        whole.write(file.read(end - start))
    whole.seek(0)
    return whole


# ---------------------------------------------------------------------------------------- JPEG


def _jpeg(file: BinaryIO, _size: int) -> Bounded | None:
    data = file.read(_MOST_JPEG_BYTES)
    at, gaps, tables, pixels = 2, 0, 0, 0
    beside: list[tuple[int, int, int]] = []  # marker, from, to
    kept: list[tuple[int, int]] = []
    while found := _SEGMENT.search(data, at):
        start, marker = found.start(), found[1][0]
        gaps += start - at
        at = start + 2 + int.from_bytes(found[2], "big")
        if marker == 0xDA:
            at = start
            break
        if 0xE0 <= marker <= 0xEF or marker == 0xFE:
            beside.append((marker, start, at))
        else:
            kept.append((start, at))
            tables += at - start
            if marker not in (0xC4, 0xCC, 0xDB, 0xDD) and at - start >= 9:  # a frame's header
                height, width = struct.unpack(">HH", data[start + 5 : start + 9])
                pixels = max(pixels, height * width)
        if len(beside) > _PIECES or gaps > _PIECES:
            raise _too_many("segments beside the pixels")
        if tables > _TABLES:
            raise ValueError(f"it has more than {_TABLES:,} bytes of tables")
    else:
        at = len(data)
    _check_scans(data, at, pixels)
    own = _of_pixels(data, beside)
    if len(beside) <= _FEW and sum(e - s for _, s, e in beside) <= _BESIDE and own is not None:
        return None
    places = sorted({*(own or ()), *kept})
    rest = [(0, 2), *places, (at, len(data))]
    return Bounded(io.BytesIO(b"".join([data[start:end] for start, end in rest])))


def _of_pixels(data: bytes, beside: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Places of the segments that say how pixels are to be seen, as many as PIL listens to."""
    kept: list[tuple[int, int]] = []
    latest: dict[bytes, tuple[int, int]] = {}
    profile, exif = 0, 0
    for _, start, end in beside:
        said = data[start + 4 : start + 34]
        if said.startswith(b"Exif\0\0"):
            exif += end - start
            if exif <= EXIF:
                kept.append((start, end))
        elif said.startswith(b"ICC_PROFILE\0"):
            profile += 1
            if profile <= 255:
                kept.append((start, end))
        elif known := next((k for k in _SAID_ONCE if said.startswith(k)), None):
            latest[known] = (start, end)
    return [*kept, *latest.values()]


_SAID_ONCE = (b"JFIF", b"Adobe", b"http://ns.adobe.com/xap/1.0/\0")


def _check_scans(data: bytes, at: int, pixels: int) -> None:
    scans = pieces = 0
    while (found := _MARKER.search(data, at)) and found[1] is not None:
        pieces += 1
        scans += data[found.start() + 1] == 0xDA
        if scans > _MOST_SCANS:
            raise ValueError(f"it has more than {_MOST_SCANS} scans")
        if pieces > _PIECES:
            raise _too_many("segments")
        at = found.start() + 2 + int.from_bytes(found[1], "big")
    if (scans - _USUAL_SCANS) * pixels > _MORE_PIXELS:
        raise ValueError(f"it has {scans} scans over {pixels:,} pixels")


# ----------------------------------------------------------------------------------------- PNG


def _png(file: BinaryIO, size: int) -> Bounded | None:
    """Without texts, which PIL reads up to 1 MB alone, and the colour profile, read here."""
    said: dict[bytes, tuple[bytes, bytes]] = {}  # of each name, the last, as PIL has it
    kept, at, began = list[tuple[int, int]](), 8, 0
    for _ in range(_PIECES):
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            break
        length, kind = struct.unpack(">I4s", head)
        end = at + 12 + length
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") or (kind == b"eXIf" and length > EXIF):
            if end > size:
                break
            kept.append((began, at))
            began = end
            name, _, rest = file.read(length).partition(b"\0")
            if kind == b"iCCP" or name in _NAMES:
                said[b"iCCP" if kind == b"iCCP" else name] = kind, rest
        if kind == b"IEND":
            break
        at = end
    else:
        raise _too_many("chunks")
    if not kept:
        return None
    info: dict[str, Any] = {}
    for name, (kind, rest) in said.items():
        if kind == b"iCCP":
            info["icc_profile"] = _unpacked(rest[1:], _PROFILE)
        elif name == _XMP_NAME and kind == b"iTXt" and len(rest) > 2:
            text = rest[2:].split(b"\0", 2)[-1]
            info["xmp"] = _unpacked(text, _XMP) if rest[0] else text
        elif name == _EXIF_NAME and kind != b"iTXt":
            raw = _unpacked(rest[1:], 2 * EXIF) if kind == b"zTXt" else rest[: 2 * EXIF]
            info[name.decode()] = raw and raw.decode("latin-1")
    info = {name: value for name, value in info.items() if value}
    return Bounded(_without(file, [*kept, (began, size)]), info)


# Texts of a PNG that may say which side is up; the second is ImageMagick's.
_NAMES = _XMP_NAME, _EXIF_NAME = b"XML:com.adobe.xmp", b"Raw profile type exif"


def _unpacked(data: bytes, most: int) -> bytes | None:
    """What zlib packed, None where that is damaged or more than ``most`` bytes."""
    unpacker, found = zlib.decompressobj(), b""
    with suppress(zlib.error):
        found = unpacker.decompress(data, most)
    return None if unpacker.unconsumed_tail else found


# ----------------------------------------------------------------------------------------- GIF


def _gif(file: BinaryIO, size: int) -> Bounded | None:
    """Without comments and the like before the first frame."""
    head = file.read(13)
    if len(head) < 13:
        return None
    at = 13 + ((6 << (head[10] & 7)) if head[10] & 128 else 0)
    file.seek(at)
    kept, pieces = [(0, at)], 0
    while (kind := file.read(1)) and kind not in b",;":
        start, label = file.tell() - 1, file.read(1) if kind == b"!" else b""
        pieces += 1
        while kind == b"!" and (length := file.read(1)) and length[0]:
            file.seek(length[0], os.SEEK_CUR)
            if (pieces := pieces + 1) > _PIECES:
                break
        if label == b"\xf9":  # of the frame that follows
            kept.append((start, file.tell()))
        if pieces > _PIECES:
            raise _too_many("blocks before its first frame")
    if pieces <= _FEW:
        return None
    return Bounded(_without(file, [*kept, (file.tell() - len(kind), size)]))


# ------------------------------------------------------------------------ chunks, boxes and tags


_RUNS = 2**23  # pixels, or bytes, of a run-length encoded BMP, which PIL decodes in Python


def _bmp(file: BinaryIO, size: int) -> None:
    head = file.read(34)
    if len(head) == 34 and int.from_bytes(head[14:18], "little") >= 40 and head[30] in (1, 2):
        width, height = struct.unpack("<ii", head[18:26])
        if max(abs(width * height), size) > _RUNS:
            raise ValueError(f"it is run-length encoded, and over {_RUNS:,} pixels or bytes")


def _webp(file: BinaryIO, size: int) -> None:
    at = 12
    for _ in range(_PIECES):
        if at + 8 > size:
            return
        file.seek(at + 4)
        length = int.from_bytes(file.read(4), "little")
        at += 8 + length + (length & 1)
    raise _too_many("chunks")


# Boxes that hold boxes, with the bytes before those; and such as hold what decoders do not look
# into piece by piece: pixels, profiles, texts.
_HOLD = {b"meta": 4, b"iprp": 0, b"ipco": 0, b"moov": 0, b"trak": 0, b"mdia": 0, b"minf": 0,
         b"stbl": 0, b"jp2h": 0}  # fmt: skip
_WHOLE = {b"mdat", b"idat", b"colr", b"free", b"skip", b"uuid", b"jp2c", b"xml "}
_STRUCTURE = 2**18  # bytes of boxes that tell where what is; a large photo of a phone has 10,000


def _boxes(file: BinaryIO, size: int) -> None:
    """AVIF, HEIF and JPEG 2000: decoders look for each thing in lists of all."""
    told = 0
    for pieces, (kind, length) in enumerate(_each_box(file, 0, size)):
        told += 0 if kind in _WHOLE else 8 if kind in _HOLD else length
        if told > _STRUCTURE or pieces > _PIECES // 8:
            raise ValueError("it has more boxes than a picture needs")


def _each_box(file: BinaryIO, at: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int]]:
    while at + 8 <= end:
        file.seek(at)
        head = file.read(16)
        length, kind, start = int.from_bytes(head[:4], "big"), head[4:8], 8
        if length == 1:
            length, start = int.from_bytes(head[8:], "big"), 16
        stop = end if length == 0 else at + length
        yield kind, min(stop, end) - at
        if kind in _HOLD and depth < 8:
            yield from _each_box(file, at + start + _HOLD[kind], min(stop, end), depth + 1)
        if length and length < start:
            return
        at = stop


# Bytes of a value of each of TIFF's types; and those types that PIL takes as bytes, at no cost.
_UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8,
          17: 8, 18: 8}  # fmt: skip
_BYTES = {1, 2, 7}
_STRIPS = {273, 279, 324, 325}  # places and sizes of strips and tiles
_FURTHER = {34665, 34853, 40965}  # tags that lead to more tags, which PIL reads too
_TAGS, _NUMBERS, _MOST_STRIPS = 2**12, 2**18, 2**15


def _tiff(file: BinaryIO, size: int) -> None:
    head = file.read(16)
    order, big = "<" if head[:1] == b"I" else ">", 43 in head[2:4]
    places = [int.from_bytes(head[8:16] if big else head[4:8], "little" if order == "<" else "big")]
    count_of, entry_of = (order + "Q", order + "HHQQ") if big else (order + "H", order + "HHII")
    read = numbers = 0
    for number in range(1 + len(_FURTHER)):
        if number >= len(places):
            break
        file.seek(min(places[number], size))
        if len(said := file.read(struct.calcsize(count_of))) < struct.calcsize(count_of):
            continue
        if (count := struct.unpack(count_of, said)[0]) > _TAGS:
            raise ValueError(f"it has more than {_TAGS:,} tags")
        entries = file.read(count * struct.calcsize(entry_of))
        entries = entries[: len(entries) - len(entries) % struct.calcsize(entry_of)]
        for tag, kind, values, place in struct.iter_unpack(entry_of, entries):
            length = values * _UNITS.get(kind, 0)
            # Of one that is said to be longer than the file, PIL reads what there is.
            read += min(length, max(0, size - place)) if length > (8 if big else 4) else 0
            numbers += 0 if kind in _BYTES or tag in _STRIPS else min(values, size)
            if tag in _STRIPS and values > _MOST_STRIPS:
                raise ValueError(f"it has more than {_MOST_STRIPS:,} strips")
            if tag in _FURTHER:
                places.append(place)
        if read > 2 * size + _PIECES or numbers > _NUMBERS:
            raise ValueError("its tags hold more than a picture's do")


_LOOKS: dict[bytes, Callable[[BinaryIO, int], Bounded | None]] = {
    b"\xff\xd8\xff": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    b"GIF8": _gif,
    b"BM": _bmp,
    b"RIFF": _webp,
    b"ftyp": _boxes,
    b"jP  ": _boxes,
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+"), _tiff),
}
