"""Buckets: a hash partition of the prompts, stored as Parquet shards.

Every record of a prompt is in the bucket of its prompt_id. So generate, score, select and pair each
work bucket by bucket, without a shuffle and without collecting rows on the driver. Each bucket has
a folder for its shards (see `shards`). The number of buckets is a power of two, so shards written
under another number are still found: bucket i of B overlaps bucket j of C exactly if i = j modulo
min(B, C).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from wrpo_ray.data.shards import Counts, OpenShards, Place, Shard, find_shards, overlap, shard_path
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder


@dataclass(frozen=True)
class Bucket:
    """Bucket `index` of `count`."""

    index: int
    count: int
    session: str = field(default="", compare=False, repr=False)
    """The run or worker for which it is, if its buckets are `count` many; see `find_shards`."""
    is_untouched: bool = field(default=False, compare=False, repr=False)
    """Whether nothing was written into it since the session's first look at a folder."""

    def __contains__(self, prompt_id: str) -> bool:
        return int(prompt_id[:8], 16) % self.count == self.index

    @property
    def place(self) -> Place:
        """Its index and count."""
        return self.index, self.count

    def meets(self, shard: Shard) -> bool:
        """Whether a shard can hold records of the bucket."""
        return overlap(self.place, shard.place)

    def shard(self, key: Any, counts: Counts | None = None) -> str:
        """The path of the shard whose contents have the key, within its step's folder."""
        return shard_path(self.place, digest(key, 16), counts)

    def shards(self, folder: Folder) -> list[Shard]:
        """The shards of a step's folder that can hold its records, in the order of their keys."""
        return find_shards(folder, self.place, self.session, is_untouched=self.is_untouched)


def buckets(count: int) -> list[Bucket]:
    """All buckets of `count`."""
    return [Bucket(index, count) for index in range(count)]


def read_bucket(
    folder: Folder,
    bucket: Bucket,
    schema: pa.Schema,
    columns: list[str] | None = None,
    shards: list[Shard] | None = None,
) -> pa.Table:
    """Return a bucket's records, in the order of the shards' keys; `shards` if they are known."""
    shards = bucket.shards(folder) if shards is None else shards
    there = OpenShards(folder, shards, schema)
    if not shards:
        return there.read_all(columns)
    pairs = zip(shards, there.read(columns), strict=True)
    return pa.concat_tables([_within(bucket, shard, table) for shard, table in pairs])


def _within(bucket: Bucket, shard: Shard, table: pa.Table) -> pa.Table:
    if shard.place[1] >= bucket.count:  # all of the shard's rows are in the bucket
        return table
    inside = [i for i in table["prompt_id"].unique().to_pylist() if i and i in bucket]
    return table.filter(pc.is_in(table["prompt_id"], pa.array(inside, pa.string())))


def write_shard(
    folder: Folder,
    bucket: Bucket,
    schema: pa.Schema,
    rows: list[dict[str, Any]] | pa.Table,
    key: Any,
) -> Counts | None:
    """Commit rows as one shard; return what its name counts.

    Of shards with the same key, readers take the last.
    """
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, schema=schema)
    counts = Counts.of(table)
    folder.write_table(bucket.shard(key, counts), table)
    return counts


def chunks(rows: list[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive parts of at most `size` rows."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
