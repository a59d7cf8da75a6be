"""CoCoOp (Zhou et al., 2022): a small network shifts the context depending on the image."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dapt.clip.inside import Pass
from dapt.methods import published
from dapt.methods.contract import HasSettings
from dapt.methods.layouts import Layout, Published
from dapt.methods.prompts import ContextSettings, Prompt, first_context

if TYPE_CHECKING:  # it brings open_clip along, which the table of methods should not
    from dapt.clip.backbone import Backbone

# One image a step (configs/trainers/CoCoOp of the code).
PUBLISHED = {"text_vectors": 4, "text_init": "a photo of a", "lr": 0.002, "batch_size": 1,
             "epochs": 10}  # fmt: skip
# Of own data: a shift that is random at the start takes many steps to make good again.
OWN = {"batch_size": 4, "shift_start": 0.0}
FEW = {"lr": 5e-4, "epochs": 5, "text_init": None, "text_vectors": None}
# Its network's tensors, here and in the code (trainers/cocoop.py), which saves its prompt learner.
NETWORK = [
    f"meta_net.{layer}.{of}" for layer in ("linear1", "linear2") for of in ("weight", "bias")
]
_OF_NETWORK = [Published(n, n, dims=1 if n.endswith("bias") else 2) for n in NETWORK]
LAYOUTS = (Layout((Published("ctx", "text_prompt"), *_OF_NETWORK)),)


def usual(dataset: str, shots: int) -> dict[str, Any]:
    """The published settings; on own data, steps of several images from an unshifted context."""
    return published.settings_for(dataset, shots, PUBLISHED, OWN, FEW)


class ConditionalSettings(ContextSettings):
    """Of a context that a network shifts."""

    shift_start: float = Field(
        1.0, ge=0, le=1, description="CoCoOp's shift at the start, relative to the usual one"
    )


class ConditionalContext(Prompt):
    """``[SOS] u_1 + h(f) .. u_M + h(f) <name> . [EOT]`` for an image with features f.

    The network h has one hidden layer, a sixteenth as wide as f, with a ReLU. Without an
    image, nothing is added.
    """

    kind, towers, reads_images = "text", frozenset({"text"}), True
    Settings = ConditionalSettings
    text_prompt: nn.Parameter

    def __init__(self, vectors: Tensor, dimension: int) -> None:
        super().__init__(vectors)
        hidden = max(1, dimension // 16)
        down, up = nn.Linear(dimension, hidden), nn.Linear(hidden, vectors.shape[-1])
        layers = {"linear1": down, "relu": nn.ReLU(), "linear2": up}
        self.meta_net = nn.Sequential(OrderedDict(layers))

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> ConditionalContext:
        """A context as of `first_context`; the network as torch draws linear layers.

        Of the last of them, it is the share that the settings say. At 0, the context starts as it
        is, and only learning shifts it.
        """
        part = cls(first_context(backbone, settings), backbone.text_dimension)
        generator = torch.Generator().manual_seed(2 * settings.seed + 1)
        for layer in part.meta_net:
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                for parameter in layer.parameters():
                    nn.init.uniform_(parameter, -bound, bound, generator)
        with torch.no_grad():
            for parameter in part.meta_net[-1].parameters():
                parameter.mul_(settings.of(ConditionalSettings).shift_start)
        return part

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """The context, and what shifts it."""
        return f"{super().describe(settings)} that a network shifts by the image's features"

    def tokens(self, tower: str, now: Pass) -> Tensor:
        """(M, W), for one image."""
        if now.image_features is None:
            return self.text_prompt
        return self.text_prompt + self.meta_net(now.image_features)
