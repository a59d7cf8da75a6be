"""What closed forms say of images that they were not fitted on, and how sure they may be of it.

Letters in shape comments: n images, r of them held out, C classes, D dimensions, m keys. Labels of
one class an image are (n,); where an image may have several, they are (n, C), 0 or 1, and logits
are judged class by class: `dapt.methods.sigmoids` has the calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

import torch
import torch.nn.functional as F
from torch import Tensor

from dapt.methods.sigmoids import calibrated, folds

ROUNDS = 16
USUAL = 3.0  # times logits that vary by one within a row, where no image tells
# Share of the usual distance within classes, and images of a class of which that is asked.
NEAR, MOST_NEAR = 0.6, 2000


@dataclass(frozen=True)
class HeldOut:
    """Logits (r, C) of images that were left out for them, and their labels.

    ``factor`` is what calibration has multiplied the logits by. Images that are ``fair`` (r,) tell
    how well others will be known: all, unless others are told.
    """

    logits: Tensor
    labels: Tensor
    factor: float = 1.0
    fair: Tensor | None = None


def series(features: Tensor, labels: Tensor, classes: int) -> list[list[Tensor]]:
    """Of each class, its images (n, D) in lots of those that show one thing, or nearly so.

    Photos come in series, drawings in variants: an image that is left out is known all too well
    while others of its series stay. Images of a class nearer than `NEAR` of the usual distance
    belong together, and so do those near to them. A class that is one series is taken apart.
    """
    from scipy.sparse.csgraph import connected_components  # takes long to load

    by_class = _by_class(labels, classes)
    sampled = [features[own[:: -(-len(own) // 64)]] for own in by_class if len(own) > 1]
    usual = [torch.pdist(some) for some in sampled]
    near = NEAR * float(torch.cat(usual).median()) if usual else 0.0
    found = list[list[Tensor]]()
    for own in by_class:
        lots = list(own.split(1)) if len(own) else []
        if 2 < len(own) <= MOST_NEAR:
            close = torch.cdist(features[own], features[own]) < near
            count, numbers = connected_components(close.numpy(), directed=False)
            if count > 1:
                lots = [own[torch.from_numpy(numbers == number)] for number in range(count)]
        found.append(lots)
    return found


def rounds(
    labels: Tensor, classes: int, seed: int, lots: list[list[Tensor]] | None = None
) -> list[Tensor]:
    """Images to leave out together: one of each class that has more, and again, `ROUNDS` at most.

    Left out alone, an image's class would be an image short of all others, and look worse than it
    is. Where there are ``lots``, by `series`, it is one of these. Of very many classes, some are
    drawn: more would say little, and cost memory. Of several labels an image, each round takes its
    share of every class; none, where all have one image.
    """
    if labels.dim() == 2:
        parts = min(ROUNDS, int(labels.sum(0).max()))
        return folds(labels, parts, max(500, 1_000_000 // classes)) if parts > 1 else []
    lots = lots or [list(own.split(1)) for own in _by_class(labels, classes)]
    places, found = [own[:ROUNDS] for own in lots if len(own) > 1], list[Tensor]()
    most = max(500, 1_000_000 // classes)
    if len(places) > most:
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
        places = [places[i] for i in order[:most].sort().values.tolist()]
    for number in range(max((len(own) for own in places), default=0)):
        now = torch.cat([own[number] for own in places if len(own) > number])
        if sum(len(f) for f in found) + len(now) <= most:
            found.append(now)
    return found


def _by_class(labels: Tensor, classes: int) -> tuple[Tensor, ...]:
    """Of each class, which of the images are its own."""
    return labels.argsort(stable=True).split(labels.bincount(minlength=classes).tolist())


def spread(logits: Tensor, labels: Tensor) -> float:
    """Standard deviation of logits (r, C) within what their labels compare: a row, or a class.

    It is what makes those of two heads alike.
    """
    centred = logits - logits.mean(-1 if labels.dim() == 1 else 0, keepdim=True)
    return max(float(centred.square().mean().sqrt()), 1e-9)


def sharpness(logits: Tensor, labels: Tensor, start: float = 1.0) -> tuple[float, Tensor]:
    """The factor that makes logits (r, C) most probable, and the cross-entropy (r,) it leaves.

    It is the inverse of a temperature (Guo et al., 2017), found by Newton's steps from ``start``:
    the cross-entropy is convex in it. Between 0, where the logits say nothing, and 1000. Of several
    labels, classes have biases besides, and the cross-entropies of those with two images are added.
    """
    if labels.dim() == 2:
        factor, _, losses = calibrated(logits, labels, judged(labels), start)
        return factor, losses.sum(1)
    own, factor = logits.gather(1, labels[:, None])[:, 0], start
    for _ in range(30):
        p = (factor * logits).softmax(-1)
        mean = (p * logits).sum(-1)
        slope = float((mean - own).mean())
        curve = float(((p * logits.square()).sum(-1) - mean.square()).mean())
        # At most fourfold at once: far from the optimum the curve says little.
        before, step = factor, factor - slope / max(curve, 1e-9)
        factor = min(max(step, factor / 4), factor * 4, 1000.0)
        if abs(factor - before) < 1e-3 * before or factor < 1e-6:
            break
    return factor, F.cross_entropy(factor * logits, labels, reduction="none")


def frequencies(labels: Tensor, everywhere: Tensor, classes: int) -> Tensor:
    """(r,) weights of images with labels (r,) that make classes as frequent as everywhere (n,).

    They sum to one; where none of these classes is anywhere else, all are alike.
    """
    here, there = (each.bincount(minlength=classes).double() for each in (labels, everywhere))
    weights = (there / here.clamp_min(1))[labels]
    if not weights.any():
        weights = torch.ones(len(labels), dtype=torch.double)
    return weights / weights.sum()


def worth(weights: Tensor) -> float:
    """How many images of equal weight tell as much as these, whose weights sum to one (Kish)."""
    return float(1 / weights.square().sum())


def careful(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """As the factor of `sharpness`, drawn to what is usual: few images prove no certainty.

    A factor e times as large or as small as `USUAL` costs half a nat, over all images, which count
    by ``weights`` (r,) as of `frequencies`. Of several labels, it is that of `sharpness`, whose
    calibration has doubts of its own.
    """
    if labels.dim() == 2:
        return sharpness(logits, labels)[0]
    from scipy.optimize import minimize_scalar  # takes long to load

    usual, counted = USUAL / spread(logits, labels), torch.ones(len(labels))
    if weights is not None:
        counted = (worth(weights) * weights).float()

    def cost(more: float) -> float:
        lost = F.cross_entropy(usual * exp(more) * logits, labels, reduction="none")
        return float(counted @ lost) + more**2 / 2

    return usual * exp(minimize_scalar(cost, bounds=(-9.0, 9.0), method="bounded").x)


def judged(labels: Tensor) -> Tensor:
    """(r, C) weights of labels held out: none of a class that nothing was left of."""
    return (labels.sum(0) > 1).float().expand_as(labels)
