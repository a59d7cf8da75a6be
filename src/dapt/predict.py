"""A tuned classifier on new images, however many there are."""

from __future__ import annotations

import glob
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from dapt.data import ImageStore, has_image_name, images_below, open_image
from dapt.data.left_out import LeftOut
from dapt.data.pictures import missing_extras
from dapt.data.spellings import is_service
from dapt.engine.classifier import Classifier
from dapt.errors import UserError
from dapt.safe.files import require_there, user_path


class Prediction(NamedTuple):
    """Classes of one image, the most probable first, with their probabilities.

    Of a classifier that gives several labels, those that reach their thresholds: none, or more.
    """

    path: Path
    classes: tuple[tuple[str, float], ...]


class Unreadable(NamedTuple):
    """An image that could not be read, and why, in a sentence."""

    path: Path
    reason: str


def predict_each(
    classifier: Classifier, paths: Iterable[Path | str], *, top: int = 1, batch_size: int = 100
) -> Iterator[Prediction | Unreadable]:
    """Classify image files in order; memory does not grow with their number, which may be endless.

    Files are named, read and decoded a few batches ahead of the model, in other threads; of each
    image the ``top`` classes are named, or its labels where it may have several.
    """
    ahead: dict[int, Path] = {}  # images that are named but not yet classified
    reasons: dict[int, str] = {}

    def batches() -> Iterator[list[int]]:
        numbered = enumerate(map(Path, paths))
        while batch := dict(islice(numbered, batch_size)):
            ahead.update(batch)
            yield list(batch)

    store = ImageStore(
        range(sys.maxsize),
        read=lambda index: open_image(ahead[index], classifier.grey),
        **classifier.backbone.preprocessing.of_views(),
    )
    for views in store.batches(batches(), unreadable=reasons):
        with torch.inference_mode():
            found = classifier.probabilities(classifier(views).cpu())
        for classes in named(found, classifier.class_names, classifier.thresholds, top):
            number = next(iter(ahead))  # they come in order
            path, reason = ahead.pop(number), reasons.pop(number, None)
            yield Prediction(path, classes) if reason is None else Unreadable(path, reason)


def best(values: Tensor, names: Sequence[Any], top: int) -> list[tuple[tuple[Any, float], ...]]:
    """For each row of (n, C) values the ``top`` highest, best first, as name and value."""
    values, places = values.topk(min(top, len(names)))
    rows = zip(places.tolist(), values.tolist(), strict=True)
    return [tuple((names[c], p) for c, p in zip(*row, strict=True)) for row in rows]


def named(
    values: Tensor, names: Sequence[Any], thresholds: Tensor | None, top: int
) -> list[tuple[tuple[Any, float], ...]]:
    """As `best`; where there are thresholds (C,), those of each row that reach them."""
    if thresholds is None:
        return best(values, names, top)
    ranked, limits = best(values, range(len(names)), len(names)), thresholds.tolist()
    return [tuple((names[c], p) for c, p in row if p >= limits[c]) for row in ranked]


def find_images(arguments: Iterable[Path | str]) -> list[Path]:
    """Image files that arguments mean: files, folders (searched through), and patterns.

    A pattern is one of `glob`, with ``**`` for any folders, in which links are followed to folders
    that were not yet searched; a file of that very name goes first.
    Each argument's images are in sorted order; hidden ones in folders, and those in folders that
    systems keep for themselves (thumbnails of a NAS), are left out. What has an
    image's name and is none comes along: that it cannot be read is told, not passed over. A
    `UserError` says that a path does not exist, or that there is no image where it leads.
    """
    found: list[Path] = []
    for argument in arguments:
        path = user_path(argument)
        if path.is_dir():
            if not (names := images_below(path, left=(left := LeftOut()))):
                hint = missing_extras(left.found.get("no image's name", ())) or "give one that does"
                raise UserError(f"folder {path} holds no images; {hint}")
            found += sorted(path / name for name in names)
        elif path.exists():
            found.append(path)
        elif glob.has_magic(str(path)):
            matches = [Path(name) for name in sorted(_matches(path))]
            if not (kept := [m for m in matches if has_image_name(m.name) and not m.is_dir()]):
                raise UserError(f"no image matches {path}; check the pattern")
            found += kept
        else:
            require_there(path, "image")
    if not found:
        raise UserError("no images given; name image files or folders")
    return found


def _matches(pattern: Path) -> set[str]:
    """What `glob` finds; that would follow links in ``**`` round and round."""
    if "**" not in pattern.parts:
        return set(glob.glob(str(pattern)))
    place = pattern.parts.index("**")
    before, after = pattern.parts[:place], pattern.parts[place + 1 :] or ("*",)
    folders = (f for top in glob.glob(str(Path(*before))) for f in _folders_below(top))
    return set().union(*(_matches(Path(glob.escape(folder), *after)) for folder in folders))


def _folders_below(top: str) -> Iterator[str]:
    """A folder and those in it, each once, by links where there is no other way; no hidden ones."""
    seen, links = set[str](), deque([top])
    while links:
        for place, folders, _ in os.walk(links.popleft()):
            if (real := os.path.realpath(place)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(n for n in folders if n[0] != "." and not is_service(n))
            links += [link for n in folders if os.path.islink(link := os.path.join(place, n))]
            yield place


def named_in(file: BinaryIO, end: bytes = b"\n") -> Iterator[Path]:
    """Paths that a list names, as they arrive; empty names are left out.

    A line feed ends a name, or a NUL byte, as of ``find -print0``.
    """
    # What is there already, at least a byte, unless the file ends.
    read, rest = getattr(file, "read1", file.read), b""
    for chunk in chain(iter(lambda: read(65536), b""), [end]):  # the last name may have no end
        *names, rest = (rest + chunk).split(end)
        for name in names:
            if name := name.removesuffix(b"\r") if end == b"\n" else name:
                yield Path(os.fsdecode(name))
