"""One model against another on the same prompts: win, tie and loss with bootstrap intervals.

Pure functions. The intervals are paired: whole prompts are drawn, with both models' answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from wrpo_ray.stages.evaluate.statistics import Estimate

ROUNDS, FITS, SEED = 1000, 100, 42
"""Draws for shares, and the fewer for the regression, each of which takes milliseconds."""
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Comparison:
    """Two models' answers to one prompt."""

    share: float | None
    """1 the first model wins, 0 the second, 0.5 a tie; anything between is a mean of several
    games. None where the judge failed."""
    lengths: tuple[int, int]
    """Of both answers, in characters or tokens."""


@dataclass(frozen=True)
class Pairwise:
    """Shares in 0..1 with 95 % intervals, all over the prompts that were judged."""

    win: Estimate
    tie: Estimate
    loss: Estimate
    win_rate: Estimate
    """The mean share: a tie is half a win."""
    length_controlled: Estimate
    """The win rate, were both answers of the same length, as it is where they are, or where all are
    ties; NaN where all differ by the same length, so that nothing can be controlled."""
    failed: int


def share_of_games(first: float | None, second: float | None) -> float | None:
    """The share of two games with the answers' positions swapped, both as the first model's share.

    A judge that contradicts itself calls a tie; one that fails in either game fails.
    """
    return None if first is None or second is None else (first + second) / 2


def share_of_rewards(first: float, second: float, margin: float = 0.0) -> float:
    """The share by rewards; a difference up to the margin is a tie."""
    return 0.5 if abs(first - second) <= margin else float(first > second)


def pairwise(comparisons: Sequence[Comparison]) -> Pairwise:
    """The figures of the first model against the second."""
    judged = [(c.share, c.lengths) for c in comparisons if c.share is not None]
    shares = np.array([share for share, _ in judged])
    # As in AlpacaEval: tanh keeps a few very long answers from deciding the fit.
    lengths = np.array([a - b for _, (a, b) in judged], float)
    spread = lengths.std() if len(judged) else 0.0
    length = np.tanh(lengths / spread) if spread else None
    rng = np.random.default_rng(SEED)
    n = len(judged)
    counts = rng.multinomial(n, np.full(n, 1 / n), ROUNDS) if n else np.zeros((0, 0))

    def share(values: np.ndarray) -> Estimate:
        return _estimate(values.mean() if n else math.nan, counts @ values / max(n, 1), n)

    if not lengths.any() or (shares == 0.5).all():
        controlled = share(shares)  # no length to take out, or nothing that it could have won
    elif length is None:
        controlled = Estimate(math.nan, math.nan, math.nan, n)
    else:
        at_equal = [_at_equal_length(shares, length, drawn) for drawn in counts[:FITS]]
        mean = _at_equal_length(shares, length, np.ones(n))
        controlled = _estimate(mean, np.array(at_equal), n)
    return Pairwise(
        win=share(shares > 0.5),
        tie=share(shares == 0.5),
        loss=share(shares < 0.5),
        win_rate=share(shares),
        length_controlled=controlled,
        failed=len(comparisons) - n,
    )


def shortfall(name: str, figure: Estimate, floor: float) -> str | None:
    """What a regression gate says of a figure below its floor, or of one that is not known."""
    if figure.mean >= floor:
        return None
    if math.isnan(figure.mean):
        return f"{name} is not known, as none of its prompts was judged, and has to be {floor:g}"
    return (
        f"{name} is {figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}] on {figure.n} prompts, "
        f"below {floor:g}"
    )


def _estimate(mean: float, drawn: np.ndarray, n: int) -> Estimate:
    low, high = np.percentile(drawn, INTERVAL) if len(drawn) else (math.nan, math.nan)
    return Estimate(float(mean), float(low), float(high), n)


def _at_equal_length(shares: np.ndarray, length: np.ndarray, counts: np.ndarray) -> float:
    """The share that a logistic regression on the length difference gives where that is 0.

    Prompts occur `counts` times. Only the slope is regularized, which keeps it finite where length
    tells wins from losses.
    """
    fitted = LogisticRegression(C=1.0).fit(
        np.tile(length, 2)[:, None],
        np.repeat([1, 0], len(shares)),
        sample_weight=np.concatenate([counts * shares, counts * (1 - shares)]),
    )
    return 1 / (1 + math.exp(-fitted.intercept_[0]))
