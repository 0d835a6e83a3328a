"""The allocator of this process: what its pools want, and what the Ray cluster has for them."""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from wrpo_ray.runtime.allocation import Demand, Node, Resources, Share, allocate, fits
from wrpo_ray.runtime.placement import GPU_LABEL

LOOKUP_INTERVAL = 1.0
"""Seconds for which one look at the cluster serves all pools."""
FOLLOWING = 0.1
"""Guess of the time of a row that follows another pool's, such as a bucket to score, as a part of
what rows of others take."""


@dataclass(frozen=True)
class Report:
    """The report of a pool to the allocator."""

    demand: Demand
    """`left` counts rows."""
    row: float | None
    """Seconds of an actor for a row; None if nobody knows."""
    placed: Sequence[str]
    """The node of each actor that lies on one, or was given one."""

    @property
    def follows(self) -> bool:
        """Whether its rows are results of other pools."""
        return self.demand.follows


class Allocator:
    """Shares of all pools of this process, by `allocation.allocate`. Thread-safe."""

    def __init__(self, look: Callable[[], list[Node]] | None = None) -> None:
        self._look = look or nodes_of_ray
        self._lock = threading.Lock()
        self._reports: dict[str, Report] = {}
        self._nodes: list[Node] = []
        self._shares: dict[str, Share] = {}
        self._decided = -math.inf

    def share(self, report: Report) -> Share:
        """The share of the pool that reports, decided at most `LOOKUP_INTERVAL` ago."""
        pool = report.demand.pool
        with self._lock:
            self._reports[pool] = report
            is_old = time.monotonic() - self._decided >= LOOKUP_INTERVAL
            if is_old or pool not in self._shares:
                self._decide()
            return self._shares[pool]

    def keep(self, name: str, needs: Resources, count: int) -> None:
        """Keep what is or becomes free for `count` workers that Ray places, until they `leave`.

        Engines of pools end for them once, where they would wait for long.
        """
        demand = Demand(name, needs, left=1.0, least=count, most=count, displaces=True)
        with self._lock:
            self._reports[name] = Report(demand, None, ())
            self._decided = -math.inf

    def leave(self, pool: str) -> None:
        """Forget a pool that has ended, or workers that have their room."""
        with self._lock:
            self._reports.pop(pool, None)
            self._shares.pop(pool, None)
            self._decided = -math.inf

    def one_node_holds(self, needs: Resources) -> bool:
        """Whether any node that is there could hold an actor with all its workers."""
        return any(fits(needs, node.total) for node in self._nodes)

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes that are there."""
        return tuple(sorted(node.name for node in self._nodes))

    @property
    def lacking(self) -> list[str]:
        """Pools that have fewer actors than their least."""
        with self._lock:
            found = self._reports.items()
            return [pool for pool, r in found if r.demand.running < r.demand.least]

    def _decide(self) -> None:
        reports = list(self._reports.values())
        known = [r.row for r in reports if r.row and not r.follows]
        usual = mean(known) if known else 1.0
        guesses = {True: FOLLOWING * usual, False: usual}
        demands = [
            replace(
                r.demand,
                left=r.demand.left * (r.row or guesses[r.follows]),
                is_timed=bool(r.row) and r.demand.is_timed,
            )
            for r in reports
        ]
        self._nodes = _without_own(self._look(), reports)
        self._shares, self._decided = allocate(self._nodes, demands), time.monotonic()
        if any(share.leave for share in self._shares.values()):  # once for each training
            self._reports = {
                name: replace(r, demand=replace(r.demand, displaces=False))
                for name, r in self._reports.items()
            }


def _without_own(nodes: Sequence[Node], reports: Sequence[Report]) -> list[Node]:
    """The nodes without what pools were given on them, which Ray may not have noticed yet.

    What others hold is what Ray shows beside it: the lesser of both rooms is free.
    """
    given: dict[str, dict[str, float]] = {}
    for report in reports:
        for name in report.placed:
            held = given.setdefault(name, {})
            for resource, n in report.demand.needs.items():
                held[resource] = held.get(resource, 0.0) + n
    return [replace(node, free=_free(node, given.get(node.name, {}))) for node in nodes]


def _free(node: Node, held: Mapping[str, float]) -> dict[str, float]:
    return {
        name: min(n, node.total.get(name, n) - held.get(name, 0.0))
        for name, n in node.free.items()
    }  # fmt: skip


def nodes_of_ray() -> list[Node]:
    """The nodes of the cluster that are alive."""
    import ray
    from ray._private import state

    free = state.available_resources_per_node()
    return [
        Node(
            node["NodeID"],
            node["Resources"],
            free.get(node["NodeID"], {}),
            node.get("Labels", {}).get(GPU_LABEL) == "true",
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


ALLOCATOR = Allocator()
