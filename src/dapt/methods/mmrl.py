"""MMRL (Guo and Gu, 2025): tokens from a shared space, inserted into later layers of both towers.

The image tower's output for these tokens is a second feature of the image. Both features are tuned
to predict the class; the usual one must also stay near the frozen model's. As published, the method
is tuned by AdamW, and on benchmarks at a fixed logit scale of 100.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dapt.errors import UserError
from dapt.methods import published
from dapt.methods.contract import LARGEST, HasSettings, LossTerm, PartSettings, Step, TowerPart
from dapt.methods.ivlp import put
from dapt.methods.layouts import Layout, Published
from dapt.methods.prompts import linear_map

if TYPE_CHECKING:  # it brings open_clip along, which the table of methods should not
    from dapt.clip.backbone import Backbone

# configs/trainers/MMRL of the code, its setting of few shots.
PUBLISHED: dict[str, Any] = {
    "lr": 0.001, "batch_size": 32, "epochs": 50, "crop_min": 0.5, "optimizer": "adamw",
    "logit_scale": 100.0,
}  # fmt: skip
# Of own data, whose backbone has a scale of its own; of few images passes are everyone's.
OWN = {"logit_scale": None}
FEW = {"lr": 5e-4, "epochs": None}
# Weights of the pull to the frozen model (trainers/config.py of the code).
_NEAR = {"stanford_cars": 7.0, "fgvc_aircraft": 6.0, "sun397": 6.0, "dtd": 6.0, "food101": 5.0,
         "oxford_flowers": 4.0, "ucf101": 3.0, "oxford_pets": 0.2, "eurosat": 0.01}  # fmt: skip
_WIDE = {"eurosat": {"rep_width": 2048}}
# As the code (trainers/mmrl.py) saves it: the whole model. It keeps no share of the two features.
LAYOUTS = (
    Layout((
        Published("representation_learner.compound_rep_tokens", "rep_tokens"),
        Published("image_encoder.proj_rep", "rep_projection"),
        *(
            Published(f"representation_learner.compound_rep_tokens_{key}.{{}}.{of}",
                      f"{name}.{{}}.{of}", dims=dims)
            for key, name in (("r2vproj", "rep_to_visual"), ("r2tproj", "rep_to_text"))
            for of, dims in (("weight", 2), ("bias", 1))
        ),
    )),
)  # fmt: skip


def usual(dataset: str, shots: int) -> dict[str, Any]:
    """The published settings, and on own data the backbone's scale; fewer steps of few images."""
    near = {"near_frozen": _NEAR[dataset]} if dataset in _NEAR else {}
    own = PUBLISHED | near | _WIDE.get(dataset, {})
    return published.settings_for(dataset, shots, own, OWN, FEW)


class BlendSettings(PartSettings):
    """Of the two features of an image."""

    rep_alpha: float = Field(0.7, gt=0, lt=1, description="share of the usual feature in logits")


class RepresentationSettings(BlendSettings):
    """Of tokens that both towers share."""

    rep_tokens: int = Field(5, ge=1, le=2**10, description="number of tokens in the shared space")
    rep_width: int = Field(512, ge=1, le=2**16, description="width of the shared space")
    rep_from: int = Field(6, ge=1, le=2**10, description="first layer with tokens, counted from 1")


class NearFrozenSettings(PartSettings):
    """Of the pull towards the frozen model."""

    near_frozen: float = Field(
        0.5, ge=0, le=LARGEST, description="pull to the frozen model's features"
    )


class Representation(TowerPart):
    """Tokens R (n, rep_width), with a linear map of them for each later layer of each tower.

    They enter without positional embeddings at the first of these layers, after the start token of
    a text or beside the class token of an image. At each later layer, new ones replace the outputs
    of the previous ones. Logits are ``a f·t + (1 - a) r·t`` times the scale; f is the class token's
    feature, r the projected mean of the tokens at the image tower's end. Both terms fit into one
    dot product of vectors of length one, ``[sqrt(a) f, sqrt(1 - a) r]·[sqrt(a) t, sqrt(1 - a) t]``.
    These vectors are the features, so any head can follow. Classes that were not tuned on are
    predicted by f alone, as in the published code.
    """

    towers = frozenset({"text", "image"})
    Settings = RepresentationSettings

    def __init__(
        self,
        tokens: Tensor,
        to_visual: list[nn.Linear],
        to_text: list[nn.Linear],
        projection: Tensor,
        *,
        first: int,
        alpha: float,
        starts: int = 1,
    ) -> None:
        """Layers count from 0 here; ``starts`` is the number of start tokens of a text."""
        super().__init__()
        self.rep_tokens = nn.Parameter(tokens.float().clone())  # (n, rep_width)
        self.rep_to_visual, self.rep_to_text = nn.ModuleList(to_visual), nn.ModuleList(to_text)
        self.rep_projection = nn.Parameter(projection.float().clone())  # (vision width, D)
        self.first, self.alpha, self.starts, self.reads = first, alpha, starts, len(tokens)

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> Representation:
        """Tokens from N(0, 0.02), equal maps in all layers of a tower, a random projection."""
        own: RepresentationSettings = settings.of(RepresentationSettings)
        _require_plain(backbone)
        layers = min(backbone.text_layers, backbone.vision_layers)
        first = min(own.rep_from, layers) - 1
        generator = torch.Generator().manual_seed(2 * settings.seed)
        tokens = 0.02 * torch.randn(own.rep_tokens, own.rep_width, generator=generator)
        visual, text = (
            linear_map(own.rep_width, width, generator)
            for width in (backbone.vision_width, backbone.text_width)
        )
        maps = [[deepcopy(one) for _ in range(first, layers)] for one in (visual, text)]
        projection = torch.randn(backbone.projection.shape, generator=generator)
        projection *= backbone.vision_width**-0.5
        starts = len(backbone.start_tokens)
        learned = (tokens, maps[0], maps[1], projection)
        return cls(*learned, first=first, alpha=own.rep_alpha, starts=starts)

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What a model card says of it."""
        own: RepresentationSettings = settings.of(RepresentationSettings)
        words = f"{own.rep_tokens} learned tokens, mapped into both towers from layer"
        return f"{words} {own.rep_from} on, and a second image feature of what becomes of them,"

    @classmethod
    def settings_of(cls, tensors: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Any]:
        """Number and width of tokens, and the layer from which on there are maps."""
        count, width = tensors["rep_tokens"].shape
        maps = sum(name.startswith("rep_to_text.") for name in tensors) // 2
        first = min(backbone.text_layers, backbone.vision_layers) - maps + 1
        return {"rep_tokens": count, "rep_width": width, "rep_from": max(1, first)}

    def before_layer(self, tower: str, layer: int, x: Tensor, at: slice) -> Tensor:
        """The layer's own tokens, new at the first and in place of the last at later ones."""
        maps = self.rep_to_visual if tower == "image" else self.rep_to_text
        if not 0 <= (index := layer - self.first) < len(maps):
            return x
        start = at.start if tower == "image" else self.starts
        there = self.reads if index else 0
        return put(maps[index](self.rep_tokens), x, slice(start, start + there))

    def features(self, tower: str, x: Tensor, tokens: Tensor | None) -> Tensor:
        """(..., 2 D): both features of images, each as long as its share; what is alone, twice."""
        other = x
        if tokens is not None:
            x, other = (F.normalize(f, dim=-1) for f in (x, tokens.mean(1) @ self.rep_projection))
        return torch.cat([self.alpha**0.5 * x, (1 - self.alpha) ** 0.5 * other], -1)

    def for_others(self) -> None:
        """The usual feature alone."""
        self.alpha = 1.0


def _require_plain(backbone: Backbone) -> None:
    """Raise `UserError` if a tower's layers are not such as tokens can be put between."""
    from dapt.clip.image import unrolls
    from dapt.clip.text import ClassTokens, TextEncoder

    tokens = ClassTokens.for_template(backbone, ["thing"], "{}")
    if not (unrolls(backbone.visual) and TextEncoder(backbone, tokens).shares_prefix):
        what = f"MMRL puts tokens between layers as CLIP's, and '{backbone.name}' has others"
        raise UserError(f"{what}; use another method, or a backbone such as ViT-B-16")


def _alone(step: Step) -> tuple[float, Tensor, Tensor, Tensor]:
    """Alpha, and what features are put together of: f, r (B, D) and t (C, D), each normalised."""
    alpha: float = step.settings.of(BlendSettings).rep_alpha
    usual, other = step.image_features.chunk(2, -1)
    text = step.text_features.chunk(2, -1)[0]
    return alpha, usual / alpha**0.5, other / (1 - alpha) ** 0.5, text / alpha**0.5


def both_entropies(step: Step) -> Tensor:
    """``a`` times the cross-entropy with f, plus ``1 - a`` times that with r."""
    alpha, usual, other, text = _alone(step)
    first, second = (
        F.cross_entropy(step.logits_of(images, text), step.labels) for images in (usual, other)
    )
    return alpha * first + (1 - alpha) * second


def near_image(step: Step) -> Tensor:
    """1 - mean cosine of f and the frozen feature of the same view."""
    return 1 - F.cosine_similarity(_alone(step)[1], step.frozen_image()).mean()


def near_text(step: Step) -> Tensor:
    """1 - mean cosine of class features and the frozen ones, in the same templates."""
    frozen = F.normalize(step.frozen_text(*(step.settings.templates or ())), dim=-1).mean(0)
    return 1 - F.cosine_similarity(_alone(step)[3], frozen).mean()


NEAR_FROZEN = tuple(
    LossTerm(term.__name__, "near_frozen", term, NearFrozenSettings)
    for term in (near_image, near_text)
)
