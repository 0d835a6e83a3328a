"""Scored answers as columns. Token ids and reasoning are read only for the chosen answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wrpo_ray.data.buckets import Bucket
from wrpo_ray.data.records import ANSWER, CANDIDATES, KEPT, SCORED
from wrpo_ray.data.samples import (
    ANSWER_KEY,
    LAST,
    RowSelection,
    Samples,
    dense_ranks,
    joint_ranks,
    of_values,
    sorting,
)
from wrpo_ray.data.shards import by_part, encoded, in_one, joined, take_rows
from wrpo_ray.stages.pair.select import Bools, Floats, Ints
from wrpo_ray.storage.fingerprints import unit_intervals
from wrpo_ray.storage.folder import Folder

DECIDING = ["reward", "finish_reason", "text", "reasoning_state"]
"""The columns that selection and pairing need."""
SHORT = [*ANSWER_KEY, "reward", "finish_reason", "reasoning_state"]
"""Columns of numbers and of few values, whose copies cost little."""
LATE = ["token_ids", "reasoning"]
"""Long columns, which are read after the choice."""
STORED = encoded(SCORED, ("prompt_id", "source", "finish_reason", "reasoning_state"))
"""How columns are read."""


@dataclass(frozen=True)
class Candidates:
    """N answers to P prompts, sorted by (prompt, source, sample)."""

    stores: tuple[RowSelection, ...]
    table: pa.Table
    """The columns ANSWER_KEY and DECIDING of all rows of the stores, concatenated, in no order.
    Without stores, such as in a notebook, the columns LATE too."""
    short: pa.Table
    """Its columns SHORT, in one piece."""
    rows: Ints
    """The row of each answer in the table, (N,)."""
    prompts: Ints
    """The prompt of each answer, 0 to P - 1, (N,)."""

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def rewards(self) -> Floats:
        """The reward of each answer, (N,)."""
        rewards: Floats = self.short["reward"].to_numpy()[self.rows]
        return rewards

    @cached_property
    def cut_off(self) -> Bools:
        """Whether each answer was cut off, (N,); false where the finish reason is unknown."""
        return self.has("finish_reason", "length")

    @cached_property
    def groups(self) -> Ints:
        """The group of each answer, (N,): G groups of the same prompt and source, in order."""
        sources = dense_ranks(self.short["source"])[self.rows]
        keys = joint_ranks([self.prompts, sources])
        return np.cumsum(np.diff(keys, prepend=keys[:1]) != 0)

    @cached_property
    def group_prompts(self) -> Ints:
        """The prompt of each group, (G,)."""
        return self.prompts[np.flatnonzero(np.diff(self.groups, prepend=-1))]

    def has(self, column: str, value: str) -> Bools:
        """Whether a column of the answers has the value, (N,)."""
        is_value = of_values(self.short[column], lambda values: pc.equal(values, value))
        return self.mask(is_value)

    def mask(self, of_table: Bools | pa.ChunkedArray) -> Bools:
        """A condition on the table's rows as one on the answers, (N,); null is false."""
        if isinstance(of_table, pa.ChunkedArray):
            of_table = of_table.fill_null(False).to_numpy()
        mask: Bools = of_table[self.rows]
        return mask

    def texts(self, of: Ints) -> pa.ChunkedArray:
        """The texts of these answers."""
        return take_rows(self.table.select(["text"]), self.rows[of])["text"]

    def ties(self, of: Ints) -> Floats:
        """A number in [0, 1) for each of these answers that orders those of equal reward."""
        if not len(of):
            return np.zeros(0)
        keys = self.short.select(ANSWER_KEY).take(self.rows[of])
        ids, sources = (_as_json(in_one(keys[name])) for name in ("prompt_id", "source"))
        samples = keys["sample"].cast(pa.string()).fill_null("null")
        texts = pc.binary_join_element_wise('["tie",', ids, ",", sources, ",", samples, "]", "")
        return np.array(unit_intervals(texts.cast(pa.binary()).to_pylist()))

    def by_source(self, of: Ints) -> dict[str, int]:
        """How many of these answers each source gave."""
        sources = self.short["source"].take(self.rows[of])
        return {count["values"]: count["counts"] for count in pc.value_counts(sources).to_pylist()}

    def answers(self, of: Ints) -> pa.StructArray:
        """The ANSWER records of these answers: their text with kept reasoning, their token ids."""
        table = take_rows(self.table, self.rows[of])
        if self.stores:
            late = self._late(self.rows[of])
            for name in LATE:
                table = table.append_column(name, late[name])
        is_kept = pc.equal(table["reasoning_state"], KEPT).fill_null(False)
        if pc.any(is_kept).as_py():
            whole = pc.binary_join_element_wise(table["reasoning"].fill_null(""), table["text"], "")
            text = pc.if_else(is_kept, whole, table["text"])
            table = table.set_column(table.column_names.index("text"), "text", text)
        return _structs(table, list(ANSWER))

    def _late(self, rows: Ints) -> pa.Table:
        parts, places = by_part(rows, [len(store.table) for store in self.stores])
        tables = [self.stores[part].take(LATE, inside) for part, inside in parts]
        return joined(tables, places, pa.schema([SCORED.field(name) for name in LATE]))

    def scores(self, of: Ints) -> pa.ListArray:
        """The CANDIDATES records of these prompts: the reward of every answer."""
        starts, ends = (np.searchsorted(self.prompts, of, side) for side in ("left", "right"))
        offsets = np.append(0, np.cumsum(ends - starts)).astype(np.int32)
        places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], ends - starts)
        fields = list(CANDIDATES.value_type)
        table = self.short.select([field.name for field in fields])
        values = _structs(table.take(self.rows[places]), fields)
        return pa.ListArray.from_arrays(offsets, values, type=CANDIDATES)


def _as_json(texts: pa.Array) -> pa.Array:
    """Each text as JSON, (N,)."""
    codes = texts if pa.types.is_dictionary(texts.type) else texts.dictionary_encode()
    values = pa.array([json.dumps(value) for value in codes.dictionary.to_pylist()], pa.string())
    return values.take(codes.indices)


def _structs(table: pa.Table, fields: list[pa.Field]) -> pa.StructArray:
    columns = [in_one(table[field.name]).cast(field.type) for field in fields]
    return pa.StructArray.from_arrays(columns, fields=fields)


def read_candidates(
    samples: Sequence[Samples], root: Folder, bucket: Bucket, prompt_ids: pa.Array
) -> Candidates:
    """Read the bucket's answers to these prompts, whose ids are sorted."""
    stores = tuple(s.find(root, bucket, STORED, DECIDING) for s in samples)
    table = pa.concat_tables([store.table for store in stores])
    starts = np.cumsum([0, *(len(store.table) for store in stores)])
    rows = np.concatenate([s.rows + start for s, start in zip(stores, starts, strict=False)])
    return candidates_of(stores, table, rows, prompt_ids)


def candidates_of(
    stores: tuple[RowSelection, ...], table: pa.Table, rows: Ints, prompt_ids: pa.Array
) -> Candidates:
    """The answers in `rows` of the table to these prompts, whose ids are sorted."""
    short = table.select(SHORT).combine_chunks()
    prompts = of_values(short["prompt_id"], lambda ids: pc.index_in(ids, prompt_ids).fill_null(-1))
    rows = rows[prompts[rows] >= 0]
    samples = short["sample"].fill_null(LAST).to_numpy()
    columns = [prompts, dense_ranks(short["source"]), samples]
    ranks = joint_ranks([column[rows] for column in columns])
    rows = rows[sorting(ranks)]
    return Candidates(stores, table, short, rows, prompts[rows].astype(np.int64))


class Verdicts(NamedTuple):
    """Which candidates count as right and which as wrong, (N,) each.

    An answer to a prompt without a reference counts as both, one that the verifier failed on as
    neither.
    """

    right: Bools
    wrong: Bools


def read_verdicts(
    samples: Sequence[Samples],
    root: Folder,
    bucket: Bucket,
    candidates: Candidates,
    verifiable: Bools,
) -> Verdicts:
    """Read the verifier's outcomes; `verifiable` (P,): whether a prompt has a reference."""
    columns = [*ANSWER_KEY, "reward"]
    outcomes = pa.concat_tables([s.read(root, bucket, SCORED, columns) for s in samples])
    keys = candidates.short.select(ANSWER_KEY).take(candidates.rows)
    keys = keys.cast(outcomes.select(ANSWER_KEY).schema)
    keys = keys.append_column("row", pa.array(np.arange(len(candidates))))
    found = keys.join(outcomes, list(ANSWER_KEY), join_type="left outer").sort_by("row")
    values = in_one(found["reward"]).fill_null(np.nan).to_numpy()
    both = ~verifiable[candidates.prompts]
    return Verdicts(both | (values == 1), both | (values < 1))
