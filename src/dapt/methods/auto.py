"""The automatic head: many small regressions, weighed by how well they classify other images.

Its pieces are the class texts, class means (`Prototypes`) and kernel ridge regressions (`Ridge`),
each with and without class names. Of enough images, one kernel sees features whose scatter within
classes is evened out. Pieces and pairs of pieces are one family of mixes (`blends`). Of few images
and classes there are two more: Gaussians (`Gda`) beside class means, and logistic regressions
(`Logistic`) in the kernel that was chosen.

Each mix is judged by images that it was not fitted on: support images in turn, and validation
images where there are any. Mixes of a family that these cannot tell apart are averaged: the more
standard errors the cross-entropy of one lies above the best one's, the lower its weight. Families
err differently, so they count alike, but for those that are clearly worse. Because logits are
averaged, the result is one classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import inf, log
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dapt.methods import contract
from dapt.methods.contract import Evidence, Examples, HasSettings
from dapt.methods.gda import Gda
from dapt.methods.held_out import (
    USUAL,
    HeldOut,
    careful,
    frequencies,
    rounds,
    series,
    sharpness,
    spread,
)
from dapt.methods.kernel_logistic import Logistic
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
# Logistic regressions: what class means they start from, at half the sharpness that fits these, and
# their penalties.
STARTS: dict[bool, tuple[float, ...]] = {True: (0.0, 1.0), False: (inf,)}
RESTRAINTS = (0.3, 0.1, 0.03)
# They and Gaussians are fitted without each fold, which takes long of more images, squared, times
# classes.
FOLDS, MOST_MORE = 8, 30_000_000
CLEAR = 2.0  # standard errors by which a family must be behind to be left out
# Nats over all images by which class names must beat chance to have a say.
MEANING = 3.0
# Logits by which that is told: at 20,000 classes, those of every eightieth of 80,000 images.
MOST_LOGITS = 20_000_000
# With one image a class nothing can be left out. These held on every task that was tried.
ALONE = {True: [(1.0, 0.1, 0.7), (1.0, 0.3, 0.5), (2.0, 0.1, 0.7)], False: [(inf, 0.3, 0.5)]}
MOST_ALONE = 200  # images of which that is asked
# Without one of fewer images than that, a class is known clearly less well.
ENOUGH = 8


# A piece by its kind and settings, and a mix of pieces with their shares.
Key = tuple[Any, ...]
Mix = tuple[tuple[Key, float], ...]


def penalties_for(classes: int, even: bool) -> dict[Kernel, tuple[float, ...]]:
    """What regressions are tried of so many classes, by their kernel; ``even`` ones if so."""
    if classes > MANY:
        return OF_MANY
    return {kernel: own for kernel, own in PENALTIES.items() if even or not kernel.even}


def blends(meaning: bool, tried: dict[Kernel, tuple[float, ...]]) -> Iterator[Mix]:
    """Class means and ridge regressions as ``tried``, alone and in pairs; without text if so."""
    strengths = STRENGTHS if meaning else (inf,)
    yield from (means(s) for s in ((0.0, *STRENGTHS) if meaning else ()))
    yield means(inf)
    for kernel, penalties in tried.items():
        for penalty in penalties:
            yield from paired(("ridge", kernel, penalty, float(meaning)), strengths)
            if meaning:
                yield from paired(("ridge", kernel, penalty, 0.0), (inf,))


def means(strength: float) -> Mix:
    """Class means of a strength beside the text; inf is without text."""
    return ((("means", strength), 1.0),)


def paired(other: Key, strengths: tuple[float, ...]) -> Iterator[Mix]:
    """A piece alone, and beside class means."""
    yield ((other, 1.0),)
    for share in SHARES:
        yield from (((("means", s), share), (other, 1 - share)) for s in strengths)


def kernel_of(mix: Mix) -> Kernel | None:
    """What kernel a mix needs, if any."""
    return next((key[1] for key, _ in mix if key[0] in ("ridge", "logistic")), None)


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


class Terms(NamedTuple):
    """``x·weight + bias + k(x) values``: weight (C, D), bias (C,), values (m, C) of a kernel."""

    weight: Tensor | float = 0.0
    bias: Tensor | float = 0.0
    values: Tensor | float = 0.0


class Piece(NamedTuple):
    """What it says of images that it does not know, (r, C), how far that spreads, and its terms."""

    held_out: Tensor
    spread: float
    terms: Callable[[], Terms]


class Pieces:
    """What mixes are made of, on one support set, and what each says of images it does not know."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        text: Tensor,
        seed: int,
        lots: list[list[Tensor]] | None = None,
        val: Examples | None = None,
    ) -> None:
        """Of features x (n, D), left out by ``lots`` as `rounds` has it, and of ``val``."""
        self.x, self.y, self.text, self.val = x, y, text, val
        self.left_out = rows = rounds(y, len(text), seed, lots)
        self.judged = bool(rows) or val is not None
        if not self.judged:  # how far logits spread, one image a class can tell, too
            rows = list(torch.arange(len(y))[:MOST_ALONE, None])
        self.halves = [half for half in (rows[::2], rows[1::2]) if half]
        self.rows = [images for half in self.halves for images in half]
        parts = range(min(FOLDS, len(self.left_out)))
        self.folds = [torch.cat(self.left_out[i::FOLDS]) for i in parts]
        self.labels = self._both(lambda: y[torch.cat(self.rows)], lambda val: val.labels)
        self.prototypes = Prototypes(x, y, text)
        # A covariance of fewer images than dimensions says little, even shrunk.
        self.many = y.dim() == 1 and len(y) - len(y.unique()) >= x.shape[1]
        self.tried = penalties_for(len(text), even=self.many)
        self.ridges = dict[Kernel, Ridge]()
        self.judges = dict[Kernel, list[Ridge]]()  # for each half
        for kernel in self.tried:
            own = (x, y, text, kernel.width, seed)
            self.ridges[kernel] = Ridge(*own, evened(x, y, len(text)) if kernel.even else None)
            self.judges[kernel] = [self.ridges[kernel]] * len(self.halves)
            if kernel.even:  # coordinates know the images they are made of: each half has others
                self.judges[kernel] = [Ridge(*own, self._evened(torch.cat(h))) for h in self.halves]
        self._known = dict[Key, Piece]()

    def _without(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and labels of all but some images."""
        kept = torch.ones(len(self.y), dtype=torch.bool)
        kept[images] = False
        return self.x[kept], self.y[kept]

    def _evened(self, images: Tensor) -> Tensor:
        """Coordinates that know nothing of some images."""
        return evened(*self._without(images), len(self.text))

    def _both(self, left_out: Callable[[], Tensor], of: Callable[[Examples], Tensor]) -> Tensor:
        """What there is of images that are left out in turn, and of validation images."""
        found = [left_out()] if self.rows else []
        return torch.cat(found if self.val is None else [*found, of(self.val)])

    def _add(self, key: Key, held_out: Tensor, terms: Callable[[], Terms]) -> None:
        self._known[key] = Piece(held_out, spread(held_out, self.labels), terms)

    def __getitem__(self, key: Key) -> Piece:
        if key not in self._known:
            kind, *settings = key
            getattr(self, f"_{kind}")(*settings)
        return self._known[key]

    def _means(self, strength: float) -> None:
        """Class means of a strength beside the text."""
        held = self._both(
            lambda: self.prototypes.held_out(strength, self.rows),
            lambda val: val.features @ self.prototypes.weight(strength).T,
        )
        self._add(("means", strength), held, lambda: Terms(self.prototypes.weight(strength)))

    def _ridge(self, kernel: Kernel, penalty: float, text: float) -> None:
        """A ridge regression, with text or without."""
        ridge, both = self.ridges[kernel], zip(self.judges[kernel], self.halves, strict=True)
        held = self._both(
            lambda: torch.cat([own.held_out(penalty, text, rows) for own, rows in both]),
            lambda val: ridge.answers(val.features, penalty, text),
        )
        key = ("ridge", kernel, penalty, text)
        values = ridge.values
        self._add(key, held, lambda: Terms(text * self.text, values=values(penalty, text)))

    def _gaussian(self) -> None:
        """Gaussians of one covariance, fitted anew without each fold."""

        def fitted(x: Tensor, y: Tensor) -> Gda:
            found = Gda(1.0)
            found.estimate(x, y, len(self.text))
            # What all classes share is large, tells nothing, and would cost precision.
            found.weight -= found.weight.mean(0)
            found.bias -= found.bias.mean()
            return found

        whole, held = fitted(self.x, self.y), torch.zeros(len(self.y), len(self.text))
        for images in self.folds:
            held[images] = fitted(*self._without(images)).scores(self.x[images])
        found = self._both(
            lambda: held[torch.cat(self.rows)], lambda val: whole.scores(val.features)
        )
        self._add(("gaussian",), found, lambda: Terms(whole.weight, whole.bias))

    def _logistic(self, kernel: Kernel, strength: float, *_: float) -> None:
        """Logistic regressions on top of class means of a strength: of all penalties at once."""
        found = self["means", strength]
        sharp = sharpness(found.held_out, self.labels)[0] / 2
        weights = [self.prototypes.weight(strength, images) for images in (None, *self.folds)]
        regressions = Logistic(self.ridges[kernel], sharp * torch.stack(weights), self.folds)
        for penalty in RESTRAINTS:
            regressions.fit(penalty)
            held = self._both(
                lambda: regressions.held_out()[torch.cat(self.rows)],
                lambda val: regressions.answers(val.features),
            )
            terms = partial(Terms, regressions.weight, values=regressions.values)
            self._add(("logistic", kernel, strength, penalty), held, terms)

    @property
    def fair(self) -> Tensor | None:
        """(r,): whether what is said of an image tells how well others will be known.

        Of validation images it does, and of those left out unless that left few of their class.
        None where there are no others than these.
        """
        if self.val is None or self.labels.dim() > 1:
            return None
        found = self.prototypes.counts.flatten()[self.labels] >= ENOUGH
        found[-len(self.val.labels) :] = True
        return found

    def held_out(self, mix: Mix) -> Tensor:
        """(r, C) logits, of pieces that are divided by their spreads, so that all count alike."""
        parts = [share / self[key].spread * self[key].held_out for key, share in mix]
        return sum(parts, torch.zeros(()))

    def merged(self, chosen: list[tuple[Mix, float]]) -> tuple[Tensor, Tensor, Tensor, Ridge]:
        """One classifier of all, as in `Terms`, and a regression with their kernel.

        All are of one kernel, or of none.
        """
        kernels = (kernel_of(mix) for mix, _ in chosen)
        ridge = self.ridges[next(filter(None, kernels), Kernel(1.0))]
        weight, bias = torch.zeros_like(self.text), torch.zeros(len(self.text))
        values = torch.zeros(len(ridge.keys), len(self.text), dtype=torch.double)
        for mix, amount in chosen:
            for key, share in mix:
                part, terms = amount * share / self[key].spread, self[key].terms()
                weight += part * terms.weight
                bias += part * terms.bias
                values += part * terms.values
        return weight, bias, values, ridge

    def more(self, kernel: Kernel, meaning: bool) -> Iterator[list[Mix]]:
        """Other families of mixes than `blends`, beside those of a kernel."""
        if self.y.dim() > 1 or len(self.y) ** 2 * len(self.text) > MOST_MORE:
            return
        if bool((self.prototypes.counts == 0).any()):  # both would say: never that class
            return
        if self.many:
            strengths = STRENGTHS if meaning else (inf,)
            yield list(paired(("gaussian",), strengths))
        if not kernel.even:  # each fold would need its own coordinates
            settings = ((s, p) for s in STARTS[meaning] for p in RESTRAINTS)
            yield [((("logistic", kernel, *own), 1.0),) for own in settings]


def compared(logits: Iterable[Tensor], labels: Tensor) -> tuple[list[float], Tensor]:
    """Of held-out logits (r, C), how sharp each is to be, and how far each is behind the best.

    That is in standard errors of the difference in cross-entropy.
    """
    factors, losses, factor = list[float](), list[Tensor](), 1.0
    for own in logits:  # neighbours are alike: each starts where the last ended
        factor, loss = sharpness(own, labels, max(factor, 0.1))
        factors.append(factor)
        losses.append(loss)
    behind = torch.stack(losses).double()  # (candidates, r)
    behind -= behind[int(behind.mean(1).argmin())].clone()
    error = behind.std(1, unbiased=False) / behind.shape[1] ** 0.5
    return factors, behind.mean(1) / error.clamp_min(1e-9)


def weighed(pieces: Pieces, family: list[Mix]) -> tuple[list[float], list[float]]:
    """Of each mix of a family, how sharp it is to be, and its share in their average."""
    factors, apart = compared(map(pieces.held_out, family), pieces.labels)
    return factors, (-apart).softmax(0).tolist()


def weigh(pieces: Pieces, meaning: bool) -> list[tuple[Mix, float]]:
    """Mixes of one kernel with what each is multiplied by: its share times its sharpness."""
    if not pieces.judged:
        alone = [
            ((("means", s), share), (("ridge", Kernel(1.0), penalty, float(meaning)), 1 - share))
            for s, penalty, share in ALONE[meaning]
        ]
        return [(mix, 1 / len(alone)) for mix in alone]
    known = list(blends(meaning, pieces.tried))
    factors, shares = weighed(pieces, known)
    # One kernel is kept: the one whose mixes weigh most; those without any stay.
    totals = dict.fromkeys(pieces.tried, 0.0)
    for mix, share in zip(known, shares, strict=True):
        if (own := kernel_of(mix)) is not None:
            totals[own] += share
    kernel = max(totals, key=lambda k: totals[k])
    kept = [s * (kernel_of(m) in (None, kernel)) for m, s in zip(known, shares, strict=True)]
    amounts = [f * share / sum(kept) for f, share in zip(factors, kept, strict=True)]
    families = [_worth(known, amounts)]
    for family in pieces.more(kernel, meaning):
        factors, shares = weighed(pieces, family)
        families.append(_worth(family, [f * s for f, s in zip(factors, shares, strict=True)]))
    factors, apart = compared((averaged(pieces, own) for own in families), pieces.labels)
    return [
        (mix, amount * factor)
        for own, factor, behind in zip(families, factors, apart.tolist(), strict=True)
        if behind < CLEAR
        for mix, amount in own
    ]


def _worth(mixes: list[Mix], amounts: list[float]) -> list[tuple[Mix, float]]:
    """Those that are not next to nothing."""
    least = 1e-4 * max(amounts)
    return [(mix, own) for mix, own in zip(mixes, amounts, strict=True) if own >= least]


def averaged(pieces: Pieces, chosen: list[tuple[Mix, float]]) -> Tensor:
    """(r, C) held-out logits of them all."""
    return sum((amount * pieces.held_out(mix) for mix, amount in chosen), torch.zeros(()))


class Auto(contract.Head):
    """``x·weight + bias + exp(-width |x' - keys|²) values``, of all mixes that `weigh` keeps.

    x' is x, or x `turned` where the kernel that was kept is one of `evened` coordinates. The last
    term is kept `expanded`, its own bias in the other.
    Nearly equal images of a class are left out together. The logits are calibrated by one factor,
    fitted on images that were left out and on validation images, classes weighed as often as they
    are among all images.
    """

    fitted = without_text = reads_val = multilabel = True
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
        return "class means and kernel regressions on image features, weighed by folds,"

    def fit(self, evidence: Evidence, settings: HasSettings) -> HeldOut | None:
        """Choose, put together, calibrate."""
        x, labels, text = evidence.support.features, evidence.support.labels, evidence.text
        if several := labels.dim() == 2:  # what all names have in common tells for no class
            text = text - text.mean(0)
        counts = class_counts(labels, len(text))
        few = torch.arange(0, len(x), -(-len(x) * len(text) // MOST_LOGITS))
        by_names = x[few] @ text.T
        factor, losses = sharpness(by_names, labels[few])
        # Of several labels, too few images can tell: names have a say, and folds weigh it.
        meaning = several or len(losses) * log(len(text)) - float(losses.sum()) > MEANING
        meaning &= (words := bool(text.any()))  # none, where the backbone reads no text
        lots = None if several else series(x, labels, len(text))
        pieces = Pieces(x, labels, text, settings.seed, lots, evidence.val)
        chosen = weigh(pieces, meaning or (words and bool((counts == 0).any())))
        held: HeldOut | None = None
        if pieces.judged:
            logits = averaged(pieces, chosen)
            often = None
            if not several and evidence.everywhere is not None:
                often = frequencies(pieces.labels, evidence.everywhere, len(text))
            final = careful(logits, pieces.labels, often)
            held = HeldOut(final * logits, pieces.labels, final, pieces.fair)
        else:
            final = factor * spread(by_names, labels[few]) if meaning else USUAL
        weight, bias, values, ridge = pieces.merged(chosen)
        self.weight, self.keys, self.turn = final * weight, ridge.keys, ridge.turn
        self.width = torch.tensor(ridge.width)
        more, self.slope, self.values = expanded(ridge.keys, final * values, ridge.width)
        self.bias = final * bias + more
        return held

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D)."""
        seen = turned(image, self.turn)
        kernel = summed(seen, self.keys, self.width, self.bias, self.slope, self.values)
        return image @ self.weight.T + kernel
