"""Pools of actors on a Ray of the test's own: how they grow, share a cluster, and shrink."""

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.waiting import LIMIT, wait_until

from wrpo_ray.config import Actors, ClusterConfig
from wrpo_ray.errors import WrpoError
from wrpo_ray.runtime import cluster, pool_members
from wrpo_ray.runtime import pool as pools
from wrpo_ray.runtime.allocator import ALLOCATOR
from wrpo_ray.runtime.placement import Pool
from wrpo_ray.runtime.tasks import run_in_threads
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step


@pytest.fixture(scope="module", autouse=True)
def _eight_cpus():
    """A Ray of eight logical CPUs."""
    with tempfile.TemporaryDirectory(prefix="wrpo-ray-") as folder:
        cluster.connect(ClusterConfig(num_cpus=8), Folder(folder), "tests")
        yield
        cluster.disconnect()


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """A pool leaves rows for actors that have room, however long a busy machine starts them."""
    monkeypatch.setattr(pools, "START_TIME", LIMIT)


class Sleeper:
    """An actor that takes its time for a row, or waits for a file, and tells who it is."""

    def __call__(self, row: dict) -> dict:
        began = time.time()
        time.sleep(row.get("sleeps", 0))
        if "until" in row:
            wait_until(Path(row["until"]).exists)
        return row | {"actor": os.getpid(), "began": began, "ended": time.time()}


@pytest.mark.parametrize("calls", [1, 2, 8])
@pytest.mark.parametrize("least", [1, 2])
def test_a_pool_reaches_its_most_actors_where_there_is_room(calls, least):
    """24 rows, eight CPUs, at most four actors: each of the four does some of them."""
    pool = Pool("grow", Actors(min=least, max=4), threads=calls)
    done = list(pools.map_rows(pool, [{"n": n, "sleeps": 0.5} for n in range(24)], Sleeper, {}))
    assert sorted(r["n"] for r in done) == list(range(24))
    assert len({r["actor"] for r in done}) == 4


def run_pools(*mapped: tuple[Pool, list[dict]]) -> list[list[dict]]:
    """Each pool in a thread of its own, as sources are; their results."""
    done: list[list[dict]] = [[] for _ in mapped]

    def work(number: int) -> None:
        pool, rows = mapped[number]
        done[number] += pools.map_rows(pool, rows, Sleeper, {})

    run_in_threads([lambda n=n: work(n) for n in range(len(mapped))])
    return done


def sleeps(count: int, seconds: float) -> list[dict]:
    return [{"n": n, "sleeps": seconds} for n in range(count)]


def actors_before(results: list[dict], moment: float) -> int:
    """How many actors had begun a row."""
    return len({r["actor"] for r in results if r["began"] < moment})


@pytest.mark.parametrize("calls", [1, 2])
def test_every_pool_has_its_first_actor_before_another_grows(calls, tmp_path):
    """Room for three actors and three pools of up to three: the two that go on grow later.

    Each of the two has rows that end when one of them has a second actor.
    """
    actors, grown = Actors(max=3, num_cpus=2.5), tmp_path / "grown"
    made = [Pool(name, actors, threads=calls) for name in ("short", "long", "longer")]
    rows = sleeps(4 * calls, 0.5) + held(4 * calls, grown)
    after(lambda: max(alive("long"), alive("longer")) > 1, grown.touch)
    short, *others = run_pools((made[0], sleeps(4 * calls, 0.5)), (made[1], rows), (made[2], rows))
    ended = max(r["ended"] for r in short)
    assert max(actors_before(results, ended) for results in others) <= 1
    assert ended - min(r["began"] for r in short) < LIMIT  # no row waits for actors without room
    assert max(len({r["actor"] for r in results}) for results in others) > 1


def test_a_pool_that_comes_later_goes_before_others_growth(tmp_path):
    """A CPU is left of what a growing pool has asked for: one that comes then gets the next."""
    end_blocks, end_grows = tmp_path / "blocks", tmp_path / "grows"
    pools_of = {
        "blocks": Pool("blocks", Actors(num_cpus=3)),
        "grows": Pool("grows", Actors(max=2, num_cpus=4)),
        "late": Pool("late", Actors(num_cpus=4)),
    }
    done: dict[str, list[dict]] = {name: [] for name in pools_of}

    def work(name: str, rows: list[dict]) -> None:
        for result in pools.map_rows(pools_of[name], rows, Sleeper, {}):
            done[name].append(result)

    def come() -> None:
        """When two rows are done, so that the second actor is asked for and waits."""
        wait_until(lambda: len(done["grows"]) >= 2)
        after(lambda: ALLOCATOR.lacking and not states("grows") - ENDS, end_blocks.touch)
        work("late", sleeps(2, 0.5))
        end_grows.touch()

    run_in_threads(
        [
            lambda: work("blocks", held(1, end_blocks)),
            lambda: work("grows", sleeps(4, 0.5) + held(4, end_grows)),
            come,
        ]
    )
    assert actors_before(done["grows"], min(r["began"] for r in done["late"])) == 1
    assert len(done["late"]) == 2


def held(count: int, until: Path) -> list[dict]:
    """Rows that end when a file is there."""
    return [{"n": n, "until": str(until)} for n in range(count)]


def after(is_true: Callable[[], object], then: Callable[[], object]) -> None:
    """Do something, in a thread, as soon as a condition holds."""

    def work() -> None:
        wait_until(is_true)
        then()

    threading.Thread(target=work, daemon=True).start()


ENDS = {"ALIVE", "DEAD"}
"""States of an actor that does not wait for room."""


def states(pool: str) -> set[str]:
    from ray._private.state import actors

    return {a["State"] for a in actors().values() if a["ActorClassName"] == pool}


def alive(pool: str) -> int:
    """Actors of a pool, as Ray's dashboard shows them."""
    from ray._private.state import actors

    return sum(a["ActorClassName"] == pool and a["State"] == "ALIVE" for a in actors().values())


def test_a_pool_that_waits_for_rows_shrinks_and_grows_again(monkeypatch):
    monkeypatch.setattr(pools, "IDLE_TIMEOUT", 1.0)
    followed, done = Step("followed"), []
    ready_queue, pool = pools.ReadyQueue([followed]), Pool("follows", Actors(max=3))
    rows = [{"job": 0, "bucket": n} for n in range(61)]
    results = pools.map_rows(pool, rows, Waits, {}, ready_queue)
    taker = threading.Thread(target=lambda: done.extend(results))
    taker.start()
    for first in (0, 30):
        for bucket in range(first, first + 30):
            ready_queue.add(followed, bucket)
        wait_until(lambda: alive("follows") == 3)
        wait_until(lambda: alive("follows") == 1)
    ready_queue.add(followed, 60)
    taker.join(LIMIT)
    assert sorted(r["bucket"] for r in done) == list(range(61))
    wait_until(lambda: not alive("follows"))


class Waits:
    """An actor that takes its time for a bucket."""

    def __call__(self, row: dict) -> dict:
        time.sleep(0.5)
        return row


def test_actors_that_never_start_are_told(tmp_path):
    """Their class cannot be had on the nodes: three are tried, then the cause is told."""
    pool = Pool("never", Actors(max=2))
    with pytest.raises(WrpoError, match="^never failed: .*no such module here"):
        list(pools.map_rows(pool, sleeps(4, 0), Sleeper, {"x": Unreadable()}))


class Dies:
    """An actor whose process ends at one row."""

    def __call__(self, row: dict) -> dict:
        if row["n"] == 2:
            os._exit(1)
        return row


def test_a_row_that_ends_every_actor_ends_the_pool(monkeypatch, capfd):
    """It would be given to one after another, without an end; others' rows are done before."""
    monkeypatch.setattr(pools, "ROW_LOSSES", 1)
    with pytest.raises(WrpoError, match="^dies failed: "):
        list(pools.map_rows(Pool("dies", Actors(max=2)), sleeps(4, 0), Dies, {}))
    assert "dies: an actor was lost" in capfd.readouterr().err


def test_a_pool_without_room_says_what_it_waits_for(monkeypatch, tmp_path):
    """Another pool holds all CPUs until that is said."""
    said: list[str] = []
    monkeypatch.setattr(pool_members, "WAITING_INTERVAL", 1.0)
    monkeypatch.setattr(pool_members, "log", said.append)
    message = "waits: waiting for its first actor, which needs 8 CPU"
    after(lambda: message in said, (tmp_path / "end").touch)

    def wait() -> None:
        wait_until(lambda: alive("holds") == 1)
        list(pools.map_rows(Pool("waits", Actors(num_cpus=8)), sleeps(1, 0), Sleeper, {}))

    holds = Pool("holds", Actors(num_cpus=8))
    rows = held(1, tmp_path / "end")
    run_in_threads([lambda: list(pools.map_rows(holds, rows, Sleeper, {})), wait])
    assert message in said


class Unreadable:
    """An argument that no other process can read."""

    def __reduce__(self):
        return _unread, ()


def _unread() -> None:
    raise ImportError("no such module here")


class Teller:
    """An actor whose rows end when a file is there, and that tells what it made before."""

    def __init__(self) -> None:
        self.lock, self.untold = threading.Lock(), 0

    def made(self) -> dict:
        """What was made since the last report."""
        with self.lock:
            told, self.untold = self.untold, 0
        return {"n": told, "start": 0.0} if told else {}

    def __call__(self, row: dict) -> dict:
        with self.lock:
            self.untold += 3
        wait_until(Path(row["until"]).exists)
        with self.lock:
            self.untold += 1
        return row | {"n": self.made().get("n", 0), "start": 0.0}


def test_what_an_actor_makes_of_unfinished_rows_is_told_once(monkeypatch, tmp_path):
    """No row can end before the report of both; with the results it makes each number once."""
    monkeypatch.setattr(pools, "TOLD_EVERY", 0.1)
    end, told = tmp_path / "end", []

    def watch(report: dict) -> None:
        told.append(report)
        if sum(report["n"] for report in told) == 6:
            end.touch()

    pool, rows = Pool("tell", Actors(max=1), threads=2), [{"until": str(end)} for _ in range(2)]
    began = time.monotonic()
    done = list(pools.map_rows(pool, rows, Teller, {}, watch=watch))
    passed = time.monotonic() - began
    assert sum(report["n"] for report in told) == 6
    assert sum(row["n"] for row in done) == 2
    assert 0 < sum(r["seconds"] for r in [*told, *done]) < passed
