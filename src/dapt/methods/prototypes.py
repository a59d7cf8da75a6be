"""Text + prototype: adds the features of a class's name and the mean of its images' features."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dapt.methods import contract
from dapt.methods.contract import Evidence, HasSettings
from dapt.methods.held_out import HeldOut, rounds, sharpness
from dapt.methods.losses import class_counts, class_sums

STRENGTHS = (0.3, 1.0, 3.0)


class Prototypes:
    """Classifiers ``w_c = normalise(t_c + strength · mean of class c's images)``.

    Of support features (n, D), normalised, with labels (n,), and class features (C, D).
    """

    def __init__(self, features: Tensor, labels: Tensor, text: Tensor) -> None:
        self.features, self.labels, self.text = features, labels, text
        self.sums = class_sums(features, labels, len(text))
        self.counts = class_counts(labels, len(text))

    def weight(self, strength: float, without: Tensor | None = None) -> Tensor:
        """(C, D), of all images or ``without`` some, by `rounds`; inf leaves the text out."""
        sums, counts = self.sums, self.counts
        if without is not None:
            own = self.labels[without]
            sums, counts = sums.clone(), counts.clone()
            if own.dim() == 2:
                sums -= own.T @ self.features[without]
                counts -= own.sum(0)
            else:
                sums.index_add_(0, own, self.features[without], alpha=-1)
                counts -= own.bincount(minlength=len(counts))
        means = sums / counts.clamp_min(1)[:, None]
        means[counts == 0] = 0  # not what rounding leaves
        blend = means if strength == float("inf") else self.text + strength * means
        return F.normalize(blend, dim=-1)

    def held_out(self, strength: float, left_out: list[Tensor]) -> Tensor:
        """(r, C) logits of images, by `rounds`."""
        return torch.cat([self.features[f] @ self.weight(strength, f).T for f in left_out])


class TextPrototype(contract.Head):
    """``scale x·w`` with the strength that held-out images prefer, or 1 with one image per class.

    With two images per class, holding one out leaves a mean of a single image, which understates
    how good the means are. So the strength stays 1 unless another is clearly better.
    """

    fitted = True
    closed = "text and prototype, whose means are of the classes it was fitted on"
    shapes: ClassVar = {"weight": "CD"}
    weight: Tensor

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What a model card says of it."""
        return "class means of image features, added to the text's,"

    def fit(self, evidence: Evidence, settings: HasSettings) -> HeldOut | None:
        """Means, and their strength."""
        support = evidence.support
        own = Prototypes(support.features, support.labels, evidence.text)
        left_out = rounds(support.labels, evidence.classes, settings.seed)
        self.weight = own.weight(1.0)
        if not left_out:
            return None
        labels = support.labels[torch.cat(left_out)]
        found = {s: own.held_out(s, left_out) for s in STRENGTHS}
        losses = {s: sharpness(logits, labels)[1] for s, logits in found.items()}
        best = min(losses, key=lambda s: float(losses[s].mean()))
        gain = losses[1.0] - losses[best]
        if float(gain.mean()) <= float(gain.std(unbiased=False)) / len(labels) ** 0.5:
            best = 1.0
        self.weight = own.weight(best)
        return HeldOut(self.scale * found[best], labels)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D)."""
        return self.scale * image @ self.weight.T
