"""Picture files, decoded to upright 8-bit RGB in sRGB, within bounds."""

from __future__ import annotations

import base64
import errno
import io
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from PIL import ExifTags, Image, UnidentifiedImageError

from dapt.data.colour import to_srgb
from dapt.data.dicom import first_frame, is_dicom
from dapt.data.grey import Extent, Scale, extent_of, is_deep, to_8_bits
from dapt.errors import UserError, install, reason_of
from dapt.safe.files import open_regular
from dapt.safe.pictures import EXIF, bounded

# PIL would start Ghostscript for EPS; the others it recognises but cannot decode by itself.
_REFUSED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# Pictures of phones and of clinics, which are read where an extra is installed: its module, what
# to install, and names.
_EXTRAS = {
    "HEIC": ("pillow_heif", f"pillow-heif: {install('heic')}", (".heic", ".heif", ".hif")),
    "DICOM": ("pydicom", f"pydicom: {install('dicom')}", (".dcm", ".dicom")),
}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# What undoes each EXIF orientation, from 2 on. (PIL's `exif_transpose` also writes the block anew,
# and fails where it is damaged.)
_WAYS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_UPRIGHT = {number: Image.Transpose[way] for number, way in enumerate(_WAYS.split(), 2)}

MAX_PIXELS = 2**27  # of the largest cameras; transparency and turning may take 2 GB
_LARGE = 2**24  # of images of more pixels, one is decoded at a time, whatever the threads
# Held meanwhile; programs that decode in several processes put one of theirs here.
one_large: AbstractContextManager[Any] = threading.Lock()

# Faults of the machine, not of an image: another may do no better.
_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}

Made = TypeVar("Made")


class BadImage(UserError):
    """An image cannot be read."""


class TooManyPixels(BadImage):
    """An image is larger than is allowed; nothing of it was decoded."""


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return tuple(name for name in Image.ID if name not in _REFUSED_FORMATS)


def has_image_name(name: str) -> bool:
    """Whether a file's name has the extension of an image, in any case, and is not hidden."""
    known, extension = _formats(), os.path.splitext(name)[1].lower()
    good = Image.registered_extensions().get(extension) in known or extension in _dicom_names()
    return name[:1] != "." and good


@cache
def _dicom_names() -> tuple[str, ...]:
    module, _, names = _EXTRAS["DICOM"]
    return names if find_spec(module) else ()


def missing_extras(names: Iterable[str]) -> str:
    """What of these files' names needs an extra that is not installed, in words; or nothing."""
    endings = {os.path.splitext(name)[1].lower() for name in names}
    return " and ".join(
        f"{kind} needs {install}"
        for kind, (module, install, own) in _EXTRAS.items()
        if endings.intersection(own) and not find_spec(module)
    )


def open_image(path: Path | str, grey: Scale | None = None) -> Image.Image:
    """Read an image file as upright 8-bit RGB; of an animation, the first frame.

    Transparency is laid on white, colours are those that the file's profile means, and ``grey``
    says what of grey values of more than 8 bits becomes black and white (see `to_8_bits`). Else it
    is a `BadImage`, or an `OSError` or a `MemoryError` if the machine is at fault, not the image.
    """
    return _of_path(path, lambda file: decode_image(file, str(path), grey=grey))


def decode_image(
    file: BinaryIO,
    name: str,
    *,
    formats: Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    grey: Scale | None = None,
) -> Image.Image:
    """Read an image as `open_image` does, from an open file that errors call ``name``.

    ``formats`` are PIL's names of those to accept, by default all that are safe. It is a
    `TooManyPixels` if the header tells of more than ``max_pixels``. A TIFF's tile may have no more
    either, as far as PIL understands its tags, which is not as far as libtiff does: strangers who
    may not exceed a limit should send other formats.
    """
    return _decoded(file, name, formats, max_pixels, partial(_upright, grey))


def grey_extent(source: Path | str | bytes) -> Extent | None:
    """The values of a file of grey of more than 8 bits, None for others; errors as `open_image`."""
    if isinstance(source, bytes):
        return _decoded(io.BytesIO(source), "of bytes", None, MAX_PIXELS, _extent)
    return _of_path(source, lambda file: _decoded(file, str(source), None, MAX_PIXELS, _extent))


def _of_path(path: Path | str, read: Callable[[BinaryIO], Made]) -> Made:
    try:
        with open_regular(path) as file:
            return read(file)
    except FileNotFoundError as error:
        raise BadImage(f"image {path} does not exist; check the path") from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _MACHINE:
            error.filename = error.filename or str(path)
            raise
        raise BadImage(f"image {path} cannot be opened ({error}); check the path") from error


def _decoded(
    file: BinaryIO,
    name: str,
    formats: Sequence[str] | None,
    max_pixels: int,
    make: Callable[[Image.Image], Made],
) -> Made:
    """What ``make`` makes of an image that is opened and within bounds, but not yet decoded."""

    def check(size: tuple[int, int], what: str = "") -> None:
        if size[0] * size[1] > max_pixels:
            has = f"image {name} has {what}{size[0]:,} x {size[1]:,} pixels, more than"
            raise TooManyPixels(f"{has} the {max_pixels:,} allowed; make it smaller")

    # Of those asked for, this PIL may lack some.
    known = [f for f in _formats() if formats is None or f in formats]
    try:
        if formats is None and is_dicom(file):
            return make(first_frame(file, check))
        picture = bounded(file)
        with Image.open(picture.file, formats=known) as image:
            # A TIFF's tile is decoded whole, however little of it lies within the image.
            tags = getattr(image, "tag_v2", {})
            check(image.size)
            check((tags.get(322, 0), tags.get(323, 0)), "a tile of ")
            image.info.update(picture.info)
            with one_large if image.width * image.height > _LARGE else nullcontext():
                return make(image)
    except (UserError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"image {name} cannot be read: {error}; make it smaller") from error
    except Exception as error:  # decoders fail on damaged files in whatever way
        if isinstance(error, OSError) and error.errno in _MACHINE:
            raise
        reason = reason_of(error)
        if isinstance(error, ModuleNotFoundError):
            said = f"image {name} cannot be read: DICOM needs {_EXTRAS['DICOM'][1]}"
            raise BadImage(f"{said}; or save it as PNG") from error
        if isinstance(error, UnidentifiedImageError):
            reason = _unknown(file, name)
        raise BadImage(f"image {name} cannot be read: {reason}; replace it") from error


def _unknown(file: BinaryIO, name: str) -> str:
    """Why a file was not taken for an image."""
    file.seek(0)
    head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:] in _HEIF_BRANDS and "HEIF" not in _formats():
        said = f"image {name} cannot be read: HEIC needs {_EXTRAS['HEIC'][1]}"
        raise BadImage(f"{said}; or save it as JPEG")
    return "not an image in a known format" if head else "the file is empty"


def _loaded(image: Image.Image) -> Image.Image:
    image.load()
    if min(image.size) < 1:
        raise ValueError("it has no pixels")
    return image


def _upright(grey: Scale | None, image: Image.Image) -> Image.Image:
    return upright_rgb(_loaded(image), grey)


def _extent(image: Image.Image) -> Extent | None:
    return extent_of(_loaded(image)) if is_deep(image) else None


def upright_rgb(image: Image.Image, grey: Scale | None = None) -> Image.Image:
    """A copy of an opened image as upright 8-bit RGB, as `open_image` says."""
    profile = image.info.get("icc_profile")
    if is_deep(image):
        picture = to_srgb(to_8_bits(image, grey), profile)
    elif image.has_transparency_data:
        seen = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        if profile:
            plain = seen.getchannel("R") if image.mode in ("L", "LA", "La") else seen.convert("RGB")
            alpha, seen = seen.getchannel("A"), to_srgb(plain, profile)
            seen.putalpha(alpha)
        white = Image.new("RGBA", seen.size, "white")
        picture = Image.alpha_composite(white, seen).convert("RGB")
    else:  # a copy, not the file's own object, which closes with the file
        picture = to_srgb(image.convert("RGB") if image.mode == "P" else image, profile)
    return picture.transpose(_UPRIGHT[way]) if (way := _orientation(image)) in _UPRIGHT else picture


def _orientation(image: Image.Image) -> Any:
    try:
        if len(image.info.get("exif") or b"") > EXIF:
            return 1
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged tag must not cost the picture
        return 1


def data_uri(image: Image.Image, side: int) -> str:
    """A small copy, of ``side`` pixels at most, as a data URI: nothing of its file but pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.info.clear()
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
