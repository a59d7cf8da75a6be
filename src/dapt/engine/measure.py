"""How well a classifier does on a task, and what tuning did to its features."""

from __future__ import annotations

from typing import Any

import torch

from dapt.data import Task
from dapt.engine.classifier import Classifier, new_classifier
from dapt.engine.data import skip_unreadable
from dapt.engine.evaluate import (
    encode_store,
    logits_of,
    mean_prototype_distance,
    mean_text_distance,
    metrics,
)
from dapt.engine.fit import Tuned
from dapt.engine.shared import Shared
from dapt.errors import UserError
from dapt.methods import ZERO_SHOT, get_method
from dapt.progress import Reporter
from dapt.settings import Settings, text_memory


def evaluate_task(
    classifier: Classifier,
    task: Task,
    settings: Settings,
    reporter: Reporter | None = None,
    shared: Shared | None = None,
) -> dict[str, Any]:
    """`metrics` of a classifier on a task's test images, and ``skipped``, those left out.

    Images that cannot be read are left out, unless settings are strict.

    Raises:
        UserError: the task has no test images; one cannot be read, and settings are strict or
            none can.
    """
    if not task.test:
        raise UserError(f"dataset '{task.name}' has no test images to evaluate on")
    shared, reporter = shared or Shared(classifier.backbone), reporter or Reporter()
    unreadable: dict[int, str] | None = None if settings.strict else {}
    with reporter.stage("evaluating", len(task.test)) as advance:
        if classifier.changes_images:
            features = encode_store(
                classifier.image_features,
                shared.store(task, task.test, settings),
                batch_size=settings.eval_batch_size,
                advance=advance,
                unreadable=unreadable,
            )
        else:
            features = shared.features(task, task.test, settings, advance, unreadable)
    kept, skipped = skip_unreadable(task.test, unreadable or {}, "test", reporter)
    labels = [task.test[i].label for i in kept]
    logits = logits_of(classifier, features[kept] if skipped else features)
    return {**metrics(logits, labels, task.class_names), "skipped": skipped}


def evaluate_zero_shot(
    task: Task, settings: Settings, reporter: Reporter, shared: Shared
) -> dict[str, Any]:
    """`metrics` of the bare backbone, with the template's words, on a task's test images.

    Raises:
        UserError: the task has no test images.
    """
    method = get_method(ZERO_SHOT)
    classifier = new_classifier(shared.backbone, task.class_names, task.template, method, settings)
    return evaluate_task(classifier, task, settings, reporter, shared)


def dispersion(tuned: Tuned) -> dict[str, dict[str, float]]:
    """Mean inter- and intra-dispersion before and after tuning; empty where nothing was tuned.

    Inter: mean distance between class text features, in the template before, in the learned
    context after. Intra: mean distance of support images to their class prototype.
    """
    settings, classifier, support = tuned.settings, tuned.classifier, tuned.support
    method = get_method(settings.method)
    if not method.learns:
        return {}
    after = support.features
    if classifier.changes_images:
        after = encode_store(
            classifier.image_features, support.store, batch_size=settings.eval_batch_size
        )
    plain = classifier  # where the words are not learned, they are those before
    if method.changes("text"):
        plain = Classifier(
            classifier.backbone,
            classifier.class_names,
            template=classifier.template,
            text_memory=text_memory(settings),
        )
    with torch.inference_mode():
        text = [mean_text_distance(c.text_features().cpu()) for c in (plain, classifier)]
    labels, prototypes = support.labels, support.prototypes
    image = [mean_prototype_distance(z, labels, prototypes) for z in (support.features, after)]
    return {
        "inter": {"before": text[0], "after": text[1]},
        "intra": {"before": image[0], "after": image[1]},
    }
