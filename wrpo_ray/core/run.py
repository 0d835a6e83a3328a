"""What a stage is given beside its jobs: where the output lies, limits, and how to tell progress."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

from wrpo_ray.core.storage import Folder
from wrpo_ray.errors import FailureLimitError


def log(text: str) -> None:
    """One line of progress to stderr, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Run:
    """One call of the pipeline."""

    root: Folder
    buckets: int
    chunk: int = 64
    failure_limit: float = 0.01
    session: str = ""
    """Marks the processes of this driver, so that a later one can tell them from its own."""

    def check_failures(self, what: str, failed: int, done: int, where: str) -> None:
        """Raise FailureLimitError when more than `failure_limit` of the rows failed."""
        if failed and failed > self.failure_limit * (failed + done):
            raise FailureLimitError(
                f"{what}: {failed} of {failed + done} rows failed, above failure_limit "
                f"{self.failure_limit}; they are kept with their reasons in {where}; put the "
                f"cause right and run the same command again, or raise failure_limit"
            )


@dataclass
class Progress:
    """A line now and then: `generate llama  7/16 buckets  2,100 rows  310 rows/s`."""

    label: str
    total: int
    unit: str = "buckets"
    every: float = 5.0
    """Seconds between lines."""
    done: int = 0
    rows: int = 0
    _started: float = field(default_factory=time.monotonic)
    _shown: float = field(default_factory=time.monotonic)

    def add(self, rows: int) -> None:
        """One more unit is finished, with so many rows."""
        self.done += 1
        self.rows += rows
        now = time.monotonic()
        if now - self._shown >= self.every or self.done == self.total:
            self._shown = now
            rate = self.rows / max(now - self._started, 1e-9)
            log(f"{self.label}  {self.done}/{self.total} {self.unit}  "
                f"{self.rows:,} rows  {rate:,.0f} rows/s")
