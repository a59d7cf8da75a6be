"""A tuned classifier on new images, however many there are."""

from __future__ import annotations

import glob
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dapt.data import ImageStore, has_image_name, images_below, open_image
from dapt.engine.classifier import Classifier
from dapt.errors import UserError
from dapt.safe.files import user_path


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first, with their probabilities."""

    path: Path
    classes: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be read, and why, in a sentence."""

    path: Path
    reason: str


def predict_each(
    classifier: Classifier,
    paths: Iterable[Path | str],
    *,
    top: int = 1,
    batch_size: int = 100,
) -> Iterator[Prediction | Unreadable]:
    """Classify image files one after the other, in order; memory does not grow with their number.

    Files are named, read and decoded a few batches ahead of the model, in other threads.

    Args:
        classifier: from `load_classifier`.
        paths: image files; may be an iterator that has no end.
        top: how many classes to name for each, best first.
        batch_size: images a batch.
    """
    seen, names = classifier.backbone.preprocessing, classifier.class_names
    ahead: dict[int, Path] = {}  # images that are named but not yet classified
    reasons: dict[int, str] = {}

    def batches() -> Iterator[list[int]]:
        rest, start = iter(paths), 0
        while batch := [Path(path) for path in islice(rest, batch_size)]:
            ahead.update(enumerate(batch, start))
            yield list(range(start, start + len(batch)))
            start += len(batch)

    store = ImageStore(
        range(sys.maxsize),
        size=seen.size,
        interpolation=seen.interpolation,
        resize_mode=seen.resize_mode,
        read=lambda index: open_image(ahead[index]),
    )
    done = 0
    for views in store.batches(batches(), unreadable=reasons):
        with torch.inference_mode():
            logits = classifier(views).cpu()
        for classes in best_classes(logits.softmax(-1), names, top):
            path, reason = ahead.pop(done), reasons.pop(done, None)
            done += 1
            yield Unreadable(path, reason) if reason is not None else Prediction(path, classes)


def best_classes(
    probabilities: Tensor, names: Sequence[str], top: int
) -> list[tuple[tuple[str, float], ...]]:
    """For each row of (n, C) probabilities the ``top`` classes, best first, as name and value."""
    values, places = probabilities.topk(min(top, len(names)))
    return [
        tuple((names[c], p) for c, p in zip(cs, ps, strict=True))
        for cs, ps in zip(places.tolist(), values.tolist(), strict=True)
    ]


def find_images(arguments: Iterable[Path | str]) -> list[Path]:
    """Image files that arguments mean: files, folders (searched through), and patterns.

    A pattern is one of `glob`, with ``**`` for any folders, in which links are followed to folders
    that were not yet searched; a file of that very name goes first.
    Each argument's images are in sorted order; hidden ones in folders are left out. What has an
    image's name and is none comes along: that it cannot be read is told, not passed over.

    Raises:
        UserError: a path does not exist, a folder holds no image, or nothing matches a pattern.
    """
    found: list[Path] = []
    for argument in arguments:
        path = user_path(argument)
        if path.is_dir():
            if not (names := images_below(path)):
                raise UserError(f"folder {path} holds no images; give one that does")
            found += sorted(path / name for name in names)
        elif path.exists():
            found.append(path)
        elif glob.has_magic(str(path)):
            matches = [Path(name) for name in sorted(_matches(path))]
            images = [m for m in matches if has_image_name(m.name) and not m.is_dir()]
            if not images:
                raise UserError(f"no image matches {path}; check the pattern")
            found += images
        else:
            raise UserError(f"image {path} does not exist; check the path")
    if not found:
        raise UserError("no images given; name image files or folders")
    return found


def _matches(pattern: Path) -> set[str]:
    """What `glob` finds; that would follow links in ``**`` round and round."""
    if "**" not in pattern.parts:
        return set(glob.glob(str(pattern)))
    place = pattern.parts.index("**")
    before, after = pattern.parts[:place], pattern.parts[place + 1 :] or ("*",)
    found: set[str] = set()
    for top in glob.glob(str(Path(*before))):
        for folder in _folders_below(top):
            found |= _matches(Path(glob.escape(folder), *after))
    return found


def _folders_below(top: str) -> Iterator[str]:
    """A folder and those in it, each once, by links where there is no other way; no hidden ones."""
    seen, links = set[str](), deque([top])
    while links:
        for place, folders, _ in os.walk(links.popleft()):
            if (real := os.path.realpath(place)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            links += [link for n in folders if os.path.islink(link := os.path.join(place, n))]
            yield place


def named_in(file: BinaryIO, end: bytes = b"\n") -> Iterator[Path]:
    """Paths that a list names, one after the other, as they arrive; empty names are left out.

    Args:
        file: the list.
        end: what ends a name: a line feed, or a NUL byte as of ``find -print0``.
    """
    rest = b""
    while chunk := _available(file):
        *names, rest = (rest + chunk).split(end)
        yield from map(_path, filter(None, (_stripped(name, end) for name in names)))
    if rest := _stripped(rest, end):
        yield _path(rest)


def _available(file: BinaryIO) -> bytes:
    """What is there already, at least a byte, unless the file ends."""
    read = getattr(file, "read1", file.read)
    return read(65536)


def _stripped(name: bytes, end: bytes) -> bytes:
    return name.removesuffix(b"\r") if end == b"\n" else name


def _path(name: bytes) -> Path:
    return Path(os.fsdecode(name))
