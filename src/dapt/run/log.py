"""log.csv, a row a step, and the same for TensorBoard where that is installed."""

from __future__ import annotations

import csv
import io
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from dapt.errors import UserError
from dapt.safe.files import read_text, write_atomic

# What TensorBoard's files begin with.
EVENTS = "events.out.tfevents"


class StepLog:
    """Both logs of a run.

    Args:
        file: log.csv.
        board: the folder of TensorBoard's files.
        header: names of the columns: step, epoch, lr and so on.
        steps: rows to keep of an earlier log when a run resumes; later ones are dropped.

    Attributes:
        kept: those rows.
    """

    def __init__(self, file: Path, board: Path, header: list[str], steps: int) -> None:
        kept = [header]
        if steps and file.is_file():
            kept = _rows(file, header, steps)
        self.kept = [[float(value) for value in row] for row in kept[1:]]
        write_atomic(file, as_csv(kept))
        self._file = file.open("a", newline="", encoding="utf-8")
        self._csv = csv.writer(self._file, lineterminator="\n")
        self._header = header
        self._board = _Board.open(board, steps)

    def add(self, row: list[float]) -> None:
        """Append one step: step, epoch, lr, loss, cross-entropy, terms, accuracy."""
        self._csv.writerow(row)
        if self._board is not None:
            self._board.add(int(row[0]), dict(zip(self._header[2:], row[2:], strict=True)))

    def flush(self) -> None:
        """Put everything so far on disk, before a checkpoint counts on it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Flush and close."""
        try:
            self._file.close()
        finally:
            if self._board is not None:
                self._board.close()


class _Board:
    """Scalars in TensorBoard's format.

    TensorBoard's own writers write in a thread, whose death of a full disk nobody is told of.
    """

    def __init__(self, file: BinaryIO, event: type[Any], record: Callable[[bytes], None]) -> None:
        self.file, self._event, self._record = file, event, record

    @classmethod
    def open(cls, folder: Path, steps: int) -> _Board | None:
        """A new file of events after so many steps, or None where TensorBoard is not installed."""
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            return None
        if folder.is_symlink():
            raise UserError(f"{folder} is a link, which may lead anywhere; delete it")
        folder.mkdir(exist_ok=True)
        name = f"{EVENTS}.{time.time():.6f}.{platform.node()}.{os.getpid()}"
        file = (folder / name).open("xb")
        board = cls(file, Event, RecordWriter(file).write)
        board._put(file_version="brain.Event:2")
        # TensorBoard leaves out what an earlier file has from this step on.
        board._put(step=steps, session_log=SessionLog(status=SessionLog.START))
        return board

    def add(self, step: int, values: dict[str, float]) -> None:
        found = [{"tag": f"train/{name}", "simple_value": v} for name, v in values.items()]
        self._put(step=step, summary={"value": found})

    def _put(self, **fields: Any) -> None:
        self._record(self._event(wall_time=time.time(), **fields).SerializeToString())

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _rows(log: Path, header: list[str], steps: int) -> list[list[str]]:
    """A log's header and first rows; what a killed run wrote after them may end anywhere.

    Raises:
        UserError: they are none, or not under this header.
    """
    try:
        rows = list(islice(csv.reader(io.StringIO(read_text(log))), steps + 1))
        if rows[:1] != [header] or any(len(row) != len(header) for row in rows):
            raise ValueError("its columns are not those of this run")
        for row in rows[1:]:
            [float(value) for value in row]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{log} is damaged ({error}); delete it, and the run goes on") from error
    return rows


def as_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as the text of a log."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
