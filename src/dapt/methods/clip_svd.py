"""CLIP-SVD (Koleilat et al., 2025): learns only the singular values of the towers' weights.

Every weight of a layer is ``U diag(s) V``. U and V follow from the frozen weight and are computed
again when a run is loaded. As in the published code, weight decay pulls s towards 0. On benchmarks
the loss is cross-entropy at a fixed logit scale of 100 instead of the backbone's. The published
code for new classes uses the number of epochs as the cosine's period in steps. This is a mistake
and is not repeated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dapt.methods.contract import HasSettings, PartSettings
from dapt.methods.layouts import CLIP, Layout, Published
from dapt.methods.published import settings_for
from dapt.methods.weights import DESCENT, FEW, LISTED, Map, Maps, WeightChange, maps_in, own_steps

if TYPE_CHECKING:  # it brings open_clip along, which the table of methods should not
    from dapt.clip.backbone import Backbone


def usual(dataset: str, shots: int) -> dict[str, Any]:
    """As published (configs/few_shot); fewer steps and the backbone's scale on own data."""
    published = {"lr": 5e-4, "steps": 200 * shots, "logit_scale": 100.0}
    return settings_for(dataset, shots, DESCENT | published, own_steps(shots), FEW)


# What maps are called in CLIP whose attention is taken apart, as this code and CLIP-LoRA's do.
_CALLED = {"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj", "o": "attn.proj",
           "fc": "mlp.c_fc", "proj": "mlp.c_proj"}  # fmt: skip
# The whole model, in which singular values are called vector_S (1, r). That name, and that of
# attention's maps, are those of the code of singular value fine-tuning which it derives from: no
# recorded run shows them.
LAYOUTS = (
    Layout(
        tuple(
            Published(f"{where}transformer.resblocks.{{}}.{key}.vector_S",
                      f"{kind}_svd.{{}}.{name}", leading=True, dims=1)
            for where, kind in (("", "text"), ("visual.", "visual"))
            for name, key in _CALLED.items()
        ),
        aside=CLIP,
    ),
)  # fmt: skip


class SvdSettings(PartSettings):
    """Of learned singular values."""

    svd_maps: Annotated[tuple[Map, ...], LISTED] = Field(
        ("q", "k", "v", "o", "fc", "proj"), min_length=1, description="maps that CLIP-SVD changes"
    )


class SingularValues(WeightChange):
    """Those of one tower's weights, highest first: ``<kind>_svd.<layer>.<map>`` in a run's files.

    They are found in fp64: where two are nearly the same, fp32 is unsure what belongs to which.
    """

    Settings = SvdSettings
    kind: ClassVar[str]

    def __init__(self, maps: Maps) -> None:
        super().__init__()
        learned = []
        # (layer, map) -> U, s and V of the frozen weight; no part of what is kept of a run.
        self._found: dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]] = {}
        for layer, own in enumerate(maps):
            for name, (weight, factor) in own.items():
                whole = weight.detach().cpu().double() / factor  # the same on every device
                found = torch.linalg.svd(whole, full_matrices=False)
                u, s, v = (tensor.float().to(weight.device) for tensor in found)
                self._found[layer, name] = u * factor, s, v
            learned.append(nn.ParameterDict({n: self._found[layer, n][1].clone() for n in own}))
        setattr(self, f"{self.kind}_svd", nn.ModuleList(learned))

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> SingularValues:
        """They start as they are."""
        names = settings.of(SvdSettings).svd_maps
        return cls(maps_in(backbone, cls.tower, "svd_maps", names))

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """Such as "singular values of q, k, v, o, fc, proj in the image tower"."""
        maps = ", ".join(settings.of(SvdSettings).svd_maps)
        return f"singular values of {maps} in the {cls.tower} tower"

    @classmethod
    def settings_of(cls, tensors: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Any]:
        """Which maps they are of."""
        there = {name.rpartition(".")[2] for name in tensors}
        return {"svd_maps": tuple(name for name in _CALLED if name in there)}

    def change(self, layer: int, name: str) -> Tensor | None:
        """``U diag(s - s_0) V``: where s stays, the weight does to the bit."""
        if (layer, name) not in self._found:
            return None
        layers: Any = getattr(self, f"{self.kind}_svd")
        u, s, v = self._found[layer, name]
        return (u * (layers[layer][name] - s)) @ v


class TextSingularValues(SingularValues):
    """Singular values of the weights of every layer."""

    kind, tower, towers, optional = "text", "text", frozenset({"text"}), True


class VisualSingularValues(SingularValues):
    """Singular values of the weights of every layer."""

    kind, tower, towers = "visual", "image", frozenset({"image"})
