"""How well a classifier does on images, in figures, and what tuning did to its features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score, top_k_accuracy_score
from torch import Tensor

from dapt.data import ImageStore, Task
from dapt.engine.classifier import Classifier, new_classifier
from dapt.engine.features import Shared, encode_store, require_finite
from dapt.engine.fit import Tuned
from dapt.errors import UserError
from dapt.methods import ZERO_SHOT, get_method
from dapt.progress import Advance, Reporter, nothing
from dapt.settings import Settings, text_memory

ECE_BINS = 15

# Rows of logits or distances that are held at once: at 20,000 classes, 80 MB.
_ROWS = 1000


def classify(
    classifier: Classifier,
    store: ImageStore,
    *,
    batch_size: int = 100,
    advance: Advance = nothing,
) -> Tensor:
    """(n, C) logits of every image in ``store``; class features are computed once."""
    features = encode_store(
        classifier.image_features, store, batch_size=batch_size, advance=advance
    )
    return torch.cat(list(logits_of(classifier, features)))


def logits_of(classifier: Classifier, image_features: Tensor) -> Iterator[Tensor]:
    """Logits (r, C) of image features (n, D) that the classifier, or its like, made.

    Some rows at a time, on the CPU: tens of thousands of images and classes make more logits than
    memory holds. Whoever made the features, a row meets the same product, and so the same bits.
    """
    with torch.inference_mode():
        text = classifier.text_features()
        require_finite(text, "class features")
        for rows in image_features.split(_ROWS):
            yield classifier.logits(rows.to(text.device), text).cpu().clone()


def metrics(
    logits: Iterable[Tensor], labels: Sequence[int], class_names: Sequence[str]
) -> dict[str, Any]:
    """Figures of a classifier on labelled images.

    Args:
        logits: (r, C) of some images after the other, n in all; as `logits_of` gives them.
        labels: n labels in 0 .. C-1.
        class_names: C names.

    Returns:
        ``images``, ``accuracy`` (top-1), ``top5`` where there are more than five classes,
        ``macro_f1`` over the classes present, ``ece`` (expected calibration error, 15 bins of
        equal width), ``per_class`` in label order (accuracy None without images) and
        ``confusion``, the confusion matrix's entries that are not zero, by rows: ``true`` and
        ``predicted`` labels and the number of ``images``. All fractions, none percent.
    """
    classes, truth = len(class_names), np.asarray(labels)
    best, confidences, in_five, done = [], [], 0, 0
    for block in logits:
        probabilities = block.double().softmax(-1).numpy()
        true = truth[done : (done := done + len(probabilities))]
        best.append(probabilities.argmax(-1))
        confidences.append(probabilities.max(-1))
        if classes > 5:
            in_five += top_k_accuracy_score(
                true, probabilities, k=5, labels=range(classes), normalize=False
            )
    predicted, confidence = np.concatenate(best), np.concatenate(confidences)
    correct = predicted == truth
    result: dict[str, Any] = {"images": len(truth), "accuracy": float(correct.mean())}
    if classes > 5:
        result["top5"] = float(in_five / len(truth))
    result["macro_f1"] = float(
        f1_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0)
    )
    result["ece"] = calibration_error(confidence, correct)
    totals = np.bincount(truth, minlength=classes)
    right = np.bincount(truth[correct], minlength=classes)
    result["per_class"] = [
        {
            "class": name,
            "images": int(totals[i]),
            "accuracy": float(right[i] / totals[i]) if totals[i] else None,
        }
        for i, name in enumerate(class_names)
    ]
    pairs, counts = np.unique(np.stack([truth, predicted]), axis=1, return_counts=True)
    columns = zip(("true", "predicted", "images"), (*pairs, counts), strict=True)
    result["confusion"] = {name: column.tolist() for name, column in columns}
    return result


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = ECE_BINS) -> float:
    """Expected calibration error (Guo et al., 2017): gap of confidence and accuracy, by bins.

    Args:
        confidence: (n,) probabilities of the classes that were named.
        correct: (n,) whether they are the true ones.
        bins: number of equal-width bins of confidence.
    """
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    error = 0.0
    for b in range(bins):
        inside = which == b
        if inside.any():
            gap = abs(confidence[inside].mean() - correct[inside].mean())
            error += float(inside.mean() * gap)
    return error


def mean_text_distance(text_features: Tensor) -> float:
    """Mean Euclidean distance between two classes' text features (C, D): inter-dispersion."""
    w, count = text_features.float(), len(text_features)
    if count < 2:
        return 0.0
    total = 0.0
    for first in range(0, count, _ROWS):
        rows = w[first : first + _ROWS]
        # By differences: products would lose what is nearly equal.
        distances = torch.cdist(rows, w[first:], compute_mode="donot_use_mm_for_euclid_dist")
        total += float(distances.triu(1).double().sum())
    return total / (count * (count - 1) / 2)


def mean_prototype_distance(features: Tensor, labels: Tensor, prototypes: Tensor) -> float:
    """Mean Euclidean distance of features (n, D) to their class prototype: intra-dispersion."""
    return float((features - prototypes[labels]).norm(dim=-1).mean())


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
    with reporter.stage("evaluating", len(task.test)) as advance:
        found = shared.encode(
            task, task.test, settings, classifier, reporter=reporter, advance=advance
        )
    logits = logits_of(classifier, found.features)
    labels = found.labels.tolist()
    return {**metrics(logits, labels, task.class_names), "skipped": found.skipped}


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
        size = settings.eval_batch_size
        after = encode_store(classifier.image_features, support.store, batch_size=size)
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
