"""What checks share: backbones and classifiers, the same on every device."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dapt.clip.backbone import Backbone
from dapt.clip.sources import load_backbone
from dapt.engine.classifier import Classifier, new_classifier, tuning_head
from dapt.engine.step import Tuner
from dapt.methods import get_method
from dapt.settings import Settings, make_settings

NAMES = ["cat", "sea lion", "hot air balloon", "a very long name of a rare flower", "dog"]
TEMPLATE = "a photo of a {}."


@lru_cache(maxsize=16)
def backbone(name: str, pretrained: str | None, device: str, precision: str = "fp32") -> Backbone:
    """One in memory for all checks that ask for it."""
    return load_backbone(name, pretrained, device=device, precision=precision)


def settings_of(method: str, **more: Any) -> Settings:
    """Of the bundled task; those of ``more`` that the method has not are left out."""
    wanted = {n: v for n, v in more.items() if n in Settings.model_fields}
    wanted |= {n: v for n, v in more.items() if n in get_method(method).settings}
    return make_settings({"dataset": "bundled", "method": method, **wanted})


def new_tuner(own: Backbone, method: str) -> Tuner:
    """Of a method's first values, which the seed alone decides."""
    settings, row = settings_of(method), get_method(method)
    classifier = new_classifier(own, NAMES, TEMPLATE, row, settings)
    classifier.head = tuning_head(own, settings)
    draw = torch.Generator().manual_seed(0)
    prototypes = torch.randn(len(NAMES), own.image_dimension, generator=draw)
    prototypes = classifier.as_own(torch.nn.functional.normalize(prototypes, dim=-1))
    for part in classifier.parts:
        part.begin(prototypes)  # type: ignore[operator]
    return Tuner(classifier, settings, prototypes)


def plain_classifier(own: Backbone) -> Classifier:
    """Zero-shot."""
    return Classifier(own, NAMES, template=TEMPLATE)


def apart(found: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """How far two tensors are from each other, as a share of the length of what is expected."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    if not bool(found.isfinite().all()):
        return float("inf")
    return float((found - expected).norm() / max(float(expected.norm()), least, 1e-30))


def furthest(found: Iterable[float]) -> float:
    """The largest, also of none."""
    return max(found, default=0.0)
