"""Tip-Adapter-F (Zhang et al., 2022): a memory of the support images beside the text classifier."""

from __future__ import annotations

from collections.abc import Iterator
from math import cos, pi

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dapt.errors import UserError
from dapt.methods import contract
from dapt.methods.contract import LARGEST, Examples, HasSettings, Tensors


class TipSettings(contract.PartSettings):
    """Of Tip-Adapter-F."""

    tip_alpha: float = Field(1.17, gt=0, le=LARGEST, description="weight of Tip-Adapter's memory")
    tip_beta: float = Field(1.0, gt=0, le=LARGEST, description="sharpness of Tip-Adapter's memory")
    tip_views: int = Field(10, ge=1, le=1000, description="views of an image in the memory")
    tip_epochs: int = Field(20, ge=0, le=10**6, description="passes that tune the memory's keys")
    tip_lr: float = Field(0.001, gt=0, le=LARGEST, description="learning rate of the keys")
    tip_batch: int = Field(256, ge=1, description="features a step of the keys")


class TipAdapterF(contract.Head):
    """``scale x·T + alpha exp(-beta (1 - x·K)) V``: keys K of the support images are tuned.

    K starts as the mean of an image's features over views, normalised, and is not normalised
    again; V are the labels. Keys are tuned at the initial alpha and beta, which are then chosen on
    held-out images, where there are any. The published code keeps the epoch that is best on test
    images; this one keeps the last, as nothing here is chosen on test images.
    """

    Settings = TipSettings
    fitted = reads_views = reads_val = True
    closed = "a Tip-Adapter, whose memory is of the classes it was fitted on"
    labels: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, scale: float) -> None:
        super().__init__(scale)
        self.keys = nn.Parameter(torch.zeros(0, 0))  # (n, D)
        self.register_buffer("labels", torch.zeros(0))  # (n,), whole numbers
        self.register_buffer("alpha", torch.ones(()))
        self.register_buffer("beta", torch.ones(()))

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What a model card says of it."""
        return "a memory of the support images' features, tuned,"

    def fit(self, evidence: contract.Evidence, settings: HasSettings) -> None:
        """Fill the memory, tune its keys, choose alpha and beta."""
        own: TipSettings = settings.of(TipSettings)
        views, labels, text = evidence.views(own.tip_views), evidence.support.labels, evidence.text
        self.remember(views, labels, own.tip_alpha, own.tip_beta)
        order = torch.Generator().manual_seed(settings.seed)
        for _ in self.tune(views, labels, text, own.tip_epochs, own.tip_lr, own.tip_batch, order):
            pass
        if evidence.val is not None:
            self.choose(evidence.val, text)

    def remember(self, views: Tensor, labels: Tensor, alpha: float, beta: float) -> None:
        """Keys and values of features (V, n, D) with labels (n,)."""
        self.keys = nn.Parameter(F.normalize(views.mean(0), dim=-1))
        self.labels = labels.float()
        self.alpha, self.beta = torch.tensor(alpha), torch.tensor(beta)

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
        optimizer = torch.optim.AdamW([self.keys], lr=lr, eps=1e-4, weight_decay=0.01)
        count = len(labels)
        total, step = epochs * -(-count // batch), 0
        for epoch in range(epochs):
            images = F.normalize(views[epoch % len(views)], dim=-1)
            drawn = generator is not None
            order = torch.randperm(count, generator=generator) if drawn else torch.arange(count)
            for part in order.split(batch):
                rate = lr * (1 + cos(pi * step / total)) / 2
                optimizer.param_groups[0]["lr"] = rate
                loss = F.cross_entropy(self(images[part], text), labels[part])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                step += 1
                yield loss.item(), rate

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
        base, cosines, best = self.scale * val.features @ text.T, val.features @ self.keys.T, -1.0
        for beta in betas:
            memory = self._of_classes(((-1) * (beta - beta * cosines)).exp(), len(text))
            for alpha in alphas:
                accuracy = (base + alpha * memory).argmax(-1).eq(val.labels).float().mean().item()
                if accuracy > best:
                    best = accuracy
                    self.alpha, self.beta = torch.tensor(alpha), torch.tensor(beta)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D) and (C, D)."""
        near = (-self.beta * (1 - image @ self.keys.T)).exp()  # (B, n)
        return self.scale * image @ text.T + self.alpha * self._of_classes(near, len(text))

    def _of_classes(self, near: Tensor, classes: int) -> Tensor:
        """(B, C) sums of (B, n) over the images of each class."""
        return near.new_zeros(near.shape[0], classes).index_add(1, self.labels.long(), near)

    def load(self, tensors: Tensors, classes: int, dimension: int, where: str) -> None:
        """Keys (n, D), labels (n,), alpha and beta."""
        labels = tensors.get("labels", torch.zeros(0))
        count = labels.numel()
        needed = {"keys": (count, dimension), "labels": (count,), "alpha": (), "beta": ()}
        if not count or {name: tuple(t.shape) for name, t in tensors.items()} != needed:
            raise UserError(f"{where} is no Tip-Adapter of these features; train again")
        if not bool(((labels >= 0) & (labels < classes) & (labels == labels.round())).all()):
            raise UserError(f"{where} has labels of other than {classes} classes; train again")
        self.keys, self.labels = nn.Parameter(tensors["keys"].float()), labels.float()
        self.alpha, self.beta = tensors["alpha"].float(), tensors["beta"].float()
