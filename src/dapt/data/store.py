"""Many images as batches of uint8 views, decoded once and ahead of the model."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import cpu_count
from PIL import Image
from torch import Tensor

from dapt.data.images import CROP_MIN, centre_view, check_resizing, open_image, train_view
from dapt.data.pictures import read_picture
from dapt.errors import UserError

# Images a thread takes at a time: enough to hide the cost of handing them out.
_CHUNK = 8


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
    """Views of many images, of which as many as fit a budget stay decoded in memory.

    What is kept never changes a view; it only saves decoding. Nothing is read at construction.

    Args:
        sources: image files, or whatever else `read_picture` takes; an image's index is its place
            here. They are taken when they are read: there may be more than memory holds.
        size: side of a view, px.
        interpolation: ``bicubic`` or another of `INTERPOLATIONS`.
        resize_mode: ``shortest`` or ``squash``, of test views; see `centre_view`.
        crop_min: least share of an image's area that a train view shows; the protocol's is 0.08.
        allowance: bytes that kept images may take. First come, first kept.
        threads: decoding threads; by default one a core, at most eight.
        read: one of ``sources`` -> upright RGB, called in those threads, where they are neither
            files nor pictures.

    Raises:
        UserError: ``interpolation`` or ``resize_mode`` is unknown.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        *,
        size: int,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
        crop_min: float = CROP_MIN,
        allowance: Allowance | None = None,
        threads: int | None = None,
        read: Callable[[Any], Image.Image] | None = None,
    ) -> None:
        check_resizing(interpolation, resize_mode)
        self.sources, self.size = sources, size
        self.interpolation, self.resize_mode, self.crop_min = interpolation, resize_mode, crop_min
        self.allowance = allowance or Allowance(0)
        self.threads = threads or min(8, cpu_count())
        self._read = read or _read
        self._kept: dict[int, Image.Image] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.sources)

    def image(self, index: int) -> Image.Image:
        """The whole image, upright RGB, not to be changed.

        Raises:
            UserError: it cannot be read.
        """
        if (kept := self._kept.get(index)) is not None:
            return kept
        image = self._read(self.sources[index])
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
        """As `batches`, of views that `train_view` makes; given the epoch of each, and indices.

        A view is a function of seed, epoch and index alone.
        """
        wanted = ((indices, f"{seed}/{epoch}") for epoch, indices in batches)
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
            unreadable: where given, an image that cannot be read is black in its batch, and the
                sentence why is put here under its index by the time the batch is yielded.

        Yields:
            (B, 3, size, size) uint8.

        Raises:
            UserError: an image cannot be read, and there is no ``unreadable`` to name it in;
                raised in its batch's place.
        """
        return self._made_ahead(((indices, None) for indices in index_lists), prefetch, unreadable)

    def _made_ahead(
        self,
        wanted: Iterable[tuple[Sequence[int], str | None]],
        prefetch: int,
        unreadable: dict[int, str] | None,
    ) -> Iterator[Tensor]:
        """Views of batches of indices; those beside a seed are train views."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="dapt-images")
        started: deque[tuple[Tensor, list[Future[None]]]] = deque()
        try:
            for indices, seed in wanted:
                started.append(self._start(pool, [int(i) for i in indices], seed, unreadable))
                if len(started) > prefetch:
                    yield _finished(*started.popleft())
            while started:
                yield _finished(*started.popleft())
        finally:
            # Also where the consumer has had enough, or an image could not be read.
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(
        self,
        pool: ThreadPoolExecutor,
        indices: list[int],
        seed: str | None,
        unreadable: dict[int, str] | None,
    ) -> tuple[Tensor, list[Future[None]]]:
        """A batch's views, and the work that is filling them."""
        # Page-locked, a batch goes to a GPU while that is at work on another. Crops stay on the
        # CPU: the protocol's bicubic resizing is PIL's.
        shape, pinned = (len(indices), 3, self.size, self.size), torch.cuda.is_available()
        views = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        pixels = views.numpy()

        def fill(start: int) -> None:
            for row, index in enumerate(indices[start : start + _CHUNK], start):
                pixels[row] = self._pixels(index, seed, unreadable)

        return views, [pool.submit(fill, start) for start in range(0, len(indices), _CHUNK)]

    def _pixels(
        self, index: int, seed: str | None, unreadable: dict[int, str] | None
    ) -> np.ndarray | int:
        try:
            image = self.image(index)
        except UserError as error:
            if unreadable is None:
                raise
            unreadable[index] = str(error)
            return 0
        way = {"interpolation": self.interpolation}
        if seed is None:
            view = centre_view(image, self.size, resize_mode=self.resize_mode, **way)
        else:
            # A string is hashed by SHA-512: the same in every process, and no pattern between
            # neighbouring numbers.
            generator = random.Random(f"{seed}/{index}")
            view = train_view(image, self.size, generator, crop_min=self.crop_min, **way)
        return np.asarray(view).transpose(2, 0, 1)


def _finished(views: Tensor, work: list[Future[None]]) -> Tensor:
    for part in work:
        part.result()
    return views


def _read(source: Any) -> Image.Image:
    return open_image(source) if isinstance(source, str | Path) else read_picture(source)


def _bytes(image: Image.Image) -> int:
    return 4 * image.width * image.height  # PIL pads RGB pixels to four bytes
