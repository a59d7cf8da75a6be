"""What a task is made of, and what is checked of every task wherever it was read from."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dapt.errors import UserError, refusing
from dapt.safe.files import file_size

PARTS = ("train", "val", "test")
DEFAULT_TEMPLATE = "a photo of a {}."

# Names that columns of images and labels have, the usual ones first.
IMAGE_COLUMNS = ("image", "img", "picture")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls")

# Rooted or drive-lettered, a '..' step, or a character no file system takes. Of the surrogates,
# those that stand for a file name's bytes that are no UTF-8 are left (PEP 383).
_UNSAFE_PATH = re.compile(
    r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|[\0\ud800-\udc7f\udd00-\udfff]"
)
_UNSAFE_NAME = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Item:
    """One labelled image."""

    path: str  # relative to the task's root, with forward slashes
    label: int
    class_name: str


@dataclass(frozen=True)
class Task:
    """Classes, and images to tune on (train, val; a target domain has none) and to evaluate on."""

    name: str
    root: Path
    class_names: tuple[str, ...]  # in label order
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    template: str = DEFAULT_TEMPLATE  # {} is the class name, in text prompts that are not learned
    source_sha256: str | None = None  # of the files that images were unpacked from
    notes: tuple[str, ...] = ()  # sentences that whoever opens it should tell
    part_of: tuple[Task, range] | None = None  # of some classes: that of all, their labels there
    # Images in memory, as `read_picture` takes them. Where there are some, an item's path is its
    # number among them, or the absolute path of a file.
    pictures: Sequence[Any] | None = field(default=None, compare=False, repr=False)

    def image_path(self, item: Item) -> Path:
        """Where the item's image file is."""
        return self.root / item.path

    def source(self, item: Item) -> Any:
        """What the item's image is read from: the path of its file, or one of ``pictures``."""
        if self.pictures is not None and item.path.isdecimal():
            return self.pictures[int(item.path)]
        return self.image_path(item)

    @cached_property
    def test_by_size(self) -> dict[int | None, list[Item]]:
        """Test images by the bytes of their files; found out once, for all runs of a grid."""
        return grouped(self.test, lambda item: file_size(self.image_path(item)))


def grouped(items: Iterable[Item], key: Callable[[Item], Any]) -> dict[Any, list[Item]]:
    """The items by a key, keys in order of first appearance."""
    found: dict[Any, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def subset_classes(task: Task, which: str) -> Task:
    """A task's first half of classes by label (``base``, the larger), the other (``new``), or all.

    Labels are counted anew from 0; a `UserError` where there is one class.
    """
    if which == "all":
        return task
    if which not in ("base", "new"):
        raise UserError(f"classes '{which}' must be all, base or new")
    names = task.class_names
    if len(names) < 2:
        raise UserError(f"dataset '{task.name}' has one class; base and new classes need two")
    half = (len(names) + 1) // 2
    labels = range(half) if which == "base" else range(half, len(names))
    names, part_of = names[labels.start : labels.stop], (task, labels)
    train, val, test = (subset_items(part, labels) for part in (task.train, task.val, task.test))
    return replace(task, class_names=names, train=train, val=val, test=test, part_of=part_of)


def subset_items(items: Sequence[Item], labels: range) -> tuple[Item, ...]:
    """The items of these labels, which are counted anew from 0."""
    return tuple(replace(i, label=i.label - labels.start) for i in items if i.label in labels)


Row = tuple[str, str, Any]  # an image's part ("" where nothing is split yet), path and class
Split = tuple[float, int]  # of images without parts: the share of each class to test on, the seed


def make_task(
    name: str,
    root: Path,
    rows: Sequence[Row],
    where: str,
    *,
    names: Mapping[Any, str] | None = None,
    split: Split | None = None,
    tuned: bool = True,
    **facts: Any,
) -> Task:
    """The task that a reader's rows make, once checked; ``where`` is what they were read from.

    ``names`` are the class names in label order, by what rows call the classes; if not given, rows
    have the names. ``split`` is of rows without a part. Unless it tests on everything, or the task
    is not ``tuned``, every class needs images to tune on. ``facts`` are other fields of the task.
    """
    names = names or {key: key for key in label_order({key for _, _, key in rows})}
    check_class_names(list(names.values()), where, distinct=False)
    labels = {key: label for label, key in enumerate(names)}
    parts: dict[str, list[Item]] = {part: [] for part in (*PARTS, "")}
    for part, path, key in rows:
        parts[part].append(Item(check_path(path, where), labels[key], names[key]))
    tested = _tested(parts[""], *split) if split else set()
    for item in parts[""]:
        parts["test" if item in tested else "train"].append(item)
    train, val, test, _ = map(tuple, parts.values())
    tuned = tuned and not (split and split[0] == 1)
    if tuned and not train:
        raise UserError(f"{where} names no images to tune on; check that it is complete")
    if not test:
        hint = "every task needs some (classes of one image have none to spare)"
        raise UserError(f"{where} names no test images; {hint}")
    taught = {item.label for item in train}
    for part in ("test", "val") if tuned else ():
        if odd := next((item for item in parts[part] if item.label not in taught), None):
            what = f"class '{odd.class_name}' of {part} image {odd.path} has no train images"
            raise UserError(f"{where}: {what}; add some, or take the class out")
    return Task(name, root, tuple(names.values()), train, val, test, **facts)


def _tested(items: list[Item], fraction: float, seed: int) -> set[Item]:
    """The test images among all, of each class by itself, at random but always the same."""
    if fraction == 1:
        return set(items)
    tested: set[Item] = set()
    by_class = grouped(sorted(items, key=lambda i: i.path), lambda i: i.class_name)
    for name, members in by_class.items():
        random.Random(f"{seed}/{name}").shuffle(members)
        # Of two or more images, either part has some; a single one is to tune on.
        tested.update(members[: min(max(round(fraction * len(members)), 1), len(members) - 1)])
    return tested


def label_order(names: set[str]) -> list[str]:
    """Class keys in label order: by number where all are numbers, else by code point."""
    numbers = all(name.isascii() and name.isdigit() for name in names)
    return sorted(names, key=lambda name: (int(name) if numbers else 0, name))


def check_path(text: str, where: str) -> str:
    """Return ``text`` if it is a relative path that stays below its root, without a '..' step.

    Links on disk are followed, as datasets are laid out with them: what is at their end is read as
    an image, or named in a warning, and goes nowhere else.
    """
    if not text.strip() or _UNSAFE_PATH.search(text):
        hint = "give one relative to the dataset's folder, without '..'"
        raise UserError(f"{where}: {text!r} is no safe image path; {hint}")
    return text


def names_alike(names: Sequence[str]) -> list[tuple[int, int]]:
    """Labels of classes whose names no prompt can tell apart, each after the first of its name.

    They differ by case, spaces or underscores alone.
    """
    first: dict[str, int] = {}
    read = (" ".join(name.replace("_", " ").split()).casefold() for name in names)
    pairs = [(first.setdefault(name, label), label) for label, name in enumerate(read)]
    return [(one, other) for one, other in pairs if one != other]


def check_class_names(names: Sequence[str], where: str, *, distinct: bool = True) -> None:
    """Refuse blank names, control characters and names that are `names_alike`, if ``distinct``.

    ``where`` is the file or folder that they come from.
    """
    for name in names:
        if not name.replace("_", " ").strip() or _UNSAFE_NAME.search(name):
            raise UserError(f"{where}: {name!r} is no class name; give a printable one")
    for one, other in names_alike(names) if distinct else ():
        what = f"classes '{names[one]}' and '{names[other]}' have the same name to a text prompt"
        raise UserError(f"{where}: {what}; rename one, or give --class-names")


def first_of(names: Iterable[str], there: Any) -> str | None:
    """The first of the names that is in a table's columns, a row, or whatever holds names."""
    return next((name for name in names if name in there), None)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones left out."""
    with refusing(f"folder {folder} cannot be read", "check the path"), os.scandir(folder) as found:
        return sorted(e.name for e in found if not e.name.startswith(".") and e.is_dir())
