"""A queue between two pools: buckets that one has finished and the other can read."""

from collections import deque
from collections.abc import Iterator
from typing import Any, Self

from wrpo_ray.storage.steps import Step

Row = dict[str, Any]


class ReadyQueue:
    """Rows for a pool that follows another one, in the order in which they become ready.

    Row {"job": i, "bucket": b} says that bucket b of `steps[i]` can be read. Thread-safe.
    """

    def __init__(self, steps: list[Step]):
        self._jobs = {step.key: job for job, step in enumerate(steps)}
        self._rows: deque[Row] = deque()

    @classmethod
    def of(cls, rows: list[Row]) -> Self:
        """A queue with rows that are ready."""
        queue = cls([])
        queue._rows.extend(rows)
        return queue

    def add(self, step: Step, bucket: int) -> None:
        """Add a bucket that can be read; buckets of other steps are ignored."""
        if step.key in self._jobs:
            self._rows.append({"job": self._jobs[step.key], "bucket": bucket})

    def take(self) -> Iterator[Row]:
        """Remove and yield the rows that are ready."""
        while self._rows:
            yield self._rows.popleft()
