"""What pools report, what of it the allocator believes, and the places that a pool takes."""

import itertools
import math
import time
from collections import deque
from dataclasses import replace

import pytest

from wrpo_ray.config import Actors
from wrpo_ray.runtime import pool as pools
from wrpo_ray.runtime.allocation import Demand, Node, Share
from wrpo_ray.runtime.allocator import FOLLOWING, Allocator, Report
from wrpo_ray.runtime.placement import Pool
from wrpo_ray.runtime.pool_members import Member, Pace
from wrpo_ray.runtime.ready_queue import ReadyQueue

GPU = {"GPU": 1.0}


def report(pool: str, left: float, *, row: float | None = None, **changes) -> Report:
    placed = changes.pop("placed", [])
    fields = {"running": len(placed), "most": 100}
    return Report(Demand(pool, GPU, left, **fields | changes), row, placed)


def cluster(gpus: float, free: float | None = None) -> list[Node]:
    return [Node("n", {"GPU": gpus}, {"GPU": gpus if free is None else free})]


def shares(nodes: list[Node], *reports: Report) -> dict[str, int]:
    """The engines of each pool when all have reported."""
    allocator = Allocator(lambda: nodes)
    for one in reports:
        allocator.share(one)
    allocator._decide()
    return {one.demand.pool: allocator.share(one).engines for one in reports}


def test_rows_that_nobody_has_timed_take_as_long_as_those_of_others():
    """Three times the rows; then one pool's rows turn out to take a third of the other's."""
    assert shares(cluster(16), report("a", 30), report("b", 10)) == {"a": 12, "b": 4}
    assert shares(cluster(16), report("a", 30), report("b", 10, row=5.0)) == {"a": 12, "b": 4}
    timed = report("a", 30, row=2.0), report("b", 10, row=6.0)
    assert shares(cluster(16), *timed) == {"a": 8, "b": 8}


def test_room_is_kept_for_rows_that_follow_others():
    """A hundred buckets to score, of which one is ready, beside ten to answer: as much work."""
    assert FOLLOWING == 0.1
    follows = report("score", 100, follows=True)
    assert shares(cluster(8), report("a", 10), follows) == {"a": 4, "score": 4}
    assert shares(cluster(8), report("a", 10), report("score", 100))["score"] == 7


def test_room_is_kept_for_workers_that_ray_places_until_they_run():
    """Four of eight GPUs are free: for two workers two are kept, for eight whatever is there."""
    own = report("a", 1e6, placed=["n"] * 4)
    allocator = Allocator(lambda: cluster(8, 4))
    assert allocator.share(own).engines == 8
    allocator.keep("sft", GPU, 2)
    assert allocator.share(own) == Share(6, (("n",), ("n",)), gives_way=False)
    allocator.keep("sft", GPU, 8)
    assert allocator.lacking == ["sft"]
    assert allocator.share(own) == Share(4, (), gives_way=True)
    allocator.leave("sft")
    assert allocator.share(own).engines == 8


def test_what_was_given_is_not_given_again_before_ray_has_noticed():
    """Eight GPUs, three given: Ray shows eight or five as free, and five are left either way."""
    for free in (8.0, 5.0):
        own = report("a", 1e6, placed=["n"] * 3)
        assert shares(cluster(8, free), own) == {"a": 8}
    assert shares(cluster(8, 4.0), report("a", 1e6, placed=["n"] * 3)) == {"a": 7}  # another's


def test_a_pool_that_has_left_takes_nothing():
    allocator = Allocator(lambda: cluster(8))
    allocator.share(report("a", 1e6))
    allocator.share(report("b", 1e6))
    allocator.leave("a")
    assert allocator.share(report("b", 1e6)).engines == 8


def test_the_cluster_is_looked_at_once_for_all_pools_of_a_second():
    looks = []

    def look() -> list[Node]:
        looks.append(1)
        return cluster(8)

    allocator = Allocator(look)
    for _ in range(50):
        for pool in "abc":
            allocator.share(report(pool, 1e6))
    assert len(looks) <= 3 + 2  # each pool's first report, and a second that may have passed


def test_pools_that_lack_their_first_actors_are_named():
    allocator = Allocator(lambda: cluster(1))
    allocator.share(report("a", 1.0, placed=["n"]))
    share = allocator.share(report("b", 1.0))
    assert (share.engines, allocator.lacking) == (0, ["b"])
    allocator._decide()
    assert allocator.share(report("a", 1.0, placed=["n"])).gives_way


def test_the_pace_of_a_pool_is_without_starts_and_idle_time():
    pace = Pace()
    assert pace.row(0) is None
    pace.add({"seconds": 100.0, "idle": 10.0, "start": 60.0})
    pace.add({"seconds": 50.0, "idle": 0.0})
    assert (pace.row(0), pace.startup) == (40.0, 60.0)


def test_what_the_user_expects_counts_until_there_is_a_result():
    pace = Pace(expected=7.0, expected_start=100.0)
    pace.add({"seconds": 5.0, "idle": 0.0}, rows=0)
    assert (pace.row(0), pace.startup) == (7.0, 100.0)
    pace.add({"seconds": 60.0, "idle": 10.0, "start": 30.0})
    assert (pace.row(0), pace.startup) == (25.0, 30.0)


def leave(*reports: Report) -> int:
    """Engines of the first pool that are to end, on nodes of eight GPUs and of one."""
    allocator = Allocator(lambda: [Node("n", {"GPU": 8.0}, {}), Node("m", {"GPU": 1.0}, {})])
    for one in reports:
        allocator.share(one)
    allocator._decide()
    return len(allocator.share(reports[0]).leave)


def test_what_is_expected_shares_the_gpus_and_moves_no_engine():
    """Rows of "b" take three times as long: six of eight GPUs, by results as by expectations."""
    expected = [report("a", 10, row=1.0, is_timed=False), report("b", 10, row=3.0, is_timed=False)]
    assert shares(cluster(8), *expected) == {"a": 2, "b": 6}
    few = report("few", 10, row=6.0, placed=["n"] * 8, startup=20.0)
    many = report("many", 30, row=4.0, placed=["m"], startup=20.0)
    assert leave(few, many) > 0
    guessed = replace(many, demand=replace(many.demand, is_timed=False))
    assert leave(few, guessed) == 0


class Waiting(pools.RunningPool):
    """A pool that only counts whom it starts, where."""

    def __init__(self, *members: Member) -> None:
        self.pool, self.members, self.queue = Pool("pool", Actors()), list(members), deque()
        self.started: list[str] = []
        self.arguments, self.groups = {}, ""

    def _start(self, place: str, beyond: tuple[str, ...] = ()) -> Member:
        self.started.append(place)
        return Member(None, object(), place=place, beyond=beyond)


def test_places_go_to_actors_that_wait_for_room_and_then_to_new_ones():
    waits = Member(None, object())
    pool = Waiting(Member(None, None, place="a"), waits)
    pool._take_places(Share(4, (("b",), ("c",), ("d",))), most=3)
    assert waits.place == "b"
    assert pool.started == ["c"]
    pool._take_places(Share(4, (("b",), ("c",), ("d",))), most=3)
    assert pool.started == ["c"]  # the same answer gives nothing twice


def test_requests_beyond_the_first_actors_take_no_room_that_is_there(monkeypatch):
    """They are for nodes to come: one that gets a place is asked for anew, all if nodes change."""
    ended: list[Member] = []
    monkeypatch.setattr(pools, "end_member", ended.append)
    there = [Node("b", GPU, GPU), Node("a", GPU, GPU)]
    allocator = Allocator(lambda: there)
    monkeypatch.setattr(pools, "ALLOCATOR", allocator)
    allocator._decide()
    pool = Waiting()
    pool._request(1, 3)
    assert [m.beyond for m in pool.members] == [(), ("a", "b"), ("a", "b")]
    first, second, third = pool.members
    pool._request(1, 3)
    assert pool.members == [first, second, third]
    pool._take_places(Share(2, (("a",), ("b",))), most=2)
    assert (first.place, ended) == ("a", [second])
    assert [(m.place, m.beyond) for m in pool.members] == [("a", ()), ("", ("a", "b")), ("b", ())]
    there.append(Node("c", GPU, GPU))
    allocator._decide()
    pool._request(1, 3)
    assert ended == [second, third]
    assert [(m.place, m.beyond) for m in pool.members][2:] == [("", ("a", "b", "c"))]


def test_an_actor_that_leaves_gets_no_other_place():
    leaves = Member(None, None, place="a", rows={1: ({}, 0.0)}, is_leaving=True)
    pool = Waiting(leaves)
    pool._take_places(Share(1, (("b",),)), most=1)
    assert (leaves.place, pool.started) == ("a", ["b"])


def test_an_actor_that_does_not_answer_loses_its_place(monkeypatch):
    """Ray had no room there after all: it counts as one that waits, and may get another place."""
    clock = itertools.count(0.0, pools.PLACED_FOR / 2 + 1)
    member = Member(None, object(), place="a", since=0.0)
    pool = Waiting(member)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert pool._placed == [member]
    assert pool._placed == [member]
    assert pool._placed == []


@pytest.mark.parametrize("gives_way", [True, False])
def test_those_that_wait_for_room_are_ended_first(gives_way, monkeypatch):
    ended = []
    monkeypatch.setattr(pools, "end_member", ended.append)
    placed, waits = Member(None, object(), place="a"), Member(None, object())
    pool = Waiting(waits, placed)
    monkeypatch.setattr(Waiting, "_least_now", 1)
    pool._shrink(1, at_once=gives_way)
    assert (ended, pool.members) == ([waits], [placed])


def test_an_actor_that_leaves_gets_no_more_rows_and_ends_after_its_last(monkeypatch):
    """Of two the one with fewer rows; one decision of the allocator counts once."""
    ended = []
    monkeypatch.setattr(pools, "end_member", ended.append)
    few, many = Member(None, None, place="a"), Member(None, None, place="b")
    few.rows, many.rows = {1: ({}, 0.0)}, {2: ({}, 0.0), 3: ({}, 0.0)}
    pool, share = Waiting(many, few), Share(2, leave=("",))
    pool.share, pool.groups, pool.left_at = Share(0), "", -math.inf
    pool.ready_queue = ReadyQueue.of([])
    pool.left, pool.most, pool.to_come, pool.least, pool.pace = 9, 4, 0, 1, Pace()
    pool.needs, pool.queue = GPU, deque([{}])
    for _ in range(3):
        pool._let_leave(share)
    assert (pool.ready, ended) == ([many], [])
    demand = pool._demand(busy=2)
    assert (demand.running, demand.leaving) == (1, 1)
    pool._let_leave(Share(1))
    few.rows.clear()
    pool._let_leave(Share(1))
    assert (ended, pool.members) == ([few], [many])
    assert pool._demand(busy=1).leaving == 1  # its room is not seen at once
    monkeypatch.setattr(pools, "SEEN_AFTER", 0.0)
    assert pool._demand(busy=1).leaving == 0


def test_no_engine_leaves_before_all_pools_are_timed():
    """Eight GPUs for ten rows of a pool, one for thirty of another: until both are known."""
    few = report("few", 10, row=6.0, placed=["n"] * 8, startup=20.0)
    many = report("many", 30, placed=["m"], startup=20.0)
    assert leave(few, many) == 0
    assert leave(few, replace(many, row=4.0)) > 0


def test_engines_end_for_a_training_once(monkeypatch):
    """Its workers have room then, and Ray shows that only when they all run.

    A node with one engine of the pool costs it less than one with two.
    """
    full = report("full", 100, row=60.0, placed=["a", "a", "b"], places=["a", "a", "b"])
    nodes = [Node("a", {"GPU": 2.0}, {}), Node("b", {"GPU": 1.0}, {})]
    allocator = Allocator(lambda: nodes)
    allocator.share(full)
    allocator.keep("sft", GPU, 1)
    assert allocator.share(full).leave == ["b"]
    pool = Waiting(Member(None, None, place="a"), Member(None, None, place="b"))
    pool.share, pool.left_at = Share(0), -math.inf
    monkeypatch.setattr(pools, "end_member", lambda member: None)
    pool._let_leave(allocator.share(full))
    assert [m.place for m in pool.members] == ["a"]
    allocator._decide()
    assert not allocator.share(full).leave
