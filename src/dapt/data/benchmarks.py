"""The published benchmarks, as the layout of the CoOp code base (`LAYOUT`) has them below one root.

A reader takes the file that lists a benchmark's images or classes, and the folder of its images,
and finds the same order on every file system.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from dapt.data import items
from dapt.data.images import has_image_name
from dapt.data.items import check_class_names, check_path, make_task, refusing, subfolders
from dapt.errors import UserError
from dapt.safe import files

LAYOUT = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
CLASS_NAMES = "classnames.txt"


def read_split(file: Path, images: Path | None = None) -> items.Task:
    """Read a split file: ``{"train"|"val"|"test": [[relative path, label, class name], ...]}``."""
    whole, data = f"split file {file}", files.read_json(file, "split file")
    if not isinstance(data, dict) or not all(isinstance(data.get(p), list) for p in items.PARTS):
        form = "a JSON object with the lists train, val and test"
        raise UserError(f"{whole} must be {form}; download it anew")
    names, rows = dict[int, str](), list[items.Row]()
    for part in items.PARTS:
        for number, entry in enumerate(data[part]):
            where, kinds = f"{whole}, {part} entry {number}", [str, int, str]
            if not isinstance(entry, list) or [type(value) for value in entry] != kinds:
                form = "[relative path, label, class name]"
                raise UserError(f"{where} must be {form}; download the file anew")
            path, label, name = entry
            if (known := names.setdefault(label, name)) != name:
                what = f"label {label} is '{name}' here and '{known}' before"
                raise UserError(f"{where}: {what}; a label has one class name")
            rows.append((part, check_path(path, where), label))
    if missing := sorted(set(range(len(names))) - set(names)):
        what = f"labels must be 0 .. {len(names) - 1} for its {len(names)} classes"
        raise UserError(f"{whole}: {what}, but {missing[0]} is missing; number them anew")
    names = dict(sorted(names.items()))
    check_class_names(list(names.values()), whole)
    return make_task(file.stem, images or file.parent, rows, whole, names=names)


def read_variants(file: Path, images: Path) -> items.Task:
    """Read FGVC-Aircraft's own lists: variants.txt and images_variant_{train,val,test}.txt.

    A line of the first is a class, in label order; of the others, "id name of the variant".
    """
    variants, rows = [line for _, line in _lines(file)], list[items.Row]()
    check_class_names(variants, f"index file {file}")
    names = {variant: variant for variant in variants}
    for part in items.PARTS:
        for where, line in _lines(file.parent / f"images_variant_{part}.txt"):
            image, _, name = line.partition(" ")
            if name not in names:
                what = f"'{name}' is no variant that {file.name} lists"
                raise UserError(f"{where}: {what}; download both anew")
            rows.append((part, check_path(f"{image}.jpg", where), name))
    return make_task(file.stem, images, rows, f"index file {file}", names=names)


def read_class_folders(
    file: Path, images: Path, *, parted: bool = False, numbered: bool = False, some: bool = False
) -> items.Task:
    """Read folders of images called by WordNet id, with classnames.txt of "wnid name" lines.

    Labels are in the order of that file. All are test images, unless the class folders are
    ``parted``: below train/ and val/, of which the latter is to test on. ``numbered`` ones are
    called by line number, from 0, in place of the id. Where there are only ``some``, the classes
    are those that have a folder, in place of all that the file lists.
    """
    names, rows = dict[str, str](), list[items.Row]()
    for where, line in _lines(file):
        key, _, name = line.partition(" ")
        if not name.strip():
            raise UserError(f"{where}: '{line}' must be 'wnid class name'; mend it")
        key = str(len(names)) if numbered else key
        if key in names:
            raise UserError(f"{where}: {key} is listed twice; take one out")
        names[key] = name.strip()
    for part, place in (("train", "train"), ("test", "val")) if parted else (("test", "."),):
        folder = images / place
        there = set(subfolders(folder))
        if unknown := sorted(there.difference(names)):
            what = f"folder {folder / unknown[0]} is no class that {file} lists"
            raise UserError(f"{what}; take it out, or mend the file")
        if some:
            names = {key: name for key, name in names.items() if key in there}
        if missing := [key for key in names if key not in there]:
            what = f"class folders ({len(missing):,}) that {file} lists are missing from {folder}"
            raise UserError(f"{what}: {', '.join(missing[:20])}; download what is not there")
        found = {key: sorted(filter(has_image_name, os.listdir(folder / key))) for key in names}
        if empty := [key for key in names if not found[key]]:
            what = f"class folders ({len(empty):,}) in {folder} hold no images"
            raise UserError(f"{what}: {', '.join(empty[:20])}; download what is not there")
        for key in names:
            inside = f"{place}/{key}".removeprefix("./")
            rows += [(part, f"{inside}/{image}", key) for image in found[key]]
    where = f"benchmark folder {images}"
    return make_task(images.name, images, rows, where, names=names, tuned=parted)


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """A text file's lines that are not blank, each after where it is."""
    if not file.exists():
        raise UserError(f"index file {file} does not exist; put the published one there")
    with refusing(f"index file {file} cannot be read", "download it anew"):
        text = files.read_text(file)
    if not text.strip():
        raise UserError(f"index file {file} is empty; download it anew")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"index file {file}, line {number}", line.strip()


READERS: dict[str, Callable[[Path, Path], items.Task]] = {
    "split": read_split,
    "variants": read_variants,
    "parted": partial(read_class_folders, parted=True),
    "folders": read_class_folders,
    "numbered": partial(read_class_folders, numbered=True),
    "some": partial(read_class_folders, some=True),
}


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
    read: str = "split"  # the one of `READERS` that takes its index and its images' folder
    # images that every class has at least, of the parts where this is known
    least: dict[str, int] = field(default_factory=dict)

    def image_root(self, root: Path) -> Path:
        """The images' folder, which item paths are relative to."""
        return root / self.folder / self.images

    def open(self, root: Path | None) -> items.Task:
        """Read the listing below ``root``."""
        wanted = f"the folder that holds {self.folder}/"
        if root is None:
            raise UserError(f"benchmark '{self.name}' needs --root, {wanted}")
        root = files.user_path(root)
        if not root.is_dir():
            raise UserError(f"--root {root} does not exist; give {wanted}")
        if not (home := root / self.folder).is_dir():
            raise UserError(f"benchmark '{self.name}': {home} does not exist; check --root")
        index = home / self.index
        if self.index == CLASS_NAMES and not index.exists():
            index = root / "imagenet" / CLASS_NAMES  # the same for ImageNet and its four shifts
        task = READERS[self.read](index, self.image_root(root))
        return replace(task, name=self.name, template=self.template)


_TABLE = files.read_yaml(Path(__file__).with_suffix(".yaml"), "table of benchmarks")
BENCHMARKS = {name: Benchmark(name, **row) for name, row in _TABLE.items()}
