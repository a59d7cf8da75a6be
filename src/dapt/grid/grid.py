"""Doing a plan: who does which run when, what failed, how long is left."""

from __future__ import annotations

import signal
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import nullcontext
from dataclasses import dataclass, field

from joblib import cpu_count

from dapt.errors import UserError
from dapt.grid.estimate import Estimator, duration
from dapt.grid.plan import DONE, FAILED, Plan, PlannedRun, to_do
from dapt.grid.work import BUSY, Outcome, threads
from dapt.grid.workers import Crew, Here, Process, Told, Worker, answering, cluster
from dapt.progress import Advance, Reporter

# A run whose worker dies this often is given up: it may be what kills them.
_DEATHS = 3
# Seconds between two looks at runs that another process holds.
_REVISIT = 2.0
# Seconds that workers get to reach the end of a step.
_PATIENCE = 60


@dataclass
class Result:
    """What became of a plan: how many runs are done, and why the others failed."""

    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # title -> sentence


def threads_of(workers: int | None) -> int:
    """Threads of each worker where none are asked for: the cores, divided."""
    return max(1, cpu_count() // (workers or 1))


def run_plan(
    plan: Plan,
    *,
    workers: int | None = None,
    threads_each: int | None = None,
    ray: str | None = None,
    retry: bool = False,
    estimator: Estimator | None = None,
    reporter: Reporter | None = None,
) -> Result:
    """Do what is not done of a plan.

    A run that is done is skipped, an unfinished one resumed, one that failed earlier left failed.
    One that another process holds is looked at again when the others are done. A run's result
    depends on the number of threads each worker has, in its last bits, but not on who does it.

    Args:
        plan: from `make_plan`.
        workers: processes; one is this process itself. With Ray, actors; as many as there is
            room for, if not given.
        threads_each: of a worker; by default the cores are divided.
        ray: address of a Ray cluster, or ``local``.
        retry: do again what failed earlier.
        estimator: already made, to share what it and its session hold. The session's reporter is
            told the progress: of each run where this process does them, else of all.
        reporter: is told what became of each run.

    Raises:
        Interrupted, KeyboardInterrupt: the process was asked to stop; all can be resumed.
        UserError: workers cannot be started.
        OSError: nothing more can be written.
    """
    reporter, estimator = reporter or Reporter(), estimator or Estimator()
    session, states, result = estimator.session, plan.states(), Result()
    pending = to_do(states, retry=retry)
    for run, state in states.items():
        if state == DONE:
            result.done += 1
        elif state == FAILED and retry:
            run.directory.failure_file.unlink(missing_ok=True)
        elif state == FAILED:
            result.failed[run.title] = run.directory.read_failure() or ""
    if not pending:
        return result
    groups = list(dict.fromkeys(run.group for run in pending))
    pending.sort(key=lambda run: groups.index(run.group))  # stable: each group's order stays
    each, count = threads_each or threads_of(workers), min(workers or 1, len(pending))
    alone = ray is None and count == 1
    if not alone:
        session.clear()  # the workers load their own
    here = Crew((lambda: Here(session)) if alone else (lambda: Process(each)), count, each)
    # Where this process does the runs, their own progress is shown.
    watched = Reporter() if alone else session.reporter
    with (
        nullcontext(here) if ray is None else cluster(ray, threads_each) as crew,
        threads(crew.threads),
        answering(signal.SIGTERM, signal.default_int_handler),  # stops a grid as Ctrl-C does
        watched.stage("runs", len(pending)) as advance,
    ):
        count, total = min(workers or crew.room, len(pending)), len(plan.runs)
        foreman = _Foreman(crew, count, total, pending, result, estimator, reporter, advance)
        try:
            foreman.work()
        finally:
            foreman.stop()
    return result


@dataclass
class _Foreman:
    """Hands runs to workers until none is left."""

    crew: Crew
    count: int  # of workers
    total: int  # of runs, those included that are done
    waiting: list[PlannedRun]
    result: Result
    estimator: Estimator
    reporter: Reporter
    advance: Advance  # is told one for each run that ended
    held: list[PlannedRun] = field(default_factory=list)  # by other processes
    workers: list[Worker] = field(default_factory=list)
    idle: list[Worker] = field(default_factory=list)
    # With what each worker was asked and when; without a run, whether it is ready.
    asked: dict[Future[Told], tuple[Worker, PlannedRun | None, float]] = field(default_factory=dict)
    loaded: dict[Worker, tuple[str | None, ...]] = field(default_factory=dict)
    deaths: Counter[PlannedRun] = field(default_factory=Counter)
    unborn: int = 0  # workers that died without work since one was ready

    def work(self) -> None:
        """Until every run is done or failed."""
        for _ in range(self.count):
            self._hire()
        announced = False
        while self.waiting or self.held or self._doing():
            while self.idle and self.waiting:
                self._give(self.idle.pop(0))
            if self.waiting or self._doing():
                for future in wait(self.asked, 1.0, FIRST_COMPLETED).done:
                    self._hear(future, *self.asked.pop(future))
                continue
            if not announced:
                self.reporter.say(f"waiting for {len(self.held)} runs that other processes hold")
            announced = True
            time.sleep(_REVISIT)
            self.waiting, self.held = self.held, []

    def stop(self) -> None:
        """Stop all workers between two steps, as far as they can."""
        for worker in self.workers:
            worker.end()
        wait(self.asked, _PATIENCE)
        for worker in self.workers:
            worker.end(now=True)

    def _doing(self) -> list[PlannedRun]:
        return [run for _, run, _ in self.asked.values() if run is not None]

    def _hire(self) -> None:
        worker = self.crew.hire()
        self.workers.append(worker)
        self._ask(worker, None)

    def _ask(self, worker: Worker, run: PlannedRun | None) -> None:
        started = time.perf_counter()
        self.asked[worker.do(run)] = worker, run, started

    def _give(self, worker: Worker) -> None:
        """The next run of what this worker has loaded, else of what nobody works on, else any."""
        mine, others = self.loaded.get(worker), {run.group for run in self._doing()}
        run = min(self.waiting, key=lambda run: (run.group != mine, run.group in others))
        self.waiting.remove(run)
        self.loaded[worker] = run.group
        self._ask(worker, run)

    def _hear(
        self, future: Future[Told], worker: Worker, run: PlannedRun | None, started: float
    ) -> None:
        seconds = time.perf_counter() - started
        if future.exception() is not None:
            worker.end(now=True)  # it may only be out of reach
            self._died(run, seconds)
            return
        told = future.result()
        if isinstance(told, BaseException):
            raise told
        self.idle.append(worker)
        if run is None:
            self.unborn = 0
        elif told.state == BUSY:
            self.held.append(run)
        else:
            self._ended(run, told, seconds)

    def _ended(self, run: PlannedRun, outcome: Outcome, seconds: float) -> None:
        note = outcome.note
        if outcome.state == FAILED:
            self.result.failed[run.title] = note
            note = f"failed: {note}"
        else:
            self.result.done += 1
            self.estimator.observe(run)
        ended, left = self.result.done + len(self.result.failed), ""
        if rest := [*self.waiting, *self.held, *self._doing()]:
            left = f" ({duration(sum(map(self.estimator.seconds, rest)) / self.count)} left)"
        self.advance(1)
        self.reporter.say(f"[{ended}/{self.total}] {run.title}: {note}, {seconds:.1f} s{left}")

    def _died(self, run: PlannedRun | None, seconds: float) -> None:
        """Of a lack of memory, a lost node, a kill: its run goes on elsewhere, and that is told."""
        if run is None:
            self.unborn += 1
            if self.unborn >= _DEATHS * self.count and not self._doing():
                raise UserError("workers end as soon as they are started; try --workers 1")
        else:
            self.deaths[run] += 1
            if self.deaths[run] < _DEATHS:
                self.reporter.say(f"{run.title}: its worker died; the run goes on in another")
                self.waiting.insert(0, run)
            else:
                note = f"its worker died {_DEATHS} times, perhaps for lack of memory"
                run.directory.fail(note)
                self._ended(run, Outcome(FAILED, note), seconds)
        if self.waiting or self.held:
            self._hire()
