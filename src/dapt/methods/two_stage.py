"""2SFS (Farina et al., 2025): tunes layer norms of both towers, then a classifier on the result.

The first stage tunes the towers as any method does; the second stage is a head. As in the published
code, only ``ln_1`` and ``ln_2`` of every layer are learned. The layer norms before and after the
layers stay frozen, which the paper does not say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dapt.errors import UserError
from dapt.methods.contract import (
    LARGEST,
    Evidence,
    HasSettings,
    Head,
    PartSettings,
    Tensors,
    TowerPart,
)
from dapt.methods.fitting import LEAST_LR, cosine, descend, entropy_of_views
from dapt.methods.layouts import CLIP, Layout, Published
from dapt.methods.published import settings_for
from dapt.methods.weights import DESCENT

if TYPE_CHECKING:  # it brings open_clip along, which the table of methods should not
    from dapt.clip.backbone import Backbone

_NORMS = ("ln_1", "ln_2")
# As the state dict of the code's last model (fs/twostage.py) has it, which holds CLIP, that one's
# image tower once more, and class weights; names without CLIP's attribute are taken too.
LAYOUTS = (
    Layout(
        (
            *(
                Published(f"clip_model.{where}transformer.resblocks.{{}}.{norm}.{of}",
                          f"{kind}_norms.{{}}.{norm}.{of}", dims=1)
                for where, kind in (("", "text"), ("visual.", "visual"))
                for norm in _NORMS
                for of in ("weight", "bias")
            ),
            Published("classifier", "weight"),
        ),
        aside=("backbone.", *CLIP),
    ),
)  # fmt: skip


def usual(dataset: str, shots: int) -> dict[str, Any]:
    """Those of the published code, whose first stage is 60 % of the steps; fewer on own data."""

    def both(steps: int) -> dict[str, Any]:
        return {"steps": (first := int(0.6 * steps)), "classifier_steps": steps - first}

    few = {"steps": None, "epochs": 12, "classifier_steps": 8}
    own = both(100 * shots)
    return settings_for(dataset, shots, DESCENT | {"lr": 2e-4} | both(300 * shots), own, few)


class LayerNorms(TowerPart):
    """A tower's layer norms: ``<kind>_norms.<layer>.ln_1.weight``, ``.bias`` and so on in files."""

    kind: ClassVar[str]
    tower: ClassVar[str]

    def __init__(self, blocks: Sequence[Any]) -> None:
        super().__init__()
        own = [
            nn.ModuleDict({name: _copy(getattr(block, name)) for name in _NORMS})
            for block in blocks
        ]
        setattr(self, f"{self.kind}_norms", nn.ModuleList(own))

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> LayerNorms:
        """They start as they are."""
        return cls(backbone.blocks(cls.tower))

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """Such as "layer norms of the image tower"."""
        return f"layer norms of the {cls.tower} tower"

    def norm(
        self, tower: str, layer: int, name: str, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is learned, in place of the frozen ones."""
        layers: Any = getattr(self, f"{self.kind}_norms")
        own = layers[layer][name]
        return own["weight"], own["bias"]


def _copy(norm: nn.LayerNorm) -> nn.ParameterDict:
    return nn.ParameterDict(
        {name: p.detach().float().clone() for name, p in norm.named_parameters()}
    )


class TextNorms(LayerNorms):
    """Weights and biases of the layer norms in every layer."""

    kind, tower, towers = "text", "text", frozenset({"text"})


class VisualNorms(LayerNorms):
    """Weights and biases of the layer norms in every layer."""

    kind, tower, towers = "visual", "image", frozenset({"image"})


class ClassifierSettings(PartSettings):
    """Of 2SFS's second stage."""

    classifier_steps: int = Field(1920, ge=1, le=10**7, description="steps of 2SFS's second stage")
    classifier_lr: float = Field(2e-4, gt=0, le=LARGEST, description="highest lr of these steps")
    classifier_batch: int = Field(32, ge=1, description="images per step of the second stage")


class TwoStage(Head):
    """Cosines with class weights, tuned from the text features, on the tuned towers' features.

    Classes that it was not fitted on get cosines with their text.
    """

    Settings = ClassifierSettings
    fitted = reads_views = carries = True
    shapes: ClassVar = {"weight": "KD"}
    weight: Tensor

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What a model card says of it."""
        return "class weights tuned from the text features"

    def fit(self, evidence: Evidence, settings: HasSettings) -> None:
        """Tune the weights on as many training views as the steps see."""
        own: ClassifierSettings = settings.of(ClassifierSettings)
        labels, generator = evidence.support.labels, torch.Generator().manual_seed(settings.seed)
        size = min(own.classifier_batch, count := len(labels))
        each = count // size  # full batches of a view
        views = evidence.views(-(-own.classifier_steps // each))  # (V, n, D)
        batches = [
            (view, part)
            for view in range(len(views))
            for part in torch.randperm(count, generator=generator).split(size)[:each]
        ][: own.classifier_steps]
        rates = cosine(own.classifier_lr, len(batches), LEAST_LR)
        for _ in self.tune(views, labels, evidence.text, batches, rates):
            pass

    def tune(
        self,
        views: Tensor,
        labels: Tensor,
        text: Tensor,
        batches: Sequence[tuple[int, Tensor]],
        rates: Sequence[float],
    ) -> Iterator[tuple[float, float]]:
        """Tune by AdamW; yields cross-entropy and learning rate of each step.

        Views are (V, n, D), labels (n,), text (C, D), normalised; a batch is a view's number and
        places among its n.
        """
        self.weight = text.clone().requires_grad_()

        loss = entropy_of_views(self, views, labels, text, batches)
        decay = DESCENT["weight_decay"]
        yield from descend(torch.optim.AdamW([self.weight], weight_decay=decay), rates, loss)
        self.weight = self.weight.detach()

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D)."""
        return super().forward(image, F.normalize(self.weight, dim=-1))

    def carry(self, own: Sequence[str], names: Sequence[str], text: Tensor) -> None:
        """Rows of its own classes, by name, and the text features of others."""
        known = dict(zip(own, self.weight, strict=False))  # those that were added have none
        self.weight = torch.stack(
            [known.get(name, row) for name, row in zip(names, text, strict=True)]
        )

    def load(self, tensors: Tensors, classes: int, dimension: int, where: str) -> None:
        """Weights (K, D) of the first K classes."""
        super().load(tensors, classes, dimension, where)
        if len(self.weight) > classes:
            raise UserError(f"{where} has weights of more than {classes} classes; train again")
