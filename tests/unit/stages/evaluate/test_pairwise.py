"""Pairwise figures: by hand, and what has to hold for any verdicts."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wrpo_ray.stages.evaluate.pairwise import (
    Comparison,
    Pairwise,
    pairwise,
    share_of_games,
    share_of_rewards,
    shortfall,
)
from wrpo_ray.stages.evaluate.statistics import Estimate

SAME = (5, 5)
shares = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, None]), min_size=1, max_size=30)


def figures(values: list[float | None], lengths: tuple[int, int] = SAME) -> Pairwise:
    return pairwise([Comparison(value, lengths) for value in values])


def test_figures_by_hand():
    """4 wins, 2 ties, 1 loss at .25, 1 at 0, one failure: (4 + 1 + .25) / 8 = .65625."""
    result = figures([1.0] * 4 + [0.5] * 2 + [0.25, 0.0, None])
    assert (result.win.mean, result.tie.mean, result.loss.mean) == (0.5, 0.25, 0.25)
    assert result.win_rate.mean == 0.65625
    assert (result.win_rate.n, result.failed) == (8, 1)
    assert result.win_rate.low < 0.65625 < result.win_rate.high


def test_intervals_are_the_binomials():
    """Of 400 fair verdicts the normal interval is .5 plus or minus 1.96 * .025 = .049."""
    result = figures([1.0, 0.0] * 200)
    assert result.win.low == pytest.approx(0.451, abs=0.008)
    assert result.win.high == pytest.approx(0.549, abs=0.008)


@settings(max_examples=30)
@given(shares)
def test_the_other_model_sees_the_mirror_image(values):
    one = figures(values)
    other = figures([None if v is None else 1 - v for v in values])
    assert one.win == other.loss
    assert one.tie == other.tie
    assert one.failed == other.failed == values.count(None)
    if one.win.n:
        assert one.win.mean + one.tie.mean + one.loss.mean == pytest.approx(1)
        assert one.win_rate.mean == pytest.approx(1 - other.win_rate.mean)
        assert one.win_rate.low == pytest.approx(1 - other.win_rate.high, abs=1e-9)


def test_nothing_judged_is_not_a_number():
    result = figures([None, None])
    assert math.isnan(result.win_rate.mean)
    assert (result.win_rate.n, result.failed) == (0, 2)
    assert math.isnan(pairwise([]).length_controlled.high)


def test_length_is_taken_out():
    """Two models as good as each other; the first answers at length, which the judge likes."""
    rng = np.random.default_rng(0)
    more = rng.normal(300, 400, 400)
    won = rng.random(400) < 1 / (1 + np.exp(-more / 200))
    result = pairwise(
        [Comparison(float(w), (1000 + int(m), 1000)) for w, m in zip(won, more, strict=True)]
    )
    assert result.win_rate.low > 0.6
    assert result.length_controlled.low < 0.5 < result.length_controlled.high


def test_the_same_twice():
    given = [Comparison(v, (n, 5)) for n, v in enumerate([1.0, 0.0, 0.5, 1.0])]
    assert pairwise(given) == pairwise(given)


def test_lengths_that_do_not_vary_leave_nothing_to_control():
    assert math.isnan(figures([1.0, 0.0], (9, 5)).length_controlled.mean)


def test_shares():
    assert share_of_games(1.0, 1.0) == 1.0
    assert share_of_games(1.0, 0.0) == 0.5
    assert share_of_games(None, 0.0) is None
    assert share_of_rewards(2.0, 1.0) == 1.0
    assert share_of_rewards(1.0, 2.0) == 0.0
    assert share_of_rewards(1.0, 1.0) == 0.5
    assert share_of_rewards(1.0, 1.1, margin=0.2) == 0.5


def test_the_gate():
    assert shortfall("win rate", Estimate(0.5, 0.4, 0.6, 9), 0.5) is None
    assert shortfall("win rate", Estimate(0.5, 0.4, 0.6, 9), 0.55) == (
        "win rate is 0.500 [0.400, 0.600] on 9 prompts, below 0.55"
    )
    assert "is not known" in (shortfall("x", Estimate(math.nan, math.nan, math.nan, 0), 0.1) or "")
