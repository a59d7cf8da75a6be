"""Readers of the files that list a published benchmark's images, and its split where it has one.

Each takes the index file and the images' folder, and finds the same order on every file system.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dapt.data.images import has_image_name
from dapt.data.items import PARTS, Listing, Pair, check_class_names, check_listing, check_path
from dapt.errors import UserError
from dapt.safe.files import read_json, read_text

# Class folders that one sentence names.
_NAMED = 20


def read_split(file: Path, _images: Path | None = None) -> Listing:
    """Read a split file: ``{"train"|"val"|"test": [[relative path, label, class name], ...]}``.

    Raises:
        UserError: the file is missing, is no JSON, or is not of that form; labels are not
            0 .. C-1; a label has two class names; a path leaves the images' folder.
    """
    if not file.is_file():
        raise UserError(
            f"split file {file} does not exist; put the published one there, or check --root"
        )
    data = read_json(file, "split file")
    if not isinstance(data, dict) or not all(isinstance(data.get(p), list) for p in PARTS):
        raise UserError(
            f"split file {file} must be a JSON object with the lists train, val and test; "
            "download it anew"
        )
    names: dict[int, str] = {}
    parts: dict[str, tuple[Pair, ...]] = {}
    for part in PARTS:
        pairs = []
        for number, entry in enumerate(data[part]):
            where = f"split file {file}, {part} entry {number}"
            path, label, name = _split_entry(entry, where)
            if names.setdefault(label, name) != name:
                raise UserError(
                    f"{where}: label {label} is '{name}' here and '{names[label]}' before; a "
                    "label has one class name"
                )
            pairs.append((check_path(path, where), label))
        parts[part] = tuple(pairs)
    classes = range(len(names))
    if missing := [label for label in classes if label not in names]:
        raise UserError(
            f"split file {file}: labels must be 0 .. {len(names) - 1} for its {len(names)} "
            f"classes, but {missing[0]} is missing; number them anew"
        )
    listing = Listing(tuple(names[label] for label in classes), **parts)
    check_class_names(listing.class_names, f"split file {file}")
    check_listing(listing, f"split file {file}")
    return listing


def _split_entry(entry: Any, where: str) -> tuple[str, int, str]:
    if (
        isinstance(entry, list)
        and [type(x) for x in entry] == [str, int, str]  # True is an int to isinstance
    ):
        return entry[0], entry[1], entry[2]
    raise UserError(f"{where} must be [relative path, label, class name]; download the file anew")


def read_variants(file: Path, _images: Path | None = None) -> Listing:
    """Read FGVC-Aircraft's own lists: variants.txt and images_variant_{train,val,test}.txt.

    A line of the first is a class, in label order; of the others, "id name of the variant".

    Raises:
        UserError: a list is missing or unreadable, or a line names no known variant.
    """
    names = [line for _, line in _lines(file)]
    check_class_names(names, f"index file {file}")
    label_of = {name: label for label, name in enumerate(names)}
    parts: dict[str, tuple[Pair, ...]] = {}
    for part in PARTS:
        index = file.parent / f"images_variant_{part}.txt"
        pairs = []
        for number, line in _lines(index):
            image, _, name = line.partition(" ")
            where = f"index file {index}, line {number}"
            if name not in label_of:
                raise UserError(
                    f"{where}: '{name}' is no variant that {file.name} lists; download both anew"
                )
            pairs.append((check_path(f"{image}.jpg", where), label_of[name]))
        parts[part] = tuple(pairs)
    listing = Listing(tuple(names), **parts)
    check_listing(listing, f"index file {file}")
    return listing


def read_class_folders(
    file: Path,
    images: Path,
    parts: dict[str, str],
    *,
    numbered: bool = False,
    some: bool = False,
) -> Listing:
    """Read folders of images called by WordNet id, with classnames.txt of "wnid name" lines.

    Labels are in the order of classnames.txt.

    Args:
        file: classnames.txt.
        images: the images' folder.
        parts: of a listing, to the folder in ``images`` that holds the part's class folders.
        numbered: class folders are called by line number, from 0, in place of the id.
        some: the classes are those that have a folder, in place of all that the file lists.

    Raises:
        UserError: the file or a folder is missing, a line has no name, or a class folder is
            missing, is empty, or is none of the file's.
    """
    name_of: dict[str, str] = {}
    for number, line in _lines(file):
        key, _, name = line.partition(" ")
        where = f"index file {file}, line {number}"
        if not name.strip():
            raise UserError(f"{where}: '{line}' must be 'wnid class name'; mend it")
        key = str(len(name_of)) if numbered else key
        if key in name_of:
            raise UserError(f"{where}: {key} is listed twice; take one out")
        name_of[key] = name.strip()
    folders = {part: _class_folders(images / place, name_of, file) for part, place in parts.items()}
    if some:
        there = set[str]().union(*folders.values())
        name_of = {key: name for key, name in name_of.items() if key in there}
    for part, place in parts.items():
        missing = [key for key in name_of if key not in folders[part]]
        _refuse(missing, f"class folders that {file} lists are missing from {images / place}")
    listing = Listing(
        tuple(name_of.values()),
        **{part: _in_class_folders(images, place, name_of) for part, place in parts.items()},
    )
    check_class_names(listing.class_names, f"index file {file}", distinct=False)
    check_listing(listing, f"benchmark folder {images}", tuned="train" in parts)
    return listing


def _class_folders(folder: Path, known: Iterable[str], file: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            found = {e.name for e in entries if not e.name.startswith(".") and e.is_dir()}
    except OSError as error:
        raise UserError(
            f"images' folder {folder} cannot be read ({error.strerror}); check the layout with "
            "'dapt data check'"
        ) from error
    if unknown := sorted(found - set(known)):
        raise UserError(
            f"folder {folder / unknown[0]} is no class that {file} lists; take it out, or mend "
            "the file"
        )
    return found


def _in_class_folders(images: Path, place: str, keys: Iterable[str]) -> tuple[Pair, ...]:
    """Image files of all class folders, relative to ``images``: by class, in order of names."""
    pairs: list[Pair] = []
    empty = []
    for label, key in enumerate(keys):
        names = sorted(name for name in os.listdir(images / place / key) if has_image_name(name))
        if not names:
            empty.append(key)
        inside = f"{place}/{key}".removeprefix("./")
        pairs += [(check_path(f"{inside}/{name}", f"folder {images}"), label) for name in names]
    _refuse(empty, f"class folders in {images / place} hold no images")
    return tuple(pairs)


def _refuse(keys: list[str], what: str) -> None:
    """Raise, naming the class folders that are not as they should be, if there are any."""
    if keys:
        more = f" and {len(keys) - _NAMED:,} more" if len(keys) > _NAMED else ""
        raise UserError(f"{what}: {', '.join(keys[:_NAMED])}{more}; download what is not there")


def _lines(file: Path) -> list[tuple[int, str]]:
    """A text file's lines that are not blank, with their numbers from 1."""
    try:
        text = read_text(file)
    except FileNotFoundError as error:
        raise UserError(
            f"index file {file} does not exist; put the published one there, or check --root"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"index file {file} cannot be read ({error}); download it anew") from error
    lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"index file {file} is empty; download it anew")
    return lines
