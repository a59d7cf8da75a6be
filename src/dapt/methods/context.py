"""A text prompt that all classes share: vectors between the start token and the class name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dapt.clip.backbone import Backbone
from dapt.clip.inside import Pass
from dapt.errors import UserError
from dapt.methods.contract import HasSettings, PartSettings, TowerPart


class ContextSettings(PartSettings):
    """Of a text prompt."""

    text_vectors: int = Field(16, ge=1, le=2**16, description="M, vectors of the text prompt")
    text_init: str | None = Field(None, description="words the text prompt starts from")


class Context(TowerPart):
    """CoOp's context (Zhou et al., 2022), DAPT's text prompt: ``[SOS] u_1 .. u_M <name> . [EOT]``.

    Args:
        text_prompt: (M, text width) initial values.
    """

    towers = frozenset({"text"})
    Settings = ContextSettings

    def __init__(self, text_prompt: Tensor) -> None:
        super().__init__()
        self.text_prompt = nn.Parameter(text_prompt.float().clone())

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> Context:
        """Vectors from N(0, 0.02); words, where there are any, are the last of them.

        Raises:
            UserError: the tower takes no context, or the words outnumber the vectors.
        """
        own: ContextSettings = settings.of(ContextSettings)
        generator = torch.Generator().manual_seed(2 * settings.seed)
        vectors = 0.02 * torch.randn(own.text_vectors, backbone.text_width, generator=generator)
        if own.text_init:
            words = backbone.embed_words(own.text_init)
            if len(words) > own.text_vectors:
                raise UserError(
                    f"the words '{own.text_init}' take {len(words)} vectors but the text prompt "
                    f"has {own.text_vectors}; use fewer words or more vectors"
                )
            vectors[own.text_vectors - len(words) :] = words
        return cls(vectors)

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """Such as "16 learned text prompt vectors"."""
        return f"{settings.of(ContextSettings).text_vectors} learned text prompt vectors"

    @classmethod
    def settings_of(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The number of vectors."""
        return {"text_vectors": len(tensors["text_prompt"])}

    def tokens(self, tower: str, now: Pass) -> Tensor:
        """(M, W), the same for every class and image."""
        return self.text_prompt
