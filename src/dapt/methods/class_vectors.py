"""A learned vector for each class, in place of the text tower of a backbone that has none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dapt.methods.contract import HasSettings, TowerPart

if TYPE_CHECKING:  # it brings open_clip along, which the table of methods should not
    from dapt.clip.backbone import Backbone


# Of the vectors that are learned. Steps are as large as prompts need, and turn longer ones less.
LENGTH = 30.0


class ClassVectors(TowerPart):
    """``t_c = v_c / |v_c|``: class features that start at the support images' means.

    The engine puts it beside what a row tunes in the image tower.
    """

    towers = frozenset({"text"})

    def __init__(self, classes: int, dimension: int) -> None:
        super().__init__()
        # No zeros, of which no gradient is told; `begin` has others.
        self.class_vectors = nn.Parameter(torch.ones(classes, dimension))

    @classmethod
    def create_for(cls, backbone: Backbone, settings: HasSettings, classes: int) -> ClassVectors:
        """All the same until tuning begins."""
        return cls(classes, backbone.image_dimension)

    @classmethod
    def closed(cls, settings: HasSettings) -> str:
        """Always."""
        return "learned class vectors, which are of the classes they were tuned on"

    @staticmethod
    def first(prototypes: Tensor) -> Tensor:
        """Prototypes (C, D) at length one, those of classes without images at the others' mean."""
        found = F.normalize(prototypes, dim=-1)
        there = found.any(-1)
        found[~there] = F.normalize(found[there].mean(0), dim=-1)
        return found

    def begin(self, prototypes: Tensor) -> None:
        """Start there."""
        self.class_vectors.data.copy_(LENGTH * self.first(prototypes))

    def features(self, tower: str, x: Tensor, tokens: Tensor | None) -> Tensor:
        """(C, D), of length one, whatever stood there."""
        return F.normalize(self.class_vectors, dim=-1)
