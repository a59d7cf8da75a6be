"""What a task is made of, and what is checked of every listing wherever it was read from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dapt.errors import UserError
from dapt.safe.files import file_size

PARTS = ("train", "val", "test")

# (path relative to the task's root, label)
Pair = tuple[str, int]

# Rooted or drive-lettered, a '..' step, or a character no file system takes. Of the surrogates,
# those that stand for a file name's bytes that are no UTF-8 are left (PEP 383).
_UNSAFE_PATH = re.compile(
    r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|[\0\ud800-\udc7f\udd00-\udfff]"
)
_UNSAFE_NAME = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Item:
    """One labelled image: ``path`` is relative to the task's root, with forward slashes."""

    path: str
    label: int
    class_name: str


@dataclass(frozen=True)
class Task:
    """Classes, and the images to tune on (train, val) and to evaluate on (test).

    ``class_names`` is in label order. ``template`` holds ``{}`` where the class name goes, for
    text prompts that are not learned. A target domain has test images only. ``source_sha256`` is
    the hash of the files that images were unpacked from, where they were. ``notes`` are sentences
    on what its user should know, for whoever opens it to tell. Of a subset of classes ``part_of``
    is the task that has them all, with their labels there.
    """

    name: str
    root: Path
    class_names: tuple[str, ...]
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    template: str = "a photo of a {}."
    source_sha256: str | None = None
    notes: tuple[str, ...] = ()
    part_of: tuple[Task, range] | None = None

    def image_path(self, item: Item) -> Path:
        """Where the item's image file is."""
        return self.root / item.path

    @cached_property
    def test_by_size(self) -> dict[int, list[Item]]:
        """Test images by the bytes of their files; found out once, for all runs of a grid."""
        found: dict[int, list[Item]] = {}
        for item in self.test:
            if (size := file_size(self.image_path(item))) is not None:
                found.setdefault(size, []).append(item)
        return found


def subset_classes(task: Task, which: str) -> Task:
    """A task's first half of classes by label (``base``, the larger), the other (``new``), or all.

    Labels are counted anew from 0.

    Raises:
        UserError: ``which`` is none of these, or there is one class only.
    """
    if which == "all":
        return task
    if which not in ("base", "new"):
        raise UserError(f"classes '{which}' must be all, base or new")
    count = len(task.class_names)
    if count < 2:
        raise UserError(f"dataset '{task.name}' has one class; base and new classes need two")
    half = (count + 1) // 2
    labels = range(half) if which == "base" else range(half, count)
    return replace(
        task,
        class_names=task.class_names[labels.start : labels.stop],
        train=subset_items(task.train, labels),
        val=subset_items(task.val, labels),
        test=subset_items(task.test, labels),
        part_of=(task, labels),
    )


def subset_items(items: Sequence[Item], labels: range) -> tuple[Item, ...]:
    """The items of these labels, which are counted anew from 0."""
    return tuple(replace(i, label=i.label - labels.start) for i in items if i.label in labels)


@dataclass(frozen=True)
class Listing:
    """What a reader finds: class names in label order, and (path, label) pairs by part."""

    class_names: tuple[str, ...]
    train: tuple[Pair, ...] = ()
    val: tuple[Pair, ...] = ()
    test: tuple[Pair, ...] = ()


def check_path(text: str, where: str) -> str:
    """Return ``text`` if it is a relative path that stays below its root.

    Links on disk are followed, wherever they lead: datasets are laid out with them. What is at
    their end is read as an image, or named in a warning, and goes nowhere else.

    Raises:
        UserError: it is empty, absolute, or has a '..' step; ``where`` tells where it was read.
    """
    if not text.strip() or _UNSAFE_PATH.search(text):
        raise UserError(
            f"{where}: {text!r} is no safe image path; give one relative to the dataset's folder, "
            "without '..'"
        )
    return text


def read_as(class_name: str) -> str:
    """How prompts read a class name, as far as two names can differ to a tokenizer."""
    return " ".join(class_name.replace("_", " ").split()).casefold()


def names_alike(names: Sequence[str]) -> list[tuple[int, int]]:
    """Labels of classes that no prompt can tell apart, each with the first of its name."""
    first: dict[str, int] = {}
    return [
        (first[read_as(name)], label)
        for label, name in enumerate(names)
        if first.setdefault(read_as(name), label) != label
    ]


def check_class_names(names: Sequence[str], where: str, *, distinct: bool = True) -> None:
    """Refuse blank names, control characters and (unless told otherwise) two equal names.

    Two names that differ by case, spaces or underscores alone are equal: no prompt can tell
    them apart.

    Raises:
        UserError: with ``where``, the file or folder the names come from.
    """
    for name in names:
        if not read_as(name) or _UNSAFE_NAME.search(name):
            raise UserError(f"{where}: {name!r} is no class name; give a printable one")
    if distinct and (alike := names_alike(names)):
        one, other = (names[label] for label in alike[0])
        raise UserError(
            f"{where}: classes '{one}' and '{other}' have the same name to a text prompt; rename "
            "one, or give --class-names"
        )


def check_listing(listing: Listing, where: str, *, tuned: bool = True) -> None:
    """There must be images to test on and, where it is ``tuned`` on, to tune on for every class.

    Raises:
        UserError: with ``where``, the file or folder the listing was read from.
    """
    if tuned and not listing.train:
        raise UserError(f"{where} names no images to tune on; check that it is complete")
    if not listing.test:
        raise UserError(
            f"{where} names no test images; every task needs some (classes of one image have none "
            "to spare)"
        )
    if not tuned:
        return
    taught = {label for _, label in listing.train}
    for part in ("test", "val"):
        for path, label in getattr(listing, part):
            if label not in taught:
                raise UserError(
                    f"{where}: class '{listing.class_names[label]}' of {part} image {path} has no "
                    "train images; add some, or take the class out"
                )


def label_order(names: set[str]) -> list[str]:
    """Class keys in label order: by number where all are numbers, else by code point."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)
