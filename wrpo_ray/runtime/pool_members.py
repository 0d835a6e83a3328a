"""One actor of a pool: its start, its end, and the errors that mean that it is lost."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any

from wrpo_ray.errors import WrpoError
from wrpo_ray.runtime.allocator import ALLOCATOR
from wrpo_ray.runtime.placement import Pool, thread_env
from wrpo_ray.runtime.progress import log
from wrpo_ray.runtime.ready_queue import Row
from wrpo_ray.runtime.weights import use_peers
from wrpo_ray.runtime.worker_errors import capture_error


class ErrorCapturingWorker:
    """Run a worker and return its errors as results.

    Ray would wrap a raised error in errors of its own, with long traces.
    """

    def __init__(self, what: str, worker: type, arguments: dict[str, Any]):
        self.what, self.worker, self.arguments = what, worker, arguments
        self._loading = threading.Lock()
        self._clock = BusyClock()
        use_peers()

    def answers(self) -> str:
        """Return the id of the actor's node at once; the call shows that the actor is up."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    @cached_property
    def _loaded(self) -> Callable[[Row], Row]:
        made: Callable[[Row], Row] = self.worker(**self.arguments)
        return made

    def work(self, row: Row) -> Row:
        """Return the worker's result, or the captured error, with `seconds` and `idle`."""
        self._clock.begin()
        return capture_error(self.what, self._work, row) | self._clock.end()

    def made(self) -> Row:
        """Return what the worker made of unfinished rows since its last report; maybe nothing."""
        tell = getattr(self.__dict__.get("_loaded"), "made", None)
        told: Row = tell() if tell else {}
        return told | self._clock.report() if told else {}

    def _work(self, row: Row) -> Row:
        with self._loading:
            worker = self._loaded
        return worker(row)


class BusyClock:
    """How many seconds an actor existed since it last told, how many of them idle. Thread-safe."""

    def __init__(self) -> None:
        self._lock, self._running, self._idle = threading.Lock(), 0, 0.0
        self._reported = self._ended = time.monotonic()

    def begin(self) -> None:
        """Note that a row starts."""
        with self._lock:
            if not self._running:
                self._idle += time.monotonic() - self._ended
            self._running += 1

    def end(self) -> dict[str, float]:
        """Note that a row ends; return the times since the last report."""
        with self._lock:
            self._running -= 1
            self._ended = time.monotonic()
        return self.report()

    def report(self) -> dict[str, float]:
        """Return the `seconds` since the last report, and those of them that were `idle`."""
        with self._lock:
            now = time.monotonic()
            times = {"seconds": now - self._reported, "idle": self._idle}
            self._reported, self._idle = now, 0.0
            return times


class StartClock:
    """How many seconds a worker loaded its model, for its next result. Thread-safe."""

    def __init__(self) -> None:
        self._lock, self._seconds = threading.Lock(), 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block."""
        began = time.monotonic()
        yield
        with self._lock:
            self._seconds += time.monotonic() - began

    def take(self) -> dict[str, float]:
        """Return the seconds since the last call as `start`."""
        with self._lock:
            taken, self._seconds = self._seconds, 0.0
        return {"start": taken}


@dataclass
class Pace:
    """How long actors of a pool take for a row, and to start, by their results so far."""

    seconds: float = 0.0
    """Of actors with rows, without their starts."""
    rows: int = 0
    longest_start: float = 0.0
    """Of an engine."""
    expected: float | None = None
    """Seconds for a row, as the user tells, until there is a result."""
    expected_start: float = 0.0
    """The same of a start."""

    def add(self, told: Row, rows: int = 1) -> None:
        """Count finished rows: `seconds` of their actor, of which it was `idle` or did `start`."""
        start = told.get("start", 0.0)
        self.seconds += max(0.0, told["seconds"] - told["idle"] - start)
        self.rows, self.longest_start = self.rows + rows, max(self.longest_start, start)

    @property
    def startup(self) -> float:
        """Seconds of a start."""
        return self.longest_start or self.expected_start

    def row(self, in_hand: int) -> float | None:
        """Seconds of an actor for a row; None if nobody knows.

        While fewer rows have ended than are `in_hand` it is what is expected. Of these, whose
        seconds are told as they pass, half of each is done: else a pool would seem the slower, and
        get the more actors, the more it has.
        """
        if not self.rows or (self.expected and self.rows < in_hand):
            return self.expected
        return self.seconds / (self.rows + in_hand / 2)


_NUMBERS = count()


class WaitingLog:
    """Logs once a minute that a pool has no actor yet, as where others hold all the room."""

    def __init__(self, what: str, needs: dict[str, float]):
        self.what, self.needs, self.last = what, needs, time.monotonic()

    def tick(self, *, is_waiting: bool) -> None:
        """Log if it is so for a minute."""
        now = time.monotonic()
        if not is_waiting:
            self.last = now
        elif now - self.last > WAITING_INTERVAL:
            self.last = now
            needs = ", ".join(f"{n:g} {name}" for name, n in self.needs.items())
            log(f"{self.what}: waiting for its first actor, which needs {needs}")


WAITING_INTERVAL = 60.0
"""Seconds between two log lines that say that a pool has no actor yet."""
REMOVAL_TIMEOUT = 60.0
"""Seconds to wait until Ray has removed a pool's placement groups."""


@dataclass(eq=False)
class Member:
    """An actor of a pool, from the request for it on."""

    handle: Any
    starting: Any
    """Ray object that is ready when the actor answers for the first time; None after that."""
    group: Any = None
    """The actor's own placement group, if it has one."""
    place: str = ""
    """The node that it lies on, or was given; empty if it waits for room."""
    beyond: tuple[str, ...] = ()
    """The nodes that it must not lie on, as it was requested for one to come."""
    since: float = field(default_factory=time.monotonic)
    """Time of the request, of the first answer, or of the last finished row."""
    rows: dict[Any, tuple[Row, float]] = field(default_factory=dict)
    """{Ray object of the result: (row, time of assignment)} of unfinished rows."""
    assigned: int = 0
    """Number of rows assigned so far."""
    report: Any = None
    """Ray object of what the actor has made of unfinished rows, while it is asked."""
    told: float = field(default_factory=time.monotonic)
    """Time at which it was asked last, or finished a row."""
    number: int = field(default_factory=_NUMBERS.__next__)
    """No other actor of this process has it."""
    is_leaving: bool = False
    """Whether it gets no more rows, and ends for another pool."""

    @property
    def has_room(self) -> bool:
        """Whether it has a node."""
        return bool(self.place)

    @property
    def waits_for_node(self) -> bool:
        """Whether it has no room on the nodes that were there when it was requested."""
        return bool(self.beyond) and self.starting is not None


def start_member(
    pool: Pool,
    arguments: dict[str, Any],
    groups: str,
    place: str,
    beyond: tuple[str, ...] = (),
) -> Member:
    """Request an actor from Ray; `groups` begins the names of the pool's placement groups.

    It goes to the node `place`, or to another one if that has no room after all; without a place
    it waits for room, on none of the nodes `beyond`.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as InGroup

    actors, group = pool.actors, None
    others = _not_on(beyond)
    where: dict[str, Any] = {
        "num_gpus": actors.num_gpus or None,
        "resources": actors.resources or None,
        "label_selector": pool.selector | others,
        "scheduling_strategy": _on(place) if place else "SPREAD",
    }
    if pool.parts > 1:  # vLLM starts its own workers in the placement group of its actor
        group = _group(pool, f"{groups}{uuid.uuid4().hex}", place, others)
        where = {"scheduling_strategy": InGroup(group, 0, True)}
    handle = (
        ray.remote(type(pool.what, (ErrorCapturingWorker,), {}))  # the name in Ray's dashboard
        .options(
            num_cpus=actors.cpus,
            max_concurrency=pool.threads + (pool.threads > 1),  # one to tell what the others make
            runtime_env={"env_vars": thread_env(actors.cpus) | pool.env},
            **where,
        )
        .remote(**arguments)
    )
    return Member(handle, handle.answers.remote(), group, place, beyond)


def _not_on(nodes: tuple[str, ...]) -> dict[str, str]:
    """Ray's label selector of nodes that are none of these."""
    return {"ray.io/node-id": f"!in({','.join(nodes)})"} if nodes else {}


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)


def _group(pool: Pool, name: str, place: str, others: dict[str, str]) -> Any:
    """The placement group of an actor and its workers: on one node if any can hold it."""
    from ray.util import placement_group

    is_one = ALLOCATOR.one_node_holds(pool.needs)
    return placement_group(
        pool.bundles,
        name=name,
        strategy="STRICT_PACK" if is_one else "PACK",
        bundle_label_selector=[others] * len(pool.bundles) if others else None,
        _soft_target_node_id=(place or None) if is_one else None,
    )


def end_member(member: Member) -> None:
    """End an actor; an idle one ends by itself when its handle is dropped."""
    import ray
    from ray.util import remove_placement_group

    if member.group:
        remove_placement_group(member.group)
    elif member.rows or member.starting is not None:
        ray.kill(member.handle)


def remove_groups(prefix: str) -> None:
    """Remove the placement groups of this name prefix, and wait until their resources are free.

    Raises:
        WrpoError: Ray still lists some after `REMOVAL_TIMEOUT`.
    """
    from ray.util import get_placement_group, placement_group_table, remove_placement_group

    deadline = time.monotonic() + REMOVAL_TIMEOUT
    while True:
        found = [g for g in placement_group_table().values() if g["name"].startswith(prefix)]
        left = [g for g in found if g["state"] != "REMOVED"]
        if not left:
            return
        if time.monotonic() > deadline:
            raise WrpoError(
                f"{len(left)} placement groups could not be removed within {REMOVAL_TIMEOUT:g} s"
            )
        for entry in left:
            with suppress(ValueError):  # removed in the meantime
                remove_placement_group(get_placement_group(entry["name"]))
        time.sleep(0.1)


def loss_errors() -> tuple[type[Exception], ...]:
    """The errors that Ray raises when an actor, or its result, is lost."""
    from ray import exceptions as ray

    lost = (ray.RayActorError, ray.WorkerCrashedError, ray.NodeDiedError)
    return (*lost, ray.OutOfMemoryError, ray.ObjectLostError)
