"""The learned vectors: all that tuning changes."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

from dapt.clip.backbone import Backbone
from dapt.errors import UserError


class Prompts(nn.Module):
    """Text and visual prompt vectors, kept in fp32; either may be absent.

    Attributes:
        text: (M, text_width), put between the start token and the class name, or None.
        visual: (N, vision_width), put between the class token and the patches, or None.
    """

    text: nn.Parameter | None
    visual: nn.Parameter | None

    def __init__(self, text: Tensor | None = None, visual: Tensor | None = None) -> None:
        super().__init__()
        self.text = None if text is None else nn.Parameter(text.float().clone())
        self.visual = None if visual is None else nn.Parameter(visual.float().clone())

    @property
    def count(self) -> int:
        """Number of learned parameters."""
        return sum(p.numel() for p in self.parameters())


def new_prompts(
    backbone: Backbone,
    *,
    text_vectors: int = 0,
    visual_vectors: int = 0,
    text_init: str | None = None,
    seed: int = 1,
) -> Prompts:
    """Draw initial prompts: text N(0, 0.02), visual uniform in ±sqrt(6 / (3·patch² + width)).

    Args:
        backbone: whose widths the vectors take.
        text_vectors: M, the length of the context; 0 for none.
        visual_vectors: N; 0 for none.
        text_init: words such as "a photo of a" whose embeddings start the context instead; the
            remaining vectors, in front, are drawn.
        seed: of the draw; text and visual prompts do not depend on each other's size.

    Raises:
        UserError: the backbone takes no such prompt, or the words outnumber the vectors.
    """
    text = visual = None
    if text_vectors:
        generator = torch.Generator().manual_seed(2 * seed)
        text = 0.02 * torch.randn(text_vectors, backbone.text_width, generator=generator)
        if text_init:
            words = _embed_words(backbone, text_init)
            if len(words) > text_vectors:
                raise UserError(
                    f"the words '{text_init}' take {len(words)} vectors but the text prompt has "
                    f"{text_vectors}; use fewer words or more vectors"
                )
            text[text_vectors - len(words) :] = words
    if visual_vectors:
        generator = torch.Generator().manual_seed(2 * seed + 1)
        width = backbone.vision_width
        bound = sqrt(6 / (3 * backbone.patch_size**2 + width))
        visual = bound * (2 * torch.rand(visual_vectors, width, generator=generator) - 1)
    prompts = Prompts(text, visual)
    return prompts.to(backbone.device)


def check_prompt(backbone: Backbone, name: str, prompt: Tensor, where: str) -> None:
    """Raise `UserError` unless a text or visual prompt has the width of the backbone's tower."""
    width = backbone.text_width if name == "text" else backbone.vision_width
    if prompt.ndim != 2 or not len(prompt):
        raise UserError(
            f"the {name} prompt in {where} has shape {tuple(prompt.shape)}; (vectors, width) is "
            "needed"
        )
    if prompt.shape[1] != width:
        raise UserError(
            f"the {name} prompt in {where} is {prompt.shape[1]} wide, but the {name} tower of "
            f"'{backbone.name}' is {width}; give the --backbone it was tuned on"
        )


def _embed_words(backbone: Backbone, words: str) -> Tensor:
    backbone.require_text_prompts()
    ids = backbone.tokenize([words.replace("_", " ")])[0]
    inner = ids[len(backbone.start_tokens) : -1]  # without start and end
    table = backbone.text.token_embedding.weight
    return table[torch.tensor(inner, device=table.device)].float().cpu()
