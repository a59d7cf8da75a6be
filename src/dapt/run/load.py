"""What is read back from a run directory: its classifier, and the images it was tuned on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import cast

import torch

from dapt.clip.backbone import Backbone
from dapt.data import SupportSet, Task, load_support_set, support_digest
from dapt.engine.classifier import SIGMOIDS, Classifier, new_classifier
from dapt.engine.data import Data
from dapt.engine.features import backbone_of
from dapt.engine.processes import keep_freed_memory
from dapt.errors import UserError
from dapt.methods import TowerPart, get_method
from dapt.run.directory import RunDirectory
from dapt.run.records import TaskRecord
from dapt.settings import Settings


def load_classifier(
    run: RunDirectory,
    task: Task | None = None,
    *,
    backbone: Backbone | None = None,
    device: str | None = None,
) -> Classifier:
    """Load the tuned classifier of a finished run.

    Args:
        task: a task with other classes than those it was tuned on, if the method allows that.
        backbone: a loaded backbone to share.
        device: device to run on, if not the one it was tuned on.
    """
    run.require()
    keep_freed_memory()
    settings, own = run.read_settings(), run.read_task()
    backbone = backbone or backbone_of(settings, device=device, revision=run.revision())
    run.require_backbone(backbone)
    tensors, _ = run.read_tensors(run.prompts_file)
    where = str(run.prompts_file)
    parts = (settings, tensors, backbone, task or own, where, own.class_names)
    found = classifier_of(*parts, multilabel=own.multilabel)
    found.grey = own.grey  # whatever the images, they are seen as those it was tuned on
    return found


def classifier_of(
    settings: Settings,
    tensors: dict[str, torch.Tensor],
    backbone: Backbone,
    task: Task | TaskRecord,
    where: str,
    own_names: Sequence[str] | None = None,
    *,
    multilabel: bool = False,
) -> Classifier:
    """A classifier of what was learned or fitted.

    Args:
        tensors: as `Classifier.tensors` gave them, from the file ``where``.
        task: classes, and a template for them where the text prompt is not learned.
        own_names: of the classes it was tuned on, if these are others.
        multilabel: whether it was tuned on several labels an image.

    A `UserError` says that tensors are not what the method learns, or do not fit the backbone, or
    that its head knows no other classes.
    """
    method, names = get_method(settings.method), task.class_names
    others = own_names is not None and list(names) != list(own_names)
    if multilabel and others:
        what = f"{where} gives several labels an image, by thresholds of its own classes"
        raise UserError(f"{what}; train again for others")
    classifier = new_classifier(
        backbone, names, task.template, method, settings, multilabel=multilabel, tuned=True
    )
    if others and (closed := classifier.closed(settings)):
        raise UserError(f"{where} is of {closed}; use prompts that all classes share for others")
    if classifier.sigmoids is not None:
        own = {n.removeprefix(SIGMOIDS): t for n, t in tensors.items() if n.startswith(SIGMOIDS)}
        classifier.sigmoids.load(own, where)
        tensors = {n: t for n, t in tensors.items() if not n.startswith(SIGMOIDS)}
    learned, head, classifier.grey = classifier.learned(), classifier.head, task.grey
    fitted = {name: tensor for name, tensor in tensors.items() if name not in learned}
    if not learned.keys() <= tensors.keys() or (fitted and not head.fitted):
        what = f"what method '{settings.method}' learns"
        raise UserError(f"{where} does not hold {what}; train again")
    for part in classifier.parts:
        cast(TowerPart, part).load(tensors, backbone, where)
        if others:
            cast(TowerPart, part).for_others()
    classifier.requires_grad_(False)
    if head.fitted:
        size = backbone.preprocessing.size
        with torch.inference_mode():
            seen = classifier.image_features(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        own_names = own_names if own_names is not None else names
        known = own_names if head.carries else names
        head.load(fitted, len(known), seen.shape[1], where)
        head.to(backbone.device)
        if head.carries:
            head.carry(own_names, names, classifier.text_features())
    return classifier


def same_images(run: RunDirectory, data: Data) -> bool:
    """Whether support images are still what a finished run was tuned on, as far as it recorded."""
    recorded = run.read_metrics().support_sha256
    return recorded in (None, support_digest(data.task, data.support))


def known_support(run: RunDirectory, task: Task) -> SupportSet:
    """A run's support set, if its images are still those that it was tuned on.

    To be asked before images are shown: a stranger's run may name any folder of whoever opens it,
    but cannot know what is in the images there. Raises a `UserError` if they are not the same.
    """
    support = load_support_set(run.support_file, task)
    recorded, found = run.read_metrics().support_sha256, support_digest(task, support)
    if list(task.class_names) != run.read_task().class_names or found is None or recorded != found:
        what = f"the images in {task.root} are not known to be those that {run.path} was tuned on"
        raise UserError(f"{what}, so none of them is shown")
    return support


def unseen(run: RunDirectory, task: Task, tell: Callable[[str], None]) -> Task:
    """The task without test images that the run was tuned on, of which ``tell`` is told.

    A folder to which photos were added is divided anew, into other halves than those of then.
    """
    with suppress(UserError):  # of a run that does not say which they were
        support = load_support_set(run.support_file, replace(task, test=()))
        seen = {item.path for item in (*support.train, *support.val)}
        left = tuple(item for item in task.test if item.path not in seen)
        if count := len(task.test) - len(left):
            tell(
                f"{count:,} of {len(task.test):,} test images are left out: the run was tuned on "
                f"them, and '{task.name}' has changed since; train again for a full test"
            )
            return replace(task, test=left)
    return task
