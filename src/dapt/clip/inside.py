"""What may be put into a frozen tower on its way, and one layer of it, unrolled, that asks for it.

Only what is read is computed: queries where they are asked for, and no backward pass for tokens
that are frozen. A layer of another kind than open_clip's ordinary one runs by its own modules.

Letters in shape comments: B rows, L tokens of a row, H heads, d width of a head, W = H * d,
C classes, P prefix tokens that all classes share, S own tokens of a class, N own tokens of all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dapt.errors import UserError

if TYPE_CHECKING:
    from open_clip.transformer import ResidualAttentionBlock

# Classes of equal length, in a row: (number of classes, own tokens of each).
Groups = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Pass:
    """One pass of a batch through the model, as far as what is learned may depend on it."""

    # Of what is random in training, None in evaluation; a CPU one draws the same for all devices.
    generator: torch.Generator | None = None
    images: int = 0  # of the batch
    part: slice = field(default_factory=lambda: slice(None))  # that is here, if processes share it
    # (D,), normalised, of the one image that class features are made for; None: of none.
    image_features: Tensor | None = None
    recompute: bool = False  # whether gradients compute layers anew, so that little is kept

    def dropout(self, x: Tensor, share: float, *place: Any) -> Tensor:
        """``x`` (L, W), or (B, L, W) of images; in training with a share of it zeroed.

        The rest is scaled up. What is drawn is a function of the step, the ``place`` and the shape
        alone: who computes a layer anew for the backward pass draws the same. Pieces of one place
        that are equally large do so too.
        """
        if self.generator is None or not share:
            return x
        shape = (self.images or len(x), *x.shape[1:])
        name = repr((self.generator.initial_seed(), *place, shape))
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
        own = torch.Generator(x.device).manual_seed(seed)
        drawn = torch.rand(shape, generator=own, device=x.device)[self.part]
        return x * (drawn >= share) / (1 - share)


EVALUATION = Pass()


class Inside:
    """What is put into one tower in one pass; by itself, nothing.

    ``tokens`` are (N, W), or (B, N, W): after the start token, or among the patches. ``layers``,
    ``linears`` and ``norms`` say whether `before_layer`, `weight` or `linear`, and `norm` do
    anything; ``reads`` how many of the inserted tokens the image tower gives `features` at its end.
    With ``recompute``, nothing is kept of layers for the backward pass but what enters them.
    """

    layers = linears = norms = recompute = False
    reads = 0

    def __init__(self, tokens: Tensor | None = None) -> None:
        self.tokens = tokens

    def before_layer(self, layer: int, x: Tensor, start: int) -> Tensor:
        """Tokens (..., T, W) as a layer is to see them; inserted ones begin at ``start``."""
        return x

    def weight(self, layer: int, names: tuple[str, ...], weight: Tensor) -> Tensor:
        """The weight of a linear map of a layer, ``weight`` being the frozen one."""
        return weight

    def linear(self, layer: int, names: tuple[str, ...], x: Tensor, out: Tensor) -> Tensor:
        """What a linear map of a layer gives; ``out`` without what is added here."""
        return out

    def norm(self, layer: int, name: str, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of a layer norm of a layer, the frozen ones being given."""
        return weight, bias

    def features(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        """What becomes of a tower's features (..., D), and of tokens read (B, reads, W)."""
        return x


NOTHING = Inside()


def kept(inside: Inside, layer: Callable[..., Tensor], *x: Tensor) -> Tensor:
    """What a layer makes of tokens, to the same bits where gradients compute it anew."""
    if not (inside.recompute and torch.is_grad_enabled()):
        return layer(*x)
    # Dropout is a function of its place: see `Pass.dropout`.
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(layer, *x, **how)


def norm(norm: nn.Module, x: Tensor, own: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Layer norm whose weights, which may be its ``own``, are fp32 under low precision or not.

    Norms of other kinds are as they are.
    """
    if not isinstance(norm, nn.LayerNorm):
        return cast(Tensor, norm(x))
    ln = norm
    weight, bias = own or (ln.weight, ln.bias)
    if x.dtype == weight.dtype or x.device.type == "cpu":  # the CPU kernel takes mixed types
        return F.layer_norm(x, ln.normalized_shape, weight, bias, ln.eps)
    weight, bias = (None if w is None else w.float() for w in (weight, bias))
    return F.layer_norm(x.float(), ln.normalized_shape, weight, bias, ln.eps).to(x.dtype)


class Layer:
    """A frozen block of open_clip's, its number in the tower, and what is put inside."""

    def __init__(self, block: ResidualAttentionBlock, index: int, inside: Inside) -> None:
        self.block, self.index, self.inside = block, index, inside
        self.heads = block.attn.num_heads

    def enter(self, x: Tensor, start: int) -> Tensor:
        """Tokens as this layer is to see them; inserted ones begin at ``start``."""
        return self.inside.before_layer(self.index, x, start) if self.inside.layers else x

    def _norm(self, name: str, x: Tensor) -> Tensor:
        module = getattr(self.block, name)
        if not self.inside.norms:
            return norm(module, x)
        return norm(module, x, self.inside.norm(self.index, name, module.weight, module.bias))

    def _linear(self, names: tuple[str, ...], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not self.inside.linears:
            return F.linear(x, weight, bias)
        out = F.linear(x, self.inside.weight(self.index, names, weight), bias)
        return self.inside.linear(self.index, names, x, out)

    def qkv(self, *parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (..., L, W) each, of the tokens in all parts (..., L_i, W).

        What is frozen is given apart from what is learned, so that the backward pass computes
        nothing for it.
        """
        attn, names = self.block.attn, ("q", "k", "v")
        own = attn.in_proj_weight, attn.in_proj_bias
        packed = [self._linear(names, self._norm("ln_1", x), *own) for x in parts]
        q, k, v = (torch.cat(packed, -2) if len(packed) > 1 else packed[0]).chunk(3, -1)
        return q, k, v

    def asked(self, x: Tensor, at: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the tokens ``x[at]`` alone, keys and values of all of ``x`` (..., L, W)."""
        attn, width, normed = self.block.attn, x.shape[-1], self._norm("ln_1", x)
        weight, bias = attn.in_proj_weight, attn.in_proj_bias  # (3W, W), (3W,)
        k, v = self._linear(("k", "v"), normed, weight[width:], bias[width:]).chunk(2, -1)
        return self._linear(("q",), normed[at], weight[:width], bias[:width]), k, v

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Output projection, residuals and MLP: ``x`` and attention's ``mixed`` are (..., L, W)."""
        block, out = self.block, self.block.attn.out_proj
        x = x + block.ls_1(self._linear(("o",), mixed, out.weight, out.bias))
        normed = self._norm("ln_2", x)
        if not self.inside.linears:
            return x + block.ls_2(block.mlp(normed))
        fc, proj = block.mlp.c_fc, block.mlp.c_proj
        hidden = block.mlp.gelu(self._linear(("fc",), normed, fc.weight, fc.bias))
        return x + block.ls_2(self._linear(("proj",), hidden, proj.weight, proj.bias))


def unrolled(transformer: nn.Module, inside: Inside) -> list[Layer]:
    """The layers of a transformer of open_clip's ordinary blocks."""
    blocks = cast(Any, transformer).resblocks
    return [Layer(block, i, inside) for i, block in enumerate(blocks)]


def linear_maps(block: ResidualAttentionBlock) -> dict[str, tuple[Tensor, float]]:
    """Frozen weights (out, in) of an ordinary block's maps, by name, each with a factor in it.

    The factor is 1 where the weight stands as it was published.
    """
    attn, mlp = block.attn, block.mlp
    factor = getattr(mlp.gelu, "factor", 1.0)  # see `dapt.clip.backbone.FoldedQuickGELU`
    q, k, v = attn.in_proj_weight.chunk(3)
    plain = {"q": q, "k": k, "v": v, "o": attn.out_proj.weight}
    found = {name: (weight, 1.0) for name, weight in plain.items()}
    return found | {"fc": (mlp.c_fc.weight, factor), "proj": (mlp.c_proj.weight, 1 / factor)}


def is_plain(transformer: nn.Module) -> bool:
    """Whether every layer is open_clip's ordinary block, which `Layer` unrolls."""
    return _are_plain(cast(Any, transformer).resblocks)


def _are_plain(blocks: Any) -> bool:
    from open_clip.transformer import ResidualAttentionBlock

    return all(type(block) is ResidualAttentionBlock for block in blocks)


NOT_ORDINARY = (
    "this method changes weights of ordinary layers, and the backbone has others; choose another "
    "backbone, or a method of prompts"
)


def through(
    blocks: Any, x: Tensor, inside: Inside, start: int, *, asking: bool = False, **options: Any
) -> Tensor:
    """Run layers of any kind by their own modules, tokens (B, L, W) first.

    Where something changes inside of them, they are open_clip's ordinary ones, or such as are
    ``asking`` for their linear maps themselves.
    """
    if inside.norms or (inside.linears and not asking):
        return _through_plain(blocks, x, inside, start, **options)
    for i, block in enumerate(blocks):
        if inside.layers:
            x = inside.before_layer(i, x, start)
        x = kept(inside, partial(block, **options), x)
    return x


def _through_plain(
    blocks: Any, x: Tensor, inside: Inside, start: int, attn_mask: Tensor | None = None
) -> Tensor:
    """The same by `Layer`; a mask is (L, L), or (B * H, L, L)."""
    if not _are_plain(blocks):
        raise UserError(NOT_ORDINARY)
    for layer in (Layer(block, i, inside) for i, block in enumerate(blocks)):
        x = layer.enter(x, start)
        q, k, v = (split_heads(t, layer.heads) for t in layer.qkv(x))
        mask = attn_mask
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, layer.heads))
        x = layer.finish(x, attend(q, k, v, mask=mask))
    return x


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., L, W) -> (..., H, L, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """(..., H, L, d) -> (..., L, W)."""
    return x.transpose(-3, -2).flatten(-2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Scaled dot-product attention over split heads: (..., H, L, d) each -> (..., L, W)."""
    on_cpu = q.requires_grad and q.device.type == "cpu" and mask is None
    if on_cpu and q.dtype != torch.float32 and q.dim() == 4 and not causal:
        # On CPUs the fused kernel's backward pass at low precision takes over three times as long
        # as the matrix products it is made of.
        return merge_heads(_Attention.apply(q, k, v))
    return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal))


class _Attention(torch.autograd.Function):
    """softmax(q kᵀ / sqrt(d)) v by matrix products; keeps q, k, v and the weights."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = q.shape
        q, k, v = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))  # (B*H, L, d)
        ctx.scale = shape[-1] ** -0.5
        scores = q.new_empty(len(q), q.shape[1], k.shape[1])
        torch.baddbmm(scores, q, k.mT, beta=0, alpha=ctx.scale, out=scores)
        weights = torch.softmax(scores, -1, out=scores)
        ctx.save_for_backward(q, k, v, weights)
        return torch.bmm(weights, v).view(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, weights = ctx.saved_tensors
        shape = g.shape
        g = g.reshape(-1, *shape[-2:])
        dv = torch.bmm(weights.mT, g)
        ds = torch.bmm(g, v.mT)
        ds = torch._softmax_backward_data(ds, weights, -1, weights.dtype)
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        torch.baddbmm(dq, ds, k, beta=0, alpha=ctx.scale, out=dq)
        torch.baddbmm(dk, ds.mT, q, beta=0, alpha=ctx.scale, out=dk)
        whole = (*shape[:-2], -1, shape[-1])
        return dq.view(whole), dk.view(whole), dv.view(whole)


def attend_after_prefix(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, groups: Groups
) -> Tensor:
    """Attention of each class's tokens over a prefix that all share and over the class itself.

    The prefix's keys and values are never repeated: all classes meet them in one matrix product,
    and a gradient reaches them already summed. Equal to attention over the joined sequence; a
    token sees no later one.

    Args:
        q: (N, W), or (C, W) where only each class's last token asks; so is what is returned.
        k, v: (N, W), classes end to end.
        prefix_k, prefix_v: (H, P, d).
        groups: how the N tokens divide into classes, shorter ones first.
    """
    heads, length, width = prefix_k.shape
    all_ask = len(q) == len(k)
    own_sizes = [count * size for count, size in groups]
    sizes = own_sizes if all_ask else [count for count, _ in groups]
    q = q.unflatten(-1, (heads, width)) * width**-0.5  # (N, H, d)
    k, v = (t.unflatten(-1, (heads, width)) for t in (k, v))
    to_prefix = (q.transpose(0, 1) @ prefix_k.mT).transpose(0, 1)  # (N, H, P)
    on_prefix, mixed = [], []
    for (count, size), q_own, k_own, v_own, scores in zip(
        groups, q.split(sizes), k.split(own_sizes), v.split(own_sizes), to_prefix.split(sizes),
        strict=True,
    ):  # fmt: skip
        # (count, H, S, d), and S = 1 of queries where only the last token asks
        q_own, k_own, v_own, scores = (
            t.unflatten(0, (count, -1)).transpose(1, 2) for t in (q_own, k_own, v_own, scores)
        )
        own = q_own @ k_own.mT  # (count, H, S, S)
        if all_ask:
            own = own.masked_fill(_later(size, q.device), float("-inf"))
        weights = torch.cat([scores, own], -1).softmax(-1)
        prefix_weights, own_weights = weights.split([length, size], -1)
        on_prefix.append(prefix_weights.transpose(1, 2).flatten(0, 1))  # (count*S, H, P)
        mixed.append((own_weights @ v_own).transpose(1, 2).flatten(0, 1))  # (count*S, H, d)
    from_prefix = (torch.cat(on_prefix).transpose(0, 1) @ prefix_v).transpose(0, 1)  # (N, H, d)
    return (from_prefix + torch.cat(mixed)).flatten(1)


@lru_cache(maxsize=256)
def _later(size: int, device: torch.device) -> Tensor:
    """(S, S), true where a key comes after its query; every layer and step needs the same."""
    with torch.inference_mode(False):
        return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)
