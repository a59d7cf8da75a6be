"""One door to every task: the bundled one, a benchmark, or images in whatever form they come.

The published benchmarks lie as the layout of the CoOp code base (`LAYOUT`) has them below one root.
Every reader finds the same order on every file system.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from dapt.data import items
from dapt.data.folders import read_folder
from dapt.data.items import (
    PARTS,
    check_class_names,
    check_path,
    make_task,
    subfolders,
    text_of,
)
from dapt.data.packed import is_hugging_face, is_webdataset, read_packed
from dapt.data.pictures import has_image_name
from dapt.data.spellings import TABLES
from dapt.data.tables import read_table, text_lines
from dapt.data.there import BUNDLED, TABLE, require_dataset
from dapt.errors import UserError, nearest
from dapt.safe import files

LAYOUT = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
BUNDLED_ROOT = Path(__file__).resolve().parents[1] / "assets" / "task"
_ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
_CLASS_NAMES = "classnames.txt"


def open_task(
    dataset: str,
    *,
    root: Path | None = None,
    domain: str | None = None,
    class_names: Path | None = None,
    test_fraction: float = 0.5,
    split_seed: int = 0,
    evaluate: bool = False,
    multi_label: bool | None = None,
) -> items.Task:
    """Open a dataset as a task. Images are not read yet; a missing one is reported when it is read.

    Args:
        dataset: ``bundled``, a benchmark's name, a folder, a table or packed data. Raises a
            `UserError` if it is none of these, or anything in it is wrong.
        root: folder with the benchmarks; only benchmarks need it.
        domain: style of the bundled task; by default the source domain.
        class_names: JSON file with other names for the classes.
        test_fraction, split_seed: share of each class that becomes test images, and the seed of
            this split, if the dataset is not split yet. With 0, val images join train, too.
        evaluate: only evaluate on the task: an unsplit dataset becomes all test images.
        multi_label: whether images may have several labels. By default, a table shows this itself.
            In folders, a file then has the labels of all class folders that contain it.
    """
    if domain is not None and dataset != BUNDLED:
        raise UserError(f"`domain` {domain} goes with the bundled task only, not with '{dataset}'")
    if not 0 <= test_fraction < 1:
        raise UserError(f"test_fraction {test_fraction} must be 0 or more, and less than 1")
    split = (1.0 if evaluate else test_fraction, split_seed)
    path = files.user_path(dataset)
    if dataset == BUNDLED:
        task = _read_bundled(domain)
    elif dataset in BENCHMARKS:
        task = BENCHMARKS[dataset].open(root)
    elif is_hugging_face(path) or is_webdataset(path):
        task = read_packed(path, split)
    elif path.is_dir():
        task = read_folder(path, split, multi_label)
    elif path.suffix.lower() in TABLES and path.is_file():
        task = read_table(path, split, multi_label)
    else:
        require_dataset(dataset)
        if path.suffix.lower() in _ARCHIVES:
            raise UserError(f"dataset {path} is an archive; unpack it and give the folder")
        raise UserError(f"dataset {path} must be a {', '.join(TABLES)} or .tar file, or a folder")
    if multi_label:
        task = replace(task, multilabel=True)
    if not (test_fraction or evaluate):
        task = replace(task, train=(*task.train, *task.val), val=())
    if class_names is not None:
        return _renamed(task, class_names)
    if dataset not in BENCHMARKS:
        check_class_names(task.class_names, f"dataset '{dataset}'")
    names, alike = task.class_names, items.names_alike(task.class_names)
    for one, other in alike[:1]:  # some benchmarks do have two classes of one name
        what = f"{len(alike)} of the {len(names):,} classes of '{task.name}' have another's name"
        such = f"(such as '{names[other]}', label {other}, that of label {one})"
        hint = "text prompts cannot tell apart; better ones can be given as class_names"
        return replace(task, notes=(*task.notes, f"{what} {such}, which {hint}"))
    return task


def bundled_domains() -> tuple[str, ...]:
    """Styles of the bundled task, the source domain first."""
    return tuple(_bundled(BUNDLED_ROOT)["domains"])


@cache
def _bundled(root: Path) -> Any:
    return files.read_json(root / "task.json", "bundled task")


def usual_template(dataset: str) -> str:
    """The template of a task of this name or path, which is not opened."""
    if dataset == BUNDLED:
        return str(_bundled(BUNDLED_ROOT)["template"])
    row = BENCHMARKS.get(dataset)
    return row.template if row else items.DEFAULT_TEMPLATE


def _read_bundled(domain: str | None) -> items.Task:
    data, domains = _bundled(BUNDLED_ROOT), bundled_domains()
    names, chosen = tuple(data["class_names"]), domains[0] if domain is None else domain
    if chosen not in domains:
        what = f"the bundled task has no domain '{chosen}'{nearest(chosen, domains)}"
        raise UserError(f"{what}; use one of {', '.join(domains)}")
    name = BUNDLED if chosen == domains[0] else f"{BUNDLED}:{chosen}"
    listed = (data["domains"][chosen].get(part, ()) for part in PARTS)
    train, val, test = (tuple(items.Item(p, k, names[k]) for p, k in pairs) for pairs in listed)
    return items.Task(name, BUNDLED_ROOT, names, train, val, test, data["template"])


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """A benchmark's text file's lines that are not blank, each after where it is."""
    if not file.exists():
        raise UserError(f"index file {file} does not exist; put the published one there")
    return text_lines(text_of(file), file)


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
        for name in [name for name in given if name not in names]:
            close = nearest(name, names)
            raise UserError(f"{where}: the dataset has no class '{name}'{close}; take it out")
        given = [given.get(name, name) for name in names]
    if len(given) != len(names):
        raise UserError(f"{where} lists {len(given)} names, but {len(names)} classes need one each")
    check_class_names(given, where)
    listed = (task.train, task.val, task.test)
    train, val, test = (tuple(replace(i, class_name=given[i.label]) for i in p) for p in listed)
    return replace(task, class_names=tuple(given), train=train, val=val, test=test)


def read_split(file: Path, images: Path | None = None) -> items.Task:
    """Read a split file: ``{"train"|"val"|"test": [[relative path, label, class name], ...]}``."""
    whole, data = f"split file {file}", files.read_json(file, "split file")
    if not isinstance(data, dict) or not all(isinstance(data.get(p), list) for p in PARTS):
        raise UserError(f"{whole} must be a JSON object with the lists train, val and test")
    names, rows = dict[int, str](), list[items.Row]()
    for part, number, entry in ((p, *e) for p in PARTS for e in enumerate(data[p])):
        where = f"{whole}, {part} entry {number}"
        if not isinstance(entry, list) or [type(value) for value in entry] != [str, int, str]:
            raise UserError(f"{where} must be [relative path, label, class name]; download it anew")
        path, label, name = entry
        if (known := names.setdefault(label, name)) != name:
            raise UserError(
                f"{where}: label {label} is '{name}' here and '{known}' before; mend it"
            )
        rows.append((part, check_path(path, where), label))
    if missing := sorted(set(range(len(names))) - set(names)):
        what = f"labels must be 0 .. {len(names) - 1} for its {len(names)} classes"
        raise UserError(f"{whole}: {what}, but {missing[0]} is missing; number them anew")
    names = dict(sorted(names.items()))
    check_class_names(list(names.values()), whole)
    return make_task(file.stem, images or file.parent, rows, whole, names=names)


def read_variants(file: Path, images: Path) -> items.Task:
    """Read FGVC-Aircraft's lists: variants.txt, and "id variant" in images_variant_{part}.txt."""
    names, rows = {line: line for _, line in _lines(file)}, list[items.Row]()
    check_class_names(list(names), f"index file {file}")
    for part in PARTS:
        for where, line in _lines(file.parent / f"images_variant_{part}.txt"):
            image, _, name = line.partition(" ")
            if name not in names:
                raise UserError(f"{where}: '{name}' is no variant that {file.name} lists; mend it")
            rows.append((part, check_path(f"{image}.jpg", where), name))
    return make_task(file.stem, images, rows, f"index file {file}", names=names)


def read_class_folders(file: Path, images: Path, form: str) -> items.Task:
    """Read folders of images called by WordNet id, with classnames.txt of "wnid name" lines.

    Labels are in the order of that file. All are test images, unless the ``form`` is "parted":
    class folders are below train/ and val/, of which the latter is to test on. "numbered" ones are
    called by line number, from 0, in place of the id. Of "some", the classes are those that have a
    folder, in place of all that the file lists.
    """
    names, rows, parted = dict[str, str](), list[items.Row](), form == "parted"
    for where, line in _lines(file):
        key, _, name = line.partition(" ")
        if not name.strip():
            raise UserError(f"{where}: '{line}' must be 'wnid class name'; mend it")
        key = str(len(names)) if form == "numbered" else key
        if key in names:
            raise UserError(f"{where}: {key} is listed twice; take one out")
        names[key] = name.strip()
    for part, place in (("train", "train/"), ("test", "val/")) if parted else (("test", ""),):
        there = set(subfolders(folder := images / place))
        if unknown := sorted(there.difference(names)):
            raise UserError(f"folder {folder / unknown[0]} is no class that {file} lists; mend it")
        if form == "some":
            names = {key: name for key, name in names.items() if key in there}
        missing = [key for key in names if key not in there]
        found = {key: sorted(filter(has_image_name, os.listdir(folder / key))) for key in there}
        for what, keys in (
            (f"that {file} lists are missing from {folder}", missing),
            (f"in {folder} hold no images", [key for key in names if not found.get(key)]),
        ):
            if keys:
                listed = f"{', '.join(keys[:20])}; download what is not there"
                raise UserError(f"class folders ({len(keys):,}) {what}: {listed}")
        rows += [(part, f"{place}{key}/{image}", key) for key in names for image in found[key]]
    where = f"benchmark folder {images}"
    return make_task(images.name, images, rows, where, names=names, tuned=parted)


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies below the root, how it is read, and what is known of it."""

    name: str  # what the user calls it
    folder: str  # below the root
    images: str  # the images' folder in that one; paths are relative to it
    index: str  # the file in ``folder`` that lists its images or classes
    classes: int
    counts: dict[str, int]  # images of the published split, by the parts that it has
    gigabytes: float  # of its download, about
    licence: str  # as its authors state it
    url: str  # where they give it
    template: str = items.DEFAULT_TEMPLATE  # the field's hand-written prompt for it
    read: str = "split"  # the index: a "split" file, "variants", or a form of class folders
    # images that every class has at least, of the parts where this is known
    least: dict[str, int] = field(default_factory=dict)

    def open(self, root: Path | None) -> items.Task:
        """Read the listing below ``root``."""
        wanted = f"the folder that holds {self.folder}/"
        if root is None:
            raise UserError(f"benchmark '{self.name}' needs `root`, {wanted}")
        root = files.user_path(root)
        if not root.is_dir():
            files.require_there(root, "`root`", f"give {wanted}")
            raise UserError(f"`root` {root} is a file; give {wanted}")
        if not (home := root / self.folder).is_dir():
            raise UserError(f"benchmark '{self.name}': {home} does not exist; check `root`")
        index, images = home / self.index, home / self.images
        if self.index == _CLASS_NAMES and not index.exists():
            index = root / "imagenet" / _CLASS_NAMES  # the same for ImageNet and its four shifts
        readers = {"split": read_split, "variants": read_variants}
        read = readers.get(self.read) or partial(read_class_folders, form=self.read)
        return replace(read(index, images), name=self.name, template=self.template)


BENCHMARKS = {name: Benchmark(name, **row) for name, row in TABLE.items()}
