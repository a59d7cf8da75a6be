"""ProLIP (Fahes et al., 2024): tunes the image tower's projection, near its first values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dapt.errors import UserError
from dapt.methods import contract
from dapt.methods.contract import LARGEST, Evidence, HasSettings, Tensors
from dapt.methods.fitting import cosine, descend

if TYPE_CHECKING:  # it brings open_clip along, which the table of methods should not
    from dapt.clip.backbone import Backbone


class ProLIPSettings(contract.PartSettings):
    """Of ProLIP."""

    prolip_steps: int = Field(300, ge=0, le=10**6, description="steps that tune the projection")
    prolip_views: int = Field(300, ge=1, le=1000, description="views of each image to tune on")
    prolip_lr: float = Field(1e-5, gt=0, le=LARGEST, description="learning rate of the projection")
    prolip_lambda: float | None = Field(
        None, ge=0, le=LARGEST, description="pull to first values; else 1 / images per class"
    )


class ProLIP(contract.Head):
    """``scale unit(P x)·t_c``, with pooled features x before the projection P, which is tuned.

    The loss is cross-entropy plus lambda times the sum of squared differences from the first P.
    Each step uses all images, in one of their views. The result also works for classes that had no
    images. Features x are normalised, which changes nothing, because P x is normalised again.
    """

    Settings = ProLIPSettings
    fitted = reads_views = projects = True
    shapes: ClassVar = {"projection": "DE"}
    projection: Tensor

    @classmethod
    def create(cls, backbone: Backbone) -> ProLIP:
        """With the projection of the backbone, as zero-shot CLIP."""
        backbone.require_text()
        head = cls(backbone.logit_scale)
        head.projection = backbone.projection.clone()
        return head

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What a model card says of it."""
        return "a tuned projection of its image features"

    def fit(self, evidence: Evidence, settings: HasSettings) -> None:
        """Tune the projection on training views."""
        own: ProLIPSettings = settings.of(ProLIPSettings)
        labels, pull = evidence.support.labels, own.prolip_lambda
        pull = 1 / int(torch.bincount(labels).max()) if pull is None else pull
        views, rates = evidence.views(own.prolip_views), cosine(own.prolip_lr, own.prolip_steps)
        for _ in self.tune(views, labels, evidence.text, pull, rates):
            pass

    def tune(
        self, views: Tensor, labels: Tensor, text: Tensor, pull: float, rates: list[float]
    ) -> Iterator[tuple[float, float]]:
        """Tune by Adam; yields the loss and learning rate of each step.

        Views are (V, n, D), before the projection, taken in the order 1 .. V - 1, 0; labels (n,),
        text (C, E).
        """
        first = self.projection.to(text)
        self.projection = first.clone().requires_grad_()

        def loss(step: int) -> Tensor:
            logits = self(views[(step + 1) % len(views)], text)
            return F.cross_entropy(logits, labels) + pull * (self.projection - first).square().sum()

        yield from descend(torch.optim.Adam([self.projection], eps=1e-4), rates, loss)
        self.projection = self.projection.detach()

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) logits of features before the projection (B, D) and normalised (C, E)."""
        return super().forward(F.normalize(image @ self.projection, dim=-1), text)

    def load(self, tensors: Tensors, classes: int, dimension: int, where: str) -> None:
        """A projection (D, E), from and to as many numbers as the backbone's."""
        needed = self.projection.shape
        super().load(tensors, classes, dimension, where)
        if self.projection.shape != needed:
            raise UserError(f"{where} does not hold what fits the backbone's text; train again")
