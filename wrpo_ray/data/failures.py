"""Failed rows: kept with their reasons and attempts, and retried by later runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from wrpo_ray.data.buckets import Bucket, write_shard
from wrpo_ray.data.records import FAILURE, FailureRow
from wrpo_ray.data.shards import Counts, list_shards
from wrpo_ray.storage.folder import Folder

FailureKey = tuple[str | None, str | None, int | None]
"""(prompt_id, source, sample)"""
EARLIER = "earlier"
"""Key of the shard with the failures of earlier runs."""
SKIP_NO_NULL = pc.ScalarAggregateOptions(skip_nulls=False)


@dataclass(frozen=True)
class EarlierFailures:
    """Failed rows of a bucket in earlier runs."""

    attempts: dict[FailureKey, int]
    given_up: frozenset[tuple[str | None, int | None]]
    """(prompt_id, sample) of rows that are not retried; their failures stay."""


def write_failures(
    folder: Folder,
    bucket: Bucket,
    rows: list[FailureRow],
    key: Any,
    earlier: EarlierFailures | None = None,
) -> None:
    """Write failed rows with their attempts in all runs to the step's `failures` folder."""
    before = earlier.attempts if earlier else {}
    counted = [r | {"attempts": r["attempts"] + before.get(_failed_key(r), 0)} for r in rows]
    if counted:
        write_shard(folder, bucket, FAILURE, counted, key)


@contextmanager
def retrying_failures(
    folder: Folder, bucket: Bucket, max_attempts: int | None = None
) -> Iterator[EarlierFailures]:
    """Yield a bucket's failures of earlier runs, for a block that retries their rows.

    At the end of the block they are deleted, but for those with `max_attempts` or more. Until
    then, and after a crash in the block, they are in a shard of their own beside the failures
    written in the block, so no attempt is lost.
    """
    rows = _merge_shards(folder, bucket)
    kept = [r for r in rows.values() if max_attempts and r["attempts"] >= max_attempts]
    attempts = {key: row["attempts"] for key, row in rows.items()}
    yield EarlierFailures(attempts, frozenset((row["prompt_id"], row["sample"]) for row in kept))
    if len(kept) < len(rows):
        write_failures(folder, bucket, kept, EARLIER)
        folder.delete(_earlier(bucket, len(rows)))


def _merge_shards(folder: Folder, bucket: Bucket) -> dict[FailureKey, FailureRow]:
    """Merge a bucket's failed rows into one shard; of duplicates the most attempts count."""
    shards = bucket.shards(folder)
    if any(shard.is_flat for shard in shards):  # another process may have merged them since
        shards = Bucket(*bucket.place).shards(folder)
    names = [shard.path for shard in shards if shard.place == bucket.place]
    found = [row for name in names for row in folder.read_table(name).to_pylist()]
    rows = {_failed_key(row): row for row in sorted(found, key=lambda row: row["attempts"])}
    merged = _earlier(bucket, len(rows))
    if names != [merged]:
        write_failures(folder, bucket, list(rows.values()), EARLIER)
    for name in names:
        if name != merged:
            folder.delete(name)
    return rows


def _earlier(bucket: Bucket, rows: int) -> str:
    """The path of the shard with so many failures of earlier runs."""
    return bucket.shard(EARLIER, Counts(rows))


def _failed_key(row: FailureRow) -> FailureKey:
    return row["prompt_id"], row["source"], row["sample"]


def failed_by_error(folder: Folder, most: int | None = None) -> list[dict[str, Any]]:
    """Count failed rows by type of error, with an example of each, the most frequent first.

    Reads `most` shards at most.
    """
    groups: dict[str, dict[str, Any]] = {}
    shown = ["where", "prompt_id", "message"]
    for shard in list_shards(folder)[:most]:
        table = folder.read_table(shard.path, ["error", "attempts", *shown])
        firsts = [(column, "first", SKIP_NO_NULL) for column in shown]
        counts = [("attempts", "max"), ([], "count_all"), *firsts]
        for found in table.group_by("error", use_threads=False).aggregate(counts).to_pylist():
            example = {column: found[f"{column}_first"] for column in shown}
            one = groups.setdefault(found["error"], {"rows": 0, "attempts": 0} | example)
            one["rows"] += found["count_all"]
            one["attempts"] = max(one["attempts"], found["attempts_max"])
    return [{"error": e} | groups[e] for e in sorted(groups, key=lambda e: -groups[e]["rows"])]
