"""What may be put into a frozen tower on its way, and one layer of it, unrolled, that asks for it.

Only what is read is computed: queries where they are asked for, and no backward pass for tokens
that are frozen. A layer of another kind than open_clip's ordinary one runs by its own modules.

Letters in shape comments: L tokens of a row, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dapt.errors import UserError

if TYPE_CHECKING:
    from open_clip.transformer import ResidualAttentionBlock

QKV = ("q", "k", "v")


@dataclass(frozen=True)
class Pass:
    """One pass of a batch through the model, as far as what is learned may depend on it."""

    # Of what is random in training, None in evaluation; a CPU one draws the same for all devices.
    generator: torch.Generator | None = None
    images: int = 0  # of the batch
    part: slice = field(default_factory=lambda: slice(None))  # that is here, if processes share it


EVALUATION = Pass()


class Inside:
    """What is put into one tower in one pass; by itself, nothing.

    Attributes:
        tokens: (N, W), or (B, N, W): after the start token, or among the patches.
        layers: whether `before_layer` does anything; ``linears``: whether `linear` does.
    """

    layers = linears = False

    def __init__(self, tokens: Tensor | None = None) -> None:
        self.tokens = tokens

    def before_layer(self, layer: int, x: Tensor, start: int) -> Tensor:
        """Tokens (..., T, W) as a layer is to see them; inserted ones begin at ``start``."""
        return x

    def linear(self, layer: int, names: tuple[str, ...], x: Tensor, out: Tensor) -> Tensor:
        """What a linear map of a layer gives, ``out`` being the frozen one's."""
        return out


NOTHING = Inside()


def norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Layer norm whose weights may be fp32 under a low-precision stream."""
    if isinstance(norm, nn.Identity):
        return x
    ln = cast(nn.LayerNorm, norm)
    if x.dtype == ln.weight.dtype or x.device.type == "cpu":  # the CPU kernel takes mixed types
        return F.layer_norm(x, ln.normalized_shape, ln.weight, ln.bias, ln.eps)
    return F.layer_norm(x.float(), ln.normalized_shape, ln.weight, ln.bias, ln.eps).to(x.dtype)


class Layer:
    """A frozen block of open_clip's, its number in the tower, and what is put inside."""

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
        """Queries, keys and values, (..., L, W) each, of the tokens in all parts (..., L_i, W).

        What is frozen is given apart from what is learned, so that the backward pass computes
        nothing for it.
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
    from open_clip.transformer import ResidualAttentionBlock

    return all(type(b) is ResidualAttentionBlock for b in cast(Any, transformer).resblocks)


def through(blocks: Any, x: Tensor, inside: Inside, start: int, **options: Any) -> Tensor:
    """Run layers of any kind by their own modules, tokens (B, L, W) first."""
    if inside.linears:
        raise UserError(
            "this method changes the linear maps of ordinary layers, and the backbone has others; "
            "choose another backbone, or a method of prompts"
        )
    for i, block in enumerate(blocks):
        if inside.layers:
            x = inside.before_layer(i, x, start)
        x = block(x, **options)
    return x
