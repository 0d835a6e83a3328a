"""The memory of this node, or of the container around this process: how much there is, and free."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

CGROUPS = Path("/sys/fs/cgroup")
FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Names of a cgroup's limit, its use, and the cache that it gives up, in versions 2 and 1."""


class Room(NamedTuple):
    """Memory in bytes."""

    total: float
    free: float
    """What new allocations can have now."""

    def among(self, processes: int) -> "Room":
        """The equal part of one of several processes."""
        return Room(self.total / processes, self.free / processes)


def node_memory() -> Room:
    """The smallest of the node's memory and the limits of this process's cgroups."""
    memory = psutil.virtual_memory()
    rooms = [Room(memory.total, memory.available), *map(Room._make, _limits())]
    return Room(min(room.total for room in rooms), min(room.free for room in rooms))


def _limits() -> Iterator[tuple[float, float]]:
    """(limit, free) of each cgroup of this process that has a limit, from its own to the root."""
    for folder in _folders():
        for limit, used, cache in FILES:
            try:
                most = (folder / limit).read_text().strip()
                now = int((folder / used).read_text())
                lines = (folder / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):
                continue
            if most.isdigit():  # version 2 says `max` where there is none; version 1 a huge number
                held = now - int(dict(line.split() for line in lines).get(cache, 0))
                yield float(most), max(0.0, float(most) - held)


def _folders() -> Iterator[Path]:
    """The folders of this process's cgroups; in a container they can be the root's."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds in ("", "memory") or "memory" in kinds.split(","):
            root = CGROUPS / "memory" if kinds else CGROUPS
            own = root / path.lstrip("/")
            yield from (p for p in (own, *own.parents) if p == root or root in p.parents)
