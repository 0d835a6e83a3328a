"""Which answers become y_ws, y_wt and y_l: pure functions of arrays.

N candidates, sorted by (prompt, source, sample), lie in G groups: a prompt's, or those of a
prompt and source. Equal rewards are told apart by a hash of (prompt_id, source, sample), so
that no source wins all ties and the same candidates always give the same choice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Ties = Callable[[np.ndarray], np.ndarray]
"""Gives each of some candidates its place in [0, 1) among those of equal reward."""

REASONS = (
    "too_few",  # than two answers that may be used
    "none_chosen",  # all may only be rejected: cut off, or wrong
    "none_rejected",  # all are right
    "equal_reward",  # says nothing about which is better
    "margin",  # outside min_margin to max_margin, or the worse is rewarded more
    "same_text",
    "similar_text",
    "source_below_target",
)
"""Why a group has no pair, in the order in which it is looked at."""
FOUND = len(REASONS)
NONE = -1
"""No candidate, in place of its number."""


def best_of(
    values: np.ndarray, eligible: np.ndarray, groups: np.ndarray, count: int, ties: Ties
) -> np.ndarray:
    """The eligible candidate of greatest value in each of `count` groups, (G,); NONE without one.

    Of equal values the one whose tie is greatest wins. `values`, `eligible`, `groups` are (N,).
    """
    rows = np.flatnonzero(eligible)
    top = np.full(count, -np.inf)
    np.maximum.at(top, groups[rows], values[rows])
    rows = rows[values[rows] == top[groups[rows]]]
    tied = np.bincount(groups[rows], minlength=count)[groups[rows]] > 1
    places = np.zeros(len(rows))
    places[tied] = ties(rows[tied])
    rows = rows[np.lexsort((places, groups[rows]))]
    found = np.full(count, NONE)
    found[groups[rows]] = rows  # of a group's rows the last stays
    return found


def is_tied(
    values: np.ndarray, eligible: np.ndarray, groups: np.ndarray, best: np.ndarray
) -> np.ndarray:
    """Whether more than one eligible candidate of a group has its best one's value, (G,)."""
    equal = groups[eligible & (values == at(values, best)[groups])]
    return np.bincount(equal, minlength=len(best)) > 1


def at(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The values of rows, NaN for NONE."""
    return np.append(values, np.nan)[rows]


class Outcomes:
    """What becomes of each of G groups: FOUND, or the number of the first reason it failed by."""

    def __init__(self, count: int):
        self.codes = np.full(count, FOUND)

    def fail(self, reason: str, failing: np.ndarray) -> None:
        """Groups that were found until now and fail by this reason; `failing` is (G,)."""
        self.codes[(self.codes == FOUND) & failing] = REASONS.index(reason)

    @property
    def found(self) -> np.ndarray:
        """Groups that have not failed, (G,)."""
        return self.codes == FOUND


def pair(
    rewards: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    groups: np.ndarray,
    count: int,
    ties: Ties,
    margins: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray, Outcomes]:
    """The best and the worst candidate of each group, and which groups have a pair by rewards.

    `chosen` and `rejected` (N,) tell which candidates may be either; `margins` are the least and
    the greatest difference of their rewards.
    """
    best = best_of(rewards, chosen, groups, count, ties)
    worst = best_of(-rewards, rejected, groups, count, lambda rows: -ties(rows))
    margin = at(rewards, best) - at(rewards, worst)
    low, high = margins
    outcomes = Outcomes(count)
    outcomes.fail("too_few", np.bincount(groups[chosen | rejected], minlength=count) < 2)
    outcomes.fail("none_chosen", best == NONE)
    outcomes.fail("none_rejected", worst == NONE)
    outcomes.fail("equal_reward", margin == 0)
    outcomes.fail("margin", ~((margin > 0) & (margin >= low) & (margin <= high)))
    return best, worst, outcomes
