"""Pools of one driver give way to each other until each has its minimum number of actors."""

from __future__ import annotations

import math
import threading
import time

LOOKUP_INTERVAL = 1.0
"""Seconds for which one look at the cluster's free resources serves all pools."""


class Minimums:
    """Pools that wait for some of their `min` actors, with the needs of one actor. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, dict[str, float]] = {}
        self._free: dict[str, float] = {}
        self._looked = -math.inf

    def report(self, pool: int, needs: dict[str, float], *, waits: bool) -> None:
        """Note whether the pool of this id waits for some of its first actors."""
        with self._lock:
            if waits:
                self._waiting[pool] = needs
            else:
                self._waiting.pop(pool, None)

    def reserve_room_of(self, pool: int, needs: dict[str, float]) -> bool:
        """Whether another pool waits for a resource that one more actor of this one would take."""
        with self._lock:
            others = [other for key, other in self._waiting.items() if key != pool]
            free = self._free_now() if others else {}
        for other in others:
            short = {name for name, n in other.items() if n > free.get(name, 0)}
            if (short or set(other)) & set(needs):  # short of nothing: Ray is placing it
                return True
        return False

    def _free_now(self) -> dict[str, float]:
        import ray

        if time.monotonic() - self._looked >= LOOKUP_INTERVAL:
            self._free, self._looked = ray.available_resources(), time.monotonic()
        return self._free


MINIMUMS = Minimums()
"""Of this driver's pools."""
