"""The image tower with tokens among its patches.

A ViT of open_clip's ordinary layers is unrolled: the last layer is computed for the class token
alone, and the first one's backward pass stops at the inserted tokens. Others (open_clip's with
other layers or pooling, timm's, see `trunks`) run by their own modules. All of it is exact.

Letters in shape comments: B images, T tokens of the tower, N inserted tokens, W width, D embedding
dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor

from dapt.clip import inside as tower
from dapt.clip import trunks
from dapt.clip.asking import asking, last_map, without
from dapt.clip.backbone import Backbone
from dapt.clip.inside import NOTHING, Inside
from dapt.errors import UserError

# Widths of activations a token keeps in one layer, measured: 12 of prompts, 16 of changed maps.
_KEPT_WIDTHS = 16


def kept_bytes(backbone: Backbone, images: int) -> int:
    """What so many images keep for a backward pass, about; 0 of a tower in which nothing is put."""
    if (layers := trunks.layers_of(backbone.visual)) is None:
        return 0
    tokens = images * (1 + (backbone.preprocessing.size // layers.patch) ** 2)
    widths = _KEPT_WIDTHS * len(layers.blocks) * layers.width
    return tokens * widths * backbone.dtype.itemsize


def image_features(
    backbone: Backbone, views: Tensor, inside: Inside = NOTHING, *,
    normalized: bool = True, projected: bool = True,
) -> Tensor:  # fmt: skip
    """(B, D) features, in fp32, of (B, 3, S, S) uint8 or normalised views."""
    if views.dtype == torch.uint8:
        views = backbone.normalize(views)
    views = views.to(backbone.device, backbone.dtype)
    features = encode_image(backbone.visual, views, inside, projected)
    return F.normalize(features, dim=-1) if normalized else features


def encode_image(
    visual: Any, images: Tensor, inside: Inside = NOTHING, projected: bool = True
) -> Tensor:
    """(B, D) features, not normalised, in fp32, of (B, 3, S, S) images from `Backbone.normalize`.

    Not ``projected``, they are (B, W), what is multiplied with `Backbone.projection`.

    The tokens ``inside``, (N, W) for the whole batch or (B, N, W), enter after class embedding,
    positional embedding and ``ln_pre``, have no positional embedding, and are left out of pooling.
    """
    tokens = inside.tokens
    if tokens is not None:
        tokens = tokens.to(images.dtype).expand(images.shape[0], -1, -1)  # (B, N, W)
    if isinstance(visual, VisionTransformer):
        x, read = _encode_vit(visual, images, tokens, inside)  # (B, W), (B, reads, W)
        x = (x @ visual.proj if projected and visual.proj is not None else x).float()
        return inside.features(x, None if read is None else read.float())
    if inside.linears:
        visual = asking(visual, inside)
    if not projected and (path := last_map(visual)) is not None:
        visual = without(visual, path)
    if tokens is None and not inside.layers:
        return visual(images).float()
    return _encode_timm(visual, images, tokens, inside).float()


def _encode_vit(
    visual: VisionTransformer, images: Tensor, tokens: Tensor | None, inside: Inside
) -> tuple[Tensor, Tensor | None]:
    x = visual._embeds(images)  # (B, T, W): class token, patches
    # Layers do not tell where a token stands: with the inserted last, the rest is one frozen piece.
    start, parts = x.shape[1], [x] if tokens is None else [x, tokens]
    if not unrolls(visual):
        x = tower.through(visual.transformer.resblocks, _joined(parts), inside, start)
        return visual._pool(x[:, :start])[0], None
    *layers, last = tower.unrolled(visual.transformer, inside)
    for layer in layers:
        parts = [tower.kept(inside, partial(_layer, layer, start), *parts)]
    x = last.enter(_joined(parts), start)
    # Only the class token is read, and those that are asked for: R = 1 + reads.
    wanted = [0, *range(start, start + inside.reads)] if inside.reads else slice(0, 1)
    at = (slice(None), wanted)
    mixed = tower.attend(*(tower.split_heads(t, last.heads) for t in last.asked(x, at)))
    x = tower.norm(visual.ln_post, last.finish(x[at], mixed))  # (B, R, W)
    return x[:, 0], x[:, 1:] if inside.reads else None


def _layer(layer: tower.Layer, start: int, *parts: Tensor) -> Tensor:
    """Tokens (B, T+N, W) after a layer, of those before it: the frozen, and the inserted if any."""
    x = _joined(parts)
    if (entered := layer.enter(x, start)) is not x:
        parts = (x := entered,)
    q, k, v = (tower.split_heads(t, layer.heads) for t in layer.qkv(*parts))
    return layer.finish(x, tower.attend(q, k, v))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]


def unrolls(visual: Any) -> bool:
    """Whether an image tower is of open_clip's ordinary layers, and its class token is read."""
    return (
        isinstance(visual, VisionTransformer)
        and tower.is_plain(visual.transformer)
        and visual.attn_pool is None
        and visual.pool_type == "tok"
    )


def _encode_timm(visual: Any, images: Tensor, tokens: Tensor | None, inside: Inside) -> Tensor:
    if (trunk := trunks.timm_transformer(visual)) is None:
        what = f"the image tower is a {trunks.name_of(visual)}, inside of which nothing is learned"
        raise UserError(f"{what}; use a method of text prompts (coop), or of a head (auto)")
    x, blocks = trunks.enter(trunk, images, 0 if tokens is None else tokens.shape[1])
    start = x.shape[1]
    if tokens is not None:
        x = torch.cat([x, tokens], 1)  # (B, T+N, W)
    x = trunk.norm(tower.through(blocks, x, inside, start, asking=True))
    return visual.head(trunk.forward_head(x[:, :start]))
