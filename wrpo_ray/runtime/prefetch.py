"""Brings models to nodes ahead of the engines that need them, without their GPUs.

An engine that is given a node starts when its model is there. Meanwhile, what trainings and later
phases load comes to the nodes ahead, one model after another, by the nodes' shelves (`weights`).
There it evicts none that is needed before it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from wrpo_ray.runtime.allocation import Node, fits
from wrpo_ray.runtime.allocator import nodes_of_ray
from wrpo_ray.runtime.connection import CONNECTION, ClosedError
from wrpo_ray.runtime.placement import Model, Pool, is_own_ray
from wrpo_ray.runtime.weights import UPLOADS, Shelf, Tracker, this_node, tracker_name

TURN = 2.0
"""Seconds between two looks at which nodes lack models."""
SERVERS = 4
"""Nodes that serve a model to one that has come later."""
QUIET = 60.0
"""Seconds without a copy under way after which the shelves are ended: Ray's autoscaler takes a node
with an actor for one that works."""


@dataclass
class _Site:
    """A node, and what was brought to it; models are known by the keys of their copies."""

    ahead: dict[str, Model] = field(default_factory=dict)
    """What is to be brought ahead, in order of need."""
    under_way: dict[str, Any] = field(default_factory=dict)
    """{key: Ray object of a copy that is being made}"""
    there: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    """What could not be brought: whoever needs it fetches it and raises the error."""
    shelf: Any = None

    @property
    def coming(self) -> list[str]:
        """Keys of the models that are still to come ahead, in order."""
        return [key for key in self.ahead if key not in self.there | self.refused]


class Prefetch:
    """Brings models to nodes: those of an engine that has a node, and ahead those of later phases.

    Ahead, a model goes to nodes that can hold an engine, to as many as there can be engines.
    Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._sites: dict[str, _Site] = {}
        self._wanted: list[tuple[Pool, Model, str]] = []
        self._awaited: Counter[str] = Counter()
        """{key: trainings that wait for the model}"""
        self._session, self._tracker, self._busy_at = "", None, 0.0
        self._is_open = False

    def open(self, session: str) -> None:
        """Begin a run; nothing is started before a model is wanted."""
        self._session, self._is_open = session, True

    def close(self) -> None:
        """Forget everything; the actors end with their handles."""
        with self._lock:
            self._is_open, self._tracker, self._wanted, self._sites = False, None, [], {}

    def want(self, pools: Iterable[Pool]) -> None:
        """Bring the models of pools ahead, in this order.

        Those wanted before are dropped, but for models that another branch of the chain awaits.
        """
        wanted = [
            (pool, model, key) for pool in pools for key, model in _copied(pool.models).items()
        ]
        with self._lock:
            self._wanted = [*(one for one in self._wanted if self._awaited[one[2]]), *wanted]
            wanted = self._wanted
            for site in self._sites.values():
                site.ahead = {}
            if wanted and self._is_open:
                self._start()
        self._turn()

    def is_ready(self, node: str, models: Iterable[Model]) -> bool:
        """Whether an engine can start on a node, as its models are there; else brings them.

        Also where they could not be brought: then the engine fetches them. On one node there is
        nothing to be gained.
        """
        wanted = _copied(models)
        if not wanted or not self._is_open or is_own_ray():
            return True
        with self._lock:
            self._start()
            site = self._sites.setdefault(node, _Site())
            self._settle(site)
            missing = [key for key in wanted if key not in site.there | site.refused]
            for key in missing:
                if key not in site.under_way:
                    self._begin(node, key, wanted[key])
            return not missing

    def wait(self, models: Iterable[Model]) -> None:
        """Wait until the models are on the nodes that they are brought to ahead.

        Nodes that leave meanwhile are not waited for.
        """
        keys = set(_copied(models))
        with self._lock:
            self._awaited.update(keys)
        try:
            while self._is_open and self._is_coming(keys):
                time.sleep(TURN / 2)
                self._turn()  # an error in the thread would leave nobody to end the wait
        finally:
            with self._lock:
                self._awaited.subtract(keys)

    def _is_coming(self, keys: set[str]) -> bool:
        with self._lock:
            return any(keys.intersection(site.coming) for site in self._sites.values())

    def _start(self) -> None:
        """Start the tracker, and the thread that looks at the nodes, once."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Affinity

        if self._tracker is not None:
            return
        made = ray.remote(Tracker).options(
            name=tracker_name(self._session),
            get_if_exists=True,
            num_cpus=0,
            scheduling_strategy=Affinity(this_node(), soft=True),
        )
        self._tracker, self._busy_at = made.remote(), time.monotonic()
        threading.Thread(target=self._run, args=(self._tracker,), daemon=True).start()

    def _run(self, tracker: Any) -> None:
        while self._tracker is tracker:
            time.sleep(TURN)
            try:
                self._turn()
            except ClosedError:
                return

    # --- one look

    def _turn(self) -> None:
        import ray

        if self._tracker is None:
            return
        with CONNECTION.in_use(), self._lock, suppress(ray.exceptions.RayError):
            if self._tracker is not None:  # the run may have ended meanwhile
                self._look()  # an error is of a node that was lost a moment ago

    def _look(self) -> None:
        if not self._wanted and not any(site.shelf for site in self._sites.values()):
            return
        nodes = nodes_of_ray()
        self._sites = {node.name: self._sites.get(node.name, _Site()) for node in nodes}
        self._assign(nodes)
        for name, site in self._sites.items():
            self._settle(site)
            if site.coming and not site.under_way:
                key, order = site.coming[0], list(site.ahead)
                self._begin(name, key, site.ahead[key], spared=order[: order.index(key)])
        if any(site.under_way for site in self._sites.values()):
            self._busy_at = time.monotonic()
        if time.monotonic() - self._busy_at > QUIET:
            self._end_shelves()

    def _settle(self, site: _Site) -> None:
        """Note the copies that are made, and those that could not be."""
        import ray

        if not site.under_way:
            return
        asked = {made: key for key, made in site.under_way.items()}
        for found in ray.wait(list(asked), num_returns=len(asked), timeout=0)[0]:
            key = asked[found]
            del site.under_way[key]
            try:
                is_there = not ray.get(found)
            except ray.exceptions.RayError:
                is_there, site.shelf = False, None
            (site.there if is_there else site.refused).add(key)

    def _assign(self, nodes: Sequence[Node]) -> None:
        """Give each wanted model its nodes: those that have it, then those with the fewest."""
        for pool, model, key in self._wanted:
            able, most = nodes_for(pool, nodes)
            given = [name for name in able if key in self._sites[name].ahead]
            others = [name for name in able if key not in self._sites[name].ahead]
            others.sort(key=lambda name: self._rank(name, key))
            for name in others[: max(0, most - len(given))]:
                self._sites[name].ahead[key] = model

    def _rank(self, name: str, key: str) -> tuple[bool, int]:
        site = self._sites[name]
        return key not in site.there | set(site.under_way), len(site.ahead)

    def _begin(self, name: str, key: str, model: Model, spared: Collection[str] = ()) -> None:
        """Begin a copy on a node, while some of those that have the model serve it."""
        having = [other for other, site in self._sites.items() if key in site.there]
        for other in having[:SERVERS]:
            self._shelf(other)
        self._sites[name].under_way[key] = self._shelf(name).bring.remote(model, spared)

    def _shelf(self, name: str) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Affinity

        site = self._sites[name]
        if site.shelf is None:
            assert self._tracker is not None
            made = ray.remote(Shelf).options(
                num_cpus=0,
                max_concurrency=4 * UPLOADS,
                scheduling_strategy=Affinity(name, soft=False),
            )
            site.shelf = made.remote(self._tracker)
            self._tracker.add_shelf.remote(name, site.shelf)
        return site.shelf

    def _end_shelves(self) -> None:
        assert self._tracker is not None
        for name, site in self._sites.items():
            if site.shelf is not None:
                self._tracker.add_shelf.remote(name, None)
                site.shelf = None  # Ray ends an actor without handles


def _copied(models: Iterable[Model]) -> dict[str, Model]:
    """{key of its copies: model} of those in a store or on the hub."""
    return {model[0].copy_key(model[1]): model for model in models if model[0].is_remote}


def nodes_for(pool: Pool, nodes: Sequence[Node]) -> tuple[list[str], int]:
    """Return the nodes that can hold an engine of a pool, or a part of it, and how many at most.

    Parts are on several nodes only if no node can hold all of them.
    """
    is_cpu_only = not pool.needs["GPU"] and not pool.actors.resources
    open_to = [node for node in nodes if not (node.only_gpu and is_cpu_only)]
    whole = [node.name for node in open_to if fits(pool.needs, node.total)]
    if whole or pool.parts == 1:
        return whole, pool.actors.max
    parts = [node.name for node in open_to if fits(pool.bundles[-1], node.total)]
    return parts, pool.actors.max * pool.parts


PREFETCH = Prefetch()
