"""What a report asks of a method's row in the table; one that the table lacks has answers too."""

from __future__ import annotations

from typing import Any

from dapt.methods import METHODS, ZERO_SHOT
from dapt.settings import all_fields
from dapt.settings import idle_settings as idle

# Colours (light, dark) and marker; "_" is a line, the same for any number of shots.
LOOKS = {name: (row.colour, row.marker) for name, row in METHODS.items() if row.colour}


def method_title(method: str) -> str:
    """How tables call a method; one that this installation does not know keeps its name."""
    return METHODS[method].title if method in METHODS else method


def learns(method: str) -> bool:
    """Whether gradient descent has something to do."""
    return method not in METHODS or METHODS[method].learns


def prompts(method: str) -> set[str]:
    """In which of the "text" and "visual" towers a method learns."""
    towers = {"text": "text", "visual": "image"}
    return {
        p for p, tower in towers.items() if method in METHODS and METHODS[method].changes(tower)
    }


def loss_settings(method: str) -> dict[str, str]:
    """The method's loss terms, and the setting that weighs each."""
    return {term.name: term.weight for term in METHODS[method].losses}


def loss_title(term: str) -> str:
    """A loss term in words."""
    words = {"inter": "inter-dispersion", "intra": "intra-dispersion"}
    return words.get(term, term.replace("_", "-"))


def idle_settings(method: str) -> frozenset[str]:
    """Settings that cannot change a method's result."""
    return idle(method) | ({"support_set"} if method == ZERO_SHOT else frozenset())


def setting_defaults() -> dict[str, Any]:
    """Every setting's default; None where it depends on the dataset, or there is none."""
    fields = all_fields().items()
    return {name: None if field.is_required() else field.default for name, field in fields}
