"""Settings that methods were published with, and those for data of one's own."""

from __future__ import annotations

from typing import Any

# Where nothing is published: what did best on the bundled task's validation images (see the
# README's section on settings for the figures).
OWN_DATA = {"lr": 8.0, "beta_visual": 10.0, "beta_text": 0.1, "crop_min": 0.5}

# DAPT's learning rate and loss weights (Cho et al., 2023): dataset -> (lr, beta_visual, beta_text).
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


def usual_settings(dataset: str, shots: int) -> dict[str, Any]:
    """Learning rate, loss weights and epochs of DAPT's protocol, or those for own data.

    Epochs are 50, 100 or 200 by shots, and always 50 on ImageNet. They are every method's, unless
    its row has others.
    """
    values: dict[str, Any] = dict(OWN_DATA)
    if dataset in PUBLISHED:
        lr, beta_visual, beta_text = PUBLISHED[dataset]
        values = {"lr": lr, "beta_visual": beta_visual, "beta_text": beta_text}
    few = shots <= 1 or dataset.startswith("imagenet")
    return {**values, "epochs": 50 if few else 100 if shots <= 4 else 200}
