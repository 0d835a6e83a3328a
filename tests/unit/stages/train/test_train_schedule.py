"""alpha and the learning rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrpo_ray.config import AlphaConfig, WrpoConfig
from wrpo_ray.stages.train.order import Order, alpha_at, learning_rate_at


def test_alpha_grows_with_the_rows_consumed():
    """18 rows in steps of 4 to 0.1: 0, 4, 8, 12 and 16 of 16 rows before the last step."""
    order = Order(rows=18, epochs=1, batch_size=4, seed=0)
    got = [alpha_at(AlphaConfig(end=0.1), order.consumed(step)) for step in range(order.steps)]
    assert got == pytest.approx([0, 0.025, 0.05, 0.075, 0.1], abs=1e-15)
    assert got[0] == 0
    assert got[-1] == 0.1


@given(st.floats(0, 1), st.integers(1, 500), st.integers(1, 130))
def test_alpha_ends(end, rows, batch_size):
    order = Order(rows, 1, batch_size, 0)
    assert alpha_at(AlphaConfig(end=end), order.consumed(order.steps - 1)) == end
    assert order.steps == 1 or alpha_at(AlphaConfig(end=end), order.consumed(0)) == 0


def test_static_alpha():
    config = AlphaConfig(end=0.2, schedule="static")
    assert {alpha_at(config, consumed / 9) for consumed in range(10)} == {0.2}


def test_alpha_0_is_0_throughout():
    for schedule in ("dynamic", "static"):
        config = AlphaConfig(end=0, schedule=schedule)
        assert {alpha_at(config, consumed / 9) for consumed in range(10)} == {0}


def test_cosine_with_warmup():
    """Ten steps, two of warm-up: 1/3 and 2/3 of the peak, the peak, then half a cosine."""
    config = WrpoConfig(learning_rate=3e-7, warmup=0.2)
    got = [learning_rate_at(config, step, 10) / 3e-7 for step in range(10)]
    assert got[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert got[6] == pytest.approx(0.5)  # half of the eight steps after the warm-up
    assert got[2:] == sorted(got[2:], reverse=True)
    assert got[-1] == pytest.approx(0.0380602)  # (1 + cos(7 pi / 8)) / 2


def test_a_part_of_a_warm_up_step_is_a_step():
    """0.15 of 10 steps is 1.5, so 2 rise: 1/3 and 2/3 of the peak, then the peak."""
    config = WrpoConfig(learning_rate=1.0, warmup=0.15, schedule="constant")
    got = [learning_rate_at(config, step, 10) for step in range(4)]
    assert got == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("linear", 0.25)])
def test_other_shapes(schedule, last):
    config = WrpoConfig(learning_rate=1e-3, warmup=0, schedule=schedule)
    assert learning_rate_at(config, 0, 4) == 1e-3
    assert learning_rate_at(config, 3, 4) == pytest.approx(1e-3 * last)


@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.floats(0, 1),
    st.integers(1, 200),
)
def test_every_step_has_a_rate(schedule, warmup, steps):
    """Above 0 and up to the peak; it rises, then never does again."""
    config = WrpoConfig(learning_rate=1.0, warmup=warmup, schedule=schedule)
    rates = [learning_rate_at(config, step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
