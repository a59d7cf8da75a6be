"""Tip-Adapter and Tip-Adapter-F (Zhang et al., 2022): a memory added to the text classifier."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dapt.errors import UserError
from dapt.methods import contract
from dapt.methods.contract import LARGEST, Evidence, Examples, HasSettings, Tensors
from dapt.methods.fitting import cosine, descend, entropy_of_views, most_accurate


class TipSettings(contract.PartSettings):
    """Of Tip-Adapter."""

    tip_alpha: float = Field(1.17, gt=0, le=LARGEST, description="weight of Tip-Adapter's memory")
    tip_beta: float = Field(1.0, gt=0, le=LARGEST, description="sharpness of Tip-Adapter's memory")
    tip_views: int = Field(10, ge=1, le=1000, description="views of each image in the memory")


class TipFSettings(TipSettings):
    """Of Tip-Adapter-F."""

    tip_epochs: int = Field(20, ge=0, le=10**6, description="epochs of tuning the memory's keys")
    tip_lr: float = Field(0.001, gt=0, le=LARGEST, description="learning rate of the keys")
    tip_batch: int = Field(256, ge=1, description="features per step of tuning the keys")


class TipAdapter(contract.Head):
    """``scale x·T + alpha exp(-beta (1 - x·K)) V``: a memory of the support images; no training.

    Keys K are each image's normalised mean features over views; V are the labels. Alpha and
    beta are chosen on held-out images, if there are any.
    """

    Settings: ClassVar[type[contract.PartSettings]] = TipSettings
    fitted = without_text = reads_views = reads_val = True
    closed = "a Tip-Adapter, whose memory is of the classes it was fitted on"
    shapes: ClassVar = {"keys": "nD", "labels": "n", "alpha": "", "beta": ""}
    keys: Tensor
    labels: Tensor  # whole numbers
    alpha: Tensor
    beta: Tensor

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What a model card says of it."""
        return "a memory of the support images' features"

    def fit(self, evidence: Evidence, settings: HasSettings) -> None:
        """Fill the memory, choose alpha and beta."""
        own = settings.of(self.Settings)
        views = evidence.views(own.tip_views)
        self.remember(views, evidence.support.labels, own.tip_alpha, own.tip_beta)
        self.refine(views, evidence, settings)
        if evidence.val is not None:
            self.choose(evidence.val, evidence.text)

    def remember(self, views: Tensor, labels: Tensor, alpha: float, beta: float) -> None:
        """Keys and values of features (V, n, D) with labels (n,)."""
        self.keys, self.labels = F.normalize(views.mean(0), dim=-1), labels.float()
        self.alpha, self.beta = torch.tensor(alpha), torch.tensor(beta)

    def refine(self, views: Tensor, evidence: Evidence, settings: HasSettings) -> None:
        """Nothing: the memory stays as it was filled."""

    @torch.no_grad()
    def choose(
        self, val: Examples, text: Tensor, scales: tuple[float, float] = (7.0, 3.0),
        steps: tuple[int, int] = (200, 20),
    ) -> None:  # fmt: skip
        """Take the first beta and alpha with the highest accuracy on held-out images.

        Of a grid whose largest values and steps are, if not given, as published.
        """
        betas, alphas = (
            [i * (scale - 0.1) / count + 0.1 for i in range(count)]
            for scale, count in zip(scales, steps, strict=True)
        )
        base, cosines = self.scale * val.features @ text.T, val.features @ self.keys.T
        memories = ((b, self._of_classes((b * cosines - b).exp(), len(text))) for b in betas)
        found = (((a, b), base + a * memory) for b, memory in memories for a in alphas)
        self.alpha, self.beta = map(torch.tensor, most_accurate(found, val.labels))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D) and (C, D)."""
        near = (-self.beta * (1 - image @ self.keys.T)).exp()  # (B, n)
        return self.scale * image @ text.T + self.alpha * self._of_classes(near, len(text))

    def _of_classes(self, near: Tensor, classes: int) -> Tensor:
        """(B, C) sums of (B, n) over the images of each class."""
        return near.new_zeros(near.shape[0], classes).index_add(1, self.labels.long(), near)

    def load(self, tensors: Tensors, classes: int, dimension: int, where: str) -> None:
        """Keys (n, D), labels (n,), alpha and beta."""
        super().load(tensors, classes, dimension, where)
        labels = self.labels
        if not bool(((labels >= 0) & (labels < classes) & (labels == labels.round())).all()):
            raise UserError(f"{where} has labels of other than {classes} classes; train again")


class TipAdapterF(TipAdapter):
    """A Tip-Adapter whose keys are tuned with the initial alpha and beta, and not normalised again.

    The published code keeps the epoch that is best on test images. dapt keeps the last one, because
    it chooses nothing on test images.
    """

    Settings = TipFSettings

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What a model card says of it."""
        return "a memory of the support images' features, tuned,"

    def refine(self, views: Tensor, evidence: Evidence, settings: HasSettings) -> None:
        """Tune the keys as the settings say."""
        own: TipFSettings = settings.of(TipFSettings)
        labels, order = evidence.support.labels, torch.Generator().manual_seed(settings.seed)
        how = (own.tip_epochs, own.tip_lr, own.tip_batch)
        for _ in self.tune(views, labels, evidence.text, *how, order):
            pass

    def tune(
        self,
        views: Tensor,
        labels: Tensor,
        text: Tensor,
        epochs: int,
        lr: float,
        batch: int,
        generator: torch.Generator | None,
    ) -> Iterator[tuple[float, float]]:
        """Tune the keys by AdamW, the rate a cosine over all steps; epoch e sees view e mod V.

        Views are (V, n, D), not normalised, labels (n,), text (C, D); the generator is of the
        order, None keeps the images' own. Yields cross-entropy and learning rate of each step.
        """
        self.keys = self.keys.detach().requires_grad_()
        optimizer = torch.optim.AdamW([self.keys], lr=lr, eps=1e-4, weight_decay=0.01)
        drawn, count = generator is not None, len(labels)
        batches = [
            (epoch % len(views), part)
            for epoch in range(epochs)
            for part in (
                torch.randperm(count, generator=generator) if drawn else torch.arange(count)
            ).split(batch)
        ]

        loss = entropy_of_views(self, views, labels, text, batches)
        yield from descend(optimizer, cosine(lr, len(batches)), loss)
        self.keys = self.keys.detach()
