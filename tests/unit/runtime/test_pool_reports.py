"""Reports of unfinished rows: whom a pool asks, and what an actor tells, without a cluster."""

import threading
import time
from collections import Counter, deque
from types import SimpleNamespace

import pytest
import ray

from wrpo_ray.config import Actors
from wrpo_ray.runtime import pool as pools
from wrpo_ray.runtime.placement import Pool
from wrpo_ray.runtime.pool_members import ErrorCapturingWorker, Member, Pace


class Asked(pools.RunningPool):
    """A pool whose actors are objects; each answers what the test says, once it was asked."""

    def __init__(self, count: int, told: list):
        self.pool, self.pace, self.watch = (
            Pool("p", Actors(max=count), threads=2),
            Pace(),
            told.append,
        )
        self.left, self.lost_starts, self.answers = count, 0, {}
        self.members = [Member(SimpleNamespace(), None) for _ in range(count)]
        for number, member in enumerate(self.members):
            member.handle.made = SimpleNamespace(remote=lambda n=number: f"report {n}")
            member.rows = {f"row {number}": ({"n": number}, 0.0)}
            member.told = 0.0


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(pools.time, "monotonic", lambda: now.seconds)
    return now


def settle(pool: Asked, monkeypatch, values: dict) -> list:
    """One look at the results, of which those in `values` are there."""
    monkeypatch.setattr(ray, "wait", lambda found, timeout: ([f for f in found if f in values], []))
    monkeypatch.setattr(ray, "get", values.__getitem__)
    return pool._results()


def test_an_actor_that_told_nothing_for_a_while_is_asked_once(clock, monkeypatch):
    told = []
    pool = Asked(3, told)
    pool.members[1].told = clock.seconds - pools.TOLD_EVERY + 1  # it finished a row just now
    pool.members[2].rows = {}
    pool._ask()
    pool._ask()
    assert [m.report for m in pool.members] == ["report 0", None, None]
    report = {"n": 7, "seconds": 5.0, "idle": 1.0, "start": 2.0}
    assert settle(pool, monkeypatch, {"report 0": report}) == []
    report |= {"actor": pool.members[0].number}
    assert told == [report]
    assert (pool.pace.seconds, pool.pace.rows, pool.left) == (2.0, 0, 3)
    pool._ask()
    assert pool.members[0].report is None  # it has told just now
    assert pool.members[1].report is None
    clock.seconds += pools.TOLD_EVERY + 1
    pool._ask()
    assert [m.report for m in pool.members] == ["report 0", "report 1", None]
    settle(pool, monkeypatch, {"report 0": {}, "report 1": {}})  # nothing was made
    assert told == [report]


def test_a_result_is_no_report(clock, monkeypatch):
    told = []
    pool = Asked(1, told)
    pool._ask()
    pool.members[0].rows["row 0"] = ({"n": 0}, clock.seconds - 9)
    pool.losses = {}
    result = {"n": 0, "seconds": 3.0, "idle": 0.0}
    result |= {"actor": pool.members[0].number}
    assert settle(pool, monkeypatch, {"row 0": result}) == [result]
    assert told == []
    assert (pool.left, pool.pace.rows, pool.members[0].report) == (0, 1, "report 0")


@pytest.mark.parametrize("actors", [1, 5, 40])
def test_a_pool_seems_no_slower_the_more_actors_it_has(actors):
    """Of rows of 8 s, half done one after another, each actor has four at once."""
    pace = Pace()
    assert pace.row(0) is None
    for rows in (0, 1, 3 * actors, 8 * actors):
        pace.rows, pace.seconds = rows, 8.0 * (rows + actors * 4 / 2)
        assert pace.row(4 * actors) == (pytest.approx(8.0) if rows else None)


def test_what_is_expected_holds_until_as_many_rows_have_ended_as_are_in_hand():
    pace = Pace(expected=5.0)
    pace.add({"seconds": 40.0, "idle": 0.0}, rows=3)
    assert pace.row(4) == 5.0
    pace.add({"seconds": 20.0, "idle": 2.0})
    assert pace.row(4) == pytest.approx(58 / 6)
    assert pace.row(0) == pytest.approx(58 / 4)


def test_many_actors_are_asked_less_often(clock):
    """2,000 actors: at most 20 a second, so each is asked after 100 s."""
    pool = Asked(2000, [])
    clock.seconds = 2000 / pools.ASKED_A_SECOND - 1
    pool._ask()
    assert not any(m.report for m in pool.members)
    clock.seconds += 2
    pool._ask()
    assert all(m.report for m in pool.members)


def test_without_a_watch_nobody_is_asked(clock):
    pool = Asked(2, [])
    pool.watch = None
    pool._ask()
    assert not any(m.report for m in pool.members)


class Slow:
    """A worker that tells three of four while its row waits for the event."""

    def __init__(self, begun: threading.Event, end: threading.Event):
        self.begun, self.end, self.untold = begun, end, 0

    def made(self) -> dict:
        told, self.untold = self.untold, 0
        return {"n": told} if told else {}

    def __call__(self, row: dict) -> dict:
        self.untold += 3
        self.begun.set()
        self.end.wait()
        self.untold += 1
        return row | self.made()


def test_an_actor_tells_while_its_row_runs_and_its_seconds_once():
    began, events = time.monotonic(), (threading.Event(), threading.Event())
    actor = ErrorCapturingWorker("p", Slow, dict(zip(("begun", "end"), events, strict=True)))
    assert actor.made() == {}  # the worker is not there
    done = []
    thread = threading.Thread(target=lambda: done.append(actor.work({"row": 1})))
    thread.start()
    events[0].wait()
    told = actor.made()
    assert actor.made() == {}
    events[1].set()
    thread.join()
    (result,) = done
    assert (told["n"], result["n"], result["row"]) == (3, 1, 1)
    assert told["seconds"] + result["seconds"] <= time.monotonic() - began
    assert told["idle"] + result["idle"] <= told["seconds"] + result["seconds"]


def test_whoever_watches_is_told_of_a_lost_actor(clock, monkeypatch):
    """By the number that its reports had."""
    told = []
    pool = Asked(2, told)
    monkeypatch.setattr(pool, "_release", pool.members.remove)
    pool._ask()
    settle(pool, monkeypatch, {"report 0": {"n": 1, "seconds": 1.0, "idle": 0.0}})
    pool.losses, pool.queue = Counter(), deque()
    pool._lose(pool.members[0], RuntimeError())
    assert [row.get("actor", row.get("lost")) for row in told] == 2 * [told[1]["lost"]]
    assert pool.members[0].number != told[1]["lost"]
