"""Deep prompts in both towers (IVLP of Khattak et al., 2023, and deep VPT of Jia et al., 2022).

A layer's prompt replaces what the layer before made of the last one, as far down as the depth says;
beyond it tokens flow on. Learned with one rate and cross-entropy alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dapt.clip.backbone import Backbone
from dapt.clip.inside import Pass, norm
from dapt.methods.context import ContextSettings
from dapt.methods.contract import HasSettings, PartSettings, TowerPart
from dapt.methods.visual import VisualSettings


class DeepTextSettings(ContextSettings):
    """Of a deep text prompt."""

    text_depth: int = Field(
        12, ge=1, le=2**10, description="layers with a text prompt of their own"
    )


class DeepVisualSettings(PartSettings):
    """Of a deep visual prompt."""

    visual_vectors: int = VisualSettings.model_fields["visual_vectors"]  # type: ignore[assignment]
    visual_depth: int = Field(12, ge=1, le=2**10, description="layers with a visual prompt each")


class DeepPrompt(TowerPart):
    """Vectors of one tower's first layers: ``vectors`` are (N, W) each."""

    def __init__(self, vectors: list[Tensor]) -> None:
        super().__init__()
        own = nn.ParameterList(nn.Parameter(v.float().clone()) for v in vectors)
        self.add_module(self.name, own)

    name = ""

    @property
    def vectors(self) -> nn.ParameterList:
        """A prompt for each layer."""
        found = getattr(self, self.name)
        assert isinstance(found, nn.ParameterList)
        return found

    def tokens(self, tower: str, now: Pass) -> Tensor:
        """(N, W), in front of the first layer."""
        return self.vectors[0]

    def before_layer(self, tower: str, layer: int, x: Tensor, at: slice) -> Tensor:
        """The layer's own prompt in place of what the one before made of the last."""
        if not 0 < layer < len(self.vectors):
            return x
        own = self.vectors[layer].to(x.dtype).expand(*x.shape[:-2], -1, -1)
        return torch.cat([x[..., : at.start, :], own, x[..., at.stop :, :]], -2)


class DeepContext(DeepPrompt):
    """``[SOS] u_1 .. u_M [further words] <name> .``: text prompts at any depth.

    Where the initial words are more than the vectors, the further ones stay in the prompt as they
    are, as in the published code ("[v][v] of a name.").
    """

    towers = frozenset({"text"})
    Settings = DeepTextSettings
    name = "text_prompt"

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> DeepContext:
        """The first layer's vectors are the words' where there are any, all others N(0, 0.02)."""
        own: DeepTextSettings = settings.of(DeepTextSettings)
        generator = torch.Generator().manual_seed(2 * settings.seed)
        depth, count = min(own.text_depth, backbone.text_layers), own.text_vectors
        vectors = [
            0.02 * torch.randn(count, backbone.text_width, generator=generator)
            for _ in range(depth)
        ]
        after = ""
        if own.text_init:
            words = backbone.embed_words(own.text_init)[:count]
            vectors[0][count - len(words) :] = words
            after = " ".join(own.text_init.replace("_", " ").split()[count:])
        part = cls(vectors)
        part.after = after
        return part

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """Such as "2 learned text prompt vectors in each of 9 layers"."""
        own = settings.of(DeepTextSettings)
        return (
            f"{own.text_vectors} learned text prompt vectors in each of up to {own.text_depth} "
            "layers"
        )

    @classmethod
    def settings_of(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Numbers of vectors and of layers."""
        own = [t for name, t in tensors.items() if name.startswith("text_prompt.")]
        return {"text_vectors": len(own[0]), "text_depth": len(own)}


class DeepVisual(DeepPrompt):
    """``[CLS] patches v_1 .. v_N``: visual prompts at any depth.

    The first enters before ``ln_pre``, as in the published code; it has no position.

    Args:
        vectors: (N, vision width) for each layer.
        pre: the tower's layer norm in front of its layers; it stays frozen.
    """

    towers = frozenset({"image"})
    Settings = DeepVisualSettings
    name = "visual_prompt"

    def __init__(self, vectors: list[Tensor], pre: nn.Module | None = None) -> None:
        super().__init__(vectors)
        self._pre = (pre or nn.Identity(),)  # not a module of this part: nothing in it is learned

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> DeepVisual:
        """Vectors from N(0, 0.02)."""
        own: DeepVisualSettings = settings.of(DeepVisualSettings)
        generator = torch.Generator().manual_seed(2 * settings.seed + 1)
        depth = min(own.visual_depth, backbone.vision_layers)
        shape = own.visual_vectors, backbone.vision_width
        vectors = [0.02 * torch.randn(*shape, generator=generator) for _ in range(depth)]
        return cls(vectors, backbone.norm_before_layers)

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """Such as "2 learned visual prompt vectors in each of 9 layers"."""
        own = settings.of(DeepVisualSettings)
        return (
            f"{own.visual_vectors} learned visual prompt vectors in each of up to "
            f"{own.visual_depth} layers"
        )

    @classmethod
    def settings_of(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Numbers of vectors and of layers."""
        own = [t for name, t in tensors.items() if name.startswith("visual_prompt.")]
        return {"visual_vectors": len(own[0]), "visual_depth": len(own)}

    def tokens(self, tower: str, now: Pass) -> Tensor:
        """(N, W) of the first layer, normalised as patches are."""
        return norm(self._pre[0], self.vectors[0])


def published_settings(dataset: str, shots: int) -> dict[str, Any]:
    """Two vectors in every layer, 5 epochs of batches of 4 (configs/trainers/IVLP of the code)."""
    return {
        "text_vectors": 2, "visual_vectors": 2, "text_init": "a photo of a",
        "lr": 0.0035, "batch_size": 4, "epochs": 5,
    }  # fmt: skip
