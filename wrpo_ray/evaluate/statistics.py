"""Means with 95 % intervals, from sums that add up over buckets; pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z95 = 1.959963984540054
"""The normal distribution's 97.5 % point."""


@dataclass(frozen=True)
class Sums:
    """Count, sum and sum of squares of one number a prompt; two of them add."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.n + other.n, self.total + other.total, self.squares + other.squares)

    @staticmethod
    def of(values: list[float]) -> Sums:
        """The sums of some values."""
        return Sums(len(values), math.fsum(values), math.fsum(v * v for v in values))

    @property
    def mean(self) -> float:
        """The mean; NaN of nothing."""
        return self.total / self.n if self.n else math.nan


@dataclass(frozen=True)
class Estimate:
    """A mean, its 95 % interval, and the number of prompts."""

    mean: float
    low: float
    high: float
    n: int


def wilson(sums: Sums) -> Estimate:
    """Wilson's score interval of a share of 0s and 1s (Wilson 1927).

    With several samples a prompt the mean of each prompt counts as one trial, which makes the
    interval wider than it need be, never narrower.
    """
    n, p = sums.n, sums.mean
    if not n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    scale = 1 + Z95**2 / n
    centre = (p + Z95**2 / (2 * n)) / scale
    half = Z95 / scale * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n)


def normal(sums: Sums) -> Estimate:
    """The normal interval of a mean, from the sample's standard error."""
    n, mean = sums.n, sums.mean
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n)
    variance = max(0.0, (sums.squares - n * mean * mean) / (n - 1))
    half = Z95 * math.sqrt(variance / n)
    return Estimate(mean, mean - half, mean + half, n)
