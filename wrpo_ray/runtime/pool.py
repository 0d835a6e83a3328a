"""Pools of actors that map rows: they grow while rows wait and there is room, and shrink after.

A pool asks Ray for `min` actors first, and for more, up to `max`, as long as it has a row for
each. What has no room yet stays asked for: Ray's autoscaler sees it as demand. Pools of one driver
run side by side: none grows into the room that another one's first actors wait for. An actor is
given rows as it finishes others, none ahead; a lost actor's rows go to the others. Not covered:
how pools of several drivers share a cluster.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from wrpo_ray.errors import WrpoError
from wrpo_ray.runtime.connection import CONNECTION, ClosedError
from wrpo_ray.runtime.placement import (
    Pool,
    capacity_for,
    check_capacity,
    is_own_ray,
)
from wrpo_ray.runtime.progress import log
from wrpo_ray.runtime.ready_queue import ReadyQueue, Row
from wrpo_ray.runtime.worker_errors import capture_error, restore_error, summarize_error

TICK = 0.2
"""Seconds between looks at how many actors a pool should have, where nothing else happens."""
SOON = 20.0
"""Seconds within which an actor that has room answers: for so long a pool that begins leaves rows
for those that it asked for and that had room."""
IDLE = 30.0
"""Seconds without a row, while others are still to come, after which an actor beyond `min` ends."""
QUICK = 0.1
"""Seconds: rows that take less are not worth waiting for another actor."""
START_LOSSES = 3
"""Actors in a row that may be lost before they answered."""
WAITING = 60.0
"""Seconds between two lines that say that a pool has no actor for want of room."""
ROW_LOSSES = 5
"""Actors that may be lost with the same row in hand, with their nodes or by themselves."""


def map_rows(
    pool: Pool,
    rows: list[Row],
    worker: type,
    arguments: dict[str, Any],
    ready_queue: ReadyQueue | None = None,
) -> Iterator[Row]:
    """Map rows across a pool of `worker` actors; results come as they finish.

    Each result has `seconds`: how long the actor took since it started or had its last result;
    and `idle`: for how many of them it had no row.

    The rows of a lost actor or node are tried again, so a worker has to commit its own results
    and pass over what is committed. With a `ready_queue` the rows are taken
    from it as they become ready, as many as `rows` has.

    Raises:
        WrpoError: as raised by the worker, or one that names the pool and the cause.
    """
    import ray

    made = {"what": pool.what, "worker": worker, "arguments": arguments}
    running = _RunningPool(pool, len(rows), made, ready_queue or ReadyQueue.of(rows))
    check_capacity(pool.what, running.least, "actors", pool.needs)
    try:
        while running.left:
            with CONNECTION.in_use():
                results = running.advance()
            for result in results:
                if "error" in result:
                    raise restore_error(result)
                yield result
    except ray.exceptions.RayError as error:
        raise summarize_error(error, pool.what) from error
    finally:
        running.end()


class _Minimums:
    """What the pools of this driver still wait for until each has its first `min` actors."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, dict[str, float]] = {}
        self._free: dict[str, float] = {}
        self._looked = -math.inf

    def tell(self, pool: _RunningPool, *, waits: bool) -> None:
        """Whether a pool waits for some of its first actors."""
        with self._lock:
            if waits:
                self._waiting[id(pool)] = pool.needs
            else:
                self._waiting.pop(id(pool), None)

    def need_room_of(self, pool: _RunningPool) -> bool:
        """Whether another pool waits for a resource that one more actor of this one would take."""
        with self._lock:
            others = [needs for key, needs in self._waiting.items() if key != id(pool)]
            free = self._free_now() if others else {}
        for needs in others:
            short = {name for name, n in needs.items() if n > free.get(name, 0)}
            if (short or set(needs)) & set(pool.needs):  # short of nothing, it is being placed
                return True
        return False

    def _free_now(self) -> dict[str, float]:
        """What the cluster has free, looked up once a second for all pools."""
        import ray

        if time.monotonic() - self._looked >= 1:
            self._free, self._looked = ray.available_resources(), time.monotonic()
        return self._free


_MINIMUMS = _Minimums()


@dataclass(eq=False)
class _Member:
    """An actor of a pool, from when it is asked for."""

    handle: Any
    starting: Any
    """An object that is there when the actor answers; None after that."""
    group: Any = None
    """Its placement group, where it has one of its own."""
    has_room: bool = True
    """Whether there was room for it when it was asked for."""
    since: float = field(default_factory=time.monotonic)
    """When it was asked for, first answered, or finished its last row."""
    rows: dict[Any, tuple[Row, float]] = field(default_factory=dict)
    """In hand, with when each was given, by the objects that their results will be."""
    given: int = 0
    """Rows that it was ever given."""


class _RunningPool:
    """A pool at work."""

    def __init__(self, pool: Pool, count: int, made: dict[str, Any], ready_queue: ReadyQueue):
        import ray

        self.pool, self.made, self.ready_queue = pool, made, ready_queue
        self.needs = {name: n for name, n in pool.needs.items() if n}
        most = min(pool.actors.max, capacity_for(pool.needs)) if is_own_ray() else pool.actors.max
        self.least = min(pool.actors.min, count)
        self.most = max(self.least, min(most, count))
        self.left = count
        """Rows without a result."""
        self.to_come = count
        """Rows that the ready_queue did not give yet."""
        self.queue: deque[Row] = deque()
        self.members: list[_Member] = []
        self.begins_until = math.inf
        """`SOON` after the first actor answered."""
        self.is_held_back = False
        """Whether others' first actors go before more of these."""
        self.is_quick = False
        """Whether the last row took next to no time, as one that was done before."""
        self.told_waiting = time.monotonic()
        self.lost_starts = 0
        self.losses: Counter[int] = Counter()
        """Actors that were lost with a row in hand, by the id of a row without a result."""
        self.groups = f"{uuid.uuid4().hex}-"
        self.session = ray.get_runtime_context().get_worker_id()

    def advance(self) -> list[Row]:
        """Take what is ready, start and end actors, give them rows; the results that came in."""
        self._check_connection()
        taken = list(self.ready_queue.take())
        self.queue += taken
        self.to_come -= len(taken)
        self._resize()
        self._give_rows()
        return self._results()

    def end(self) -> None:
        """End all actors; a placement group is gone when this returns."""
        _MINIMUMS.tell(self, waits=False)
        with suppress(ClosedError), CONNECTION.in_use():  # else they are gone with it
            self._check_connection()
            for member in list(self.members):
                self._release(member)
            if self.pool.parts > 1:
                _free(self.groups)

    def _check_connection(self) -> None:
        """A later one of this process has none of these actors."""
        import ray

        if self.session != ray.get_runtime_context().get_worker_id():
            raise ClosedError(f"{self.pool.what}: the connection to Ray was closed")

    # --- how many actors

    @property
    def ready(self) -> list[_Member]:
        """Actors that answer."""
        return [m for m in self.members if m.starting is None]

    @property
    def _least_now(self) -> int:
        """`min`, until there is no row that an actor could still be given."""
        return self.least if self.queue or self.to_come else 0

    def _resize(self) -> None:
        """Ask for actors that have a row waiting, the least ones first; end those that have none.

        Those that others' first actors need the room of are ended, if they are not there yet.
        """
        ready, waiting, least = len(self.ready), len(self.queue), self._least_now
        _MINIMUMS.tell(self, waits=ready < least)
        self._tell_waiting()
        self.is_held_back = _MINIMUMS.need_room_of(self)
        grows = ready >= least and not self.is_held_back
        wanted = min(self.most, ready + waiting if self._begins else waiting) * grows
        lacking = max(least, wanted) - len(self.members)
        room = self._room() if lacking > 0 else 0
        self.members += [self._start(has_room=n < room) for n in range(lacking)]
        useful = 0 if self.is_held_back else ready + waiting
        self._shrink(max(least, useful), at_once=self.is_held_back or not least)

    def _tell_waiting(self) -> None:
        """Say once a minute that no actor is there, as where others hold all the room."""
        now = time.monotonic()
        if self.ready or not self.members:
            self.told_waiting = now
        elif now - self.told_waiting > WAITING:
            self.told_waiting = now
            needs = ", ".join(f"{n:g} {name}" for name, n in self.needs.items())
            log(f"{self.pool.what}: waiting for its first actor, which needs {needs}")

    def _room(self) -> int:
        """How many more actors the cluster has room for just now."""
        import ray

        free = ray.available_resources()
        fitting = [int(free.get(name, 0) // n) for name, n in self.needs.items()]
        return min(fitting, default=self.most)

    def _shrink(self, keep: int, *, at_once: bool) -> None:
        """End actors beyond so many that are not there yet, and those that are and have no row.

        While rows may come, one that answers is kept for a while.
        """
        now = time.monotonic()
        starting = [m for m in self.members if m.starting is not None]
        idle = [m for m in self.ready if not m.rows and (at_once or now - m.since > IDLE)]
        for member in starting[::-1][: max(0, len(self.members) - keep)]:
            self._release(member)
        for member in idle[: 0 if self.queue else max(0, len(self.members) - self._least_now)]:
            self._release(member)

    def _start(self, *, has_room: bool) -> _Member:
        import ray
        from ray.util import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as InGroup

        pool, actors, group = self.pool, self.pool.actors, None
        where: dict[str, Any] = {
            "num_gpus": actors.num_gpus or None,
            "resources": actors.resources or None,
            "scheduling_strategy": "SPREAD",
        }
        if pool.parts > 1:  # vLLM starts its own workers in the group that it finds itself in
            group = placement_group(pool.bundles, name=f"{self.groups}{uuid.uuid4().hex}")
            where = {"scheduling_strategy": InGroup(group, 0, True)}
        handle = (
            ray.remote(type(pool.what, (_Guarded,), {}))  # under the name that dashboards show
            .options(
                num_cpus=actors.num_cpus,
                max_concurrency=pool.threads,
                runtime_env={"env_vars": pool.env},
                **where,
            )
            .remote(**self.made)
        )
        return _Member(handle, handle.answers.remote(), group, has_room)

    def _release(self, member: _Member) -> None:
        """End an actor; one that answers and has no row ends by itself, as it is dropped."""
        import ray
        from ray.util import remove_placement_group

        self.members.remove(member)
        if member.group:
            remove_placement_group(member.group)
        elif member.rows or member.starting is not None:
            ray.kill(member.handle)

    # --- rows and results

    @property
    def _begins(self) -> bool:
        """Whether actors may still be few because the first one has only just answered."""
        return time.monotonic() < self.begins_until and not self.is_quick

    def _give_rows(self) -> None:
        """Rows to those with the fewest, to each at most its share of all that are left.

        A pool that begins leaves a row for each actor that has room and will soon be there.
        """
        ready, now = self.ready, time.monotonic()
        sharing, left_over = len(ready), 0
        if self._begins:
            coming = [m for m in self.members if m.starting is not None and m.has_room]
            sharing, left_over = self.most, sum(now - m.since < SOON for m in coming)
        most = min(self.pool.threads, math.ceil(self.left / max(1, sharing)))
        while ready and len(self.queue) > max(0, left_over - self.to_come):
            member = min(ready, key=lambda m: (len(m.rows), m.given))
            if len(member.rows) >= most:
                break
            row, member.given = self.queue.popleft(), member.given + 1
            member.rows[member.handle.work.remote(row)] = row, time.monotonic()

    def _results(self) -> list[Row]:
        """Results that are there, or become so within a tick."""
        import ray

        by_object = {m.starting: m for m in self.members if m.starting is not None}
        by_object |= {result: m for m in self.members for result in m.rows}
        if not by_object:
            time.sleep(TICK)
            return []
        done, _ = ray.wait(list(by_object), timeout=TICK)
        results = []
        for found in done:
            member = by_object[found]
            try:
                results += self._settle(member, found, ray.get(found))
            except _losses() as error:
                self._lose(member, error)
        return results

    def _settle(self, member: _Member, found: Any, value: Row) -> list[Row]:
        """An actor answers for the first time, or has finished a row, whose result is returned."""
        member.since = time.monotonic()
        if member.starting is not None:
            member.starting, self.lost_starts = None, 0
            self.begins_until = min(self.begins_until, member.since + SOON)
            return []
        row, given = member.rows.pop(found)
        self.losses.pop(id(row), None)
        self.is_quick = member.since - given < QUICK
        self.left -= 1
        return [value]

    def _lose(self, member: _Member, error: Exception) -> None:
        """An actor is gone: its rows are given to others, before all that wait.

        Raises:
            Exception: `error`, where too many were lost at their start, or with the same row.
        """
        rows = [row for row, _ in member.rows.values()]
        self.losses.update(map(id, rows))
        self.lost_starts += member.starting is not None
        most = max((self.losses[id(row)] for row in rows), default=0)
        if self.lost_starts > START_LOSSES or most > ROW_LOSSES:
            raise error
        log(f"{self.pool.what}: an actor was lost; what it had in hand is given to another one")
        self.queue.extendleft(reversed(rows))
        self._release(member)


def _losses() -> tuple[type[Exception], ...]:
    """What Ray raises for an actor that is gone, or whose result is."""
    from ray import exceptions as ray

    gone = (ray.RayActorError, ray.WorkerCrashedError, ray.NodeDiedError)
    return (*gone, ray.OutOfMemoryError, ray.ObjectLostError)


def _free(groups: str) -> None:
    """Remove the placement groups of this name, and wait until their resources are free."""
    from ray.util import get_placement_group, placement_group_table, remove_placement_group

    deadline = time.monotonic() + 60
    while True:
        found = [g for g in placement_group_table().values() if g["name"].startswith(groups)]
        left = [g for g in found if g["state"] != "REMOVED"]
        if not left:
            return
        if time.monotonic() > deadline:
            raise WrpoError(f"{len(left)} placement groups could not be removed within 60 s")
        for entry in left:
            with suppress(ValueError):  # removed in the meantime
                remove_placement_group(get_placement_group(entry["name"]))
        time.sleep(0.1)


class _Guarded:
    """A worker whose errors are results: raised, they come wrapped in Ray's, with long traces."""

    def __init__(self, what: str, worker: type, arguments: dict[str, Any]):
        self.what, self.worker, self.arguments = what, worker, arguments
        self._making = threading.Lock()
        self._clock = _Clock()

    def answers(self) -> None:
        """Nothing: that it was called tells that the actor is there."""

    @cached_property
    def _made(self) -> Callable[[Row], Row]:
        return self.worker(**self.arguments)

    def work(self, row: Row) -> Row:
        """The worker's result, or what went wrong."""
        self._clock.begin()
        return capture_error(self.what, self._work, row) | self._clock.end()

    def _work(self, row: Row) -> Row:
        with self._making:
            made = self._made
        return made(row)


class _Clock:
    """How long an actor held its place and how long it waited; threads call at once."""

    def __init__(self) -> None:
        self._lock, self._in_hand, self._idle = threading.Lock(), 0, 0.0
        self._told = self._ended = time.monotonic()

    def begin(self) -> None:
        """A row is taken in hand."""
        with self._lock:
            if not self._in_hand:
                self._idle += time.monotonic() - self._ended
            self._in_hand += 1

    def end(self) -> dict[str, float]:
        """A row is done: `seconds` since the last one was, each told once, `idle` among them."""
        with self._lock:
            self._in_hand -= 1
            self._ended = time.monotonic()
            told = {"seconds": self._ended - self._told, "idle": self._idle}
            self._told, self._idle = self._ended, 0.0
            return told
