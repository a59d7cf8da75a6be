"""timm's trunks as image towers: what stands before layers, and what those are told and asked.

Tokens that are put behind the patches have no position: where positions are rotations, theirs turn
nothing. Whatever reads the layers' output is given it without them.

Letters in shape comments: B images, T tokens of the tower, N inserted tokens, W width, d half of a
rotation's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from timm import layers, models
from timm.models.eva import EvaAttention
from timm.models.fastvit import Attention as FastAttention
from torch import Tensor, nn

from dapt.clip.inside import Inside
from dapt.errors import UserError

# Of their subclasses, those that go through the layers as they do.
_KINDS = (models.VisionTransformer, models.Eva, models.NaFlexVit)
# What runs its linear maps as modules of these names, and over all of an image at once. Others read
# weights past the modules, or have them in another order.
_HOLDERS = (layers.Attention, layers.AttentionRope, EvaAttention, FastAttention, layers.Mlp,
            layers.GluMlp, layers.SwiGLU, layers.GlobalResponseNormMlp)  # fmt: skip
_MAPS = {
    "qkv": ("q", "k", "v"), "q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",), "proj": ("o",),
    "fc1": ("fc",), "fc1_x": ("fc",), "fc2": ("proj",),
}  # fmt: skip


class Layers(NamedTuple):
    """What prompts need to know of an image tower."""

    width: int
    patch: int  # side of a patch in pixels
    blocks: Sequence[nn.Module]
    norm: nn.Module  # before them


def timm_transformer(visual: Any) -> Any:
    """The trunk of timm's, if tokens can be put among its own; else None."""
    trunk = getattr(visual, "trunk", None)
    known = any(
        type(trunk).forward_features is kind.forward_features
        for kind in _KINDS
        if isinstance(trunk, kind)
    )
    return trunk if known else None


def layers_of(visual: Any) -> Layers | None:
    """None of an image tower in which no token can be put."""
    if isinstance(visual, VisionTransformer):
        blocks = visual.transformer.resblocks
        return Layers(visual.conv1.out_channels, visual.patch_size[0], blocks, visual.ln_pre)
    if (trunk := timm_transformer(visual)) is None:
        return None
    embed = trunk.embeds if isinstance(trunk, models.NaFlexVit) else trunk.patch_embed
    side: Any = embed.feat_ratio()  # of hybrids too, which make patches of feature maps
    return Layers(trunk.embed_dim, int(side), trunk.blocks, trunk.norm_pre)


def name_of(visual: Any) -> str:
    """What kind of tower it is, in words."""
    trunk = getattr(visual, "trunk", None)
    return type(visual).__name__ if trunk is None else f"{type(trunk).__name__} of timm's"


def enter(trunk: Any, images: Tensor, count: int) -> tuple[Tensor, Sequence[Callable[..., Tensor]]]:
    """Tokens (B, T, W) as the first layer sees them, and the layers for ``count`` tokens more."""
    if isinstance(trunk, models.NaFlexVit):
        made = trunk._forward_embeds(images, None, None, None)
        x, rotation = made["patches"], made.get("rope_embeds")
    else:
        made = trunk._pos_embed(trunk.patch_embed(images))
        x, rotation = made if isinstance(made, tuple) else (made, None)
        x = trunk.norm_pre(x)
    if rotation is None:
        return x, trunk.blocks
    rotation = _with_still(rotation, count)
    mixed = getattr(trunk, "rope_mixed", False) or getattr(trunk, "rope_is_mixed", False)
    each = rotation if mixed else [rotation] * len(trunk.blocks)  # of each layer its own, or one
    return x, [partial(block, rope=r) for block, r in zip(trunk.blocks, each, strict=True)]


def _with_still(rotation: Tensor, count: int) -> Tensor:
    """Sines and cosines (..., T, 2d) with those of ``count`` tokens more that are not turned."""
    sines = rotation.new_zeros(*rotation.shape[:-2], count, rotation.shape[-1] // 2)
    return torch.cat([rotation, torch.cat([sines, torch.ones_like(sines)], -1)], -2)


# ------------------------------------------------------------------------- linear maps of layers


def maps_of(visual: Any) -> list[dict[tuple[str, ...], str]]:
    """Of each layer of timm's that has some, its linear maps: names as of `Inside`, and where.

    A gate (``fc1_g``) has none, and what is outside of layers, such as pooling, is left out.
    """
    found: dict[str, dict[tuple[str, ...], str]] = {}
    for path, module in visual.named_modules():
        layer = path.rpartition(".")[0]
        if type(module) in _HOLDERS and layer.rpartition(".")[2].isdigit():
            for called, names in _MAPS.items():
                if isinstance(getattr(module, called, None), nn.Linear):
                    found.setdefault(layer, {})[names] = f"{path}.{called}"
    return list(found.values())


class Asking(nn.Module):
    """A linear map (..., in) -> (..., out) that asks what changes in it in one pass."""

    def __init__(self, own: nn.Linear, layer: int, names: tuple[str, ...], inside: Inside) -> None:
        super().__init__()
        self.own, self.layer, self.names, self.inside = own, layer, names, inside

    def forward(self, x: Tensor) -> Tensor:
        """What `Inside` makes of it."""
        weight = self.inside.weight(self.layer, self.names, self.own.weight)
        out = F.linear(x, weight, self.own.bias)
        return self.inside.linear(self.layer, self.names, x, out)


def asking(visual: Any, inside: Inside) -> Any:
    """An image tower whose layers' linear maps ask ``inside``, for one pass.

    It shares all else with the tower it is of, which stays as it is for whoever uses it meanwhile.
    """
    places = {
        path: Asking(visual.get_submodule(path), layer, names, inside)
        for layer, own in enumerate(maps_of(visual))
        for names, path in own.items()
    }
    if not places:
        what = f"the image tower is a {name_of(visual)}, in whose layers no weight is changed"
        raise UserError(f"{what}; use a method of text prompts (coop), or of a head (auto)")
    return _with(visual, places)


def _with(module: nn.Module, others: Mapping[str, nn.Module]) -> nn.Module:
    """A module with others in some places of it, copied only on the way to them."""
    made = module.__class__.__new__(module.__class__)
    made.__dict__ = {**module.__dict__, "_modules": dict(module._modules)}
    below: dict[str, dict[str, nn.Module]] = {}
    for path, other in others.items():
        first, _, rest = path.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = other
        else:
            made._modules[first] = other
    for name, inner in below.items():
        made._modules[name] = _with(module.get_submodule(name), inner)
    return made


def own_bias(attention: Any) -> None:
    """Give the joint map of an `EvaAttention` its bias, where that is kept in parts beside it."""
    if attention.qkv is not None and attention.q_bias is not None:
        parts = attention.q_bias, attention.k_bias, attention.v_bias
        attention.qkv.bias = nn.Parameter(torch.cat(parts), requires_grad=False)
        attention.q_bias = attention.k_bias = attention.v_bias = None
