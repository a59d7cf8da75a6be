"""timm's trunks as image towers: what stands before layers, and what those are told.

Tokens that are put behind the patches have no position: where positions are rotations, theirs turn
nothing. Whatever reads the layers' output is given it without them.

Letters in shape comments: B images, T tokens of the tower, N inserted tokens, W width, d half of a
rotation's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from open_clip.transformer import VisionTransformer
from timm import models
from torch import Tensor, nn

# Of their subclasses, those that go through the layers as they do.
_KINDS = (models.VisionTransformer, models.Eva, models.NaFlexVit)


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


def own_bias(attention: Any) -> None:
    """Give the joint map of an `EvaAttention` its bias, where that is kept in parts beside it."""
    if attention.qkv is not None and attention.q_bias is not None:
        parts = attention.q_bias, attention.k_bias, attention.v_bias
        attention.qkv.bias = nn.Parameter(torch.cat(parts), requires_grad=False)
        attention.q_bias = attention.k_bias = attention.v_bias = None
