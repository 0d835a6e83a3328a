"""The rows, alpha and learning rate of each optimizer step, as pure functions.

The rows of a step depend on (seed, epoch, index) alone. So they are the same for any number of
workers, any micro-batches (`packing.assign_micro_batches`), and in a resumed run. Steps count from
0; `steps` is the number of steps of the whole run.

Up to `HASHED` rows are ordered by a hash of each index, which takes a microsecond of Python and 100
bytes a row at the beginning of an epoch. More rows are ordered by a permutation that is computed
for a block of steps at a time: some 40 ns a row when it is needed, and nothing before.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from wrpo_ray.config import AlphaConfig, TrainConfig

HASHED = 1_000_000
"""Rows up to which the order is by a hash. All runs of earlier versions were ordered so: these keep
their trajectories, and runs of so many rows can be resumed by any version."""
BLOCK = 2**16
"""Places of an order that are computed at once."""


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, rows: int) -> tuple[int, ...]:
    """The order of the row indices 0 to `rows` - 1 in an epoch: by a hash of each index."""

    def place(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=16).digest()

    return tuple(sorted(range(rows), key=place))


@lru_cache(maxsize=2)
def permuted_block(seed: int, epoch: int, rows: int, block: int) -> np.ndarray:
    """Places `block * BLOCK` to the end of the block in the order of an epoch: (BLOCK,) indices.

    A Feistel network of four rounds permutes the numbers of as many bits as `rows` needs; a number
    that is no row is permuted again until it is one (cycle walking: Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002).
    """
    start = block * BLOCK
    places = np.arange(start, min(start + BLOCK, rows), dtype=np.uint64)
    key = hashlib.blake2b(f"{seed}/{epoch}/{rows}".encode(), digest_size=16).digest()
    keys, bits = np.frombuffer(key, "<u4"), (rows - 1).bit_length()
    found = _permute(places, keys, bits)
    while len(outside := np.flatnonzero(found >= rows)):
        found[outside] = _permute(found[outside], keys, bits)
    return found.astype(np.int64)


def _permute(numbers: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """A permutation of the numbers below 2 ** bits: each half is changed by a hash of the other."""
    low, high = bits // 2, bits - bits // 2
    masks = [np.uint32((1 << n) - 1) for n in (high, low)]
    parts = (numbers >> np.uint64(low), numbers & np.uint64(masks[1]))
    halves = [part.astype(np.uint32) for part in parts]
    for turn, key in enumerate(keys):
        one, other = turn % 2, 1 - turn % 2
        halves[one] ^= _mixed(halves[other] + key) & masks[one]
    return (halves[0].astype(np.uint64) << np.uint64(low)) | halves[1]


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Each 32-bit number to another, in place (C. Wellons, "lowbias32")."""
    numbers ^= numbers >> np.uint32(16)
    numbers *= np.uint32(0x7FEB352D)
    numbers ^= numbers >> np.uint32(15)
    numbers *= np.uint32(0x846CA68B)
    numbers ^= numbers >> np.uint32(16)
    return numbers


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
        if self.rows <= HASHED:
            return permutation(self.seed, epoch, self.rows)[start : start + self.batch_size]
        return tuple(self._permuted(epoch, start, min(start + self.batch_size, self.rows)))

    def _permuted(self, epoch: int, start: int, end: int) -> list[int]:
        """Places `start` to `end` in the order of an epoch of many rows."""
        blocks = range(start // BLOCK, (end - 1) // BLOCK + 1)
        parts = [permuted_block(self.seed, epoch, self.rows, block) for block in blocks]
        first = blocks[0] * BLOCK
        found: list[int] = np.concatenate(parts)[start - first : end - first].tolist()
        return found

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
