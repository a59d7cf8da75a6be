"""Distribution-aware prompt tuning for vision-language models."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["PromptClassifier", "__version__"]


def __getattr__(name: str) -> Any:
    """`PromptClassifier`, imported when asked for: it brings torch along."""
    if name == "PromptClassifier":
        from dapt.estimator import PromptClassifier

        return PromptClassifier
    raise AttributeError(f"module 'dapt' has no attribute '{name}'")
