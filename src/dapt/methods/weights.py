"""What methods share that learn changes of weight matrices inside a tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from pydantic import BeforeValidator
from torch import Tensor

from dapt.errors import UserError
from dapt.methods.contract import TowerPart

if TYPE_CHECKING:  # it brings open_clip along, which the table of methods should not
    from dapt.clip.backbone import Backbone

# As the code of CLIP-LoRA, CLIP-SVD and 2SFS tunes: AdamW at a cosine by steps, batches of 32.
DESCENT: dict[str, Any] = {
    "optimizer": "adamw", "schedule": "cosine", "weight_decay": 0.01, "batch_size": 32
}  # fmt: skip

# Of few images of own data, they are tuned for everyone's epochs.
FEW: dict[str, Any] = {"steps": None}


def own_steps(shots: int) -> dict[str, Any]:
    """Changes of published settings for own data: steps as DAPT's, and the backbone's scale."""
    return {"steps": 100 * shots, "logit_scale": None}


# Of settings that are a list of names: on the command line, "q,v" is as good as "[q, v]".
LISTED = BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value)


# Linear maps of a layer: of attention, then of its MLP.
Map = Literal["q", "k", "v", "o", "fc", "proj"]
Maps = list[dict[str, tuple[Tensor, float]]]


def maps_in(backbone: Backbone, tower: str, setting: str, names: Sequence[str]) -> Maps:
    """Of each layer of a tower, those of its linear maps (`Backbone.linear_maps`) that are named.

    A `UserError` of the ``setting`` if one is named that no layer has.
    """
    found = backbone.linear_maps(tower)
    there = [name for name in get_args(Map) if any(name in own for own in found)]
    if absent := [name for name in names if name not in there]:
        what = f"layers of the {tower} tower of '{backbone.name}' have no linear map {absent[0]}"
        raise UserError(f"{what}; use --set {setting}={','.join(there)}")
    return [{name: own[name] for name in names if name in own} for own in found]


class WeightChange(TowerPart):
    """A change of linear maps' weights in the layers of one tower.

    Once it is fixed (nothing of it asks for gradients) it is merged into the weights: once for each
    map, when first asked for. So prediction and export see plain linear maps.
    """

    tower: ClassVar[str]  # "text" or "image"

    def __init__(self) -> None:
        super().__init__()
        self._merged: dict[tuple[int, tuple[str, ...]], Tensor] = {}

    @property
    def fixed(self) -> bool:
        """Whether nothing is learned any more."""
        return not next(self.parameters()).requires_grad

    def change(self, layer: int, name: str) -> Tensor | None:
        """(out, in), in fp32, that is added to a weight; None where that stays frozen."""
        raise NotImplementedError

    def weight(self, tower: str, layer: int, names: tuple[str, ...], weight: Tensor) -> Tensor:
        """The frozen weight and what is learned."""
        if not self.fixed:
            return self.changed(layer, names, weight)
        if (layer, names) not in self._merged:
            # Ordinary tensors even if asked for in inference mode: a later step may use them.
            with torch.inference_mode(False), torch.no_grad():
                self._merged[layer, names] = self.changed(layer, names, weight)
        return self._merged[layer, names]

    def changed(self, layer: int, names: tuple[str, ...], weight: Tensor) -> Tensor:
        """The same, made anew, so that gradients reach what is learned."""
        found = []
        for name, rows in zip(names, weight.chunk(len(names)), strict=True):
            change = self.change(layer, name)
            found.append(rows if change is None else (rows.float() + change).to(rows.dtype))
        return torch.cat(found)

    def load(self, tensors: Mapping[str, Tensor], backbone: Backbone, where: str) -> None:
        """As every part, and what was merged is forgotten."""
        super().load(tensors, backbone, where)
        self._merged.clear()
