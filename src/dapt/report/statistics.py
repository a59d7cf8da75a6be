"""Numbers by seed: means with their uncertainty, and differences of what belongs together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

CONFIDENCE = 0.95


class Sample(NamedTuple):
    """One number, and the runs it came from."""

    value: float
    runs: tuple[int, ...]


Samples = dict[int, Sample]  # by seed


class Estimate(NamedTuple):
    """A mean and half the width of its interval, which one value alone does not have."""

    mean: float
    half: float | None
    count: int


def estimate(values: Sequence[float], factor: float = 1.0) -> Estimate:
    """Mean of ``values`` with Student's t interval, n - 1 degrees of freedom, times a factor."""
    count, mean = len(values), factor * float(np.mean(values))
    if count < 2:
        return Estimate(mean, None, count)
    spread = float(np.std(values, ddof=1)) / count**0.5
    half = float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread
    return Estimate(mean, factor * half, count)


def values_of(samples: Samples) -> list[float]:
    """Their values."""
    return [sample.value for sample in samples.values()]


def runs_of(samples: Iterable[Sample]) -> tuple[int, ...]:
    """Runs that any of the samples came from."""
    return tuple(sorted({n for sample in samples for n in sample.runs}))


def mean(samples: Sequence[Sample]) -> Sample:
    """Their mean."""
    return Sample(sum(s.value for s in samples) / len(samples), runs_of(samples))


def mean_by_seed(parts: Sequence[Samples]) -> Samples:
    """Mean by seed, for the seeds that all parts have."""
    seeds = sorted(set.intersection(*map(set, parts))) if parts else ()
    return {seed: mean([part[seed] for part in parts]) for seed in seeds}


def minus(ours: Samples, theirs: Samples) -> Samples:
    """Differences of what has the same seed."""
    pairs = {seed: (own, theirs[seed]) for seed, own in ours.items() if seed in theirs}
    return {seed: Sample(a.value - b.value, runs_of((a, b))) for seed, (a, b) in pairs.items()}
