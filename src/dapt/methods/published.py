"""Settings that methods were published with, and those for data of one's own (published.yaml)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dapt.safe.files import read_yaml

_FILE = read_yaml(Path(__file__).with_suffix(".yaml"), "published settings")
OWN_DATA: dict[str, Any] = _FILE["own data"]
# dataset -> learning rate, beta_visual, beta_text of DAPT.
PUBLISHED = {dataset: tuple(values) for dataset, values in _FILE["dapt"].items()}


def usual_settings(dataset: str, shots: int) -> dict[str, Any]:
    """Learning rate, loss weights and epochs of DAPT's protocol, or those for own data.

    Epochs are 50, 100 or 200 by shots, and always 50 on ImageNet. They are every method's, unless
    its row has others.
    """
    values = dict(OWN_DATA)
    if dataset in PUBLISHED:
        values = dict(zip(("lr", "beta_visual", "beta_text"), PUBLISHED[dataset], strict=True))
    few = shots <= 1 or dataset.startswith("imagenet")
    return {**values, "epochs": 50 if few else 100 if shots <= 4 else 200}
