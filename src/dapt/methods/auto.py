"""The automatic head: many closed forms, weighted by how well they classify held-out images.

The pieces are the class texts, class means (`Prototypes`) and kernel ridge regressions (`Ridge`),
each with and without class names. Of enough images, one kernel sees features whose scatter within
classes is evened out. The candidates are pieces, pairs of pieces, and the text alone.
Each is judged, in closed form, on support images that it was not fitted on. Candidates that the
images cannot tell apart are averaged: the more standard errors a candidate's cross-entropy lies
above the best one's, the lower its weight. Because logits are averaged, the result is one
classifier.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, log
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dapt.methods import contract
from dapt.methods.contract import Evidence, HasSettings
from dapt.methods.held_out import HeldOut, rounds, sharpness, spread
from dapt.methods.kernel_ridge import Ridge, expanded, summed, turned
from dapt.methods.losses import class_counts, class_prototypes
from dapt.methods.prototypes import Prototypes


class Kernel(NamedTuple):
    """Of what width, and whether it sees features in `evened` coordinates."""

    width: float
    even: bool = False


STRENGTHS = (0.5, 1.0, 2.0, 4.0)
PENALTIES: dict[Kernel, tuple[float, ...]] = {
    Kernel(0.1): (0.01, 0.03, 0.1),
    Kernel(0.5): (0.03, 0.1, 0.3),
    Kernel(1.0): (0.03, 0.1, 0.3, 1.0),
    Kernel(0.5, even=True): (0.03, 0.1, 0.3),
}
# Of more classes than that, one kernel and few penalties are tried: all would take an hour.
MANY = 5000
OF_MANY: dict[Kernel, tuple[float, ...]] = {Kernel(1.0): (0.1, 0.3)}
SHARES = (0.3, 0.5, 0.7)  # of prototypes beside a regression
# Nats over all images by which class names must beat chance to have a say.
MEANING = 3.0
# Logits by which that is told: at 20,000 classes, those of every eightieth of 80,000 images.
MOST_LOGITS = 20_000_000
# With one image a class nothing can be left out. These held on every task that was tried.
ALONE = {True: [(1.0, 0.1, 0.7), (1.0, 0.3, 0.5), (2.0, 0.1, 0.7)], False: [(inf, 0.3, 0.5)]}
MOST_ALONE = 200  # images of which that is asked
# What is put in where nothing could be held out, of logits that vary by one within a row.
SHARPNESS = 3.0


class AutoSettings(contract.PartSettings):
    """Of the automatic head."""

    auto_views: int = Field(
        8, ge=0, le=1000, description="training views averaged with the image itself"
    )


@dataclass(frozen=True)
class Candidate:
    """Prototypes of a strength and a regression, in shares; strength inf is without text."""

    strength: float
    kernel: Kernel | None = None
    penalty: float = 0.0
    share: float = 1.0

    @property
    def text(self) -> float:
        """Whether class names have a say, as a number."""
        return float(self.strength < inf)


def penalties_for(classes: int, even: bool) -> dict[Kernel, tuple[float, ...]]:
    """What regressions are tried of so many classes, by their kernel; ``even`` ones if so."""
    if classes > MANY:
        return OF_MANY
    return {kernel: own for kernel, own in PENALTIES.items() if even or not kernel.even}


def candidates(meaning: bool, tried: dict[Kernel, tuple[float, ...]]) -> Iterator[Candidate]:
    """All there are, regressions as ``tried``; of names without meaning, those without text."""
    yield from (Candidate(s) for s in ((0.0, *STRENGTHS) if meaning else ()))
    yield Candidate(inf)
    for kernel, penalties in tried.items():
        for penalty in penalties:
            for strengths in (STRENGTHS, (inf,)) if meaning else ((inf,),):
                yield Candidate(strengths[0], kernel, penalty, 0.0)
                yield from (
                    Candidate(s, kernel, penalty, share) for s in strengths for share in SHARES
                )


def evened(x: Tensor, y: Tensor, classes: int) -> Tensor:
    """(D, D) of features (n, D): in its coordinates, classes scatter alike in all directions.

    It is the inverse root of the covariance within classes, which is shrunk after Ledoit and Wolf
    (2004).
    """
    from sklearn.covariance import ledoit_wolf  # takes long to load

    apart = (x - class_prototypes(x, y, classes)[y]).double()
    scatter = torch.from_numpy(ledoit_wolf(apart.numpy(), assume_centered=True)[0])
    found, axes = torch.linalg.eigh(scatter)
    found = found.clamp_min(1e-12)  # all images of a class may be equal
    return (axes * (found.mean() / found).sqrt() @ axes.T).float()


class Pieces:
    """What candidates are put together of, on one support set: (r, C) held-out logits, weights."""

    def __init__(self, x: Tensor, y: Tensor, text: Tensor, seed: int) -> None:
        self.text, self.left_out = text, rounds(y, len(text), seed)
        # With one image a class, none can be judged so; how far logits spread, each can tell alone.
        rows = self.left_out or list(torch.arange(len(y))[:MOST_ALONE, None])
        self.halves = [half for half in (rows[::2], rows[1::2]) if half]
        self.rows = [images for half in self.halves for images in half]
        self.labels = y[torch.cat(self.rows)]
        self.prototypes = Prototypes(x, y, text)
        # A covariance of fewer images than dimensions says little, even shrunk.
        spare = len(y) - len(y.unique()) if y.dim() == 1 else 0
        self.tried = penalties_for(len(text), even=spare >= x.shape[1])
        self.ridges = dict[Kernel, Ridge]()
        self.judges = dict[Kernel, list[Ridge]]()  # for each half
        for kernel in self.tried:
            own = (x, y, text, kernel.width, seed)
            self.ridges[kernel] = Ridge(*own, evened(x, y, len(text)) if kernel.even else None)
            self.judges[kernel] = [self.ridges[kernel]] * len(self.halves)
            if kernel.even:  # coordinates know the images they are made of: each half has others
                self.judges[kernel] = [Ridge(*own, self._without(h, x, y)) for h in self.halves]
        self._held: dict[tuple[Any, ...], tuple[Tensor, float]] = {}

    def _without(self, rows: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Coordinates that know nothing of some images."""
        kept = torch.ones(len(y), dtype=torch.bool)
        kept[torch.cat(rows)] = False
        return evened(x[kept], y[kept], len(self.text))

    def _piece(self, *key: Any) -> tuple[Tensor, float]:
        """Held-out logits of prototypes (strength,) or a regression (kernel, penalty, text)."""
        if key not in self._held:
            if len(key) == 1:
                logits = self.prototypes.held_out(key[0], self.rows)
            else:
                kernel, penalty, text = key
                both = zip(self.judges[kernel], self.halves, strict=True)
                logits = torch.cat([ridge.held_out(penalty, text, rows) for ridge, rows in both])
            self._held[key] = logits, spread(logits, self.labels)
        return self._held[key]

    def shares(self, c: Candidate) -> tuple[float, float]:
        """What its prototypes and its regression are multiplied by, so that both count alike."""
        first = c.share / self._piece(c.strength)[1] if c.share else 0.0
        second = (1 - c.share) / self._piece(c.kernel, c.penalty, c.text)[1] if c.kernel else 0.0
        return first, second

    def held_out(self, c: Candidate) -> Tensor:
        """(r, C) logits that vary by about one in a row."""
        first, second = self.shares(c)
        found = torch.zeros(())
        if first:
            found = found + first * self._piece(c.strength)[0]
        if second:
            found = found + second * self._piece(c.kernel, c.penalty, c.text)[0]
        return found

    def merged(self, chosen: list[tuple[Candidate, float]]) -> tuple[Tensor, Tensor, Ridge]:
        """One classifier of all: weight (C, D), values (m, C) and a regression with their kernel.

        All are of one kernel, or of none.
        """
        ridge = self.ridges[next((c.kernel for c, _ in chosen if c.kernel), Kernel(1.0))]
        weight = torch.zeros_like(self.text)
        values = torch.zeros(len(ridge.keys), len(self.text), dtype=torch.double)
        for c, amount in chosen:
            first, second = self.shares(c)
            if first:
                weight += amount * first * self.prototypes.weight(c.strength)
            if second:
                weight += amount * second * c.text * self.text
                values += amount * second * ridge.values(c.penalty, c.text)
        return weight, values, ridge


def weigh(pieces: Pieces, meaning: bool) -> list[tuple[Candidate, float]]:
    """Candidates of one kernel with what each is multiplied by: its share times its sharpness."""
    if not pieces.left_out:
        alone = [Candidate(s, Kernel(1.0), *more) for s, *more in ALONE[meaning]]
        return [(c, 1 / len(alone)) for c in alone]
    known = list(candidates(meaning, pieces.tried))
    factors, losses, factor = list[float](), list[Tensor](), 1.0
    for c in known:  # neighbours are alike: each starts where the last ended
        factor, loss = sharpness(pieces.held_out(c), pieces.labels, max(factor, 0.1))
        factors.append(factor)
        losses.append(loss)
    behind = torch.stack(losses).double()  # (candidates, r)
    behind -= behind[int(behind.mean(1).argmin())].clone()
    error = behind.std(1, unbiased=False) / behind.shape[1] ** 0.5
    shares = (-behind.mean(1) / error.clamp_min(1e-9)).softmax(0).tolist()
    # One kernel is kept: the one whose candidates weigh most; those without any stay.
    totals = {k: sum(s for c, s in zip(known, shares, strict=True) if c.kernel == k)
              for k in pieces.tried}  # fmt: skip
    kept = {None, max(totals, key=lambda k: totals[k])}
    return [
        (c, share * factor)
        for c, share, factor in zip(known, shares, factors, strict=True)
        if c.kernel in kept and share > 1e-4
    ]


def smoothed(evidence: Evidence, count: int) -> Tensor:
    """(n, D) support features: half the plain and the mirrored image's, half some views'."""
    whole = evidence.support.features
    if evidence.mirrored is not None:
        whole = (whole + evidence.mirrored()) / 2
    if count:
        whole = whole + F.normalize(evidence.views(count), dim=-1).mean(0)
    return F.normalize(whole, dim=-1)


class Auto(contract.Head):
    """``x·weight + exp(-width |x' - keys|²) values``, of all candidates that `weigh` keeps.

    x' is x, or x `turned` where the kernel that was kept is one of `evened` coordinates. The second
    term is kept `expanded`.
    Support features are averaged over the plain image, the mirrored image and some training views.
    The logits are calibrated by one factor, fitted on held-out images.
    """

    Settings = AutoSettings
    fitted = without_text = reads_views = multilabel = True
    closed = "an automatic head, which knows only the classes it was fitted on"
    shapes: ClassVar = {"weight": "CD", "bias": "C", "slope": "CD", "keys": "mD", "values": "mC",
                        "width": ""}  # fmt: skip
    optional: ClassVar = {"turn": "DD"}
    weight: Tensor
    bias: Tensor
    slope: Tensor
    keys: Tensor
    values: Tensor
    width: Tensor
    turn: Tensor | None

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What a model card says of it."""
        return "class means and kernel ridge regressions on image features, weighed by folds,"

    def fit(self, evidence: Evidence, settings: HasSettings) -> HeldOut | None:
        """Choose, put together, calibrate."""
        own: AutoSettings = settings.of(AutoSettings)
        labels, text = evidence.support.labels, evidence.text
        if several := labels.dim() == 2:  # what all names have in common tells for no class
            text = text - text.mean(0)
        plain = evidence.support.features
        x = smoothed(evidence, own.auto_views)
        counts = class_counts(labels, len(text))
        few = torch.arange(0, len(plain), -(-len(plain) * len(text) // MOST_LOGITS))
        by_names = plain[few] @ text.T
        factor, losses = sharpness(by_names, labels[few])
        # Of several labels, too few images can tell: names have a say, and folds weigh it.
        meaning = several or len(losses) * log(len(text)) - float(losses.sum()) > MEANING
        meaning &= (words := bool(text.any()))  # none, where the backbone reads no text
        pieces = Pieces(x, labels, text, settings.seed)
        chosen = weigh(pieces, meaning or (words and bool((counts == 0).any())))
        held: HeldOut | None = None
        if pieces.left_out:
            logits = sum((amount * pieces.held_out(c) for c, amount in chosen), torch.zeros(()))
            final = sharpness(logits, pieces.labels)[0]
            held = HeldOut(final * logits, pieces.labels, final)
        else:
            final = factor * spread(by_names, labels[few]) if meaning else SHARPNESS
        weight, values, ridge = pieces.merged(chosen)
        self.weight, self.keys, self.turn = final * weight, ridge.keys, ridge.turn
        self.width = torch.tensor(ridge.width)
        self.bias, self.slope, self.values = expanded(ridge.keys, final * values, ridge.width)
        return held

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D)."""
        seen = turned(image, self.turn)
        kernel = summed(seen, self.keys, self.width, self.bias, self.slope, self.values)
        return image @ self.weight.T + kernel
