"""MaPLe (Khattak et al., 2023): deep prompts in both towers, the visual ones mapped from text.

A layer's visual prompt is a learned linear map of the same layer's text prompt, so both
towers' gradients reach the text prompts. All is learned with one rate, by cross-entropy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dapt.clip.inside import Pass, norm
from dapt.methods import published
from dapt.methods.contract import HasSettings
from dapt.methods.ivlp import BEGUN, FEW, put, starting
from dapt.methods.layouts import Layout, Published
from dapt.methods.prompts import ContextSettings, Prompt, linear_map

if TYPE_CHECKING:  # it brings open_clip along, which the table of methods should not
    from dapt.clip.backbone import Backbone

# Two vectors in each of nine layers, 5 epochs of batches of 4 (configs/trainers/MaPLe of the code).
PUBLISHED = {"text_vectors": 2, "text_init": "a photo of a", "prompt_depth": 9, "lr": 0.0035,
             "batch_size": 4, "epochs": 5}  # fmt: skip
# As the code (trainers/maple.py) saves it: the whole model.
_LEARNED = (
    Published("prompt_learner.ctx", "text_prompt.0"),
    Published("prompt_learner.compound_prompts_text.{}", "text_prompt.{}", shift=-1),
    *(
        Published(f"prompt_learner.{key}.{of}", f"visual_map.{layer}.{of}", dims=dims, shift=shift)
        for key, layer, shift in (("proj", "0", 0), ("compound_prompt_projections.{}", "{}", -1))
        for of, dims in (("weight", 2), ("bias", 1))
    ),
)
LAYOUTS = (Layout(_LEARNED, settings=lambda facts: BEGUN),)


def usual(dataset: str, shots: int) -> dict[str, Any]:
    """The published settings, with another rate on few images of own data."""
    return published.settings_for(dataset, shots, PUBLISHED, of_few=FEW)


class CoupledSettings(ContextSettings):
    """Of prompts that both towers share."""

    prompt_depth: int = Field(9, ge=1, le=2**10, description="layers that have a coupled prompt")


class CoupledPrompt(Prompt):
    """Text prompts ``t_i`` at any depth, and visual prompts ``v_i = F_i(t_i)`` at the same depths.

    F_i are linear maps with a bias, from text width to vision width. All deeper ones start as
    copies of one map (as in the published code); the first is drawn separately. The vectors'
    positions and initial words are as in IVLP, with visual prompts before ``ln_pre`` (here
    ``pre``).
    """

    kind, towers = "text", frozenset({"text", "image"})
    Settings = CoupledSettings

    def __init__(
        self, vectors: Sequence[Tensor], maps: Sequence[nn.Linear], pre: nn.Module | None = None
    ) -> None:
        super().__init__(vectors)
        self.visual_map = nn.ModuleList(maps)
        self._pre = (pre or nn.Identity(),)  # not a module of this part: nothing in it is learned

    @property
    def layers(self) -> list[nn.Parameter]:
        """The text prompt of each layer that has one."""
        return list(self.get_submodule("text_prompt").parameters())

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> CoupledPrompt:
        """Text prompts as IVLP's, maps as torch draws linear layers by default."""
        own: CoupledSettings = settings.of(CoupledSettings)
        depth = min(own.prompt_depth, backbone.vision_layers)
        vectors, after = starting(backbone, own, depth, settings.seed)
        generator = torch.Generator().manual_seed(2 * settings.seed + 1)
        shape = backbone.text_width, backbone.vision_width
        maps = [linear_map(*shape, generator) for _ in vectors]
        for deeper in maps[2:]:
            deeper.load_state_dict(maps[1].state_dict())
        part = cls(vectors, maps, backbone.norm_before_layers)
        part.after = after
        return part

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What a model card says of it."""
        own: CoupledSettings = settings.of(CoupledSettings)
        words = f"{own.text_vectors} learned text prompt vectors in each of up to"
        return f"{words} {own.prompt_depth} layers, and a linear map of each to visual ones,"

    def of(self, tower: str, layer: int) -> Tensor:
        """(N, W), the prompt of a layer of a tower."""
        text = self.layers[layer]
        mapped: Tensor = self.visual_map[layer](text) if tower == "image" else text
        return mapped

    def tokens(self, tower: str, now: Pass) -> Tensor:
        """(N, W) of the first layer; the visual ones normalised as patches are."""
        first = self.of(tower, 0)
        return norm(self._pre[0], first) if tower == "image" else first

    def before_layer(self, tower: str, layer: int, x: Tensor, at: slice) -> Tensor:
        """The layer's own prompt in place of what the one before made of the last."""
        return put(self.of(tower, layer), x, at) if 0 < layer < len(self.layers) else x
