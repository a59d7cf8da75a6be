"""The two towers with prompts in them.

Plain functions over open_clip's frozen modules: `encode_image` puts visual prompts between the
class token and the patches, `encode_text` puts a learned context between the start token and
the class name. Both compute only what is read: the last image layer for the class token alone,
the text tower once for what all classes share and then for each class's own tokens, the last
text layer for the end tokens alone. All of it is exact. A tower built otherwise (no causal
mask, other blocks, other pooling), or a context that classes do not share, takes a path through
the tower's own modules, which drops what comes after the end token wherever nothing sees it.

Letters in shape comments: B images, T image tokens, C classes, P shared prefix tokens, S own
tokens of a class, N all own tokens of all classes, H heads, W width, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import (
    ResidualAttentionBlock,
    TextTransformer,
    VisionTransformer,
    text_global_pool,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dapt.clip.attention import Groups, attend, attend_after_prefix, split_heads
from dapt.clip.backbone import Backbone
from dapt.errors import UserError

# Bytes that text activations may take, unless told otherwise.
TEXT_MEMORY = 4 * 2**30

# Widths of activations a token keeps in one layer: two norms' input and output, queries, keys and
# values, attention with its prefix, and the MLP four wide before and after its activation.
_KEPT_WIDTHS = 24

# Where classes do not fit the budget in one piece, the pieces that would: small ones leave the
# allocator fewer holes. At 20,000 classes of ViT-B/16, peak memory falls from 16.9 to 10 GB.
_CHUNKS_IN_BUDGET = 8

# Classes at a time in a tower of which it is not known what it keeps.
_CLASSES_OF_OTHERS = 500

# ---------------------------------------------------------------------------- one block


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Layer norm whose weights may be fp32 under a low-precision stream."""
    if isinstance(norm, nn.Identity):
        return x
    ln = cast(nn.LayerNorm, norm)
    if x.dtype == ln.weight.dtype or x.device.type == "cpu":  # the CPU kernel takes mixed types
        return F.layer_norm(x, ln.normalized_shape, ln.weight, ln.bias, ln.eps)
    return F.layer_norm(x.float(), ln.normalized_shape, ln.weight, ln.bias, ln.eps).to(x.dtype)


def _qkv(block: ResidualAttentionBlock, *parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of every token: three of (..., L, W).

    Args:
        block: the layer.
        parts: (..., L_i, W) of the tokens, joined here. What is frozen is given apart from what is
            learned, so that the backward pass computes nothing for it.
    """
    attn = block.attn
    packed = [F.linear(_norm(block.ln_1, x), attn.in_proj_weight, attn.in_proj_bias) for x in parts]
    q, k, v = (torch.cat(packed, -2) if len(packed) > 1 else packed[0]).chunk(3, -1)
    return q, k, v


def _asked(block: ResidualAttentionBlock, x: Tensor, at: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the tokens ``x[at]`` alone, keys and values of all of ``x`` (..., L, W)."""
    attn, width, normed = block.attn, x.shape[-1], _norm(block.ln_1, x)
    weight, bias = attn.in_proj_weight, attn.in_proj_bias  # (3W, W), (3W,)
    k, v = F.linear(normed, weight[width:], bias[width:]).chunk(2, -1)
    return F.linear(normed[at], weight[:width], bias[:width]), k, v


def _finish(block: ResidualAttentionBlock, x: Tensor, mixed: Tensor) -> Tensor:
    """Output projection, residuals and MLP: ``x`` and attention's ``mixed`` are (..., L, W)."""
    x = x + block.ls_1(F.linear(mixed, block.attn.out_proj.weight, block.attn.out_proj.bias))
    return x + block.ls_2(block.mlp(_norm(block.ln_2, x)))


def _plain_blocks(transformer: nn.Module) -> bool:
    """Whether every layer is open_clip's ordinary block, which the functions above unroll."""
    return all(type(b) is ResidualAttentionBlock for b in cast(Any, transformer).resblocks)


# -------------------------------------------------------------------------- image tower


def encode_image(backbone: Backbone, images: Tensor, prompt: Tensor | None = None) -> Tensor:
    """Encode images, with visual prompt vectors among their patches if there are any.

    The vectors enter after class embedding, positional embedding and ``ln_pre``, carry no
    positional embedding, and are left out of pooling.

    Args:
        backbone: the frozen model.
        images: (B, 3, S, S), normalised by `Backbone.normalize`.
        prompt: (V, W) shared by the batch, or (B, V, W), or None.

    Returns:
        (B, D) features, not normalised, in fp32.

    Raises:
        UserError: the tower takes no visual prompt.
    """
    if prompt is not None:
        backbone.require_visual_prompts()
    return run_image_tower(backbone.visual, images, prompt)


def run_image_tower(visual: nn.Module, images: Tensor, prompt: Tensor | None) -> Tensor:
    """`encode_image` for an image tower by itself, known to take the prompt; can be traced."""
    if prompt is None:
        if isinstance(visual, VisionTransformer):
            return _encode_vit(visual, images, None).float()
        return visual(images).float()
    prompt = prompt.to(images.dtype).expand(images.shape[0], -1, -1)  # (B, V, W)
    if isinstance(visual, VisionTransformer):
        return _encode_vit(visual, images, prompt).float()
    return _encode_timm(visual, images, prompt).float()


def _insert(x: Tensor, prompt: Tensor | None, at: int) -> Tensor:
    return x if prompt is None else torch.cat([x[:, :at], prompt, x[:, at:]], dim=1)


def _encode_vit(visual: VisionTransformer, images: Tensor, prompt: Tensor | None) -> Tensor:
    x = visual._embeds(images)  # (B, T, W): class token, patches
    pools_class_token = visual.attn_pool is None and visual.pool_type == "tok"
    if not (pools_class_token and _plain_blocks(visual.transformer)):
        x = visual.transformer(_insert(x, prompt, 1))
        if prompt is not None:
            x = torch.cat([x[:, :1], x[:, 1 + prompt.shape[1] :]], dim=1)
        pooled = visual._pool(x)[0]
        return pooled if visual.proj is None else pooled @ visual.proj

    # Layers do not tell where a token stands: with the prompt last, the rest is one frozen piece.
    parts = [x] if prompt is None else [x, prompt]
    x = _insert(x, prompt, x.shape[1])
    *blocks, last = visual.transformer.resblocks
    heads = last.attn.num_heads
    for block in blocks:
        q, k, v = (split_heads(t, heads) for t in _qkv(block, *parts))
        x = _finish(block, x, attend(q, k, v))
        parts = [x]
    first = (slice(None), slice(0, 1))  # only the class token is read
    mixed = attend(*(split_heads(t, heads) for t in _asked(last, x, first)))  # (B, 1, W)
    x = _finish(last, x[first], mixed)[:, 0]  # (B, W)
    x = _norm(visual.ln_post, x)
    return x if visual.proj is None else x @ visual.proj


def _encode_timm(visual: nn.Module, images: Tensor, prompt: Tensor) -> Tensor:
    trunk = cast(Any, visual).trunk
    x = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images))))
    first = trunk.num_prefix_tokens
    x = trunk.norm(trunk.blocks(_insert(x, prompt, first)))  # (B, T, W)
    x = torch.cat([x[:, :first], x[:, first + prompt.shape[1] :]], dim=1)
    return cast(Any, visual).head(trunk.forward_head(x))


# --------------------------------------------------------------------------- text tower


@dataclass(frozen=True)
class ClassTokens:
    """Token ids of all classes, split into what they share and what is their own.

    Attributes:
        shared: ids every class starts with; a learned context comes right after them.
        own: for each class its remaining ids, the end token last; never empty.
    """

    shared: tuple[int, ...]
    own: tuple[tuple[int, ...], ...]

    @classmethod
    def for_context(cls, backbone: Backbone, class_names: Sequence[str], length: int):
        """Tokens of ``[SOS] <context> <class name> . [EOT]`` for a context of ``length`` vectors.

        Raises:
            UserError: a class name leaves no room for the context, or the reverse.
        """
        backbone.require_text_prompts()
        names = [name.replace("_", " ") for name in class_names]
        start = tuple(backbone.start_tokens)
        own = tuple(tuple(ids[len(start) :]) for ids in backbone.tokenize([f"{n}." for n in names]))
        room = backbone.context_length - len(start) - length
        longest = max(range(len(own)), key=lambda i: len(own[i]))
        if room < 2:
            raise UserError(
                f"a text prompt of {length} vectors does not fit the {backbone.context_length} "
                f"tokens of the text tower of '{backbone.name}'; use fewer vectors"
            )
        if len(own[longest]) > room:
            raise UserError(
                f"class name '{names[longest]}' takes {len(own[longest])} tokens but {length} text "
                f"prompt vectors leave room for {room}; shorten it or use fewer vectors"
            )
        return cls(start, own)

    @classmethod
    def for_template(cls, backbone: Backbone, class_names: Sequence[str], template: str):
        """Tokens of each class name put into ``template`` in place of ``{}``."""
        texts = [template.replace("{}", name.replace("_", " ")) for name in class_names]
        rows = backbone.tokenize(texts)
        # What all classes begin with is shared too, short of the last token of the shortest.
        limit = min(map(len, rows)) - 1
        same = (len({row[i] for row in rows}) == 1 for i in range(limit))
        count = next((i for i, equal in enumerate(same) if not equal), limit)
        return cls(tuple(rows[0][:count]), tuple(tuple(row[count:]) for row in rows))


@dataclass(frozen=True)
class Chunk:
    """Classes encoded together: those at ``classes`` in the order of their length."""

    classes: slice
    tokens: slice  # of their packed own tokens
    groups: Groups


class TextEncoder(nn.Module):
    """The frozen text tower laid out for one list of classes.

    Classes are sorted by length and their own tokens packed end to end, so that matrix products
    see no padding at all; attention runs once for each length, over the keys and values of the
    shared prefix and of the class itself. The prefix (start token, learned context) is run once
    for all classes, and gradients reach the context through it. Where the activations of all
    classes exceed a budget, classes are taken in chunks and the backward pass computes each
    chunk's activations anew.

    Args:
        backbone: the frozen model.
        tokens: of the classes.
        memory_budget: bytes that activations kept for the backward pass may take.
        class_contexts: each class will have a context of its own, so that no prefix is shared.
    """

    backbone: Backbone
    shared: Tensor  # (P',), ids before the context
    packed: Tensor  # (N,), own ids of all classes, shorter classes first
    positions: Tensor  # (N,), of each within its class
    ends: Tensor  # (C,), where each class's end token lies among the packed
    restore: Tensor  # (C,), from sorted order to class order

    def __init__(
        self,
        backbone: Backbone,
        tokens: ClassTokens,
        memory_budget: int = TEXT_MEMORY,
        *,
        class_contexts: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.tokens = backbone, tokens
        text = backbone.text
        # Nothing of what is read sees what comes after the end token.
        self.ends_at_end = (
            isinstance(text, TextTransformer)
            and text.attn_mask is not None
            and text.cls_emb is None
            and text.pool_type in ("argmax", "eos")
        )
        self.shares_prefix = (
            self.ends_at_end and _plain_blocks(text.transformer) and not class_contexts
        )
        self.order = sorted(range(len(tokens.own)), key=lambda i: (len(tokens.own[i]), i))
        lengths = [len(tokens.own[i]) for i in self.order]
        for name, values in {
            "shared": torch.tensor(tokens.shared, dtype=torch.long),
            "packed": torch.tensor([t for i in self.order for t in tokens.own[i]]),
            "positions": torch.tensor([p for s in lengths for p in range(s)]),
            "ends": torch.tensor(lengths).cumsum(0) - 1,
            "restore": torch.tensor(self.order).argsort(),
        }.items():
            self.register_buffer(name, values.to(backbone.device), persistent=False)
        if self.shares_prefix:
            sizes = lengths
        elif self.ends_at_end:
            sizes = [len(tokens.shared) + s for s in lengths]
        else:
            sizes = [backbone.context_length] * len(lengths)
        if isinstance(text, TextTransformer):
            budget = max(1, memory_budget // _bytes_per_token(text, backbone.dtype))
        else:
            budget = _CLASSES_OF_OTHERS * _CHUNKS_IN_BUDGET * backbone.context_length
        if sum(sizes) > budget:
            # Every chunk's activations are computed anew, so smaller ones cost no more.
            budget = max(1, budget // _CHUNKS_IN_BUDGET)
        self.chunks = _chunks(lengths, sizes, budget)

    def forward(self, context: Tensor | None = None) -> Tensor:
        """Encode all classes with a context after the shared ids, or without one.

        Args:
            context: (M, W), or (C, M, W) where it was said that classes have their own.

        Returns:
            (C, D) features, not normalised, in fp32.
        """
        encode: Callable[..., Tensor] = self._own if self.shares_prefix else self._whole
        shared = self._prefix(context) if self.shares_prefix else [context]
        if len(self.chunks) == 1 or not torch.is_grad_enabled():
            features = [encode(chunk, *shared) for chunk in self.chunks]
        else:
            features = [
                checkpoint(encode, chunk, *shared, use_reentrant=False, preserve_rng_state=False)
                for chunk in self.chunks
            ]
        return torch.cat(features)[self.restore].float()

    def _prefix(self, context: Tensor | None) -> list[Tensor]:
        """Keys and values of the shared prefix in each layer: k, v, k, v, ..., (H, P, W/H) each."""
        text, dtype = self.backbone.text, self.backbone.dtype
        x = text.token_embedding(self.shared).to(dtype)  # (P', W)
        if context is not None:
            x = torch.cat([x, context.to(dtype)])
        x = x + text.positional_embedding[: len(x)].to(dtype)  # (P, W)
        found: list[Tensor] = []
        *blocks, last = text.transformer.resblocks
        for block in blocks:
            q, k, v = (split_heads(t, block.attn.num_heads) for t in _qkv(block, x))
            found += [k, v]
            x = _finish(block, x, attend(q, k, v, causal=True))
        # Nothing reads what the last layer would make of the prefix itself.
        _, k, v = (split_heads(t, last.attn.num_heads) for t in _asked(last, x, slice(0)))
        return [*found, k, v]

    def _own(self, chunk: Chunk, *prefix: Tensor) -> Tensor:
        """Features (c, D) of a chunk's c classes, in sorted order, given the prefix."""
        text, dtype = self.backbone.text, self.backbone.dtype
        length = prefix[0].shape[-2]
        x = text.token_embedding(self.packed[chunk.tokens]).to(dtype)  # (N, W)
        x = x + text.positional_embedding[self.positions[chunk.tokens] + length].to(dtype)
        *blocks, last = text.transformer.resblocks
        for i, block in enumerate(blocks):
            mixed = attend_after_prefix(
                *_qkv(block, x), prefix[2 * i], prefix[2 * i + 1], chunk.groups
            )
            x = _finish(block, x, mixed)
        ends = self.ends[chunk.classes] - chunk.tokens.start
        q, k, v = _asked(last, x, ends)
        mixed = attend_after_prefix(q, k, v, prefix[-2], prefix[-1], chunk.groups)
        x = _finish(last, x[ends], mixed)  # (c, W)
        return _project(text, _norm(text.ln_final, x))

    def _whole(self, chunk: Chunk, context: Tensor | None) -> Tensor:
        """Features (c, D) of a chunk's c classes, each in full, through the tower's own modules."""
        text, first = self.backbone.text, len(self.tokens.shared)
        length = 0 if context is None else context.shape[-2]
        ids = self._ids(chunk, length)  # (c, L)
        if not isinstance(text, TextTransformer):
            return text(ids)
        x, mask = text._embeds(ids)  # (c, L, W), with positional embedding
        x = x.to(self.backbone.dtype)
        if context is not None:
            if context.dim() == 3:
                context = context[self.order[chunk.classes]]
            here = text.positional_embedding[first : first + length].to(x.dtype)
            placed = (context.to(x.dtype) + here).expand(len(x), -1, -1)
            x = torch.cat([x[:, :first], placed, x[:, first + length :]], dim=1)
        if mask is not None:
            mask = mask[..., : x.shape[1], : x.shape[1]].to(x.dtype)
        x = text.transformer(x, attn_mask=mask)
        if text.cls_emb is not None:
            return _project(text, text.ln_final(x[:, -1]))
        x = text_global_pool(text.ln_final(x), ids, text.pool_type, text.eos_id)
        return _project(text, x)

    def _ids(self, chunk: Chunk, length: int) -> Tensor:
        """Token ids (c, L), with a context of ``length`` stood in for.

        L is what the longest of them needs. A tower without a causal mask sees the padding too
        (in training as in open_clip's own forward), and one that reads its last position needs it:
        there L is the tower's own.
        """
        backbone, owns = self.backbone, [self.tokens.own[i] for i in self.order[chunk.classes]]
        pad, end = backbone.pad_token, len(self.tokens.shared) + length + len(owns[-1])
        # The context's places hold a token that is neither padding nor the end.
        stand_in = next(t for t in range(2, 100) if t not in (pad, *owns[0]))
        rows = [[*self.tokens.shared, *[stand_in] * length, *own] for own in owns]
        end = end if self.ends_at_end else backbone.context_length
        return torch.tensor([row + [pad] * (end - len(row)) for row in rows]).to(backbone.device)


def _bytes_per_token(text: TextTransformer, dtype: torch.dtype) -> int:
    """Activations that one own token keeps for the backward pass, measured to be about this."""
    width = text.width * text.transformer.layers * dtype.itemsize
    return _KEPT_WIDTHS * width


def _chunks(lengths: list[int], sizes: list[int], budget: int) -> list[Chunk]:
    """Cut classes of these (sorted) lengths into chunks of about ``budget`` tokens each.

    A class takes as many of them as its size says. Chunks are about equal; one class is never
    cut, so a chunk holds at least one.
    """
    count = -(-sum(sizes) // budget)
    target, chunks, first, start, taken = sum(sizes) / count, list[Chunk](), 0, 0, 0
    while first < len(lengths):
        last = first
        while last < len(lengths) and (
            last == first or taken + sizes[last] / 2 <= target * (len(chunks) + 1)
        ):
            taken += sizes[last]
            last += 1
        inside = lengths[first:last]
        end = start + sum(inside)
        groups = tuple((inside.count(s), s) for s in sorted(set(inside)))
        chunks.append(Chunk(slice(first, last), slice(start, end), groups))
        first, start = last, end
    return chunks


def _project(text: TextTransformer, x: Tensor) -> Tensor:
    """Text projection (C, W) -> (C, D), whichever of open_clip's kinds it is."""
    projection = text.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection
