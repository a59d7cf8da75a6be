"""The text tower, run once for what all classes share and then for each class's own tokens.

The last layer is computed for the end tokens alone. All of it is exact. A tower built otherwise (no
causal mask, other blocks, other pooling, transformers'), or a context that classes do not share,
runs by its own modules, without what comes after the end token wherever nothing sees that.

Letters in shape comments: C classes, P shared prefix tokens, S own tokens of a class, N all own
tokens of all classes, H heads, W width, D embedding dimension.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby, takewhile
from operator import itemgetter
from typing import Any, NamedTuple, cast

import torch
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dapt.clip import inside as tower
from dapt.clip.asking import asking
from dapt.clip.backbone import Backbone, embedded, layers_of_text
from dapt.clip.inside import NOTHING, Inside
from dapt.errors import UserError

TEXT_MEMORY = 4 * 2**30  # bytes that text activations may take, unless told otherwise
# Widths of activations a token keeps in one layer: two norms' input and output, queries, keys and
# values, attention with its prefix, and the MLP four wide before and after its activation.
_KEPT_WIDTHS = 24
# Where classes do not fit the budget in one piece, the pieces that would: small ones leave the
# allocator fewer holes. At 20,000 classes of ViT-B/16, peak memory falls from 16.9 to 10 GB.
_CHUNKS_IN_BUDGET = 8
_CLASSES_OF_OTHERS = 500  # at a time, in a tower of which it is not known what it keeps
_CONTEXT = -1  # among ids, where a vector of the context goes


@dataclass(frozen=True)
class ClassTokens:
    """Token ids of all classes, split into what they share and what is their own."""

    shared: tuple[int, ...]  # every class starts with them; a learned context comes right after
    own: tuple[tuple[int, ...], ...]  # of each class the rest, the end token last; never empty
    after: tuple[int, ...] = ()  # what every class has between the context and its own
    context: int = 0  # vectors of the context
    # Where not all of them stand before a class's own: how many do, and how many of each class's
    # own, the tokens of its name, stand before the others.
    ahead: int | None = None
    names: tuple[int, ...] = ()

    @classmethod
    def for_context(
        cls,
        backbone: Backbone,
        class_names: Sequence[str],
        length: int,
        after: str = "",
        ahead: int | None = None,
    ) -> ClassTokens:
        """Tokens of ``[SOS] <context> <after> <class name> . [EOT]``, the context of some length.

        Of the context only ``ahead`` vectors may stand there, the others behind the class name. A
        `UserError` if a class name leaves no room for the context, or the reverse.
        """
        _ = backbone.text_width  # refuses a tower that takes no context
        start, names, rows = _rows_behind_context(backbone, class_names, after)
        longest, name = max(zip(map(len, rows), names, strict=True), key=itemgetter(0))
        free = backbone.context_length - len(start)
        where = f"the {backbone.context_length} tokens of the text tower of '{backbone.name}'"
        if longest >= free:
            what = f"class name '{name}' takes {longest} of {where}"
            raise UserError(f"{what}, which leaves none to a text prompt; shorten it")
        if free - length < 2:
            what = f"a text prompt of {length} vectors does not fit {where}"
            raise UserError(f"{what}; use fewer vectors")
        if longest > free - length:
            what = f"class name '{name}' takes {longest} tokens but {length} text prompt vectors"
            raise UserError(
                f"{what} leave room for {free - length}; shorten it or use fewer vectors"
            )
        words = tuple(backbone.inner_tokens(after)) if after else ()
        if not all(row[: len(words)] == words for row in rows):
            words = ()  # a tokenizer that joins words: what they share stays each class's own
        own = tuple(row[len(words) :] for row in rows)
        if ahead is None:
            return cls(start, own, words, length)
        sizes = (len(ids) - len(start) - 1 for ids in backbone.tokenize(names))
        # The end token stays last, whatever a tokenizer makes of a name and its full stop.
        ends = tuple(min(size, len(row) - 1) for size, row in zip(sizes, own, strict=True))
        return cls(start, own, words, length, ahead, ends)

    @staticmethod
    def room(backbone: Backbone, class_names: Sequence[str], after: str = "") -> tuple[int, str]:
        """Vectors that the longest class name leaves to a context, and that name."""
        start, names, rows = _rows_behind_context(backbone, class_names, after)
        longest, name = max(zip(map(len, rows), names, strict=True), key=itemgetter(0))
        return backbone.context_length - len(start) - max(2, longest), name

    @classmethod
    def for_template(
        cls, backbone: Backbone, class_names: Sequence[str], template: str
    ) -> ClassTokens:
        """Tokens of each class name put into ``template`` in place of ``{}``."""
        texts = [template.replace("{}", name.replace("_", " ")) for name in class_names]
        rows = backbone.tokenize(texts)
        # What all classes begin with is shared too, short of the last token of the shortest.
        places = zip(*(row[:-1] for row in rows), strict=False)
        count = len(list(takewhile(lambda ids: len(set(ids)) == 1, places)))
        return cls(tuple(rows[0][:count]), tuple(tuple(row[count:]) for row in rows))


def _rows_behind_context(
    backbone: Backbone, class_names: Sequence[str], after: str
) -> tuple[tuple[int, ...], list[str], list[tuple[int, ...]]]:
    """Start tokens, class names as they are read, and the tokens of each behind a context."""
    start, names = tuple(backbone.start_tokens), [name.replace("_", " ") for name in class_names]
    texts = [f"{after} {name}.".strip() for name in names]
    return start, names, [tuple(ids[len(start) :]) for ids in backbone.tokenize(texts)]


class Chunk(NamedTuple):
    """Classes encoded together: those at ``classes`` in the order of their length."""

    classes: slice
    tokens: slice  # of their packed own tokens
    groups: tower.Groups


class TextEncoder(nn.Module):
    """The frozen text tower laid out for one list of classes.

    Classes are sorted by length and their own tokens packed end to end, so that matrix products
    see no padding; attention runs once for each length, over the shared prefix and the class
    itself. The prefix (start token, learned context) is run once for all classes, and gradients
    reach the context through it. Where the activations of all classes exceed a budget, classes
    are taken in chunks, whose activations the backward pass computes anew.

    Args:
        memory_budget: bytes that activations kept for the backward pass may take.
        class_contexts: each class will have a context of its own, so that no prefix is shared.
    """

    backbone: Backbone
    shared: Tensor  # (P',), ids before the context
    after: Tensor  # (P'',), ids that all classes have after it
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
        shared = not class_contexts and tokens.ahead is None
        self.shares_prefix = self.ends_at_end and tower.is_plain(text.transformer) and shared
        self.order = sorted(range(len(tokens.own)), key=lambda i: (len(tokens.own[i]), i))
        lengths = [len(tokens.own[i]) for i in self.order]
        for name, values in {
            "shared": torch.tensor(tokens.shared, dtype=torch.long),
            "after": torch.tensor(tokens.after, dtype=torch.long),
            "packed": torch.tensor([t for i in self.order for t in tokens.own[i]]),
            "positions": torch.tensor([p for s in lengths for p in range(s)]),
            "ends": torch.tensor(lengths).cumsum(0) - 1,
            "restore": torch.tensor(self.order).argsort(),
        }.items():
            self.register_buffer(name, values.to(backbone.device), persistent=False)
        frame = len(tokens.shared) + tokens.context + len(tokens.after)
        before, own = 0 if self.shares_prefix else frame, isinstance(text, TextTransformer)
        whole = None if self.ends_at_end or not own else backbone.context_length
        sizes = [whole or before + length for length in lengths]
        each = _bytes_per_token(text, backbone.dtype) if own else 0
        if own:
            budget = max(1, memory_budget // each)
        else:
            budget = _CLASSES_OF_OTHERS * _CHUNKS_IN_BUDGET * backbone.context_length
        if sum(sizes) > budget:
            # Every chunk's activations are computed anew, so smaller ones cost no more.
            budget = max(1, budget // _CHUNKS_IN_BUDGET)
        # For a backward pass, about; of other towers it is not known.
        self.kept_bytes = min(sum(sizes), budget) * each
        self.chunks = _chunks(lengths, sizes, budget)

    def forward(self, inside: Inside = NOTHING) -> Tensor:
        """(C, D) features of all classes, not normalised, in fp32.

        The tokens ``inside`` are a context after the shared ids, (M, W), or (C, M, W) where it was
        said that classes have their own.
        """
        encode: Callable[..., Tensor] = self._own if self.shares_prefix else self._whole
        shared = self._prefix(inside) if self.shares_prefix else [inside.tokens]
        if len(self.chunks) > 1 and torch.is_grad_enabled():
            encode = partial(checkpoint, encode, use_reentrant=False, preserve_rng_state=False)
        features = [encode(chunk, inside, *shared) for chunk in self.chunks]
        return torch.cat(features)[self.restore].float()

    def _prefix(self, inside: Inside) -> list[Tensor]:
        """Keys and values of the shared prefix in each layer: k, v, k, v, ..., (H, P, W/H) each."""
        text, dtype, start = self.backbone.text, self.backbone.dtype, len(self.shared)
        x = text.token_embedding(self.shared).to(dtype)  # (P', W)
        if inside.tokens is not None:
            x = torch.cat([x, inside.tokens.to(dtype)])
        if len(self.after):
            x = torch.cat([x, text.token_embedding(self.after).to(dtype)])
        x, found = x + text.positional_embedding[: len(x)].to(dtype), list[Tensor]()  # (P, W)
        *layers, last = tower.unrolled(text.transformer, inside)
        for layer in layers:
            x = layer.enter(x, start)
            q, k, v = (tower.split_heads(t, layer.heads) for t in layer.qkv(x))
            found += [k, v]
            x = layer.finish(x, tower.attend(q, k, v, causal=True))
        # Nothing reads what the last layer would make of the prefix itself.
        x = last.enter(x, start)
        _, k, v = (tower.split_heads(t, last.heads) for t in last.asked(x, slice(0)))
        return [*found, k, v]

    def _own(self, chunk: Chunk, inside: Inside, *prefix: Tensor) -> Tensor:
        """Features (c, D) of a chunk's c classes, in sorted order, given the prefix."""
        text, dtype = self.backbone.text, self.backbone.dtype
        # Of what has positions; a layer may have been given more.
        length = len(self.shared) + len(self.after)
        length += 0 if inside.tokens is None else len(inside.tokens)
        x = text.token_embedding(self.packed[chunk.tokens]).to(dtype)  # (N, W)
        x = x + text.positional_embedding[self.positions[chunk.tokens] + length].to(dtype)
        *layers, last = tower.unrolled(text.transformer, inside)
        for i, layer in enumerate(layers):
            of_prefix = prefix[2 * i : 2 * i + 2]  # keys and values
            x = tower.kept(inside, partial(_layer, layer, chunk.groups), x, *of_prefix)
        ends = self.ends[chunk.classes] - chunk.tokens.start
        q, k, v = last.asked(x, ends)
        mixed = tower.attend_after_prefix(q, k, v, prefix[-2], prefix[-1], chunk.groups)
        x = last.finish(x[ends], mixed)  # (c, W)
        return _project(text, tower.norm(text.ln_final, x))

    def _whole(self, chunk: Chunk, inside: Inside, context: Tensor | None) -> Tensor:
        """Features (c, D) of a chunk's c classes, each in full, through the tower's own modules."""
        backbone, first = self.backbone, len(self.tokens.shared)
        text = backbone.text
        length = 0 if context is None else context.shape[-2]
        ids, places = self._ids(chunk, length)  # (c, L), (c, M)
        if not isinstance(text, TextTransformer):
            context = None if context is None else _rows_of(context, self.order[chunk.classes])
            return _of_others(backbone, ids, context, places, inside)
        x, mask = text._embeds(ids)  # (c, L, W), with positional embedding
        x = x.to(self.backbone.dtype)
        if context is not None:
            context = _rows_of(context, self.order[chunk.classes])
            placed = context.to(x.dtype) + text.positional_embedding[places].to(x.dtype)
            x = x.scatter(1, places[..., None].expand_as(placed), placed)
        if mask is not None:
            mask = mask[..., : x.shape[1], : x.shape[1]].to(x.dtype)
        x = tower.through(text.transformer.resblocks, x, inside, first, attn_mask=mask)
        if text.cls_emb is not None:
            return _project(text, text.ln_final(x[:, -1]))
        return _project(text, text_global_pool(text.ln_final(x), ids, text.pool_type, text.eos_id))

    def _ids(self, chunk: Chunk, length: int) -> tuple[Tensor, Tensor]:
        """Token ids (c, L), and the places (c, M) of a context of ``length``, stood in for.

        L is what the longest of them needs. A tower of open_clip's without a causal mask sees the
        padding too (in training as in its own forward), and one that reads its last position needs
        it: there L is the tower's own. Those of transformers mask it.
        """
        backbone, tokens, which = self.backbone, self.tokens, self.order[chunk.classes]
        owns, pad = [tokens.own[i] for i in which], backbone.pad_token
        names = [tokens.names[i] if tokens.names else 0 for i in which]
        first = length if tokens.ahead is None else tokens.ahead
        ahead, behind = [_CONTEXT] * first, [_CONTEXT] * (length - first)
        rows = [
            [*tokens.shared, *ahead, *tokens.after, *own[:name], *behind, *own[name:]]
            for own, name in zip(owns, names, strict=True)
        ]
        blind = self.ends_at_end or not isinstance(backbone.text, TextTransformer)
        end = len(rows[-1]) if blind else backbone.context_length
        ids = torch.tensor([row + [pad] * (end - len(row)) for row in rows])
        places = (ids == _CONTEXT).nonzero()[:, 1].view(len(rows), length)
        # They hold a token that is neither padding nor the end.
        ids[ids == _CONTEXT] = next(t for t in range(2, 100) if t not in (pad, *owns[0]))
        return ids.to(backbone.device), places.to(backbone.device)


def _layer(
    layer: tower.Layer, groups: tower.Groups, x: Tensor, prefix_k: Tensor, prefix_v: Tensor
) -> Tensor:
    """Own tokens (N, W) after a layer, given its keys and values of the shared prefix."""
    q, k, v = layer.qkv(x)
    return layer.finish(x, tower.attend_after_prefix(q, k, v, prefix_k, prefix_v, groups))


def _bytes_per_token(text: TextTransformer, dtype: torch.dtype) -> int:
    """What one own token keeps for the backward pass, measured to be about this."""
    return _KEPT_WIDTHS * text.width * text.transformer.layers * dtype.itemsize


def _chunks(lengths: list[int], sizes: list[int], budget: int) -> list[Chunk]:
    """Cut classes of these (sorted) lengths into about equal chunks of at least one.

    A class takes as many tokens of the ``budget`` as its size says.
    """
    count = -(-sum(sizes) // budget)
    limits = [sum(sizes) / count * (number + 1) for number in range(count)]
    middles = (end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True))
    chunks, first, start = list[Chunk](), 0, 0
    for _, members in groupby(bisect_left(limits, middle) for middle in middles):
        own = Counter(lengths[first : (last := first + len(list(members)))])
        end = start + sum(own.elements())
        groups = tuple((number, length) for length, number in own.items())
        chunks.append(Chunk(slice(first, last), slice(start, end), groups))
        first, start = last, end
    return chunks


def _rows_of(context: Tensor, classes: Sequence[int]) -> Tensor:
    """A context (M, W) as it is; of one for each class, (C, M, W), those of some."""
    return context[classes] if context.dim() == 3 else context


def _of_others(
    backbone: Backbone, ids: Tensor, context: Tensor | None, places: Tensor, inside: Inside
) -> Tensor:
    """Features (c, D) of ids (c, L) by a text tower of transformers', a context in its places.

    Those are the same in all rows where a layer is to have others there.
    """
    if inside.norms:
        what = f"the text tower is a {type(backbone.text).__name__}, whose norms stay as they are"
        raise UserError(f"{what}; use a method of prompts (coop, dapt, ivlp), or a head (auto)")
    text = asking(backbone.text, inside) if inside.linears else backbone.text
    if context is None:
        found = text(ids)
        return found[0] if isinstance(found, tuple) else found  # CoCa's gives its tokens too
    x = embedded(text, ids)  # (c, L, W)
    mask = (ids != text.config.pad_token_id).long()
    placed = context.to(x.dtype).expand(len(x), -1, -1)
    x = x.scatter(1, places[..., None].expand_as(placed), placed)
    with _entered(layers_of_text(backbone) if inside.layers else (), inside, int(places[0, 0])):
        out = text.transformer(inputs_embeds=x, attention_mask=mask)
    return cast(Tensor, text.proj(text.pooler(out, mask)))


@contextmanager
def _entered(layers: Sequence[nn.Module], inside: Inside, start: int) -> Iterator[None]:
    """Layers of others' are given tokens as they are to see them; inserted ones begin at start."""

    def enter(index: int, _layer: nn.Module, given: Any, named: Any) -> Any:
        if given:
            return (inside.before_layer(index, given[0], start), *given[1:]), named
        x = inside.before_layer(index, named["hidden_states"], start)
        return given, {**named, "hidden_states": x}

    hooks = [
        layer.register_forward_pre_hook(partial(enter, index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _project(text: TextTransformer, x: Tensor) -> Tensor:
    """Text projection (C, W) -> (C, D), whichever of open_clip's kinds it is."""
    if (projection := text.text_projection) is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection
