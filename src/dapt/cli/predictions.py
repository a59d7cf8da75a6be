"""Predictions as text, line by line as they come: to read, JSON, CSV, or a table at the end.

Each form is a function of predictions, the number of classes that are named for an image, and the
least probability of the best one for the image not to be called unknown, if there is one.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table

from dapt.errors import printable
from dapt.progress import cell, console

if TYPE_CHECKING:  # it brings torch along, which --help should not wait for
    from dapt.predict import Prediction


def _lines(found: Iterable[Prediction], _top: int, unknown: float | None) -> Iterator[str]:
    """``path: class 90.0%, class 5.0%``, an image a line."""
    for one in found:
        ranked = ", ".join(f"{name} {p:.1%}" for name, p in one.classes)
        yield printable(f"{_path(one)}: {_marked(ranked, one, unknown)}")


def _json(found: Iterable[Prediction], _top: int, unknown: float | None) -> Iterator[str]:
    """``{"path", "classes": [{"class", "probability"}], "unknown"}``; the last with a threshold."""
    for one in found:
        ranked = [{"class": name, "probability": p} for name, p in one.classes]
        value: dict[str, Any] = {"path": _path(one), "classes": ranked}
        if unknown is not None:
            value["unknown"] = _is_unknown(one, unknown)
        yield json.dumps(value, ensure_ascii=False)


def _csv(found: Iterable[Prediction], top: int, unknown: float | None) -> Iterator[str]:
    """Columns path, class, probability (class_2, probability_2, ...), unknown."""
    places = ("", *(f"_{place}" for place in range(2, top + 1)))
    columns = [f"{name}{place}" for place in places for name in ("class", "probability")]
    yield _row("path", *columns, *["unknown"] * (unknown is not None))
    for one in found:
        cells = [text for name, p in one.classes for text in (name, f"{p:.6f}")]
        if unknown is not None:
            cells.append(str(_is_unknown(one, unknown)).lower())
        yield _row(_path(one), *cells)


def _row(*cells: str) -> str:
    text = io.StringIO()
    csv.writer(text).writerow(cells)  # its line end is what makes it quote those in a name
    return text.getvalue().removesuffix("\r\n")


def _table(found: Iterable[Prediction], top: int, unknown: float | None) -> Iterator[str]:
    """A table, once all images are there."""
    table = Table(Column("image", overflow="fold"))
    for place in range(top):
        table.add_column("class" if place == 0 else f"{place + 1}.")
        table.add_column("", justify="right")
    for one in found:
        cells = [text for name, p in one.classes for text in (name, f"{p:.1%}")]
        cells[0] = _marked(cells[0], one, unknown)
        table.add_row(*map(cell, (_path(one), *cells)))
    with console.capture() as captured:
        console.print(table)
    yield captured.get().removesuffix("\n")


FORMS = {"lines": _lines, "json": _json, "csv": _csv, "table": _table}


def _is_unknown(one: Prediction, unknown: float | None) -> bool:
    return unknown is not None and one.classes[0][1] < unknown


def _marked(text: str, one: Prediction, unknown: float | None) -> str:
    return f"unknown ({text})" if _is_unknown(one, unknown) else text


def _path(one: Prediction) -> str:
    """As text that any output takes: bytes that are no UTF-8 are replaced."""
    return os.fsencode(one.path).decode("utf-8", "replace")
