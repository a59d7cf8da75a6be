"""Support sets: the few images a class that prompts are tuned on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from dapt.data.items import Item, Task, check_path, grouped, refusing, subset_items
from dapt.data.pictures import read_picture
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
    """Draw a support set as the published protocol does, to the very image.

    One generator, seeded by ``seed``, draws ``shots`` images a class from train and then
    ``min(shots, 4)`` a class from val, classes in order of first appearance. A class with fewer
    gives all it has, without a draw. Zhou et al. (2022) drew the published sets like this. A subset
    of classes has its images of the draw from all: they drew before they took base or new classes.
    """
    if shots < 1:
        raise UserError(f"shots {shots} must be 1 or more")
    if seed < 0:  # random.Random would take it for its absolute value
        raise UserError(f"seed {seed} must be 0 or more")
    if task.part_of is not None:
        whole, labels = task.part_of
        return _subset(draw_support_set(whole, shots, seed), labels)
    generator = random.Random(seed)
    train = _draw(task.train, shots, generator)
    val = _draw(task.val, min(shots, 4), generator)
    return SupportSet(task.name, shots, seed, train, val)


def _draw(items: Sequence[Item], shots: int, generator: random.Random) -> tuple[Item, ...]:
    drawn: list[Item] = []
    for members in grouped(items, lambda item: item.label).values():
        drawn += generator.sample(members, shots) if len(members) >= shots else members
    return tuple(drawn)


def _subset(support: SupportSet, labels: range) -> SupportSet:
    train, val = subset_items(support.train, labels), subset_items(support.val, labels)
    return replace(support, train=train, val=val)


def images_in_both(
    task: Task, support: SupportSet, tested: Task | None = None
) -> list[tuple[Item, Item]]:
    """Support images whose very file is a test image too, under whatever name: (support, test).

    Only files as long as one of the other side are read. What cannot be read is in neither;
    whoever uses it says so. ``tested`` has the test images, if it is another task.
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

    Its images need not be in the task's train list, but must not be test images. For a subset of
    classes it may be one of that subset, or of all classes, of which the subset's images are taken.

    Raises:
        UserError: it is none, or an item's class is not the task's, its path leaves the task's
            folder, or it is listed twice or is a test image.
    """
    data, file = read_json(path, "support set file"), f"support set file {path}"
    if not isinstance(data, dict):
        raise UserError(f"{file} must hold a JSON object; draw it anew")
    form = {"dataset": str, "shots": int, "seed": int, "train": list, "val": list}
    for key, kind in form.items():
        if type(data.get(key)) is not kind:
            raise UserError(f"{file} needs '{key}' as {kind.__name__}; draw it anew")
    if not data["train"]:
        raise UserError(f"{file} names no train images; draw it anew")
    if task.part_of is not None:
        whole, labels = task.part_of
        if any(_fits(e, whole) and not _fits(e, task) for e in (*data["train"], *data["val"])):
            return _subset(load_support_set(path, whole), labels)
    seen = {item.path: f"a test image of '{task.name}'; take it out" for item in task.test}
    for part in ("train", "val"):
        for number, entry in enumerate(data[part]):
            where = f"{file}, {part} entry {number}"
            item = data[part][number] = _item(entry, task, where)
            if item.path in seen:
                raise UserError(f"{where}: {item.path} is {seen[item.path]}")
            seen[item.path] = "listed twice; take one out"
    train, val = tuple(data["train"]), tuple(data["val"])
    return SupportSet(data["dataset"], data["shots"], data["seed"], train, val)


def _fits(entry: Any, task: Task) -> bool:
    """Whether an entry's label and class name are those of a class of the task."""
    entry, names = entry if isinstance(entry, dict) else {}, task.class_names
    label = entry.get("label")
    known = type(label) is int and 0 <= label < len(names)
    return known and names[label] == entry.get("class_name")


def _item(entry: Any, task: Task, where: str) -> Item:
    entry, names = entry if isinstance(entry, dict) else {}, task.class_names
    path, label, name = map(entry.get, ("path", "label", "class_name"))
    # True is an int to isinstance, but no label
    if [type(value) for value in (path, label, name)] != [str, int, str]:
        raise UserError(f"{where} must be an object of path, label (a number) and class_name")
    if not _fits(entry, task):
        what = f"'{task.name}' has no class '{name}'{nearest(name, names)}"
        if name in names:
            what = f"class '{name}' has label {names.index(name)} in '{task.name}', not {label}"
        raise UserError(f"{where}: {what}; use the task it was drawn from")
    return Item(check_path(path, where), label, name)
