"""Brings models to nodes ahead of the engines that need them, without their GPUs.

What a phase needs comes first, then what later phases need. A node gets one model after another,
by its shelf (`weights`). A model for a later phase evicts none that is needed before it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from wrpo_ray.runtime.allocation import Node, fits
from wrpo_ray.runtime.allocator import nodes_of_ray
from wrpo_ray.runtime.connection import CONNECTION, ClosedError
from wrpo_ray.runtime.placement import Model, Pool
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
    """A node, and what was brought to it."""

    assigned: dict[str, Model] = field(default_factory=dict)
    """{key: model} in order of need."""
    there: set[str] = field(default_factory=set)
    """Keys of those that were brought."""
    refused: set[str] = field(default_factory=set)
    """Keys of those that could not be brought: what needs them fetches them itself."""
    shelf: Any = None
    under_way: Any = None
    """Ray object of the copy that is being made."""
    key: str = ""
    """Its key."""

    def has(self, key: str) -> bool:
        """Whether a model is there, or is being brought."""
        return key in self.there or (bool(self.under_way) and self.key == key)

    @property
    def coming(self) -> list[str]:
        """Keys of the models that are still to come, in order."""
        return [key for key in self.assigned if key not in self.there | self.refused]


class Prefetch:
    """Brings models to the nodes whose engines will need them, in order of need. Thread-safe.

    A model goes to each node that can hold an engine, on at most as many as there can be engines.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._sites: dict[str, _Site] = {}
        self._wanted: list[tuple[Pool, Model, str]] = []
        self._session, self._tracker, self._quiet_since = "", None, 0.0
        self._is_open = False

    def open(self, session: str) -> None:
        """Begin a run; nothing is started before a model is wanted."""
        self._session, self._is_open = session, True

    def want(self, pools: Iterable[Pool]) -> None:
        """Bring the models of pools to nodes, in this order; those wanted before are dropped."""
        wanted = [
            (pool, model, model[0].copy_key(model[1]))
            for pool in pools
            for model in pool.models
            if model[0].is_remote
        ]
        with self._lock:
            self._wanted = wanted
            for site in self._sites.values():
                site.assigned = {}
            if not wanted or not self._is_open:
                return
            if self._tracker is None:
                self._start()
        self._turn()

    def _start(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Affinity

        here = Affinity(this_node(), soft=True)
        self._tracker = (
            ray.remote(Tracker)
            .options(
                name=tracker_name(self._session),
                get_if_exists=True,
                num_cpus=0,
                scheduling_strategy=here,
            )
            .remote()
        )
        threading.Thread(target=self._run, args=(self._tracker,), daemon=True).start()

    def _run(self, tracker: Any) -> None:
        while self._tracker is tracker:
            time.sleep(TURN)
            try:
                self._turn()
            except ClosedError:
                return

    def is_coming(self, node: str, models: Iterable[Model]) -> bool:
        """Whether a model of these is on its way to the node, or will be."""
        keys = {folder.copy_key(version) for folder, version in models if folder.is_remote}
        with self._lock:
            site = self._sites.get(node)
            return site is not None and not keys.isdisjoint(site.coming)

    def wait(self, models: Iterable[Model]) -> None:
        """Wait until the models are on the nodes that they are to be brought to."""
        models = list(models)
        while self._is_open and any(self.is_coming(node, models) for node in list(self._sites)):
            time.sleep(TURN / 2)

    def close(self) -> None:
        """End all actors."""
        with self._lock:
            self._is_open, self._tracker, self._wanted, self._sites = False, None, [], {}

    # --- one look

    def _turn(self) -> None:
        import ray

        with CONNECTION.in_use(), self._lock, suppress(ray.exceptions.RayError):
            if self._tracker is not None:
                self._look()  # an error is of a node that was lost a moment ago

    def _look(self) -> None:
        nodes = nodes_of_ray()
        known = {node.name: self._sites.get(node.name, _Site()) for node in nodes}
        self._sites = known
        self._settle()
        self._assign(nodes)
        busy = [site for name, site in known.items() if self._bring(name, site)]
        now = time.monotonic()
        self._quiet_since = now if busy else self._quiet_since
        if now - self._quiet_since > QUIET:
            self._end_shelves()

    def _settle(self) -> None:
        """Note the copies that are made, and those that could not be."""
        import ray

        asked = {site.under_way: site for site in self._sites.values() if site.under_way}
        if not asked:
            return
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
        for found in done:
            site = asked[found]
            site.under_way = None
            try:
                is_there = not ray.get(found)
            except ray.exceptions.RayError:
                is_there, site.shelf = False, None
            (site.there if is_there else site.refused).add(site.key)

    def _assign(self, nodes: Sequence[Node]) -> None:
        """Give each wanted model the nodes that it goes to: those with the fewest models first."""
        for pool, model, key in self._wanted:
            able, most = nodes_for(pool, nodes)
            given = [name for name in able if key in self._sites[name].assigned]
            others = [name for name in able if key not in self._sites[name].assigned]
            others.sort(key=lambda name: (not self._sites[name].has(key), self._load(name)))
            for name in others[: max(0, most - len(given))]:
                self._sites[name].assigned[key] = model

    def _load(self, name: str) -> int:
        return len(self._sites[name].assigned)

    def _bring(self, name: str, site: _Site) -> bool:
        """Begin the next copy of a node, unless one is under way; returns whether there is one."""
        if site.under_way or not site.coming:
            return bool(site.under_way)
        site.key = site.coming[0]
        for other in self._servers(site.key):
            self._shelf(other)
        order = list(site.assigned)
        spared = order[: order.index(site.key)]
        site.under_way = self._shelf(name).bring.remote(site.assigned[site.key], spared)
        return True

    def _servers(self, key: str) -> list[str]:
        """Some nodes that have a model."""
        return [name for name, site in self._sites.items() if key in site.there][:SERVERS]

    def _shelf(self, name: str) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Affinity

        site = self._sites[name]
        if site.shelf is None:
            assert self._tracker is not None
            site.shelf = (
                ray.remote(Shelf)
                .options(
                    num_cpus=0,
                    max_concurrency=4 * UPLOADS,
                    scheduling_strategy=Affinity(name, soft=False),
                )
                .remote(self._tracker)
            )
            self._tracker.add_shelf.remote(name, site.shelf)
        return site.shelf

    def _end_shelves(self) -> None:
        assert self._tracker is not None
        for name, site in self._sites.items():
            if site.shelf is not None:
                self._tracker.add_shelf.remote(name, None)
                site.shelf = None  # Ray ends an actor without handles


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
