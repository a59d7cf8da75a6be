"""How long the runs of a plan will take, by those that are done or else by timing a few steps."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from statistics import fmean, median

import torch

from dapt.engine.classifier import new_classifier
from dapt.engine.fit import steps_per_epoch
from dapt.engine.step import Tuner
from dapt.errors import UserError
from dapt.grid.plan import PlannedRun, backbone_key, task_key
from dapt.grid.work import Session
from dapt.methods import get_method
from dapt.settings import Settings

# Steps that are timed, after one that pays for memory and kernels.
_TIMED = 3

STEP, IMAGE = "step", "image"


class Estimator:
    """Seconds that runs will take; a session opens tasks, and has the backbone to time steps with.

    Runs of one dataset and method are taken to cost the same a step, and the same an image that
    they are evaluated on; where none was measured, as much as others of the dataset, or as all.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._measured: dict[tuple[str, ...], list[float]] = defaultdict(list)
        self._sizes: dict[tuple[object, ...], tuple[int, int]] = {}

    def prepare(self, runs: Sequence[PlannedRun], pending: Sequence[PlannedRun]) -> None:
        """Observe the runs that are done, and time steps where they tell nothing of a dataset.

        What cannot be opened is left out: its runs will tell.

        Raises:
            UserError: the backbone of all pending runs cannot be loaded.
        """
        datasets = {run.settings.dataset for run in pending}
        for run in runs:
            if run.settings.dataset in datasets and run.directory.finished:
                self.observe(run)
        several = len({backbone_key(run.settings) for run in pending}) > 1
        learning = [s for s in (run.settings for run in pending) if get_method(s.method).learns]
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
        task, method = self.session.task(settings), get_method(settings.method)
        backbone = self.session.shared(settings).backbone
        classifier = new_classifier(backbone, task.class_names, task.template, method, settings)
        shape, noise = (3, *[backbone.preprocessing.size] * 2), torch.Generator().manual_seed(0)
        prototypes = torch.zeros(len(task.class_names), classifier.text_features().shape[1])
        tuner = Tuner(classifier, settings, prototypes)
        labels = torch.zeros(min(settings.batch_size, self._size(settings)[0]), dtype=torch.long)
        views = torch.randint(256, (len(labels), *shape), dtype=torch.uint8, generator=noise)
        seconds = []
        for _ in range(1 + _TIMED):
            started = time.perf_counter()
            tuner.step(views, labels, 0.0, noise)
            seconds.append(time.perf_counter() - started)
        self._note(STEP, settings, median(seconds[1:]))
        count = max(1, min(settings.eval_batch_size, len(task.test)))
        views = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=noise)
        with torch.inference_mode():
            started = time.perf_counter()
            classifier.image_features(views)
            self._note(IMAGE, settings, (time.perf_counter() - started) / count)

    def _work(self, settings: Settings) -> tuple[int, int]:
        """Tuning steps of a run, and test images."""
        support, test = self._size(settings)
        if not get_method(settings.method).learns:
            return 0, test
        return settings.epochs * steps_per_epoch(support, settings.batch_size), test

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


def duration(seconds: float) -> str:
    """``"about 5 min"``, in the unit a reader would use."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} min"
    if seconds < 48 * 3600:
        return f"about {seconds / 3600:.1f} h"
    return f"about {timedelta(seconds=seconds).days} days"
