"""Exports of labelling tools: which image has which classes, as Label Studio and COCO have it.

Each reader gives (where, the image's path, its class names), several or none as the export has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dapt.data.images import first_of
from dapt.data.spellings import INDEX_COLUMNS, column_key
from dapt.errors import UserError, refusing

Labelled = tuple[str, Any, list[str]]
_DAMAGED = (LookupError, TypeError, AttributeError, ValueError)


def classes_in_cell(value: Any, several: bool) -> list[str] | None:
    """The class names that a cell holds, or None if it holds none.

    It is a name, a whole number, an exporter's list, or a choice of several as Label Studio's CSV
    has it: ``{"choices": ["a", "b"]}``. If there may be ``several``, also a list of names and
    numbers, or names with ``|`` between.
    """
    if several and type(value) is list:
        names = [str(one) if type(one) is int else one for one in value]
        return names if names and all(isinstance(name, str) for name in names) else None
    if type(value) is int:  # JSON's 3 is the class "3", as it is in CSV
        return [str(value)]
    if isinstance(value, _Names):
        return value
    if not isinstance(value, str):
        return None
    if value.startswith('{"choices"'):
        try:
            names = json.loads(value)["choices"]
        except (*_DAMAGED, RecursionError):
            return [value]
        return [str(name) for name in names] if isinstance(names, list) else [str(names)]
    return value.split("|") if several else [value]


class _Names(list[str]):
    """Class names that a reader here has found: what other lists mean is not known."""


def one_hot(record: dict[Any, Any], columns: tuple[str, ...], where: str) -> list[str]:
    """The names of columns that are 1, where all are 0 or 1 (as in Roboflow's _classes.csv)."""
    found = _Names()
    for column in columns:
        text = str(record[column] if record[column] is not None else "").strip().casefold()
        if column_key(column) in INDEX_COLUMNS:
            continue
        if text not in ("0", "1", "0.0", "1.0", "true", "false"):
            what = f"no column of labels, and '{column.strip()}' is {text[:40]!r}, neither 0 nor 1"
            way = "the header must name the columns path and label, or have a column a class"
            raise UserError(f"{where}: {what}; {way}")
        if text in ("1", "1.0", "true"):
            found.append(column.strip())
    return found


def is_coco(value: Any) -> bool:
    """Whether a JSON value is laid out as COCO has it."""
    return isinstance(value, dict) and {"images", "annotations", "categories"} <= value.keys()


def coco(value: dict[str, Any], file: Path) -> Iterator[Labelled]:
    """Each image with the categories of its annotations, in their order, each once."""
    with refusing(f"{file} is no COCO listing", "export it anew", *_DAMAGED):
        names = {entry["id"]: str(entry["name"]) for entry in value["categories"]}
        found: dict[Any, dict[str, None]] = {image["id"]: {} for image in value["images"]}
        for annotation in value["annotations"]:
            found[annotation["image_id"]][names[annotation["category_id"]]] = None
        images = [(image["file_name"], found[image["id"]]) for image in value["images"]]
    for number, (path, classes) in enumerate(images):
        yield f"{file}, image {number}", path, _Names(classes)


def is_label_studio(value: Any) -> bool:
    """Whether a JSON value is Label Studio's list of tasks."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and "data" in first and "annotations" in first


def label_studio(value: list[Any], file: Path) -> Iterator[Labelled]:
    """Each task's image with its choices; those that annotators took back do not count."""
    for number, task in enumerate(value):
        where, chosen = f"{file}, task {number}", _Names()
        with refusing(f"{where} is damaged", "export it anew", *_DAMAGED):
            given = task["data"]
            key = first_of(("image", "img", "photo", *given), given)
            path = given[key or "image"]
            for annotation in task["annotations"]:
                if not annotation.get("was_cancelled"):
                    for result in annotation["result"]:
                        chosen += map(str, result.get("value", {}).get("choices", ()))
        yield where, path, chosen
