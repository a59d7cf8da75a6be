"""Doing a plan: who does which run when, what failed, how long is left."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta

from joblib import cpu_count

from dapt.errors import UserError
from dapt.grid.crew import DIED, READY, Alone, Crew, Processes, RayCrew
from dapt.grid.plan import DONE, FAILED, Estimator, Plan, PlannedRun, heaviest
from dapt.grid.work import BUSY, Session, threads
from dapt.progress import Advance, Reporter
from dapt.run.train import tell_notes

# A run whose worker dies this often is given up: it may be what kills them.
_DEATHS = 3
# Seconds between two looks at runs that another process holds.
_REVISIT = 2.0


@dataclass
class Result:
    """What became of a plan: how many runs are done, and why the others failed."""

    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # title -> sentence


def threads_of(workers: int | None) -> int:
    """Threads of each worker where none are asked for: the cores, divided."""
    return max(1, cpu_count() // (workers or 1))


def open_tasks(runs: Sequence[PlannedRun], session: Session, reporter: Reporter) -> None:
    """Open what runs are tuned and evaluated on, before any is begun.

    What cannot be opened is told, and what is odd; the runs that need the one will fail, the others
    go on.

    Raises:
        UserError: no run has all it needs.
    """
    alike = {(run.group, run.targets): run for run in runs}
    wrong: dict[str, UserError] = {}
    good = 0
    for run in alike.values():
        try:
            tell_notes(session.task(run.settings), reporter)
            for target in run.targets:
                settings = target.settings(run.settings)
                tell_notes(session.task(settings, evaluate=target.dataset is not None), reporter)
            good += 1
        except UserError as error:
            wrong[str(error)] = error
    for sentence, first in wrong.items():
        if not good:
            raise first
        reporter.warn(f"{sentence}; the runs that need it will fail")


def estimate(plan: Plan, pending: Sequence[PlannedRun], session: Session) -> Estimator:
    """What the pending runs cost, by those that are done, or by timing a step of each dataset.

    Raises:
        UserError: the backbone of all runs cannot be loaded.
    """
    estimator, left = Estimator(session.task), set(pending)
    datasets = dict.fromkeys(run.settings.dataset for run in pending)
    for run in plan.runs:
        if run.settings.dataset in datasets and run not in left and run.directory.finished:
            with _unless_missing():
                estimator.observe(run)
    one_backbone = len({run.group[:4] for run in pending}) == 1
    for dataset in datasets:
        timed = heaviest(r for r in pending if r.settings.dataset == dataset)
        if timed is None or estimator.knows(dataset):
            continue
        if one_backbone:
            session.shared(timed.settings)
        with _unless_missing():
            estimator.time_step(timed, session.shared(timed.settings).backbone)
    return estimator


@contextmanager
def _unless_missing() -> Iterator[None]:
    """What an estimate cannot open is left out of it: its runs will tell."""
    with suppress(UserError):
        yield


def duration(seconds: float) -> str:
    """``"about 5 min"``, in the unit a reader would use."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} min"
    if seconds < 48 * 3600:
        return f"about {seconds / 3600:.1f} h"
    return f"about {timedelta(seconds=seconds).days} days"


def run_plan(
    plan: Plan,
    *,
    workers: int | None = None,
    threads_each: int | None = None,
    ray: str | None = None,
    session: Session | None = None,
    estimator: Estimator | None = None,
    reporter: Reporter | None = None,
    run_reporter: Reporter | None = None,
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
        session, estimator: already made, to share what they hold.
        reporter: is told what became of each run.
        run_reporter: is told the progress: of each run where this process does them, else of all.

    Raises:
        Interrupted, KeyboardInterrupt: the process was asked to stop; all can be resumed.
        UserError: workers cannot be started.
        OSError: nothing more can be written.
    """
    reporter = reporter or Reporter()
    session, estimator = session or Session(), estimator or Estimator()
    states = {run: run.state() for run in plan.runs}
    result = Result(done=sum(state == DONE for state in states.values()))
    for run, state in states.items():
        if state == FAILED:
            result.failed[run.title] = run.directory.read_failure() or ""
    pending = [run for run, state in states.items() if state not in (DONE, FAILED)]
    if not pending:
        return result
    groups = list(dict.fromkeys(run.group for run in pending))
    pending.sort(key=lambda run: groups.index(run.group))  # stable: each group's order stays
    crew: Crew
    if ray is not None:
        crew = RayCrew(ray, threads_each)
        count, each = min(workers or crew.room, len(pending)), crew.threads
    else:
        count = min(workers or 1, len(pending))
        each = threads_each or threads_of(workers)
        crew = Alone(session, run_reporter or Reporter()) if count == 1 else Processes(each)
    if count > 1:
        session.clear()  # the workers load their own
    # Where this process does the runs, their own progress is shown.
    watched = Reporter() if isinstance(crew, Alone) else run_reporter or Reporter()
    with threads(each), _stoppable(), watched.stage("runs", len(pending)) as advance:
        try:
            foreman = _Foreman(crew, pending, len(plan.runs), count, result, estimator)
            foreman.work(reporter, advance)
        finally:
            crew.dismiss()
    return result


class _Foreman:
    """Hands runs to a crew until none is left."""

    def __init__(
        self,
        crew: Crew,
        pending: list[PlannedRun],
        total: int,
        count: int,
        result: Result,
        estimator: Estimator,
    ) -> None:
        self.crew, self.result, self.estimator = crew, result, estimator
        self.waiting, self.total, self.count = deque(pending), total, count
        self.held: list[PlannedRun] = []  # by other processes
        self.idle: list[int] = []
        self.doing: dict[int, tuple[PlannedRun, float]] = {}
        self.groups: dict[int, tuple[str | None, ...]] = {}
        self.deaths: Counter[PlannedRun] = Counter()
        self.unborn = 0  # workers that died without work since one was ready

    def work(self, reporter: Reporter, advance: Advance) -> None:
        """Until every run is done or failed; ``advance`` is told one for each."""
        self.reporter, self.advance = reporter, advance
        for _ in range(self.count):
            self.crew.hire()
        announced = False
        while self.waiting or self.doing or self.held:
            while self.idle and self.waiting:
                self._give(self.idle.pop(0))
            if not self.waiting and not self.doing:
                if not announced:
                    self.reporter.say(
                        f"waiting for {len(self.held)} runs that other processes hold"
                    )
                announced = True
                time.sleep(_REVISIT)
                self.waiting, self.held = deque(self.held), []
                continue
            for worker, outcome in self.crew.wait(1.0):
                if outcome == DIED:
                    self._died(worker)
                elif outcome == READY:
                    self.unborn = 0
                    self.idle.append(worker)
                else:
                    run, started = self.doing.pop(worker)
                    self.idle.append(worker)
                    if outcome.state == BUSY:
                        self.held.append(run)
                    else:
                        self._ended(run, outcome.state, outcome.note, time.perf_counter() - started)

    def _give(self, worker: int) -> None:
        """The next run of what this worker has loaded, else of what nobody works on, else any."""
        mine = self.groups.get(worker)
        others = {run.group for run, _ in self.doing.values()}
        run = next(
            (r for r in self.waiting if r.group == mine),
            next((r for r in self.waiting if r.group not in others), self.waiting[0]),
        )
        self.waiting.remove(run)
        self.groups[worker] = run.group
        self.doing[worker] = run, time.perf_counter()
        self.crew.give(worker, run)

    def _ended(self, run: PlannedRun, state: str, note: str, seconds: float) -> None:
        if state == FAILED:
            self.result.failed[run.title] = note
            note = f"failed: {note}"
        else:
            self.result.done += 1
            with _unless_missing():
                self.estimator.observe(run)
        ended = self.result.done + len(self.result.failed)
        rest = [*self.waiting, *self.held, *(r for r, _ in self.doing.values())]
        left = ""
        if rest:
            with _unless_missing():
                expected = sum(map(self.estimator.seconds, rest)) / self.count
                left = f" ({duration(expected)} left)"
        self.advance(1)
        self.reporter.say(f"[{ended}/{self.total}] {run.title}: {note}, {seconds:.1f} s{left}")

    def _died(self, worker: int) -> None:
        """Of a lack of memory, a lost node, a kill: its run goes on elsewhere, and that is told."""
        if worker in self.idle:
            self.idle.remove(worker)
        if worker not in self.doing:
            self.unborn += 1
            if self.unborn >= _DEATHS * self.count and not self.doing:
                raise UserError("workers end as soon as they are started; try --workers 1")
        else:
            run, started = self.doing.pop(worker)
            self.deaths[run] += 1
            if self.deaths[run] < _DEATHS:
                self.reporter.say(f"{run.title}: its worker died; the run goes on in another")
                self.waiting.appendleft(run)
            else:
                note = f"its worker died {_DEATHS} times, perhaps for lack of memory"
                run.directory.fail(note)
                self._ended(run, FAILED, note, time.perf_counter() - started)
        if len(self.waiting) + len(self.held) > len(self.idle):
            self.crew.hire()


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM stops a grid as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
