"""CLIP-LoRA (Zanella and Ben Ayed, 2024): low-rank changes to the attention of both towers.

``W x + b`` becomes ``W x + b + s B A dropout(x)``, with A (r, in) and B (out, r). As in the
published code, and unlike in LoRA's paper, ``s = alpha / sqrt(r)``. On benchmarks the loss is
cross-entropy at a fixed logit scale of 100 instead of the backbone's. With a dropout of 0, the
published code takes another path, on which gradients miss the changes to later layers. This is a
mistake and is not repeated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from dapt.clip.inside import Pass
from dapt.methods.contract import LARGEST, HasSettings, PartSettings
from dapt.methods.published import settings_for
from dapt.methods.weights import DESCENT, FEW, LISTED, Map, Maps, WeightChange, maps_in, own_steps

if TYPE_CHECKING:  # it brings open_clip along, which the table of methods should not
    from dapt.clip.backbone import Backbone


def usual(dataset: str, shots: int) -> dict[str, Any]:
    """As published (run_utils.py); fewer steps and the backbone's scale on own data."""
    published = {"lr": 2e-4, "steps": 500 * shots, "logit_scale": 100.0}
    return settings_for(dataset, shots, DESCENT | published, own_steps(shots), FEW | {"lr": 1e-3})


class LoraSettings(PartSettings):
    """Of low-rank changes."""

    lora_maps: Annotated[tuple[Map, ...], LISTED] = Field(
        ("q", "k", "v"),
        min_length=1,
        description="maps that LoRA changes: some of q, k, v, o, fc, proj",
    )
    lora_rank: int = Field(2, ge=1, le=2**12, description="rank r of LoRA's changes")
    lora_alpha: float = Field(1.0, gt=0, le=LARGEST, description="LoRA's scale times sqrt(r)")
    lora_dropout: float = Field(0.25, ge=0, lt=1, description="dropout before LoRA's changes")


class LowRank(WeightChange):
    """Low-rank changes in one tower: ``<kind>_lora.<layer>.<map>.A`` and ``B`` in a run's files.

    Maps of an MLP (fc, proj) are not the published code's. Each map's dropout is drawn by itself.
    In the text tower, what all classes share is run once, so that they share its draw too.
    """

    Settings = LoraSettings
    kind: ClassVar[str]

    def __init__(self, maps: Maps, own: LoraSettings, generator: torch.Generator) -> None:
        super().__init__()
        self.dropout, scale = own.lora_dropout, own.lora_alpha / sqrt(own.lora_rank)
        # Of each map, with the factor that its frozen weight has.
        self.scales = {n: scale * factor for one in maps for n, (_, factor) in one.items()}

        def pair(weight: Tensor) -> nn.ParameterDict:
            # Kaiming's uniform distribution with a = sqrt(5), as linear layers start; B is zero.
            out, width = weight.shape
            drawn = (2 * torch.rand(own.lora_rank, width, generator=generator) - 1) / sqrt(width)
            return nn.ParameterDict({"A": drawn, "B": torch.zeros(out, own.lora_rank)})

        pairs = [nn.ModuleDict({name: pair(w) for name, (w, _) in one.items()}) for one in maps]
        setattr(self, f"{self.kind}_lora", nn.ModuleList(pairs))

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> LowRank:
        """A is drawn, B zero."""
        own: LoraSettings = settings.of(LoraSettings)
        generator = torch.Generator().manual_seed(2 * settings.seed + (cls.tower == "image"))
        return cls(maps_in(backbone, cls.tower, "lora_maps", own.lora_maps), own, generator)

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """Such as "changes of rank 2 to q, k, v in the image tower"."""
        own: LoraSettings = settings.of(LoraSettings)
        maps = ", ".join(own.lora_maps)
        return f"changes of rank {own.lora_rank} to {maps} in the {cls.tower} tower"

    @classmethod
    def settings_of(cls, tensors: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Any]:
        """Which maps are changed, and the rank."""
        there = {name.split(".")[2]: t for name, t in tensors.items() if name.endswith(".A")}
        rank = next(iter(there.values())).shape[0]
        maps = tuple(name for name in get_args(Map) if name in there)
        return {"lora_maps": maps, "lora_rank": rank}

    def _pair(self, layer: int, name: str) -> Any:
        layers: Any = getattr(self, f"{self.kind}_lora")
        return dict(layers[layer].items()).get(name)

    def change(self, layer: int, name: str) -> Tensor | None:
        """``s B A``."""
        pair = self._pair(layer, name)
        return None if pair is None else self.scales[name] * pair["B"] @ pair["A"]

    def weight(self, tower: str, layer: int, names: tuple[str, ...], weight: Tensor) -> Tensor:
        """Frozen while it is tuned: the changes stand beside it, which costs less."""
        return super().weight(tower, layer, names, weight) if self.fixed else weight

    def linear(
        self, tower: str, layer: int, names: tuple[str, ...], x: Tensor, out: Tensor, now: Pass
    ) -> Tensor:
        """``out`` and, while they are tuned, the changes."""
        if self.fixed:
            return out
        found = []
        for name, own in zip(names, out.chunk(len(names), -1), strict=True):
            if (pair := self._pair(layer, name)) is not None:
                a, b = pair["A"].to(x.dtype), pair["B"].to(x.dtype)
                seen = now.dropout(x, self.dropout, tower, layer, name)
                own = own + self.scales[name] * (seen @ a.T) @ b.T
            found.append(own)
        return torch.cat(found, -1) if len(found) > 1 else found[0]


class TextLowRank(LowRank):
    """Low-rank changes to the attention of every layer."""

    kind, tower, towers, optional = "text", "text", frozenset({"text"}), True


class VisualLowRank(LowRank):
    """Low-rank changes to the attention of every layer."""

    kind, tower, towers = "visual", "image", frozenset({"image"})
