"""Rows for a pool that follows another one, in the order in which they become ready."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from wrpo_ray.storage.steps import Step

Row = dict[str, Any]


class ReadyQueue:
    """Rows for a pool that follows another one, in the order in which they become ready.

    `steps` are those that are followed; row {"job": i, "bucket": b} says that bucket b of the
    step number i can be read. Threads add rows and take them.
    """

    def __init__(self, steps: list[Step]):
        self._jobs = {step.key: job for job, step in enumerate(steps)}
        self._rows: deque[Row] = deque()

    @classmethod
    def of(cls, rows: list[Row]) -> ReadyQueue:
        """Rows that are ready."""
        feed = cls([])
        feed._rows.extend(rows)
        return feed

    def add(self, step: Step, bucket: int) -> None:
        """Tell that a bucket can be read; steps that nobody follows are passed over."""
        if step.key in self._jobs:
            self._rows.append({"job": self._jobs[step.key], "bucket": bucket})

    def take(self) -> Iterator[Row]:
        """The rows that are ready and were not taken."""
        while self._rows:
            yield self._rows.popleft()
