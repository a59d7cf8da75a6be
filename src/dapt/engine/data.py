"""What a run is tuned and evaluated on, as its settings say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dapt import data as images
from dapt.data import SupportSet, Task
from dapt.data.grey import Scale, in_words
from dapt.errors import UserError
from dapt.progress import Reporter
from dapt.settings import WITHOUT_DATASET, Settings


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
    task = images.open_task(
        settings.dataset,
        root=Path(settings.root) if settings.root else None,
        domain=settings.domain,
        class_names=Path(settings.class_names) if settings.class_names else None,
        evaluate=evaluate,
        multi_label=settings.multi_label,
    )
    return images.subset_classes(with_grey(task, settings), settings.classes)


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
            f"--shots {support.shots}, or draw another"
        )
    if not support.train:
        raise UserError(f"dataset '{settings.dataset}' has no images to tune on")
    return support


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
