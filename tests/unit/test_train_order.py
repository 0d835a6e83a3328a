"""Which rows each step, worker and micro-batch takes."""

from __future__ import annotations

import pytest

from wrpo_ray.train.order import Order, permutation

SIZES = [(1, 1), (1, 128), (7, 3), (64, 8), (65, 8), (100, 32)]  # (rows, batch size)
WORKERS = [(1, 1), (2, 2), (3, 2), (8, 1), (5, 64)]  # (workers, micro-batch)


@pytest.mark.parametrize(("rows", "batch_size"), SIZES)
def test_every_row_once_an_epoch(rows, batch_size):
    order = Order(rows, epochs=3, batch_size=batch_size, seed=5)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        assert sorted(i for step in steps for i in order.batch(step)) == list(range(rows))
    assert order.steps == 3 * order.steps_per_epoch


@pytest.mark.parametrize(("rows", "batch_size"), SIZES)
@pytest.mark.parametrize(("workers", "size"), WORKERS)
def test_workers_share_a_step(rows, batch_size, workers, size):
    order = Order(rows, epochs=2, batch_size=batch_size, seed=5)
    for step in range(order.steps):
        parts = [order.micro_batches(step, w, workers, size) for w in range(workers)]
        taken = [i for part in parts for m in part if m.weight for i in m.rows]
        assert sorted(taken) == sorted(order.batch(step))
        assert {len(part) for part in parts} == {order.accumulation(workers, size)}
        assert all(1 <= len(m.rows) <= size for part in parts for m in part)


def test_dummies_are_needed_only_where_rows_are_short():
    order = Order(rows=8, epochs=1, batch_size=8, seed=0)
    parts = [order.micro_batches(0, worker, 3, 1) for worker in range(3)]
    assert [sum(m.weight == 0 for m in part) for part in parts] == [0, 0, 1]


def test_order_changes_with_epoch_and_seed_alone():
    assert permutation(1, 0, 50) != permutation(1, 1, 50)
    assert permutation(1, 0, 50) != permutation(2, 0, 50)
    assert permutation(1, 0, 50) != tuple(range(50))
    permutation.cache_clear()
    first = permutation(1, 0, 50)
    permutation.cache_clear()
    assert permutation(1, 0, 50) == first


def test_order_is_fixed_for_good():
    """A change here would break every interrupted run."""
    assert permutation(42, 0, 8) == (2, 7, 6, 5, 4, 1, 3, 0)
