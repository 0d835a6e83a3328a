"""The peer with prefix sharing in benchmarks: what its mask lets through, and that it is exact."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[4] / "benchmarks"))

import sharing
from sharing import Tried
from train import Ours, Published, Shape, gradients_differ, make_rows

from wrpo_ray.stages.train.packing import pack
from wrpo_ray.stages.train.rows import Row

SHAPE = Shape(64, 2, 64)
CPU = torch.device("cpu")


def test_who_attends_to_whom_by_hand():
    """Prompts 5 6 and 9, answers of one token each, the last of the first row of two."""
    one, two = (np.array(ids, np.int32) for ids in ([5], [7, 8]))
    layout = pack([Row("a", np.array([5, 6]), (one, one, two)), Row("b", one, (one,) * 3)]).layout
    block, prompt = sharing.blocks_of(layout)
    assert block.tolist() == [0, 0, 1, 2, 3, 3, 4, 5, 6, 7]
    assert prompt.tolist() == [0, 0, 0, 0, 0, 0, 4, 4, 4, 4]
    place = torch.arange(10)
    seen = sharing.sees(block, prompt, place[:, None], place)
    assert [row.nonzero().flatten().tolist() for row in seen] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 4, 5], [6], [6, 7], [6, 8], [6, 9],
    ]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4])
def test_its_gradients_are_those_of_the_published_algorithm(size):
    rows = make_rows(4, 6, 1.6, 0.5, SHAPE.vocabulary)
    peer, published = sharing.Sharing(SHAPE, CPU), Published(SHAPE, CPU)
    for contender in (peer, published):
        contender.take(rows)
        peer.budget = sharing.least_budget(
            sharing.costs(np.array([r.lengths for r in rows]), packed=True), size
        )
        contender.step()
    assert gradients_differ(peer.model, published.model) < 1e-5


def test_each_is_compared_at_its_fastest_size_within_the_memory():
    tried = [Tried(1, 10, 3.0), Tried(2, 20, 2.0), Tried(3, 30, 2.5), Tried(6, 60, 1.0)]
    assert sharing.best(tried, 30).rows == 2
    assert sharing.best(tried, 60).rows == 6
    assert sharing.best(tried, 19).rows == 1


def test_gradients_that_differ_end_the_comparison(monkeypatch):
    rows = make_rows(2, 6, 1.6, 0.0, SHAPE.vocabulary)
    contenders = {"ours": Ours(SHAPE, CPU), "sharing": sharing.Sharing(SHAPE, CPU)}
    found = sharing.measure(contenders, rows, (1, 2), 1)
    assert [t.rows for t in found["ours"]] == [t.rows for t in found["sharing"]] == [1, 2]
    assert all(t.peak > 0 and t.time > 0 for tried in found.values() for t in tried)
    own = sharing.sees
    monkeypatch.setattr(sharing, "sees", lambda b, p, q, k: own(b, b, q, k))
    with pytest.raises(AssertionError, match="differ"):
        sharing.measure(contenders, rows, (1,), 1)
