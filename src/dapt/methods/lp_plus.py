"""LP++ (Huang et al., 2024): a linear probe blended with the text classifier."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dapt.methods import contract
from dapt.methods.contract import Evidence, Examples, HasSettings
from dapt.methods.fitting import descend
from dapt.methods.losses import class_prototypes, class_sums

# Steps of weight and bias between two of alpha, and alpha's start in mean cosines.
_PERIOD, _BLEND = 10, 250.0


class LPPlusSettings(contract.PartSettings):
    """Of LP++."""

    lp_plus_epochs: int = Field(300, ge=0, le=10**6, description="steps of LP++ over all images")


class LPPlus(contract.Head):
    """``W x + b + alpha_c (x·t_c)``: weights, biases and a blend for each class.

    Step sizes are computed from the data. As in the published code, alpha's gradients add up over
    all steps; the paper's block-wise update uses only the current one. The result is the epoch that
    is best on held-out images (the latest, if several are), or the last epoch without such images.
    """

    Settings = LPPlusSettings
    fitted = reads_val = True
    closed = "a linear probe, which knows only the classes it was fitted on"
    shapes: ClassVar = {"weight": "CD", "bias": "C", "alpha": "C"}
    weight: Tensor
    bias: Tensor
    alpha: Tensor

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What a model card says of it."""
        return "a linear classifier fitted on its image features and blended with the text"

    def fit(self, evidence: Evidence, settings: HasSettings) -> None:
        """Start, take all steps, keep the epoch that is best on held-out images, else the last."""
        support, text, val = evidence.support, evidence.text, evidence.val
        self.start(support, text, torch.Generator().manual_seed(settings.seed))
        best, kept = 0, self.state_dict()
        for _ in self.tune(support, text, settings.of(LPPlusSettings).lp_plus_epochs):
            right = 0
            if val is not None:
                right = int(self(val.features, text).argmax(-1).eq(val.labels).sum())
            if right >= best:
                best, kept = right, {name: t.clone() for name, t in self.state_dict().items()}
        self.weight, self.bias, self.alpha = (kept[name] for name in self.shapes)

    def start(self, support: Examples, text: Tensor, generator: torch.Generator) -> None:
        """Sums of features (n, D) as weights, a random bias, and one blend for all classes."""
        (classes, dimension), labels = text.shape, support.labels
        self.weight = class_sums(support.features, labels, classes)
        bias = torch.rand(classes, generator=generator).to(text)
        self.bias = (2 * bias - 1) / dimension**0.5
        cosines = (support.features * text[labels]).sum(-1, keepdim=True)  # (n, 1)
        means = class_prototypes(cosines, labels, classes)[labels.unique()]
        self.alpha = (_BLEND * means.mean()).expand(classes).clone()

    def tune(self, support: Examples, text: Tensor, epochs: int) -> Iterator[tuple[float, float]]:
        """Take steps on all of (n, D) features at once; yields cross-entropy and rate of each."""
        images, labels = support.features, support.labels
        self.weight, self.bias, self.alpha = (
            t.detach().requires_grad_() for t in (self.weight, self.bias, self.alpha)
        )
        lr = 4 * len(labels) / torch.linalg.eigvalsh(images.T @ images)[-1].item()
        lr_alpha = len(labels) / (4 * (images @ text.T).square().sum(0).max().item())
        blend = torch.optim.SGD([self.alpha], lr=lr_alpha)
        steps = descend(
            torch.optim.SGD([self.weight, self.bias], lr=lr, momentum=0.9),
            [lr] * epochs,
            lambda step: F.cross_entropy(self(images, text), labels),
        )
        for number, step in enumerate(steps, 1):
            if number % _PERIOD == 0:
                blend.step()
            yield step

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D) and (C, D)."""
        return image @ self.weight.T + self.bias + self.alpha * (image @ text.T)
