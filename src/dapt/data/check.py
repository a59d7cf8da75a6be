"""Whether a dataset on disk is what its listing says: files, counts, and images that open."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dapt.data.benchmarks import BENCHMARKS, LAYOUT
from dapt.data.images import open_image
from dapt.data.items import PARTS, Item, Task
from dapt.data.tasks import open_task
from dapt.errors import UserError
from dapt.files import open_regular
from dapt.progress import Advance, nothing

LEVELS = ("listed", "whole", "decoded")

# How the formats that datasets come in begin, and what is among their last bytes when whole.
_WHOLE = ((b"\xff\xd8\xff", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"))
_TAIL = 16

_THREADS = 8
_CHUNK = 256


@dataclass(frozen=True)
class Problem:
    """Something wrong: its kind, what it concerns, and a sentence on it."""

    kind: str
    where: str
    text: str


@dataclass
class Check:
    """What was found of one dataset.

    Attributes:
        dataset: its name.
        classes: (found, published or None).
        parts: of each part the images (listed, there and not found bad, published or None).
        problems: all of them, in the order of the listing.
    """

    dataset: str
    classes: tuple[int, int | None] = (0, None)
    parts: dict[str, tuple[int, int, int | None]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def check_dataset(
    dataset: str,
    *,
    root: Path | None = None,
    level: str = "whole",
    begin: Callable[[int], Advance] = lambda total: nothing,
    **options: Any,
) -> Check:
    """Look whether everything a dataset lists is there and, if asked, opens.

    Args:
        dataset, root, options: as for `open_task`.
        level: "listed" looks for files alone, a directory at a time. "whole" also reads each
            file's first and last bytes, and decodes what does not begin and end as an image
            should: a broken download shows, a flipped bit does not. "decoded" decodes all.
        begin: is told how many images there are, and returns what to tell of each finished lot.

    Returns:
        What was found. A layout that cannot be read at all is a problem too, not an error.

    Raises:
        UserError: ``level`` is unknown.
    """
    if level not in LEVELS:
        raise UserError(f"level '{level}' must be one of {', '.join(LEVELS)}")
    check = Check(dataset)
    try:
        task = open_task(dataset, root=root, **options)
    except UserError as error:
        hint = f"; the layout is described at {LAYOUT}" if dataset in BENCHMARKS else ""
        check.problems.append(Problem("layout", dataset, f"{error}{hint}"))
        return check
    items = [item for part in PARTS for item in getattr(task, part)]
    advance = begin(len(items))
    bad: set[str] = set()
    for problem in _images(task, items, level, advance):
        check.problems.append(problem)
        bad.add(problem.where)
    _count(task, check, bad)
    return check


def _images(task: Task, items: list[Item], level: str, advance: Advance) -> Iterator[Problem]:
    """Problems with images; ``where`` is the item's path."""
    there = _existing(task.root, items)
    if level == "listed":
        for item in items:
            if item.path not in there:
                yield _missing(task, item)
        advance(len(items))
        return
    examine = _decode if level == "decoded" else _glance
    lots = [items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        # Threads: waiting for the disk is most of the work, and decoders let go of the lock.
        for lot, reasons in zip(
            lots,
            pool.map(
                lambda lot: [
                    examine(task.image_path(item)) if item.path in there else None for item in lot
                ],
                lots,
            ),
            strict=True,
        ):
            for item, reason in zip(lot, reasons, strict=True):
                if item.path not in there:
                    yield _missing(task, item)
                elif reason:
                    yield Problem("unreadable", item.path, reason)
            advance(len(lot))


def _missing(task: Task, item: Item) -> Problem:
    path = task.image_path(item)
    what = "is no ordinary file" if path.exists() else "does not exist"
    return Problem("missing", item.path, f"image {path} {what}")


def _existing(root: Path, items: Iterable[Item]) -> set[str]:
    """Paths of the items that are there, by one listing of each directory."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for item in items:
        folder, _, name = item.path.rpartition("/")
        by_folder[folder].append(name)
    there: set[str] = set()
    for folder, names in by_folder.items():
        try:
            with os.scandir(root / folder) as entries:
                found = {entry.name for entry in entries if entry.is_file()}
        except OSError:
            continue
        inside = f"{folder}/" if folder else ""
        there.update(inside + name for name in names if name in found)
    return there


def _glance(path: Path) -> str | None:
    """What is wrong with an image file, as far as its ends show; None if nothing."""
    try:
        with open_regular(path) as file:
            head = file.read(_TAIL)
            file.seek(-min(_TAIL, file.seek(0, os.SEEK_END)), os.SEEK_END)
            tail = file.read(_TAIL)
    except OSError as error:
        return f"image {path} cannot be opened ({error.strerror or error})"
    if any(head.startswith(start) and end in tail for start, end in _WHOLE):
        return None
    return _decode(path)


def _decode(path: Path) -> str | None:
    try:
        open_image(path)
    except UserError as error:
        return str(error)
    return None


def _count(task: Task, check: Check, bad: set[str]) -> None:
    """Fill in the counts, and compare them with the published ones."""
    published = BENCHMARKS.get(check.dataset)
    check.classes = (len(task.class_names), published.classes if published else None)
    if published and check.classes[0] != published.classes:
        text = f"{check.classes[0]:,} classes are there, {published.classes:,} are published"
        check.problems.append(Problem("classes", check.dataset, text))
    for part in PARTS:
        items: tuple[Item, ...] = getattr(task, part)
        expected = published.counts.get(part, 0) if published else None
        if not items and not expected:
            continue
        good = [item for item in items if item.path not in bad]
        check.parts[part] = (len(items), len(good), expected)
        if expected is not None and len(items) != expected:
            text = f"{part}: {len(items):,} images are listed, {expected:,} are published"
            check.problems.append(Problem("count", part, text))
        least = published.least.get(part, 1) if published else 1
        listed = Counter(item.label for item in items)
        usable = Counter(item.label for item in good)
        for label, count in listed.items():
            # Whole as listed, a class is short only where it is known to have had more.
            wanted = max(count, least)
            if usable[label] < wanted:
                name = task.class_names[label]
                text = f"{part}: class '{name}' has {usable[label]:,} of {wanted:,} images"
                check.problems.append(Problem("short", name, text))
