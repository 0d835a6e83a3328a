"""The prompts that a stage works on, and the answers to them in a store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wrpo_ray.data.buckets import Bucket, read_bucket, read_shards, shard_names
from wrpo_ray.data.records import PROMPT
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

ANSWER_KEY = ("prompt_id", "source", "sample")
"""What an answer is known by."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of some splits: what a stage is asked for, and the bound of what it reads."""

    step: Step
    splits: tuple[str, ...]

    @property
    def asks(self) -> str:
        """What is asked, where that is more than prompt ids say; part of the answers' store."""
        return ""

    @property
    def inputs(self) -> tuple[Step, ...]:
        """The steps that they are read from."""
        return (self.step,)

    def read(self, root: Folder, bucket: Bucket, columns: list[str] | None = None) -> pa.Table:
        """The bucket's prompts (records PROMPT); `columns` has to name `split`."""
        table = read_bucket(root / self.step.folder, bucket, PROMPT, columns)
        return table.filter(pc.is_in(table["split"], pa.array(self.splits)))


@dataclass(frozen=True)
class Samples:
    """Answers to `prompts`: samples 0 to `count` - 1 of each model in the store; all, if None.

    `step` filled a store that can hold more than these: other prompts, more samples.
    """

    step: Step
    prompts: Prompts
    count: int | None
    part: str = ""
    """Subfolder of the step's folder."""

    def folder(self, root: Folder) -> Folder:
        """Where the shards lie."""
        return root / self.step.folder / self.part if self.part else root / self.step.folder

    def read(
        self, root: Folder, bucket: Bucket, schema: pa.Schema, columns: list[str] | None = None
    ) -> pa.Table:
        """The bucket's answers, each (prompt, source, sample) once, in this order."""
        return self.find(root, bucket, schema).read(columns)

    def find(self, root: Folder, bucket: Bucket, schema: pa.Schema) -> RowSelection:
        """The same answers, whose columns are read when they are asked for."""
        folder = self.folder(root)
        names = shard_names(folder, bucket)
        keys = read_shards(folder, names, schema, list(ANSWER_KEY))
        wanted = self.prompts.read(root, bucket, ["prompt_id", "split"])["prompt_id"]
        inside = pc.is_in(keys["prompt_id"], wanted.combine_chunks()).to_numpy()
        if self.count is not None:
            inside &= keys["sample"].to_numpy() < self.count
        return RowSelection(folder, tuple(names), schema, keys, unique_rows(keys, inside))


@dataclass(frozen=True)
class RowSelection:
    """Rows of a bucket's shards, which lie end to end."""

    folder: Folder
    shards: tuple[str, ...]
    schema: pa.Schema
    keys: pa.Table
    """KEY of every row of the shards."""
    rows: np.ndarray
    """Which rows are meant, in their order."""

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Columns of the rows that are meant."""
        return self.read_all(columns).take(self.rows)

    def read_all(self, columns: list[str] | None = None) -> pa.Table:
        """Columns of every row of the shards."""
        return read_shards(self.folder, list(self.shards), self.schema, columns)


def unique_rows(keys: pa.Table, inside: np.ndarray) -> np.ndarray:
    """Rows of each (prompt, source, sample) inside, the first where it is there twice, in order."""
    columns = [
        dense_ranks(keys["prompt_id"]),
        dense_ranks(keys["source"]),
        keys["sample"].to_numpy(),
    ]
    order = np.lexsort(columns[::-1])
    order = order[inside[order]]
    is_new = np.ones(len(order), bool)
    is_new[1:] = np.any([np.diff(c[order]) != 0 for c in columns], axis=0)
    return order[is_new]


def dense_ranks(texts: pa.ChunkedArray) -> np.ndarray:
    """For each text its place among the distinct ones, sorted."""
    encoded = texts.combine_chunks().dictionary_encode()
    places = pc.rank(encoded.dictionary, tiebreaker="dense").to_numpy()
    return places[encoded.indices.to_numpy()]


def sample_keys(table: pa.Table) -> set[tuple[str, int]]:
    """The (prompt_id, sample) pairs of a table."""
    ids, samples = table["prompt_id"].to_pylist(), table["sample"].to_pylist()
    return set(zip(ids, samples, strict=True))
