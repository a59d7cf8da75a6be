"""From settings to a finished run directory: `fit`, kept on disk, and resumed from there."""

from __future__ import annotations

import csv
import io
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from dapt.clip.backbone import Backbone
from dapt.data import support_digest
from dapt.data.items import refusing
from dapt.engine.data import Data, open_data, tell_of_overlap
from dapt.engine.evaluate import dispersion, evaluate_task
from dapt.engine.features import Shared, backbone_of
from dapt.engine.fit import Journal, Tuned, fit
from dapt.engine.processes import join_processes
from dapt.engine.step import StepResult
from dapt.errors import UserError
from dapt.progress import Reporter
from dapt.run.directory import EVENTS, RunDirectory, tensors_as_bytes
from dapt.run.records import environment, task_record
from dapt.safe.files import read_text, to_json, write_atomic
from dapt.settings import Settings

# Settings that decide what a run costs, not what it finds: they may change when it resumes.
FREE_ON_RESUME = frozenset({"memory_budget", "checkpoint_every", "strict"})


def train(
    settings: Settings,
    output: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    shared: Shared | None = None,
    data: Data | None = None,
) -> RunDirectory:
    """Tune a classifier on a support set, evaluate it, and leave a run directory.

    Args:
        settings: from `make_settings`.
        resume: continue a run that was stopped; a finished one is left as it is.
        overwrite: discard the run that is there.
        shared: a loaded backbone, as the settings say, and what earlier runs read with it.
        data: already opened as the settings say.

    Raises:
        UserError: bad input, or a directory that is in use or holds another run.
        Interrupted: the process got SIGINT or SIGTERM; ``resume`` continues.

    Of several processes that ``torchrun`` started, the first keeps the directory: in the others
    the run may not be finished when this returns.
    """
    reporter, run = reporter or Reporter(), RunDirectory(output)
    processes = join_processes()
    if processes.first:
        check_output(run, settings, resume=resume, overwrite=overwrite)
    if processes.share(run.finished and resume):
        return run
    # Everything that can be wrong with the input is found before anything is written.
    data = data or open_data(settings)
    shared = shared or Shared(backbone_of(settings, device=processes.device(settings.device)))
    with ExitStack() as stack:
        journal = RunJournal(
            run=run, settings=settings, reporter=reporter, stack=stack, resume=resume,
            overwrite=overwrite,
        )  # fmt: skip
        try:
            tuned = fit(data, settings, shared=shared, journal=journal, reporter=reporter)
        except _Finished:
            return run
        if processes.first:
            _finish(tuned, shared, journal)
    return run


class _Finished(Exception):
    """Another process has finished the run meanwhile."""


@dataclass(kw_only=True)
class RunJournal(Journal):
    """The progress of tuning, kept in a run directory, which is held until ``stack`` ends.

    In log.csv is a row a step, in tensorboard/ the same, where TensorBoard is installed.
    """

    run: RunDirectory
    settings: Settings
    reporter: Reporter
    stack: ExitStack
    resume: bool
    overwrite: bool
    twice: list[dict[str, str]] = field(init=False)  # support images that are tested on too

    def begin(self, data: Data, backbone: Backbone) -> None:
        """Take the directory, and begin the run there or find what it was begun with."""
        self.twice = tell_of_overlap(data, data.task, self.reporter)
        self.stack.enter_context(self.run.locked())
        check_output(self.run, self.settings, resume=self.resume, overwrite=self.overwrite)
        if self.run.finished and self.resume and join_processes().alone:
            raise _Finished
        if not (self.run.exists and self.resume):
            self.run.begin(self.settings, data.task, data.support, backbone)
        elif (changed := self.run.resume(data.task, data.support, backbone)) is not None:
            self.reporter.warn(f"{changed}: the last bits of the result may be others for it")

    def checkpoint(self) -> tuple[dict[str, Tensor], int, float] | None:
        """The run's."""
        return self.run.read_checkpoint()

    def open(self, terms: Sequence[str], steps: int) -> None:
        """Open the logs; rows of steps that no checkpoint has are dropped."""
        super().open(terms, steps)
        log, kept = self.run.log_file, [self.header]
        what, hint = f"{log} is damaged", "delete it, and the run goes on"
        if steps and log.is_file():
            with refusing(what, hint, OSError, ValueError, csv.Error):
                # What a killed run wrote after these rows may end anywhere.
                kept = list(islice(csv.reader(io.StringIO(read_text(log))), steps + 1))
                if kept[:1] != [self.header] or any(len(row) != len(kept[0]) for row in kept):
                    raise ValueError("its columns are not those of this run")
                self.rows = [[float(value) for value in row] for row in kept[1:]]
        write_atomic(log, as_csv(kept))
        file = self.stack.enter_context(log.open("a", newline="", encoding="utf-8"))
        self._files: list[IO[Any]] = [file]
        self._csv = csv.writer(file, lineterminator="\n")
        self._board = self._open_board(steps)

    def _open_board(self, steps: int) -> Callable[..., None] | None:
        """What writes an event, or None where TensorBoard is not installed.

        TensorBoard's own writers write in a thread, whose death of a full disk nobody is told of.
        """
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            return None
        if (folder := self.run.tensorboard).is_symlink():
            raise UserError(f"{folder} is a link, which may lead anywhere; delete it")
        folder.mkdir(exist_ok=True)
        name = f"{EVENTS}.{time.time():.6f}.{platform.node()}.{os.getpid()}"
        file = self.stack.enter_context((folder / name).open("xb"))
        self._files.append(file)
        record = RecordWriter(file)

        def put(**fields: Any) -> None:
            record.write(Event(wall_time=time.time(), **fields).SerializeToString())

        put(file_version="brain.Event:2")
        # TensorBoard leaves out what an earlier file has from this step on.
        put(step=steps, session_log=SessionLog(status=SessionLog.START))
        return put

    def add(self, step: int, epoch: int, lr: float, result: StepResult) -> None:
        """A row of the logs."""
        super().add(step, epoch, lr, result)
        self._csv.writerow(row := self.rows[-1])
        if self._board is not None:
            named = zip(self.header[2:], row[2:], strict=True)
            found = [{"tag": f"train/{name}", "simple_value": value} for name, value in named]
            self._board(step=step, summary={"value": found})

    def save(self, state: dict[str, Tensor], step: int, seconds: float) -> None:
        """Write a checkpoint, the log's rows before it."""
        for file in self._files:
            file.flush()
        os.fsync(self._files[0].fileno())
        self.run.write_checkpoint(state, step, seconds)

    def after_divergence(self, steps: int) -> str:
        """Where the last good checkpoint is."""
        kept = f"the checkpoint after {steps} steps is" if steps else "no checkpoint was"
        return f" ({kept} kept in {self.run.path}); train again with --overwrite"


def as_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as the text of a log."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _finish(tuned: Tuned, shared: Shared, journal: RunJournal) -> None:
    """Write the result, evaluate it, and write the metrics."""
    run, settings = journal.run, tuned.settings
    task, classifier = tuned.data.task, tuned.classifier
    run.write_tensors(run.prompts_file, classifier.tensors())
    started = time.perf_counter()
    try:
        test = evaluate_task(classifier, task, settings, journal.reporter, shared)
    except UserError as error:
        raise UserError(
            f"{error} (the tuned prompts are kept: dapt train --output {run.path} --resume)"
        ) from error
    spread, seconds = dispersion(tuned), time.perf_counter() - started
    spent = {"tuning_seconds": round(tuned.seconds, 2), "evaluation_seconds": round(seconds, 2)}
    run.add_to_environment(**spent)
    run.finish(
        {
            "method": settings.method,
            "dataset": task.name,
            "shots": settings.shots,
            "seed": settings.seed,
            "learned_parameters": classifier.learned_parameters,
            "support_images": len(tuned.support.store),
            "support_sha256": support_digest(task, tuned.data.support),
            "skipped": tuned.skipped,
            "also_tested": journal.twice,
            "rose": tuned.rose,
            "dispersion": spread,
            "test": test,
        }
    )


def files_of(tuned: Tuned, journal: Journal, **more: Any) -> dict[str, bytes]:
    """Files, by name, of a run tuned in memory; ``more`` are entries of environment.json."""
    made = environment(tuned.classifier.backbone, tuned.settings.seed)
    found = {
        "settings.json": tuned.settings.model_dump(),
        "task.json": task_record(tuned.data.task),
        "support_set.json": tuned.data.support.to_json(),
        "environment.json": {**made, "tuning_seconds": round(tuned.seconds, 2), **more},
    }
    files = {name: to_json(value, indent=1) + b"\n" for name, value in found.items()}
    if journal.rows:
        files["log.csv"] = as_csv([journal.header, *journal.rows]).encode()
    files["prompts.safetensors"] = tensors_as_bytes(tuned.classifier.tensors())
    return files


def check_output(
    run: RunDirectory,
    settings: Settings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Raise `UserError` of a directory with another run, unless to be resumed or overwritten.

    Without settings, it is not one that could be resumed.
    """
    if resume and overwrite:
        raise UserError("--resume continues a run and --overwrite discards it; give one of them")
    if run.path.exists() and not run.path.is_dir():
        raise UserError(f"--output {run.path} is a file; give a directory")
    if overwrite:
        return
    if not run.exists:
        run.require_own()
        return
    if not resume:
        way = "overwrite" if run.finished or settings is None else "resume"
        state = "a finished" if run.finished else "an unfinished"
        raise UserError(f"{run.path} holds {state} run; add --{way}, or choose another --output")
    kept = run.read_settings()
    for name, value in settings.model_dump().items() if settings else ():
        if name not in FREE_ON_RESUME and (old := getattr(kept, name)) != value:
            raise UserError(
                f"cannot resume {run.path} with {name}={value}: it was started with {name}={old}; "
                "leave the setting out, or choose another --output"
            )
