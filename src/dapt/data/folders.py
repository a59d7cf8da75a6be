"""A task from a folder of images, and the split of what comes without one."""

from __future__ import annotations

import os
import random
from pathlib import Path

from dapt.data.images import has_image_name
from dapt.data.items import (
    PARTS,
    Listing,
    Pair,
    check_class_names,
    check_listing,
    check_path,
    label_order,
)
from dapt.errors import UserError

# Names of parts that others give, in lower case.
_PART_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}


def read_folder(
    folder: Path, test_fraction: float, split_seed: int
) -> tuple[Listing, tuple[str, ...]]:
    """Read a tree of images, class by class folder, labelled in the order of folder names.

    Either ``train/<class>/`` and ``test/<class>/`` (and ``val/<class>/``), or ``<class>/`` alone,
    which `split_by_class` then splits. Images may lie deeper in a class's folder.

    Returns:
        What is found, and notes on what is left out.

    Raises:
        UserError: there are no class folders or one is empty; ``test/`` or a test class's train
            folder is missing; the parts have other names; two folders' names read the same.
    """
    left: list[str] = []  # files without an image's name
    # A class may be called "train": a split tree's train/ holds folders.
    if (folder / "train").is_dir() and _subfolders(folder / "train"):
        if not (folder / "test").is_dir():
            hint = f"; rename {folder / 'val'} to test" if (folder / "val").is_dir() else ""
            raise UserError(f"folder {folder} has train/ but no test/{hint or '; add one'}")
        listing = _read_parts(folder, left)
    else:
        classes = label_order(set(_subfolders(folder)))
        if not classes:
            raise UserError(
                f"folder {folder} holds no class folders; put each class's images in a folder of "
                "its own, or train/ and test/ with such folders"
            )
        # Only Training/<class>/ and the like hold folders: a class's images lie right inside.
        if {name.casefold() for name in classes} <= _PART_NAMES and all(
            _subfolders(folder / name) for name in classes
        ):
            raise UserError(
                f"folder {folder} holds {', '.join(f'{name}/' for name in classes)}, which are "
                "parts, not classes; rename them train/ and test/ (and val/)"
            )
        images = tuple(
            (path, label)
            for label, name in enumerate(classes)
            for path in _images(folder, folder / name, left)
        )
        train, test = split_by_class(images, classes, test_fraction, split_seed)
        listing = Listing(tuple(classes), train=train, test=test)
    check_class_names(listing.class_names, f"folder {folder}", distinct=False)
    check_listing(listing, f"folder {folder}", tuned=test_fraction < 1)
    if left:
        note = (
            f"{len(left):,} files in the class folders of {folder} have no image's name and are "
            f"left out (such as {left[0]}); convert them, or give them the extension that they "
            "should have"
        )
        return listing, (note,)
    return listing, ()


def split_by_class(
    images: tuple[Pair, ...], classes: list[str], test_fraction: float, seed: int
) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Split every class's images into train and test, at random but always the same.

    A class's split depends on its name, its images and the seed alone, not on other classes. A
    class of two or more images has some in both; a single image goes to train.

    A fraction of 1 takes everything for testing.

    Returns:
        Train and test pairs, each in the order of ``images``.
    """
    if test_fraction >= 1:
        return (), images
    by_class: dict[int, list[Pair]] = {}
    for pair in sorted(images):
        by_class.setdefault(pair[1], []).append(pair)
    tested: set[Pair] = set()
    for label, members in by_class.items():
        random.Random(f"{seed}/{classes[label]}").shuffle(members)
        count = round(test_fraction * len(members))
        tested.update(members[: min(max(count, 1), len(members) - 1)])
    train = tuple(pair for pair in images if pair not in tested)
    return train, tuple(pair for pair in images if pair in tested)


def _read_parts(folder: Path, left: list[str]) -> Listing:
    found = {part: _subfolders(folder / part) for part in PARTS if (folder / part).is_dir()}
    classes = label_order(set(found["train"]))
    parts: dict[str, tuple[Pair, ...]] = {}
    for part, names in found.items():
        if unknown := sorted(set(names) - set(classes)):
            raise UserError(
                f"class folder {folder / part / unknown[0]} has no counterpart in "
                f"{folder / 'train'}; add one, or take it out"
            )
        parts[part] = tuple(
            (path, label)
            for label, name in enumerate(classes)
            if name in names
            for path in _images(folder, folder / part / name, left)
        )
    return Listing(tuple(classes), **parts)


def _subfolders(folder: Path) -> list[str]:
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read ({error.strerror})") from error
    return sorted(n for n in names if not n.startswith(".") and (folder / n).is_dir())


def _is_empty(place: str, name: str) -> bool:
    try:
        return not os.listdir(os.path.join(place, name))
    except OSError:
        return False


def images_below(folder: Path, others: list[str] | None = None) -> list[str]:
    """What has an image's name in and below ``folder``, relative to it; hidden ones left out.

    What has the name and is no image is found out, and told, when it is read. Files of other names
    are added to ``others``.
    """
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(place).relative_to(folder)
        empty = [name for name in folders if has_image_name(name) and _is_empty(place, name)]
        names = [name for name in (*files, *empty) if has_image_name(name)]
        found += [(inside / name).as_posix() for name in names]
        if others is not None:
            rest = [n for n in files if not has_image_name(n) and not n.startswith(".")]
            others += [(inside / name).as_posix() for name in rest]
    return found


def _images(root: Path, folder: Path, left: list[str]) -> list[str]:
    """`images_below` a class's folder, relative to ``root``, sorted; other files go to ``left``."""
    inside, unlike = folder.relative_to(root), list[str]()
    found = [(inside / path).as_posix() for path in images_below(folder, unlike)]
    others = [(inside / path).as_posix() for path in unlike]
    if not found:
        named = f" (by its name, {min(others)} is none)" if others else ""
        raise UserError(f"class folder {folder} holds no images{named}; add some, or take it out")
    left += sorted(others)
    return sorted(check_path(path, f"folder {root}") for path in found)
