"""The choice of the best and the worst answers: pure functions of arrays.

N candidates, sorted by (prompt, source, sample), lie in G groups. A group holds the answers to one
prompt, or those of one source to one prompt. Equal rewards are ordered by a hash of (prompt_id,
source, sample): no source wins all ties, and the same candidates always give the same choice.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.integer[Any]]
"""Numbers of candidates, groups or prompts."""
Ties = Callable[[Ints], Floats]
"""Maps candidates to numbers in [0, 1) that order those of equal reward."""

REASONS = (
    "too_few",  # fewer than two answers may be used
    "none_chosen",  # no answer may be chosen: all are cut off or wrong
    "none_rejected",  # no answer may be rejected: all are right
    "equal_reward",  # the best and the worst have the same reward
    "margin",  # outside min_margin to max_margin, or the worse has the higher reward
    "same_text",
    "similar_text",
    "source_below_target",
)
"""Why a group has no pair, in the order of the checks."""
FOUND = len(REASONS)
NONE = -1
"""In place of a candidate's number: there is no candidate."""


def best_of(values: Floats, eligible: Bools, groups: Ints, count: int, ties: Ties) -> Ints:
    """Return the eligible candidate of greatest value in each group; NONE where there is none.

    Args:
        values: (N,) the rewards.
        eligible: (N,) which candidates may be returned.
        groups: (N,) the group of each candidate, 0 to G - 1.
        count: G.
        ties: orders candidates of equal value; the greatest wins.

    Returns:
        (G,) numbers of candidates.
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
    found[groups[rows]] = rows  # the last of a group's rows stays
    return found


def is_tied(values: Floats, eligible: Bools, groups: Ints, best: Ints) -> Bools:
    """Whether several eligible candidates of a group have the value of its best one, (G,)."""
    equal = groups[eligible & (values == at(values, best)[groups])]
    tied: Bools = np.bincount(equal, minlength=len(best)) > 1
    return tied


def at(values: Floats, rows: Ints) -> Floats:
    """The values of the rows, NaN for NONE."""
    found: Floats = np.append(values, np.nan)[rows]
    return found


class Outcomes:
    """The outcome of each of G groups: FOUND, or the number of the first check that it failed."""

    def __init__(self, count: int):
        self.codes = np.full(count, FOUND)

    def fail(self, reason: str, failing: Bools) -> None:
        """Record the reason for the groups in `failing` (G,) that have not failed before."""
        self.codes[(self.codes == FOUND) & failing] = REASONS.index(reason)

    @property
    def found(self) -> Bools:
        """Groups that have not failed, (G,)."""
        found: Bools = self.codes == FOUND
        return found


def best_and_worst(
    rewards: Floats,
    chosen: Bools,
    rejected: Bools,
    groups: Ints,
    count: int,
    ties: Ties,
    margins: tuple[float | Floats, float | Floats],
) -> tuple[Ints, Ints, Outcomes]:
    """Return the best and the worst candidate of each group, and the outcomes by reward.

    `chosen` and `rejected` (N,) say which candidates may be the best and which the worst;
    `margins` are the least and the greatest difference of the two rewards, of all groups or (G,)
    of each. The other arguments are
    as for `best_of`.
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
