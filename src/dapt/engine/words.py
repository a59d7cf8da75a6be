"""What learned text vectors are nearest to among the words that a text tower knows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dapt.clip.backbone import Backbone, embedded
from dapt.engine.classifier import Classifier
from dapt.errors import UserError, printable, readable


class Words(NamedTuple):
    """A learned vector's nearest words, the nearest first, with Euclidean distances."""

    vector: int  # its place in the prompt, from 1
    class_name: str  # whose prompt it is of; empty of one that all classes share
    nearest: tuple[tuple[str, float], ...]


def nearest_words(classifier: Classifier, count: int = 5) -> list[Words]:
    """The ``count`` nearest tokens to each vector that is put among the text tower's first ones.

    By Euclidean distance to token embeddings, as CoOp's paper looks at its contexts (Zhou et al.,
    2022, section 4.2). What a layer further in takes in place of tokens is compared with none.
    A `UserError` where no text vectors were learned.
    """
    found = classifier.tensors()
    prompt = found.get("text_prompt", found.get("text_prompt.0"))
    if prompt is None:
        raise UserError("no text vectors were learned; words are of methods such as coop or dapt")
    backbone = classifier.backbone
    vocabulary = _vocabulary(backbone)  # (V, W)
    shared = prompt.dim() == 2
    rows = []
    for name, vectors in zip(
        ("",) if shared else classifier.class_names,
        (prompt,) if shared else prompt,
        strict=True,
    ):
        distances = torch.cdist(vectors.float().cpu()[None], vocabulary[None])[0]  # (M, V)
        values, places = distances.topk(min(count, len(vocabulary)), largest=False)
        for vector, (ids, far) in enumerate(zip(places.tolist(), values.tolist(), strict=True), 1):
            nearest = tuple((_word(backbone, t), d) for t, d in zip(ids, far, strict=True))
            rows.append(Words(vector, readable(name), nearest))
    return rows


def _vocabulary(backbone: Backbone) -> Tensor:
    """(V, W), on the CPU: embeddings of all tokens, as the text tower's first layer has them."""
    ids = torch.arange(len(backbone.word_embeddings()), device=backbone.device)
    with torch.inference_mode():
        return embedded(backbone.text, ids).float().cpu()


def _word(backbone: Backbone, token: int) -> str:
    """A token as text; a piece that a word goes on from ends with a hyphen."""
    tokenizer: Any = backbone.tokenizer
    decode = tokenizer.decode if hasattr(tokenizer, "decode") else tokenizer.tokenizer.decode
    try:
        text = decode([token])
    except (KeyError, IndexError, TypeError):  # a row of the table that is no token's
        return f"<{token}>"
    whole = text.endswith(" ") or not hasattr(tokenizer, "byte_decoder")
    return printable(text.strip() + ("" if whole or text.startswith("<") else "-")) or f"<{token}>"
