"""Features and logits of a classifier on images, and the figures that sum them up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, f1_score, top_k_accuracy_score
from torch import Tensor

from dapt.backbone import Backbone
from dapt.classifier import Classifier, image_features
from dapt.data import ImageStore
from dapt.progress import Advance, nothing

ECE_BINS = 15


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
            features.append(encode(views).cpu())
            advance(len(views))
    # A clone is an ordinary tensor, which later gradient computations may use.
    return torch.cat(features).clone()


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
    return logits_of(classifier, features)


def logits_of(classifier: Classifier, image_features: Tensor) -> Tensor:
    """(n, C) logits, on the CPU, of image features (n, D) that the classifier, or its like, made.

    One product over all images, whoever made the features: the same bits either way.
    """
    with torch.inference_mode():
        text = classifier.text_features()
        logits = classifier.logits(image_features.to(text.device), text).cpu()
    return logits.clone()


def metrics(logits: Tensor, labels: Sequence[int], class_names: Sequence[str]) -> dict[str, Any]:
    """Figures of a classifier on labelled images.

    Args:
        logits: (n, C).
        labels: n labels in 0 .. C-1.
        class_names: C names.

    Returns:
        ``images``, ``accuracy`` (top-1), ``top5`` where there are more than five classes,
        ``macro_f1`` over the classes present, ``ece`` (expected calibration error, 15 bins of
        equal width), ``per_class`` in label order (accuracy None without images) and
        ``confusion`` with true classes as rows. All fractions, none percent.
    """
    classes = len(class_names)
    truth = np.asarray(labels)
    probabilities = logits.double().softmax(-1).numpy()
    predicted = probabilities.argmax(-1)
    confusion = confusion_matrix(truth, predicted, labels=range(classes))
    totals = confusion.sum(1)
    present = np.unique(truth)
    result: dict[str, Any] = {
        "images": len(truth),
        "accuracy": float((predicted == truth).mean()),
    }
    if classes > 5:
        result["top5"] = float(
            top_k_accuracy_score(truth, probabilities, k=5, labels=range(classes))
        )
    result["macro_f1"] = float(
        f1_score(truth, predicted, labels=present, average="macro", zero_division=0)
    )
    result["ece"] = calibration_error(probabilities, truth)
    result["per_class"] = [
        {
            "class": name,
            "images": int(totals[i]),
            "accuracy": float(confusion[i, i] / totals[i]) if totals[i] else None,
        }
        for i, name in enumerate(class_names)
    ]
    result["confusion"] = confusion.tolist()
    return result


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = ECE_BINS) -> float:
    """Expected calibration error (Guo et al., 2017): gap of confidence and accuracy, by bins.

    Args:
        probabilities: (n, C), rows summing to one.
        labels: (n,).
        bins: number of equal-width bins of confidence.
    """
    confidence = probabilities.max(-1)
    correct = probabilities.argmax(-1) == labels
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
    if len(text_features) < 2:
        return 0.0
    return float(torch.pdist(text_features.float()).mean())


def mean_prototype_distance(features: Tensor, labels: Tensor, prototypes: Tensor) -> float:
    """Mean Euclidean distance of features (n, D) to their class prototype: intra-dispersion."""
    return float((features - prototypes[labels]).norm(dim=-1).mean())
