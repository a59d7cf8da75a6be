"""How well a classifier does on images, in figures, and what tuning did to its features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, f1_score, top_k_accuracy_score
from torch import Tensor

from dapt.clip.backbone import Backbone
from dapt.data import ImageStore, Task
from dapt.engine.classifier import Classifier, new_classifier
from dapt.engine.features import Shared, encode_store, labels_of, require_finite
from dapt.engine.fit import Tuned
from dapt.errors import UserError
from dapt.methods import ZERO_SHOT, get_method
from dapt.methods.class_vectors import ClassVectors
from dapt.progress import Advance, Reporter, nothing
from dapt.settings import Settings

ECE_BINS = 15

# Rows of logits or distances that are held at once: at 20,000 classes, 80 MB.
_ROWS = 1000


def classify(
    classifier: Classifier, store: ImageStore, *, batch_size: int = 100, advance: Advance = nothing
) -> Tensor:
    """(n, C) logits of every image in ``store``; class features are computed once."""
    features = encode_store(classifier.encode, store, batch_size=batch_size, advance=advance)
    return torch.cat(list(logits_of(classifier, features)))


def logits_of(classifier: Classifier, image_features: Tensor) -> Iterator[Tensor]:
    """Logits (r, C) of image features (n, D) that the classifier, or its like, made.

    Some rows at a time, on the CPU: tens of thousands of images and classes make more logits than
    memory holds. Whoever made the features, a row meets the same product, and so the same bits.
    """
    with torch.inference_mode():
        text = classifier.text_features()
        require_finite(text, "class features")
        own = None if classifier.reads_images else text
        for rows in image_features.split(_ROWS):
            yield classifier.logits(rows.to(text.device), own).cpu().clone()


def metrics(
    logits: Iterable[Tensor], labels: Sequence[int], class_names: Sequence[str]
) -> dict[str, Any]:
    """Figures of a classifier on labelled images; all are fractions, none percent.

    Logits (r, C) are of some images after the other, as `logits_of` gives them, n in all; labels
    n numbers in 0 .. C-1. ``top5`` is there if there are more than five classes, ``macro_f1`` is
    over the classes present, ``ece`` is `calibration_error`, ``per_class`` is in label order, and
    ``confusion`` has the entries of the confusion matrix that are not zero.
    """
    classes, truth = len(class_names), np.asarray(labels)
    best, confidences, in_five, done = [], [], 0, 0
    five = {"k": 5, "labels": range(classes), "normalize": False}
    for block in logits:
        probabilities = block.double().softmax(-1).numpy()
        true = truth[done : (done := done + len(probabilities))]
        best.append(probabilities.argmax(-1))
        confidences.append(probabilities.max(-1))
        if classes > 5:
            in_five += top_k_accuracy_score(true, probabilities, **five)
    predicted, confidence = np.concatenate(best), np.concatenate(confidences)
    correct = predicted == truth
    result: dict[str, Any] = {"images": len(truth), "accuracy": float(correct.mean())}
    if classes > 5:
        result["top5"] = float(in_five / len(truth))
    result["macro_f1"] = float(
        f1_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0)
    )
    result["ece"] = calibration_error(confidence, correct)
    totals = [np.bincount(t, minlength=classes).tolist() for t in (truth, truth[correct])]
    result["per_class"] = [
        {"class": name, "images": images, "accuracy": right / images if images else None}
        for name, images, right in zip(class_names, *totals, strict=True)
    ]
    pairs, counts = np.unique(np.stack([truth, predicted]), axis=1, return_counts=True)
    columns = zip(("true", "predicted", "images"), (*pairs, counts), strict=True)
    result["confusion"] = {name: column.tolist() for name, column in columns}
    return result


def metrics_of_several(
    logits: Tensor, labels: Tensor, thresholds: Tensor, class_names: Sequence[str]
) -> dict[str, Any]:
    """Figures of a classifier on images of several labels each; all are fractions.

    Logits and labels (n, C), 0 or 1; thresholds (C,) of probabilities. ``accuracy`` is the share of
    images of which exactly the true labels are named, ``map`` the mean of average precisions (as
    scikit-learn has them) over classes with images, ``micro_f1`` and ``macro_f1`` are at the
    thresholds, over all labels and as a mean over the same classes. ``per_class`` has a class's
    images, the share of them that it is named of, and its average precision ``ap``.
    """
    truth, named = labels.numpy(), (logits.sigmoid() >= thresholds).numpy()
    totals, known = labels.sum(0).int().tolist(), truth.sum(0) > 0
    rights = (truth * named).sum(0).tolist()
    aps = [
        float(average_precision_score(truth[:, c], logits[:, c].numpy())) if known[c] else None
        for c in range(len(class_names))
    ]
    f1 = {
        f"{how}_f1": float(f1_score(truth[:, kept], named[:, kept], average=how, zero_division=0))
        for how, kept in (("micro", slice(None)), ("macro", known))
    }
    return {
        "images": len(truth),
        "accuracy": float(np.all(truth == named, 1).mean()),
        "map": float(np.mean([ap for ap in aps if ap is not None])),
        **f1,
        "per_class": [
            {"class": name, "images": images, "accuracy": right / images if images else None,
             **({} if ap is None else {"ap": ap})}
            for name, images, right, ap in zip(class_names, totals, rights, aps, strict=True)
        ],
    }  # fmt: skip


def calibration_error(
    confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Expected calibration error (Guo et al., 2017): gap of confidence and accuracy, by bins.

    Confidence (n,) is the probability of the class named, ``correct`` (n,) whether it is true;
    images count by ``weights`` (n,), which sum to one, or all alike. The `ECE_BINS` bins are of
    equal width.
    """
    which = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = confidence - correct
    if weights is None:
        weights = np.full(len(gaps), 1 / len(gaps))
    return float(np.abs(np.bincount(which, weights * gaps)).sum())


def mean_text_distance(text_features: Tensor) -> float:
    """Mean Euclidean distance between two classes' text features (C, D): inter-dispersion."""
    w, count, total = text_features.float(), len(text_features), 0.0
    for first in range(0, count, _ROWS):
        # By differences: products would lose what is nearly equal.
        how = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(w[first : first + _ROWS], w[first:], compute_mode=how)
        total += float(distances.triu(1).double().sum())
    return total / max(count * (count - 1) / 2, 1)


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

    `metrics_of_several`, of a classifier that gives images several labels. A `UserError` says that
    there are none, that images have several labels and the classifier gives one, or as
    `Shared.encode`.
    """
    if task.multilabel and classifier.thresholds is None:
        what = f"images of '{task.name}' have several labels, and the classifier gives them one"
        raise UserError(f"{what}; use one that was trained on such images")
    if not task.test:
        raise UserError(f"dataset '{task.name}' has no test images to evaluate on")
    shared = shared or Shared(classifier.backbone)
    found = shared.encode(task, task.test, settings, classifier, reporter=reporter)
    logits, names = logits_of(classifier, found.features), task.class_names
    if (thresholds := classifier.thresholds) is not None:
        labels = labels_of(found.items, len(names))
        result = metrics_of_several(torch.cat(list(logits)), labels, thresholds, names)
    else:
        result = metrics(logits, found.labels.tolist(), names)
    return {**result, "skipped": found.skipped}


def evaluate_zero_shot(
    task: Task, settings: Settings, reporter: Reporter, shared: Shared
) -> dict[str, Any]:
    """As `evaluate_task`, of the bare backbone with the template's words, which fits nothing.

    It looks once, whatever the settings say.
    """
    how, kind = (shared.backbone, task.class_names, task.template), task.multilabel
    classifier = _zero_shot(*how, settings, multilabel=kind)
    return evaluate_task(classifier, task, settings, reporter, shared)


def _zero_shot(
    backbone: Backbone,
    names: Sequence[str],
    template: str,
    settings: Settings,
    *,
    multilabel: bool = False,
) -> Classifier:
    row, settings = get_method(ZERO_SHOT), settings.model_copy(update={"looks": 1})
    return new_classifier(backbone, names, template, row, settings, multilabel=multilabel)


def dispersion(tuned: Tuned) -> dict[str, dict[str, float]]:
    """Inter- and intra-dispersion, means of distances, before and after tuning; empty without any.

    Class text features are in the template's words before, in the learned context after; vectors
    that are learned in their place start at the support images' means.
    """
    settings, own, support = tuned.settings, tuned.classifier, tuned.support
    method = get_method(settings.method)
    if not method.learns:
        return {}
    labels, prototypes = support.labels, own.as_own(support.prototypes)
    plain = own  # where the words are not learned, they are those before
    if method.changes("text") and own.backbone.reads_text:
        plain = _zero_shot(own.backbone, own.class_names, own.template, settings)
    with torch.inference_mode():
        classes = [c.text_features().cpu() for c in (plain, own)]
    if vectors := [part for part in own.parts if isinstance(part, ClassVectors)]:
        classes[0] = vectors[0].first(prototypes)
    text = [mean_text_distance(each) for each in classes]
    features = (own.as_own(support.features), support.features_of(own, settings, looks=False))
    image = [mean_prototype_distance(z, labels, prototypes) for z in features]
    found = {"inter": text, "intra": image}
    return {name: {"before": before, "after": after} for name, (before, after) in found.items()}
