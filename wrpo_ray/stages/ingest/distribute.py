"""Rows of the user's files to the buckets of their prompts, with Ray Data.

Each file is read in one task, Ray Data shuffles its rows to their buckets, and each bucket is
written as one shard; no row passes through the driver. Small inputs are read and written by a
single task, because starting a shuffle would take longer.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from wrpo_ray.data import records
from wrpo_ray.runtime.tasks import map_tasks
from wrpo_ray.runtime.worker_errors import summarize_error
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder

Row = dict[str, Any]
SMALL = 32_000_000
"""Total bytes of the files up to which a single task reads them."""
EXAMPLES, SHOWN = "examples", 3
"""Column of a writer's result with texts to show, as JSON, and how many of them are shown."""


@dataclass(frozen=True)
class Work:
    """Reading, shuffling and writing of some files."""

    name: str
    tasks: Sequence[Row]
    """What `read` is called with: {`files`: URIs, ...}, a task for each."""
    read: Callable[[Row], Iterator[Row]]
    """Yields rows {bucket, good, record} (`in_bucket`)."""
    writers: Sequence[Callable[[pa.Table], pa.Table]]
    """Called with all rows of a bucket. Each but the last returns such rows, which are shuffled
    again; the last one returns one row of `counts`, and may add `EXAMPLES`."""
    counts: Sequence[str]
    buckets: int

    def run(self) -> tuple[dict[str, int], list[str]]:
        """Do it; return the sums of the counts, and at most `SHOWN` examples."""
        files = {uri for task in self.tasks for uri in task["files"]}
        is_small = sum(Folder(uri).size for uri in files) <= SMALL
        return self._in_one_task() if is_small else self._shuffled()

    def _in_one_task(self) -> tuple[dict[str, int], list[str]]:
        found = next(map_tasks(self.name, iter([{"work": self}]), _run_here))
        return found["totals"], found[EXAMPLES]

    def _shuffled(self) -> tuple[dict[str, int], list[str]]:
        import ray

        read, parts = self.read, min(self.buckets, 200)
        read.__name__ = f"read {self.name}"  # as dashboards show it
        dataset = ray.data.from_items(list(self.tasks), override_num_blocks=len(self.tasks))
        dataset = dataset.flat_map(read, num_cpus=0.5)
        for write in self.writers:
            write.__name__ = f"write {self.name}"
            dataset = dataset.groupby("bucket", num_partitions=parts).map_groups(
                write, batch_format="pyarrow"
            )
        try:
            dataset.set_name(self.name)
            done = dataset.materialize()
            sums = done.sum(list(self.counts))
            shown = self._examples(done)
        except ray.exceptions.RayError as error:
            raise summarize_error(error, self.name) from error
        return {name: int(sums[f"sum({name})"] or 0) for name in self.counts}, shown

    def _examples(self, done: Any) -> list[str]:
        if EXAMPLES not in (done.columns() or ()):
            return []
        some = done.flat_map(lambda row: [{"text": text} for text in json.loads(row[EXAMPLES])])
        return sorted(row["text"] for row in some.take(SHOWN))


def _run_here(task: Row) -> Row:
    """Read all files and write all buckets, within one task."""
    work: Work = task["work"]
    rows = (row for one in work.tasks for row in work.read(one))
    *before, last = work.writers
    for write in before:
        rows = (row for group in _groups(rows) for row in write(group).to_pylist())
    totals, examples = Counter[str](dict.fromkeys(work.counts, 0)), []
    for group in _groups(rows):
        (found,) = last(group).to_pylist()
        examples += json.loads(found.pop(EXAMPLES, "[]"))
        totals.update(found)
    return {"totals": dict(totals), EXAMPLES: sorted(examples)[:SHOWN]}


def _groups(rows: Iterator[Row]) -> Iterator[pa.Table]:
    by_bucket: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_bucket[row["bucket"]].append(row)
    return map(pa.Table.from_pylist, by_bucket.values())


def placed(
    stage: str, make: Callable[[Row], list[Any]], place: str, row: Row | Exception, buckets: int
) -> Iterator[Row]:
    """Yield the records that `make` gives of a row, or failure rows, each with its bucket.

    That of a record is the bucket of its prompt or, until this is known, of its `id`.
    """
    try:
        found: list[Any] = [row] if isinstance(row, Exception) else make(row)
    except Exception as error:  # any bad row is kept, with its error
        found = [error]
    for number, record in enumerate(found):
        if isinstance(record, Exception):
            where = place if len(found) == 1 else f"{place}[{number}]"
            failed = records.failure(stage, record, where=where)
            yield in_bucket(digest(place), buckets, {**failed}, good=False)
        else:
            key = record.get("prompt_id") or digest(record["id"])
            yield in_bucket(key, buckets, record, good=True)


def in_bucket(key: str, buckets: int, record: Row, *, good: bool) -> Row:
    """A row for the writer of the key's bucket: a record, or a failure if it is not `good`."""
    return {"bucket": int(key[:8], 16) % buckets, "good": good, "record": json.dumps(record)}


def split_good(group: pa.Table) -> tuple[list[Any], list[Any]]:
    """The records and the failures among the rows of a bucket."""
    rows = [(r["good"], json.loads(r["record"])) for r in group.to_pylist()]
    return [r for is_good, r in rows if is_good], [r for is_good, r in rows if not is_good]


def file_tasks(files: Sequence[str], limit: int | None, **more: Any) -> list[Row]:
    """A task for each file, or one for all where only the first `limit` rows are read."""
    return [{"files": files} | more] if limit else [{"files": [uri]} | more for uri in files]
