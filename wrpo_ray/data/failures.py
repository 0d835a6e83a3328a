"""Failed rows: kept with their reasons and attempts, and retried by later runs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.compute as pc

from wrpo_ray.data.buckets import Bucket, write_shard
from wrpo_ray.data.records import FAILURE, FailureRow
from wrpo_ray.data.shards import Counts, list_shards
from wrpo_ray.storage.folder import Folder

FailureKey = tuple[str | None, str | None, int | None]
"""(prompt_id, source, sample)"""
RowKey = tuple[str | None, int | None]
"""(prompt_id, sample)"""
EARLIER = "earlier"
"""Key of the shard with the failures of earlier runs."""
SKIP_NO_NULL = pc.ScalarAggregateOptions(skip_nulls=False)


@dataclass(frozen=True)
class EarlierFailures:
    """Failed rows of a bucket in earlier runs."""

    attempts: dict[FailureKey, int]
    given_up: frozenset[RowKey]
    """Rows that are not retried; their failures stay."""
    just_tried: frozenset[RowKey] = frozenset()
    """Rows that failed a moment ago where a part of the request was filled; later runs retry them.
    """

    @property
    def left_out(self) -> frozenset[RowKey]:
        """Rows that are not tried in this run."""
        return self.given_up | self.just_tried


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
    folder: Folder,
    bucket: Bucket,
    max_attempts: int | None = None,
    part: Folder | None = None,
) -> Iterator[EarlierFailures]:
    """Yield a bucket's failures of earlier runs, for a block that retries their rows.

    At the end of the block they are deleted, but for those with `max_attempts` or more. Until
    then, and after a crash in the block, they are in a shard of their own beside the failures
    written in the block, so no attempt is lost.

    `part` has the failures of a request for some of these rows, which was filled a moment ago. What
    it has tried since counts as tried, and stays, too.
    """
    names = _shards(folder, bucket)
    rows = _read_rows(folder, names)
    tried = _tried_since(rows, part, bucket) if part else {}
    rows |= tried
    _merge_shards(folder, bucket, names, list(rows.values()), is_changed=bool(tried))
    given_up = [r for r in rows.values() if max_attempts and r["attempts"] >= max_attempts]
    kept = {_failed_key(row): row for row in given_up} | tried
    attempts = {key: row["attempts"] for key, row in rows.items()}
    yield EarlierFailures(attempts, _row_keys(given_up), _row_keys(tried.values()))
    if len(kept) < len(rows):
        write_failures(folder, bucket, list(kept.values()), EARLIER)
        folder.delete(_earlier(bucket, len(rows)))


def _tried_since(
    rows: dict[FailureKey, FailureRow], part: Folder, bucket: Bucket
) -> dict[FailureKey, FailureRow]:
    """The part's failed rows that have more attempts there than here."""
    there = _read_rows(part, _shards(part, replace(bucket, is_untouched=False)))
    return {
        key: row
        for key, row in there.items()
        if key not in rows or row["attempts"] > rows[key]["attempts"]
    }


def _shards(folder: Folder, bucket: Bucket) -> list[str]:
    """The paths of a bucket's shards."""
    shards = bucket.shards(folder)
    if any(shard.is_flat for shard in shards):  # another process may have merged them since
        shards = Bucket(*bucket.place).shards(folder)
    return [shard.path for shard in shards if shard.place == bucket.place]


def _read_rows(folder: Folder, names: Iterable[str]) -> dict[FailureKey, FailureRow]:
    """The failed rows of shards; of duplicates the most attempts count."""
    found = [row for name in names for row in folder.read_table(name).to_pylist()]
    return {_failed_key(row): row for row in sorted(found, key=lambda row: row["attempts"])}


def _merge_shards(
    folder: Folder, bucket: Bucket, names: list[str], rows: list[FailureRow], *, is_changed: bool
) -> None:
    """Merge a bucket's shards into one with these rows."""
    merged = _earlier(bucket, len(rows))
    if is_changed or names != [merged]:
        write_failures(folder, bucket, rows, EARLIER)
    for name in names:
        if name != merged:
            folder.delete(name)


def _row_keys(rows: Iterable[FailureRow]) -> frozenset[RowKey]:
    return frozenset((row["prompt_id"], row["sample"]) for row in rows)


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
