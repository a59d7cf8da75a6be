"""Distribution-aware prompt tuning for vision-language models."""

import warnings
from typing import Any

__version__ = "0.1.0"
__all__ = ["PromptClassifier", "__version__"]


def __getattr__(name: str) -> Any:
    """`PromptClassifier`, imported when asked for: it brings torch along."""
    if name == "PromptClassifier":
        with warnings.catch_warnings():
            # Of tqdm, which other libraries import, in a notebook without widgets.
            warnings.filterwarnings("ignore", "IProgress not found")
            from dapt.estimator import PromptClassifier

        return PromptClassifier
    raise AttributeError(f"module 'dapt' has no attribute '{name}'")
