"""From a suite to a list of runs, what has been done of it, and how long the rest will take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path

import torch

from dapt.clip.backbone import Backbone
from dapt.data import Task
from dapt.engine.step import Tuner
from dapt.errors import UserError
from dapt.grid.suite import Suite
from dapt.methods import get_method
from dapt.run.directory import RunDirectory
from dapt.run.train import check_output, new_classifier, steps_per_epoch, task_of
from dapt.run.transfer import Target, recorded
from dapt.safe.files import user_path
from dapt.settings import Settings, absolute_paths, loss_weights, make_settings

DONE, FAILED, BEGUN, NEW = "done", "failed", "unfinished", "to do"


@dataclass(frozen=True)
class PlannedRun:
    """One run of a grid: where it goes, its settings, and the evaluations after it.

    The path is its identity.
    """

    path: Path
    title: str = field(compare=False)
    settings: Settings = field(compare=False)
    targets: tuple[Target, ...] = field(compare=False)

    @property
    def directory(self) -> RunDirectory:
        """Its run directory."""
        return RunDirectory(self.path)

    @property
    def group(self) -> tuple[str | None, ...]:
        """Runs that are equal in this share a backbone and a task."""
        s = self.settings
        return (s.backbone, s.pretrained, s.device, s.precision, *task_key(s))

    def twin(self) -> RunDirectory | None:
        """A finished run of the same settings that another suite left in the same results.

        Suites that tune on the same source differ in what they evaluate on alone.
        """
        dataset, _, leaf = self.path.parts[-3:]
        for path in sorted(self.path.parents[3].glob(f"*/{escape(dataset)}/*/{escape(leaf)}")):
            other = RunDirectory(path)
            if path == self.path or not (other.exists and other.finished):
                continue
            with suppress(UserError):  # written by another version
                if other.read_settings() == self.settings:
                    return other
        return None

    def state(self) -> str:
        """`DONE` with all its evaluations, given up (`FAILED`), `BEGUN` or `NEW`."""
        run = self.directory
        if run.exists and run.finished and all(recorded(run, t) for t in self.targets):
            return DONE
        if run.failure_file.is_file():
            return FAILED
        return BEGUN if run.exists else NEW


@dataclass(frozen=True)
class Plan:
    """Runs of a grid, in the order they are done; those that share the most stand together."""

    name: str
    folder: Path
    runs: tuple[PlannedRun, ...]
    same: int = 0  # runs left out, as an earlier column has the same settings


def task_key(settings: Settings) -> tuple[str | None, ...]:
    """What decides which task settings open."""
    s = settings
    return (s.dataset, s.root, s.domain, s.class_names, s.classes)


def make_plan(suite: Suite, output: Path | str) -> Plan:
    """Lay a suite out under ``output``: ``<suite>/<dataset>/<column>/<k>shots-seed<s>``.

    Zero-shot learns nothing, so one run of it stands for every number of shots and every seed.

    Raises:
        UserError: settings are impossible, two datasets share a name, or a run directory holds a
            run with other settings.
    """
    folder = user_path(output).resolve() / suite.name
    runs: list[PlannedRun] = []
    seen: set[tuple[str, tuple[Target, ...]]] = set()
    datasets: dict[str, str] = {}
    same = 0
    for dataset in dict.fromkeys(suite.datasets):
        name = user_path(dataset).resolve().stem
        if name in datasets:
            raise UserError(
                f"datasets {datasets[name]} and {dataset} would share the folder {folder / name}; "
                "rename one"
            )
        datasets[name] = dataset
        still: set[str] = set()  # columns that learn nothing and have their run
        for shots in dict.fromkeys(suite.shots):
            for seed in dict.fromkeys(suite.seeds):
                for column, changes in suite.columns().items():
                    # A column that sets its own number of shots has one run a seed.
                    if "shots" in changes and shots != suite.shots[0]:
                        continue
                    grid = {"dataset": dataset, "shots": shots, "seed": seed}
                    settings = make_settings(absolute_paths({**suite.settings, **grid, **changes}))
                    if not (get_method(settings.method).learns_prompts or _is_probe(settings)):
                        if column in still:
                            continue
                        still.add(column)
                    targets = _targets(suite, settings)
                    key = (settings.model_dump_json(), targets)
                    if key in seen:
                        same += 1
                        continue
                    seen.add(key)
                    place = Path(name, column, f"{settings.shots}shots-seed{seed}")
                    runs.append(PlannedRun(folder / place, place.as_posix(), settings, targets))
    for run in runs:
        check_output(run.directory, run.settings, resume=True, overwrite=False)
    return Plan(suite.name, folder, tuple(runs), same)


def _is_probe(settings: Settings) -> bool:
    return get_method(settings.method).probe


def _targets(suite: Suite, settings: Settings) -> tuple[Target, ...]:
    """Where to evaluate a run with these settings; its own test images are left out."""
    own = task_key(settings)
    targets = []
    for evaluation in suite.evaluations:
        target = Target(**absolute_paths(evaluation.model_dump()))
        there = target.settings(settings)
        if task_key(there) == own:
            continue
        if _is_probe(settings) and target.dataset is None and there.classes != settings.classes:
            raise UserError(
                f"method '{settings.method}' knows only the classes it was fitted on and cannot be "
                f"evaluated on {there.classes} ones; take it out of the suite's methods"
            )
        targets.append(target)
    return tuple(targets)


# ------------------------------------------------------------------------------ how long


@dataclass
class Estimator:
    """Seconds that runs will take, by those that are done or else by timing a step.

    Runs of one dataset and method are taken to cost the same a step, and the same an image that
    they are evaluated on.
    """

    open_task: Callable[..., Task] = task_of
    _steps: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    _images: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    _sizes: dict[tuple[object, ...], tuple[list[int], int]] = field(default_factory=dict)

    def observe(self, run: PlannedRun) -> None:
        """Learn from a run that is finished."""
        spent = run.directory.read_environment()
        key = (run.settings.dataset, run.settings.method)
        steps, (_, images) = self.steps(run.settings), self._size(run.settings)
        tuning, evaluation = (
            seconds if isinstance(seconds := spent.get(f"{what}_seconds"), float) else 0.0
            for what in ("tuning", "evaluation")
        )
        if steps and tuning:
            self._steps.setdefault(key, []).append(tuning / steps)
        self._images.setdefault(key, []).append(evaluation / images)

    def knows(self, dataset: str) -> bool:
        """Whether a run that learns prompts on this dataset was observed or timed."""
        return any(known == dataset for known, _ in self._steps)

    def time_step(self, run: PlannedRun, backbone: Backbone) -> None:
        """Time a step and an evaluation batch of noise, with the dataset's class names."""
        settings, task = run.settings, self.open_task(run.settings)
        method = get_method(settings.method)
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
        for _ in range(2):  # the first pays for memory and kernels
            started = time.perf_counter()
            tuner.step(views(batch), labels, 0.0, noise)
            seconds.append(time.perf_counter() - started)
        key = (settings.dataset, settings.method)
        self._steps.setdefault(key, []).append(seconds[-1])
        count = min(settings.eval_batch_size, len(task.test))
        with torch.inference_mode():
            started = time.perf_counter()
            classifier.image_features(views(count))
            self._images.setdefault(key, []).append((time.perf_counter() - started) / count)

    def seconds(self, run: PlannedRun) -> float:
        """Expected duration of a run, with its evaluations.

        Raises:
            UserError: its task cannot be opened; a target that cannot is not counted.
        """
        key = (run.settings.dataset, run.settings.method)
        images, tuning = 0, 0.0
        if run.twin() is None:
            images = self._size(run.settings)[1]
            tuning = self.steps(run.settings) * _nearest_mean(self._steps, key)
        for target in run.targets:
            with suppress(UserError):
                there = target.settings(run.settings)
                images += self._size(there, evaluate=target.dataset is not None)[1]
        return tuning + images * _nearest_mean(self._images, key)

    def steps(self, settings: Settings) -> int:
        """Tuning steps of a run."""
        if not get_method(settings.method).learns_prompts:
            return 0
        return settings.epochs * steps_per_epoch(self._support(settings), settings.batch_size)

    def _support(self, settings: Settings) -> int:
        """Support images."""
        return sum(min(count, settings.shots) for count in self._size(settings)[0])

    def _size(self, settings: Settings, *, evaluate: bool = False) -> tuple[list[int], int]:
        """Images to tune on, of each class, and to test on."""
        key = (*task_key(settings), evaluate)
        if key not in self._sizes:
            task = self.open_task(settings, evaluate=evaluate)
            each = Counter(item.label for item in task.train)
            self._sizes[key] = list(each.values()), len(task.test)
        return self._sizes[key]


def _nearest_mean(known: dict[tuple[str, str], list[float]], key: tuple[str, str]) -> float:
    """Mean for this dataset and method, else for the dataset, else for all, else nothing."""
    for values in (
        known.get(key, []),
        [v for (dataset, _), vs in known.items() if dataset == key[0] for v in vs],
        [v for vs in known.values() for v in vs],
    ):
        if values:
            return sum(values) / len(values)
    return 0.0


def heaviest(runs: Iterable[PlannedRun]) -> PlannedRun | None:
    """A run whose step is the most work: with both prompts, if there is one."""
    learning = [r for r in runs if get_method(r.settings.method).learns_prompts]

    def prompts(run: PlannedRun) -> int:
        method = get_method(run.settings.method)
        return method.text + method.visual

    return max(learning, key=prompts, default=None)
