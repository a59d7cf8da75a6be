"""CLAP and ZS-LP (Silva-Rodríguez et al., 2024): tune class weights that start as text features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dapt.methods import contract
from dapt.methods.contract import LARGEST, Evidence, HasSettings
from dapt.methods.fitting import descend, learning_rate
from dapt.methods.losses import class_prototypes


class ClapSettings(contract.PartSettings):
    """Of CLAP and of ZS-LP."""

    clap_views: int = Field(20, ge=1, le=1000, description="views of each image to tune CLAP on")
    clap_epochs: int = Field(300, ge=0, le=10**6, description="epochs of tuning CLAP's weights")
    clap_lr: float = Field(0.1, gt=0, le=LARGEST, description="learning rate of CLAP's weights")
    clap_batch: int = Field(256, ge=1, description="features per step of tuning CLAP's weights")


class ZeroShotProbe(contract.Head):
    """Cosine with weights w that start as the text features t (not normalised).

    All views form one pool. An epoch shuffles it and takes as many full batches as the images would
    fill in a single view, but at least one. The last epoch is the result.
    """

    Settings = ClapSettings
    fitted = reads_views = True
    closed = "tuned class weights, which are of the classes it was fitted on"
    shapes: ClassVar = {"weight": "CD"}
    weight: Tensor

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What a model card says of it."""
        return "class weights tuned from the text features"

    def fit(self, evidence: Evidence, settings: HasSettings) -> None:
        """Tune the weights on all views."""
        own: ClapSettings = settings.of(ClapSettings)
        views = evidence.views(own.clap_views)  # (V, n, D)
        features = F.normalize(views.flatten(0, 1), dim=-1)
        labels = evidence.support.labels.repeat(len(views))
        steps, generator = max(1, views.shape[1] // own.clap_batch), torch.Generator()
        generator.manual_seed(settings.seed)
        orders = (
            torch.randperm(len(labels), generator=generator)[: steps * own.clap_batch]
            for _ in range(own.clap_epochs)
        )
        batches = [part for order in orders for part in order.split(own.clap_batch)]
        epochs = (epoch for epoch in range(own.clap_epochs) for _ in range(steps))
        rates = (learning_rate(epoch, own.clap_epochs, own.clap_lr) for epoch in epochs)
        text = evidence.text * evidence.text_lengths
        for _ in self.tune(features, labels, text, batches, rates):
            pass

    def tune(
        self,
        features: Tensor,
        labels: Tensor,
        text: Tensor,
        batches: Sequence[Tensor],
        rates: Iterable[float],
    ) -> Iterator[tuple[float, float]]:
        """Tune by SGD; yields the loss and learning rate of each step.

        Features are (n, D), normalised, labels (n,), text (C, D), not normalised; batches are
        places among the n.
        """
        pull = self.pull(features, labels, text)  # (C,)
        self.weight = text.clone().requires_grad_()

        def loss(step: int) -> Tensor:
            part = batches[step]
            away = (self.weight - text).square().sum(-1)  # (C,)
            return F.cross_entropy(self(features[part], text), labels[part]) + (pull * away).mean()

        yield from descend(torch.optim.SGD([self.weight], lr=1.0, momentum=0.9), rates, loss)
        self.weight = self.weight.detach()

    def pull(self, features: Tensor, labels: Tensor, text: Tensor) -> Tensor:
        """(C,) weights of the squared distance to the text: here none."""
        return text.new_zeros(len(text))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D)."""
        return super().forward(image, F.normalize(self.weight, dim=-1))


class Clap(ZeroShotProbe):
    """ZS-LP, with the mean over classes of ``lambda_c |w_c - t_c|²`` in the loss (its l2 form)."""

    def pull(self, features: Tensor, labels: Tensor, text: Tensor) -> Tensor:
        """lambda: how probable zero-shot CLIP finds the true class, on average over its images.

        One for a class without images.
        """
        logits = contract.Head.forward(self, features, F.normalize(text, dim=-1))
        chance = logits.softmax(-1).gather(1, labels[:, None])  # (n, 1)
        means = class_prototypes(chance, labels, len(text)).squeeze(-1)
        means[torch.bincount(labels, minlength=len(text)) == 0] = 1
        return means
