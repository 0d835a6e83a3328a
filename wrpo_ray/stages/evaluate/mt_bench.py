"""MT-Bench: a judge's ratings of two turns, and their means (arXiv 2306.05685); pure functions.

They follow the official code (FastChat, single answer grading) and give the same figures.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

RATING = re.compile(r"\[\[(\d+(?:\.\d*)?)\]\]")
BACKUP = re.compile(r"\[(\d+(?:\.\d*)?)\]")
OTHER = re.compile(r"\[\[[^\[\]\d]*\d[^\[\]]*\]\]")
"""Double brackets that hold a digit and other characters."""
BEST = 10.0


@dataclass(frozen=True)
class Rating:
    """The judge's rating of one turn of one question."""

    question: int
    turn: int
    """1 or 2."""
    category: str
    score: float | None
    """0 to 10; None or -1 without a rating."""


@dataclass(frozen=True)
class Mean:
    """A mean rating (NaN without ratings), with the numbers of judged and failed turns."""

    mean: float
    judged: int
    failed: int


@dataclass(frozen=True)
class MTBench:
    """Mean ratings from 0 to 10. `overall` is the mean of all ratings."""

    overall: Mean
    turns: dict[int, Mean]
    categories: dict[str, Mean]


def parse_rating(judgment: str) -> float | None:
    """Return the first `[[n]]` of a judgment, else the first `[n]`, else None.

    As in the official code, but for two cases that are not ratings: a number above 10 (`[2024]` is
    a year), and a `[n]` beside a rating of another form (`[[4/5]], as [1] says`).
    """
    found = RATING.search(judgment)
    if not found and not OTHER.search(judgment):
        found = BACKUP.search(judgment)
    rating = float(found[1]) if found else math.inf
    return rating if rating <= BEST else None


def mt_bench(ratings: Sequence[Rating]) -> MTBench:
    """Return the mean ratings: overall, by turn and by category. Failed turns are only counted.

    Args:
        ratings: one for each question and turn.

    Example:
        >>> result = mt_bench([Rating(81, 1, "writing", 8.0), Rating(81, 2, "writing", 6.0)])
        >>> result.overall.mean, result.turns[1].mean, result.categories["writing"].judged
        (7.0, 8.0, 2)
    """
    return MTBench(
        overall=_mean(ratings),
        turns={
            turn: _mean([r for r in ratings if r.turn == turn])
            for turn in sorted({r.turn for r in ratings})
        },
        categories={
            category: _mean([r for r in ratings if r.category == category])
            for category in sorted({r.category for r in ratings})
        },
    )


def _mean(ratings: Sequence[Rating]) -> Mean:
    scores = [r.score for r in ratings if r.score is not None and r.score != -1]
    mean = math.fsum(scores) / len(scores) if scores else math.nan
    return Mean(mean, len(scores), len(ratings) - len(scores))
