"""Doing a plan: who does which run when, what failed, how long it will take."""

from __future__ import annotations

import signal
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

import torch
from joblib import cpu_count

from dapt.engine.classifier import new_classifier
from dapt.engine.fit import total_steps
from dapt.engine.step import noise, step_seconds
from dapt.engine.suited import suited
from dapt.errors import UserError
from dapt.grid import work
from dapt.grid.plan import DONE, FAILED, Plan, PlannedRun, backbone_key, task_key
from dapt.methods import get_method
from dapt.progress import Reporter, duration
from dapt.settings import Settings

_DEATHS = 3  # of its workers, and a run is given up: it may be what kills them
_REVISIT = 2.0  # seconds between two looks at runs that another process holds
_PATIENCE = 60  # seconds that workers get to reach the end of a step
STEP, IMAGE = "step", "image"


@dataclass(kw_only=True)
class Grid:
    """A plan and who does it.

    A run that is done is skipped, an unfinished one resumed, one that failed earlier left failed.
    One that another process holds is looked at again when the others are done. A run's result
    depends on the number of threads each worker has, in its last bits, but not on who does it.
    ``states`` tells what was found of each run, ``done`` how many are done, and ``failed`` why
    others are not: title -> sentence.
    """

    plan: Plan = field(kw_only=False)
    workers: int | None = None  # processes, or actors of Ray: by default one, or all with room
    threads: int | None = None  # of a worker; by default the cores are divided
    ray: str | None = None  # address of a Ray cluster, or ``local``
    retry: bool = False  # do again what failed earlier
    reporter: Reporter = field(default_factory=Reporter)  # is told what became of each run
    progress: Reporter = field(default_factory=Reporter)  # of each run, or of all with workers

    def __post_init__(self) -> None:
        self.states = {run: run.state() for run in self.plan.runs}
        self.done = list(self.states.values()).count(DONE)
        settled = (DONE,) if self.retry else (DONE, FAILED)
        self.waiting = [run for run, state in self.states.items() if state not in settled]
        failed = [run for run, state in self.states.items() if state == FAILED and not self.retry]
        self.failed = {run.title: run.directory.read_failure() or "" for run in failed}
        self._each = self.threads or max(1, cpu_count() // (self.workers or 1))
        self.session = work.Session(self.progress)
        self.estimator = Estimator(self.session)
        self._held: list[PlannedRun] = []  # by other processes
        self._idle: list[work.Worker] = []
        self._asked: dict[work.Answer, work.Worker] = {}
        # Of workers, by what they did; by None since one was last ready.
        self._deaths: Counter[PlannedRun | None] = Counter()

    def prepare(self) -> dict[PlannedRun, float]:
        """Seconds that each run to do will take, or a `UserError` where none has all it needs."""
        if self.waiting:
            self.session.open_tasks(self.waiting, self.reporter)
            with work.computing_with(self._each):
                self.estimator.prepare(self.plan.runs, self.waiting)
        return {run: self.estimator.seconds(run) for run in self.waiting}

    def run(self) -> Grid:
        """Do what is to do; the grid tells what became of it.

        Where the process is asked to stop, `Interrupted` or KeyboardInterrupt, all can be resumed.
        A `UserError`, if workers cannot be started; an OSError, if nothing more can be written.
        """
        if not self.waiting:
            return self
        for run in self.waiting:
            if self.states[run] == FAILED:
                run.directory.failure_file.unlink(missing_ok=True)
        alone = self.ray is None and min(self.workers or 1, len(self.waiting)) == 1
        if not alone:
            self.session.backbones.clear()  # the workers load their own
        hire = partial(work.here, self.session) if alone else partial(work.process, self._each)
        crew = nullcontext((hire, 1)) if self.ray is None else work.cluster(self.ray, self.threads)
        # Where this process does the runs, their own progress is shown.
        watched = Reporter() if alone else self.progress
        with (
            crew as (self._hire, room),
            work.computing_with(self._each),
            work.answering(signal.SIGTERM, signal.default_int_handler),  # it stops as by Ctrl-C
            watched.stage("runs", len(self.waiting)) as self._advance,
        ):
            self._count = min(self.workers or room, len(self.waiting))
            try:
                self._work()
            finally:
                workers = [*self._idle, *self._asked.values()]
                for worker in workers:
                    worker.stop()
                wait(self._asked, _PATIENCE)
                for worker in workers:
                    worker.kill()
        return self

    def _work(self) -> None:
        """Hand runs to workers until none is left."""
        announced = False
        for _ in range(self._count):
            self._ask(self._hire(), None)
        while self.waiting or self._held or self._doing():
            while self._idle and self.waiting:
                self._give(self._idle.pop(0))
            if self.waiting or self._doing():
                for told in wait(self._asked, 1.0, FIRST_COMPLETED).done:
                    self._hear(self._asked.pop(told), told)
                continue
            if not announced:
                self.reporter.say(f"waiting for {len(self._held)} runs that other processes hold")
            announced = True
            time.sleep(_REVISIT)
            self.waiting, self._held = self._held, []

    def _doing(self) -> list[PlannedRun]:
        return [worker.run for worker in self._asked.values() if worker.run is not None]

    def _give(self, worker: work.Worker) -> None:
        """The next run of what this worker has loaded, else of what nobody works on, else any."""
        mine = worker.run and worker.run.group
        others = {run.group for run in self._doing()}
        run = min(self.waiting, key=lambda run: (run.group != mine, run.group in others))
        self.waiting.remove(run)
        self._ask(worker, run)

    def _ask(self, worker: work.Worker, run: PlannedRun | None) -> None:
        worker.run, worker.since = run, time.perf_counter()
        self._asked[worker.do(run)] = worker

    def _hear(self, worker: work.Worker, told: work.Answer) -> None:
        """What a worker answers: it is idle then, or another takes its place."""
        if told.exception() is not None:
            self._lose(worker)
            return
        self._idle.append(worker)
        if isinstance(answer := told.result(), BaseException):
            raise answer
        if worker.run is None:
            self._deaths[None] = 0
        elif answer == work.BUSY:
            self._held.append(worker.run)
        else:
            self._ended(worker, worker.run, *answer)

    def _lose(self, worker: work.Worker) -> None:
        """Another goes on with what a worker died of: lack of memory, a lost node, a kill."""
        run = worker.run
        worker.kill()  # it may only be out of reach
        self._deaths[run] += 1
        if run is None and self._deaths[run] >= _DEATHS * self._count and not self._doing():
            raise UserError("workers end as soon as they are started; try `workers` 1")
        if run is not None or self.waiting or self._held:
            self._ask(self._hire(), None)
        if run is not None and self._deaths[run] >= _DEATHS:
            note = f"its worker died {_DEATHS} times, perhaps for lack of memory"
            run.directory.fail(note)
            self._ended(worker, run, FAILED, note)
        elif run is not None:
            self.reporter.say(f"{run.title}: its worker died; the run goes on in another")
            self.waiting.insert(0, run)

    def _ended(self, worker: work.Worker, run: PlannedRun, state: str, note: str) -> None:
        seconds = time.perf_counter() - worker.since
        if state == FAILED:
            self.failed[run.title] = note
            note = f"failed: {note}"
        else:
            self.done += 1
            self.estimator.observe(run)
        ended, total, left = self.done + len(self.failed), len(self.plan.runs), ""
        if rest := [*self.waiting, *self._held, *self._doing()]:
            left = f" ({duration(sum(map(self.estimator.seconds, rest)) / self._count)} left)"
        self._advance(1)
        self.reporter.say(f"[{ended}/{total}] {run.title}: {note}, {seconds:.1f} s{left}")


class Estimator:
    """Seconds that runs will take; the session opens tasks, and has a backbone to time steps with.

    Runs of one dataset and method are taken to cost the same a step, and the same an image that
    they are evaluated on; where none was measured, as much as others of the dataset, or as all.
    """

    def __init__(self, session: work.Session) -> None:
        self.session = session
        self._measured: dict[tuple[str, ...], list[float]] = defaultdict(list)
        self._sizes: dict[tuple[object, ...], tuple[int, int]] = {}

    def prepare(self, runs: Sequence[PlannedRun], pending: Sequence[PlannedRun]) -> None:
        """Observe the runs that are done, and time steps where they tell nothing of a dataset.

        What cannot be opened is left out, as its runs will tell; but not the backbone of all.
        """
        datasets = {run.settings.dataset for run in pending}
        for run in runs:
            if run.settings.dataset in datasets and run.directory.finished:
                self.observe(run)
        several = len({backbone_key(run.settings) for run in pending}) > 1
        learning = [run.settings for run in pending if get_method(run.settings.method).learns]
        # The first of the steps that are the most work, of each dataset, stands last.
        learning.sort(key=lambda settings: -len(get_method(settings.method).parts))
        for dataset, settings in {s.dataset: s for s in reversed(learning)}.items():
            if (STEP, dataset) not in self._measured:
                with suppress(UserError) if several else nullcontext():
                    self.session.shared(settings)
                with suppress(UserError):
                    self._time_step(settings)

    def observe(self, run: PlannedRun) -> None:
        """Learn from a run that is finished, if its task and records can be read."""
        with suppress(UserError):
            spent = run.directory.read_environment()
            steps, images = self._work(run.settings)
            if steps and spent.tuning_seconds:
                self._note(STEP, run.settings, spent.tuning_seconds / steps)
            self._note(IMAGE, run.settings, (spent.evaluation_seconds or 0.0) / max(1, images))

    def seconds(self, run: PlannedRun) -> float:
        """Expected duration of a run, with its evaluations; of what cannot be opened, none."""
        steps = images = 0
        with suppress(UserError):
            if run.twin() is None:
                steps, images = self._work(run.settings)
        for there, evaluate in run.elsewhere():
            with suppress(UserError):
                images += self._size(there, evaluate=evaluate)[1]
        return steps * self._expect(STEP, run.settings) + images * self._expect(IMAGE, run.settings)

    def _time_step(self, settings: Settings) -> None:
        """Time steps and an evaluation batch of noise, with the dataset's class names."""
        task, backbone = self.session.task(settings), self.session.shared(settings).backbone
        settings = suited(settings, task.class_names, backbone)
        method = get_method(settings.method)
        classifier = new_classifier(backbone, task.class_names, task.template, method, settings)
        batch = min(settings.batch_size, self._size(settings)[0])
        self._note(STEP, settings, step_seconds(classifier, settings, batch))
        count = max(1, min(settings.eval_batch_size, len(task.test)))
        views = noise(backbone, count)
        with torch.inference_mode():
            started = time.perf_counter()
            classifier.encode(views).cpu()  # waits for a GPU
            self._note(IMAGE, settings, (time.perf_counter() - started) / count)

    def _work(self, settings: Settings) -> tuple[int, int]:
        """Tuning steps of a run, and test images."""
        support, test = self._size(settings)
        steps = total_steps(settings, support)
        return steps if get_method(settings.method).learns else 0, test

    def _size(self, settings: Settings, *, evaluate: bool = False) -> tuple[int, int]:
        """Images to tune on, and to test on."""
        key = (*task_key(settings), settings.shots, evaluate)
        if key not in self._sizes:
            task = self.session.task(settings, evaluate=evaluate)
            each = Counter(item.label for item in task.train).values()
            self._sizes[key] = sum(min(n, settings.shots) for n in each), len(task.test)
        return self._sizes[key]

    def _note(self, what: str, settings: Settings, seconds: float) -> None:
        for key in _keys(what, settings):
            self._measured[key].append(seconds)

    def _expect(self, what: str, settings: Settings) -> float:
        """Mean of what is nearest; nothing where nothing was measured."""
        known = (self._measured[k] for k in _keys(what, settings) if k in self._measured)
        return fmean(next(known, [0.0]))


def _keys(what: str, settings: Settings) -> tuple[tuple[str, ...], ...]:
    return (what, settings.dataset, settings.method), (what, settings.dataset), (what,)
