"""What may be put into a frozen tower on its way: nothing, unless somebody says so."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pass:
    """One pass of a batch through the model, as far as what is learned may depend on it.

    Attributes:
        generator: of what is random in a training step; None in evaluation. It is a CPU one, so
            that a draw is the same on every device.
        images: how many the batch has; ``part``: which of them are here, where processes share it.
        image_features: (B, D) that class features may depend on.
    """

    generator: torch.Generator | None = None
    images: int = 0
    part: slice = field(default_factory=lambda: slice(None))
    image_features: Tensor | None = None


EVALUATION = Pass()


class Inside:
    """What is put into one tower in one pass; by itself, nothing.

    Attributes:
        tokens: (N, W), or (B, N, W): after the start token, or among the patches.
        layers: whether `before_layer` does anything; ``linears``: whether `linear` does.
    """

    tokens: Tensor | None = None
    layers = False
    linears = False

    def __init__(self, tokens: Tensor | None = None) -> None:
        self.tokens = tokens

    def before_layer(self, layer: int, x: Tensor, start: int) -> Tensor:
        """Tokens (..., T, W) as a layer is to see them; inserted ones begin at ``start``."""
        return x

    def linear(self, layer: int, names: tuple[str, ...], x: Tensor, out: Tensor) -> Tensor:
        """What a linear map of a layer gives, ``out`` being the frozen one's."""
        return out


NOTHING = Inside()
