"""Predictions on standard output: lines to read, JSON lines, CSV, or a table."""

from __future__ import annotations

import csv
import io
import json
import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.table import Column, Table

from dapt.errors import printable
from dapt.progress import cell, console

if TYPE_CHECKING:  # it brings torch along, which --help should not wait for
    from dapt.predict import Prediction


class PredictionForm(str, Enum):
    """How predictions are printed."""

    lines = "lines"
    json = "json"
    csv = "csv"
    table = "table"


class Lines:
    """``path: class 90.0%, class 5.0%``, an image a line.

    Args:
        out: where to.
        top: classes an image.
        unknown: least probability of the best class for an image not to be called unknown.
    """

    def __init__(self, out: TextIO, top: int, unknown: float | None) -> None:
        self.out, self.top, self.unknown = out, top, unknown

    def is_unknown(self, prediction: Prediction) -> bool:
        """Whether the best class is too improbable."""
        return self.unknown is not None and prediction.classes[0][1] < self.unknown

    def add(self, prediction: Prediction) -> None:
        """Print one more."""
        ranked = ", ".join(f"{name} {p:.1%}" for name, p in prediction.classes)
        if self.is_unknown(prediction):
            ranked = f"unknown ({ranked})"
        self.write(printable(f"{_shown(prediction.path)}: {ranked}"))

    def write(self, line: str) -> None:
        """Print one line, at once."""
        self.out.write(line + "\n")
        self.out.flush()

    def close(self) -> None:
        """Print what is left."""


class JsonLines(Lines):
    """``{"path", "classes": [{"class", "probability"}], "unknown"}``; the last with a threshold."""

    def add(self, prediction: Prediction) -> None:
        """Print one more."""
        ranked = [{"class": name, "probability": p} for name, p in prediction.classes]
        value: dict[str, Any] = {"path": _shown(prediction.path), "classes": ranked}
        if self.unknown is not None:
            value["unknown"] = self.is_unknown(prediction)
        self.write(json.dumps(value, ensure_ascii=False))


class Csv(Lines):
    """Columns path, class, probability (class_2, probability_2, ...), unknown."""

    def __init__(self, out: TextIO, top: int, unknown: float | None) -> None:
        super().__init__(out, top, unknown)
        columns = ["path", "class", "probability"]
        for place in range(2, top + 1):
            columns += [f"class_{place}", f"probability_{place}"]
        self._row(columns + ["unknown"] * (unknown is not None))

    def add(self, prediction: Prediction) -> None:
        """Print one more."""
        cells: list[Any] = [_shown(prediction.path)]
        for name, probability in prediction.classes:
            cells += [name, f"{probability:.6f}"]
        if self.unknown is not None:
            cells.append(str(self.is_unknown(prediction)).lower())
        self._row(cells)

    def _row(self, cells: list[Any]) -> None:
        text = io.StringIO()
        csv.writer(text).writerow(cells)  # its line end is what makes it quote those in a name
        self.write(text.getvalue().removesuffix("\r\n"))


class Aligned(Lines):
    """A table, printed when all images are there."""

    def __init__(self, out: TextIO, top: int, unknown: float | None) -> None:
        super().__init__(out, top, unknown)
        self.table = Table(Column("image", overflow="fold"))
        for place in range(top):
            self.table.add_column("class" if place == 0 else f"{place + 1}.")
            self.table.add_column("", justify="right")

    def add(self, prediction: Prediction) -> None:
        """Keep one more."""
        cells = [_shown(prediction.path)]
        for name, probability in prediction.classes:
            cells += [name, f"{probability:.1%}"]
        if self.is_unknown(prediction):
            cells[1] = f"unknown ({cells[1]})"
        self.table.add_row(*(cell(text) for text in cells))

    def close(self) -> None:
        """Print the table."""
        console.print(self.table)


_PRINTERS = {
    PredictionForm.lines: Lines,
    PredictionForm.json: JsonLines,
    PredictionForm.csv: Csv,
    PredictionForm.table: Aligned,
}


def prediction_printer(form: PredictionForm, out: TextIO, top: int, unknown: float | None) -> Lines:
    """What prints predictions in a form; see `Lines` for the arguments."""
    return _PRINTERS[form](out, top, unknown)


def _shown(path: Path) -> str:
    """A path as text that any output takes: bytes that are no UTF-8 are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")
