"""How long the runs of a plan will take, by those that are done or else by timing a few steps."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from statistics import fmean, median

import torch

from dapt.clip.backbone import Backbone
from dapt.engine.step import Tuner
from dapt.errors import UserError
from dapt.grid.plan import Plan, PlannedRun, row_of, task_key
from dapt.grid.work import Session
from dapt.methods import get_method
from dapt.run.records import Environment, read_record
from dapt.run.train import new_classifier, steps_per_epoch
from dapt.settings import Settings, loss_weights

# Steps that are timed, after one that pays for memory and kernels.
_TIMED = 3

# Seconds that were measured, by dataset and method, by dataset, and of all.
Measured = defaultdict[tuple[str, ...], list[float]]


class Estimator:
    """Seconds that runs will take.

    Runs of one dataset and method are taken to cost the same a step, and the same an image that
    they are evaluated on; where none was measured, as much as others of the dataset, or as all.

    Args:
        session: opens tasks, and has the backbone to time steps with.
    """

    def __init__(self, session: Session | None = None) -> None:
        self.session = session or Session()
        self._steps: Measured = defaultdict(list)
        self._images: Measured = defaultdict(list)
        self._sizes: dict[tuple[object, ...], tuple[list[int], int]] = {}

    def prepare(self, plan: Plan, pending: Sequence[PlannedRun]) -> None:
        """Observe the runs that are done, and time steps where that tells nothing of a dataset.

        What cannot be opened is left out: its runs will tell.

        Raises:
            UserError: the backbone of all runs cannot be loaded.
        """
        left, datasets = set(pending), dict.fromkeys(run.settings.dataset for run in pending)
        for run in plan.runs:
            if run.settings.dataset in datasets and run not in left and run.directory.finished:
                self.observe(run)
        one_backbone = len({run.group[:4] for run in pending}) == 1
        for dataset in datasets:
            learning = [
                r for r in pending if r.settings.dataset == dataset and row_of(r.settings).learns
            ]
            if not learning or (dataset,) in self._steps:
                continue
            # The step that is the most work.
            timed = max(learning, key=lambda r: row_of(r.settings).changes).settings
            if one_backbone:
                self.session.shared(timed)
            with suppress(UserError):
                self._time_step(timed, self.session.shared(timed).backbone)

    def observe(self, run: PlannedRun) -> None:
        """Learn from a run that is finished, if its task and records can be read."""
        with suppress(UserError):
            file = run.directory.environment_file
            spent = read_record(file, Environment, "environment of the run")
            steps, (_, images) = self._tuning_steps(run.settings), self._size(run.settings)
            if steps and spent.tuning_seconds:
                _note(self._steps, run.settings, spent.tuning_seconds / steps)
            _note(self._images, run.settings, (spent.evaluation_seconds or 0.0) / images)

    def seconds(self, run: PlannedRun) -> float:
        """Expected duration of a run, with its evaluations; of what cannot be opened, none."""
        images, tuning = 0, 0.0
        with suppress(UserError):
            if run.twin() is None:
                images = self._size(run.settings)[1]
                tuning = self._tuning_steps(run.settings) * _expect(self._steps, run.settings)
        for there, evaluate in run.elsewhere():
            with suppress(UserError):
                images += self._size(there, evaluate=evaluate)[1]
        return tuning + images * _expect(self._images, run.settings)

    def _time_step(self, settings: Settings, backbone: Backbone) -> None:
        """Time steps and an evaluation batch of noise, with the dataset's class names."""
        task, method = self.session.task(settings), get_method(settings.method)
        classifier = new_classifier(backbone, task, method, settings)
        size = backbone.preprocessing.size
        noise = torch.Generator().manual_seed(0)

        def views(count: int) -> torch.Tensor:
            return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=noise)

        batch = min(settings.batch_size, self._support(settings))
        prototypes = torch.zeros(len(task.class_names), classifier.text_features().shape[1])
        tuner = Tuner(classifier, method, loss_weights(settings), prototypes.to(backbone.device))
        labels = torch.zeros(batch, dtype=torch.long)
        seconds = []
        for _ in range(1 + _TIMED):
            started = time.perf_counter()
            tuner.step(views(batch), labels, 0.0, noise)
            seconds.append(time.perf_counter() - started)
        _note(self._steps, settings, median(seconds[1:]))
        count = min(settings.eval_batch_size, len(task.test))
        with torch.inference_mode():
            started = time.perf_counter()
            classifier.image_features(views(count))
            _note(self._images, settings, (time.perf_counter() - started) / count)

    def _tuning_steps(self, settings: Settings) -> int:
        if not row_of(settings).learns:
            return 0
        return settings.epochs * steps_per_epoch(self._support(settings), settings.batch_size)

    def _support(self, settings: Settings) -> int:
        """Support images."""
        return sum(min(count, settings.shots) for count in self._size(settings)[0])

    def _size(self, settings: Settings, *, evaluate: bool = False) -> tuple[list[int], int]:
        """Images to tune on, of each class, and to test on."""
        key = (*task_key(settings), evaluate)
        if key not in self._sizes:
            task = self.session.task(settings, evaluate=evaluate)
            each = Counter(item.label for item in task.train)
            self._sizes[key] = list(each.values()), len(task.test)
        return self._sizes[key]


def _keys(settings: Settings) -> tuple[tuple[str, ...], ...]:
    return (settings.dataset, settings.method), (settings.dataset,), ()


def _note(measured: Measured, settings: Settings, seconds: float) -> None:
    for key in _keys(settings):
        measured[key].append(seconds)


def _expect(measured: Measured, settings: Settings) -> float:
    """Mean of what is nearest, nothing where nothing was measured."""
    return next((fmean(measured[key]) for key in _keys(settings) if key in measured), 0.0)


def duration(seconds: float) -> str:
    """``"about 5 min"``, in the unit a reader would use."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} min"
    if seconds < 48 * 3600:
        return f"about {seconds / 3600:.1f} h"
    return f"about {timedelta(seconds=seconds).days} days"
