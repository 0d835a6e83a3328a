"""A bucket's scored answers as columns, of which only what decides is read at first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wrpo_ray.data.buckets import Bucket
from wrpo_ray.data.records import ANSWER, CANDIDATES, SCORED
from wrpo_ray.data.samples import ANSWER_KEY, RowSelection, Samples, dense_ranks
from wrpo_ray.storage.fingerprints import unit_interval
from wrpo_ray.storage.folder import Folder

DECIDING = ["reward", "finish_reason", "text"]
"""What selection and pairing look at; `token_ids` are read when the answers are chosen."""


@dataclass(frozen=True)
class Candidates:
    """N answers to P prompts, sorted by (prompt, source, sample)."""

    stores: tuple[RowSelection, ...]
    table: pa.Table
    """KEY and DECIDING of all rows of the stores, which lie end to end, in no order."""
    rows: np.ndarray
    """Which row of the table each answer is, (N,)."""
    prompts: np.ndarray
    """Which of the P prompts each answer is to, (N,)."""

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def rewards(self) -> np.ndarray:
        """(N,)."""
        return self.table["reward"].to_numpy()[self.rows]

    @cached_property
    def cut_off(self) -> np.ndarray:
        """Whether an answer was, (N,); one whose finish is not known was not."""
        return self.mask(pc.equal(self.table["finish_reason"], "length"))

    @cached_property
    def groups(self) -> np.ndarray:
        """Which of the bucket's G pairs of prompt and source, in order, (N,)."""
        sources = dense_ranks(self.table["source"])[self.rows].astype(np.int64)
        keys = self.prompts * (sources.max(initial=0) + 1) + sources
        return np.cumsum(np.diff(keys, prepend=keys[:1]) != 0)

    @cached_property
    def group_prompts(self) -> np.ndarray:
        """Which of the P prompts each group is of, (G,)."""
        return self.prompts[np.flatnonzero(np.diff(self.groups, prepend=-1))]

    def mask(self, of_table: pa.ChunkedArray) -> np.ndarray:
        """A condition on the table's rows as one on the answers, (N,); null is false."""
        return of_table.fill_null(False).to_numpy()[self.rows]

    def texts(self, of: np.ndarray) -> pa.ChunkedArray:
        """The texts of these answers."""
        return self.table["text"].take(self.rows[of])

    def ties(self, of: np.ndarray) -> np.ndarray:
        """The place in [0, 1) of each of these answers among those of equal reward."""
        keys = self.table.select(ANSWER_KEY).take(self.rows[of]).to_pylist()
        return np.array([unit_interval("tie", *key.values()) for key in keys])

    def by_source(self, of: np.ndarray) -> dict[str, int]:
        """How many of these answers are of each source."""
        counts = pc.value_counts(self.table["source"].take(self.rows[of])).to_pylist()
        return {count["values"]: count["counts"] for count in counts}

    def answers(self, of: np.ndarray) -> pa.StructArray:
        """The ANSWER records of these answers, with their token ids."""
        table = self.table.take(self.rows[of])
        table = table.append_column("token_ids", self._token_ids(self.rows[of]))
        return _structs(table, list(ANSWER))

    def _token_ids(self, rows: np.ndarray) -> pa.ChunkedArray:
        lengths = [store.keys.num_rows for store in self.stores]
        ends = np.cumsum(lengths)
        of_store = np.searchsorted(ends, rows, side="right")
        parts, order = [], np.argsort(of_store, kind="stable")
        for number, store in enumerate(self.stores):
            inside = rows[order][of_store[order] == number] - (ends[number] - lengths[number])
            parts.append(store.read_all(["token_ids"]).take(inside))
        return pa.concat_tables(parts)["token_ids"].take(np.argsort(order))

    def scores(self, count: int) -> pa.ListArray:
        """The CANDIDATES records of P = `count` prompts: every answer's score."""
        fields = list(CANDIDATES.value_type)
        values = _structs(self.table.select([f.name for f in fields]).take(self.rows), fields)
        offsets = np.searchsorted(self.prompts, np.arange(count + 1)).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, values, type=CANDIDATES)


def _structs(table: pa.Table, fields: list[pa.Field]) -> pa.StructArray:
    columns = [table[field.name].combine_chunks() for field in fields]
    return pa.StructArray.from_arrays(columns, fields=fields)


def read_candidates(
    samples: Sequence[Samples], root: Folder, bucket: Bucket, prompt_ids: pa.Array
) -> Candidates:
    """The bucket's answers to these prompts, whose ids are sorted."""
    stores = tuple(s.find(root, bucket, SCORED) for s in samples)
    table = pa.concat_tables([_deciding(store) for store in stores])
    starts = np.cumsum([0, *(store.keys.num_rows for store in stores)])
    rows = np.concatenate([s.rows + start for s, start in zip(stores, starts, strict=False)])
    prompts = pc.index_in(table["prompt_id"], value_set=prompt_ids).fill_null(-1).to_numpy()
    rows = rows[prompts[rows] >= 0]
    columns = [prompts, dense_ranks(table["source"]), table["sample"].to_numpy()]
    rows = rows[np.lexsort([column[rows] for column in columns[::-1]])]
    return Candidates(stores, table, rows, prompts[rows].astype(np.int64))


def _deciding(store: RowSelection) -> pa.Table:
    table = store.read_all(DECIDING)
    for name in ANSWER_KEY:
        table = table.append_column(store.schema.field(name), store.keys[name])
    return table


class Verdicts(NamedTuple):
    """Which candidates may count as right and which as wrong, (N,) each.

    Both where the prompt has nothing to verify by; neither where the verifier failed.
    """

    right: np.ndarray
    wrong: np.ndarray


def read_verdicts(
    samples: Sequence[Samples],
    root: Folder,
    bucket: Bucket,
    candidates: Candidates,
    verifiable: np.ndarray,
) -> Verdicts:
    """What the verifier said; `verifiable` tells of which prompts it can, (P,)."""
    columns = [*ANSWER_KEY, "reward"]
    said = pa.concat_tables([s.read(root, bucket, SCORED, columns) for s in samples])
    keys = candidates.table.select(ANSWER_KEY).take(candidates.rows)
    keys = keys.append_column("row", pa.array(np.arange(len(candidates))))
    joined = keys.join(said, list(ANSWER_KEY), join_type="left outer").sort_by("row")
    values = joined["reward"].combine_chunks().fill_null(np.nan).to_numpy()
    either = ~verifiable[candidates.prompts]
    return Verdicts(either | (values == 1), either | (values < 1))
