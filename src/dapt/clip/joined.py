"""Several frozen models as one backbone: their features side by side, for heads on them.

An image is seen once, as the model with the largest images sees it; the others' towers get that
view made smaller, and normalised as they expect it. So training, prediction, a server and an
exported file cannot differ in what a tower is shown.

Letters in shape comments: B images, C classes, S side of the view, s side of a tower's images,
D_i numbers of a model's features, D their sum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dapt.clip.backbone import WORDLESS_HEADS, Backbone
from dapt.clip.image import encode_image
from dapt.clip.inside import NOTHING, Inside
from dapt.clip.known import as_one
from dapt.clip.text import ClassTokens, TextEncoder
from dapt.errors import UserError


class Joined(Backbone):
    """k models as one; all of them are on one device, at one precision.

    With features v_i and t_i of length one, scales s_i and biases b_i, image features are ``[v_1,
    ..., v_k] / sqrt(k)``. Class features are ``[s_1 t_1, ..., s_k t_k] / |s|``, zeros where a model
    reads no text. With the scale ``sqrt(k) |s| / r`` for the r models that read, and the mean of
    their biases, a logit of cosines is the mean of their logits: of one, exactly its own. Where
    none reads, the scale is their mean.
    """

    wordless = WORDLESS_HEADS

    def __init__(self, members: Sequence[Backbone]) -> None:
        nn.Module.__init__(self)
        self._members = tuple(members)
        first = max(members, key=lambda m: m.preprocessing.size)  # of equal ones, the first
        self.name, self.tokenizer, self.text = " + ".join(m.name for m in members), None, None
        # Views are kept at fp32, and each tower gets them at the precision of its weights.
        self.preprocessing, self.precision = first.preprocessing, first.precision
        self.dtype = torch.float32
        self.visual = JoinedTowers(members, first)
        self.texts = nn.ModuleList(m.text for m in members if m.reads_text)
        for name in ("mean", "std"):
            self.register_buffer(name, getattr(first, name), persistent=False)
        self.revision = as_one([m.revision for m in members])
        self.weights_sha256, self.fingerprint = (
            hashlib.sha256(json.dumps([getattr(m, name) for m in members]).encode()).hexdigest()
            for name in ("weights_sha256", "fingerprint")
        )
        readers = [m for m in members if m.reads_text]
        scales = torch.tensor([m.logit_scale for m in readers or members], dtype=torch.double)
        length = len(members) ** 0.5 * float(scales.norm()) / len(scales)
        self.logit_scale = length if readers else float(scales.mean())
        self.logit_bias = sum(m.logit_bias for m in readers) / max(1, len(readers))
        self.eval().requires_grad_(False)

    @property
    def members(self) -> tuple[Backbone, ...]:
        """The models that are joined, in their order."""
        return self._members

    @property
    def reads_text(self) -> bool:
        """Whether any does."""
        return any(m.reads_text for m in self._members)

    @property
    def context_length(self) -> int:
        """Of the model that reads least."""
        self.require_text()
        return min(m.context_length for m in self._members if m.reads_text)

    @property
    def image_dimension(self) -> int:
        """D, of image features."""
        return sum(m.image_dimension for m in self._members)

    def require_towers(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse whatever goes into a tower, in one sentence."""
        what = f"'{self.name}' are models joined, in whose towers nothing is learned"
        raise UserError(f"{what}; use a head on their features (auto), or one backbone")

    # All ways into a tower.
    text_transformer = word_embeddings = tokenize = blocks = _layers = require_towers
    projection = property(require_towers)


class JoinedTowers(nn.Module):
    """Image towers side by side: (B, 3, S, S) images, normalised for the ``first``, -> (B, D)."""

    def __init__(self, members: Sequence[Backbone], first: Backbone) -> None:
        super().__init__()
        self.towers = nn.ModuleList(_Tower(m, first) for m in members)

    def forward(self, images: Tensor) -> Tensor:
        """Features of length one, in fp32."""
        return torch.cat([tower(images) for tower in self.towers], -1) / len(self.towers) ** 0.5


class _Tower(nn.Module):
    """A model's image tower, and what it is shown of the common view."""

    smaller: Tensor | None  # (s, S)
    gain: Tensor | None  # (1, 3, 1, 1), as is the shift
    shift: Tensor

    def __init__(self, model: Backbone, first: Backbone) -> None:
        super().__init__()
        self.visual, self.dtype, smaller, gain, shift = model.visual, model.dtype, None, None, None
        own, seen = model.preprocessing, first.preprocessing
        if own.size != seen.size:
            smaller = _resizing(seen.size, own.size, own.interpolation).to(model.device)
        if (own.mean, own.std) != (seen.mean, seen.std):
            gain, shift = first.std / model.std, (first.mean - model.mean) / model.std
        for name, tensor in {"smaller": smaller, "gain": gain, "shift": shift}.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, D_i) features of length one."""
        if self.smaller is not None:  # constants stand first: at 8 bits an export keeps them whole
            images = self.smaller @ images  # (B, 3, s, S)
            images = (self.smaller @ images.mT).mT  # (B, 3, s, s)
        if self.gain is not None:
            images = images * self.gain + self.shift
        return F.normalize(encode_image(self.visual, images.to(self.dtype)), dim=-1)


def _resizing(size: int, side: int, interpolation: str) -> Tensor:
    """(s, S): what a column of S pixels is multiplied by to be s long, antialiased.

    Resizing is linear, and does rows and columns one after the other. As a matrix it is the same on
    every device and in every file.
    """
    mode = "bilinear" if interpolation == "bilinear" else "bicubic"
    columns = torch.eye(size)[None, None]
    return F.interpolate(columns, (side, size), mode=mode, antialias=True)[0, 0]


class JoinedTexts(nn.Module):
    """Class features of `Joined` by one template, as `TextEncoder` gives a single model's."""

    def __init__(
        self, backbone: Joined, class_names: Sequence[str], template: str, memory_budget: int
    ) -> None:
        super().__init__()
        self.members = backbone.members
        self.encoders = nn.ModuleList(
            TextEncoder(m, ClassTokens.for_template(m, class_names, template), memory_budget)
            for m in self.members
            if m.reads_text
        )

    def forward(self, inside: Inside = NOTHING) -> Tensor:
        """(C, D) features, in fp32, as long as the models' own are on average."""
        found = [encoder(inside) for encoder in self.encoders]  # (C, D_i) each
        lengths = torch.stack([x.norm(dim=-1, keepdim=True) for x in found]).mean(0)
        own = chain(found)
        parts = [
            m.logit_scale * F.normalize(next(own), dim=-1)
            if m.reads_text
            else found[0].new_zeros(len(lengths), m.image_dimension)
            for m in self.members
        ]
        return lengths * F.normalize(torch.cat(parts, -1), dim=-1)
