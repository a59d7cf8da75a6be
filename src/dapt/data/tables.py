"""Tables of images, as people and tools write them: CSV, JSON lines, JSON, parquet.

A table becomes lines (an image's path, its classes, its part), and lines become rows of a task.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from posixpath import normpath
from typing import Any, NamedTuple
from urllib.parse import unquote

from dapt.data import items
from dapt.data.exports import classes_in_cell, coco, is_coco, is_label_studio, label_studio, one_hot
from dapt.data.items import PARTS, check_path, make_task, refusing, subfolders
from dapt.data.left_out import LeftOut
from dapt.data.spellings import (
    BOX_COLUMNS,
    LABEL_COLUMNS,
    PATH_COLUMNS,
    SPLIT_COLUMNS,
    column_key,
    is_service,
    plain_part,
)
from dapt.errors import UserError, install
from dapt.safe import files

_DELIMITERS = ",;\t"
_BOMS = (  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ENDINGS = ("", ".jpg", ".jpeg", ".png", ".JPG")  # what paths without one may lack
_SAMPLED = 8  # paths of a table that are looked for, to tell where its images lie
_HEADER = "the header must name the columns path and label"
_ABSOLUTE, _STEP = re.compile(r"[/\\]|[A-Za-z]:[/\\]"), re.compile("/+")
_LEADS_OUT = re.compile(r"(^|/)\.\.(/|$)")
# Where Label Studio serves an image from, and the mark that it puts before an upload's name.
_SERVED, _UPLOADED, _MARK = "/data/local-files/?d=", "/data/upload/", re.compile("^[0-9a-f]{8}-")


class Columns(NamedTuple):
    """Which keys of a record are meant; without a label, ``rest`` may be one column a class."""

    path: str | None
    label: str | None
    splits: tuple[str, ...]
    rest: tuple[str, ...]

    @property
    def label_each(self) -> bool:
        """Whether a label stands in a column of its own."""
        return self.path is not None and self.label is not None

    @property
    def one_hot(self) -> bool:
        """Whether every class may have a column."""
        return self.path is not None and self.label is None and len(self.rest) > 1


class Line(NamedTuple):
    """A line of a table, after where it is; classes is whatever stands for them there."""

    where: str
    path: Any
    classes: Any
    splits: dict[str, Any]
    box: bool = False  # whether it is of a box in the image, of which there may be more


def read_table(file: Path, split: items.Split, multi_label: bool | None = None) -> items.Task:
    """Read a table of images: their ``path`` from its folder, ``label`` and, for all, ``split``.

    Columns may have other usual names (`dapt.data.spellings`). Several labels of an image are a
    list, or stand in one cell with ``|`` between, or are given by an export, unless ``multi_label``
    is false; where none has several, images have one label each, unless it is true.
    """
    tables = [("", file)]
    return read_tables(file.stem, file.parent, tables, str(file), split, multi_label=multi_label)


def read_tables(
    name: str,
    root: Path,
    tables: Sequence[tuple[str, Path]],
    where: str,
    split: items.Split,
    *,
    notes: Sequence[str] = (),
    images: Iterable[str] = (),
    multi_label: bool | None = None,
) -> items.Task:
    """Read tables that each are of a part, or of all (""); none may name some of the ``images``."""
    left, notes, rows = LeftOut(), [*notes], list[items.Row]()
    for part, file in tables:
        rows += _rows(file, root, part, left, notes, multi_label is not False)
    known = {normpath(path) for _, path, _ in rows} | {*left.found.get("no label", ())}
    left.add("no label", set(images) - known)
    if not rows:
        what = "gives no image a class" if left.found else "names no images"
        raise UserError(f"{where} {what}; add a line for each")
    several = sum(len(labels) > 1 or isinstance(labels, list) for *_, labels in rows)
    if not (several or multi_label):
        rows = [(part, path, label) for part, path, (label,) in rows]
    elif multi_label is None:
        what = f"{several:,} of {len(rows):,} images of {where} have several labels or a list"
        notes.append(f"{what}: classes do not exclude each other (multi_label=false: they do)")
    facts = left.facts(where, notes)
    return make_task(
        name, root, rows, where, split=split, multilabel=bool(several or multi_label), **facts
    )


def has_labels(file: Path) -> bool:
    """Whether a table says of images which class they have, as far as its first line tells."""
    try:
        return next(_lines_of(file, []), None) is not None
    except UserError:
        return False


def _rows(
    file: Path, root: Path, part: str, left: LeftOut, notes: list[str], several: bool
) -> list[items.Row]:
    """The rows of one table, whose paths are below its own folder, with all labels of each.

    Where an image may have ``several``, a row's labels are a list if they were one in the table.
    """
    found, unlabelled = list[tuple[Line, str, Sequence[str]]](), list[str]()
    seen = dict[str, int]()  # where among those found a path is
    lines = [*_lines_of(file, notes)]
    base = _foreign_base(lines, file, notes)
    for line in lines:
        classes = classes_in_cell(line.classes, several)
        good = isinstance(line.path, str) and line.path and classes is not None
        if not good or any(not name.strip() for name in classes or ()):
            raise UserError(f"{line.where}: needs a path and a label, both text")
        path = _below(line.path.strip().removeprefix(base), file.parent, line.where)
        if not classes:
            unlabelled.append(path)
            continue
        labels: Sequence[str] = tuple(dict.fromkeys(name.strip() for name in classes))
        place = seen.setdefault(path, len(found))
        if place == len(found):
            found.append((line, path, [*labels] if type(line.classes) is list else labels))
        elif line.box:  # another of what is seen in an image
            labels = tuple(dict.fromkeys((*found[place][2], *labels)))
            found[place] = (*found[place][:2], labels)
        else:
            on = found[place][0].where.rpartition(", ")[2]
            raise UserError(f"{line.where}: {path} is on {on} already; take one out")
        if len(labels) > 1 and not several:
            what = f"the image has {len(labels)} classes, {', '.join(labels)}"
            raise UserError(f"{line.where}: {what[:200]}; give it one, or take it out")
    parts = [part] * len(found) if part else _parts([line for line, *_ in found], notes)
    inside = file.parent.relative_to(root).as_posix()
    before, after = _place([path for _, path, _ in found] or unlabelled, file, notes)
    before = before if inside == "." else f"{inside}/{before}"
    left.add("no label", (normpath(f"{before}{path}{after}") for path in unlabelled))
    both = zip(parts, found, strict=True)
    return [(p, f"{before}{path}{after}", labels) for p, (_, path, labels) in both]


def _parts(lines: list[Line], notes: list[str]) -> list[str]:
    """Each line's part: of the column split, or another whose values all are parts."""
    for column in lines[0].splits if lines else ():
        parts = _parts_in(column, lines)
        if any(parts):
            if column_key(column) != "split":
                notes.append(f"column '{column}' is taken for the split into train, val and test")
            return parts
    heads = {head for line in lines for head, *more in [re.split(r"[/\\]", line.path)] if more}
    if len({plain_part(head) for head in heads} - {""}) > 1:
        named = f"paths begin with {'/, '.join(sorted(heads)[:4])}/, but no column 'split' says so"
        notes.append(f"{named}: images are split anew; add the column if that is not meant")
    return [""] * len(lines)


def _parts_in(column: str, lines: list[Line]) -> list[str]:
    """The parts that a column names; none at all if it is of something else."""
    strict, parts = column_key(column) == "split", list[str]()
    for line in lines:
        value = line.splits.get(column)
        text = value.strip() if isinstance(value, str) else ""
        part = text if text in PARTS else plain_part(text)
        if not part and not strict:
            return []
        if not isinstance(value, str | None):
            raise UserError(f"{line.where}: split must be train, val or test")
        if text and not part:
            raise UserError(f"{line.where}: split '{text}' is none of train, val, test")
        parts.append(part)
        if bool(part) != bool(parts[0]):
            raise UserError(f"{line.where}: either every line has a split, or none")
    return parts


# -- where images lie ------------------------------------------------------------------------


def _below(text: str, folder: Path, where: str) -> str:
    """A path as it stands in a table, from the table's folder and with forward slashes."""
    if text.startswith(_SERVED):
        text = unquote(text.removeprefix(_SERVED))
    elif text.startswith(_UPLOADED):
        text = _uploaded(text, folder)
    for base in (folder.absolute(), folder.resolve()):
        if Path(text).is_absolute() and Path(text).is_relative_to(base):
            text = Path(text).relative_to(base).as_posix()
    check_path(text, where)
    # A backslash may be part of a name here, but hardly ever is.
    if "\\" in text and not os.path.exists(folder / text):
        return check_path(text.replace("\\", "/"), where)
    return text


def _foreign_base(lines: list[Line], file: Path, notes: list[str]) -> str:
    """The folder of another machine that the first absolute path has before what is here, or ""."""
    folder, paths = file.parent, (line.path.strip() for line in lines if isinstance(line.path, str))
    served = (_SERVED, _UPLOADED)
    first = next((p for p in paths if _ABSOLUTE.match(p) and not p.startswith(served)), "")
    plain = first.replace("\\", "/")
    own = any(Path(first).is_relative_to(base) for base in (folder.absolute(), folder.resolve()))
    for mark in () if own or _LEADS_OUT.search(plain) else _STEP.finditer(plain):
        if (rest := plain[mark.end() :]) and os.path.exists(folder / rest):
            what = f"{file} has absolute paths, which are taken from its own folder"
            notes.append(f"{what} instead ({first} as {rest})")
            return first[: mark.end()]
    return ""


def _uploaded(text: str, folder: Path) -> str:
    """What an upload to Label Studio is called below a folder: there may be a mark before it."""
    inside = check_path(text.removeprefix("/data/"), text)
    name = inside.rpartition("/")[2]
    for path in (inside, inside.removeprefix("upload/"), name):
        for place in (folder, *(folder / beside for beside in subfolders(folder))):
            if os.path.exists(place / path):
                return (place / path).relative_to(folder).as_posix()
    return _MARK.sub("", name)


def _place(paths: list[str], file: Path, notes: list[str]) -> tuple[str, str]:
    """What stands before and after all paths of a table, if its images lie in a folder beside it.

    Only where none of the first is found as it stands, and they are in one folder alone, or in that
    called like the table (of another name, train).
    """
    folder, sample = file.parent, paths[:_SAMPLED]
    if not sample or any(os.path.exists(folder / path) for path in sample):
        return "", ""
    beside = [name for name in subfolders(folder) if not is_service(name, within=False)]
    found = [
        (before, after)
        for before in ("", *(f"{name}/" for name in beside))
        for after in _ENDINGS
        if any(os.path.exists(folder / f"{before}{path}{after}") for path in sample)
    ]
    own = plain_part(file.stem) or "train"
    named = [b for b in found if b[0][:-1] == file.stem or plain_part(b[0][:-1]) == own]
    if len(found) != 1 and len(named) != 1:
        return "", ""
    before, after = found[0] if len(found) == 1 else named[0]
    what = f"the images of {file} are taken from {folder / before}"
    notes.append(f"{what}, called {sample[0]}{after} and so on")
    return before, after


# -- how tables are written ------------------------------------------------------------------


@cache
def columns_of(keys: tuple[str, ...]) -> Columns:
    """Which of a table's columns are meant."""
    there = {column_key(key): key for key in reversed(keys)} | {k: k for k in keys}
    path = next((there[name] for name in PATH_COLUMNS if name in there), None)
    label = next((there[name] for name in LABEL_COLUMNS if name in there), None)
    splits = [there[name] for name in SPLIT_COLUMNS if name in there and there[name] != label]
    return Columns(path, label, tuple(splits), tuple(k for k in keys if k != path))


def _lines_of(file: Path, notes: list[str]) -> Iterator[Line]:
    """The lines of a table of any kind, or of an export."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _as_lines(_parquet(file))
    text = _text(file, notes)
    if suffix == ".jsonl":
        return _as_lines(_json_lines(file, text))
    if suffix == ".json":
        with refusing(f"{file} is not readable JSON", "mend it", ValueError, RecursionError):
            value = files.parse_json(text)
        if is_coco(value):
            return (Line(*found, {}) for found in coco(value, file))
        if is_label_studio(value):
            return (Line(*found, {}) for found in label_studio(value, file))
        if not isinstance(value, list):
            what = "a list of objects with path and label, or a COCO or Label Studio export"
            raise UserError(f"{file} must hold {what}")
        return _as_lines((f"{file}, entry {number}", entry) for number, entry in enumerate(value))
    return _as_lines(_csv(file, text))


def _as_lines(records: Iterator[tuple[str, Any]]) -> Iterator[Line]:
    for where, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{where}: must be an object with path and label")
        columns = columns_of(tuple(key for key in record if isinstance(key, str)))
        splits = {column: record.get(column) for column in columns.splits}
        path = record.get(columns.path or "")
        if columns.one_hot:
            yield Line(where, path, one_hot(record, columns.rest, where), splits)
        else:
            label = record.get(columns.label or "")
            yield Line(where, path, label, splits, not BOX_COLUMNS.isdisjoint(columns.rest))


def text_lines(text: str, file: Path) -> Iterator[tuple[str, str]]:
    """A text file's lines that are not blank, each after where it is."""
    if not text.strip():
        raise UserError(f"{file} is empty and names no images; put the whole one there")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{file}, line {number}", line.strip()


def _json_lines(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    for where, line in text_lines(text, file):
        with refusing(f"{where}: malformed JSON", "mend it", ValueError, RecursionError):
            record = files.parse_json(line)
        yield where, record


def _text(file: Path, notes: list[str]) -> str:
    """A table's text: UTF-8, or UTF-16 and 32 by their marks or zeros, or else Windows-1252."""
    with refusing(f"{file} cannot be read", "save it as UTF-8 text"):
        with files.open_regular(file, files.LARGEST_TEXT) as opened:
            data = opened.read(files.LARGEST_TEXT + 1)
        for mark, encoding in _BOMS:
            if data.startswith(mark):
                return data.decode(encoding).removeprefix("\ufeff")
        zeros = [byte == 0 for byte in data[:4]]
        for pattern, encoding in (("0101", "utf-16-le"), ("1010", "utf-16-be")):
            if zeros == [digit == "1" for digit in pattern]:
                return data.decode(encoding)
        try:
            return data.decode()
        except UnicodeDecodeError:
            if b"\0" in data:
                raise
            text = data.decode("cp1252")
    hint = "save it as UTF-8 if names look wrong"
    notes.append(f"{file} is no UTF-8 and is read as Windows-1252 (cp1252); {hint}")
    return text


def _csv(file: Path, text: str) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The rows of a CSV file, whatever its delimiter is."""
    skipped, delimiters = 0, _DELIMITERS
    if said := re.match(r"sep=(.)\r?\n", text):  # as Excel has it
        skipped, delimiters, text = 1, said[1], text[said.end() :]

    def reader_by(delimiter: str) -> csv.DictReader[str]:
        lines = io.StringIO(text, newline="")
        return csv.DictReader(lines, strict=True, delimiter=delimiter)

    reader = reader_by(delimiters[0])
    try:
        tried = [reader_by(delimiter) for delimiter in delimiters]
        found = [columns_of(tuple(one.fieldnames or ())) for one in tried]
        kinds = ([c.label_each for c in found], [c.one_hot for c in found])
        if (kind := next(filter(any, kinds), None)) is None:
            names = ",".join(reader.fieldnames or [])[:80]
            raise UserError(f"{file}, line 1: {_HEADER}, not {names!r}")
        reader = tried[kind.index(True)]
        width = len(reader.fieldnames or ())
        for record in reader:
            where = f"{file}, line {reader.line_num + skipped}"
            over = record.pop(None, None) or []
            if any(value.strip() for value in over):
                what = f"{width + len(over)} fields, where the header names {width}"
                hint = f"put a value with a {reader.reader.dialect.delimiter!r} in it in quotes"
                raise UserError(f"{where}: {what} ({','.join(over)[:80]!r} is too much); {hint}")
            if any(value and value.strip() for value in record.values()):
                yield where, record
    except csv.Error as error:
        line = reader.line_num + skipped
        raise UserError(f"{file}, line {line}: malformed CSV ({error})") from error


def _parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a parquet file, of the columns that are meant."""
    with refusing(f"{file} is parquet", install("sources"), ImportError):
        from pyarrow import parquet, types
    # Arrow's errors are a wide family.
    with refusing(f"{file} cannot be read", "write it anew", Exception):
        opened = parquet.ParquetFile(files.open_regular(file))
        schema = opened.schema_arrow
        columns = columns_of(tuple(schema.names))
        if not (columns.label_each or columns.one_hot):
            raise UserError(f"{file}: {_HEADER}, not {','.join(schema.names)[:80]!r}")
        if types.is_struct(schema.field(columns.path).type):
            way = "load it with Hugging Face's datasets and give what save_to_disk writes"
            raise UserError(f"{file}: column '{columns.path}' holds images, not paths; {way}")
        label = (columns.label,) if columns.label else columns.rest
        number, wanted = 0, [*dict.fromkeys((columns.path, *label, *columns.splits))]
        for batch in opened.iter_batches(columns=wanted):
            for record in batch.to_pylist():
                yield f"{file}, row {number}", record
                number += 1
