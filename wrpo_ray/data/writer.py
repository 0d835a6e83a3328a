"""Committing rows as shards of a good size, while a bucket is worked on."""

import threading
from collections.abc import Callable
from typing import Any, Self

from wrpo_ray.data.records import FailureRow

Row = dict[str, Any]
SHARD_BYTES = 64_000_000
"""Bytes of the texts and token ids of a shard, before compression. Object stores reach their full
throughput with files of this size, and a request costs next to nothing for each of its rows."""
ROW_BYTES = 200
"""Bytes of a row's other columns."""


class ShardWriter:
    """Collects rows and failed rows, and commits them as one shard each.

    It commits when they reach `SHARD_BYTES`, when the oldest was added `seconds` ago (also while
    nothing is added), and when the block ends, even by an error. So a kill loses at most what came
    in the last `seconds`. Thread-safe.
    """

    def __init__(self, commit: Callable[[list[Row], list[FailureRow]], None], seconds: float):
        self.commit, self.seconds = commit, seconds
        self._lock = threading.Lock()
        self._rows: list[Row] = []
        self._failed: list[FailureRow] = []
        self._bytes = 0
        self._timer: threading.Timer | None = None
        """Runs while there are uncommitted rows."""
        self._error: Exception | None = None
        """Of a commit by the timer."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._check()
            self._commit()

    def add(self, rows: list[Row], failed: list[FailureRow]) -> None:
        """Add rows, and commit what there is if it is enough for a shard.

        Raises:
            Exception: a commit failed, now or since the last call.
        """
        with self._lock:
            self._check()
            self._rows += rows
            self._failed += failed
            self._bytes += sum(map(row_bytes, rows))
            if self._bytes >= SHARD_BYTES:
                self._commit()
            elif self._timer is None and (self._rows or self._failed):
                self._timer = threading.Timer(self.seconds, self._when_old)
                self._timer.daemon = True
                self._timer.start()

    def _when_old(self) -> None:
        """Commit, in the timer's thread."""
        with self._lock:
            if self._timer is not threading.current_thread():
                return  # they were committed while this waited for the lock
            try:
                self._commit()
            except Exception as error:  # raised by the next call
                self._error = error

    def _check(self) -> None:
        if self._error:
            raise self._error

    def _commit(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        rows, failed = self._rows, self._failed
        self._rows, self._failed, self._bytes = [], [], 0
        if rows or failed:
            self.commit(rows, failed)


def row_bytes(row: Row) -> int:
    """Return about how many bytes a row of answers has."""
    texts = (row.get("text"), row.get("reasoning"))
    return ROW_BYTES + sum(len(t) for t in texts if t) + 4 * len(row.get("token_ids") or ())
