"""alpha and the learning rate."""

from __future__ import annotations

import pytest

from wrpo_ray.config import AlphaConfig, WrpoConfig
from wrpo_ray.train.schedule import alpha_at, learning_rate_at


def test_alpha_grows_to_exactly_its_end():
    """Over five steps to 0.1: 0, 0.025, 0.05, 0.075, 0.1."""
    got = [alpha_at(AlphaConfig(end=0.1), step, 5) for step in range(5)]
    assert got == pytest.approx([0, 0.025, 0.05, 0.075, 0.1], abs=1e-15)
    assert got[0] == 0
    assert got[-1] == 0.1


@pytest.mark.parametrize("steps", [2, 3, 7, 312, 1000])
def test_alpha_ends(steps):
    assert alpha_at(AlphaConfig(end=0.7), 0, steps) == 0
    assert alpha_at(AlphaConfig(end=0.7), steps - 1, steps) == 0.7


def test_one_step_uses_the_end():
    assert alpha_at(AlphaConfig(end=0.3), 0, 1) == 0.3


def test_static_alpha():
    config = AlphaConfig(end=0.2, schedule="static")
    assert {alpha_at(config, step, 9) for step in range(9)} == {0.2}


def test_cosine_with_warmup():
    """Ten steps, two of warm-up: 1/3 and 2/3 of the peak, the peak, then half a cosine."""
    config = WrpoConfig(learning_rate=3e-7, warmup=0.2)
    got = [learning_rate_at(config, step, 10) / 3e-7 for step in range(10)]
    assert got[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert got[6] == pytest.approx(0.5)
    assert got[2:] == sorted(got[2:], reverse=True)
    assert got[-1] > 0


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("linear", 0.25)])
def test_other_shapes(schedule, last):
    config = WrpoConfig(learning_rate=1e-3, warmup=0, schedule=schedule)
    assert learning_rate_at(config, 3, 4) == pytest.approx(1e-3 * last)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_every_step_has_a_rate(warmup, steps):
    config = WrpoConfig(learning_rate=1.0, warmup=warmup)
    assert all(0 < learning_rate_at(config, step, steps) <= 1 for step in range(steps))
