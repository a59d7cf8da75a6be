"""Doing a plan: who does which run when, what failed, how long is left."""

from __future__ import annotations

import signal
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

from joblib import cpu_count

from dapt.errors import UserError
from dapt.grid import work
from dapt.grid.estimate import Estimator, duration
from dapt.grid.plan import DONE, FAILED, Plan, PlannedRun
from dapt.progress import Reporter

# A run whose worker dies this often is given up: it may be what kills them.
_DEATHS = 3
# Seconds between two looks at runs that another process holds.
_REVISIT = 2.0
# Seconds that workers get to reach the end of a step.
_PATIENCE = 60


@dataclass(kw_only=True)
class Grid:
    """A plan and who does it.

    A run that is done is skipped, an unfinished one resumed, one that failed earlier left failed.
    One that another process holds is looked at again when the others are done. A run's result
    depends on the number of threads each worker has, in its last bits, but not on who does it.

    Of its attributes, ``states`` is what was found of each run, ``done`` how many runs are done,
    and ``failed`` why others failed: title -> sentence.
    """

    plan: Plan = field(kw_only=False)
    workers: int | None = None  # processes, or actors of Ray: by default one, or all with room
    threads: int | None = None  # of a worker; by default the cores are divided
    ray: str | None = None  # address of a Ray cluster, or ``local``
    retry: bool = False  # do again what failed earlier
    reporter: Reporter = field(default_factory=Reporter)  # is told what became of each run
    # Is told the progress: of each run where this process does them, else of all.
    progress: Reporter = field(default_factory=Reporter)

    def __post_init__(self) -> None:
        self.states = {run: run.state() for run in self.plan.runs}
        settled = (DONE,) if self.retry else (DONE, FAILED)
        self.waiting = [run for run, state in self.states.items() if state not in settled]
        self.done, self.failed = 0, dict[str, str]()
        self._each = self.threads or max(1, cpu_count() // (self.workers or 1))
        self.session = work.Session(self.progress)
        self.estimator = Estimator(self.session)
        self._held: list[PlannedRun] = []  # by other processes
        self._idle: list[work.Worker] = []
        self._asked: dict[work.Answer, work.Worker] = {}
        # Of workers, by what they did; by None since one was last ready.
        self._deaths: Counter[PlannedRun | None] = Counter()

    def prepare(self) -> dict[PlannedRun, float]:
        """Open what the runs to do need, and tell how many seconds each will take.

        Raises:
            UserError: no run has all it needs, or the backbone of all cannot be loaded.
        """
        if self.waiting:
            self.session.open_tasks(self.waiting, self.reporter)
            with work.computing_with(self._each):
                self.estimator.prepare(self.plan.runs, self.waiting)
        return {run: self.estimator.seconds(run) for run in self.waiting}

    def run(self) -> Grid:
        """Do what is to do; returns the grid, which tells what became of it.

        Raises:
            Interrupted, KeyboardInterrupt: the process was asked to stop; all can be resumed.
            UserError: workers cannot be started.
            OSError: nothing more can be written.
        """
        for run, state in self.states.items():
            self.done += state == DONE
            if state == FAILED and self.retry:
                run.directory.failure_file.unlink(missing_ok=True)
            elif state == FAILED:
                self.failed[run.title] = run.directory.read_failure() or ""
        if not self.waiting:
            return self
        alone = self.ray is None and min(self.workers or 1, len(self.waiting)) == 1
        if not alone:
            self.session.backbones.clear()  # the workers load their own
        hire = partial(work.here, self.session) if alone else partial(work.process, self._each)
        crew: work.Crew = hire, self.workers or 1
        # Where this process does the runs, their own progress is shown.
        watched = Reporter() if alone else self.progress
        with (
            nullcontext(crew) if self.ray is None else work.cluster(self.ray, self.threads) as crew,
            work.computing_with(self._each),
            work.answering(signal.SIGTERM, signal.default_int_handler),  # it stops as by Ctrl-C
            watched.stage("runs", len(self.waiting)) as self._advance,
        ):
            self._hire, room = crew
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
        for _ in range(self._count):
            self._ask(self._hire(), None)
        announced = False
        while self.waiting or self._held or self._doing():
            while self._idle and self.waiting:
                self._give(self._idle.pop(0))
            if self.waiting or self._doing():
                for told in wait(self._asked, 1.0, FIRST_COMPLETED).done:
                    self._hear(told)
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

    def _hear(self, told: work.Answer) -> None:
        """What a worker answers: it is idle then, or another takes its place."""
        worker = self._asked.pop(told)
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
            raise UserError("workers end as soon as they are started; try --workers 1")
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
