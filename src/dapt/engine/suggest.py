"""Which unlabelled photos to label next: those a classifier is unsure of, unlike each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dapt.data import ImageStore
from dapt.engine.classifier import Classifier
from dapt.engine.features import chunks, require_finite
from dapt.progress import Advance, nothing

_POOL = 4000  # images that are compared with each other: the most uncertain ones
_SURE = (
    0.01  # added to uncertainty, so that photos are told apart where a classifier is sure of all
)
_SAME = 1e-3  # distance (1 - cosine) below which a photo shows nothing new
_BETWEEN = 0.2  # least lead of the likeliest class for it not to be a choice between two


@dataclass(frozen=True)
class Suggestion:
    """A photo to label: its place among those given, the class guessed, and why."""

    place: int
    guess: str
    probability: float
    reason: str


@dataclass(frozen=True)
class Pool:
    """The most uncertain images so far: n of them, with what was found of each."""

    places: Tensor  # (n,)
    uncertainty: Tensor  # (n,), 1 less the lead of the likeliest class over the next
    features: Tensor  # (n, D)
    probabilities: Tensor  # (n, 2), of the two likeliest classes
    classes: Tensor  # (n, 2), which these are

    def with_more(self, other: Pool, limit: int) -> Pool:
        """Both together, without the least uncertain ones beyond ``limit``."""
        both = {n: torch.cat([value, getattr(other, n)]) for n, value in vars(self).items()}
        order = both["uncertainty"].argsort(descending=True, stable=True)[:limit]
        return Pool(**{name: value[order] for name, value in both.items()})


def suggest(
    classifier: Classifier,
    store: ImageStore,
    count: int,
    *,
    batch_size: int = 100,
    advance: Advance = nothing,
    unreadable: dict[int, str] | None = None,
) -> list[Suggestion]:
    """Up to ``count`` images of ``store`` to label next, the most useful first.

    Memory does not grow with the number of images: of each batch only the most uncertain stay.
    Images that cannot be read are left out and named in ``unreadable`` (see `ImageStore.batches`).
    Fewer are found where all others look like one that was chosen.
    """
    bad = {} if unreadable is None else unreadable
    pool: Pool | None = None
    lots = chunks(len(store), batch_size)
    for places, views in zip(lots, store.batches(lots, unreadable=bad), strict=True):
        read = [i for i, place in enumerate(places) if place not in bad]
        if read:
            seen = _seen(classifier, views[read], torch.tensor(places)[read])
            pool = pool.with_more(seen, max(_POOL, count)) if pool else seen
        advance(len(places))
    if pool is None:
        return []
    chosen = unlike(pool.features, pool.uncertainty, count)
    return [_told(classifier, pool, i, first=number == 0) for number, i in enumerate(chosen)]


def _seen(classifier: Classifier, views: Tensor, places: Tensor) -> Pool:
    with torch.inference_mode():
        features = classifier.encode(views)
        logits = classifier.logits(features)
        require_finite(logits, "logits")
        best = logits.softmax(-1).topk(min(2, logits.shape[1]))
    values, classes = best.values.cpu().clone(), best.indices.cpu().clone()
    lead = values[:, 0] - values[:, 1] if values.shape[1] > 1 else torch.ones(len(values))
    return Pool(places, 1 - lead, features.cpu().clone(), values, classes)


def unlike(features: Tensor, uncertainty: Tensor, count: int) -> list[int]:
    """Places of up to ``count`` images, each with the largest uncertainty times novelty.

    Novelty is the distance, 1 - cosine, to the nearest one chosen before: greedy k-centre (Sener
    and Savarese, 2018) weighed by uncertainty. The first is the most uncertain; of equal ones the
    earlier place. Features are (n, D), of length one, uncertainty (n,) within 0 .. 1.
    """
    chosen: list[int] = []
    novelty, worth = torch.ones(len(features)), uncertainty + _SURE
    while len(chosen) < min(count, len(features)) and bool((novelty > _SAME).any()):
        chosen.append(int((worth * novelty).argmax()))
        novelty = torch.minimum(novelty, 1 - features @ features[chosen[-1]])
    return chosen


def _told(classifier: Classifier, pool: Pool, i: int, *, first: bool) -> Suggestion:
    names = [classifier.class_names[c] for c in pool.classes[i].tolist()]
    values = pool.probabilities[i].tolist()
    if len(values) > 1 and values[0] - values[1] < _BETWEEN:
        reason = f"'{names[0]}' or '{names[1]}'"
    elif values[0] < 0.5:
        reason = "unsure of its class"
    else:
        reason = "the least sure" if first else "unlike those above"
    return Suggestion(int(pool.places[i]), names[0], values[0], reason)
