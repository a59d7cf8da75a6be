"""Attention as the towers need it: over whole rows, and after a prefix that many rows share.

Letters in shape comments: B rows, L tokens of a row, H heads, d width of a head, W = H * d,
C classes, P prefix tokens, S own tokens of a class, N own tokens of all classes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Classes of equal length, in a row: (number of classes, own tokens of each).
Groups = tuple[tuple[int, int], ...]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., L, W) -> (..., H, L, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """(..., H, L, d) -> (..., L, W)."""
    return x.transpose(-3, -2).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Scaled dot-product attention over split heads: (..., H, L, d) each -> (..., L, W)."""
    on_cpu = q.requires_grad and q.device.type == "cpu"
    if on_cpu and q.dtype != torch.float32 and q.dim() == 4 and not causal:
        # On CPUs the fused kernel's backward pass at low precision takes over three times as long
        # as the matrix products it is made of.
        return merge_heads(_Attention.apply(q, k, v))
    return merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=causal))


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
