"""Prompts: learned vectors in front of a tower's first layer, or of each of several (deep ones).

Deep prompts are those of IVLP (Khattak et al., 2023) and of deep VPT (Jia et al., 2022): a layer's
own replaces what the layer before made of the last one; beyond the last prompt tokens flow on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dapt.clip.backbone import Backbone
from dapt.clip.inside import Pass
from dapt.clip.layers import norm
from dapt.errors import UserError
from dapt.methods.contract import HasSettings, PartSettings, TowerPart


class ContextSettings(PartSettings):
    """Of a text prompt."""

    text_vectors: int = Field(16, ge=1, le=2**16, description="M, vectors of the text prompt")
    text_init: str | None = Field(None, description="words the text prompt starts from")


class DeepContextSettings(ContextSettings):
    """Of a deep text prompt."""

    text_depth: int = Field(12, ge=1, le=2**10, description="layers with a text prompt each")


class VisualSettings(PartSettings):
    """Of a visual prompt."""

    visual_vectors: int = Field(16, ge=1, le=2**16, description="N, vectors of the visual prompt")
    visual_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the visual prompt")


class DeepVisualSettings(PartSettings):
    """Of a deep visual prompt."""

    visual_vectors: int = VisualSettings.model_fields["visual_vectors"]  # type: ignore[assignment]
    visual_depth: int = Field(12, ge=1, le=2**10, description="layers with a visual prompt each")


class Prompt(TowerPart):
    """Vectors of one tower: ``<kind>_prompt`` in a run's files, or ``<kind>_prompt.<layer>``.

    They start as the (N, W) values given; of a deep prompt these are a list, by layer.
    """

    kind: ClassVar[str]  # "text" or "visual"

    def __init__(self, vectors: Tensor | Sequence[Tensor]) -> None:
        super().__init__()
        layers = [vectors] if isinstance(vectors, Tensor) else vectors
        own = [nn.Parameter(v.float().clone()) for v in layers]
        deep = layers is vectors
        setattr(self, f"{self.kind}_prompt", nn.ParameterList(own) if deep else own[0])

    @property
    def layers(self) -> list[nn.Parameter]:
        """The prompt of each layer that has one."""
        return list(self.parameters())

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """Such as "2 learned text prompt vectors in each of up to 9 layers"."""
        own = settings.of(cls.Settings).model_dump()
        words = f"{own[f'{cls.kind}_vectors']} learned {cls.kind} prompt vectors"
        depth = own.get(f"{cls.kind}_depth")
        return f"{words} in each of up to {depth} layers" if depth else words

    @classmethod
    def settings_of(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Numbers of vectors and, of a deep prompt, of layers."""
        own = [t for name, t in tensors.items() if name.split(".")[0] == f"{cls.kind}_prompt"]
        found = {f"{cls.kind}_vectors": len(own[0]), f"{cls.kind}_depth": len(own)}
        return {name: n for name, n in found.items() if name in cls.Settings.model_fields}

    def tokens(self, tower: str, now: Pass) -> Tensor:
        """(N, W), in front of the first layer."""
        return self.layers[0]


class DeepPrompt(Prompt):
    """A prompt of several layers."""

    def before_layer(self, tower: str, layer: int, x: Tensor, at: slice) -> Tensor:
        """The layer's own prompt in place of what the one before made of the last."""
        layers = self.layers
        if not 0 < layer < len(layers):
            return x
        own = layers[layer].to(x.dtype).expand(*x.shape[:-2], -1, -1)
        return torch.cat([x[..., : at.start, :], own, x[..., at.stop :, :]], -2)


class Context(Prompt):
    """CoOp's context (Zhou et al., 2022), DAPT's too: ``[SOS] u_1 .. u_M <name> . [EOT]``."""

    kind, towers = "text", frozenset({"text"})
    Settings = ContextSettings

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> Context:
        """Vectors from N(0, 0.02); words, where there are any, are the last of them.

        That they outnumber the vectors, or the tower takes no context, is a `UserError`.
        """
        own: ContextSettings = settings.of(ContextSettings)
        [vectors] = _normal(1, own.text_vectors, backbone.text_width, 2 * settings.seed)
        if own.text_init:
            words = backbone.embed_words(own.text_init)
            if len(words) > own.text_vectors:
                what = f"the words '{own.text_init}' take {len(words)} vectors"
                hint = f"has {own.text_vectors}; use fewer words or more vectors"
                raise UserError(f"{what} but the text prompt {hint}")
            vectors[own.text_vectors - len(words) :] = words
        return cls(vectors)


class DeepContext(DeepPrompt):
    """``[SOS] u_1 .. u_M [further words] <name> .``: text prompts at any depth.

    Where the initial words are more than the vectors, the further ones stay in the prompt as they
    are, as in the published code ("[v][v] of a name.").
    """

    kind, towers = "text", frozenset({"text"})
    Settings = DeepContextSettings

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> DeepContext:
        """The first layer's vectors are the words' where there are any, all others N(0, 0.02)."""
        own: DeepContextSettings = settings.of(DeepContextSettings)
        depth, count = min(own.text_depth, backbone.text_layers), own.text_vectors
        vectors, after = _normal(depth, count, backbone.text_width, 2 * settings.seed), ""
        if own.text_init:
            words = backbone.embed_words(own.text_init)[:count]
            vectors[0][count - len(words) :] = words
            after = " ".join(own.text_init.replace("_", " ").split()[count:])
        part = cls(vectors)
        part.after = after
        return part


class VisualPrompt(Prompt):
    """Shallow VPT (Jia et al., 2022), DAPT's visual prompt: ``[CLS] v_1 .. v_N patches``.

    It enters after ``ln_pre`` and carries no positional embedding. ``dropout`` is the probability
    of zeroing an element, drawn anew for each image of a step.
    """

    kind, towers = "visual", frozenset({"image"})
    Settings = VisualSettings

    def __init__(self, vectors: Tensor, dropout: float = 0.0) -> None:
        super().__init__(vectors)
        self.dropout = dropout

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> VisualPrompt:
        """Vectors uniform in ±sqrt(6 / (3·patch² + width)); a `UserError` if the tower has none."""
        own: VisualSettings = settings.of(VisualSettings)
        generator = torch.Generator().manual_seed(2 * settings.seed + 1)
        width = backbone.vision_width
        bound = sqrt(6 / (3 * backbone.patch_size**2 + width))
        vectors = bound * (2 * torch.rand(own.visual_vectors, width, generator=generator) - 1)
        return cls(vectors, own.visual_dropout)

    def tokens(self, tower: str, now: Pass) -> Tensor:
        """(N, W); with dropout, in a training step, (B, N, W)."""
        prompt: Tensor = self.layers[0]
        if not self.dropout or now.generator is None:
            return prompt
        # Of the whole batch, so that each process of several draws the same.
        drawn = torch.rand(now.images, *prompt.shape, generator=now.generator)[now.part]
        return prompt * (drawn >= self.dropout).to(prompt.device) / (1 - self.dropout)


class DeepVisual(DeepPrompt):
    """``[CLS] patches v_1 .. v_N``: visual prompts at any depth.

    The first enters before ``ln_pre`` (here ``pre``, which stays frozen), as in the published code;
    it has no position.
    """

    kind, towers = "visual", frozenset({"image"})
    Settings = DeepVisualSettings

    def __init__(self, vectors: Sequence[Tensor], pre: nn.Module | None = None) -> None:
        super().__init__(vectors)
        self._pre = (pre or nn.Identity(),)  # not a module of this part: nothing in it is learned

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> DeepVisual:
        """Vectors from N(0, 0.02)."""
        own: DeepVisualSettings = settings.of(DeepVisualSettings)
        depth = min(own.visual_depth, backbone.vision_layers)
        shape = own.visual_vectors, backbone.vision_width
        return cls(_normal(depth, *shape, 2 * settings.seed + 1), backbone.norm_before_layers)

    def tokens(self, tower: str, now: Pass) -> Tensor:
        """(N, W) of the first layer, normalised as patches are."""
        return norm(self._pre[0], self.layers[0])


def _normal(layers: int, count: int, width: int, seed: int) -> list[Tensor]:
    """(N, W) from N(0, 0.02) for each of some layers."""
    generator = torch.Generator().manual_seed(seed)
    return [0.02 * torch.randn(count, width, generator=generator) for _ in range(layers)]
