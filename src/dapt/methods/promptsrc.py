"""PromptSRC (Khattak et al., 2023): deep prompts that stay near the frozen model's predictions.

Both towers have prompts as in IVLP, with three additions. The features of images and classes are
pulled towards those of the frozen model, which reads class names in many templates. The logits are
pulled towards the frozen model's. And the result is an average over epochs with Gaussian weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dapt.methods import ivlp, published
from dapt.methods.contract import (
    LARGEST,
    Finish,
    HasSettings,
    LossTerm,
    PartSettings,
    Step,
    Tensors,
)

# Four vectors in each of nine layers, batches of 4 (configs/trainers/PromptSRC of the code, its
# setting of few shots).
PUBLISHED = {"text_vectors": 4, "visual_vectors": 4, "text_depth": 9, "visual_depth": 9,
             "text_init": "a photo of a", "lr": 0.0025, "batch_size": 4, "epochs": 50}  # fmt: skip
# Datasets for which later epochs count, and how much.
_LATE = {"stanford_cars", "oxford_flowers", "fgvc_aircraft", "dtd", "eurosat"}
_LATER = {"average_mean": 45.0, "average_std": 5.0}
# Of own data, as published for base classes; of few images half of it, at IVLP's rate.
OWN = {"epochs": 20, "average_mean": 15.0, "average_std": 1.0}
FEW = ivlp.FEW | {"epochs": 10, "average_mean": 7.5}
# How many of CLIP's templates for ImageNet, which open_clip lists, the teacher reads.
_TEMPLATES = 60
# As IVLP's, whose code it derives from, with a frozen image encoder beside them.
LAYOUTS = tuple(
    replace(one, sign="ZS_image_encoder.", aside=("ZS_image_encoder.",)) for one in ivlp.LAYOUTS
)


def usual(dataset: str, shots: int) -> dict[str, Any]:
    """The published settings, with fewer steps on own data, and another rate on few images."""
    late = _LATER if dataset in _LATE else {}
    return published.settings_for(dataset, shots, PUBLISHED | late, OWN, FEW)


class NearFrozenSettings(PartSettings):
    """Of the pull towards the frozen model."""

    near_text: float = Field(25.0, ge=0, le=LARGEST, description="pull to frozen text features")
    near_image: float = Field(10.0, ge=0, le=LARGEST, description="pull to frozen image features")
    near_logits: float = Field(1.0, ge=0, le=LARGEST, description="pull to frozen logits")


class AverageSettings(PartSettings):
    """Of the average over epochs, which are counted from 1."""

    average_mean: float = Field(
        30.0, ge=-LARGEST, le=LARGEST, description="epoch that counts most in the average"
    )
    average_std: float = Field(
        30.0, gt=0, le=LARGEST, description="spread of that average, in epochs"
    )


def teacher(step: Step) -> Tensor:
    """(C, D), normalised: the frozen class features' mean over templates.

    Those of the settings, else 60 of CLIP's. As in the published code, features are not normalised
    before they are averaged.
    """
    return F.normalize(step.frozen_text(*(step.settings.templates or _templates())).mean(0), dim=-1)


def _templates() -> list[str]:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES[:_TEMPLATES]]


def near_text(step: Step) -> Tensor:
    """Mean absolute difference between class features and the frozen model's in many templates."""
    return F.l1_loss(step.text_features, teacher(step))


def near_image(step: Step) -> Tensor:
    """Mean absolute difference between image features and the frozen model's."""
    return F.l1_loss(step.image_features, step.frozen_image())


def near_logits(step: Step) -> Tensor:
    """Divergence KL(frozen || prompted), averaged over images and classes as in the published code.

    (In the paper it is summed over classes.)
    """
    frozen = step.logits_of(step.frozen_image(), teacher(step))
    said, wanted = step.logits.log_softmax(-1), frozen.log_softmax(-1)
    return F.kl_div(said, wanted, log_target=True, reduction="sum") / said.numel()


NEAR_FROZEN = tuple(
    LossTerm(term.__name__, term.__name__, term, NearFrozenSettings)
    for term in (near_text, near_image, near_logits)
)


class GaussianAverage(Finish):
    """Weighted mean of the learned tensors over epochs e = 1 .. E, by a normal density at e.

    The weights are divided by their sum. The first epoch, whose learning rate is tiny, counts too.
    """

    Settings = AverageSettings

    def __init__(self, settings: HasSettings, epochs: int) -> None:
        super().__init__(settings, epochs)
        own: AverageSettings = settings.of(AverageSettings)
        away = (torch.arange(1, epochs + 1).double() - own.average_mean) / own.average_std
        self.weights = (-away.square() / 2).softmax(0).tolist()
        self.sums: Tensors = {}

    def after_epoch(self, epoch: int, tensors: Mapping[str, Tensor]) -> None:
        """Add this epoch's."""
        for name, tensor in tensors.items():
            share = self.weights[epoch] * tensor.detach().cpu()
            self.sums[name] = self.sums[name] + share if name in self.sums else share

    def end(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """The average."""
        return self.sums

    def state(self) -> Tensors:
        """The sum so far."""
        return dict(self.sums)

    def load_state(self, state: Tensors) -> None:
        """Go on from a sum."""
        self.sums = dict(state)
