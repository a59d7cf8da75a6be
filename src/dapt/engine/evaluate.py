"""Features and logits of a classifier on images, and the figures that sum them up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score, top_k_accuracy_score
from torch import Tensor

from dapt.clip.backbone import Backbone
from dapt.clip.image import image_features
from dapt.data import ImageStore
from dapt.engine.classifier import Classifier
from dapt.errors import UserError
from dapt.progress import Advance, nothing

ECE_BINS = 15

# Rows of logits or distances that are held at once: at 20,000 classes, 80 MB.
_ROWS = 1000


def chunks(count: int, size: int) -> list[list[int]]:
    """Indices 0 .. count-1 in order, ``size`` at a time."""
    return [list(range(i, min(i + size, count))) for i in range(0, count, size)]


def encode_store(
    encode: Callable[[Tensor], Tensor],
    store: ImageStore,
    *,
    batch_size: int = 100,
    advance: Advance = nothing,
    unreadable: dict[int, str] | None = None,
) -> Tensor:
    """Run ``encode`` on the test views of every image in ``store``: (n, D) in fp32 on the CPU.

    Decoding runs ahead of the model in other threads. Rows of images that ``unreadable`` comes to
    name (see `ImageStore.batches`) mean nothing.

    Raises:
        UserError: an image cannot be read, and there is no ``unreadable``.
    """
    features = []
    with torch.inference_mode():
        for views in store.batches(chunks(len(store), batch_size), unreadable=unreadable):
            features.append(encode(views))
            advance(len(views))
    # Copied from the device once, not batch by batch, each of which would wait for it. A clone is
    # an ordinary tensor, which later gradient computations may use.
    found = torch.cat(features).cpu().clone()
    require_finite(found, "image features")
    return found


def require_finite(values: Tensor, what: str) -> None:
    """Raise `UserError` where a model gives what is no number: nothing can be told from it."""
    if not bool(values.isfinite().all()):
        raise UserError(
            f"the model's {what} are not finite numbers; its weights are damaged, its --precision "
            "is too low for them, or tuning diverged (train again with a smaller --lr)"
        )


def unprompted_features(
    backbone: Backbone,
    store: ImageStore,
    *,
    batch_size: int = 100,
    advance: Advance = nothing,
    unreadable: dict[int, str] | None = None,
) -> Tensor:
    """(n, D) normalised features without any prompt, on the CPU; as `encode_store`."""
    return encode_store(
        lambda views: image_features(backbone, views),
        store,
        batch_size=batch_size,
        advance=advance,
        unreadable=unreadable,
    )


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
