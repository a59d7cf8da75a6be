"""Settings that methods were published with, and those for data of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dapt.safe.files import read_yaml

# Where nothing is published: what did best on the bundled task's validation images (see the
# README's section on settings for the figures).
OWN_DATA = {"lr": 8.0, "beta_visual": 10.0, "beta_text": 0.1, "crop_min": 0.5}

# dataset -> learning rate, beta_visual, beta_text.
PUBLISHED: dict[str, tuple[float, ...]] = {
    dataset: tuple(values)
    for dataset, values in read_yaml(Path(__file__).with_suffix(".yaml"), "settings").items()
}


def usual_settings(dataset: str, shots: int) -> dict[str, Any]:
    """Learning rate, loss weights and epochs of DAPT's protocol, or those for own data.

    Epochs are 50, 100 or 200 by shots, and always 50 on ImageNet. They are every method's, unless
    its row has others.
    """
    values: dict[str, Any] = dict(OWN_DATA)
    if dataset in PUBLISHED:
        values = dict(zip(("lr", "beta_visual", "beta_text"), PUBLISHED[dataset], strict=True))
    few = shots <= 1 or dataset.startswith("imagenet")
    return {**values, "epochs": 50 if few else 100 if shots <= 4 else 200}


def ivlp_settings(dataset: str, shots: int) -> dict[str, Any]:
    """Two vectors in every layer, 5 epochs of batches of 4 (configs/trainers/IVLP of the code)."""
    return {
        "text_vectors": 2, "visual_vectors": 2, "text_init": "a photo of a",
        "lr": 0.0035, "batch_size": 4, "epochs": 5,
    }  # fmt: skip
