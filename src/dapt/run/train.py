"""From settings to a finished run directory: `fit`, kept on disk, and resumed from there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from dapt.clip.backbone import Backbone
from dapt.data import support_digest
from dapt.engine.data import Data, open_data, tell_of_overlap
from dapt.engine.evaluate import dispersion, evaluate_task
from dapt.engine.features import Shared, backbone_of
from dapt.engine.fit import Journal, Tuned, fit
from dapt.engine.processes import join_processes
from dapt.engine.step import StepResult
from dapt.errors import UserError
from dapt.progress import Reporter
from dapt.run.directory import RunDirectory, task_record, tensors_as_bytes
from dapt.run.environment import environment
from dapt.run.log import StepLog, as_csv
from dapt.safe.files import to_json
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
        output: the run directory.
        resume: continue a run that was stopped; a finished one is left as it is.
        overwrite: discard the run that is there.
        reporter: is told the progress.
        shared: a loaded backbone, as the settings say, and what earlier runs read with it.
        data: already opened as the settings say.

    Raises:
        UserError: bad input, or a directory that is in use or holds another run.
        Interrupted: the process got SIGINT or SIGTERM; ``resume`` continues.

    Of several processes that ``torchrun`` started, all tune and the first keeps the directory:
    in the others the run may not be finished when this returns.
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
        journal = RunJournal(run, settings, reporter, stack, resume=resume, overwrite=overwrite)
        try:
            tuned = fit(data, settings, shared=shared, journal=journal, reporter=reporter)
        except _Finished:
            return run
        if processes.first:
            _finish(run, tuned, shared, journal.twice, reporter)
    return run


class _Finished(Exception):
    """Another process has finished the run meanwhile."""


class RunJournal(Journal):
    """The progress of tuning, kept in a run directory, which is held until ``stack`` ends.

    Attributes:
        twice: support images that are tested on too.
    """

    def __init__(
        self,
        run: RunDirectory,
        settings: Settings,
        reporter: Reporter,
        stack: ExitStack,
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        super().__init__()
        self.run, self.settings, self.reporter, self.stack = run, settings, reporter, stack
        self.resume, self.overwrite = resume, overwrite
        self.twice: list[dict[str, str]] = []
        self.log: StepLog | None = None

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
        """Open the log; rows of steps that no checkpoint has are dropped."""
        super().open(terms, steps)
        self.log = StepLog(self.run.log_file, self.run.tensorboard, self.header, steps)
        self.rows = self.log.kept

    def add(self, step: int, epoch: int, lr: float, result: StepResult) -> None:
        """A row of the log."""
        super().add(step, epoch, lr, result)
        if self.log is not None:
            self.log.add(self.rows[-1])

    def save(self, state: dict[str, Tensor], step: int, seconds: float) -> None:
        """Write a checkpoint, the log's rows before it."""
        if self.log is not None:
            self.log.flush()
        self.run.write_checkpoint(state, step, seconds)

    def close(self) -> None:
        """Close the log."""
        if self.log is not None:
            self.log.close()

    def after_divergence(self, steps: int) -> str:
        """Where the last good checkpoint is."""
        kept = f"the checkpoint after {steps} steps is" if steps else "no checkpoint was"
        return f" ({kept} kept in {self.run.path}); train again with --overwrite"


def _finish(
    run: RunDirectory,
    tuned: Tuned,
    shared: Shared,
    twice: list[dict[str, str]],
    reporter: Reporter,
) -> None:
    """Write the result, evaluate it, and write the metrics."""
    settings, task, classifier = tuned.settings, tuned.data.task, tuned.classifier
    run.write_tensors(run.prompts_file, classifier.tensors())
    started = time.perf_counter()
    try:
        test = evaluate_task(classifier, task, settings, reporter, shared)
    except UserError as error:
        raise UserError(
            f"{error} (the tuned prompts are kept: dapt train --output {run.path} --resume)"
        ) from error
    spread = dispersion(tuned)
    run.add_to_environment(
        tuning_seconds=round(tuned.seconds, 2),
        evaluation_seconds=round(time.perf_counter() - started, 2),
    )
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
            "also_tested": twice,
            "rose": tuned.rose,
            "dispersion": spread,
            "test": test,
        }
    )


def files_of(tuned: Tuned, journal: Journal, **more: Any) -> dict[str, bytes]:
    """The files of a run that was tuned in memory and not evaluated, by name.

    Args:
        tuned, journal: what came of it, and how.
        more: further entries of environment.json.
    """
    settings, backbone = tuned.settings, tuned.classifier.backbone
    made = environment(backbone, settings.seed)
    records = {
        "settings.json": settings.model_dump(),
        "task.json": task_record(tuned.data.task),
        "support_set.json": tuned.data.support.to_json(),
        "environment.json": {**made, "tuning_seconds": round(tuned.seconds, 2), **more},
    }
    files = {name: to_json(value, indent=1) + b"\n" for name, value in records.items()}
    if journal.rows:
        files["log.csv"] = as_csv([journal.header, *journal.rows]).encode()
    files["prompts.safetensors"] = tensors_as_bytes(tuned.classifier.tensors())
    return files


def check_output(run: RunDirectory, settings: Settings, *, resume: bool, overwrite: bool) -> None:
    """Refuse a directory that holds another run, unless told to resume or to overwrite it.

    Raises:
        UserError: what is there, and which option says what to do with it.
    """
    if resume and overwrite:
        raise UserError("--resume continues a run and --overwrite discards it; give one of them")
    if not run.exists:
        if run.path.exists() and not run.path.is_dir():
            raise UserError(f"--output {run.path} is a file; give a directory")
        if not overwrite:
            run.require_own()
        return
    if overwrite:
        return
    if not resume:
        state, way = (
            ("holds a finished run", "--overwrite")
            if run.finished
            else ("holds an unfinished run", "--resume")
        )
        raise UserError(f"{run.path} {state}; add {way}, or choose another --output")
    kept = run.read_settings()
    for name, value in settings.model_dump().items():
        if name not in FREE_ON_RESUME and (old := getattr(kept, name)) != value:
            raise UserError(
                f"cannot resume {run.path} with {name}={value}: it was started with {name}={old}; "
                "leave the setting out, or choose another --output"
            )
