"""KgCoOp (Yao et al., 2023): a context that keeps class features near those of given words.

The published weight of the pull is for a model whose logit scale is 100. The smaller the scale, the
weaker is cross-entropy beside the pull: give a smaller ``kg_weight``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dapt.methods import published
from dapt.methods.contract import LARGEST, LossTerm, PartSettings, Step
from dapt.methods.layouts import Layout, Published

# 100 epochs of large batches (configs/trainers/KgCoOp and scripts of the code).
PUBLISHED = {"text_vectors": 4, "text_init": "a photo of a", "lr": 0.002, "batch_size": 128,
             "epochs": 100}  # fmt: skip
# Of few images of own data, passes and words of the context are everyone's.
FEW = {"text_vectors": None, "text_init": None, "batch_size": None, "epochs": None}
# As the code (trainers/kgcoop.py) saves it, with modules beside the context that it never uses.
LAYOUTS = (
    Layout(
        (Published("ctx", "text_prompt"),), sign="bias_vectors", aside=("bias_vectors", "meta_net.")
    ),
)


def usual(dataset: str, shots: int) -> dict[str, Any]:
    """The published settings, with fewer steps on few images of own data."""
    return published.settings_for(dataset, shots, PUBLISHED, of_few=FEW)


class KgCoOpSettings(PartSettings):
    """Of the pull to the template's class features."""

    kg_weight: float = Field(8.0, ge=0, le=LARGEST, description="pull to the template's features")


def knowledge(step: Step) -> Tensor:
    """Mean over classes of ``1 - cos(w_c, t_c)``; t_c are frozen features in the task's template.

    This is the published code's loss; the paper's mean squared distance is twice as large. (The
    code always starts from "a photo of a"; dapt starts from the given words.)
    """
    template = F.normalize(step.frozen_text()[0], dim=-1)  # (C, D)
    return 1 - (step.text_features * template).sum(-1).mean()


KNOWLEDGE = LossTerm("kg", "kg_weight", knowledge, KgCoOpSettings, search=(1.0, 0.1, 10.0))
