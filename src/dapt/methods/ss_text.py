"""SS-Text and SS-Text+ (Silva-Rodríguez et al., 2025): shift text features, in closed form."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dapt.methods import contract
from dapt.methods.contract import Evidence, HasSettings
from dapt.methods.losses import class_sums


class SSText(contract.Head):
    """Cosine with ``w_c = t_c + v_c / (n l)``; v_c = scale times the sum of the class's features.

    n is the number of all images, and ``l = 1 / n``. A class without images keeps its text feature.
    There is nothing to set.
    """

    fitted = True
    closed = "moved text features, which are of the classes it was fitted on"
    shapes: ClassVar = {"weight": "CD"}
    weight: Tensor

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What a model card says of it."""
        return "class weights between text and image features"

    def fit(self, evidence: Evidence, settings: HasSettings) -> None:
        """Weights (C, D), not normalised, of the support's features and the text."""
        images, labels = evidence.support.features, evidence.support.labels
        sums = self.scale * class_sums(images, labels, evidence.classes)
        counts = torch.bincount(labels, minlength=evidence.classes)[:, None]  # (C, 1)
        self.weight = evidence.text + sums / (len(labels) * self.pull(counts).clamp_min(1e-3))

    @classmethod
    def pull(cls, counts: Tensor) -> Tensor:
        """l, the weight of the text, of (C, 1) images a class."""
        return 1 / counts.sum()

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D)."""
        return super().forward(image, F.normalize(self.weight, dim=-1))


class SSTextPlus(SSText):
    """SS-Text with ``l = 1 / n_c`` for a class of n_c images; then pushes classes apart.

    To do so, it subtracts ``unit(2 w_c - mean of all)`` from each class weight.
    """

    def fit(self, evidence: Evidence, settings: HasSettings) -> None:
        """Weights (C, D), not normalised, of the support's features and the text."""
        super().fit(evidence, settings)
        self.weight -= F.normalize(2 * self.weight - self.weight.mean(0), dim=-1)

    @classmethod
    def pull(cls, counts: Tensor) -> Tensor:
        """l, the weight of the text, of (C, 1) images a class."""
        return 1 / counts.clamp_min(1)
