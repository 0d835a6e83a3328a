"""Which rows each optimizer step, worker and micro-batch takes, as pure functions.

The rows of a step depend on (seed, epoch, index) alone, so another number of workers, another
micro-batch or a resumed run trains on the same rows in the same steps.
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


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Row indices of one forward pass, never empty.

    `weight` is 1, or 0 for a dummy, which only keeps the number of forward passes equal on all
    workers (ZeRO-3 gathers parameters in each) and adds nothing to loss or gradient.
    """

    rows: tuple[int, ...]
    weight: int


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

    def accumulation(self, workers: int, micro_batch: int) -> int:
        """Micro-batches a worker has in every step."""
        return math.ceil(math.ceil(min(self.batch_size, self.rows) / workers) / micro_batch)

    def micro_batches(
        self, step: int, worker: int, workers: int, micro_batch: int
    ) -> list[MicroBatch]:
        """A worker's part of a step: always `accumulation` micro-batches, dummies last."""
        batch = self.batch(step)
        own = batch[worker::workers]
        real = [
            MicroBatch(own[start : start + micro_batch], 1)
            for start in range(0, len(own), micro_batch)
        ]
        dummies = self.accumulation(workers, micro_batch) - len(real)
        return real + [MicroBatch(batch[:1], 0)] * dummies
