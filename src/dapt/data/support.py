"""Support sets: the few images a class that prompts are tuned on."""

from __future__ import annotations

import hashlib
import random
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from dapt.data.images import read_picture
from dapt.data.items import Item, Task, check_path, grouped, refusing, subset_items
from dapt.errors import UserError, nearest
from dapt.safe.files import file_digest, file_size, read_json, write_json


@dataclass(frozen=True)
class SupportSet:
    """Images drawn from a task: ``train`` to tune on, ``val`` to choose settings by."""

    dataset: str
    shots: int
    seed: int
    train: tuple[Item, ...]
    val: tuple[Item, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values; an item is an object of ``path``, ``label`` and ``class_name``."""
        values = asdict(self)
        return {**values, "train": list(values["train"]), "val": list(values["val"])}

    def save(self, path: Path) -> None:
        """Write it to a JSON file, all or nothing; a `UserError` if that cannot be."""
        with refusing(f"support set file {path} cannot be written", "choose another", OSError):
            write_json(path, self.to_json())


def draw_support_set(task: Task, shots: int, seed: int) -> SupportSet:
    """Draw a support set as the published protocol does, to the very image (Zhou et al., 2022).

    One generator, seeded by ``seed``, draws ``shots`` images a class from train and then
    ``min(shots, 4)`` a class from val, classes in order of first appearance. A class with fewer
    gives all it has, without a draw. A subset of classes has its images of the draw from all.
    """
    if shots < 1:
        raise UserError(f"shots {shots} must be 1 or more")
    if seed < 0:  # random.Random would take it for its absolute value
        raise UserError(f"seed {seed} must be 0 or more")
    if task.part_of is not None:
        whole, labels = task.part_of
        return _subset(draw_support_set(whole, shots, seed), labels)
    generator, parts = random.Random(seed), dict[str, tuple[Item, ...]]()
    for part, listed, count in (("train", task.train, shots), ("val", task.val, min(shots, 4))):
        drawn: list[Item] = []
        for members in grouped(listed, lambda item: item.label).values():
            drawn += generator.sample(members, count) if len(members) >= count else members
        parts[part] = tuple(drawn)
    return SupportSet(task.name, shots, seed, **parts)


def _subset(support: SupportSet, labels: range) -> SupportSet:
    train, val = subset_items(support.train, labels), subset_items(support.val, labels)
    return replace(support, train=train, val=val)


def images_in_both(
    task: Task, support: SupportSet, tested: Task | None = None
) -> list[tuple[Item, Item]]:
    """Support images whose very file is a test image too, under whatever name: (support, test).

    What cannot be read is in neither. ``tested`` has the test images, if it is another task.
    """
    tested, digest, found = tested or task, cache(_digest), []
    for item in (*support.train, *support.val):
        path = task.image_path(item)
        for other in tested.test_by_size.get(file_size(path), ()):
            if digest(path) is not None and digest(path) == digest(tested.image_path(other)):
                found.append((item, other))
    return found


def support_digest(task: Task, support: SupportSet) -> str | None:
    """SHA-256 over the contents of a support set's train images, in their order.

    Of a picture in memory, its RGB pixels count. None where an image cannot be read: of what is
    not there, anybody knows the content.
    """
    whole = hashlib.sha256()
    for item in support.train:
        if (digest := _digest(task.source(item))) is None:
            return None
        whole.update(digest)
    return whole.hexdigest()


def _digest(source: Any) -> bytes | None:
    """SHA-256 of a file's content or a picture's pixels; None where it cannot be read."""
    with suppress(OSError, UserError):
        if isinstance(source, str | Path):
            return file_digest(source)
        return hashlib.sha256(read_picture(source).tobytes()).digest()
    return None


def load_support_set(path: Path, task: Task) -> SupportSet:
    """Read a support set that `SupportSet.save` wrote, or one written by hand in that form.

    For a subset of classes it may be one of all classes, of which the subset's images are taken.

    Raises:
        UserError: it is none, or an item's class is not the task's, its path leaves the task's
            folder, or it is listed twice or is a test image; others need not be the task's.
    """
    data, file = read_json(path, "support set file"), f"support set file {path}"
    if not isinstance(data, dict):
        raise UserError(f"{file} must hold a JSON object; draw it anew")
    form = {"dataset": str, "shots": int, "seed": int, "train": list, "val": list}
    for key in _missing(data, form):
        raise UserError(f"{file} needs '{key}' as {form[key].__name__}; draw it anew")
    if not data["train"]:
        raise UserError(f"{file} names no train images; draw it anew")
    drawn = dict[str, Item]()
    for part in ("train", "val"):
        for number, entry in enumerate(data[part]):
            where = f"{file}, {part} entry {number}"
            drawn[where] = _item(entry, where)
    if task.part_of is not None:
        whole, labels = task.part_of
        if any(_fits(item, whole) and not _fits(item, task) for item in drawn.values()):
            return _subset(load_support_set(path, whole), labels)
    seen = {item.path: f"a test image of '{task.name}'; take it out" for item in task.test}
    for where, item in drawn.items():
        if not _fits(item, task):
            name, names = item.class_name, task.class_names
            what = f"'{task.name}' has no class '{name}'{nearest(name, names)}"
            if name in names:
                label = names.index(name)
                what = f"class '{name}' has label {label} in '{task.name}', not {item.label}"
            raise UserError(f"{where}: {what}; use the task it was drawn from")
        if item.path in seen:
            raise UserError(f"{where}: {item.path} is {seen[item.path]}")
        seen[item.path] = "listed twice; take one out"
    images, count = tuple(drawn.values()), len(data["train"])
    facts = (data["dataset"], data["shots"], data["seed"])
    return SupportSet(*facts, train=images[:count], val=images[count:])


def _item(entry: Any, where: str) -> Item:
    form = {"path": str, "label": int, "class_name": str}
    if not isinstance(entry, dict) or _missing(entry, form):
        raise UserError(f"{where} must be an object of path, label (a number) and class_name")
    return Item(check_path(entry["path"], where), entry["label"], entry["class_name"])


def _missing(value: dict[str, Any], form: dict[str, type]) -> list[str]:
    # True is an int to isinstance, but no label
    return [key for key, kind in form.items() if type(value.get(key)) is not kind]


def _fits(item: Item, task: Task) -> bool:
    names = task.class_names
    return 0 <= item.label < len(names) and names[item.label] == item.class_name
