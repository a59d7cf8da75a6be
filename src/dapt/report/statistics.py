"""Numbers by seed: means with their uncertainty, and differences of what belongs together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
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


class Sample(NamedTuple):
    """One number, and the runs it came from."""

    value: float
    runs: tuple[int, ...]


class Samples(dict[int, Sample]):
    """Samples by seed."""

    @property
    def runs(self) -> tuple[int, ...]:
        """Those that any of them came from."""
        return runs_of(self.values())

    def estimate(self, factor: float = 1.0) -> Estimate:
        """Their mean with its interval, times a factor."""
        return estimate([sample.value for sample in self.values()], factor)

    def __sub__(self, other: Samples) -> Samples:
        """Differences of what has the same seed."""
        pairs = [(seed, own, other[seed]) for seed, own in self.items() if seed in other]
        return Samples({seed: Sample(a.value - b.value, runs_of((a, b))) for seed, a, b in pairs})


def runs_of(parts: Iterable[Any]) -> tuple[int, ...]:
    """Runs that any of the parts came from: samples by seed or alone, or cells of a table."""
    return tuple(sorted({n for part in parts for n in part.runs}))


def mean(samples: Sequence[Sample]) -> Sample:
    """Their mean."""
    return Sample(sum(s.value for s in samples) / len(samples), runs_of(samples))


def mean_by_seed(parts: Sequence[Samples]) -> Samples:
    """Mean by seed, for the seeds that all parts have."""
    seeds = sorted(set.intersection(*map(set, parts))) if parts else ()
    return Samples({seed: mean([part[seed] for part in parts]) for seed in seeds})
