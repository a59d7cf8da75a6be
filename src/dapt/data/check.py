"""Whether a dataset on disk is what its listing says: files, counts, and images that open."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dapt.data.items import PARTS, Item, Task, grouped
from dapt.data.pictures import open_image
from dapt.data.tasks import BENCHMARKS, LAYOUT, open_task
from dapt.errors import UserError
from dapt.progress import Reporter
from dapt.safe.files import open_regular

LEVELS = ("listed", "whole", "decoded")

# How the formats that datasets come in begin, and what is among their last bytes when whole.
_WHOLE = ((b"\xff\xd8\xff", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"))
_TAIL = 16  # bytes
_THREADS, _CHUNK = 8, 256


@dataclass(frozen=True)
class Problem:
    """Something wrong: its kind, what it concerns, and a sentence on it."""

    kind: str
    where: str
    text: str


@dataclass
class Check:
    """What was found of one dataset."""

    dataset: str
    classes: tuple[int, int | None] = (0, None)  # found, published or None
    # of each part the images: listed, there and not found bad, published or None
    parts: dict[str, tuple[int, int, int | None]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)  # of a kind, in the listing's order
    left_out: dict[str, int] = field(default_factory=dict)  # reasons, and how much was not read
    notes: list[str] = field(default_factory=list)  # sentences on that, and on whatever is odd

    to_json = asdict


_Look = Callable[[Path, list[Item]], dict[str, Problem]]


def check_dataset(
    dataset: str, *, level: str = "whole", reporter: Reporter | None = None, **options: Any
) -> Check:
    """Look whether everything a dataset lists is there and, if asked, opens.

    A layout that cannot be read at all is a problem too, not an error.

    Args:
        dataset, options: as for `open_task`.
        level: "listed" looks for files alone. "whole" also reads each file's first and last bytes,
            and decodes what does not begin and end as an image should: a broken download shows, a
            flipped bit does not. "decoded" decodes all.
        reporter: is told how far it is: with the listing, then image by image.
    """
    if level not in LEVELS:
        raise UserError(f"level '{level}' must be one of {', '.join(LEVELS)}")
    check, reporter = Check(dataset), reporter or Reporter()
    try:
        with reporter.stage(f"{dataset}: read the listing", None):
            task = open_task(dataset, **options)
    except UserError as error:
        hint = f"; the layout is described at {LAYOUT}" if dataset in BENCHMARKS else ""
        check.problems.append(Problem("layout", dataset, f"{error}{hint}"))
        return check
    check.left_out, check.notes = dict(task.left_out), [*task.notes]
    bad: dict[str, Problem] = {}

    def examine(title: str, lots: list[list[Item]], look: _Look) -> None:
        # Threads: waiting for the disk is most of the work, and decoders let go of the lock.
        stage = reporter.stage(f"{dataset}: {title}", sum(map(len, lots)))
        with stage as advance, ThreadPoolExecutor(_THREADS) as pool:
            for lot, found in zip(lots, pool.map(partial(look, task.root), lots), strict=True):
                bad.update(found)
                advance(len(lot))

    items = [*task.train, *task.val, *task.test]
    folders = grouped(items, lambda item: os.path.dirname(item.path))
    examine("look for the files", [*folders.values()], _missing)
    if level != "listed":
        items = [item for item in items if item.path not in bad]
        lots = [items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK)]
        examine("look into them", lots, partial(_unreadable, level == "decoded"))
    for problem, count in Counter(bad.values()).items():
        more = f", and {count:,} images should be in it" if problem.kind == "folder" else ""
        check.problems.append(replace(problem, text=f"{problem.text}{more}"))
    _count(task, check, bad)
    return check


def _missing(root: Path, items: list[Item]) -> dict[str, Problem]:
    """Which files of one folder are not there; of missing folders, the topmost is the problem."""
    folder, bad = os.path.dirname(items[0].path), dict[str, Problem]()
    try:
        there = {entry.name for entry in os.scandir(root / folder) if entry.is_file()}
    except OSError as error:
        why = f"cannot be read ({error.strerror})"
        if isinstance(error, FileNotFoundError):
            why = "does not exist"
            while folder and not (root / folder).parent.exists():
                folder = os.path.dirname(folder)
        problem = Problem("folder", folder, f"folder {root / folder} {why}")
        return {item.path: problem for item in items}
    for path in (item.path for item in items if os.path.basename(item.path) not in there):
        why = "is no ordinary file" if (root / path).exists() else "does not exist"
        bad[path] = Problem("missing", path, f"image {root / path} {why}")
    return bad


def _unreadable(decode: bool, root: Path, items: list[Item]) -> dict[str, Problem]:
    """Which files do not open, those that look whole only where all are to be decoded."""
    bad: dict[str, Problem] = {}
    for path in (item.path for item in items):
        whole = False
        with suppress(OSError), open_regular(root / path) as file:
            head = file.read(_TAIL)
            file.seek(-min(_TAIL, file.seek(0, os.SEEK_END)), os.SEEK_END)
            tail = file.read(_TAIL)
            whole = any(head.startswith(start) and end in tail for start, end in _WHOLE)
        try:
            if decode or not whole:
                open_image(root / path)
        except UserError as error:
            bad[path] = Problem("unreadable", path, str(error))
    return bad


def _count(task: Task, check: Check, bad: dict[str, Problem]) -> None:
    """Fill in the counts, and compare them with the published ones."""
    published, found = BENCHMARKS.get(check.dataset), check.problems
    check.classes = (len(task.class_names), published.classes if published else None)
    if published and check.classes[0] != published.classes:
        text = f"{check.classes[0]:,} classes are there, {published.classes:,} are published"
        found.append(Problem("classes", check.dataset, text))
    for part, items in zip(PARTS, (task.train, task.val, task.test), strict=True):
        expected = published.counts.get(part, 0) if published else None
        if not items and not expected:
            continue
        good = [item for item in items if item.path not in bad]
        check.parts[part] = (len(items), len(good), expected)
        if expected is not None and len(items) != expected:
            text = f"{part}: {len(items):,} images are listed, {expected:,} are published"
            found.append(Problem("count", part, text))
        # Whole as listed, a class is short only where it is known to have had more.
        least = published.least.get(part, 1) if published else 0
        listed, usable = (
            Counter(k for item in some for k in item.labels) for some in (items, good)
        )
        for label, name in enumerate(task.class_names):
            if usable[label] < (wanted := max(listed[label], least)):
                text = f"{part}: class '{name}' has {usable[label]:,} of {wanted:,} images"
                found.append(Problem("short", name, text))
