"""A queue between two pools: buckets that one has finished and the other can read."""

from collections import deque
from collections.abc import Iterator
from typing import Any, Self

from wrpo_ray.storage.steps import Step

Row = dict[str, Any]


class ReadyQueue:
    """Rows for a pool that follows another one, in the order in which they become ready.

    Row {"job": i, "bucket": b, "is_whole": w} says that bucket b of `steps[i]` can be read, and
    whether nothing is missing in it, so that it stays as it is. Thread-safe.
    """

    def __init__(self, steps: list[Step]):
        self._jobs = {step.key: job for job, step in enumerate(steps)}
        self._rows: deque[Row] = deque()
        self.passed_over: set[tuple[int, int]] = set()
        """(job, bucket) of rows that are not given, because the other pool has no work there."""

    @classmethod
    def of(cls, rows: list[Row]) -> Self:
        """A queue with rows that are ready."""
        queue = cls([])
        queue._rows.extend(rows)
        return queue

    def add(self, step: Step, bucket: int, *, is_whole: bool = True) -> None:
        """Add a bucket that can be read; buckets of other steps are ignored."""
        if step.key in self._jobs:
            row = {"job": self._jobs[step.key], "bucket": bucket, "is_whole": is_whole}
            self._rows.append(row)

    def take(self) -> Iterator[Row]:
        """Remove and yield the rows that are ready."""
        while self._rows:
            row = self._rows.popleft()
            if (row.get("job"), row.get("bucket")) not in self.passed_over:
                yield row
