"""Counts over preference rows for the dataset card, which add up over shards."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ANSWERS = {"source_chosen": "y_ws", "target_chosen": "y_wt", "rejected": "y_l"}
BINS = 10
"""Bins of a histogram of rewards, from the lowest to the highest reward."""


@dataclass
class Statistics:
    """Counts of PREFERENCE records."""

    bounds: tuple[float, float] | None
    """The lowest and highest reward; None without rewards."""
    rows: int = 0
    wins: Counter[str] = field(default_factory=Counter)
    """Rows by the source of y_ws."""
    rewards: dict[str, Counter[int]] = field(default_factory=dict)
    """{answer: {bin: rows}}"""
    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    """{`prompt` or answer: {e: rows with at least 2^(e-1) and below 2^e characters}}"""

    def add(self, batch: pa.RecordBatch) -> None:
        """Count a batch."""
        self.rows += len(batch)
        won = pc.value_counts(batch["source_chosen"].field("source").drop_null())
        self.wins.update({v["values"]: v["counts"] for v in won.to_pylist()})
        self._count(self.lengths, "prompt", _prompt_lengths(batch))
        for column, name in ANSWERS.items():
            self._count(self.lengths, name, _lengths(batch[column].field("text")))
            if self.bounds:
                rewards = batch[column].field("reward").drop_null().to_numpy(zero_copy_only=False)
                self._count(self.rewards, name, self._bins(rewards))

    def merge(self, other: Self) -> None:
        """Add the counts of other rows, made with the same bounds."""
        self.rows += other.rows
        self.wins.update(other.wins)
        for mine, theirs in ((self.rewards, other.rewards), (self.lengths, other.lengths)):
            for name, counts in theirs.items():
                mine.setdefault(name, Counter()).update(counts)

    @property
    def edges(self) -> np.ndarray:
        """Edges of the bins of rewards, shape (BINS + 1,)."""
        return np.linspace(*(self.bounds or (0.0, 0.0)), BINS + 1)

    def _bins(self, rewards: np.ndarray) -> np.ndarray:
        return np.clip(np.searchsorted(self.edges, rewards, side="right") - 1, 0, BINS - 1)

    def _count(self, into: dict[str, Counter[int]], name: str, values: np.ndarray) -> None:
        found, counts = np.unique(values, return_counts=True)
        counted = dict(zip(found.tolist(), counts.tolist(), strict=True))
        into.setdefault(name, Counter()).update(counted)


def _lengths(texts: pa.Array) -> np.ndarray:
    """For each text the exponent e of its length: 2^(e-1) <= characters < 2^e."""
    return _exponents(pc.utf8_length(texts).to_numpy(zero_copy_only=False))


def _prompt_lengths(batch: pa.RecordBatch) -> np.ndarray:
    messages = batch["messages"]
    characters = pc.utf8_length(messages.flatten().field("content")).to_numpy(zero_copy_only=False)
    owner = pc.list_parent_indices(messages).to_numpy(zero_copy_only=False)
    return _exponents(np.bincount(owner, characters, minlength=len(batch)))


def _exponents(lengths: np.ndarray) -> np.ndarray:
    exponents: np.ndarray = np.frexp(lengths)[1]
    return exponents


def bounds(files: Iterable[pq.FileMetaData]) -> tuple[float, float] | None:
    """The lowest and highest reward in Parquet files, from their footers."""
    found: list[float] = []
    for file in files:
        paths = [file.schema.column(i).path for i in range(file.num_columns)]
        wanted = [i for i, path in enumerate(paths) if path in _REWARDS]
        for group in range(file.num_row_groups):
            columns = [file.row_group(group).column(i).statistics for i in wanted]
            found += [v for s in columns if s and s.has_min_max for v in (s.min, s.max)]
    return (min(found), max(found)) if found else None


_REWARDS = [f"{name}.reward" for name in ANSWERS]
