"""Image files to square uint8 tensors, decoded once and ahead of the model.

Normalisation by a mean and standard deviation is the backbone's, not done here.
"""

from __future__ import annotations

import errno
import math
import os
import random
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from joblib import cpu_count
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dapt.errors import UserError, reason_of
from dapt.safe.files import open_regular

# PIL would start Ghostscript for EPS; the others it recognises but cannot decode by itself.
_REFUSED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
RESIZE_MODES = ("shortest", "squash")

# Of the training crop, as in Inception-style training: least share of the area, width / height.
CROP_MIN = 0.08
CROP_RATIO = (3 / 4, 4 / 3)

# EXIF orientation tag and what undoes each value; 1 is upright.
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# A TIFF's tile is decoded whole, however little of it lies within the image.
_TILE_WIDTH_TAG, _TILE_LENGTH_TAG = 322, 323

# A progressive JPEG is decoded scan by scan over all its pixels, and a scan may take a few bytes.
# Encoders write about ten; PIL sets no limit.
_MOST_SCANS = 256
# The marker that ends a JPEG, or one that a length follows; of what lies between, FF00 is escaped.
_MARKER = re.compile(rb"\xff(?:\xd9|[\xc0-\xcf\xda-\xfe](..))", re.DOTALL)
_MOST_JPEG_BYTES = 2**28

# Longer strips than this are cut to their middle before the short side is resized, or a strip of
# a few bytes would become gigabytes. What is cut lies far outside the centre crop.
_MAX_ASPECT = 16

# Images a thread takes at a time: enough to hide the cost of handing them out.
_CHUNK = 8


# A photo of the largest cameras; its transparency and turning may take 2 GB.
MAX_PIXELS = 2**27

# Of images of more pixels, one is decoded at a time, whatever the number of threads.
_LARGE = 2**24
_one_large = threading.Lock()

# Faults of the machine, not of an image: another may do no better.
_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}


# -- reading one file ------------------------------------------------------------------------


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in _REFUSED_FORMATS)


@cache
def _extensions() -> frozenset[str]:
    formats = set(_formats())
    return frozenset(e for e, name in Image.registered_extensions().items() if name in formats)


def has_image_name(name: str) -> bool:
    """Whether a file's name has the extension of an image, in any case, and is not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in _extensions()


def open_image(path: Path | str) -> Image.Image:
    """Read an image file as upright 8-bit RGB.

    EXIF orientation is applied, transparency laid on white, 16-bit greyscale scaled to 8 bits,
    and of an animation the first frame is taken.

    Raises:
        BadImage: the file is missing, empty, damaged, no image, no ordinary file, or has more
            than `MAX_PIXELS`.
        OSError, MemoryError: the machine is at fault, not the image.
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


class BadImage(UserError):
    """An image cannot be read."""


class TooManyPixels(BadImage):
    """An image is larger than is allowed; nothing of it was decoded."""


def decode_image(
    file: BinaryIO,
    name: str,
    *,
    formats: tuple[str, ...] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Read an image as `open_image` does, from an open file that errors call ``name``.

    Args:
        file, name: the image.
        formats: PIL's names of those to accept; all that are safe, if not given.
        max_pixels: most of width x height that is decoded. What a TIFF's tile tags say counts too,
            as far as PIL understands them, which is not as far as libtiff does: strangers who may
            not exceed a limit should send other formats.

    Raises:
        TooManyPixels: the file's header tells of more.
        BadImage: as `open_image`, once the file is open.
    """
    # Of those asked for, this PIL may lack some.
    known = _formats() if formats is None else tuple(f for f in _formats() if f in formats)
    try:
        with Image.open(file, formats=known) as image:
            _check_pixels(image, name, max_pixels)
            if image.format in ("JPEG", "MPO"):
                _check_scans(file)
            large = image.width * image.height > _LARGE
            with _one_large if large else nullcontext():
                image.load()
                if min(image.size) < 1:
                    raise ValueError("it has no pixels")
                return upright_rgb(image)
    except (TooManyPixels, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"image {name} cannot be read: {error}; make it smaller") from error
    except UnidentifiedImageError as error:
        file.seek(0)
        reason = "not an image in a known format" if file.read(1) else "the file is empty"
        raise BadImage(f"image {name} cannot be read: {reason}; replace it") from error
    except Exception as error:  # decoders fail on damaged files in whatever way
        if isinstance(error, OSError) and error.errno in _MACHINE:
            raise
        raise BadImage(f"image {name} cannot be read: {reason_of(error)}; replace it") from error


def _check_pixels(image: Image.Image, name: str, limit: int) -> None:
    tags = getattr(image, "tag_v2", {})  # of a TIFF; PIL knows nothing of its tiles yet
    tile = tags.get(_TILE_WIDTH_TAG, 0), tags.get(_TILE_LENGTH_TAG, 0)
    for what, (width, height) in (("", image.size), ("a tile of ", tile)):
        if width * height > limit:
            raise TooManyPixels(
                f"image {name} has {what}{width:,} x {height:,} pixels, more than the {limit:,} "
                "allowed; make it smaller"
            )


def _check_scans(file: BinaryIO) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    data = file.read(min(size, _MOST_JPEG_BYTES))
    scans = at = 0
    while (found := _MARKER.search(data, at)) and found[1] is not None:
        scans += data[found.start() + 1] == 0xDA
        if scans > _MOST_SCANS:
            raise ValueError(f"it has more than {_MOST_SCANS} scans")
        at = found.start() + 2 + int.from_bytes(found[1], "big")


def upright_rgb(image: Image.Image) -> Image.Image:
    """A copy of an opened image as upright 8-bit RGB, as `open_image` says."""
    return _upright(_as_rgb(image), _orientation(image))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a damaged tag must not cost the picture
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _wide_grey(image).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    # A copy, not the file's own object, which closes with the file.
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _wide_grey(image: Image.Image) -> Image.Image:
    """Greyscale of 16 bits, which PIL's own conversion would clip, as 8 bits."""
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError("its values have no known scale (save it with 8 or 16 bits)")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


# -- views -----------------------------------------------------------------------------------


def centre_view(
    image: Image.Image, size: int, *, interpolation: str = "bicubic", resize_mode: str = "shortest"
) -> Image.Image:
    """The square of ``size`` px that is looked at in evaluation.

    ``shortest`` resizes the short side and crops the centre, as torchvision's ``Resize`` and
    ``CenterCrop`` do on a PIL image (to the bit); ``squash`` resizes both sides.

    Raises:
        UserError: ``interpolation`` or ``resize_mode`` is unknown.
    """
    resample = _resample(interpolation)
    if _resize_mode(resize_mode) == "squash":
        return image.resize((size, size), resample)
    image = _without_ends(image)
    width, height = image.size
    short, long = min(width, height), max(width, height)
    resized_long = int(size * long / short)
    new = (size, resized_long) if width <= height else (resized_long, size)
    image = image.resize(new, resample)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return image.crop((left, top, left + size, top + size))


def train_view(
    image: Image.Image,
    size: int,
    generator: random.Random,
    *,
    interpolation: str = "bicubic",
    crop_min: float = CROP_MIN,
) -> Image.Image:
    """A random resized crop (area ``crop_min`` to 1, aspect 3/4 to 4/3), mirrored half the time.

    The distribution is that of torchvision's ``RandomResizedCrop`` and ``RandomHorizontalFlip``.
    Only ``generator.random()`` is called: the one method whose values Python promises not to
    change between versions.

    Raises:
        UserError: ``interpolation`` is unknown.
    """
    box = crop_box(*image.size, generator, crop_min)
    view = image.crop(box).resize((size, size), _resample(interpolation))
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else view


def crop_box(
    width: int, height: int, generator: random.Random, crop_min: float = CROP_MIN
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop of a width x height px image.

    Area is uniform, aspect log-uniform; after ten crops that do not fit, the largest centred one
    of an allowed aspect is taken (Szegedy et al., 2015, as in torchvision).
    """
    low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    for _ in range(10):
        area = width * height * (crop_min + (1 - crop_min) * generator.random())
        aspect = math.exp(low + (high - low) * generator.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(generator.random() * (height - h + 1))
            left = int(generator.random() * (width - w + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * CROP_RATIO[1])))
    h = min(height, max(1, round(width / CROP_RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _without_ends(image: Image.Image) -> Image.Image:
    width, height = image.size
    keep = _MAX_ASPECT * min(width, height)
    if max(width, height) <= keep:
        return image
    if width > height:
        left = (width - keep) // 2
        return image.crop((left, 0, left + keep, height))
    top = (height - keep) // 2
    return image.crop((0, top, width, top + keep))


def _resample(interpolation: str) -> Image.Resampling:
    if interpolation not in INTERPOLATIONS:
        raise UserError(
            f"interpolation '{interpolation}' is none of {', '.join(INTERPOLATIONS)}; use a "
            "backbone with one of these"
        )
    return INTERPOLATIONS[interpolation]


def _resize_mode(mode: str) -> str:
    if mode not in RESIZE_MODES:
        raise UserError(
            f"resize mode '{mode}' is none of {', '.join(RESIZE_MODES)}; use a backbone with one "
            "of these"
        )
    return mode


# -- many files ------------------------------------------------------------------------------


class Allowance:
    """Bytes that decoded images kept in memory may take, of all stores that share it."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._lock = threading.Lock()

    def take(self, count: int) -> bool:
        """Whether so many bytes are left; if so, they are taken."""
        with self._lock:
            fits = self.used + count <= self.limit
            self.used += count if fits else 0
        return fits

    def give_back(self, count: int) -> None:
        """Let others have so many bytes that were taken."""
        with self._lock:
            self.used -= count


class ImageStore:
    """Views of many image files, of which as many as fit a budget stay decoded in memory.

    What is kept never changes a view; it only saves decoding. Nothing is read at construction.

    Args:
        paths: image files, or whatever ``read`` reads; an image's index is its place here.
        size: side of a view, px.
        interpolation: ``bicubic`` or another of `INTERPOLATIONS`.
        resize_mode: ``shortest`` or ``squash``, of test views; see `centre_view`.
        crop_min: least share of an image's area that a train view shows; the protocol's is 0.08.
        allowance: bytes that kept images may take. First come, first kept.
        threads: decoding threads; by default one a core, at most eight.
        read: one of ``paths`` -> upright RGB, called in those threads; `open_image` if not given.

    Raises:
        UserError: ``interpolation`` or ``resize_mode`` is unknown.
    """

    def __init__(
        self,
        paths: Sequence[Any],
        *,
        size: int,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
        crop_min: float = CROP_MIN,
        allowance: Allowance | None = None,
        threads: int | None = None,
        read: Callable[[Any], Image.Image] | None = None,
    ) -> None:
        _resample(interpolation)
        _resize_mode(resize_mode)
        # A range may be longer than memory: of images that come one after the other.
        self.paths: Sequence[Any] = paths if isinstance(paths, range) else tuple(paths)
        self.size = size
        self.interpolation = interpolation
        self.resize_mode = resize_mode
        self.crop_min = crop_min
        self.allowance = allowance or Allowance(0)
        self.threads = threads or min(8, cpu_count())
        self._read = read
        self._kept: dict[int, Image.Image] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        """The whole image, upright RGB, not to be changed.

        Raises:
            UserError: the file cannot be read.
        """
        if (kept := self._kept.get(index)) is not None:
            return kept
        image = (self._read or open_image)(self.paths[index])
        with self._lock:
            if index not in self._kept and self.allowance.take(_bytes(image)):
                self._kept[index] = image
        return image

    def forget(self) -> None:
        """Let go of the images that are kept; they are decoded again when asked for."""
        with self._lock:
            kept, self._kept = self._kept, {}
            self.allowance.give_back(sum(map(_bytes, kept.values())))

    def test_views(self, indices: Sequence[int]) -> Tensor:
        """(B, 3, size, size) uint8, as `centre_view` makes them.

        Raises:
            UserError: a file cannot be read.
        """
        return next(self.batches([indices]))

    def train_views(self, indices: Sequence[int], *, seed: int, epoch: int) -> Tensor:
        """(B, 3, size, size) uint8, as `train_view` makes them.

        A view is a function of seed, epoch and index alone.

        Raises:
            UserError: a file cannot be read.
        """
        return next(self.train_batches([(epoch, indices)], seed=seed))

    def train_batches(
        self, batches: Iterable[tuple[int, Sequence[int]]], *, seed: int, prefetch: int = 2
    ) -> Iterator[Tensor]:
        """`train_views` batch by batch, as `batches`, across epochs.

        Args:
            batches: the epoch of each, and its B indices.
            seed: of the views.
            prefetch: batches to be ahead of the one in use.
        """
        wanted = ((indices, (seed, epoch)) for epoch, indices in batches)
        return self._made_ahead(wanted, prefetch, None)

    def batches(
        self,
        index_lists: Iterable[Sequence[int]],
        *,
        prefetch: int = 2,
        unreadable: dict[int, str] | None = None,
    ) -> Iterator[Tensor]:
        """`test_views` batch by batch, made in other threads while earlier batches are in use.

        Args:
            index_lists: the batches, B indices each.
            prefetch: batches to be ahead of the one in use.
            unreadable: where given, a file that cannot be read is black in its batch, and the
                sentence why is put here under its index by the time the batch is yielded.

        Yields:
            (B, 3, size, size) uint8.

        Raises:
            UserError: a file cannot be read, and there is no ``unreadable`` to name it in; raised
                in its batch's place.
        """
        wanted = ((indices, None) for indices in index_lists)
        return self._made_ahead(wanted, prefetch, unreadable)

    def _made_ahead(
        self,
        wanted: Iterable[tuple[Sequence[int], tuple[int, int] | None]],
        prefetch: int,
        unreadable: dict[int, str] | None,
    ) -> Iterator[Tensor]:
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="dapt-images")
        started: deque[_Batch] = deque()
        try:
            for indices, train in wanted:
                started.append(self._start(pool, [int(i) for i in indices], train, unreadable))
                if len(started) > prefetch:
                    yield started.popleft().wait()
            while started:
                yield started.popleft().wait()
        finally:
            # Also where the consumer has had enough, or a file could not be read.
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(
        self,
        pool: ThreadPoolExecutor,
        indices: list[int],
        train: tuple[int, int] | None,
        unreadable: dict[int, str] | None,
    ) -> _Batch:
        pixels = np.empty((len(indices), self.size, self.size, 3), dtype=np.uint8)
        work = [
            pool.submit(
                self._fill, pixels[i : i + _CHUNK], indices[i : i + _CHUNK], train, unreadable
            )
            for i in range(0, len(indices), _CHUNK)
        ]
        return _Batch(pixels, work)

    def _fill(
        self,
        pixels: np.ndarray,
        indices: list[int],
        train: tuple[int, int] | None,
        unreadable: dict[int, str] | None,
    ) -> None:
        for row, index in enumerate(indices):
            try:
                image = self.image(index)
            except UserError as error:
                if unreadable is None:
                    raise
                unreadable[index] = str(error)
                pixels[row] = 0
                continue
            if train is None:
                view = centre_view(
                    image,
                    self.size,
                    interpolation=self.interpolation,
                    resize_mode=self.resize_mode,
                )
            else:
                # A string is hashed by SHA-512: the same in every process, and no pattern
                # between neighbouring numbers.
                generator = random.Random(f"{train[0]}/{train[1]}/{index}")
                view = train_view(
                    image,
                    self.size,
                    generator,
                    interpolation=self.interpolation,
                    crop_min=self.crop_min,
                )
            pixels[row] = np.asarray(view)


class _Batch:
    """Pixels (B, S, S, 3) that threads are filling."""

    def __init__(self, pixels: np.ndarray, work: list[Future[None]]) -> None:
        self.pixels = pixels
        self.work = work

    def wait(self) -> Tensor:
        """(B, 3, S, S), once filled; the first bad file's error, if there is one."""
        for part in self.work:
            part.result()
        pixels = torch.from_numpy(self.pixels).permute(0, 3, 1, 2)
        # Page-locked, a batch goes to a GPU while that is at work on another. Untested, for want
        # of one. Crops stay on the CPU: the protocol's bicubic resizing is PIL's.
        views = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        return views.copy_(pixels)


def _bytes(image: Image.Image) -> int:
    return 4 * image.width * image.height  # PIL pads RGB pixels to four bytes
