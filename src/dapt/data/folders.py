"""Folders of images as a task: class folders, with parts above or below them, however spelled."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from posixpath import join, normpath
from typing import NamedTuple

from dapt.data import items
from dapt.data.items import PARTS, make_task, refusing
from dapt.data.left_out import LeftOut
from dapt.data.pictures import has_image_name
from dapt.data.spellings import (
    TABLE_NAMES,
    TABLES,
    UNSORTED,
    is_service,
    may_be_class,
    part_of,
    plain_part,
)
from dapt.data.tables import has_labels, read_tables
from dapt.errors import UserError

# Of what lies below a folder that is refused: how deep, and at how many, is looked to say which is
# meant; and how many are named.
_DEEP, _MOST, _NAMED = 3, 500, 3


class Level(NamedTuple):
    """What lies right in a folder, sorted; hidden and service folders left out."""

    folders: list[str]
    images: list[str]
    tables: list[str]


class Place(NamedTuple):
    """A class folder: its part ("" where nothing is split), where it is, and the class."""

    part: str
    inside: str
    name: str


# -- what lies where -------------------------------------------------------------------------


def look(folder: Path, inside: str = "", left: LeftOut | None = None) -> Level:
    """What lies right in ``inside`` a folder; ``left`` is told of the rest."""
    place = folder / inside
    with refusing(f"folder {place} cannot be read", "check the path"), os.scandir(place) as found:
        entries = sorted((entry.name, entry.is_dir()) for entry in found)
    folders = {name for name, is_folder in entries if is_folder}
    kept = {n for n in folders if n[0] != "." and not is_service(n, within=False)}
    files = [name for name, is_folder in entries if not is_folder and name[0] != "."]
    if left is not None:
        _leave(place, inside, folders - kept, left)
    tables = [name for name in files if os.path.splitext(name)[1].lower() in TABLES]
    return Level(sorted(kept), [n for n in files if has_image_name(n)], tables)


def images_below(folder: Path, inside: str = "", left: LeftOut | None = None) -> list[str]:
    """What has an image's name below ``folder``, hidden ones and service folders left out.

    ``left`` is told of those, and of what else is left out, with ``inside`` before their paths.
    """
    left = LeftOut() if left is None else left
    found, awaited = list[str](), {os.fspath(folder)}
    for place, folders, names in os.walk(folder):
        awaited.discard(place)
        here = Path(place).relative_to(folder)
        if not folders and not names and has_image_name(here.name):
            found.append(here.as_posix())  # an empty folder, which is no image when read
        kept = {name for name in folders if name[0] != "." and not is_service(name)}
        below = normpath(join(inside, here.as_posix()))
        _leave(Path(place), below, {*folders} - kept, left)
        links = {name for name in kept if os.path.islink(os.path.join(place, name))}
        left.add("link to a folder", (join(below, name) for name in links))
        folders[:] = kept - links
        awaited.update(os.path.join(place, name) for name in folders)
        for name in names:
            if has_image_name(name):
                found.append((here / name).as_posix())
            elif name[0] != ".":
                left.add("no image's name", [join(below, name)])
            elif has_image_name(name.lstrip("._")):
                left.add("hidden", [join(below, name)])
    closed = (Path(place).relative_to(folder).as_posix() for place in awaited)
    left.add("folder not readable", (normpath(join(inside, place)) for place in closed))
    return found


def _leave(place: Path, inside: str, names: Iterable[str], left: LeftOut) -> None:
    """Count the images of folders that are left out, by why they are."""
    for name in names:
        reason = "service folder" if is_service(name) else "hidden"
        left.add(reason, (normpath(join(inside, name, i)) for i in _all_images(place / name)))


def _all_images(folder: Path) -> Iterator[str]:
    """Whatever has an image's name below a folder, hidden or not."""
    for place, _, names in os.walk(folder):
        inside = Path(place).relative_to(folder).as_posix()
        yield from (join(inside, name) for name in names if has_image_name(name.lstrip("._")))


# -- a task of it ----------------------------------------------------------------------------


def read_folder(folder: Path, split: items.Split, multi_label: bool | None = None) -> items.Task:
    """Read a tree of images, class by class folder, labelled in the order of folder names.

    Class folders lie in train/, test/ (and val/), or parts lie in class folders; else the images
    are split. Images may lie deeper in class folders. Parts without any are read by their tables.
    If images have several labels (``multi_label``), equal files of a part are one image with all.
    """
    left, notes = LeftOut(), list[str]()
    level = look(folder, "", left)
    if parts := _parts_among(folder, level.folders):
        places = _places_in(folder, parts, left, notes)
        for beside in {*level.folders}.difference(parts.values()):
            images = (normpath(join(beside, image)) for image in _all_images(folder / beside))
            left.add("beside the parts", images)
    elif (problem := _problem(folder, level, notes)) is None:
        places = [Place("", name, name) for name in level.folders]
    elif (task := _of_tables(folder, level, split, multi_label)) is not None:
        return task
    else:
        what, hint = problem
        raise UserError(f"{what}{_meant(folder, level)}; {hint}")
    left.add("in no class folder", level.images)
    for name in sorted({place.name for place in places if place.name.casefold() in UNSORTED}):
        notes.append(f"folder '{name}' is taken for a class of {folder}; move it out if it is none")
    _check_links(folder, [*parts.values(), *(place.inside for place in places)])
    found = {place: _images_of(folder, place, left) for place in places}
    if not parts:
        found = _by_inner_parts(folder, found, notes)
    order = {name: k for k, name in enumerate(items.label_order({p.name for p in places}))}
    rows = [
        (place.part, f"{place.inside}/{path}", place.name)
        for place in sorted(found, key=lambda place: order[place.name])
        for path in found[place]
    ]
    name, facts = folder.resolve().name, left.facts(str(folder), notes)
    if multi_label:
        rows, facts["multilabel"] = _merged(folder, rows), True
    return make_task(name, folder, rows, f"folder {folder}", split=split, **facts)


def _merged(folder: Path, rows: list[items.Row]) -> list[items.Row]:
    """Rows of equal files as one, which has all their classes."""
    first = items.content_groups([folder / path for _, path, _ in rows])
    found: dict[tuple[str, int], list[items.Row]] = {}
    for place, row in zip(first, rows, strict=True):
        found.setdefault((row[0], place), []).append(row)
    return [(*same[0][:2], tuple(key for *_, key in same)) for same in found.values()]


def _parts_among(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Folders that are parts with class folders in them, by part; none if nothing is parted here.

    A class may be called "train": a part to tune on holds folders. What may be a class is a part
    only if it is called just "train", or others are parts without a doubt.
    """
    groups: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name in names:
        part, rest = part_of(name) or ("", ())
        if part:
            groups.setdefault(rest, {}).setdefault(part, []).append(name)
    holding = {n for group in groups.values() for some in group.values() for n in some}
    holding = {name for name in holding if look(folder / name).folders}
    for _, group in sorted(groups.items(), key=lambda pair: len(pair[0])):
        tuned = holding.intersection(group.get("train", ()))
        others = [n for part in ("val", "test") for n in group.get(part, ())]
        sure = any(n in holding and not may_be_class(n) for n in others)
        whole = others and sum(map(len, group.values())) == len(names)
        if "train" in tuned or (tuned and (sure or whole)):
            return {part: _one_of(folder, part, some, holding) for part, some in group.items()}
    return {}


def _one_of(folder: Path, part: str, names: list[str], holding: set[str]) -> str:
    """The folder of several that is meant by a part: that holds folders, or of this very name."""
    names = [name for name in names if name in holding] or names
    if part not in names and len(names) > 1:
        what = f"folder {folder} holds {'/ and '.join(names)}/, which all are called like '{part}'"
        raise UserError(f"{what}; call the one that is meant {part}/")
    return part if part in names else names[0]


def _places_in(folder: Path, parts: dict[str, str], left: LeftOut, notes: list[str]) -> list[Place]:
    """The class folders of parts; images beside them are left out."""
    there, classes = dict[str, tuple[str, list[str]]](), list[str]()
    for part, inside in sorted(parts.items(), key=lambda pair: PARTS.index(pair[0])):
        level = look(folder, inside, left)
        # A folder alone that is no class is one more level, as in train/train/cat.
        while len(level.folders) == 1 and level.folders[0] not in classes and not level.images:
            if not look(folder, deeper := f"{inside}/{level.folders[0]}").folders:
                break
            inside, level = deeper, look(folder, deeper, left)
        left.add("in no class folder", (f"{inside}/{image}" for image in level.images))
        if level.folders:
            there[part], classes = (inside, level.folders), classes or level.folders
    tuned, missing = parts["train"], parts.get("test", "test")
    if "test" not in there and "val" in there:
        there["test"] = there.pop("val")
        has = "has no" if "test" not in parts else "has no class folders in"
        also = f"the images of {parts['val']}/ are tested on, and none are kept to choose by"
        notes.append(f"folder {folder} {has} {missing}/: {also}")
    if "test" not in there:
        no = f"no {missing}/" if "test" not in parts else f"no class folders in {missing}/"
        way = f"add one, or give {folder / tuned}, whose images are then split"
        raise UserError(f"folder {folder} has {tuned}/ but {no}; {way}")
    for inside, names in there.values():
        if unknown := sorted(set(names).difference(classes)):
            what = f"class folder {folder / inside / unknown[0]} has none in {tuned}/ like it"
            raise UserError(f"{what}; add it")
    return [Place(part, f"{at}/{name}", name) for part, (at, names) in there.items()
            for name in names]  # fmt: skip


def _problem(folder: Path, level: Level, notes: list[str]) -> tuple[str, str] | None:
    """Why the folders right in a folder are no classes, and the way out; None if they may be."""
    names, said = level.folders, f"folder {folder} holds"
    parts = {name: part for name in names if (part := plain_part(name))}
    sure = [name for name in parts if not may_be_class(name)]
    if not names:
        return f"{said} no class folders", (
            "give each class one of its own, as in photos/cat/1.jpg and photos/dog/1.jpg"
        )
    if len(names) == 1:
        what = f"{said} one class folder, {names[0]}/, and one class leaves nothing to tell apart"
        return what, "give a folder that holds one for each class"
    if len(parts) == len(names) and (sure or len({*parts.values()}) > 1):
        what = f"{said} {'/, '.join(names)}/, which are parts, not classes"
        if any(look(folder / name).folders for name in names):
            return f"{what}, and none is to tune on", "call that one train/"
        way = "give each class one in them, or make a table with path, label and split"
        return f"{what}, and their images are in no class folders", way
    if sure:
        what = f"{said} {'/, '.join(sure)}/ beside class folders, which names a part, not a class"
        return what, "put class folders into train/ and test/, or rename it"
    for name in parts:
        notes.append(f"folder {folder / name} is called like a part, and is taken for a class")
    return None


def _images_of(folder: Path, place: Place, left: LeftOut) -> list[str]:
    """A class folder's images, sorted, from there."""
    others = LeftOut()
    found = images_below(folder / place.inside, place.inside, others)
    if not found:
        named = ""
        for reason, paths in others.found.items():
            named = f" (by its name, {min(paths)} is none)"
            if reason != "no image's name":
                named = f" ({reason}: {min(paths)})"
        raise UserError(f"class folder {folder / place.inside} holds no images{named}; add some")
    left.update(others)
    return sorted(found)


def _check_links(folder: Path, insides: Sequence[str]) -> None:
    """Refuse folders that are the same, and links that lead back: images would be there twice."""
    top, seen = os.path.realpath(folder), dict[str, str]()
    for inside in insides:
        real = os.path.realpath(folder / inside)
        if (first := seen.setdefault(real, inside)) != inside:
            what = f"{folder / first} and {folder / inside} are the same folder"
            raise UserError(f"{what}; take the link out")
        if Path(top).is_relative_to(real):
            raise UserError(f"{folder / inside} is a link back to {real}; take it out")


def _by_inner_parts(
    folder: Path, found: dict[Place, list[str]], notes: list[str]
) -> dict[Place, list[str]]:
    """Class folders' images, with the part of those that lie in parts of their class folder."""
    names, parted = {place.name for place in found}, dict[Place, list[str]]()
    heads = {p: {path.partition("/")[0] for path in paths if "/" in path}
             for p, paths in found.items()}  # fmt: skip
    whole = {p for p, paths in found.items() if all("/" in path for path in paths)}
    for place, inner in heads.items():
        if len(names) > 2 and inner >= names - {place.name}:
            what = f"class folder {folder / place.name} holds all the others' folders again"
            raise UserError(f"{what}; take it out, or give it alone")
        parts = {plain_part(head) for head in inner}
        if place in whole and "" not in parts and "train" in parts and len(parts) > 1:
            if all(path.count("/") > 1 for path in found[place]):
                what = f"folder {folder} holds {place.name}/, which has parts of its own"
                raise UserError(f"{what}; did you mean {folder / place.name}?")
            for path in found[place]:
                part = plain_part(path.partition("/")[0])
                parted.setdefault(place._replace(part=part), []).append(path)
    if parted and len({place.name for place in parted}) < len(names):
        odd = min(names - {place.name for place in parted})
        what = f"class folders of {folder} hold train/ and others, but {odd}/ does not"
        raise UserError(f"{what}; give all of them parts, or none")
    inner = next(iter(heads.values()))
    if not parted and whole and len(inner) > 1 and all(other == inner for other in heads.values()):
        what = f"the class folders of {folder} all hold {'/, '.join(sorted(inner)[:4])}/"
        notes.append(f"{what}; if those are the classes, give one of the class folders")
    return parted or found


# -- tables in place of class folders, and what else may be meant ----------------------------


def _of_tables(
    folder: Path, level: Level, split: items.Split, multi_label: bool | None
) -> items.Task | None:
    """A task of parts that each have a table, in them or beside them; None if there is none."""
    parts, tables = dict[str, str](), dict[str, Path]()
    for name in level.folders:
        parts.setdefault(plain_part(name), name)
    for part in PARTS:
        inside = parts.get(part, "")
        within = _known_tables(look(folder / inside), part) if inside else []
        known = [folder / inside / name for name in within]
        known += [folder / name for name in level.tables if plain_part(Path(name).stem) == part]
        if (file := next(filter(has_labels, known), None)) is not None:
            tables[part] = file
    notes = []
    if "test" not in tables and "val" in tables:
        tables["test"] = tables.pop("val")
        notes.append(f"{tables['test']} is tested on: no other table is of test images")
    if not {"train", "test"} <= tables.keys():
        return None
    insides = [name for part, name in parts.items() if part]
    images = [join(n, image) for n in insides for image in images_below(folder / n)]
    name, where = folder.resolve().name, f"folder {folder}"
    return read_tables(
        name,
        folder,
        [*tables.items()],
        where,
        split,
        notes=notes,
        images=images,
        multi_label=multi_label,
    )


def _known_tables(level: Level, part: str = "") -> list[str]:
    """Tables of the usual names, or of a part's, the usual ones first."""
    stems = {name: os.path.splitext(name)[0].casefold() for name in level.tables}
    usual = [name for known in TABLE_NAMES for name, stem in stems.items() if stem == known]
    named = [n for n, stem in stems.items() if plain_part(stem) and plain_part(stem) == part]
    return [*usual, *(name for name in named if name not in usual)]


def _meant(folder: Path, level: Level) -> str:
    """The question whether tables in a folder, or folders below it, were meant; "" without any."""
    tables = _known_tables(level) or [n for n in level.tables if plain_part(Path(n).stem)]
    tables += [n for n in level.tables if len(level.tables) == 1 and n not in tables]
    found = [folder / name for name in tables if has_labels(folder / name)]
    if not found:
        for name in level.folders:
            there = _known_tables(look(folder / name), plain_part(name))
            found += [f for n in there if has_labels(f := folder / name / n)]
    whole = [n for n in level.folders if len(level.folders) == 1 or not plain_part(n)]
    ahead, looked = deque((folder / name, 1) for name in whole), 0
    while ahead and looked < _MOST and len(found) < _NAMED:
        place, depth = ahead.popleft()
        looked += 1
        inner = look(place).folders
        if sum(next(_all_images(place / name), None) is not None for name in inner[:20]) > 1:
            found.append(place)
        elif depth < _DEEP:
            ahead += ((place / name, depth + 1) for name in inner)
    return f" (did you mean {' or '.join(map(str, found[:_NAMED]))}?)" if found else ""
