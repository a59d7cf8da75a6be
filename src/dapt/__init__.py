"""Distribution-aware prompt tuning for vision-language models."""

__version__ = "0.1.0"
