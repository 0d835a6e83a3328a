"""One model against another on the same prompts: win, tie and loss with bootstrap intervals.

Pure functions. The bootstrap is paired: it draws whole prompts, with both models' answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from wrpo_ray.stages.evaluate.statistics import Estimate

ROUNDS, FITS, SEED = 1000, 100, 42
"""Bootstrap draws for shares, and for the regression, which takes milliseconds a draw."""
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Comparison:
    """The result of comparing two models' answers to one prompt."""

    share: float | None
    """The first model's share of the win: 1 a win, 0 a loss, 0.5 a tie; the mean of several games.
    None where the judge failed."""
    lengths: tuple[int, int]
    """The lengths of both answers, in characters or tokens."""


@dataclass(frozen=True)
class Pairwise:
    """Shares from 0 to 1 of the judged prompts, with 95 % intervals."""

    win: Estimate
    tie: Estimate
    loss: Estimate
    win_rate: Estimate
    """The mean share; a tie is half a win."""
    length_controlled: Estimate
    """The predicted win rate for answers of equal length. It is the win rate itself where all
    lengths are equal or all prompts are ties, and NaN where all lengths differ by the same amount,
    which leaves nothing to control for."""
    failed: int
    """Prompts without a verdict."""


def share_of_games(first: float | None, second: float | None) -> float | None:
    """Return the first model's share over two games with the answers' positions swapped.

    Contradicting verdicts make a tie; None, a failed verdict, in either game gives None.
    """
    return None if first is None or second is None else (first + second) / 2


def share_of_rewards(first: float, second: float, margin: float = 0.0) -> float:
    """Return the first model's share by rewards; a difference up to the margin is a tie."""
    return 0.5 if abs(first - second) <= margin else float(first > second)


def pairwise(comparisons: Sequence[Comparison]) -> Pairwise:
    """Return win, tie and loss rates of the first model, and its length-controlled win rate.

    The length-controlled rate is the prediction of a logistic regression on the difference of
    lengths, where that is 0 (the approach of AlpacaEval 2, arXiv 2404.04475).

    Args:
        comparisons: one for each prompt.

    Example:
        >>> games = [Comparison(1.0, (10, 12)), Comparison(0.5, (9, 9)), Comparison(None, (5, 5))]
        >>> result = pairwise(games)
        >>> result.win_rate.mean, result.tie.mean, result.failed
        (0.75, 0.5, 1)
    """
    judged = [(c.share, c.lengths) for c in comparisons if c.share is not None]
    shares = np.array([share for share, _ in judged])
    # As in AlpacaEval: tanh limits the influence of a few very long answers.
    lengths = np.array([a - b for _, (a, b) in judged], float)
    spread = lengths.std() if len(judged) else 0.0
    length = np.tanh(lengths / spread) if spread else None
    rng = np.random.default_rng(SEED)
    n = len(judged)
    counts = rng.multinomial(n, np.full(n, 1 / n), ROUNDS) if n else np.zeros((0, 0))

    def share(values: np.ndarray) -> Estimate:
        return _estimate(values.mean() if n else math.nan, counts @ values / max(n, 1), n)

    if not lengths.any() or (shares == 0.5).all():
        controlled = share(shares)  # nothing to control: equal lengths, or only ties
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
    """Return a message if the figure is below the floor or unknown (NaN), otherwise None."""
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
    """Return the share that a logistic regression predicts for a length difference of 0.

    Prompts occur `counts` times. Only the slope is regularized, which keeps it finite where length
    alone separates wins from losses.
    """
    fitted = LogisticRegression(C=1.0).fit(
        np.tile(length, 2)[:, None],
        np.repeat([1, 0], len(shares)),
        sample_weight=np.concatenate([counts * shares, counts * (1 - shares)]),
    )
    return 1 / (1 + math.exp(-fitted.intercept_[0]))
