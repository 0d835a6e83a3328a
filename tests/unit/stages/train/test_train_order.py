"""Which rows each optimizer step takes, and how far it is on its way."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrpo_ray.stages.train.order import HASHED, Order, permutation, permuted_block

SIZES = [(1, 1), (1, 128), (7, 3), (64, 8), (65, 8), (100, 32)]  # (rows, batch size)
ORDERS = st.builds(
    Order, rows=st.integers(1, 60), epochs=st.integers(1, 4),
    batch_size=st.integers(1, 70), seed=st.integers(0, 5),
)  # fmt: skip


@pytest.mark.parametrize(("rows", "batch_size"), SIZES)
def test_every_row_once_an_epoch(rows, batch_size):
    order = Order(rows, epochs=3, batch_size=batch_size, seed=5)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        assert sorted(i for step in steps for i in order.batch(step)) == list(range(rows))
    assert order.steps == 3 * order.steps_per_epoch


@given(ORDERS)
def test_steps_are_full_but_the_last_of_an_epoch(order):
    for step in range(order.steps):
        is_last = (step + 1) % order.steps_per_epoch == 0
        left = order.rows - (order.steps_per_epoch - 1) * order.batch_size
        assert len(order.batch(step)) == (left if is_last else order.batch_size)


def test_order_changes_with_epoch_and_seed_alone():
    assert permutation(1, 0, 50) != permutation(1, 1, 50)
    assert permutation(1, 0, 50) != permutation(2, 0, 50)
    assert permutation(1, 0, 50) != tuple(range(50))
    first = permutation(1, 0, 50)
    permutation.cache_clear()
    assert permutation(1, 0, 50) == first


def test_an_added_row_leaves_the_others_in_order():
    more = permutation(1, 0, 51)
    assert tuple(index for index in more if index < 50) == permutation(1, 0, 50)


def test_order_is_fixed_for_good():
    """A change here would break every interrupted run."""
    assert permutation(42, 0, 8) == (2, 7, 6, 5, 4, 1, 3, 0)
    order = Order(rows=8, epochs=2, batch_size=3, seed=42)
    assert [order.batch(step) for step in range(3)] == [(2, 7, 6), (5, 4, 1), (3, 0)]
    assert order.batch(3) == permutation(42, 1, 8)[:3]


def test_the_order_of_many_rows_has_each_once_and_looks_random():
    order = Order(HASHED + 70_001, epochs=2, batch_size=5000, seed=3)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        epochs.append(np.concatenate([order.batch(step) for step in steps]))
        assert len(order.batch(steps[-1])) == order.rows % 5000
        assert (np.sort(epochs[-1]) == np.arange(order.rows)).all()
    for one, other in [
        (epochs[0], epochs[1]), (epochs[0], np.arange(order.rows)), (epochs[0][1:], epochs[0][:-1]),
    ]:  # fmt: skip
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.005  # of independent ones: 0.001
        assert (one == other).sum() < 10
    near = np.abs(np.diff(epochs[0])) <= 100
    assert near.sum() == pytest.approx(200, abs=70)  # of neighbours in the files


def test_the_order_of_many_rows_is_fixed_for_good():
    order = Order(12_345_678, epochs=3, batch_size=4, seed=42)
    assert [order.batch(step) for step in (0, 5_000_000)] == [
        (9763768, 7000892, 10044029, 2518957), (9062106, 3504242, 3011150, 8633533),
    ]  # fmt: skip


def test_many_rows_are_ordered_quicker():
    def seconds(order: Order, places: int) -> float:
        permutation.cache_clear()
        permuted_block.cache_clear()
        started = time.process_time()
        for step in range(places // order.batch_size):
            order.batch(step)
        return (time.process_time() - started) / places

    few = seconds(Order(300_000, 1, 10_000, 0), 300_000)
    many = min(seconds(Order(50_000_000, 1, 10_000, n), 650_000) for n in range(3))
    assert many < few / 8  # some 40 times on an idle machine


@pytest.mark.parametrize(
    ("rows", "epochs", "batch_size", "before"),
    [
        (8, 1, 4, [0, 4]),
        (10, 1, 4, [0, 4, 8]),  # the last step has 2 rows
        (10, 2, 4, [0, 4, 8, 10, 14, 18]),
        (3, 3, 8, [0, 3, 6]),  # an epoch is a step
    ],
)
def test_consumed_counts_rows(rows, epochs, batch_size, before):
    """The rows before a step over the rows before the last step."""
    order = Order(rows, epochs, batch_size, seed=0)
    got = [order.consumed(step) for step in range(order.steps)]
    assert got == [count / before[-1] for count in before]


def test_a_single_step_is_the_end():
    assert Order(rows=5, epochs=1, batch_size=128, seed=0).consumed(0) == 1.0


@given(ORDERS)
def test_consumed_grows_from_0_to_exactly_1(order):
    got = [order.consumed(step) for step in range(order.steps)]
    assert got[-1] == 1.0
    assert got[0] == (0.0 if order.steps > 1 else 1.0)
    assert all(a < b for a, b in pairwise(got))
