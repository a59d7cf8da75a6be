"""One image, of a file or as Python holds it, as upright RGB; views; and views in batches."""

from __future__ import annotations

import errno
import io
import math
import os
import random
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from joblib import cpu_count
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from dapt.data.arrays import pixels_of
from dapt.errors import InputError, UserError, reason_of
from dapt.safe.files import open_regular

# PIL would start Ghostscript for EPS; the others it recognises but cannot decode by itself.
_REFUSED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# What undoes each EXIF orientation, from 2 on. (PIL's `exif_transpose` also writes the block anew,
# and fails where it is damaged.)
_WAYS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_UPRIGHT = {number: Image.Transpose[way] for number, way in enumerate(_WAYS.split(), 2)}

# A progressive JPEG is decoded scan by scan over all its pixels, and a scan may take a few bytes.
_MOST_SCANS = 256  # encoders write about ten; PIL sets no limit
# The marker that ends a JPEG, or one that a length follows; of what lies between, FF00 is escaped.
_MARKER = re.compile(rb"\xff(?:\xd9|[\xc0-\xcf\xda-\xfe](..))", re.DOTALL)
_MOST_JPEG_BYTES = 2**28

MAX_PIXELS = 2**27  # of the largest cameras; transparency and turning may take 2 GB
_LARGE = 2**24  # of images of more pixels, one is decoded at a time, whatever the threads
# Nor must two threads decode one picture that PIL has opened and not yet decoded.
_one_large, _one_opened = threading.Lock(), threading.Lock()

# Faults of the machine, not of an image: another may do no better.
_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}

CROP_MIN = 0.08  # least share of an image's area in a training crop (Szegedy et al., 2015)
_RESIZING = {
    "interpolation": ("nearest", "bilinear", "bicubic", "lanczos"),
    "resize mode": ("shortest", "squash"),
}

# Names that columns of images and labels have, the usual ones first.
IMAGE_COLUMNS = ("image", "img", "picture")
PATH_COLUMNS = ("path", "file_name", "filename", "filepath", "file", "image_path")
LABEL_COLUMNS = (
    "label",
    "labels",
    "fine_label",
    "class",
    "cls",
    "class_name",
    "category",
    "target",
)

_View = Callable[[int], Image.Image]
_CHUNK = 8  # images a thread takes at a time: enough to hide the cost of handing them out


class BadImage(UserError):
    """An image cannot be read."""


class TooManyPixels(BadImage):
    """An image is larger than is allowed; nothing of it was decoded."""


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in _REFUSED_FORMATS)


def has_image_name(name: str) -> bool:
    """Whether a file's name has the extension of an image, in any case, and is not hidden."""
    extension = os.path.splitext(name)[1].lower()
    return name[:1] != "." and Image.registered_extensions().get(extension) in _formats()


def open_image(path: Path | str) -> Image.Image:
    """Read an image file as upright 8-bit RGB; of an animation, the first frame.

    Transparency is laid on white, and 16-bit greyscale scaled to 8 bits. Else it is a `BadImage`,
    or an `OSError` or a `MemoryError` if the machine is at fault, not the image.
    """
    try:
        with open_regular(path) as file:
            return decode_image(file, str(path))
    except FileNotFoundError as error:
        raise BadImage(f"image {path} does not exist; check the path") from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _MACHINE:
            error.filename = error.filename or str(path)
            raise
        raise BadImage(f"image {path} cannot be opened ({error}); check the path") from error


def decode_image(
    file: BinaryIO, name: str, *, formats: Sequence[str] | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read an image as `open_image` does, from an open file that errors call ``name``.

    ``formats`` are PIL's names of those to accept, by default all that are safe. It is a
    `TooManyPixels` if the header tells of more than ``max_pixels``. A TIFF's tile may have no more
    either, as far as PIL understands its tags, which is not as far as libtiff does: strangers who
    may not exceed a limit should send other formats.
    """
    # Of those asked for, this PIL may lack some.
    known = [f for f in _formats() if formats is None or f in formats]
    try:
        with Image.open(file, formats=known) as image:
            # A TIFF's tile is decoded whole, however little of it lies within the image.
            tags = getattr(image, "tag_v2", {})
            tile = tags.get(322, 0), tags.get(323, 0)
            for what, (width, height) in (("", image.size), ("a tile of ", tile)):
                if width * height > max_pixels:
                    has = f"image {name} has {what}{width:,} x {height:,} pixels, more than"
                    raise TooManyPixels(f"{has} the {max_pixels:,} allowed; make it smaller")
            if image.format in ("JPEG", "MPO"):
                _check_scans(file)
            with _one_large if image.width * image.height > _LARGE else nullcontext():
                image.load()
                if min(image.size) < 1:
                    raise ValueError("it has no pixels")
                return upright_rgb(image)
    except (TooManyPixels, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"image {name} cannot be read: {error}; make it smaller") from error
    except Exception as error:  # decoders fail on damaged files in whatever way
        if isinstance(error, OSError) and error.errno in _MACHINE:
            raise
        reason = reason_of(error)
        if isinstance(error, UnidentifiedImageError):
            file.seek(0)
            reason = "not an image in a known format" if file.read(1) else "the file is empty"
        raise BadImage(f"image {name} cannot be read: {reason}; replace it") from error


def _check_scans(file: BinaryIO) -> None:
    file.seek(0)
    data = file.read(_MOST_JPEG_BYTES)
    scans = at = 0
    while (found := _MARKER.search(data, at)) and found[1] is not None:
        scans += data[found.start() + 1] == 0xDA
        if scans > _MOST_SCANS:
            raise ValueError(f"it has more than {_MOST_SCANS} scans")
        at = found.start() + 2 + int.from_bytes(found[1], "big")


def upright_rgb(image: Image.Image) -> Image.Image:
    """A copy of an opened image as upright 8-bit RGB, as `open_image` says."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Of 16 bits, which PIL's own conversion would clip.
        values = np.asarray(image)
        if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
            raise ValueError("its values have no known scale (save it with 8 or 16 bits)")
        grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        picture = Image.fromarray(grey).convert("RGB")
    elif image.has_transparency_data:
        seen = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        picture = Image.alpha_composite(white, seen).convert("RGB")
    else:  # a copy, not the file's own object, which closes with the file
        picture = image.copy() if image.mode == "RGB" else image.convert("RGB")
    try:
        orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged tag must not cost the picture
        return picture
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _check_resizing(*ways: str) -> None:
    for way, (what, known) in zip(ways, _RESIZING.items(), strict=True):
        if way not in known:
            raise UserError(f"{what} '{way}' is none of {', '.join(known)}; use another backbone")


def centre_view(
    image: Image.Image, size: int, *, interpolation: str = "bicubic", resize_mode: str = "shortest"
) -> Image.Image:
    """The square of ``size`` px that is looked at in evaluation.

    ``shortest`` is torchvision's ``Resize`` and ``CenterCrop`` of a PIL image, to the bit;
    ``squash`` resizes both sides. Other ways are a `UserError`.
    """
    _check_resizing(interpolation, resize_mode)
    resample = Image.Resampling[interpolation.upper()]
    if resize_mode == "squash":
        return image.resize((size, size), resample)
    short = min(image.size)
    # Longer strips are cut to their middle before the short side is resized, or one of a few bytes
    # would become gigabytes. What is cut lies far outside the centre crop.
    if max(image.size) > (keep := 16 * short):
        width, height = (min(side, keep) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    width, height = (int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), resample).crop((left, top, left + size, top + size))


def train_view(
    image: Image.Image,
    size: int,
    generator: random.Random,
    *,
    interpolation: str = "bicubic",
    crop_min: float = CROP_MIN,
) -> Image.Image:
    """A random crop resized to ``size`` px, mirrored half the time.

    As torchvision's ``RandomResizedCrop`` and ``RandomHorizontalFlip`` are distributed. Only
    ``generator.random()`` is called: the one method whose values Python promises to keep.
    """
    box = crop_box(*image.size, generator, crop_min)
    view = image.crop(box).resize((size, size), Image.Resampling[interpolation.upper()])
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else view


def crop_box(
    width: int, height: int, generator: random.Random, crop_min: float = CROP_MIN
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop of a width x height px image.

    Area is uniform in ``crop_min`` .. 1, aspect log-uniform in 3/4 .. 4/3; after ten that do not
    fit, it is the largest centred one of an allowed aspect.
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = width * height * (crop_min + (1 - crop_min) * generator.random())
        aspect = math.exp(low + (high - low) * generator.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(generator.random() * (height - h + 1))
            left = int(generator.random() * (width - w + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * (4 / 3))))
    h = min(height, max(1, round(width / (3 / 4))))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def first_of(names: Iterable[str], there: Iterable[Any]) -> Any:
    """Of a table's columns or a row's keys the one of the first name that is there, in any case."""
    own = {str(key).lower(): key for key in there}
    return next((own[name] for name in names if name in own), None)


def read_picture(value: Any) -> Image.Image:
    """Any of what stands for an image, as upright 8-bit RGB.

    That is a path; a file's bytes, or the file, opened to read bytes; a PIL image; an array or
    tensor of (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, uint8, truth values or
    floating point in 0 .. 1; a row of a table; or a pair of any of these and a label. Errors are
    `open_image`'s, or an `InputError`.
    """
    if isinstance(value, (str, os.PathLike)):
        return open_image(os.fspath(value))
    if hasattr(value, "read") and hasattr(value, "seek"):
        value = _content_of(value)
    if isinstance(value, bytes | bytearray | memoryview):
        content = io.BytesIO(value)
        return decode_image(content, f"of {content.getbuffer().nbytes:,} bytes")
    if isinstance(value, Image.Image):
        try:
            with _one_opened:
                value.load()
            return upright_rgb(value)
        except Exception as error:  # one from a file is decoded only now; see `decode_image`
            raise InputError(f"an image of mode {value.mode} cannot be read ({error})") from error
    if isinstance(value, Mapping) or is_pair(value):
        return read_picture(image_in(value))
    if (pixels := pixels_of(value)) is not None:
        return upright_rgb(Image.fromarray(pixels))
    hint = "give paths, PIL images, arrays of (H, W, 3), tensors of (3, H, W), or a dataset"
    raise InputError(f"{type(value).__name__} is no image; {hint}")


def is_pair(value: Any) -> bool:
    """Whether it is an image and its label, as datasets of torch give them."""
    pair = isinstance(value, tuple | list) and len(value) == 2
    return pair and not (isinstance(value, list) and isinstance(value[1], list))


def image_in(value: Any) -> Any:
    """What stands for the image in a row or a pair, None where it is missing; else ``value``."""
    if isinstance(value, Mapping):
        # Bytes and path are those of an image that a dataset has not decoded.
        own = {str(name).lower(): cell for name, cell in value.items()}
        cells = [own[n] for n in (*IMAGE_COLUMNS, "bytes", *PATH_COLUMNS) if n in own]
        if not cells:
            raise InputError(f"a row of columns {[*value]} has no image; name the column 'image'")
        return next((cell for cell in cells if cell is not None), None)
    return value[0] if is_pair(value) else value


def _content_of(file: Any) -> bytes:
    """All bytes of an open file, wherever it stands; it may be asked for again."""
    with _one_opened:
        try:
            file.seek(0)
            content = file.read()
        except (OSError, ValueError) as error:  # such as of a stream, or of a closed file
            hint = "give its bytes or its path"
            raise InputError(f"an open file cannot be read ({error}); {hint}") from error
    if not isinstance(content, bytes):
        raise InputError("an open file gives text, not bytes; open it with mode 'rb'")
    return content


@dataclass
class Allowance:
    """Bytes that decoded images kept in memory may take, of all stores that share it."""

    limit: int
    used: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)


@dataclass(eq=False)
class ImageStore:
    """Views of many images, of which as many as fit a budget stay decoded in memory.

    What is kept changes no view. Sources are taken only when they are read: there may be more than
    memory holds. Unknown ways of resizing are a `UserError`.
    """

    sources: Sequence[Any]  # image files, or whatever else `read_picture` takes
    _: KW_ONLY
    size: int  # side of a view, px
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"  # of test views; see `centre_view`
    crop_min: float = CROP_MIN  # least share of an image's area that a train view shows
    allowance: Allowance = field(default_factory=lambda: Allowance(0))  # first come, first kept
    threads: int = 0  # that decode; by default one a core, at most eight
    read: Callable[[Any], Image.Image] = read_picture  # upright RGB of a source, in those threads

    def __post_init__(self) -> None:
        _check_resizing(self.interpolation, self.resize_mode)
        self.threads = self.threads or min(8, cpu_count())
        self._kept: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self.sources)

    def image(self, index: int) -> Image.Image:
        """The whole image, upright RGB, not to be changed; a `UserError` if it cannot be read."""
        if (kept := self._kept.get(index)) is not None:
            return kept
        image = self.read(self.sources[index])
        with self.allowance.lock:
            used = self.allowance.used + _bytes(image)
            if index not in self._kept and used <= self.allowance.limit:
                self._kept[index], self.allowance.used = image, used
        return image

    def forget(self) -> None:
        """Let go of the images that are kept; they are decoded again when asked for."""
        with self.allowance.lock:
            self.allowance.used -= sum(map(_bytes, self._kept.values()))
            self._kept = {}

    def test_views(self, indices: Sequence[int]) -> Tensor:
        """(B, 3, size, size) uint8, as `centre_view` makes them; errors are those of `batches`."""
        return next(self.batches([indices]))

    def train_batches(
        self, batches: Iterable[tuple[int, Sequence[int]]], *, seed: int, prefetch: int = 2
    ) -> Iterator[Tensor]:
        """As `batches`, of `train_view`s, which are functions of seed, epoch and index alone."""
        how: dict[str, Any] = {"interpolation": self.interpolation, "crop_min": self.crop_min}

        def view(epoch: int, index: int) -> Image.Image:
            # A string is hashed by SHA-512: the same everywhere, no patterns between neighbours.
            generator = random.Random(f"{seed}/{epoch}/{index}")
            return train_view(self.image(index), self.size, generator, **how)

        return self._made_ahead(((ids, partial(view, epoch)) for epoch, ids in batches), prefetch)

    def batches(
        self,
        lists: Iterable[Sequence[int]],
        *,
        prefetch: int = 2,
        unreadable: dict[int, str] | None = None,
    ) -> Iterator[Tensor]:
        """`test_views` of each of these lists, ``prefetch`` made ahead of the one in use.

        An image that cannot be read raises a `UserError` in its batch's place; where ``unreadable``
        is given, it is black in its batch, and the reason is there by then, under its index.
        """
        how = {"interpolation": self.interpolation, "resize_mode": self.resize_mode}

        def view(index: int) -> Image.Image:
            try:
                return centre_view(self.image(index), self.size, **how)
            except UserError as error:
                if unreadable is None:
                    raise
                unreadable[index] = str(error)
                return Image.new("RGB", (self.size, self.size))

        return self._made_ahead(((indices, view) for indices in lists), prefetch)

    def _made_ahead(
        self, wanted: Iterable[tuple[Sequence[int], _View]], prefetch: int
    ) -> Iterator[Tensor]:
        """A batch of views of each of these indices, by the function beside them."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="dapt-images")
        started = deque[tuple[Tensor, Iterator[None]]]()

        def finished() -> Tensor:
            views, work = started.popleft()
            list(work)  # waits, and raises what was raised
            return views

        try:
            for indices, view in wanted:
                # Page-locked, to go to a GPU while it is at work: untested, for want of one. Crops
                # stay on the CPU: the protocol's bicubic resizing is PIL's.
                shape, pinned = (len(indices), 3, self.size, self.size), torch.cuda.is_available()
                views = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
                lots = [slice(i, i + _CHUNK) for i in range(0, len(indices), _CHUNK)]
                pixels, places = (
                    [views[lot].numpy() for lot in lots],
                    [indices[lot] for lot in lots],
                )
                started.append((views, pool.map(partial(_fill, view), pixels, places)))
                if len(started) > prefetch:
                    yield finished()
            while started:
                yield finished()
        finally:
            # Also where the consumer has had enough, or an image could not be read.
            pool.shutdown(wait=True, cancel_futures=True)


def _fill(view: _View, pixels: np.ndarray, indices: Sequence[int]) -> None:
    for row, index in zip(pixels, indices, strict=True):
        row[:] = np.asarray(view(int(index))).transpose(2, 0, 1)


def _bytes(image: Image.Image) -> int:
    return 4 * image.width * image.height  # PIL pads RGB pixels to four bytes
