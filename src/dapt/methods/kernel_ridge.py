"""Kernel ridge regression on the errors of the text classifier, in closed form."""

from __future__ import annotations

from math import exp, factorial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dapt.methods import contract
from dapt.methods.contract import Evidence, HasSettings
from dapt.methods.held_out import HeldOut, rounds, sharpness
from dapt.methods.losses import class_sums

# Images whose features are keys; of more, so many are drawn (Nyström's approximation).
KEYS = 2000
_TERMS = 16  # of the exponential function's series; up to 2, float32 holds no more
WIDTH, PENALTIES = 1.0, (0.03, 0.1, 0.3, 1.0)


def turned(features: Tensor, turn: Tensor | None) -> Tensor:
    """(n, D) features of length one, in the coordinates of ``turn`` (D, D) if there is any."""
    return features if turn is None else F.normalize(features @ turn, dim=-1)


def similarity(image: Tensor, keys: Tensor, width: float | Tensor) -> Tensor:
    """(B, m) ``exp(-width |x - k|²)`` of normalised features (B, D) and keys (m, D)."""
    return (-2 * width * (1 - image @ keys.T)).exp()


def remainder(t: Tensor) -> Tensor:
    """``eᵗ - 1 - t`` of |t| up to 2, to its last bits, which a difference would lose."""
    found = torch.full_like(t, 1 / factorial(_TERMS))
    for n in range(_TERMS - 1, 1, -1):
        found = found * t + 1 / factorial(n)
    return found * t * t


def expanded(keys: Tensor, values: Tensor, width: float) -> tuple[Tensor, Tensor, Tensor]:
    """`similarity` times ``values`` (m, C) in parts: bias (C,), slope (C, D) and other values.

    `summed` adds them up. Of a wide kernel, values of hundreds cancel almost wholly in the first
    two; here they do so in double precision, once.
    """
    scaled = exp(-2 * width) * values.double()
    slope = 2 * width * scaled.T @ keys.double()
    return scaled.sum(0).float(), slope.float(), scaled.float()


def summed(
    image: Tensor, keys: Tensor, width: float | Tensor, bias: Tensor, slope: Tensor, values: Tensor
) -> Tensor:
    """(B, C) of features (B, D): ``bias + x·slopeᵀ + remainder(2 width x·keysᵀ) values``."""
    return bias + image @ slope.T + remainder(2 * width * (image @ keys.T)) @ values


class Ridge:
    """Ridge regressions of one width for any penalty: a support set's kernel, taken apart once.

    Of features (n, D), normalised, with labels (n,), and class features (C, D). Answers are
    ``f(x) = a x·tᵀ + k(x) values`` with ``values`` fitted to ``onehot(y) - a X·tᵀ``; a is 0 or 1.
    The kernel k sees features `turned`. With up to `KEYS` images this is kernel ridge regression
    itself.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        text: Tensor,
        width: float,
        seed: int,
        turn: Tensor | None = None,
    ) -> None:
        self.width, self.text, self.labels, self.turn = width, text, labels, turn
        self.features = features
        self.keys = seen = turned(features, turn)
        if len(features) > KEYS:
            drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
            self.keys = seen[drawn[:KEYS].sort().values]
        found, axes = torch.linalg.eigh(similarity(self.keys, self.keys, width).double())
        kept = found > 1e-10 * found[-1]
        self.strengths, self.back = found[kept], axes[:, kept] / found[kept].sqrt()  # (k,), (m, k)
        self.mapped = axes[:, kept] * found[kept].sqrt()  # (n, k)
        if self.keys is not seen:
            mapped = similarity(seen, self.keys, width).double() @ self.back
            self.strengths, axes = torch.linalg.eigh(mapped.T @ mapped)
            self.mapped, self.back = mapped @ axes, self.back @ axes
        self.onehot = class_sums(self.mapped, labels, len(text)).T  # (k, C)
        self.by_text = (self.mapped.T @ features.double()).float() @ text.T  # (k, C)

    def _damped(self, penalty: float) -> Tensor:
        """(k,) what each of the kernel's own axes is divided by."""
        return self.strengths.clamp_min(0) + penalty

    def _solved(self, penalty: float, text: float) -> Tensor:
        """(k, C) in the kernel's own axes."""
        target = self.onehot - text * self.by_text if text else self.onehot
        return target / self._damped(penalty)[:, None]

    def values(self, penalty: float, text: float) -> Tensor:
        """(m, C), in double precision."""
        return self.back @ self._solved(penalty, text)

    def answers(self, image: Tensor, penalty: float, text: float) -> Tensor:
        """(B, C) for others' features (B, D)."""
        kernel = similarity(turned(image, self.turn), self.keys, self.width).double()
        return (kernel @ self.values(penalty, text)).float() + text * image @ self.text.T

    def held_out(self, penalty: float, text: float, left_out: list[Tensor]) -> Tensor:
        """(r, C) answers for images, by `rounds`; exact, and fitted but once.

        Without the images of a round, their residuals are ``(I - H)⁻¹ (onehot(y) - f(X))`` of what
        they are with them, H the round's part of the hat matrix.
        """
        solved, found = self._solved(penalty, text), []
        shrunk = 1 / self._damped(penalty)
        for images in left_out:
            mapped, size = self.mapped[images], len(images)
            answers = mapped @ solved  # (r, C)
            if text:
                answers += text * (self.features[images] @ self.text.T)
            target, own = torch.zeros_like(answers), self.labels[images]
            if own.dim() == 2:
                target += own
            else:
                target[torch.arange(size), own] = 1
            remain = torch.eye(size, dtype=mapped.dtype) - (mapped * shrunk) @ mapped.T
            found.append(target - torch.linalg.solve(remain, target - answers))
        return torch.cat(found).float()


class KernelRidge(contract.Head):
    """``sharpness (x·tᵀ + exp(-|x - X|²) (K + penalty I)⁻¹ (onehot(y) - X·tᵀ))``.

    The penalty is chosen and the sharpness fitted on held-out images, in closed form. The second
    term is kept `expanded`.
    """

    fitted = without_text = multilabel = True
    closed = "a kernel ridge regression, which knows only the classes it was fitted on"
    shapes: ClassVar = {"bias": "C", "slope": "CD", "keys": "mD", "values": "mC", "sharpness": ""}
    bias: Tensor
    slope: Tensor
    keys: Tensor
    values: Tensor
    sharpness: Tensor

    def __init__(self, scale: float) -> None:
        super().__init__(scale)
        self.sharpness = torch.tensor(scale)

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What a model card says of it."""
        return "a kernel ridge regression on image features"

    def fit(self, evidence: Evidence, settings: HasSettings) -> HeldOut | None:
        """Values, their penalty, and the sharpness."""
        support, text = evidence.support, evidence.text
        ridge = Ridge(support.features, support.labels, text, WIDTH, settings.seed)
        left_out = rounds(support.labels, len(text), settings.seed)
        held, penalty = None, PENALTIES[1]
        if left_out:
            labels, scored = support.labels[torch.cat(left_out)], []
            for p in PENALTIES:
                logits = ridge.held_out(p, 1.0, left_out)
                factor, losses = sharpness(logits, labels)
                scored.append((float(losses.mean()), p, factor, logits))
            _, penalty, factor, logits = min(scored, key=lambda s: s[:2])
            self.sharpness = torch.tensor(factor)
            held = HeldOut(factor * logits, labels, factor)
        self.keys, values = ridge.keys, ridge.values(penalty, 1.0)
        self.bias, self.slope, self.values = expanded(ridge.keys, values, WIDTH)
        return held

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D) and (C, D)."""
        errors = summed(image, self.keys, WIDTH, self.bias, self.slope, self.values)
        return self.sharpness * (image @ text.T + errors)
