"""One frozen layer of a tower, unrolled, with what is put inside it.

Only what is read is computed: queries where they are asked for, and no backward pass for tokens
that are frozen. A layer of another kind than open_clip's ordinary one runs by its own modules.

Letters in shape comments: L tokens of a row, W width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from dapt.clip.inside import Inside

QKV = ("q", "k", "v")


def norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Layer norm whose weights may be fp32 under a low-precision stream."""
    if isinstance(norm, nn.Identity):
        return x
    ln = cast(nn.LayerNorm, norm)
    if x.dtype == ln.weight.dtype or x.device.type == "cpu":  # the CPU kernel takes mixed types
        return F.layer_norm(x, ln.normalized_shape, ln.weight, ln.bias, ln.eps)
    return F.layer_norm(x.float(), ln.normalized_shape, ln.weight, ln.bias, ln.eps).to(x.dtype)


class Layer:
    """A frozen block and its place in the tower.

    Args:
        block: open_clip's.
        index: its number, from 0.
        inside: what is put into the tower in this pass.
    """

    def __init__(self, block: ResidualAttentionBlock, index: int, inside: Inside) -> None:
        self.block, self.index, self.inside = block, index, inside
        self.heads = block.attn.num_heads

    def enter(self, x: Tensor, start: int) -> Tensor:
        """Tokens as this layer is to see them; inserted ones begin at ``start``."""
        return self.inside.before_layer(self.index, x, start) if self.inside.layers else x

    def _linear(self, names: tuple[str, ...], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = F.linear(x, weight, bias)
        return self.inside.linear(self.index, names, x, out) if self.inside.linears else out

    def qkv(self, *parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every token: three of (..., L, W).

        Args:
            parts: (..., L_i, W) of the tokens, joined here. What is frozen is given apart from what
                is learned, so that the backward pass computes nothing for it.
        """
        attn, ln = self.block.attn, self.block.ln_1
        packed = [
            self._linear(QKV, norm(ln, x), attn.in_proj_weight, attn.in_proj_bias) for x in parts
        ]
        q, k, v = (torch.cat(packed, -2) if len(packed) > 1 else packed[0]).chunk(3, -1)
        return q, k, v

    def asked(self, x: Tensor, at: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the tokens ``x[at]`` alone, keys and values of all of ``x`` (..., L, W)."""
        attn, width, normed = self.block.attn, x.shape[-1], norm(self.block.ln_1, x)
        weight, bias = attn.in_proj_weight, attn.in_proj_bias  # (3W, W), (3W,)
        k, v = self._linear(("k", "v"), normed, weight[width:], bias[width:]).chunk(2, -1)
        return self._linear(("q",), normed[at], weight[:width], bias[:width]), k, v

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Output projection, residuals and MLP: ``x`` and attention's ``mixed`` are (..., L, W)."""
        block, out = self.block, self.block.attn.out_proj
        x = x + block.ls_1(self._linear(("o",), mixed, out.weight, out.bias))
        normed = norm(block.ln_2, x)
        if not self.inside.linears:
            return x + block.ls_2(block.mlp(normed))
        fc, proj = block.mlp.c_fc, block.mlp.c_proj
        hidden = block.mlp.gelu(self._linear(("fc",), normed, fc.weight, fc.bias))
        return x + block.ls_2(self._linear(("proj",), hidden, proj.weight, proj.bias))


def unrolled(transformer: nn.Module, inside: Inside) -> list[Layer]:
    """The layers of a transformer of open_clip's ordinary blocks."""
    blocks = cast(Any, transformer).resblocks
    return [Layer(block, i, inside) for i, block in enumerate(blocks)]


def is_plain(transformer: nn.Module) -> bool:
    """Whether every layer is open_clip's ordinary block, which `Layer` unrolls."""
    return all(type(b) is ResidualAttentionBlock for b in cast(Any, transformer).resblocks)


def through(blocks: Any, x: Tensor, inside: Inside, start: int, **options: Any) -> Tensor:
    """Run layers of any kind by their own modules, tokens (B, L, W) first."""
    for i, block in enumerate(blocks):
        if inside.layers:
            x = inside.before_layer(i, x, start)
        x = block(x, **options)
    return x
