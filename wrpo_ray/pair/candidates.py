"""A bucket's scored answers as columns, of which only what decides is read at first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wrpo_ray.core.records import ANSWER, CANDIDATES, SCORED, unit_interval
from wrpo_ray.core.shards import KEY, Bucket, Found, Samples, ranks
from wrpo_ray.core.storage import Folder

DECIDING = [*KEY, "reward", "finish_reason", "text"]
"""Columns that selection and pairing look at; `token_ids` are read of the chosen answers only."""


@dataclass(frozen=True)
class Candidates:
    """N answers to P prompts, sorted by (prompt, source, sample)."""

    table: pa.Table
    """The columns DECIDING."""
    prompts: np.ndarray
    """Which of the P prompts, (N,)."""
    places: np.ndarray
    """Where an answer lies in all stores laid end to end, (N,)."""
    stores: tuple[Found, ...]

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def rewards(self) -> np.ndarray:
        """(N,)."""
        return self.table["reward"].to_numpy()

    @cached_property
    def texts(self) -> pa.Array:
        """(N,)."""
        return self.table["text"].combine_chunks()

    @cached_property
    def cut_off(self) -> np.ndarray:
        """Whether an answer was, (N,); one whose finish is not known was not."""
        return pc.equal(self.table["finish_reason"], "length").fill_null(False).to_numpy()

    @cached_property
    def sources(self) -> np.ndarray:
        """Which of the bucket's sources, by name, (N,)."""
        return ranks(self.table["source"]).astype(np.int64)

    @cached_property
    def groups(self) -> np.ndarray:
        """Which of the bucket's G pairs of prompt and source, in order, (N,)."""
        keys = self.prompts * (self.sources.max(initial=0) + 1) + self.sources
        return np.cumsum(np.diff(keys, prepend=keys[:1]) != 0)

    @cached_property
    def group_prompts(self) -> np.ndarray:
        """Which of the P prompts each group is of, (G,)."""
        return self.prompts[np.flatnonzero(np.diff(self.groups, prepend=-1))]

    def ties(self, rows: np.ndarray) -> np.ndarray:
        """The place in [0, 1) of each of these candidates among those of equal reward."""
        keys = self.table.select(KEY).take(rows).to_pylist()
        return np.array([unit_interval("tie", *key.values()) for key in keys])

    def by_source(self, rows: np.ndarray) -> dict[str, int]:
        """How many of these candidates are of each source."""
        counts = pc.value_counts(self.table["source"].take(rows)).to_pylist()
        return {count["values"]: count["counts"] for count in counts}

    def answers(self, rows: np.ndarray) -> pa.StructArray:
        """The ANSWER records of these rows, with their token ids."""
        table = self.table.take(rows).append_column("token_ids", self._token_ids(rows))
        fields = list(ANSWER)
        columns = [table[f.name].combine_chunks() for f in fields]
        return pa.StructArray.from_arrays(columns, fields=fields)

    def _token_ids(self, rows: np.ndarray) -> pa.ChunkedArray:
        places = self.places[rows]
        ends = np.cumsum([len(store.rows) for store in self.stores])
        of_store = np.searchsorted(ends, places, side="right")
        parts, order = [], np.argsort(of_store, kind="stable")
        for number, store in enumerate(self.stores):
            inside = places[order][of_store[order] == number] - (ends[number] - len(store.rows))
            parts.append(store.read(["token_ids"], inside))
        return pa.concat_tables(parts).take(np.argsort(order))["token_ids"]

    def scores(self, count: int) -> pa.ListArray:
        """The CANDIDATES records of P = `count` prompts: every answer's score."""
        fields = list(CANDIDATES.value_type)
        columns = [self.table[f.name].combine_chunks() for f in fields]
        offsets = np.searchsorted(self.prompts, np.arange(count + 1)).astype(np.int32)
        values = pa.StructArray.from_arrays(columns, fields=fields)
        return pa.ListArray.from_arrays(offsets, values, type=CANDIDATES)


def read_candidates(
    samples: Sequence[Samples], root: Folder, bucket: Bucket, prompt_ids: pa.Array
) -> Candidates:
    """The bucket's answers to these prompts, whose ids are sorted."""
    stores = tuple(s.find(root, bucket, SCORED) for s in samples)
    table = pa.concat_tables([store.read(DECIDING) for store in stores])
    prompts = pc.index_in(table["prompt_id"], value_set=prompt_ids).fill_null(-1).to_numpy()
    columns = [prompts, ranks(table["source"]), table["sample"].to_numpy()]
    order = np.lexsort(columns[::-1])
    order = order[np.searchsorted(prompts[order], 0) :]
    return Candidates(table.take(order), prompts[order].astype(np.int64), order, stores)


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
    columns = [*KEY, "reward"]
    said = pa.concat_tables([s.read(root, bucket, SCORED, columns) for s in samples])
    keys = candidates.table.select(KEY).append_column("row", pa.array(np.arange(len(candidates))))
    joined = keys.join(said, list(KEY), join_type="left outer").sort_by("row")
    values = joined["reward"].combine_chunks().fill_null(np.nan).to_numpy()
    either = ~verifiable[candidates.prompts]
    return Verdicts(either | (values == 1), either | (values < 1))
