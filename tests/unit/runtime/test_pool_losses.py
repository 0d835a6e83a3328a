"""How often a pool gives a row to another actor after one was lost with it."""

from collections import Counter, deque

import pytest
import ray
from ray import exceptions

from wrpo_ray.config import Actors
from wrpo_ray.runtime import pool as pools
from wrpo_ray.runtime.placement import Pool

GONE = [
    exceptions.ActorDiedError(),
    exceptions.WorkerCrashedError(),
    exceptions.NodeDiedError("gone"),
    exceptions.OutOfMemoryError("gone"),
    exceptions.ObjectLostError("00", None, ""),
]


class Pooled(pools.RunningPool):
    """A pool without a cluster, so that each kind of loss can be told to it."""

    def __init__(self) -> None:
        self.pool, self.losses, self.lost_starts = Pool("pool", Actors()), Counter(), 0
        self.queue, self.members, self.watch = deque(), [], None

    def _release(self, member: pools.Member) -> None:
        self.members.remove(member)


@pytest.mark.parametrize("error", GONE, ids=lambda error: type(error).__name__)
def test_a_row_goes_to_others_until_too_many_were_lost_with_it(error, monkeypatch):
    def get(found):
        raise error

    monkeypatch.setattr(ray, "wait", lambda found, timeout: (found[:1], found[1:]))
    monkeypatch.setattr(ray, "get", get)
    pool, rows = Pooled(), [{"n": 0}, {"n": 1}]
    for lost in range(pools.ROW_LOSSES + 1):
        member = pools.Member(None, None, rows={n: (row, 0.0) for n, row in enumerate(rows)})
        pool.members, pool.queue = [member], deque()
        if lost == pools.ROW_LOSSES:
            with pytest.raises(type(error)):
                pool._results()
        else:
            assert pool._results() == []
            assert list(pool.queue) == rows
            assert not pool.members
