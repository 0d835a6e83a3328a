"""Histograms that merge exactly: shards are counted in parallel, without a known range.

Bin i of a histogram with exponent k holds the values in [i * 2^k, (i + 1) * 2^k). The exponent is
the smallest at which the values span at most `MOST` bins. A merge joins neighbouring bins only, so
merged histograms equal the histogram of all values.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MOST = 512
"""Maximum bins of a histogram."""
LEAST_EXPONENT = -24
"""Exponent of the finest bins, which are 6e-8 wide."""
SHOWN = 40
"""Maximum bins of a plot."""
TAIL = 0.002
"""Share of values at each end that a plot may move into its outermost bins."""


@dataclass
class Histogram:
    """Counts by bin, with the sum and the range of the values."""

    exponent: int = LEAST_EXPONENT
    counts: Counter[int] = field(default_factory=Counter)
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    @classmethod
    def of(cls, values: np.ndarray) -> Histogram:
        """The histogram of the finite values."""
        values = np.asarray(values, float)
        values = values[np.isfinite(values)]
        if not len(values):
            return cls()
        low, high = float(values.min()), float(values.max())
        exponent = _exponent(low, high)
        bins, counts = np.unique(np.floor(np.ldexp(values, -exponent)), return_counts=True)
        counted = Counter(dict(zip(bins.astype(int).tolist(), counts.tolist(), strict=True)))
        return cls(exponent, counted, float(values.sum()), low, high)

    def __add__(self, other: Histogram) -> Histogram:
        if not self.counts or not other.counts:
            return self if self.counts else other
        low, high = min(self.low, other.low), max(self.high, other.high)
        exponent = _exponent(low, high)
        counts = self.coarser(exponent) + other.coarser(exponent)
        return Histogram(exponent, counts, self.total + other.total, low, high)

    @property
    def n(self) -> int:
        """Number of values."""
        return sum(self.counts.values())

    @property
    def mean(self) -> float:
        """The mean; NaN without values."""
        return self.total / self.n if self.n else math.nan

    def quantile(self, share: float) -> float:
        """The quantile, as the middle of its bin; NaN without values."""
        left = share * self.n
        for index in sorted(self.counts):
            left -= self.counts[index]
            if left <= 0:
                return min(max(math.ldexp(index + 0.5, self.exponent), self.low), self.high)
        return math.nan

    def coarser(self, exponent: int) -> Counter[int]:
        """The counts in wider bins of this exponent."""
        counts: Counter[int] = Counter()
        for index, count in self.counts.items():
            counts[index >> (exponent - self.exponent)] += count
        return counts

    # --- as JSON

    def record(self) -> dict[str, Any]:
        """As JSON."""
        ends = [self.low, self.high] if self.counts else None
        counts = [list(pair) for pair in sorted(self.counts.items())]
        return {"exponent": self.exponent, "counts": counts, "total": self.total, "ends": ends}

    @classmethod
    def read(cls, record: dict[str, Any]) -> Histogram:
        """From its record."""
        ends = record["ends"] or (math.inf, -math.inf)
        return cls(record["exponent"], Counter(dict(record["counts"])), record["total"], *ends)


def shown(
    histograms: list[Histogram], least: int = LEAST_EXPONENT
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Common edges (E,) of about `SHOWN` bins, and the counts (E - 1,) of each histogram.

    With `least` 0 no bin is narrower than 1, for whole numbers. The outermost bins hold outliers.
    """
    found = [h for h in histograms if h.counts]
    if not found:
        return np.zeros(0), []
    low, high = _middle(found)
    exponent = max(least, _exponent(low, high, SHOWN), *(h.exponent for h in found))
    first, last = (math.floor(math.ldexp(end, -exponent)) for end in (low, high))
    edges = np.ldexp(np.arange(first, last + 2, dtype=float), exponent)
    counted = []
    for histogram in histograms:
        counts = np.zeros(last + 1 - first, int)
        for index, count in histogram.coarser(exponent).items() if histogram.counts else ():
            counts[min(max(index, first), last) - first] += count
        counted.append(counts)
    return edges, counted


def _middle(histograms: list[Histogram]) -> tuple[float, float]:
    """The range without a share of `TAIL` at each end, if it is much narrower than the whole."""
    low, high = min(h.low for h in histograms), max(h.high for h in histograms)
    inner = min(h.quantile(TAIL) for h in histograms), max(h.quantile(1 - TAIL) for h in histograms)
    return inner if high - low > 1.6 * (inner[1] - inner[0]) > 0 else (low, high)


def _exponent(low: float, high: float, most: int = MOST) -> int:
    """The smallest exponent at which `low` to `high` span at most `most` bins."""
    exponent = LEAST_EXPONENT
    if high > low:
        exponent = max(exponent, math.frexp((high - low) / most)[1] - 1)
    exponent = max(exponent, math.frexp(max(abs(low), abs(high)))[1] - 52)
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= most:
        exponent += 1
    return exponent
