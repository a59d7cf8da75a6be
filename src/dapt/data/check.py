"""Whether a dataset on disk is what its listing says: files, counts, and images that open."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dapt.data.benchmarks import BENCHMARKS, LAYOUT
from dapt.data.images import open_image
from dapt.data.items import PARTS, Item, Task
from dapt.data.tasks import open_task
from dapt.errors import UserError
from dapt.progress import Advance, Reporter
from dapt.safe.files import open_regular

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
        problems: all of them, those of a kind in the order of the listing.
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
    reporter: Reporter | None = None,
    **options: Any,
) -> Check:
    """Look whether everything a dataset lists is there and, if asked, opens.

    Args:
        dataset, root, options: as for `open_task`.
        level: "listed" looks for files alone, a directory at a time. "whole" also reads each
            file's first and last bytes, and decodes what does not begin and end as an image
            should: a broken download shows, a flipped bit does not. "decoded" decodes all.
        reporter: is told the progress: of reading the listing, then image by image of looking
            for the files and of looking into them.

    Returns:
        What was found. A layout that cannot be read at all is a problem too, not an error.

    Raises:
        UserError: ``level`` is unknown.
    """
    if level not in LEVELS:
        raise UserError(f"level '{level}' must be one of {', '.join(LEVELS)}")
    check, reporter = Check(dataset), reporter or Reporter()
    try:
        with reporter.stage(f"{dataset}: read the listing", None):
            task = open_task(dataset, root=root, **options)
    except UserError as error:
        hint = f"; the layout is described at {LAYOUT}" if dataset in BENCHMARKS else ""
        check.problems.append(Problem("layout", dataset, f"{error}{hint}"))
        return check
    items = [item for part in PARTS for item in getattr(task, part)]
    # Threads: waiting for the disk is most of the work, and decoders let go of the lock.
    with ThreadPoolExecutor(_THREADS) as pool:
        with reporter.stage(f"{dataset}: look for the files", len(items)) as advance:
            bad = _look_for(task, items, check, pool, advance)
        if level != "listed":
            there = [item for item in items if item.path not in bad]
            examine = _decode if level == "decoded" else _glance
            with reporter.stage(f"{dataset}: look into them", len(there)) as advance:
                bad |= _look_into(task, there, examine, check, pool, advance)
    _count(task, check, bad)
    return check


def _look_for(
    task: Task, items: list[Item], check: Check, pool: ThreadPoolExecutor, advance: Advance
) -> set[str]:
    """Paths of the items that are not there, by one listing of each directory.

    A directory that is not there is one problem, not one for each of its images.
    """
    by_folder: dict[str, list[str]] = defaultdict(list)
    for item in items:
        by_folder[item.path.rpartition("/")[0]].append(item.path)
    gone: set[str] = set()
    absent: list[str] = []
    folders: Counter[tuple[str, str]] = Counter()  # (folder, what is wrong with it) -> images
    found = pool.map(lambda folder: _absent(task.root, folder, by_folder[folder]), by_folder)
    for paths, missing in zip(by_folder.values(), found, strict=True):
        if isinstance(missing, tuple):
            folders[missing] += len(paths)
            gone.update(paths)
        else:
            absent += missing
        advance(len(paths))
    for (folder, wrong), count in folders.items():
        text = f"folder {task.root / folder} {wrong}, and {count:,} images should be in it"
        check.problems.append(Problem("folder", folder, text))
    for path in absent:
        what = "is no ordinary file" if (task.root / path).exists() else "does not exist"
        text = f"image {task.root / path} {what}"
        check.problems.append(Problem("missing", path, text))
    return gone.union(absent)


def _absent(root: Path, folder: str, paths: list[str]) -> list[str] | tuple[str, str]:
    """Those of a folder's paths that are not there, or the topmost folder that is not, and why."""
    try:
        with os.scandir(root / folder) as entries:
            found = {entry.name for entry in entries if entry.is_file()}
    except FileNotFoundError:
        while folder and not (root / folder).parent.exists():
            folder = folder.rpartition("/")[0]
        return folder, "does not exist"
    except OSError as error:
        return folder, f"cannot be read ({error.strerror})"
    return [path for path in paths if path.rpartition("/")[2] not in found]


def _look_into(
    task: Task,
    items: list[Item],
    examine: Callable[[Path], str | None],
    check: Check,
    pool: ThreadPoolExecutor,
    advance: Advance,
) -> set[str]:
    """Paths of the items that do not open, as ``examine`` sees it."""
    lots = [items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK)]
    unreadable: set[str] = set()
    found = pool.map(lambda lot: [examine(task.image_path(item)) for item in lot], lots)
    for lot, reasons in zip(lots, found, strict=True):
        for item, reason in zip(lot, reasons, strict=True):
            if reason:
                check.problems.append(Problem("unreadable", item.path, reason))
                unreadable.add(item.path)
        advance(len(lot))
    return unreadable


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
        # Whole as listed, a class is short only where it is known to have had more.
        least = published.least.get(part, 1) if published else 0
        listed = Counter(item.label for item in items)
        usable = Counter(item.label for item in good)
        for label, name in enumerate(task.class_names):
            wanted = max(listed[label], least)
            if usable[label] < wanted:
                text = f"{part}: class '{name}' has {usable[label]:,} of {wanted:,} images"
                check.problems.append(Problem("short", name, text))
