"""The table of methods, and the settings published for each benchmark.

A method is a row: which prompts it learns and which loss terms it adds to cross-entropy. A new
one is one more row in `METHODS`; a new loss term is one function in `LOSS_TERMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dapt.errors import UserError, nearest
from dapt.methods.losses import inter_dispersion, intra_dispersion


@dataclass(frozen=True)
class Batch:
    """What a loss term may look at: one step's features, and what they are compared with."""

    image_features: Tensor  # (B, D), normalised
    text_features: Tensor  # (C, D), normalised
    labels: Tensor  # (B,)
    prototypes: Tensor  # (C, D)
    rbf_t: float


LossTerm = Callable[[Batch], Tensor]

LOSS_TERMS: dict[str, LossTerm] = {
    "intra": lambda b: intra_dispersion(b.image_features, b.labels, b.prototypes),
    "inter": lambda b: inter_dispersion(b.text_features, b.rbf_t),
}


@dataclass(frozen=True)
class Method:
    """One row: what is learned and by which losses.

    Attributes:
        title: how tables call it.
        text: learn a text prompt; otherwise the class name stands in the task's template.
        visual: learn a visual prompt.
        terms: loss term -> the name of the setting that weighs it, or a fixed weight.
        probe: no prompts at all, but a logistic regression on frozen image features.
    """

    title: str
    text: bool = False
    visual: bool = False
    terms: Mapping[str, str | float] = field(default_factory=dict)
    probe: bool = False

    @property
    def learns_prompts(self) -> bool:
        """Whether there is anything for gradient descent to do."""
        return self.text or self.visual


INTRA, INTER = {"intra": "beta_visual"}, {"inter": "beta_text"}

METHODS: dict[str, Method] = {
    "zero-shot": Method("Zero-shot CLIP"),
    "linear-probe": Method("Linear probe", probe=True),
    "coop": Method("CoOp", text=True),
    "vpt": Method("VPT", visual=True),
    "vlpt": Method("VLPT", text=True, visual=True),
    "dapt-text": Method("DAPT-text", text=True, terms=INTER),
    "dapt-visual": Method("DAPT-visual", visual=True, terms=INTRA),
    "dapt": Method("DAPT", text=True, visual=True, terms={**INTRA, **INTER}),
}


def get_method(name: str) -> Method:
    """Look a method up by its name in `METHODS`.

    Raises:
        UserError: there is no such row.
    """
    if name not in METHODS:
        raise UserError(
            f"unknown method '{name}'{nearest(name, list(METHODS))}; use one of "
            f"{', '.join(METHODS)}"
        )
    return METHODS[name]


# Published learning rate and loss weights: dataset -> (lr, beta_visual, beta_text).
_IMAGENET = (2, 0.01, 0.01)
PUBLISHED: dict[str, tuple[float, float, float]] = {
    "caltech101": (0.2, 10, 0.01),
    "dtd": (20, 100, 0.01),
    "eurosat": (20, 100, 10),
    "fgvc_aircraft": (2, 100, 0.01),
    "food101": (20, 10, 0.01),
    "imagenet": _IMAGENET,
    "imagenetv2": _IMAGENET,
    "imagenet_sketch": _IMAGENET,
    "imagenet_a": _IMAGENET,
    "imagenet_r": _IMAGENET,
    "oxford_flowers": (0.002, 10, 0.01),
    "oxford_pets": (0.02, 10, 0.1),
    "stanford_cars": (0.002, 100, 0.1),
    "sun397": (20, 100, 0.01),
    "ucf101": (20, 0.1, 0.1),
}


def published_epochs(dataset: str, shots: int) -> int:
    """Epochs of the published protocol: 50, 100 or 200 by shots; ImageNet always 50."""
    if shots <= 1 or dataset.startswith("imagenet"):
        return 50
    return 100 if shots <= 4 else 200
