"""What a report asks of a method's row in the table; one that the table lacks has answers too."""

from __future__ import annotations

from typing import Any

from dapt.methods import METHODS
from dapt.settings import Settings

ZERO_SHOT = "zero-shot"

# Colours (light, dark) and marker; "_" is a line, the same for any number of shots.
LOOKS: dict[str, tuple[tuple[str, str], str]] = {
    "zero-shot": (("#6b7281", "#9aa3b0"), "_"),
    "linear-probe": (("#a16208", "#e3b341"), "s"),
    "coop": (("#2563ec", "#6ea8fe"), "^"),
    "vpt": (("#0d9489", "#3cd5c1"), "D"),
    "vlpt": (("#7c3aee", "#b294fb"), "v"),
    "dapt-text": (("#db2778", "#f77fb8"), "P"),
    "dapt-visual": (("#5f930e", "#a5d94b"), "X"),
    "dapt": (("#c2410c", "#fb8b4a"), "o"),
}


def method_title(method: str) -> str:
    """How tables call a method; one that this installation does not know keeps its name."""
    return METHODS[method].title if method in METHODS else method


def learns(method: str) -> bool:
    """Whether gradient descent has something to do."""
    return method not in METHODS or METHODS[method].learns_prompts


def prompts(method: str) -> set[str]:
    """Which of "text" and "visual" a method learns."""
    row = METHODS.get(method)
    return {prompt for prompt in ("text", "visual") if getattr(row, prompt, False)}


def loss_settings(method: str) -> dict[str, str]:
    """The method's loss terms, and the setting that weighs each."""
    return {term: str(weight) for term, weight in METHODS[method].terms.items()}


def loss_title(term: str) -> str:
    """A loss term in words."""
    words = {"inter": "inter-dispersion", "intra": "intra-dispersion"}
    return words.get(term, term.replace("_", "-"))


def idle_settings(method: str) -> set[str]:
    """Settings that cannot change a method's result."""
    if method not in METHODS:
        return set()
    idle = {"beta_visual", "beta_text"} - set(loss_settings(method).values())
    if not learns(method):
        idle |= {"epochs", "lr", "momentum", "weight_decay", "batch_size", "crop_min", "rbf_t"}
    if method == ZERO_SHOT:
        idle |= {"support_set"}
    if "text" not in prompts(method):
        idle |= {"text_vectors", "text_init"}
    if "visual" not in prompts(method):
        idle |= {"visual_vectors", "visual_dropout"}
    return idle


def setting_defaults() -> dict[str, Any]:
    """Every setting's default; None where it depends on the dataset, or there is none."""
    fields = Settings.model_fields.items()
    return {name: None if field.is_required() else field.default for name, field in fields}
