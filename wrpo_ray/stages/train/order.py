"""The rows of each optimizer step, as pure functions.

The rows of a step depend on (seed, epoch, index) alone. So they are the same for any number of
workers, any micro-batches (`packing.assign_micro_batches`), and in a resumed run.
"""

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
    """The order of a whole run over `rows` rows, at least one."""

    rows: int
    epochs: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the last takes the remaining rows."""
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
        """Progress from the first step (0) to the last (1), by the rows consumed.

        A run of one step is at 1.
        """
        last = self._before(self.steps - 1)
        return self._before(step) / last if last else 1.0

    def _before(self, step: int) -> int:
        """Rows consumed before a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch * self.rows + within * self.batch_size
