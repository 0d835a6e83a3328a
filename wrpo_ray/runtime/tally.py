"""Sum a job's counts over its buckets, and finish its step after the last bucket."""

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from wrpo_ray.data import finished
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.progress import log
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

NOT_COUNTED = (
    "job", "bucket", "seconds", "idle", "start", "is_whole", "is_again", "made", "under_way",
    "number", "actor",
)  # fmt: skip
"""Fields of a result that are no counts of rows; the ledger has the times."""
FEW = 100
"""Rows that are left at least before a job's last bucket, for `failure_limit`."""


class Tally:
    """The sums of a job's counts; the last bucket finishes the job's step.

    A result has `rows` (wanted rows that exist now), `new` (those made by this run), `failed`, and
    further counts to sum. Buckets that an earlier run marked as finished are counted by their
    marks.
    """

    def __init__(self, run: Run, step: Step, store: Folder, share: float = 1.0):
        """`share` is the job's part of the rows that `failure_limit` is about."""
        self.run, self.step, self.share = run, step, share
        self.counts: Counter[str] = Counter(rows=0, new=0, failed=0)
        self._started = time.time()
        self.marks = finished.marks(store, step.key, run.buckets, run.max_attempts)
        self._buckets = len(self.marks)
        for mark in self.marks.values():
            self.counts.update(rows=mark.rows, failed=mark.failed)
        if not self.marks:
            finished.begin(store, step.key)
        self._finish_if_done()

    @property
    def left(self) -> int:
        """Number of buckets that are not marked."""
        return self.run.buckets - len(self.marks)

    def add(self, result: dict[str, Any]) -> None:
        """Add a bucket's counts.

        Raises:
            FailureLimitError: more rows failed than `failure_limit` allows for the whole job, or
                for the one that it does a part of. Before its last bucket, what is left is taken
                as twice what the buckets so far let expect, `FEW` at least.
        """
        self.counts.update({k: v for k, v in result.items() if k not in NOT_COUNTED})
        self._buckets += 1
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        if not self._buckets:
            return
        failed, rows = self.counts["failed"], self.counts["rows"]
        is_whole = self._buckets == self.run.buckets
        seen = self.share * self._buckets / self.run.buckets
        left = round((failed + rows) * (1 / seen - 1)) if seen else 0
        self.run.check_failures(self.step, failed, rows, left if is_whole else max(2 * left, FEW))
        if is_whole:
            skipped = rows - self.counts.pop("new")
            self.step.finish(self.run.root, {**self.counts, "skipped": skipped}, self._started)
            self.run.finished(self.step)
            if skipped:
                log(f"{self.step.name}: {skipped:,} of {rows:,} rows were there")


def unmarked(tallies: list[Tally], rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows {job, bucket} whose bucket is not marked as finished for its job."""
    return [row for row in rows if row["bucket"] not in tallies[row["job"]].marks]
