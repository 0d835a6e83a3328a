"""MT-Bench: ratings of two turns by a judge, and their means (arXiv 2306.05685); pure functions.

They follow the official code (FastChat, single answer grading), and give its figures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
BACKUP = re.compile(r"\[(\d+\.?\d*)\]")
OTHER = re.compile(r"\[\[[^\[\]\d]*\d[^\[\]]*\]\]")
"""Double brackets with a digit, whatever else they hold."""
BEST = 10.0


@dataclass(frozen=True)
class Rating:
    """The judge's rating of one turn of one question."""

    question: int
    turn: int
    """1 or 2."""
    category: str
    score: float | None
    """0 to 10; None or -1 where the judge gave none."""


@dataclass(frozen=True)
class Mean:
    """A mean rating, of how many; NaN of none."""

    mean: float
    judged: int
    failed: int


@dataclass(frozen=True)
class MTBench:
    """Mean ratings. `overall` is the mean of all ratings, which of complete turns is their mean."""

    overall: Mean
    turns: dict[int, Mean]
    categories: dict[str, Mean]


def parse_rating(judgment: str) -> float | None:
    """The first `[[n]]` of a judgment, without one the first `[n]`; None where there is neither.

    The official code's way, but for what it would take for a rating and is none: a number above
    10 (`[2024]` is a year), and a `[n]` beside a rating of another form (`[[4/5]], as [1] says`).
    """
    found = RATING.search(judgment)
    if not found and not OTHER.search(judgment):
        found = BACKUP.search(judgment)
    rating = float(found[1]) if found else math.inf
    return rating if rating <= BEST else None


def mt_bench(ratings: Sequence[Rating]) -> MTBench:
    """The means over all ratings, by turn and by category; failed ones are left out and counted."""
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
