"""A visual prompt: vectors among an image's patches, in front of the first layer."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dapt.clip.backbone import Backbone
from dapt.clip.inside import Pass
from dapt.methods.contract import HasSettings, PartSettings, TowerPart


class VisualSettings(PartSettings):
    """Of a visual prompt."""

    visual_vectors: int = Field(16, ge=1, le=2**16, description="N, vectors of the visual prompt")
    visual_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the visual prompt")


class VisualPrompt(TowerPart):
    """Shallow VPT (Jia et al., 2022), DAPT's visual prompt: ``[CLS] v_1 .. v_N patches``.

    It enters after ``ln_pre`` and carries no positional embedding.

    Args:
        visual_prompt: (N, vision width) initial values.
        dropout: probability of zeroing an element, drawn anew for each image of a step.
    """

    towers = frozenset({"image"})
    Settings = VisualSettings

    def __init__(self, visual_prompt: Tensor, dropout: float = 0.0) -> None:
        super().__init__()
        self.visual_prompt = nn.Parameter(visual_prompt.float().clone())
        self.dropout = dropout

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> VisualPrompt:
        """Vectors uniform in ±sqrt(6 / (3·patch² + width)).

        Raises:
            UserError: the tower takes no visual prompt.
        """
        own: VisualSettings = settings.of(VisualSettings)
        generator = torch.Generator().manual_seed(2 * settings.seed + 1)
        width = backbone.vision_width
        bound = sqrt(6 / (3 * backbone.patch_size**2 + width))
        vectors = bound * (2 * torch.rand(own.visual_vectors, width, generator=generator) - 1)
        return cls(vectors, own.visual_dropout)

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """Such as "16 learned visual prompt vectors"."""
        return f"{settings.of(VisualSettings).visual_vectors} learned visual prompt vectors"

    @classmethod
    def settings_of(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The number of vectors."""
        return {"visual_vectors": len(tensors["visual_prompt"])}

    def tokens(self, tower: str, now: Pass) -> Tensor:
        """(N, W); with dropout, in a training step, (B, N, W)."""
        prompt: Tensor = self.visual_prompt
        if not self.dropout or now.generator is None:
            return prompt
        # Of the whole batch, so that each process of several draws the same.
        drawn = torch.rand(now.images, *prompt.shape, generator=now.generator)[now.part]
        return prompt * (drawn >= self.dropout).to(prompt.device) / (1 - self.dropout)
