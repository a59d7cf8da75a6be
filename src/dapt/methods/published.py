"""Settings that methods were published with, and those for data of one's own (published.yaml)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dapt.safe.files import read_yaml

_FILE = read_yaml(Path(__file__).with_suffix(".yaml"), "published settings")
OWN_DATA: dict[str, Any] = _FILE["own data"]
FEW: dict[int, dict[str, Any]] = _FILE["few images"]  # up to so many images a class
# dataset -> learning rate, beta_visual, beta_text of DAPT.
PUBLISHED = {dataset: tuple(values) for dataset, values in _FILE["dapt"].items()}


def usual_settings(dataset: str, shots: int, template: str) -> dict[str, Any]:
    """Learning rate, loss weights and epochs of DAPT's protocol, or those for own data.

    Epochs are 50, 100 or 200 by shots, and always 50 on ImageNet; own data has others where images
    are few, and there the text prompt starts as the template's words before the class name. They
    are every method's, unless its row has others.
    """
    few = shots <= 1 or dataset.startswith("imagenet")
    epochs = {"epochs": 50 if few else 100 if shots <= 4 else 200}
    if dataset in PUBLISHED:
        values = zip(("lr", "beta_visual", "beta_text"), PUBLISHED[dataset], strict=True)
        return dict(values) | epochs
    own = next((row | _start(template) for most, row in FEW.items() if shots <= most), {})
    return OWN_DATA | epochs | own


def few(dataset: str, shots: int) -> bool:
    """Whether images are own data, and few."""
    return dataset not in PUBLISHED and shots <= max(FEW)


def settings_for(
    dataset: str,
    shots: int,
    published: dict[str, Any],
    own: dict[str, Any] | None = None,
    of_few: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A method's settings: as published on benchmarks, with changes on own data and on few images.

    Published steps, rates and scales are for benchmarks and large backbones; the changes are what
    did best on validation images of the bundled task, at no more passes over the images than
    DAPT's. A change to None leaves a setting to what is everyone's (`usual_settings`).
    """
    if dataset in PUBLISHED:
        return published
    changed = published | (own or {}) | ((of_few or {}) if few(dataset, shots) else {})
    return {name: value for name, value in changed.items() if value is not None}


def _start(template: str) -> dict[str, Any]:
    """A text prompt of the words before the class name; nothing where there are none."""
    words = template.partition("{}")[0].strip()
    return {"text_init": words, "text_vectors": len(words.split())} if words else {}
