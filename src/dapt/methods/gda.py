"""GDA (Wang et al., 2024): Gaussian discriminant analysis added to the text classifier."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dapt.methods import contract
from dapt.methods.contract import LARGEST, Evidence, Examples, HasSettings
from dapt.methods.fitting import most_accurate
from dapt.methods.losses import class_prototypes


class GdaSettings(contract.PartSettings):
    """Of GDA."""

    gda_alpha: float = Field(
        1.0, gt=0, le=LARGEST, description="weight of GDA's classifier, if there are no val images"
    )
    gda_views: int = Field(10, ge=1, le=1000, description="views of each image in GDA's statistics")


class Gda(contract.Head):
    """``scale x·T + alpha (W x + b)``: Gaussians with one covariance, in closed form.

    Every view of an image counts as a sample. Alpha is the power of ten that is best on held-out
    images (the first, if several are). Without held-out images, which the published code needs,
    both classifiers' log-posteriors have equal weight here. A class without images gets the mean of
    the other classes' means, so that the text decides.
    """

    Settings = GdaSettings
    fitted = without_text = reads_views = reads_val = True
    closed = "a Gaussian classifier, which knows only the classes it was fitted on"
    shapes: ClassVar = {"weight": "CD", "bias": "C", "alpha": ""}
    weight: Tensor
    bias: Tensor
    alpha: Tensor

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What a model card says of it."""
        return "a Gaussian classifier of its image features"

    def fit(self, evidence: Evidence, settings: HasSettings) -> None:
        """Estimate the Gaussians, choose alpha."""
        own: GdaSettings = settings.of(GdaSettings)
        views = F.normalize(evidence.views(own.gda_views), dim=-1)  # (V, n, D)
        labels = evidence.support.labels.repeat(len(views))
        self.estimate(views.flatten(0, 1), labels, evidence.classes)
        self.alpha = torch.tensor(own.gda_alpha)
        if evidence.val is not None:
            self.choose(evidence.val, evidence.text)

    def estimate(self, features: Tensor, labels: Tensor, classes: int) -> None:
        """Weights and biases of normalised features (n, D) with labels (n,)."""
        means = class_prototypes(features, labels, classes)  # (C, D)
        there = torch.bincount(labels, minlength=classes) > 0
        means[~there] = means[there].mean(0)
        self.weight = means @ precision(features - means[labels])
        self.bias = -means.new_tensor(classes).log() - (self.weight * means).sum(-1) / 2

    def choose(self, val: Examples, text: Tensor) -> None:
        """Take the first alpha of 1e-4 .. 1e2 with the highest accuracy on held-out images."""
        base, scores = self.scale * val.features @ text.T, self.scores(val.features)
        alphas = [10.0**power for power in range(-4, 3)]
        self.alpha = torch.tensor(
            most_accurate(((a, base + a * scores) for a in alphas), val.labels)
        )

    def scores(self, image: Tensor) -> Tensor:
        """(B, C) log-posteriors, up to what all classes share, of normalised features (B, D)."""
        return image @ self.weight.T + self.bias

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D) and (C, D)."""
        return self.scale * image @ text.T + self.alpha * self.scores(image)


def precision(residuals: Tensor) -> Tensor:
    """(D, D) inverse covariance of (n, D) centred features, shrunk: ``D ((n - 1) S + tr(S) 1)⁺``.

    Without any spread it is zero, and leaves all to the text.
    """
    scatter = (residuals.T @ residuals).double()  # (n - 1) S
    count, dimension = residuals.shape
    ridge = scatter.trace() / max(1, count - 1) * torch.eye(dimension).to(scatter)
    # What is below the tolerance is what rounding leaves of equal images.
    inverse = torch.linalg.pinv(scatter + ridge, atol=1e-10, hermitian=True)
    return dimension * inverse.to(residuals.dtype)
