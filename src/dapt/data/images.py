"""Images as Python holds them, as upright RGB, and views of many, made in batches."""

from __future__ import annotations

import io
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from joblib import cpu_count
from PIL import Image
from torch import Tensor

from dapt.data.arrays import pixels_of
from dapt.data.grey import Scale, extent_of, is_deep, scale_for
from dapt.data.pictures import decode_image, grey_extent, open_image, upright_rgb
from dapt.data.spellings import PATH_COLUMNS, column_key
from dapt.data.views import CROP_MIN, centre_view, check_resizing, train_view
from dapt.errors import InputError, UserError

# Columns that hold images themselves, and those that say where images are.
IMAGE_COLUMNS = ("image", "img", "picture")
FILE_COLUMNS = tuple(name for name in PATH_COLUMNS if not name.endswith("id"))

_View = Callable[[int], Image.Image]
# Two threads must not decode one picture that PIL has opened and not yet decoded.
_one_opened = threading.Lock()
_SAMPLE = 64  # images that a dataset's scale of grey is found by
_CHUNK = 8  # images a thread takes at a time: enough to hide the cost of handing them out


def first_of(names: Iterable[str], there: Iterable[Any]) -> Any:
    """Of a table's columns or a row's keys the first of these names, however it is spelt there."""
    own = {column_key(str(key)): key for key in there}
    return next((own[name] for name in names if name in own), None)


def read_picture(value: Any, grey: Scale | None = None) -> Image.Image:
    """Any of what stands for an image, as upright 8-bit RGB.

    That is a path; a file's bytes, or the file, opened to read bytes; a PIL image; an array or
    tensor of (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, uint8, truth values or
    floating point in 0 .. 1; a row of a table; or a pair of any of these and a label. ``grey`` and
    errors are `open_image`'s, or it is an `InputError`.
    """
    if isinstance(value, (str, os.PathLike)):
        return open_image(os.fspath(value), grey)
    if hasattr(value, "read") and hasattr(value, "seek"):
        value = _content_of(value)
    if isinstance(value, bytes | bytearray | memoryview):
        content = io.BytesIO(value)
        return decode_image(content, f"of {content.getbuffer().nbytes:,} bytes", grey=grey)
    if isinstance(value, Image.Image):
        try:
            with _one_opened:
                value.load()
            return upright_rgb(value, grey)
        except Exception as error:  # one from a file is decoded only now; see `decode_image`
            raise InputError(f"an image of mode {value.mode} cannot be read ({error})") from error
    if isinstance(value, Mapping) or is_pair(value):
        return read_picture(image_in(value), grey)
    if (pixels := pixels_of(value)) is not None:
        return upright_rgb(Image.fromarray(pixels))
    hint = "give paths, PIL images, arrays of (H, W, 3), tensors of (3, H, W), or a dataset"
    raise InputError(f"{type(value).__name__} is no image; {hint}")


def is_pair(value: Any) -> bool:
    """Whether it is an image and its label, as datasets of torch give them."""
    pair = isinstance(value, tuple | list) and len(value) == 2
    return pair and not (isinstance(value, list) and isinstance(value[1], list))


def spread(listed: Sequence[Any]) -> list[Any]:
    """Some of a list, evenly spread over it; of others, a lazy dataset makes nothing."""
    return [listed[i] for i in range(0, len(listed), max(1, -(-len(listed) // _SAMPLE)))]


def sampled_grey(sources: Sequence[Any]) -> Scale | None:
    """What of grey of more than 8 bits is to be black and white, for all of a dataset's images.

    Headers of some images spread over the sources, as `read_picture` takes them, say whether there
    are such; their values say how far they go (see `scale_for`). None where none of them is.
    """
    found = []
    for source in spread(sources):
        # What cannot be read is told where it is used.
        with suppress(UserError, OSError, ValueError):
            value = image_in(source)
            if isinstance(value, Image.Image):
                found.append(extent_of(value) if is_deep(value) else None)
            elif isinstance(value, (str, bytes, os.PathLike)):
                found.append(grey_extent(value if isinstance(value, bytes) else os.fspath(value)))
    return scale_for(extent for extent in found if extent is not None)


def image_in(value: Any) -> Any:
    """What stands for the image in a row or a pair, None where it is missing; else ``value``."""
    if isinstance(value, Mapping):
        # Bytes and path are those of an image that a dataset has not decoded.
        own = {column_key(str(name)): cell for name, cell in value.items()}
        cells = [own[n] for n in (*IMAGE_COLUMNS, "bytes", *FILE_COLUMNS) if n in own]
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
    grey: Scale | None = None  # what of deep grey is black and white; see `open_image`
    crop_min: float = CROP_MIN  # least share of an image's area that a train view shows
    allowance: Allowance = field(default_factory=lambda: Allowance(0))  # first come, first kept
    threads: int = 0  # that decode; by default one a core, at most eight
    # Upright RGB of a source, in those threads; by default `read_picture`.
    read: Callable[[Any], Image.Image] | None = None

    def __post_init__(self) -> None:
        check_resizing(self.interpolation, self.resize_mode)
        self.threads = self.threads or min(8, cpu_count())
        self._kept: dict[int, Image.Image] = {}
        self._read = self.read or partial(read_picture, grey=self.grey)

    def __len__(self) -> int:
        return len(self.sources)

    def image(self, index: int) -> Image.Image:
        """The whole image, upright RGB, not to be changed; a `UserError` if it cannot be read."""
        if (kept := self._kept.get(index)) is not None:
            return kept
        image = self._read(self.sources[index])
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
                # Page-locked where this process uses a GPU, to go there while it is at work. Crops
                # stay on the CPU: the protocol's bicubic resizing is PIL's.
                shape, pinned = (len(indices), 3, self.size, self.size), torch.cuda.is_initialized()
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
