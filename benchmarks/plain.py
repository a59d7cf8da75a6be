"""The plain way: prompt tuning as it is usually written, to measure and to test against.

Every class over all 77 tokens, every token through every layer, attention written out, class
features computed for every batch, all in fp32. The package itself never uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from math import sqrt
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn

from dapt.clip import inside as tower
from dapt.clip.backbone import Backbone
from dapt.clip.inside import EVALUATION, Inside, Pass
from dapt.clip.text import Chunk
from dapt.engine.classifier import Classifier
from dapt.methods import TowerPart


def block_plain(block: ResidualAttentionBlock, x: Tensor, mask: Tensor | None) -> Tensor:
    """One transformer layer over x (B, L, W), its (B, H, L, L) attention matrix written out."""
    attn, heads = block.attn, block.attn.num_heads
    qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
    scores = q @ k.transpose(-1, -2) / sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + block.ls_1(attn.out_proj(mixed))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def text_plain(text: TextTransformer, ids: Tensor, context: Tensor) -> Tensor:
    """Text features (C, D) of token ids (C, L) with a context (M, W) put after the start token."""
    x = text.token_embedding(ids)
    x = torch.cat([x[:, :1], context.expand(len(ids), -1, -1), x[:, 1 + len(context) :]], dim=1)
    x = x + text.positional_embedding
    for block in text.transformer.resblocks:
        x = block_plain(block, x, text.attn_mask)
    x = text.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)]
    return x @ text.text_projection


def image_plain(visual: VisionTransformer, images: Tensor, prompt: Tensor) -> Tensor:
    """Image features (B, D) with a visual prompt (N, W) between class token and patches."""
    x = visual._embeds(images)
    x = torch.cat([x[:, :1], prompt.expand(len(x), -1, -1), x[:, 1:]], dim=1)
    for block in visual.transformer.resblocks:
        x = block_plain(block, x, None)
    return visual.ln_post(x)[:, 0] @ visual.proj


class PlainClassifier(nn.Module):
    """Both towers of an open_clip model with prompts, the plain way, as `Classifier` would.

    Args:
        backbone: says how images are normalised and what the temperature is.
        model: open_clip's own model of the same weights, as loaded.
        class_names: C names.
        parts: a `Context` (M, W) and a `VisualPrompt` (N, W').
    """

    def __init__(
        self,
        backbone: Backbone,
        model: Any,
        class_names: Sequence[str],
        parts: Sequence[TowerPart],
    ) -> None:
        super().__init__()
        self.backbone, self.class_names = backbone, class_names
        self.model, self.parts = model.eval().requires_grad_(False), nn.ModuleList(parts)
        stand_in = " ".join(["X"] * len(self.learned()["text_prompt"]))
        names = [name.replace("_", " ") for name in class_names]
        ids = backbone.tokenizer([f"{stand_in} {name}." for name in names])
        self.ids = ids.to(backbone.device)  # (C, 77)

    def learned(self) -> dict[str, nn.Parameter]:
        """Both prompts, by their names in a run's files."""
        return {name: p for part in self.parts for name, p in part.named_parameters()}

    def kept_bytes(self, _images: int) -> int:
        """Not known: the plain way computes nothing anew."""
        return 0

    def text_features(self, _images: Any = None, _now: Pass = EVALUATION) -> Tensor:
        """(C, D), normalised."""
        prompt = self.learned()["text_prompt"]
        return F.normalize(text_plain(self.model.text, self.ids, prompt), dim=-1)

    def image_features(self, views: Tensor, _now: Pass = EVALUATION) -> Tensor:
        """(B, D), normalised, of uint8 views (B, 3, S, S)."""
        images, prompt = self.backbone.normalize(views), self.learned()["visual_prompt"]
        return F.normalize(image_plain(self.model.visual, images, prompt), dim=-1)

    encode = image_features

    def forward(self, views: Tensor) -> Tensor:
        """(B, C) logits; class features are computed anew."""
        return self.logits(self.image_features(views), self.text_features())

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """(B, C) logits of normalised features."""
        return self.backbone.logit_scale * image_features @ text_features.T


def all_tokens(classifier: Classifier) -> None:
    """Let a classifier of any method send each class's 77 tokens, padding and all, through.

    The plain way of methods that are not written out here: no prefix is run once for all classes,
    nothing is left away behind a name, all classes are one batch, changes of weights stand beside
    each map for all tokens of all classes. The image tower stays ours. A text tower of other layers
    than CLIP's runs by its own modules.
    """
    for encoder in cast(Iterable[Any], classifier.text_encoders):
        if encoder.ends_at_end and tower.is_plain(encoder.backbone.text.transformer):
            encoder._whole = partial(_layer_by_layer, encoder)
        encoder.shares_prefix = encoder.ends_at_end = False
        count = len(encoder.tokens.own)
        encoder.chunks = [Chunk(slice(0, count), slice(0, len(encoder.packed)), ())]


def _layer_by_layer(encoder: Any, chunk: Chunk, inside: Inside, context: Tensor | None) -> Tensor:
    """Text features (C, D) of all tokens through all layers, with what parts put inside."""
    text, first = encoder.backbone.text, len(encoder.tokens.shared)
    length = 0 if context is None else context.shape[-2]
    ids, places = encoder._ids(chunk, length)  # (C, 77), (C, M)
    x = text.token_embedding(ids)
    if context is not None:
        own = context[encoder.order] if context.dim() == 3 else context.expand(len(ids), -1, -1)
        x = x.scatter(1, places[..., None].expand_as(own), own)
    x = x + text.positional_embedding[: x.shape[1]]
    for layer in tower.unrolled(text.transformer, inside):
        x = layer.enter(x, first)
        q, k, v = (tower.split_heads(t, layer.heads) for t in layer.qkv(x))
        x = layer.finish(x, tower.attend(q, k, v, causal=True))
    # Vectors that layers put behind the start token moved the end token.
    ends = ids.argmax(-1) + x.shape[1] - ids.shape[1]
    return text.ln_final(x)[torch.arange(len(ids)), ends] @ text.text_projection
