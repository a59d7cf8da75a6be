"""The automatic head: many closed forms, weighted by how well they classify held-out images.

The pieces are the class texts, class means (`Prototypes`) and kernel ridge regressions (`Ridge`),
each with and without class names. The candidates are pieces, pairs of pieces, and the text alone.
Each is judged, in closed form, on support images that it was not fitted on. Candidates that the
images cannot tell apart are averaged: the more standard errors a candidate's cross-entropy lies
above the best one's, the lower its weight. Because logits are averaged, the result is one
classifier.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, log
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dapt.methods import contract
from dapt.methods.contract import Evidence, HasSettings
from dapt.methods.held_out import HeldOut, rounds, sharpness, spread
from dapt.methods.kernel_ridge import Ridge, similarity
from dapt.methods.losses import class_counts
from dapt.methods.prototypes import Prototypes

STRENGTHS = (0.5, 1.0, 2.0, 4.0)
PENALTIES: dict[float, tuple[float, ...]] = {
    0.1: (0.01, 0.03, 0.1),
    0.5: (0.03, 0.1, 0.3),
    1.0: (0.03, 0.1, 0.3, 1.0),
}  # by width
# Of more classes than that, one width and few penalties are tried: all would take an hour.
MANY = 5000
OF_MANY: dict[float, tuple[float, ...]] = {1.0: (0.1, 0.3)}
SHARES = (0.3, 0.5, 0.7)  # of prototypes beside a regression
# Nats over all images by which class names must beat chance to have a say.
MEANING = 3.0
# Logits by which that is told: at 20,000 classes, those of every eightieth of 80,000 images.
MOST_LOGITS = 20_000_000
# With one image a class nothing can be left out. These held on every task that was tried.
ALONE = {True: [(1.0, 1.0, 0.1, 0.7), (1.0, 1.0, 0.3, 0.5), (2.0, 1.0, 0.1, 0.7)],
         False: [(inf, 1.0, 0.3, 0.5)]}  # fmt: skip
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
    """Prototypes and a regression, in shares; strength inf is no text, width 0 no regression."""

    strength: float
    width: float
    penalty: float
    share: float

    @property
    def text(self) -> float:
        """Whether class names have a say, as a number."""
        return float(self.strength < inf)


def penalties_for(classes: int) -> dict[float, tuple[float, ...]]:
    """What regressions are tried for so many classes, by their width."""
    return OF_MANY if classes > MANY else PENALTIES


def candidates(meaning: bool, tried: dict[float, tuple[float, ...]]) -> Iterator[Candidate]:
    """All there are, regressions as ``tried``; of names without meaning, those without text."""
    yield from (Candidate(s, 0, 0, 1.0) for s in ((0.0, *STRENGTHS) if meaning else ()))
    yield Candidate(inf, 0, 0, 1.0)
    for width, penalties in tried.items():
        for penalty in penalties:
            for strengths in (STRENGTHS, (inf,)) if meaning else ((inf,),):
                yield Candidate(strengths[0], width, penalty, 0.0)
                yield from (
                    Candidate(s, width, penalty, share) for s in strengths for share in SHARES
                )


class Pieces:
    """What candidates are put together of, on one support set: (r, C) held-out logits, weights."""

    def __init__(self, x: Tensor, y: Tensor, text: Tensor, seed: int) -> None:
        self.text, self.left_out = text, rounds(y, len(text), seed)
        # With one image a class, none can be judged so; how far logits spread, each can tell alone.
        self.rows = self.left_out or list(torch.arange(len(y))[:MOST_ALONE, None])
        self.labels = y[torch.cat(self.rows)]
        self.prototypes = Prototypes(x, y, text)
        self.ridges = {width: Ridge(x, y, text, width, seed) for width in penalties_for(len(text))}
        self._held: dict[tuple[float, ...], tuple[Tensor, float]] = {}

    def _piece(self, *key: float) -> tuple[Tensor, float]:
        """Held-out logits of prototypes (strength,) or a regression (width, penalty, text)."""
        if key not in self._held:
            if len(key) == 1:
                logits = self.prototypes.held_out(key[0], self.rows)
            else:
                width, penalty, text = key
                logits = self.ridges[width].held_out(penalty, text, self.rows)
            self._held[key] = logits, spread(logits, self.labels)
        return self._held[key]

    def shares(self, c: Candidate) -> tuple[float, float]:
        """What its prototypes and its regression are multiplied by, so that both count alike."""
        first = c.share / self._piece(c.strength)[1] if c.share else 0.0
        second = (1 - c.share) / self._piece(c.width, c.penalty, c.text)[1] if c.width else 0.0
        return first, second

    def held_out(self, c: Candidate) -> Tensor:
        """(r, C) logits that vary by about one in a row."""
        first, second = self.shares(c)
        found = torch.zeros(())
        if first:
            found = found + first * self._piece(c.strength)[0]
        if second:
            found = found + second * self._piece(c.width, c.penalty, c.text)[0]
        return found

    def merged(self, chosen: list[tuple[Candidate, float]]) -> tuple[Tensor, Tensor, float]:
        """One classifier of all: weight (C, D), values (m, C) and the width of their kernel."""
        width = max((c.width for c, _ in chosen), default=0.0) or 1.0
        weight = torch.zeros_like(self.text)
        values = torch.zeros(len(self.ridges[width].keys), len(self.text))
        for c, amount in chosen:
            first, second = self.shares(c)
            if first:
                weight += amount * first * self.prototypes.weight(c.strength)
            if second:
                weight += amount * second * c.text * self.text
                values += amount * second * self.ridges[width].values(c.penalty, c.text)
        return weight, values, width


def weigh(pieces: Pieces, meaning: bool) -> list[tuple[Candidate, float]]:
    """Candidates of one width with what each is multiplied by: its share times its sharpness."""
    if not pieces.left_out:
        return [(Candidate(*c), 1 / len(ALONE[meaning])) for c in ALONE[meaning]]
    known = list(candidates(meaning, penalties_for(len(pieces.text))))
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
    totals = {w: sum(s for c, s in zip(known, shares, strict=True) if c.width == w)
              for w in pieces.ridges}  # fmt: skip
    kept = {0.0, max(totals, key=lambda w: totals[w])}
    return [
        (c, share * factor)
        for c, share, factor in zip(known, shares, factors, strict=True)
        if c.width in kept and share > 1e-4
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
    """``x·weight + exp(-width |x - keys|²) values``, of all candidates that `weigh` keeps.

    Support features are averaged over the plain image, the mirrored image and some training views.
    The logits are calibrated by one factor, fitted on held-out images.
    """

    Settings = AutoSettings
    fitted = without_text = reads_views = multilabel = True
    closed = "an automatic head, which knows only the classes it was fitted on"
    shapes: ClassVar = {"weight": "CD", "keys": "mD", "values": "mC", "width": ""}
    weight: Tensor
    keys: Tensor
    values: Tensor
    width: Tensor

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
        weight, values, width = pieces.merged(chosen)
        self.weight, self.values = final * weight, final * values
        self.keys, self.width = pieces.ridges[width].keys, torch.tensor(width)
        return held

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D)."""
        return image @ self.weight.T + similarity(image, self.keys, self.width) @ self.values
