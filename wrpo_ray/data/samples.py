"""The prompts that a stage works on, and the answers to them in a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wrpo_ray.data.buckets import Bucket, read_bucket
from wrpo_ray.data.records import PROMPT
from wrpo_ray.data.shards import OpenShards, Rows, encoded, in_one, take_rows
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

ANSWER_KEY = ("prompt_id", "source", "sample")
"""Columns that identify an answer."""
LAST = 2**31 - 1
"""Sorts an answer without a number (`sample`) behind the others."""


@dataclass(frozen=True)
class Groups:
    """Some groups of prompts: those named, or all others."""

    names: tuple[str, ...]
    others: bool = False
    """Whether it is the prompts of all groups but those named, and of no group."""

    def only(self, names: tuple[str, ...] | None) -> Groups:
        """Those of the groups that are among the names; None: all of them."""
        if names is None:
            return self
        return Groups(tuple(sorted(n for n in set(names) if (n in self.names) != self.others)))

    @property
    def identity(self) -> list[Any]:
        """The part of step keys that tells them from other groups."""
        return [*sorted(self.names), self.others]

    def mask(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """Which prompts are of these groups, by their column `group`."""
        named = pc.is_in(column, value_set=pa.array(self.names, pa.string()))
        return pc.invert(named) if self.others else named


@lru_cache(maxsize=2)
def _read_prompts(folder: Folder, bucket: Bucket, session: str) -> pa.Table:
    """All columns of the last buckets that the session read; steps of prompts do not change."""
    return read_bucket(folder, bucket, PROMPT)


@dataclass(frozen=True)
class Prompts:
    """The prompts of some splits, as the input of a stage."""

    step: Step
    splits: tuple[str, ...]
    groups: Groups | None = field(default=None, kw_only=True)
    """The groups that they are of; None: all."""
    referenced: bool = field(default=False, kw_only=True)
    """Whether those without a reference are left out."""

    @property
    def narrowing(self) -> dict[str, Any]:
        """The part of step keys for fewer prompts than all of the splits; empty for all."""
        groups = {"groups": self.groups.identity} if self.groups else {}
        return groups | ({"referenced": True} if self.referenced else {})

    def of_groups(self, names: tuple[str, ...] | None) -> Self:
        """Those of them that are of the named groups; None: all of them."""
        if names is None:
            return self
        mine = self.groups or Groups((), others=True)
        return replace(self, groups=mine.only(names))

    def of_splits(self, splits: tuple[str, ...]) -> Self:
        """Those of them that are of these splits."""
        return replace(self, splits=splits)

    def has_part(self, other: Prompts) -> bool:
        """Whether the other ones are some splits of the same prompts, and not all."""
        return set(other.splits) < set(self.splits) and other == self.of_splits(other.splits)

    @property
    def share(self) -> float:
        """The share of the step's prompts that are of these splits, as it draws them."""
        shares: dict[str, float] = self.step.config.get("splits", {})
        return sum(shares.get(split, 1.0) for split in self.splits)

    @property
    def asks(self) -> str:
        """The question beyond the prompt ids, as part of the answers' store; empty for prompts."""
        return ""

    @property
    def inputs(self) -> tuple[Step, ...]:
        """The steps that hold the prompts."""
        return (self.step,)

    def read(self, root: Folder, bucket: Bucket, columns: list[str] | None = None) -> pa.Table:
        """Return the bucket's prompts (PROMPT records); `columns` has to contain `split`."""
        more = ["group"] * bool(self.groups) + ["reference"] * self.referenced
        wanted = list(dict.fromkeys([*columns, *more])) if columns else PROMPT.names
        if bucket.session:  # it reads them several times
            table = _read_prompts(root / self.step.folder, bucket, bucket.session).select(wanted)
        else:
            table = read_bucket(root / self.step.folder, bucket, PROMPT, wanted)
        table = of_splits(table, self.splits)
        if self.groups:
            table = table.filter(self.groups.mask(table["group"]))
        if self.referenced:
            table = table.filter(pc.is_valid(table["reference"]))
        return table.select(columns) if columns else table


def of_splits(table: pa.Table, splits: tuple[str, ...]) -> pa.Table:
    """Return the rows of some splits; the table itself if it has no others."""
    if set(table["split"].unique().to_pylist()) <= set(splits):
        return table
    return table.filter(pc.is_in(table["split"], pa.array(splits)))


def sorted_by_prompt(table: pa.Table) -> pa.Table:
    """Return the rows in the order of their prompts' ids; the table itself if it has it."""
    ids = in_one(table["prompt_id"])
    in_order = pc.all(pc.less_equal(ids[:-1], ids[1:])).as_py()
    return table if in_order else table.sort_by("prompt_id")


def parts(asked: Sequence[tuple[str, Prompts]]) -> dict[int, int]:
    """{number of a request: number of the one that asks the same store for a part of it}.

    A request is a store's name and prompts.
    """
    return {
        whole: part
        for whole, (store, prompts) in enumerate(asked)
        for part, (other, fewer) in enumerate(asked)
        if other == store and prompts.has_part(fewer)
    }


def shares(asked: Sequence[tuple[str, Prompts]]) -> list[float]:
    """For each of such requests its share of the one that it is a part of; 1 if it is of none."""
    found = [1.0] * len(asked)
    for whole, part in parts(asked).items():
        found[part] = asked[part][1].share / asked[whole][1].share
    return found


@dataclass(frozen=True)
class Samples:
    """Answers to `prompts`: samples 0 to `count` - 1 of each model in the store, or all if None.

    The store, filled by `step`, can hold more: other prompts, more samples.
    """

    step: Step
    prompts: Prompts
    count: int | None
    part: str = ""
    """Subfolder of the step's folder."""

    def folder(self, root: Folder) -> Folder:
        """The folder with the shards."""
        return root / self.step.folder / self.part if self.part else root / self.step.folder

    def read(
        self, root: Folder, bucket: Bucket, schema: pa.Schema, columns: list[str] | None = None
    ) -> pa.Table:
        """Return the bucket's answers, each once, sorted by (prompt, source, sample)."""
        names = schema.names if columns is None else columns
        found = self.find(root, bucket, encoded(schema, ANSWER_KEY[:2]), names)
        table = take_rows(found.table.select(names), found.rows)
        return table.cast(pa.schema([schema.field(name) for name in names], schema.metadata))

    def find(
        self, root: Folder, bucket: Bucket, schema: pa.Schema, columns: Sequence[str] = ()
    ) -> RowSelection:
        """Select the same answers with some columns, to read others later."""
        folder = self.folder(root)
        shards = OpenShards(folder, bucket.shards(folder), schema)
        names = list(dict.fromkeys([*ANSWER_KEY, *columns]))
        table = shards.read_all(names)
        wanted = self.prompts.read(root, bucket, ["prompt_id", "split"])["prompt_id"]
        inside = of_values(table["prompt_id"], lambda ids: pc.is_in(ids, in_one(wanted)))
        if self.count is not None:
            inside &= table["sample"].to_numpy() < self.count
        return RowSelection(shards, table, unique_rows(table, inside))


@dataclass(frozen=True)
class RowSelection:
    """A selection of rows from a bucket's concatenated shards."""

    shards: OpenShards
    table: pa.Table
    """The columns ANSWER_KEY, and others that were asked for, of every row of the shards."""
    rows: np.ndarray
    """Indices of the selected rows, in order."""

    def take(self, columns: list[str], rows: Rows) -> pa.Table:
        """Return further columns of some rows of the shards."""
        return self.shards.take(columns, rows)


def unique_rows(keys: pa.Table, inside: np.ndarray) -> np.ndarray:
    """Sorted indices of the rows inside; of a duplicate (prompt, source, sample) the first."""
    ids, sources = dense_ranks(keys["prompt_id"]), dense_ranks(keys["source"])
    ranks = joint_ranks([ids, sources, keys["sample"].fill_null(LAST).to_numpy()])
    order = sorting(ranks)
    order = order[inside[order]]
    unique: np.ndarray = order[np.diff(ranks[order], prepend=-1) != 0]
    return unique


def sorting(ranks: np.ndarray) -> np.ndarray:
    """Return the stable order of the ranks; those of a shard are mostly in order already."""
    if np.all(ranks[1:] >= ranks[:-1]):
        return np.arange(len(ranks))
    return np.argsort(ranks, kind="stable")


def joint_ranks(columns: Sequence[Rows]) -> np.ndarray:
    """Return a number for each row, (N,) from 0: the order of the rows by one column after another.

    Sorting by one number is one sort, and merges runs that are in order.
    """
    ranks, count = np.zeros(len(columns[0]), np.int64), 1
    for column in columns:
        low, high = int(column.min(initial=0)), int(column.max(initial=0))
        if count * (high - low + 1) >= 2**63:
            distinct, ranks = np.unique(ranks, return_inverse=True)
            count = len(distinct)
        ranks, count = ranks * (high - low + 1), count * (high - low + 1)
        ranks += column.astype(np.int64) - low
    return ranks


def dense_ranks(texts: pa.ChunkedArray) -> np.ndarray:
    """Return the rank of each text among the sorted distinct texts."""
    return of_values(texts, lambda values: pc.rank(values, tiebreaker="dense").cast(pa.int64()))


def of_values(
    column: pa.ChunkedArray, function: Callable[[pa.Array], pa.Array], of_null: int = 0
) -> np.ndarray:
    """Map a column of strings by a function of its distinct values, called once."""
    whole = in_one(column)
    codes = whole if pa.types.is_dictionary(whole.type) else whole.dictionary_encode()
    values = function(codes.dictionary).to_numpy(zero_copy_only=False)
    indices = codes.indices
    if indices.null_count:
        values = np.append(values, values.dtype.type(of_null))
        indices = indices.fill_null(len(values) - 1)
    found: np.ndarray = values[indices.to_numpy()]
    return found


def sample_keys(table: pa.Table) -> set[tuple[str, int]]:
    """Return the (prompt_id, sample) pairs of a table."""
    ids, samples = table["prompt_id"].to_pylist(), table["sample"].to_pylist()
    return set(zip(ids, samples, strict=True))
