"""Many images as batches of uint8 views, decoded once and ahead of the model."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import cpu_count
from PIL import Image
from torch import Tensor

from dapt.data import images
from dapt.data.images import centre_view, check_resizing, open_image, read_picture, train_view
from dapt.errors import UserError

_CHUNK = 8  # images a thread takes at a time: enough to hide the cost of handing them out
_View = Callable[[int], Image.Image]


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


def _read(source: Any) -> Image.Image:
    return open_image(source) if isinstance(source, str | Path) else read_picture(source)


@dataclass(eq=False)
class ImageStore:
    """Views of many images, of which as many as fit a budget stay decoded in memory.

    What is kept changes no view. Sources are taken only when they are read: there may be more than
    memory holds.
    """

    sources: Sequence[Any]  # image files, or whatever else `read_picture` takes
    _: KW_ONLY
    size: int  # side of a view, px
    interpolation: str = "bicubic"  # or another that `check_resizing` knows
    resize_mode: str = "shortest"  # or "squash", of test views; see `centre_view`
    crop_min: float = images.CROP_MIN  # least share of an image's area that a train view shows
    allowance: Allowance = field(default_factory=lambda: Allowance(0))  # first come, first kept
    threads: int = 0  # that decode; by default one a core, at most eight
    read: Callable[[Any], Image.Image] = _read  # upright RGB of a source, called in those threads

    def __post_init__(self) -> None:
        check_resizing(self.interpolation, self.resize_mode)
        self.threads = self.threads or min(8, cpu_count())
        self._kept: dict[int, Image.Image] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.sources)

    def image(self, index: int) -> Image.Image:
        """The whole image, upright RGB, not to be changed; a `UserError` if it cannot be read."""
        if (kept := self._kept.get(index)) is not None:
            return kept
        image = self.read(self.sources[index])
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
        """(B, 3, size, size) uint8, as `centre_view` makes them; errors are those of `batches`."""
        return next(self.batches([indices]))

    def train_batches(
        self, batches: Iterable[tuple[int, Sequence[int]]], *, seed: int, prefetch: int = 2
    ) -> Iterator[Tensor]:
        """As `batches`, of `train_view`s, which are functions of seed, epoch and index alone."""
        wanted = ((ids, partial(self._train_view, f"{seed}/{epoch}")) for epoch, ids in batches)
        return self._made_ahead(wanted, prefetch)

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
        view = partial(self._test_view, unreadable)
        return self._made_ahead(((indices, view) for indices in lists), prefetch)

    def _test_view(self, unreadable: dict[int, str] | None, index: int) -> Image.Image:
        try:
            image = self.image(index)
        except UserError as error:
            if unreadable is None:
                raise
            unreadable[index] = str(error)
            return Image.new("RGB", (self.size, self.size))
        how = {"interpolation": self.interpolation, "resize_mode": self.resize_mode}
        return centre_view(image, self.size, **how)

    def _train_view(self, seed: str, index: int) -> Image.Image:
        # A string is hashed by SHA-512: the same everywhere, without patterns between neighbours.
        generator, how = random.Random(f"{seed}/{index}"), {"interpolation": self.interpolation}
        return train_view(self.image(index), self.size, generator, crop_min=self.crop_min, **how)

    def _made_ahead(
        self, wanted: Iterable[tuple[Sequence[int], _View]], prefetch: int
    ) -> Iterator[Tensor]:
        """A batch of views of each of these indices, by the function beside them."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="dapt-images")
        started: deque[tuple[Tensor, list[Future[None]]]] = deque()
        try:
            for indices, view in wanted:
                # Page-locked, to go to a GPU while it is at work: untested, for want of one. Crops
                # stay on the CPU: the protocol's bicubic resizing is PIL's.
                shape, pinned = (len(indices), 3, self.size, self.size), torch.cuda.is_available()
                views = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
                parts = [slice(i, i + _CHUNK) for i in range(0, len(indices), _CHUNK)]
                work = [pool.submit(_fill, views[p].numpy(), indices[p], view) for p in parts]
                started.append((views, work))
                if len(started) > prefetch:
                    yield _finished(*started.popleft())
            while started:
                yield _finished(*started.popleft())
        finally:
            # Also where the consumer has had enough, or an image could not be read.
            pool.shutdown(wait=True, cancel_futures=True)


def _fill(pixels: np.ndarray, indices: Sequence[int], view: _View) -> None:
    for row, index in zip(pixels, indices, strict=True):
        row[:] = np.asarray(view(int(index))).transpose(2, 0, 1)


def _finished(views: Tensor, work: list[Future[None]]) -> Tensor:
    for part in work:
        part.result()
    return views


def _bytes(image: Image.Image) -> int:
    return 4 * image.width * image.height  # PIL pads RGB pixels to four bytes
