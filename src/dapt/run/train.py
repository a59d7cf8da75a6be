"""From settings to a finished run directory: `fit`, kept on disk, and resumed from there.

And on from it: its prompts on another dataset, domain, or set of classes.
"""

from __future__ import annotations

import csv
import io
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from dapt.clip.backbone import Backbone
from dapt.clip.known import Each
from dapt.data import Task, content_digest, load_support_set, support_digest
from dapt.engine.cost import forget_peak, peak_memory, predict_seconds
from dapt.engine.data import Data, open_data, task_of, tell_notes, tell_of_overlap
from dapt.engine.effort import Search, named, seconds_of, summary
from dapt.engine.evaluate import dispersion, evaluate_task
from dapt.engine.features import Shared, backbone_of
from dapt.engine.fit import Journal, Tuned, fit, total_steps
from dapt.engine.forecast import Named, forecast, forecast_map
from dapt.engine.processes import join_processes
from dapt.engine.step import StepResult
from dapt.engine.suited import differing, nobody, suited
from dapt.errors import UserError, refusing
from dapt.progress import Reporter
from dapt.run.directory import EVENTS, RunDirectory, tensors_as_bytes
from dapt.run.load import load_classifier, unseen
from dapt.run.records import EvaluationRecord, as_file, made_of
from dapt.safe.files import file_digest, read_text, write_atomic, write_json
from dapt.settings import Settings

# Settings that decide what a run costs, not what it finds: they may change when it resumes.
FREE_ON_RESUME = frozenset({"memory_budget", "checkpoint_every", "strict", "recompute"})
# Seconds to wait for who else writes an evaluation into the run.
_PATIENCE = 10


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
    """Tune a classifier on a support set, evaluate it, and write a run directory.

    Args:
        resume: continue a run that was stopped; a finished run is left unchanged.
        overwrite: discard an existing run.
        shared: a backbone loaded with the same settings, and what earlier runs cached with it.
        data: data opened with the same settings.

    Raises:
        UserError: bad input, or the directory is in use or holds another run.
        Interrupted: the process got SIGINT or SIGTERM; ``resume`` continues.

    If ``torchrun`` started several processes, the first writes the directory; in the others,
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
    if shared is None:
        how: dict[str, Any] = {
            "device": processes.device(settings.device),
            "revision": pinned(run, resume),
        }
        shared = Shared(backbone_of(settings, **how))
    tell = reporter.warn if processes.first else nobody
    forget_peak(shared.backbone.device)
    used = suited(settings, data.task.class_names, shared.backbone, tell)
    with ExitStack() as stack:
        parts: dict[str, Any] = {"reporter": reporter, "stack": stack}
        may = {"resume": resume, "overwrite": overwrite}
        journal = RunJournal(run=run, settings=used, asked=settings, may=may, **parts)
        try:
            tuned = fit(data, used, shared=shared, journal=journal, reporter=reporter)
        except _Finished:
            return run
        if processes.first:
            _finish(tuned, shared, journal)
    return run


def pinned(run: RunDirectory, resume: bool) -> Each:
    """The commit of a hub's repository that a run is to go on with, if it is to."""
    return run.revision() if resume else None


class _Finished(Exception):
    """Another process has finished the run meanwhile."""


@dataclass(kw_only=True)
class RunJournal(Journal):
    """The progress of tuning, kept in a run directory, which is held until ``stack`` ends.

    In log.csv is a row a step, in tensorboard/ the same, where TensorBoard is installed.
    """

    run: RunDirectory
    settings: Settings
    asked: Settings  # what became `settings` on the backbone
    reporter: Reporter
    stack: ExitStack
    may: dict[str, Any]  # options of `check_output`
    twice: list[dict[str, str]] = field(init=False)  # support images that are tested on too
    search: Search | None = field(init=False)  # for the method, where there was one

    def begin(self, data: Data, backbone: Backbone) -> None:
        """Take the directory, and begin the run there or find what it was begun with."""
        self.twice = tell_of_overlap(data, data.task, self.reporter)
        self.stack.enter_context(self.run.locked())
        check_output(self.run, self.settings, **self.may)
        if self.run.finished and self.may["resume"] and join_processes().alone:
            raise _Finished
        self.search = searched(self.run, self.asked) if self.may["resume"] else None
        if not (self.run.exists and self.may["resume"]):
            seen: dict[str, Any] = (
                {"asked": other} if (other := differing(self.asked, self.settings)) else {}
            )
            seen["support_content_sha256"] = content_digest(data.task, data.support)
            files = made_of(self.settings, data.task, data.support, backbone, **seen)
            self.run.begin(files, searched=self.search is not None)
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
        return f" ({kept} kept in {self.run.path}); train again with `overwrite`"


def as_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as the text of a log."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _finish(tuned: Tuned, shared: Shared, journal: RunJournal) -> None:
    """Write the result, evaluate it, and write the metrics."""
    run, settings = journal.run, tuned.settings
    task, classifier = tuned.data.task, tuned.classifier
    write_atomic(run.prompts_file, tensors_as_bytes(classifier.tensors()))
    started = time.perf_counter()
    try:
        # Where all images were tuned on, none is left to say more than the forecast does.
        test = (
            evaluate_task(classifier, task, settings, journal.reporter, shared)
            if task.test
            else None
        )
    except UserError as error:
        way = f"dapt train --output {run.path} --resume"
        raise UserError(f"{error} (the tuned prompts are kept: {way})") from error
    spread, seconds = dispersion(tuned), time.perf_counter() - started
    spent: dict[str, Any] = {
        "tuning_seconds": round(tuned.seconds, 2),
        "evaluation_seconds": round(seconds, 2),
        "predict_seconds": predict_seconds(classifier),
        "peak_bytes": peak_memory(classifier.backbone.device),
    }
    if classifier.learned():
        steps = total_steps(settings, len(tuned.support.store))
        spent["step_seconds"] = tuned.seconds / steps
    more, folds = dict[str, Any](), None
    if (search := journal.search) is not None:
        spent["effort_seconds"], more["effort"] = seconds_of(search), summary(search)
        folds = named(search)
    run.add_to_environment(**spent)
    if task.left_out:
        more["left_out"] = dict(task.left_out)
    digest = support_digest(task, tuned.data.support)
    run.finish({**_metrics(tuned, spread, folds, digest, journal.twice), **more, "test": test})


def _metrics(
    tuned: Tuned,
    spread: dict[str, dict[str, float]],
    folds: Named | None = None,
    support_sha256: str | None = None,
    also_tested: list[dict[str, str]] | None = None,
) -> dict[str, Any]:
    """Entries of metrics.json, but for those of images that were not tuned on."""
    settings, made = tuned.settings, tuned.classifier
    expected = {"forecast": forecast(tuned, folds), "map_forecast": forecast_map(tuned)}
    return {
        "method": settings.method, "dataset": tuned.data.task.name, "shots": settings.shots,
        "seed": settings.seed, "learned_parameters": made.learned_parameters,
        "support_images": len(tuned.support.store), "support_sha256": support_sha256,
        "skipped": tuned.skipped, "also_tested": also_tested, "rose": tuned.rose,
        "dispersion": spread, **{name: told for name, told in expected.items() if told is not None},
    }  # fmt: skip


def files_of(tuned: Tuned, journal: Journal, **more: Any) -> dict[str, bytes]:
    """Files, by name, of a run tuned in memory; ``more`` are entries of environment.json."""
    made, data, seconds = tuned.classifier, tuned.data, round(tuned.seconds, 2)
    parts = (tuned.settings, data.task, data.support, made.backbone)
    files = made_of(*parts, tuning_seconds=seconds, **more)
    files["metrics.json"] = as_file(_metrics(tuned, dispersion(tuned)))
    if journal.rows:
        files["log.csv"] = as_csv([journal.header, *journal.rows]).encode()
    return files | {"prompts.safetensors": tensors_as_bytes(made.tensors())}


def check_output(
    run: RunDirectory,
    settings: Settings | None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    way: str = "add `{}`, or choose another `output`",
) -> None:
    """Raise `UserError` of a directory with another run, unless to be resumed or overwritten.

    Without settings, it is not one that could be resumed. ``way`` tells how to ask for either.
    """
    if resume and overwrite:
        raise UserError("`resume` continues a run and `overwrite` discards it; give one of them")
    if run.path.exists() and not run.path.is_dir():
        raise UserError(f"`output` {run.path} is a file; give a directory")
    run.tidy()
    if overwrite:
        return
    if not run.exists:
        run.require_own()
        if run.search_file.is_file() and not resume:
            what = f"{run.path} holds an unfinished search for a method"
            raise UserError(f"{what}; {way.format('resume')}")
        return
    if not resume:
        state, may = ("a finished", "overwrite") if run.finished else ("an unfinished", "resume")
        if settings is None:
            state, may = "a", "overwrite"
        raise UserError(f"{run.path} holds {state} run; {way.format(may)}")
    kept = run.read_settings()
    if settings and other_setting(run.asked_settings(), settings) is None:
        return
    if settings and (name := other_setting(kept, settings)):
        old, value = getattr(kept, name), getattr(settings, name)
        what = f"cannot resume {run.path} with {name}={value}: it was started with {name}={old}"
        raise UserError(f"{what}; leave the setting out, or choose another `output`")


def other_setting(kept: Settings, settings: Settings) -> str | None:
    """A setting that is another and decides what a run finds; None where there is none."""
    values = kept.model_dump()
    names = (n for n, value in settings.model_dump().items() if values[n] != value)
    return next((name for name in names if name not in FREE_ON_RESUME), None)


def searched(run: RunDirectory, settings: Settings) -> Search | None:
    """The search in a directory, if it is done and these settings are what it ended with."""
    if not run.search_file.is_file():
        return None
    found = run.read_search()
    settings = run.asked_settings() if run.exists else settings
    done = found.search.done and other_setting(found.chosen(), settings) is None
    return found.search if done else None


@dataclass(frozen=True)
class Target:
    """Where else to evaluate; what is None is as in the run.

    Another dataset's root is the run's; its domain and class names are its own, its classes all.
    """

    dataset: str | None = None
    root: str | None = None
    domain: str | None = None
    class_names: str | None = None
    classes: str | None = None

    @property
    def elsewhere(self) -> bool:
        """Whether anything but the run's own test images is meant."""
        return (self.dataset, self.domain, self.classes) != (None, None, None)

    def settings(self, settings: Settings) -> Settings:
        """The run's settings, changed to open the target's task."""
        own = {"domain": None, "class_names": None, "classes": "all"}
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return settings.model_copy(update={**(own if "dataset" in given else {}), **given})

    def place(self, settings: Settings) -> dict[str, Any]:
        """What says which images and classes are meant, for a run with these settings."""
        return {name: getattr(self.settings(settings), name) for name in asdict(self)}


def recorded(run: RunDirectory, target: Target) -> tuple[Path, EvaluationRecord] | None:
    """The run's evaluation on ``target`` and its file, if there is one that counts."""
    place = target.place(run.read_settings())
    for file, found in run.evaluations():
        if isinstance(found, EvaluationRecord) and found.settings == place:
            return file, found
    return None


def evaluate_run(
    run: RunDirectory,
    target: Target,
    *,
    device: str | None = None,
    strict: bool = False,
    shared: Shared | None = None,
    open_task: Callable[..., Task] = task_of,
    held: bool = False,
    reporter: Reporter | None = None,
) -> tuple[str, dict[str, Any]]:
    """Evaluate a finished run's prompts on a target, and leave ``eval-<name>.json`` in the run.

    On the run's own test images, or of a run in the hub's cache, nothing is written. Several
    processes may evaluate a run at once.

    Args:
        device: to run on, if not the one it was tuned on.
        strict: an unreadable image is an error, whatever the run's settings say.
        shared: the run's backbone, already loaded, and what was read with it.
        open_task: as `task_of`; one that remembers shares tasks.
        held: whether the caller holds the run's lock; it is taken to write, if not.

    Returns the target task's name and `metrics`. A `UserError` says that there is no finished run,
    the target cannot be read, or another run has taken this one's place meanwhile.
    """
    run.require()
    reporter = reporter or Reporter()
    identity, own = _identity(run), run.read_settings()
    settings = target.settings(own)
    task = open_task(settings, evaluate=target.dataset is not None)
    backbone = shared.backbone if shared else None
    classifier = load_classifier(run, task, backbone=backbone, device=device)
    task = replace(task, grey=classifier.grey or task.grey)  # the scale goes with the run
    tell_notes(task, reporter)
    settings = settings.model_copy(update={"strict": strict or settings.strict})
    if not target.elsewhere:
        task = unseen(run, task, reporter.warn)
    if not task.test:
        raise UserError(
            f"no image of '{task.name}' was held out of tuning to test on; give `dataset` with "
            "other images of these classes, or see the forecast in metrics.json"
        )
    result = evaluate_task(classifier, task, settings, reporter, shared)
    if run.fetched or not target.elsewhere:
        return task.name, result
    twice = None  # where the images it was tuned on are not at hand
    with suppress(UserError):
        tuned_on = open_task(own, evaluate=False)
        data = Data(tuned_on, load_support_set(run.support_file, tuned_on))
        twice = tell_of_overlap(data, task, reporter)
    record = {
        "dataset": task.name, "domain": settings.domain, "classes": settings.classes,
        "settings": target.place(own), "also_tested": twice, "test": result,
    }  # fmt: skip
    with nullcontext() if held else run.locked(patience=_PATIENCE):
        if _identity(run) != identity:
            raise UserError(f"the run in {run.path} was replaced meanwhile; evaluate it again")
        write_json(_file_for(run, target, own), record)
    return task.name, result


def _identity(run: RunDirectory) -> tuple[bytes, bytes]:
    """What tells a run from another that takes its place."""
    return run.settings_file.read_bytes(), file_digest(run.prompts_file)


def _file_for(run: RunDirectory, target: Target, own: Settings) -> Path:
    """Its earlier record, or ``eval-<dataset>[-<domain>][-<classes>].json``, numbered if taken."""
    if before := recorded(run, target):
        return before[0]
    dataset = Path(target.dataset or own.dataset).stem
    name = "-".join(filter(None, ("eval", dataset, target.domain, target.classes)))
    file, number = run.path / f"{name}.json", 2
    while file.exists():
        file, number = run.path / f"{name}-{number}.json", number + 1
    return file
