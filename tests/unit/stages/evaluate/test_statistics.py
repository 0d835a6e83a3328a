"""Intervals against worked values."""

import doctest
import math

import pytest

from wrpo_ray.stages.evaluate import arena_hard, mt_bench, pairwise, statistics
from wrpo_ray.stages.evaluate.statistics import Sums, normal_interval, wilson_interval


def test_wilson_by_hand():
    """8 of 10: centre (0.8 + 1.9208 / 10) / 1.38415 = 0.71674; half 0.22659 (Wilson 1927)."""
    estimate = wilson_interval(Sums.of([1.0] * 8 + [0.0] * 2))
    assert estimate.mean == 0.8
    assert estimate.low == pytest.approx(0.49016, abs=1e-5)
    assert estimate.high == pytest.approx(0.94331, abs=1e-5)


def test_wilson_stays_in_bounds():
    assert wilson_interval(Sums.of([0.0] * 5)).low == 0.0
    assert wilson_interval(Sums.of([1.0] * 5)).high == 1.0


def test_normal_by_hand():
    """1, 2, 3: variance 1, standard error 1/sqrt(3) = 0.57735, half 1.13158."""
    estimate = normal_interval(Sums.of([1.0, 2.0, 3.0]))
    assert estimate.mean == 2.0
    assert estimate.high - 2.0 == pytest.approx(1.13158, abs=1e-5)


def test_sums_add_up_over_buckets():
    assert Sums.of([1.0, 2.0]) + Sums.of([3.0]) == Sums.of([1.0, 2.0, 3.0])


def test_nothing_is_not_a_number():
    assert math.isnan(wilson_interval(Sums()).mean)


@pytest.mark.parametrize("module", [statistics, pairwise, mt_bench, arena_hard])
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
