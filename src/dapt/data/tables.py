"""A task from a table of images: a .csv or .jsonl file with ``path``, ``label``, ``split``."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dapt.data.folders import split_by_class
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
from dapt.safe.files import parse_json, read_text

SUFFIXES = (".csv", ".jsonl")


def read_table(file: Path, test_fraction: float, split_seed: int) -> Listing:
    """Read a table: one image a row, its path relative to the file's folder.

    ``label`` is the class name; labels are numbered in sorted order. Where no row has a
    ``split`` (train, val or test), `split_by_class` splits. Other columns are ignored.

    Raises:
        UserError: naming the line that is malformed, or repeats an image.
    """
    rows = list(_rows_of_csv(file) if file.suffix.lower() == ".csv" else _rows_of_jsonl(file))
    if not rows:
        raise UserError(f"{file} names no images; add a line for each")
    seen: dict[str, int] = {}
    for line, path, _, split in rows:
        where = f"{file}, line {line}"
        check_path(path, where)
        if seen.setdefault(path, line) != line:
            raise UserError(f"{where}: {path} is on line {seen[path]} already; take one out")
        if split and split not in PARTS:
            raise UserError(f"{where}: split '{split}' is none of train, val, test")
        if bool(split) != bool(rows[0][3]):
            raise UserError(f"{where}: either every line has a split, or none")
    classes = label_order({label for _, _, label, _ in rows})
    number = {name: i for i, name in enumerate(classes)}
    if rows[0][3]:
        parts: dict[str, list[Pair]] = {part: [] for part in PARTS}
        for _, path, label, split in rows:
            parts[split].append((path, number[label]))
        listing = Listing(tuple(classes), **{part: tuple(p) for part, p in parts.items()})
    else:
        images = tuple((path, number[label]) for _, path, label, _ in rows)
        train, test = split_by_class(images, classes, test_fraction, split_seed)
        listing = Listing(tuple(classes), train=train, test=test)
    check_class_names(listing.class_names, str(file), distinct=False)
    check_listing(listing, str(file), tuned=test_fraction < 1)
    return listing


# line number, path, label, split or ""
_Row = tuple[int, str, str, str]


def _rows_of_csv(file: Path) -> Iterator[_Row]:
    try:
        with io.StringIO(read_text(file, encoding="utf-8-sig"), newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            columns = reader.fieldnames or []
            if not {"path", "label"} <= set(columns):
                raise UserError(
                    f"{file}, line 1: the header must name the columns path and label (and may "
                    f"name split), but is '{','.join(columns)[:80]}'"
                )
            for row in reader:
                yield _row(row, file, reader.line_num)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); save it as UTF-8 text") from error
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: malformed CSV ({error})") from error


def _rows_of_jsonl(file: Path) -> Iterator[_Row]:
    try:
        lines = read_text(file, encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); save it as UTF-8 text") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {number}: malformed JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(
                f'{file}, line {number}: must be an object such as {{"path": "a.jpg", '
                '"label": "cat"}'
            )
        yield _row(row, file, number)


def _row(row: dict[Any, Any], file: Path, line: int) -> _Row:
    path, label, split = row.get("path"), row.get("label"), row.get("split")
    if type(label) is int:  # JSON's 3 is the class "3", as it is in CSV
        label = str(label)
    if not (isinstance(path, str) and isinstance(label, str) and path and label.strip()):
        raise UserError(f"{file}, line {line}: needs a path and a label, both text")
    if not isinstance(split, str | None):
        raise UserError(f"{file}, line {line}: split must be train, val or test")
    return line, path.strip(), label.strip(), (split or "").strip()
