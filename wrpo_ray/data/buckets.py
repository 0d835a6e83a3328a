"""Buckets: a hash partition of the prompts, stored as Parquet shards.

Every record of a prompt is in the bucket of its prompt_id. So generate, score, select and pair each
work bucket by bucket, without a shuffle and without collecting rows on the driver. A shard is named
`<bucket>-of-<buckets>-<key>.parquet`. The number of buckets is a power of two, so shards written
under another number are still found: bucket i of B overlaps bucket j of C exactly if i = j modulo
min(B, C).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from wrpo_ray.data.records import ADDED
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder

_NAME = re.compile(r"(\d{5})-of-(\d{5})-(\w+)\.parquet")


@dataclass(frozen=True)
class Bucket:
    """Bucket `index` of `count`."""

    index: int
    count: int

    def __contains__(self, prompt_id: str) -> bool:
        return int(prompt_id[:8], 16) % self.count == self.index

    def meets(self, shard: str) -> bool:
        """Whether a shard of this name can hold records of the bucket."""
        match = _NAME.fullmatch(shard)
        if not match:
            return False
        return (self.index - int(match[1])) % min(self.count, int(match[2])) == 0

    def shard(self, key: Any) -> str:
        """The name of the shard whose contents have the key."""
        return f"{self.index:05d}-of-{self.count:05d}-{digest(key, 16)}.parquet"


def buckets(count: int) -> list[Bucket]:
    """All buckets of `count`."""
    return [Bucket(index, count) for index in range(count)]


def read_bucket(
    folder: Folder, bucket: Bucket, schema: pa.Schema, columns: list[str] | None = None
) -> pa.Table:
    """Return a bucket's records, in the order of the shards' names."""
    names = shard_names(folder, bucket)
    tables = [_within(bucket, n, read_shards(folder, [n], schema, columns)) for n in names]
    return pa.concat_tables(tables) if tables else read_shards(folder, [], schema, columns)


def shard_names(folder: Folder, bucket: Bucket) -> list[str]:
    """Names of the shards that can hold records of the bucket, sorted."""
    return [name for name in folder.files(suffix=".parquet") if bucket.meets(name)]


def read_shards(
    folder: Folder, names: list[str], schema: pa.Schema, columns: list[str] | None
) -> pa.Table:
    """Return all rows of the shards, in order."""
    wanted = schema if columns is None else pa.schema([schema.field(c) for c in columns])
    tables = [_read(folder, name, wanted) for name in names]
    return pa.concat_tables(tables) if tables else wanted.empty_table()


def _read(folder: Folder, name: str, wanted: pa.Schema) -> pa.Table:
    """Return columns of a shard; those that an earlier version did not write are null."""
    try:
        return folder.read_table(name, wanted.names).cast(wanted)
    except pa.ArrowInvalid:  # a column is missing
        lacking = ADDED.difference(folder.column_names(name))
        if not lacking.intersection(wanted.names):
            raise
    table = folder.read_table(name, [n for n in wanted.names if n not in lacking])
    for column in lacking.intersection(wanted.names):
        table = table.append_column(column, pa.nulls(len(table), pa.string()))
    return table.select(wanted.names).cast(wanted)


def _within(bucket: Bucket, shard: str, table: pa.Table) -> pa.Table:
    if int(shard.split("-")[2]) >= bucket.count:  # all of the shard's rows are in the bucket
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
    """Commit rows as one shard; the same key overwrites the same file."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, schema=schema)
    folder.write_table(bucket.shard(key), table)


def chunks(rows: list[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive parts of at most `size` rows."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
