"""Deep prompts in both towers: IVLP (Khattak et al., 2023), and deep VPT (Jia et al., 2022).

Each layer's own prompt replaces the previous layer's output for its prompt. After the last layer
that has a prompt, the tokens flow on. All prompts are learned with one rate, by cross-entropy
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dapt.clip.inside import Pass, norm
from dapt.errors import UserError
from dapt.methods import published
from dapt.methods.contract import HasSettings, PartSettings
from dapt.methods.layouts import Layout, Published
from dapt.methods.prompts import ContextSettings, Prompt, VisualSettings, normal_vectors

if TYPE_CHECKING:  # it brings open_clip along, which the table of methods should not
    from dapt.clip.backbone import Backbone

# Two vectors in every layer, 5 epochs of batches of 4 (configs/trainers/IVLP of the code).
PUBLISHED = {"text_vectors": 2, "visual_vectors": 2, "text_init": "a photo of a", "lr": 0.0035,
             "batch_size": 4, "epochs": 5}  # fmt: skip
# Deep VPT: eight of them in the image tower alone, and one sentence whatever the dataset
# (configs/trainers/VPT; the names of one's own data have its own).
VPT = {"visual_vectors": 8, "lr": 0.0025, "batch_size": 4, "epochs": 5,
       "template": "a photo of a {}."}  # fmt: skip
# As the code (trainers/independentVL.py, clip/model.py) saves them: the whole model, in which the
# prompt of a layer after the first is that layer's own. It does not say which words the text
# prompt began with; they are taken to be the published ones.
_VISUAL = (
    Published("image_encoder.VPT", "visual_prompt.0"),
    Published("image_encoder.transformer.resblocks.{}.VPT_shallow", "visual_prompt.{}"),
)
_TEXT = (
    Published("prompt_learner.ctx", "text_prompt.0"),
    Published("text_encoder.transformer.resblocks.{}.VPT_shallow", "text_prompt.{}"),
)
VPT_LAYOUTS = (Layout(_VISUAL),)
BEGUN = {"text_init": PUBLISHED["text_init"]}
LAYOUTS = (Layout((*_TEXT, *_VISUAL), settings=lambda facts: BEGUN),)
# Of few images of own data, which say little (judged as the others in published.yaml).
FEW = {"lr": 0.0003}


def usual(dataset: str, shots: int) -> dict[str, Any]:
    """The published settings, with another rate on few images of own data."""
    return published.settings_for(dataset, shots, PUBLISHED, of_few=FEW)


def usual_vpt(dataset: str, shots: int) -> dict[str, Any]:
    """The same of deep VPT."""
    return published.settings_for(dataset, shots, VPT, {"template": None}, FEW)


class DeepContextSettings(ContextSettings):
    """Of a deep text prompt."""

    text_depth: int = Field(12, ge=1, le=2**10, description="layers that have a text prompt")


class DeepVisualSettings(PartSettings):
    """Of a deep visual prompt."""

    visual_vectors: int = VisualSettings.model_fields["visual_vectors"]  # type: ignore[assignment]
    visual_depth: int = Field(12, ge=1, le=2**10, description="layers that have a visual prompt")


class DeepPrompt(Prompt):
    """A prompt of several layers."""

    def before_layer(self, tower: str, layer: int, x: Tensor, at: slice) -> Tensor:
        """The layer's own prompt in place of what the one before made of the last."""
        return put(self.layers[layer], x, at) if 0 < layer < len(self.layers) else x


def put(own: Tensor, x: Tensor, at: slice) -> Tensor:
    """Tokens x (..., T, W) with ``own`` (N, W) where others stood."""
    own = own.to(x.dtype).expand(*x.shape[:-2], -1, -1)
    return torch.cat([x[..., : at.start, :], own, x[..., at.stop :, :]], -2)


class DeepContext(DeepPrompt):
    """``[SOS] u_1 .. u_M [further words] <name> .``: text prompts at any depth.

    If there are more initial words than vectors, the other words stay in the prompt unchanged, as
    in the published code ("[v][v] of a name.").
    """

    kind, towers = "text", frozenset({"text"})
    Settings = DeepContextSettings

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> DeepContext:
        """The first layer's vectors are the words' where there are any, all others N(0, 0.02)."""
        own: DeepContextSettings = settings.of(DeepContextSettings)
        vectors, after = starting(backbone, own, own.text_depth, settings.seed)
        part = cls(vectors)
        part.after = after
        return part


def starting(
    backbone: Backbone, own: ContextSettings, depth: int, seed: int
) -> tuple[list[Tensor], str]:
    """Text prompts (N, W) of so many layers as there are, and the words that stay behind them."""
    depth, count = min(depth, backbone.text_layers), own.text_vectors
    vectors, after = normal_vectors(depth, count, backbone.text_width, 2 * seed), ""
    if own.text_init:
        said, words = (
            own.text_init.replace("_", " ").split(),
            backbone.embed_words(own.text_init),
        )
        if len(said) > count and len(words) != len(said):
            raise UserError(
                f"text_init '{own.text_init}' is {len(words)} tokens, and the {count} vectors "
                f"would cut a word; give text_init simpler words or text_vectors={len(words)}"
            )
        words, after = words[:count], " ".join(said[count:])
        vectors[0][count - len(words) :] = words
    return vectors, after


class DeepVisual(DeepPrompt):
    """``[CLS] patches v_1 .. v_N``: visual prompts at any depth.

    The first prompt enters before ``ln_pre`` (here ``pre``, which stays frozen), as in the
    published code, and has no positional embedding.
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
        return cls(
            normal_vectors(depth, *shape, 2 * settings.seed + 1), backbone.norm_before_layers
        )

    def tokens(self, tower: str, now: Pass) -> Tensor:
        """(N, W) of the first layer, normalised as patches are."""
        return norm(self._pre[0], self.layers[0])
