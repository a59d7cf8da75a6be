"""Means with their uncertainty, and differences of what belongs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its interval, which one value alone does not have."""

    mean: float
    half: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of ``values`` with Student's t interval, n - 1 degrees of freedom."""
    count = len(values)
    mean = float(np.mean(values))
    if count < 2:
        return Estimate(mean, None, count)
    spread = float(np.std(values, ddof=1)) / count**0.5
    return Estimate(mean, float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread, count)


def harmonic_mean(a: float, b: float) -> float:
    """Of two shares; zero where either is."""
    return 2 * a * b / (a + b) if a + b else 0.0
