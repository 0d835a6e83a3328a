"""Parquet shards in buckets: every record of a prompt lies in the bucket of its prompt_id.

So generate, score, select and pair each work bucket by bucket, without a shuffle and without
gathering on the driver. A shard is named `<bucket>-of-<buckets>-<key>.parquet`. The number of
buckets is a power of two, so shards written under another number are still found: bucket i of
B meets bucket j of C exactly when i = j modulo min(B, C).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wrpo_ray.data.records import FAILURE, PROMPT
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

EARLIER = "earlier"
SKIP_NO_NULL = pc.ScalarAggregateOptions(skip_nulls=False)
_NAME = re.compile(r"(\d{5})-of-(\d{5})-(\w+)\.parquet")
KEY = ("prompt_id", "source", "sample")
"""What an answer is known by."""


@dataclass(frozen=True)
class Bucket:
    """Bucket `index` of `count`."""

    index: int
    count: int

    def __contains__(self, prompt_id: str) -> bool:
        return int(prompt_id[:8], 16) % self.count == self.index

    def meets(self, shard: str) -> bool:
        """Whether a shard, by its name, can hold records of this bucket."""
        match = _NAME.fullmatch(shard)
        if not match:
            return False
        return (self.index - int(match[1])) % min(self.count, int(match[2])) == 0

    def shard(self, key: Any) -> str:
        """The name of the shard with the contents that `key` stands for."""
        return f"{self.index:05d}-of-{self.count:05d}-{digest(key, 16)}.parquet"


def buckets(count: int) -> list[Bucket]:
    """All buckets of `count`."""
    return [Bucket(index, count) for index in range(count)]


def read_bucket(
    folder: Folder, bucket: Bucket, schema: pa.Schema, columns: list[str] | None = None
) -> pa.Table:
    """A bucket's records, in the order of their shards' names; empty where there are none."""
    names = _shards(folder, bucket)
    tables = [_within(bucket, n, _read_shards(folder, [n], schema, columns)) for n in names]
    return pa.concat_tables(tables) if tables else _read_shards(folder, [], schema, columns)


def _shards(folder: Folder, bucket: Bucket) -> list[str]:
    return [name for name in folder.files(suffix=".parquet") if bucket.meets(name)]


def _read_shards(
    folder: Folder, names: list[str], schema: pa.Schema, columns: list[str] | None
) -> pa.Table:
    """Whole shards, one after another."""
    wanted = schema if columns is None else pa.schema([schema.field(c) for c in columns])
    tables = [folder.read_table(name, wanted.names).cast(wanted) for name in names]
    return pa.concat_tables(tables) if tables else wanted.empty_table()


def _within(bucket: Bucket, shard: str, table: pa.Table) -> pa.Table:
    if int(shard.split("-")[2]) >= bucket.count:  # the shard's bucket is this one, or a part of it
        return table
    inside = [i for i in table["prompt_id"].unique().to_pylist() if i in bucket]
    return table.filter(pc.is_in(table["prompt_id"], pa.array(inside, pa.string())))


def write_shard(
    folder: Folder,
    bucket: Bucket,
    schema: pa.Schema,
    rows: list[dict[str, Any]] | pa.Table,
    key: Any,
) -> None:
    """Commit rows as one shard; the same key writes the same file again."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, schema=schema)
    folder.write_table(bucket.shard(key), table)


# --- failed rows -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Earlier:
    """Failed rows of a bucket in earlier runs, known by (prompt_id, source, sample)."""

    attempts: dict[tuple[Any, ...], int]
    """How often each was tried."""
    given_up: frozenset[tuple[str, int]]
    """Those that are not tried again, by (prompt_id, sample); they stay where they are kept."""


def write_failures(
    folder: Folder,
    bucket: Bucket,
    rows: list[dict[str, Any]],
    key: Any,
    earlier: Earlier | None = None,
) -> None:
    """Keep failed rows, with their attempts in all runs; `folder` is the step's `failures`."""
    before = earlier.attempts if earlier else {}
    counted = [r | {"attempts": r["attempts"] + before.get(_failed_key(r), 0)} for r in rows]
    if counted:
        write_shard(folder, bucket, FAILURE, counted, key)


@contextmanager
def trying_again(
    folder: Folder, bucket: Bucket, max_attempts: int | None = None
) -> Iterator[Earlier]:
    """A bucket's failed rows of earlier runs, while those in the block are tried again.

    At its end they are forgotten, but for those with `max_attempts` or more. Until then, and
    after a crash in the block, they lie in a shard of their own: no attempt is lost, and what is
    written in the block is beside them.
    """
    rows = _take_together(folder, bucket)
    kept = [r for r in rows.values() if max_attempts and r["attempts"] >= max_attempts]
    attempts = {key: row["attempts"] for key, row in rows.items()}
    yield Earlier(attempts, frozenset((row["prompt_id"], row["sample"]) for row in kept))
    if kept and len(kept) < len(rows):
        write_failures(folder, bucket, kept, EARLIER)
    elif rows and not kept:
        folder.delete(bucket.shard(EARLIER))


def _take_together(folder: Folder, bucket: Bucket) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Put a bucket's failed rows into one shard, each as it is with the most attempts."""
    shard = f"{bucket.index:05d}-of-{bucket.count:05d}-"
    names = [name for name in folder.files(suffix=".parquet") if name.startswith(shard)]
    found = [row for name in names for row in folder.read_table(name).to_pylist()]
    rows = {_failed_key(row): row for row in sorted(found, key=lambda row: row["attempts"])}
    if names != [bucket.shard(EARLIER)]:
        write_failures(folder, bucket, list(rows.values()), EARLIER)
    for name in names:
        if name != bucket.shard(EARLIER):
            folder.delete(name)
    return rows


def _failed_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["prompt_id"], row["source"], row["sample"]


def failed_by_error(folder: Folder, most: int | None = None) -> list[dict[str, Any]]:
    """{error, rows, attempts (most), where, prompt_id, message (of one)} by type of error.

    Of `most` shards at the most, where that is given.
    """
    groups: dict[str, dict[str, Any]] = {}
    shown = ["where", "prompt_id", "message"]
    for name in folder.files(suffix=".parquet")[:most]:
        table = folder.read_table(name, ["error", "attempts", *shown])
        firsts = [(column, "first", SKIP_NO_NULL) for column in shown]
        counts = [("attempts", "max"), ([], "count_all"), *firsts]
        for found in table.group_by("error", use_threads=False).aggregate(counts).to_pylist():
            example = {column: found[f"{column}_first"] for column in shown}
            one = groups.setdefault(found["error"], {"rows": 0, "attempts": 0} | example)
            one["rows"] += found["count_all"]
            one["attempts"] = max(one["attempts"], found["attempts_max"])
    return [{"error": e} | groups[e] for e in sorted(groups, key=lambda e: -groups[e]["rows"])]


# --- prompts and samples ---------------------------------------------------------------------


def chunks(rows: list[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive parts of at most `size` rows."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


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

    def find(self, root: Folder, bucket: Bucket, schema: pa.Schema) -> Found:
        """The same answers, whose columns are read when they are asked for."""
        folder = self.folder(root)
        names = _shards(folder, bucket)
        keys = _read_shards(folder, names, schema, list(KEY))
        wanted = self.prompts.read(root, bucket, ["prompt_id", "split"])["prompt_id"]
        inside = pc.is_in(keys["prompt_id"], wanted.combine_chunks()).to_numpy()
        if self.count is not None:
            inside &= keys["sample"].to_numpy() < self.count
        return Found(folder, tuple(names), schema, keys, unique_rows(keys, inside))


@dataclass(frozen=True)
class Found:
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
        return _read_shards(self.folder, list(self.shards), self.schema, columns)


def unique_rows(keys: pa.Table, inside: np.ndarray) -> np.ndarray:
    """Rows of each (prompt, source, sample) inside, the first where it is there twice, in order."""
    columns = [ranks(keys["prompt_id"]), ranks(keys["source"]), keys["sample"].to_numpy()]
    order = np.lexsort(columns[::-1])
    order = order[inside[order]]
    is_new = np.ones(len(order), bool)
    is_new[1:] = np.any([np.diff(c[order]) != 0 for c in columns], axis=0)
    return order[is_new]


def ranks(texts: pa.ChunkedArray) -> np.ndarray:
    """For each text its place among the distinct ones, sorted."""
    encoded = texts.combine_chunks().dictionary_encode()
    places = pc.rank(encoded.dictionary, tiebreaker="dense").to_numpy()
    return places[encoded.indices.to_numpy()]


def sample_keys(table: pa.Table) -> set[tuple[str, int]]:
    """The (prompt_id, sample) pairs of a table."""
    ids, samples = table["prompt_id"].to_pylist(), table["sample"].to_pylist()
    return set(zip(ids, samples, strict=True))
