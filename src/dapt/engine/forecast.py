"""What new photos can be expected to give, told by images that a classifier was not fitted on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dapt.clip.sources import BUNDLED
from dapt.engine.data import images_a_class
from dapt.engine.evaluate import calibration_error, logits_of
from dapt.engine.features import labels_of
from dapt.engine.fit import Tuned
from dapt.engine.photos import SAME_TEXT
from dapt.errors import readable
from dapt.methods import get_method
from dapt.methods.held_out import frequencies, worth
from dapt.methods.sigmoids import as_everywhere

# Confused classes that are told, quantiles of probabilities that are kept, and resamples.
_PAIRS, _QUANTILES, _RESAMPLES = 5, 200, 1000


@dataclass(frozen=True)
class Named:
    """What a classifier says of n images that it was not fitted on: (n,) arrays.

    True and best labels; probabilities of the best, of the true one, and of the best before
    calibration; and whether it tells how well others will be known.
    """

    truth: np.ndarray
    predicted: np.ndarray
    best: np.ndarray
    true: np.ndarray
    raw: np.ndarray
    fair: np.ndarray

    @classmethod
    def of(
        cls, logits: Tensor, labels: Tensor, factor: float = 1.0, fair: Tensor | None = None
    ) -> Named:
        """Of logits (n, C), which calibration has multiplied by ``factor``."""
        probabilities = logits.double().softmax(-1)
        best, predicted = probabilities.max(-1)
        true = probabilities.gather(1, labels[:, None])[:, 0]
        raw = (logits / factor).double().softmax(-1).amax(-1)
        fair = torch.ones(len(labels), dtype=torch.bool) if fair is None else fair
        return cls(*(t.numpy() for t in (labels, predicted, best, true, raw, fair)))


def forecast(tuned: Tuned, folds: Named | None = None) -> dict[str, Any] | None:
    """What support and val images, held out, say of new ones; None where there are none.

    What a head held out says nothing where towers were tuned on the same images: there, ``folds``
    count, of which the towers knew nothing either. Where images have several labels,
    `forecast_map` is asked.

    ``accuracy`` with ``low`` and ``high``, a 95 % interval: fractions, of images that are fair,
    classes weighed as often as they are among all the task's images to tune on. ``ece`` is before
    and after the calibration of the head. ``confused`` has pairs of classes; ``true`` and ``best``
    are quantiles of the probability of the true and of the best class, in even steps from 0 to 1.
    """
    held, val, classifier = tuned.held_out, tuned.val, tuned.classifier
    if tuned.data.task.multilabel:
        return None
    parts = [] if folds is None else [folds]
    if held is not None and not get_method(tuned.settings.method).learns:
        parts.append(Named.of(held.logits, held.labels, held.factor, held.fair))
    if val is not None and not classifier.head.reads_val:
        found = torch.cat(list(logits_of(classifier, val.features)))
        parts.append(Named.of(found, val.labels))
    if not parts:
        return None
    truth, predicted, best, true, raw, fair = (
        np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Named)
    )
    correct = predicted == truth
    task = tuned.data.task
    some, everywhere = torch.from_numpy(truth[fair]), labels_of(task.train)
    often = frequencies(some, everywhere, len(task.class_names))
    weights = often.numpy()
    accuracy = float((weights * correct[fair]).sum())
    low, high = wilson(accuracy, worth(often))
    steps = np.linspace(0, 1, _QUANTILES + 1)
    pairs, names = confused(truth, predicted), task.class_names
    return {
        "images": len(truth),
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "ece": {
            "before": calibration_error(raw[fair], correct[fair], weights),
            "after": calibration_error(best[fair], correct[fair], weights),
        },
        "confused": [{"classes": [names[a], names[b]], "images": n} for a, b, n in pairs],
        "advice": _advice(tuned, truth, predicted, accuracy, pairs),
        "true": np.quantile(true[fair], steps).tolist(),
        "best": np.quantile(best[fair], steps).tolist(),
    }


def forecast_map(tuned: Tuned) -> dict[str, Any] | None:
    """Mean average precision that new images with several labels can be expected to give.

    ``map``, with ``low`` and ``high``, 95 % of a bootstrap over images around it; labels are
    weighed as often as they are among all the task's images to tune on. (Precisions of resamples
    are higher, as an image is beside its copies: by as much they are all lowered.) None where no
    image was held out.
    """
    task, held = tuned.data.task, tuned.held_out
    if not task.multilabel or held is None:
        return None
    logits, labels = held.logits.double().numpy(), held.labels
    weights = as_everywhere(labels, labels_of(task.train, len(task.class_names))).double().numpy()
    known = (labels.sum(0) > 0).nonzero()[:, 0].tolist()
    count, generator = len(labels), np.random.default_rng(tuned.settings.seed)
    drawn = generator.multinomial(count, np.full(count, 1 / count), _RESAMPLES)
    often = np.concatenate([np.ones((1, count)), drawn])  # the images themselves, then resamples
    aps = np.stack([
        average_precision(logits[:, c], labels[:, c].numpy(), often * weights[:, c]) for c in known
    ])  # fmt: skip
    found, *resampled = np.nanmean(aps, 0)
    low, high = found + np.quantile(resampled - np.mean(resampled), (0.025, 0.975))
    best = {"map": found, "low": min(max(low, 0), found), "high": max(min(high, 1), found)}
    own = dict(zip(known, aps[:, 0].tolist(), strict=True))
    told = {name: float(value) for name, value in best.items()}
    return {"images": count, **told, "advice": _advice_of_several(tuned, own)}


def average_precision(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B,) average precisions, as scikit-learn has them, of (n,) images under weights (B, n).

    NaN where no true image weighs anything. All at once, for a bootstrap.
    """
    order = np.argsort(-scores, kind="stable")
    weights, true = weights[:, order], weights[:, order] * truth[order]
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of equal scores
    found, total = true.cumsum(1)[:, last], weights.cumsum(1)[:, last]
    gained = np.diff(found, axis=1, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(total > 0, found / total, 0)
        return (gained * precision).sum(1) / found[:, -1]


def _advice_of_several(tuned: Tuned, aps: dict[int, float]) -> str:
    """One sentence on what would help most, by average precisions of labels held out."""
    names, counts = tuned.data.task.class_names, tuned.support.labels.sum(0).tolist()
    if lacking := [name for name, count in zip(names, counts, strict=True) if not count]:
        return _of_none(tuned, lacking[0])
    if min(counts) < 4:
        return "More photos would help most: give each class at least four."
    worst = min(aps, key=lambda c: (aps[c], c))
    return (
        f"More photos of '{names[worst]}' would help most: the average precision of its held-out "
        f"ones is {aps[worst]:.0%}."
    )


def wilson(share: float, images: float, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share that so many images were counted for (Wilson, 1927); 95 % by itself."""
    middle = share + z * z / (2 * images)
    half = z * sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    whole = 1 + z * z / images
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def confused(truth: np.ndarray, predicted: np.ndarray) -> list[tuple[int, int, int]]:
    """Labels of classes taken for each other most, either way, and how many images were."""
    wrong = truth != predicted
    pairs = Counter(
        (min(pair), max(pair))
        for pair in zip(truth[wrong].tolist(), predicted[wrong].tolist(), strict=True)
    )
    return [(a, b, count) for (a, b), count in pairs.most_common(_PAIRS) if count > 1]


def _of_none(tuned: Tuned, name: str) -> str:
    """What to do about a class without images."""
    read = tuned.classifier.backbone.reads_text
    known = "it is known by its name alone" if read else "the backbone reads no names"
    return f"Photos of '{name}' would help: {known}."


def _advice(
    tuned: Tuned,
    truth: np.ndarray,
    predicted: np.ndarray,
    accuracy: float,
    pairs: Sequence[tuple[int, int, int]],
) -> str:
    """One sentence on what would help most."""
    names = [*map(readable, tuned.data.task.class_names)]
    text = tuned.classifier.text_features().detach()
    counts = Counter(tuned.support.labels.tolist())
    if lacking := [name for c, name in enumerate(names) if not counts[c]]:
        return _of_none(tuned, lacking[0])
    for a, b, _ in pairs if text.shape[1] else ():
        if float(text[a] @ text[b]) >= SAME_TEXT:
            return (
                f"The names '{names[a]}' and '{names[b]}' mean the same to the model: give clearer "
                "ones with class_names."
            )
    there, shots = images_a_class(tuned.data.task.train), tuned.settings.shots
    unused = sum(count > shots for count in there) > len(there) / 2
    if min(counts.values()) < 4:
        if unused and shots < 4:
            return f"More of the photos would help most: shots={shots} takes no more of a class."
        return "More photos would help most: give each class at least four."
    if accuracy < 0.5:
        such = "such as ViT-B-16 of OpenAI" if tuned.settings.backbone == BUNDLED else "or a larger"
        return f"A better backbone would help most, {such}."
    shares = {c: float((predicted[truth == c] == c).mean()) for c in set(truth.tolist())}
    worst = min(shares, key=lambda c: (shares[c], c))
    if shares[worst] < 0.75 * accuracy:
        share = f"{shares[worst]:.0%} of its held-out photos are named right"
        return f"More photos of '{names[worst]}' would help most: {share}."
    if unused:
        return f"More of the photos would help: shots={shots} takes no more of a class."
    return "More photos of every class would help; twice as many usually gain a few points."
