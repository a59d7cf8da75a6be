"""What a run is tuned and evaluated on, as its settings say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dapt import data as images
from dapt.data import SupportSet, Task
from dapt.data.grey import Scale, in_words
from dapt.errors import UserError
from dapt.progress import Reporter
from dapt.settings import FITTED, WITHOUT_DATASET, Settings, is_own, make_settings


@dataclass(frozen=True)
class Data:
    """Classes with their images, and those of them that are tuned on."""

    task: Task
    support: SupportSet


def open_data(settings: Settings) -> Data:
    """The task that settings name, and its support set; errors are those of both."""
    task = task_of(settings)
    return Data(task, support_of(settings, task))


def task_of(settings: Settings, *, evaluate: bool = False) -> Task:
    """Open the task that settings name; to evaluate on only, it needs no training images.

    Raises:
        UserError: as `open_task`, or the run's prompts came without a dataset.
    """
    if settings.dataset in WITHOUT_DATASET:
        why, way = WITHOUT_DATASET[settings.dataset], "'dapt eval RUN --dataset ...'"
        raise UserError(f"these prompts were {why}; {way} evaluates them on one")
    task = with_grey(_opened(settings, evaluate), settings)
    return images.subset_classes(task, settings.classes)


def _opened(settings: Settings, evaluate: bool = False) -> Task:
    """Of all classes, and no image looked at."""
    return images.open_task(
        settings.dataset,
        root=Path(settings.root) if settings.root else None,
        domain=settings.domain,
        class_names=Path(settings.class_names) if settings.class_names else None,
        test_fraction=settings.test_fraction,
        evaluate=evaluate,
        multi_label=settings.multi_label,
    )


def with_grey(task: Task, settings: Settings) -> Task:
    """A task with one scale for its grey images of more than 8 bits, for whoever looks at them.

    It is the settings' or, without, what a sample of train images uses.
    """
    return replace(task, grey=settings.grey_range or grey_of(task))


def grey_of(task: Task) -> Scale | None:
    """The scale that a sample of train images uses, None where none is deep; see `scale_for`."""
    return images.sampled_grey([task.source(item) for item in images.spread(task.train)])


def support_of(settings: Settings, task: Task) -> SupportSet:
    """Draw the support set by the protocol, or read the saved one, drawn with as many shots."""
    if settings.support_set:
        support = images.load_support_set(Path(settings.support_set), task)
    else:
        support = images.draw_support_set(task, settings.shots, settings.seed)
    if support.shots != settings.shots:
        raise UserError(
            f"support set {settings.support_set} was drawn with {support.shots} shots; give "
            f"`shots` {support.shots}, or draw another"
        )
    if not support.train:
        raise UserError(f"dataset '{settings.dataset}' has no images to tune on")
    return support


def most_images(settings: Settings) -> int:
    """Images of the largest class that can be tuned on: so many shots take all there are."""
    task = images.subset_classes(_opened(settings), settings.classes)
    return max(images_a_class(task.train), default=1)


def by_images(settings: Settings, given: dict[str, Any]) -> Settings:
    """Settings that were made of what is ``given``, of no more shots than own data has images.

    Those of methods for few images go by shots. A saved support set says by itself how many it has.
    """
    if not is_own(settings.dataset) or settings.dataset == FITTED or settings.support_set:
        return settings
    shots = min(settings.shots, most_images(settings))
    return settings if shots == settings.shots else make_settings({**given, "shots": shots})


def images_a_class(items: Iterable[images.Item]) -> list[int]:
    """How many of the items each class that is among them has, by label."""
    found = Counter(label for item in items for label in item.labels)
    return [found[label] for label in sorted(found)]


def found_in(data: Data, settings: Settings) -> str:
    """How many images there are, what becomes of them, and the options that change it, in words."""
    task, support = data.task, data.support
    labels = range(len(task.class_names))
    every = (*task.train, *task.val, *task.test)
    there = Counter(label for item in every for label in item.labels)
    drawn = Counter(label for item in support.train for label in item.labels)
    used = len(support.train + support.val)
    all_of, some = _range(there[c] for c in labels), _range(drawn[c] for c in labels)
    each = f"all {all_of}" if drawn == there else f"{some} of {all_of}"
    parts = [f"{len(labels):,} classes; {each} images each to tune on"]
    parts += [f"{len(support.val):,} for validation"] if support.val else []
    parts.append(f"{len(task.test):,} to test" if task.test else "none to test")
    parts += ["the rest unused"] if used + len(task.test) < len(every) else []
    more = ["--shots"] if images_a_class(support.train) != images_a_class(task.train) else []
    ways = ["--all", *more] if settings.test_fraction else ["without --all"]
    ways += ["--set test_fraction=0.2"] if task.divided and settings.test_fraction else []
    return f"{', '.join(parts)} (to change it: {', '.join(ways)})"


def _range(counts: Iterable[int]) -> str:
    found = sorted(counts)
    return " to ".join(f"{count:,}" for count in dict.fromkeys((found[0], found[-1])))


def tell_notes(task: Task, reporter: Reporter) -> None:
    """Warn of what its reader found odd in a task, and of a scale of grey that is not 16 bits."""
    for note in task.notes:
        reporter.warn(note)
    if task.grey not in (None, (0, 65535)):
        said = f"grey images of more than 8 bits are seen from {in_words(task.grey)}"
        reporter.warn(f"{said} (what train images use, or the setting grey_range=[low,high])")


def tell_of_overlap(data: Data, tested: Task, reporter: Reporter) -> list[dict[str, str]]:
    """Warn of support images that are ``tested`` on, and return a record of them."""
    if both := images.images_in_both(data.task, data.support, tested):
        first, same = both[0]
        count = len(data.support.train) + len(data.support.val)
        reporter.warn(
            f"{len({a.path for a, _ in both}):,} of {count:,} support images are test images of "
            f"'{tested.name}' too (such as {first.path}, the same file as {same.path}); the "
            "accuracy says too much of them: take them out of one part"
        )
    return [{"support": a.path, "test": b.path} for a, b in both]
