"""A queue between two pools: buckets that one has finished and the other can read."""

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any, Self

from wrpo_ray.storage.steps import Step

Row = dict[str, Any]


class ReadyQueue:
    """Rows for a pool that follows another one, in the order in which they become ready.

    Row {"job": i, "bucket": b, "is_whole": w} says that bucket b of `steps[i]` can be read, and
    whether nothing is missing in it, so that it stays as it is. Buckets are added by any thread,
    and taken by the pool's.
    """

    follows = True
    """Whether its rows come from another pool."""

    def __init__(self, steps: list[Step]):
        self._jobs: dict[str, list[int]] = defaultdict(list)
        for job, step in enumerate(steps):
            self._jobs[step.key].append(job)
        self._rows: deque[Row] = deque()
        self._first: Mapping[int, int] = {}
        self._held: dict[tuple[int, int], list[Row]] = {}
        self.passed_over: set[tuple[int, int]] = set()
        """(job, bucket) of rows that are not given, because the other pool has no work there."""

    @classmethod
    def of(cls, rows: list[Row]) -> Self:
        """A queue with rows that are ready."""
        queue = cls([])
        queue.follows = False
        queue._rows.extend(rows)
        return queue

    def hold_back(self, first: Mapping[int, int], rows: list[Row]) -> None:
        """Give no bucket of a job before the same bucket of the job `first` has for it.

        Those two write into one store. `rows` are all that the pool will be given; it has to tell
        which are `finished`.
        """
        parts = set(first.values())
        self._first = first
        self._held = {(r["job"], r["bucket"]): [] for r in rows if r["job"] in parts}

    def finished(self, row: Row) -> None:
        """Let the rows go that were held back until this one was finished."""
        self._rows.extend(self._held.pop((row["job"], row["bucket"]), []))

    def add(self, step: Step, bucket: int, *, is_whole: bool = True) -> None:
        """Add a bucket that can be read; buckets of other steps are ignored."""
        for job in self._jobs.get(step.key, ()):
            self._rows.append({"job": job, "bucket": bucket, "is_whole": is_whole})

    def take(self) -> Iterator[Row]:
        """Remove and yield the rows that are ready."""
        while self._rows:
            row = self._rows.popleft()
            if (row.get("job"), row.get("bucket")) in self.passed_over:
                continue
            first = self._first.get(row.get("job", -1), -1), row.get("bucket", -1)
            if first in self._held:
                self._held[first].append(row)
            else:
                yield row
