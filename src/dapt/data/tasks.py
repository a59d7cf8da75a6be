"""One door to every task: the bundled one, a benchmark, or images in whatever form they come."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dapt.data import items
from dapt.data.benchmarks import BENCHMARKS
from dapt.data.images import has_image_name
from dapt.data.items import check_class_names, check_path, make_task, refusing, subfolders
from dapt.data.packed import is_hugging_face, is_webdataset, read_packed
from dapt.errors import UserError, nearest
from dapt.safe import files

DEFAULT_TEMPLATE = items.DEFAULT_TEMPLATE
BUNDLED = "bundled"
BUNDLED_ROOT = Path(__file__).resolve().parents[1] / "assets" / "task"
TABLES = (".csv", ".jsonl")
# Names of parts that others give, in lower case.
_PART_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}


def open_task(
    dataset: str,
    *,
    root: Path | None = None,
    domain: str | None = None,
    class_names: Path | None = None,
    test_fraction: float = 0.5,
    split_seed: int = 0,
    evaluate: bool = False,
) -> items.Task:
    """Open a task. No image is looked at yet: a missing one is reported when it is read.

    Args:
        dataset: ``bundled``; a benchmark's name; a folder with ``train/<class>/`` and
            ``test/<class>/`` or with ``<class>/`` alone; a ``.csv`` or ``.jsonl`` file with
            ``path`` and ``label`` (and ``split``); or what `read_packed` takes.
        root: folder that holds the benchmarks; not read for anything else.
        domain: style of the bundled task; the source domain if not given.
        class_names: JSON file with other names for the classes, as `read_class_names` takes it.
        test_fraction, split_seed: share of each class that becomes test images, and the seed of
            that split, where nothing is split yet.
        evaluate: the task is only evaluated on: an unsplit source is all test images.

    Raises:
        UserError: unknown dataset or domain, or anything wrong with what is read.
    """
    if domain is not None and dataset != BUNDLED:
        raise UserError(f"--domain {domain} goes with the bundled task only, not with '{dataset}'")
    if not 0 < test_fraction < 1:
        raise UserError(f"test_fraction {test_fraction} must be between 0 and 1")
    split = (1.0 if evaluate else test_fraction, split_seed)
    path = files.user_path(dataset)
    if dataset == BUNDLED:
        task = _read_bundled(domain)
    elif dataset in BENCHMARKS:
        task = BENCHMARKS[dataset].open(root)
    elif is_hugging_face(path) or is_webdataset(path):
        task = read_packed(path, split)
    elif path.is_dir():
        task = read_folder(path, split)
    elif path.suffix.lower() in TABLES and path.is_file():
        task = read_table(path, split)
    elif path.is_file():
        raise UserError(f"dataset {path} must be a .csv, .jsonl or .tar file, or a folder")
    elif path.suffix.lower() in TABLES or len(path.parts) > 1:
        raise UserError(f"dataset {path} does not exist; check the path")
    else:
        known = (BUNDLED, *BENCHMARKS)
        hint = f"give a folder, a .csv or .jsonl file, or one of {', '.join(known)}"
        raise UserError(f"unknown dataset '{dataset}'{nearest(dataset, known)}; {hint}")
    if class_names is not None:
        return _renamed(task, class_names)
    if dataset not in BENCHMARKS:
        check_class_names(task.class_names, f"dataset '{dataset}'")
    return _told_of_names_alike(task)  # some benchmarks do have two classes of one name


def _told_of_names_alike(task: items.Task) -> items.Task:
    names, alike = task.class_names, items.names_alike(task.class_names)
    for one, other in alike[:1]:
        what = f"{len(alike)} of the {len(names):,} classes of '{task.name}' have another's name"
        such = f"(such as '{names[other]}', label {other}, that of label {one})"
        hint = "text prompts cannot tell apart; better names can be given with --class-names"
        return replace(task, notes=(f"{what} {such}, which {hint}",))
    return task


def bundled_domains() -> tuple[str, ...]:
    """Styles of the bundled task, the source domain first."""
    return tuple(files.read_json(BUNDLED_ROOT / "task.json", "bundled task")["domains"])


def _read_bundled(domain: str | None) -> items.Task:
    data = files.read_json(BUNDLED_ROOT / "task.json", "bundled task")
    domains, names = list(data["domains"]), tuple(data["class_names"])
    chosen = domains[0] if domain is None else domain
    if chosen not in domains:
        what = f"the bundled task has no domain '{chosen}'{nearest(chosen, domains)}"
        raise UserError(f"{what}; use one of {', '.join(domains)}")
    name = BUNDLED if chosen == domains[0] else f"{BUNDLED}:{chosen}"
    listed = (data["domains"][chosen].get(part, ()) for part in items.PARTS)
    train, val, test = (tuple(items.Item(p, k, names[k]) for p, k in pairs) for pairs in listed)
    return items.Task(name, BUNDLED_ROOT, names, train, val, test, data["template"])


def read_folder(folder: Path, split: items.Split) -> items.Task:
    """Read a tree of images, class by class folder, labelled in the order of folder names.

    Where there is no train/, test/ (and val/) above the class folders, classes are split. Images
    may lie deeper in a class's folder.
    """
    places, classes = {"": folder}, subfolders(folder)
    # A class may be called "train": a split tree's train/ holds folders.
    if "train" in classes and (tuned := subfolders(folder / "train")):
        places = {part: folder / part for part in items.PARTS if part in classes}
        if "test" not in places:
            hint = f"rename {folder / 'val'} to test" if "val" in places else "add one"
            raise UserError(f"folder {folder} has train/ but no test/; {hint}")
        classes = tuned
    elif not classes:
        hint = "put each class's images in one of its own, or train/ and test/ with such folders"
        raise UserError(f"folder {folder} holds no class folders; {hint}")
    # Only Training/<class>/ and the like hold folders: a class's images lie right inside.
    elif all(c.casefold() in _PART_NAMES and subfolders(folder / c) for c in classes):
        listed = ", ".join(f"{name}/" for name in classes)
        hint = "rename them train/ and test/ (and val/)"
        raise UserError(f"folder {folder} holds {listed}, which are parts, not classes; {hint}")
    order, where = items.label_order(set(classes)), f"folder {folder}"
    rows, left = list[items.Row](), list[str]()
    for part, place in places.items():
        there = set(subfolders(place))
        if unknown := sorted(there.difference(classes)):
            what = f"class folder {place / unknown[0]} has no counterpart in {folder / 'train'}"
            raise UserError(f"{what}; add one, or take it out")
        for name in [name for name in order if name in there]:
            inside, others = (place / name).relative_to(folder).as_posix(), list[str]()
            found = images_below(place / name, others)
            if not found:
                named = f" (by its name, {inside}/{min(others)} is none)" if others else ""
                what = f"class folder {place / name} holds no images{named}"
                raise UserError(f"{what}; add some, or take it out")
            rows += [(part, f"{inside}/{path}", name) for path in sorted(found)]
            left += [f"{inside}/{path}" for path in sorted(others)]
    notes = tuple(
        f"{len(left):,} files in the class folders of {folder} have no image's name and are left "
        f"out (such as {such}); convert them, or give them the extension that they should have"
        for such in left[:1]
    )
    return make_task(folder.resolve().name, folder, rows, where, split=split, notes=notes)


def images_below(folder: Path, others: list[str] | None = None) -> list[str]:
    """What has an image's name in and below ``folder``, relative to it; hidden ones left out.

    So may an empty folder, which is no image when read. Files of other names go to ``others``.
    """
    found = []
    for place, folders, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        if not folders and not names and has_image_name(inside.name):
            found.append(inside.as_posix())
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if has_image_name(name):
                found.append((inside / name).as_posix())
            elif others is not None and not name.startswith("."):
                others.append((inside / name).as_posix())
    return found


def read_table(file: Path, split: items.Split) -> items.Task:
    """Read a table of images: their ``path`` from its folder, ``label`` and, for all, ``split``."""
    rows, seen = list[items.Row](), dict[str, int]()
    for line, record in _records(file):
        where = f"{file}, line {line}"
        path, label, part = (record.get(key) for key in ("path", "label", "split"))
        if type(label) is int:  # JSON's 3 is the class "3", as it is in CSV
            label = str(label)
        if not (isinstance(path, str) and isinstance(label, str) and path and label.strip()):
            raise UserError(f"{where}: needs a path and a label, both text")
        if not isinstance(part, str | None):
            raise UserError(f"{where}: split must be train, val or test")
        path, part = check_path(path.strip(), where), (part or "").strip()
        if seen.setdefault(path, line) != line:
            raise UserError(f"{where}: {path} is on line {seen[path]} already; take one out")
        if part and part not in items.PARTS:
            raise UserError(f"{where}: split '{part}' is none of train, val, test")
        rows.append((part, path, label.strip()))
        if bool(part) != bool(rows[0][0]):
            raise UserError(f"{where}: either every line has a split, or none")
    if not rows:
        raise UserError(f"{file} names no images; add a line for each")
    return make_task(file.stem, file.parent, rows, str(file), split=split)


def _records(file: Path) -> Iterator[tuple[int, dict[Any, Any]]]:
    """The rows of a table, each after the number of its line."""
    with refusing(f"{file} cannot be read", "save it as UTF-8 text"):
        text = files.read_text(file, encoding="utf-8-sig")
    if file.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            where, form = f"{file}, line {number}", '{"path": "a.jpg", "label": "cat"}'
            if line.strip():
                errors = (ValueError, RecursionError)
                with refusing(f"{where}: malformed JSON", "mend it", *errors):
                    record = files.parse_json(line)
                if not isinstance(record, dict):
                    raise UserError(f"{where}: must be an object such as {form}")
                yield number, record
        return
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = reader.fieldnames or []
        if not {"path", "label"} <= set(columns):
            form = "must name the columns path and label (and may name split)"
            raise UserError(f"{file}, line 1: the header {form}, not '{','.join(columns)[:80]}'")
        yield from ((reader.line_num, record) for record in reader)
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: malformed CSV ({error})") from error


def read_class_names(file: Path) -> list[str] | dict[str, str]:
    """Class names in label order, or an object from listed names to better ones."""
    given = files.read_json(files.user_path(file), "class name file")
    values = list(given.values()) if isinstance(given, dict) else given
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        form = "a JSON object of folder name to class name, or a list of names in label order"
        raise UserError(f"class name file {file} must hold {form}")
    return given


def _renamed(task: items.Task, file: Path) -> items.Task:
    """A task with its classes called as the user's mapping or list says."""
    given, names, where = read_class_names(file), task.class_names, f"class name file {file}"
    if isinstance(given, dict):
        for name in given:
            if name not in names:
                close = nearest(name, names)
                raise UserError(f"{where}: the dataset has no class '{name}'{close}; take it out")
        given = [given.get(name, name) for name in names]
    if len(given) != len(names):
        what = f"lists {len(given)} names, but the dataset has {len(names)} classes"
        raise UserError(f"{where} {what}; list one for each, in label order")
    check_class_names(given, where)
    listed = (task.train, task.val, task.test)
    train, val, test = (tuple(replace(i, class_name=given[i.label]) for i in p) for p in listed)
    return replace(task, class_names=tuple(given), train=train, val=val, test=test)
