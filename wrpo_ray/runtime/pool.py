"""Pools of actors: how many run, when a pool grows or shrinks, and which rows each actor gets.

A pool requests `min` actors from Ray first, then those that the process's allocator gives it, as
long as there is a row for each. Requests for more, up to `max`, stay open for nodes that are not
there yet: Ray's autoscaler sees them as demand, and room that becomes free is the allocator's to
give. They are withdrawn while another pool lacks its first actors. An actor gets a new row when it
finishes one, and has `threads` of them at most; the rows of a lost actor go to the others. Not
covered: how pools of several drivers share a cluster.
"""

import math
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from wrpo_ray.runtime.allocation import Demand, Share
from wrpo_ray.runtime.allocator import ALLOCATOR, Report
from wrpo_ray.runtime.connection import CONNECTION, ClosedError
from wrpo_ray.runtime.placement import Pool, capacity_for, check_capacity, is_own_ray
from wrpo_ray.runtime.pool_members import (
    Member,
    Pace,
    WaitingLog,
    end_member,
    loss_errors,
    remove_groups,
    start_member,
)
from wrpo_ray.runtime.prefetch import PREFETCH
from wrpo_ray.runtime.progress import log
from wrpo_ray.runtime.ready_queue import ReadyQueue, Row
from wrpo_ray.runtime.worker_errors import restore_error, summarize_error

TICK = 0.2
"""Seconds between two checks of how many actors a pool should have, if nothing else happens."""
START_TIME = 20.0
"""Seconds within which an actor that has room is expected to answer. For this long, a pool that
has just started keeps back one row for each requested actor that had room."""
PLACED_FOR = 60.0
"""Seconds for which an actor that does not answer counts as one on the node that it was given; by
then its process, of many on a node, has started, or there was no room."""
SEEN_AFTER = 5.0
"""Seconds after which Ray shows the room of an actor that has ended, and another pool has it."""
MOST_OPEN = 256
"""Open requests of a pool for nodes to come, at the most: each names the nodes that are there."""
IDLE_TIMEOUT = 30.0
"""Seconds without a row, while more are expected, after which an actor beyond `min` is ended."""
SHORT_ROW = 0.1
"""Seconds: for rows that take less it is not worth waiting for another actor."""
START_LOSSES = 3
"""Actors in a row that may be lost before they answered."""
TOLD_EVERY, ASKED_A_SECOND = 5.0, 20
"""Seconds after which an actor without a finished row is asked what it has made, and how many are
asked in a second, at most: a thousand of them each 50 s."""
ROW_LOSSES = 5
"""Actors that may be lost while they work on the same row."""


def map_rows(
    pool: Pool,
    rows: list[Row],
    worker: type,
    arguments: dict[str, Any],
    ready_queue: ReadyQueue | None = None,
    watch: Callable[[Row], None] | None = None,
) -> Iterator[Row]:
    """Map rows across a pool of `worker` actors; yield results as they finish.

    Each result has `seconds`, the actor's time since it started or returned its last result, and
    `idle`, how many of them it had no row.

    The rows of a lost actor or node are tried again, with a field `is_again`, so a worker commits
    its own results and skips what is committed. With a `ready_queue` the rows are taken from it as
    they become ready, as many as `rows` has.

    `watch` gets what a worker has made of rows that are not finished, as its method `made` tells,
    with `seconds` and `idle` since its last report or result, which then has only the rest. Then
    reports and results have the number of their `actor`, and one that is lost is told as `lost`.

    Raises:
        WrpoError: as raised by the worker, or one that names the pool and the cause.
    """
    import ray

    made = {"what": pool.what, "worker": worker, "arguments": arguments}
    queue = ready_queue or ReadyQueue.of(rows)
    running = RunningPool(pool, len(rows), made, queue, watch)
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


class RunningPool:
    """The state of a pool while it maps rows: its actors, waiting rows and losses."""

    def __init__(
        self,
        pool: Pool,
        count: int,
        arguments: dict[str, Any],
        ready_queue: ReadyQueue,
        watch: Callable[[Row], None] | None = None,
    ):
        import ray

        self.pool, self.arguments = pool, arguments
        self.ready_queue, self.watch = ready_queue, watch
        self.needs = {name: n for name, n in pool.needs.items() if n}
        is_fixed = is_own_ray()
        most = min(pool.actors.max, capacity_for(pool.needs)) if is_fixed else pool.actors.max
        self.most_open = 0 if is_fixed else MOST_OPEN
        self.least = min(pool.actors.min, count)
        self.most = max(self.least, min(most, count))
        self.left = count
        """Rows without a result."""
        self.to_come = count
        """Rows that are not ready yet."""
        self.queue: deque[Row] = deque()
        """Rows that are ready and not assigned."""
        self.members: list[Member] = []
        self.share = Share(0)
        """The allocator's last decision."""
        self.left_at = -math.inf
        """When the last actor ended for another pool."""
        self.starts_until = math.inf
        """`START_TIME` after the first actor answered."""
        self.pace = Pace(expected=pool.row, expected_start=pool.startup)
        self.rows_are_short = False
        """Whether the last row took next to no time, such as one whose result was there."""
        self.waiting_log = WaitingLog(pool.what, self.needs)
        self.lost_starts = 0
        self.losses: Counter[int] = Counter()
        """{id of a row without a result: actors lost while they worked on it}"""
        self.groups = f"{uuid.uuid4().hex}-"
        self.session = ray.get_runtime_context().get_worker_id()

    def advance(self) -> list[Row]:
        """Take ready rows, resize the pool, assign rows; return the results that came in."""
        self._check_connection()
        taken = list(self.ready_queue.take())
        self.queue += taken
        self.to_come -= len(taken)
        self._resize()
        self._assign_rows()
        self._ask()
        return self._results()

    def end(self) -> None:
        """End all actors; their placement groups are gone when this returns."""
        ALLOCATOR.leave(self.groups)
        with suppress(ClosedError), CONNECTION.in_use():  # a closed connection ended them
            self._check_connection()
            for member in list(self.members):
                self._release(member)
            if self.pool.parts > 1:
                remove_groups(self.groups)

    def _check_connection(self) -> None:
        """Raise ClosedError where Ray is closed, or connected anew without these actors."""
        import ray

        if self.session != ray.get_runtime_context().get_worker_id():
            raise ClosedError(f"{self.pool.what}: the connection to Ray was closed")

    # --- number of actors

    @property
    def ready(self) -> list[Member]:
        """Actors that have answered."""
        return [m for m in self.members if m.starting is None and not m.is_leaving]

    @property
    def _least_now(self) -> int:
        """`min`, or 0 when every row is assigned."""
        return self.least if self.queue or self.to_come else 0

    def _resize(self) -> None:
        """Request actors for waiting rows, the minimum first; end those without a row.

        Beyond the minimum, those that the allocator gives come first; the others wait for nodes to
        come, unless another pool lacks its first actors.
        """
        ready, waiting, least = len(self.ready), len(self.queue), self._least_now
        self.waiting_log.tick(is_waiting=bool(self.members) and not ready)
        busy = ready + waiting if self._is_starting else max(ready, waiting)
        demand = self._demand(busy)
        in_hand = sum(len(m.rows) for m in self.members) if self.watch else 0
        row = self.pace.row(in_hand)
        share = ALLOCATOR.share(Report(demand, row, self._nodes_of(self._placed)))
        self._let_leave(share)
        held = self._take_places(share, most=busy if ready >= least else least)
        placed, wanted = len(self._placed), least
        if ready >= least and not share.gives_way:
            wanted = min(busy, demand.wanted, placed + self.most_open)
        self._request(least - held, wanted - held)
        useful = placed if share.gives_way else ready + waiting
        self._shrink(max(least, useful), at_once=share.gives_way or not least)

    def _request(self, least: int, wanted: int) -> None:
        """Request first actors wherever there is room, and others on nodes that are not there."""
        nodes = ALLOCATOR.names
        for member in [m for m in self.members if m.waits_for_node and m.beyond != nodes]:
            self._release(member)  # what was to come is there
        count = len(self._staying)
        self.members += [self._start("") for _ in range(count, least)]
        self.members += [self._start("", beyond=nodes) for _ in range(max(count, least), wanted)]

    @property
    def _staying(self) -> list[Member]:
        return [m for m in self.members if not m.is_leaving]

    def _let_leave(self, share: Share) -> None:
        """Give no more rows to actors whose places another pool gets; end those without a row."""
        if share is not self.share:  # one of the allocator's decisions serves several ticks
            self.share = share
            for place in share.leave:
                found = [m for m in self.ready if place in ("", m.place)]
                if found:
                    min(found, key=lambda m: len(m.rows)).is_leaving = True
        for member in list(self.members):
            if member.is_leaving and not member.rows:
                self.left_at = time.monotonic()
                self._release(member)

    @property
    def _leaving(self) -> int:
        """Actors that leave, and one whose room Ray may not show yet."""
        is_unseen = time.monotonic() - self.left_at < SEEN_AFTER
        return len(self.members) - len(self._staying) + is_unseen

    @property
    def _placed(self) -> list[Member]:
        """Actors that have answered, or that are starting on the node that they were given."""
        recent = time.monotonic() - PLACED_FOR
        starting = [m for m in self.members if m.starting is not None]
        return self.ready + [m for m in starting if m.place and m.since > recent]

    def _nodes_of(self, members: list[Member]) -> list[str]:
        """Nodes of whole actors; parts on several nodes are only seen by Ray."""
        is_whole = self.pool.parts == 1 or ALLOCATOR.one_node_holds(self.needs)
        return [member.place for member in members] if is_whole else []

    def _demand(self, busy: int) -> Demand:
        """The request to the allocator: also room for rows that are to come."""
        most = min(self.most, busy + self.to_come)
        bundles = self.pool.bundles if self.pool.parts > 1 else []
        return Demand(
            self.groups, self.needs, self.left, self.pace.startup, len(self._placed),
            self._least_now, max(most, self._least_now), bundles,
            self._leaving, self.ready_queue.follows, self.pace.rows > 0, self._nodes_of(self.ready),
        )  # fmt: skip

    def _take_places(self, share: Share, most: int) -> int:
        """Give places to actors that wait for room, and then to new ones, up to `most`.

        Returns the places that are left alone because their weights are still on the way.
        """
        count = min(share.engines, most) - len(self._placed)
        open_ones, held = [m for m in self._staying if m not in self._placed], 0
        for (place, *_), _ in zip(share.places, range(count), strict=False):
            if not PREFETCH.is_ready(place, self.pool.models):
                held += 1
            elif open_ones and not open_ones[0].waits_for_node:
                member = open_ones.pop(0)
                member.place, member.since = place, time.monotonic()
            else:
                if open_ones:
                    self._release(open_ones.pop(0))
                self.members.append(self._start(place))
        return held

    def _shrink(self, keep: int, *, at_once: bool) -> None:
        """End actors beyond `keep` that have not answered, and ready ones without a row.

        While rows may come, a ready one is ended after `IDLE_TIMEOUT` only.
        """
        now = time.monotonic()
        starting = [m for m in self.members if m.starting is not None]
        starting.sort(key=lambda m: not m.place)  # those that wait for room are ended first
        idle = [m for m in self.ready if not m.rows and (at_once or now - m.since > IDLE_TIMEOUT)]
        for member in starting[::-1][: max(0, len(self._staying) - keep)]:
            self._release(member)
        for member in idle[: 0 if self.queue else max(0, len(self._staying) - self._least_now)]:
            self._release(member)

    def _start(self, place: str, beyond: tuple[str, ...] = ()) -> Member:
        return start_member(self.pool, self.arguments, self.groups, place, beyond)

    def _release(self, member: Member) -> None:
        self.members.remove(member)
        end_member(member)

    # --- rows and results

    @property
    def _is_starting(self) -> bool:
        """Whether actors may still be few because the first one has only just answered."""
        return time.monotonic() < self.starts_until and not self.rows_are_short

    def _assign_rows(self) -> None:
        """Assign rows to the actors with the fewest, at most an equal share of all that are left.

        Actors that have room and have not answered yet count as well, however long they take.
        While the pool is starting, one row is kept for each actor that has room and is expected.
        """
        ready, now = self.ready, time.monotonic()
        coming = [m for m in self.members if m.starting is not None and m.has_room]
        sharing, kept = len(ready) + len(coming), 0
        if self._is_starting:
            sharing, kept = self.most, sum(now - m.since < START_TIME for m in coming)
        most = min(self.pool.threads, math.ceil(self.left / max(1, sharing)))
        while ready and len(self.queue) > max(0, kept - self.to_come):
            member = min(ready, key=lambda m: (len(m.rows), m.assigned))
            if len(member.rows) >= most:
                break
            row, member.assigned = self.queue.popleft(), member.assigned + 1
            member.rows[member.handle.work.remote(row)] = row, time.monotonic()

    def _ask(self) -> None:
        """Ask actors that have told nothing for a while what they have made."""
        before = time.monotonic() - max(TOLD_EVERY, len(self.members) / ASKED_A_SECOND)
        for member in self.members if self.watch else []:
            if member.rows and member.report is None and member.told < before:
                member.report, member.told = member.handle.made.remote(), time.monotonic()

    def _results(self) -> list[Row]:
        """Results that are ready within a tick."""
        import ray

        by_object = {m.starting: m for m in self.members if m.starting is not None}
        by_object |= {result: m for m in self.members for result in m.rows}
        by_object |= {m.report: m for m in self.members if m.report is not None}
        if not by_object:
            time.sleep(TICK)
            return []
        done, _ = ray.wait(list(by_object), timeout=TICK)
        results = []
        for found in done:
            member = by_object[found]
            try:
                results += self._settle(member, found, ray.get(found))
            except loss_errors() as error:
                self._lose(member, error)
        return results

    def _settle(self, member: Member, found: Any, value: Row) -> list[Row]:
        """Note an actor's first answer, or return the result of a row that it finished."""
        if found is member.report:
            member.report = None
            if value and self.watch:  # what it made of unfinished rows
                self.pace.add(value, rows=0)
                self.watch(value | {"actor": member.number})
            return []
        member.since = member.told = time.monotonic()
        if member.starting is not None:
            member.starting, member.place, self.lost_starts = None, str(value), 0
            self.starts_until = min(self.starts_until, member.since + START_TIME)
            return []
        row, assigned = member.rows.pop(found)
        self.losses.pop(id(row), None)
        self.rows_are_short = member.since - assigned < SHORT_ROW
        if not self.rows_are_short:
            self.pace.add(value)
        self.left -= 1
        return [value | {"actor": member.number} if self.watch else value]

    def _lose(self, member: Member, error: Exception) -> None:
        """Put the rows of a lost actor back to the front of the queue.

        Raises:
            Exception: `error`, if too many were lost before they answered, or with the same row.
        """
        rows = [row for row, _ in member.rows.values()]
        self.losses.update(map(id, rows))
        self.lost_starts += member.starting is not None
        most = max((self.losses[id(row)] for row in rows), default=0)
        if self.lost_starts > START_LOSSES or most > ROW_LOSSES:
            raise error
        log(f"{self.pool.what}: an actor was lost; its rows go to another one")
        if self.watch:
            self.watch({"lost": member.number})
        for row in rows:
            row["is_again"] = True
        self.queue.extendleft(reversed(rows))
        self._release(member)
