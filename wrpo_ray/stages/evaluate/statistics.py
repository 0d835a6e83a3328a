"""Means with 95 % intervals, from sums that can be added over buckets; pure functions.

Letters in shape comments: S seeds, P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

Z95 = 1.959963984540054
"""The normal distribution's 97.5 % point."""


@dataclass(frozen=True)
class Sums:
    """Count, sum and sum of squares of one number for each prompt. `+` joins disjoint prompts."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.n + other.n, self.total + other.total, self.squares + other.squares)

    @staticmethod
    def of(values: list[float]) -> Sums:
        """Sum up the values, one for each prompt."""
        return Sums(len(values), math.fsum(values), math.fsum(v * v for v in values))

    @property
    def mean(self) -> float:
        """The mean; NaN without values."""
        return self.total / self.n if self.n else math.nan


@dataclass(frozen=True)
class Estimate:
    """A mean, its 95 % interval from `low` to `high`, and the number of prompts `n`."""

    mean: float
    low: float
    high: float
    n: int


def plain(estimate: Estimate) -> dict[str, float | None]:
    """Return {mean, low, high, n} for JSON, with None for NaN (too few prompts)."""
    return {n: None if math.isnan(v) else v for n, v in asdict(estimate).items()}


def wilson_interval(sums: Sums) -> Estimate:
    """Return Wilson's score interval of a proportion, such as an accuracy (Wilson 1927).

    The values are 0 or 1. With several samples a prompt, pass the mean of each prompt: it counts
    as one trial, which makes the interval wider than necessary, never narrower.

    Example:
        >>> estimate = wilson_interval(Sums.of([1, 1, 1, 0]))
        >>> estimate.mean, round(estimate.low, 2), round(estimate.high, 2), estimate.n
        (0.75, 0.3, 0.95, 4)
    """
    n, p = sums.n, sums.mean
    if not n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    scale = 1 + Z95**2 / n
    centre = (p + Z95**2 / (2 * n)) / scale
    half = Z95 / scale * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n)


def normal_interval(sums: Sums) -> Estimate:
    """Return the normal interval of a mean, mean ± 1.96 standard errors of the sample.

    NaN bounds below two values.

    Example:
        >>> estimate = normal_interval(Sums.of([1.0, 2.0, 3.0]))
        >>> estimate.mean, round(estimate.low, 2), round(estimate.high, 2)
        (2.0, 0.87, 3.13)
    """
    n, mean = sums.n, sums.mean
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n)
    variance = max(0.0, (sums.squares - n * mean * mean) / (n - 1))
    half = Z95 * math.sqrt(variance / n)
    return Estimate(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Crossed:
    """Sums of one number for each of S seeds and P prompts. `+` joins disjoint prompts."""

    prompts: int
    by_seed: tuple[float, ...]
    """The sum over the prompts, for each seed, (S,)."""
    prompt_squares: float
    """The sum over prompts of the squared sum over seeds."""
    squares: float
    """The sum of all squares."""

    def __add__(self, other: Crossed) -> Crossed:
        return Crossed(
            self.prompts + other.prompts,
            tuple(a + b for a, b in zip(self.by_seed, other.by_seed, strict=True)),
            self.prompt_squares + other.prompt_squares,
            self.squares + other.squares,
        )

    @staticmethod
    def of(values: np.ndarray) -> Crossed:
        """Sum up the values (S, P)."""
        return Crossed(
            values.shape[1],
            tuple(values.sum(1).tolist()),
            float(np.square(values.sum(0)).sum()),
            float(np.square(values).sum()),
        )

    @property
    def seed_means(self) -> list[float]:
        """The mean of each seed, (S,); NaN without prompts."""
        return [total / self.prompts if self.prompts else math.nan for total in self.by_seed]


def crossed_interval(sums: Crossed) -> Estimate:
    """Return the interval of a mean over seeds and prompts, both random samples of larger sets.

    All seeds answer the same prompts, so the S P values are not independent. In the model value =
    mean + seed + prompt + rest, the variance of the mean is var_seed/S + var_prompt/P +
    var_rest/SP. It is estimated by mean squares (two-way analysis of variance, random effects; a
    negative component counts as 0), with Satterthwaite's degrees of freedom (1946). With a single
    seed the interval covers the prompts only.

    Example:
        >>> estimate = crossed_interval(Crossed.of(np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])))
        >>> estimate.mean, estimate.n, estimate.low < 2.5 < estimate.high
        (2.5, 3, True)
    """
    from scipy.stats import t

    s, p = len(sums.by_seed), sums.prompts
    if not s or p < 2:
        mean = sums.seed_means[0] if s and p else math.nan
        return Estimate(mean, math.nan, math.nan, p)
    n, total = s * p, math.fsum(sums.by_seed)
    mean = total / n
    of_seeds = max(0.0, math.fsum(x * x for x in sums.by_seed) / p - n * mean**2)
    of_prompts = max(0.0, sums.prompt_squares / s - n * mean**2)
    of_rest = max(0.0, sums.squares - n * mean**2 - of_seeds - of_prompts)
    if s == 1:
        parts = [(of_prompts / (p - 1), p - 1)]
    else:
        rest = of_rest / ((s - 1) * (p - 1))
        parts = _positive(of_seeds / (s - 1), s - 1, of_prompts / (p - 1), p - 1, rest)
    variance = math.fsum(square for square, _ in parts)
    if variance <= 0:
        return Estimate(mean, mean, mean, p)
    freedom = variance**2 / math.fsum(square**2 / df for square, df in parts)
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance / n)
    return Estimate(mean, mean - half, mean + half, p)


def _positive(
    seeds: float, seeds_df: int, prompts: float, prompts_df: int, rest: float
) -> list[tuple[float, int]]:
    """(mean square, degrees of freedom) of the components; their sum is S P var(mean)."""
    rest_df = seeds_df * prompts_df
    if seeds > rest and prompts > rest:
        return [(seeds, seeds_df), (prompts, prompts_df), (-rest, rest_df)]
    if seeds > rest:
        return [(seeds, seeds_df)]
    return [(prompts, prompts_df)] if prompts > rest else [(rest, rest_df)]


def crossed_of(seeds: Sequence[dict[str, float]]) -> Crossed:
    """Sum up {prompt: number} of each seed, over the prompts that all seeds have."""
    shared = sorted(set.intersection(*(set(values) for values in seeds)))
    return Crossed.of(np.array([[values[key] for key in shared] for values in seeds], float))
