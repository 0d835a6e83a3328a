"""The rows, alpha and learning rate of each optimizer step, as pure functions.

The rows of a step depend on (seed, epoch, index) alone. So they are the same for any number of
workers, any micro-batches (`packing.assign_micro_batches`), and in a resumed run. Steps count from
0; `steps` is the number of steps of the whole run.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

from wrpo_ray.config import AlphaConfig, TrainConfig


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


def alpha_at(config: AlphaConfig, consumed: float) -> float:
    """The fusion coefficient (paper, section 3.3) after the share `consumed` of the rows.

    `dynamic` grows linearly from 0 at the first step to exactly `end` at the last, whose
    `consumed` is 1 (`Order.consumed`). `static` is `end` throughout.
    """
    return config.end if config.schedule == "static" else config.end * consumed


def learning_rate_at(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate at a step.

    It rises linearly over the first ceil(warmup * steps) steps, and reaches its peak at the
    step after them. Then `cosine` and `linear` fall towards 0, which a step after the last would
    have, and `constant` stays. The first step of a warm-up has a rate above 0, so that no step is
    wasted.
    """
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)  # in [0, 1)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * shape[config.schedule]
