"""What tasks and support sets are made of, and what is checked of them wherever they are from."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

from dapt.data.grey import Scale
from dapt.data.images import read_picture
from dapt.errors import UserError, nearest, refusing
from dapt.safe.files import file_digest, file_size, read_json, read_text, write_json

PARTS = ("train", "val", "test")
DEFAULT_TEMPLATE = "a photo of a {}."

# Rooted or drive-lettered, a '..' step, or a character no file system takes. Of the surrogates,
# those that stand for a file name's bytes that are no UTF-8 are left (PEP 383).
_UNSAFE = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|[\0\ud800-\udc7f\udd00-\udfff]")
_UNSAFE_NAME = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Item:
    """One labelled image."""

    path: str  # relative to the task's root, with forward slashes
    label: int
    class_name: str
    others: tuple[int, ...] = ()  # labels that it has besides, in order, all above the first

    @property
    def labels(self) -> tuple[int, ...]:
        """All that it has."""
        return (self.label, *self.others)


@dataclass(frozen=True)
class Task:
    """Classes, and images to train on (train, val; none for a target domain) and to evaluate on."""

    name: str
    root: Path
    class_names: tuple[str, ...]  # in label order
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    template: str = DEFAULT_TEMPLATE  # {} is the class name, in text prompts that are not learned
    source_sha256: str | None = None  # of the files that images were unpacked from
    notes: tuple[str, ...] = ()  # sentences that whoever opens it should tell
    left_out: tuple[tuple[str, int], ...] = ()  # reasons, and how much was not read for each
    grey: Scale | None = None  # what of grey of more than 8 bits is black and white, of all images
    divided: bool = False  # its source had no parts: what is to test on was drawn here
    part_of: tuple[Task, range] | None = None  # of some classes: that of all, their labels there
    multilabel: bool = False  # whether an image may be of several classes at once
    # Images in memory, as `read_picture` takes them. Where there are some, an item's path is its
    # number among them, or the absolute path of a file.
    pictures: Sequence[Any] | None = field(default=None, compare=False, repr=False)

    def image_path(self, item: Item) -> Path:
        """Return the path of the item's image file."""
        return self.root / item.path

    def source(self, item: Item) -> Any:
        """Return what the item's image is read from: its file's path, or one of ``pictures``."""
        if self.pictures is not None and item.path.isdecimal():
            return self.pictures[int(item.path)]
        return self.image_path(item)

    @cached_property
    def test_by_size(self) -> dict[int | None, list[Item]]:
        """Test images by the bytes of their files; found out once, for all runs of a grid."""
        return grouped(self.test, lambda item: file_size(self.image_path(item)))


@dataclass(frozen=True)
class SupportSet:
    """Images drawn from a task: ``train`` to train on, ``val`` to choose settings by."""

    dataset: str
    shots: int
    seed: int
    train: tuple[Item, ...]
    val: tuple[Item, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values; an item is an object of ``path``, ``label`` and ``class_name``.

        One of several labels has the further ones as ``others``.
        """
        values = asdict(self)
        for item in (*values["train"], *values["val"]):
            if others := item.pop("others"):
                item["others"] = list(others)
        return {**values, "train": list(values["train"]), "val": list(values["val"])}

    def save(self, path: Path) -> None:
        """Write it to a JSON file, all or nothing; a `UserError` if that cannot be."""
        with refusing(f"support set file {path} cannot be written", "choose another", OSError):
            write_json(path, self.to_json())


_Listed = TypeVar("_Listed", Task, SupportSet)
_Any = TypeVar("_Any")


def grouped(items: Iterable[_Any], key: Callable[[_Any], Any]) -> dict[Any, list[_Any]]:
    """The items by a key, keys in order of first appearance."""
    found: dict[Any, list[_Any]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def subset_classes(task: Task, which: str) -> Task:
    """A task's first half of classes by label (``base``, the larger), the other (``new``), or all.

    Labels are counted anew from 0; a `UserError` where one class is left.
    """
    if which == "all":
        return task
    if which not in ("base", "new"):
        raise UserError(f"classes '{which}' must be all, base or new")
    if task.multilabel:
        what = f"images of dataset '{task.name}' have several labels, of base and new classes alike"
        raise UserError(f"{what}; use all classes")
    half = ((count := len(task.class_names)) + 1) // 2
    labels = range(half) if which == "base" else range(half, count)
    if len(labels) < 2:
        has = "one class" if count == 1 else f"{count} classes, of which {which} ones are one"
        raise UserError(f"dataset '{task.name}' has {has}; base and new classes need two each")
    names = task.class_names[labels.start : labels.stop]
    return _subset(task, labels, class_names=names, part_of=(task, labels))


def _subset(listed: _Listed, labels: range, **facts: Any) -> _Listed:
    """With the items of these labels alone, which are counted anew from 0."""
    for part in (part for part in PARTS if hasattr(listed, part)):
        kept = (item for item in getattr(listed, part) if item.label in labels)
        facts[part] = tuple(replace(item, label=item.label - labels.start) for item in kept)
    return replace(listed, **facts)


# An image's part ("" where nothing is split yet), path and class, or a tuple of classes.
Row = tuple[str, str, Any]
# Of images without parts: the share of each class to test on (0: none), the seed.
Split = tuple[float, int]


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

    ``names`` are the class names in label order, by what rows call the classes; by default, rows
    have the names. ``split`` is of rows without a part. Unless it tests on everything, or the task
    is not ``tuned``, every class needs images to tune on. ``facts`` are other fields of the task.
    """
    several = facts.get("multilabel", False)
    keys = {key for *_, row in rows for key in (row if several else (row,))}
    names = names or {key: key for key in label_order(keys)}
    check_class_names(list(names.values()), where, distinct=False)
    labels = {key: label for label, key in enumerate(names)}
    parts: dict[str, list[Item]] = {part: [] for part in (*PARTS, "")}
    called = list(names.values())
    for part, path, key in rows:
        label, *others = sorted({labels[k] for k in key}) if several else [labels[key]]
        item = Item(check_path(path, where), label, called[label], tuple(others))
        parts[part].append(item)
    fraction = split[0] if split else 0.0
    tested = _to_test_on(parts[""], called, split) if split else set[Item]()
    for item in parts[""]:
        parts["test" if item in tested else "train"].append(item)
    train, val, test, _ = map(tuple, parts.values())
    if (tuned := tuned and fraction != 1) and not train:
        raise UserError(f"{where} names no images to tune on; check that it is complete")
    if not test and (fraction or split is None):  # a share of none leaves none to test on
        way = "add some, or hold none out (test_fraction=0)" if parts[""] else "add some"
        raise UserError(f"{where} names no test images (one a class is not enough); {way}")
    taught = {label for item in train for label in item.labels}
    for part in ("test", "val") if tuned else ():
        odd = ((item, k) for item in parts[part] for k in item.labels if k not in taught)
        for item, label in odd:
            what = f"class '{called[label]}' of {part} image {item.path} has no train images"
            raise UserError(f"{where}: {what}; add some, or take the class out")
    if len(names) == 1:
        what = f"{where} has one class, '{next(iter(names.values()))}'"
        raise UserError(f"{what}, and one class leaves nothing to tell apart; add another")
    facts["divided"] = bool(parts[""])
    return Task(name, root, tuple(names.values()), train, val, test, **facts)


def _to_test_on(items: Sequence[Item], names: Sequence[str], split: Split) -> set[Item]:
    """Some images of each class by itself, at random but always the same; of 1, all.

    Of 0, none. Of several labels an image, the rarest classes choose first (Sechidis et al., 2011).
    """
    (fraction, seed), done = split, set[Item]()
    if fraction in (0, 1):
        return set(items) if fraction else set()
    by_class, tested = by_label(sorted(items, key=lambda item: item.path)), set[Item]()
    for label in sorted(by_class, key=lambda k: (len(by_class[k]), k)):
        every = by_class[label]
        members = [item for item in every if item not in done]
        random.Random(f"{seed}/{names[label]}").shuffle(members)
        # Of two or more images, either part has some; a single one is to tune on.
        wanted = min(max(round(fraction * len(every)), 1), len(every) - 1)
        tested.update(members[: max(wanted - sum(item in tested for item in every), 0)])
        done.update(members)
    for every in by_class.values():  # rarer classes may have taken all of one
        if tested.issuperset(every):
            tested.remove(every[0])
    return tested


def by_label(items: Iterable[Item]) -> dict[int, list[Item]]:
    """The items of each label, labels in order of first appearance."""
    found: dict[int, list[Item]] = {}
    for item in items:
        for label in item.labels:
            found.setdefault(label, []).append(item)
    return found


def label_order(names: set[str]) -> list[str]:
    """Class keys in label order: by number where all are numbers, else by code point."""
    numbers = all(name.isascii() and name.isdigit() for name in names)
    return sorted(names, key=lambda name: (int(name) if numbers else 0, name))


def check_path(text: str, where: str) -> str:
    """Return ``text`` if it is a relative path that stays below its root, without a '..' step.

    Links on disk are followed, as datasets have them: what is at their end is read as an image.
    """
    if not text.strip() or _UNSAFE.search(text):
        raise UserError(f"{where}: {text!r} is no safe image path; give a relative one, no '..'")
    return text


def names_alike(names: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of labels whose names differ by case, spaces or underscores alone, the first first."""
    first: dict[str, int] = {}
    read = (" ".join(name.replace("_", " ").split()).casefold() for name in names)
    pairs = [(first.setdefault(name, label), label) for label, name in enumerate(read)]
    return [(one, other) for one, other in pairs if one != other]


def check_class_names(names: Sequence[str], where: str, *, distinct: bool = True) -> None:
    """Refuse blank names, control characters and names that are `names_alike`, if ``distinct``."""
    for name in names:
        if not name.replace("_", " ").strip() or _UNSAFE_NAME.search(name):
            raise UserError(f"{where}: {name!r} is no class name; give a printable one")
    for one, other in names_alike(names) if distinct else ():
        what = f"classes '{names[one]}' and '{names[other]}' have the same name to a text prompt"
        raise UserError(f"{where}: {what}; rename one, or give class_names")


def text_of(file: Path) -> str:
    """The text of a file that people write, without a byte order mark."""
    with refusing(f"{file} cannot be read", "save it as UTF-8 text"):
        return read_text(file, encoding="utf-8-sig")


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones left out."""
    with refusing(f"folder {folder} cannot be read", "check the path"), os.scandir(folder) as found:
        return sorted(e.name for e in found if not e.name.startswith(".") and e.is_dir())


def draw_support_set(task: Task, shots: int, seed: int) -> SupportSet:
    """Draw exactly the support set that the published protocol draws (Zhou et al., 2022).

    One random generator with seed ``seed`` draws ``shots`` images per class from train, then
    ``min(shots, 4)`` per class from val, with classes in order of first appearance. From a class
    with fewer images, all are taken without drawing. A subset of classes gets its images from the
    draw for all classes. If images have several labels, the rarest classes are drawn first, and a
    class gets only what earlier draws have not already brought along; it may have more than
    ``shots``.
    """
    if shots < 1 or seed < 0:  # random.Random would take the absolute value
        raise UserError(f"shots {shots} must be 1 or more, and seed {seed} 0 or more")
    if task.part_of is not None:
        whole, labels = task.part_of
        return _subset(draw_support_set(whole, shots, seed), labels)
    generator, parts = random.Random(seed), list[tuple[Item, ...]]()
    for listed, count in ((task.train, shots), (task.val, min(shots, 4))):
        drawn, taken, members_of = list[Item](), set[Item](), by_label(listed)
        order = list(members_of)
        if task.multilabel:
            order.sort(key=lambda label: (len(members_of[label]), label))
        for every in map(members_of.__getitem__, order):
            members = [item for item in every if item not in taken]
            lacking = max(count - (len(every) - len(members)), 0)
            some = generator.sample(members, lacking) if len(members) >= lacking else members
            drawn += some
            taken.update(some)
        parts.append(tuple(drawn))
    return SupportSet(task.name, shots, seed, *parts)


def _others(entry: dict[str, Any], label: int, task: Task, where: str) -> tuple[int, ...]:
    """Further labels of a support set's entry."""
    given, top = entry.get("others", []), len(task.class_names)
    fit = isinstance(given, list) and all(type(k) is int and label < k < top for k in given)
    if not fit or given != sorted(set(given)) or (given and not task.multilabel):
        raise UserError(f"{where}: 'others' must be further labels of its dataset; draw it anew")
    return tuple(given)


def images_in_both(
    task: Task, support: SupportSet, tested: Task | None = None
) -> list[tuple[Item, Item]]:
    """Support images whose very file is a test image too (of ``tested``): (support, test)."""
    tested, digest, found = tested or task, cache(_digest), []
    for item in (*support.train, *support.val):
        path = task.image_path(item)
        for other in tested.test_by_size.get(file_size(path), ()):
            if digest(path) is not None and digest(path) == digest(tested.image_path(other)):
                found.append((item, other))
    return found


def support_digest(task: Task, support: SupportSet) -> str | None:
    """SHA-256 over the contents of train images, in order; of pictures in memory, the RGB pixels.

    None where an image cannot be read: of what is not there, anybody knows the content.
    """
    whole = hashlib.sha256()
    for item in support.train:
        if (digest := _digest(task.source(item), task.grey)) is None:
            return None
        whole.update(digest)
    return whole.hexdigest()


def content_digest(task: Task, support: SupportSet) -> str:
    """SHA-256 over the contents of all its images, in order, as of `support_digest`.

    One that cannot be read counts as such: it would change a result if it came to be readable.
    """
    listed = (*support.train, *support.val)
    images = (_digest(task.source(item), task.grey) or bytes(32) for item in listed)
    return hashlib.sha256(b"".join(images)).hexdigest()


def _digest(source: Any, grey: Scale | None = None) -> bytes | None:
    """SHA-256 of a file's content or a picture's pixels; None where it cannot be read."""
    with suppress(OSError, UserError):
        if isinstance(source, str | Path):
            return file_digest(source)
        return hashlib.sha256(read_picture(source, grey).tobytes()).digest()
    return None


def content_groups(sources: Sequence[Any]) -> list[int]:
    """For each source of an image, as `Task.source` gives it, the first one of the same content."""
    size = [file_size(s) if isinstance(s, str | Path) else None for s in sources]
    often, first, found = Counter(size), dict[bytes, int](), []
    for place, source in enumerate(sources):
        lonely = size[place] is not None and often[size[place]] == 1
        digest = None if lonely else _digest(source)
        found.append(place if digest is None else first.setdefault(digest, place))
    return found


def load_support_set(path: Path, task: Task) -> SupportSet:
    """Read a support set that `SupportSet.save` wrote, or one written by hand in that form.

    For a subset of classes it may be one of all classes, of which the subset's images are taken.
    A `UserError` if it is none, or an item's class is not the task's, its path leaves the task's
    folder, or it is listed twice or is a test image; else items need not be the task's.
    """
    data, file = read_json(path, "support set file"), f"support set file {path}"
    if not isinstance(data, dict):
        raise UserError(f"{file} must hold a JSON object; draw it anew")
    form = {"dataset": str, "shots": int, "seed": int, "train": list, "val": list}
    for key, kind in form.items():
        if type(data.get(key)) is not kind:  # True is an int to isinstance, but no label
            raise UserError(f"{file} needs '{key}' as {kind.__name__}; draw it anew")
    if not data["train"]:
        raise UserError(f"{file} names no train images; draw it anew")
    drawn, classes = dict[str, Item](), set(enumerate(task.class_names))
    for part, number, entry in ((p, *e) for p in ("train", "val") for e in enumerate(data[p])):
        where = f"{file}, {part} entry {number}"
        match entry:
            case {"path": str(p), "label": int(k), "class_name": str(c)} if type(k) is int:
                drawn[where] = Item(check_path(p, where), k, c, _others(entry, k, task, where))
            case _:
                raise UserError(f"{where} must be an object of path, label (a number), class_name")
    if task.part_of is not None:
        whole, labels = task.part_of
        others = {(item.label, item.class_name) for item in drawn.values()} - classes
        if others.intersection(enumerate(whole.class_names)):
            return _subset(load_support_set(path, whole), labels)
    seen = {item.path: f"a test image of '{task.name}'; take it out" for item in task.test}
    for where, item in drawn.items():
        if (item.label, name := item.class_name) not in classes:
            what = f"'{task.name}' has no class '{name}'{nearest(name, task.class_names)}"
            if name in task.class_names:
                label = task.class_names.index(name)
                what = f"class '{name}' has label {label} in '{task.name}', not {item.label}"
            raise UserError(f"{where}: {what}; use the task it was drawn from")
        if item.path in seen:
            raise UserError(f"{where}: {item.path} is {seen[item.path]}")
        seen[item.path] = "listed twice; take one out"
    images, count = tuple(drawn.values()), len(data["train"])
    facts = (data["dataset"], data["shots"], data["seed"])
    return SupportSet(*facts, images[:count], images[count:])
