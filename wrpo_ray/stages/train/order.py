"""Which rows each optimizer step takes, as pure functions.

The rows of a step depend on (seed, epoch, index) alone, so another number of workers, other
micro-batches (`packing.deal`) or a resumed run train on the same rows in the same steps.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, rows: int) -> tuple[int, ...]:
    """The order of the row indices 0 to `rows` - 1 in an epoch: by a hash of each index."""

    def place(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=16).digest()

    return tuple(sorted(range(rows), key=place))


@dataclass(frozen=True)
class Order:
    """The order of a whole run over `rows` rows, of which there is at least one."""

    rows: int
    epochs: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch; the last takes the rows that are left."""
        return math.ceil(self.rows / self.batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.epochs * self.steps_per_epoch

    def batch(self, step: int) -> tuple[int, ...]:
        """The row indices of a step, over all workers."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.batch_size
        return permutation(self.seed, epoch, self.rows)[start : start + self.batch_size]

    def consumed(self, step: int) -> float:
        """The share of the way from the first step to the last, in rows consumed; in [0, 1].

        A run of one step is at its end.
        """
        last = self._before(self.steps - 1)
        return self._before(step) / last if last else 1.0

    def _before(self, step: int) -> int:
        """Rows consumed before a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch * self.rows + within * self.batch_size
