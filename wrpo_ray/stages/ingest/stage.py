"""Distributes the user's rows into buckets with Ray Data; `readers` opens the files.

Each file is read in one task, Ray Data shuffles its rows to their buckets, and each bucket is
written as one shard; no row passes through the driver. Small inputs are read and written by a
single task, because starting a shuffle would take longer.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from wrpo_ray.config import ImportConfig, PromptsConfig
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, write_shard
from wrpo_ray.data.failures import write_failures
from wrpo_ray.data.published import RowError, from_published
from wrpo_ray.data.samples import Prompts
from wrpo_ray.errors import UserError
from wrpo_ray.runtime import metrics
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.job import BaseJob, JobKind
from wrpo_ray.runtime.progress import log
from wrpo_ray.runtime.tasks import map_tasks
from wrpo_ray.runtime.worker_errors import summarize_error
from wrpo_ray.stages.ingest.readers import (
    PromptRow,
    ScoredRow,
    check_columns,
    input_files,
    prompt_record,
    read_rows,
    scored_records,
)
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

Row = dict[str, Any]
SOURCES, TARGET = "sources", "target"
"""Subfolders of the imported answers."""
REFERENCES, OPTIONAL = "references", "optional"
"""The entry of a step's config by which its prompts may lack a reference."""
COUNTS = ("read", "rows", "failed", "target_rows")
SMALL = 32_000_000
"""Total bytes of the files up to which a single task reads them."""


@dataclass(frozen=True)
class IngestJob(BaseJob):
    """A job that reads input files; the tasks write records and failures of one bucket each."""

    step: Step
    input: PromptsConfig | ImportConfig

    @property
    def columns(self) -> list[str]:
        """Columns that the input must have."""
        return self.input.needed

    @property
    def row_source(self) -> PromptsConfig | ImportConfig:
        """The rows of the input."""
        return self.input

    @classmethod
    def run(cls, run: Run, jobs: Sequence[AnyIngest]) -> None:
        """Run each job.

        Raises:
            UserError: no such file or column, or no usable row.
            FailureLimitError: too many unusable rows.
        """
        for job in jobs:
            started = time.time()
            counts = _ingest(run, job)
            job.step.finish(run.root, counts, started)
            log(
                f"{job.step.name}  {counts['rows']:,} rows, {counts['failed']} failed, "
                f"{counts['dropped']} dropped as duplicates or held out"
            )


@dataclass(frozen=True)
class IngestPrompts(IngestJob):
    """Write prompts into PROMPT shards: each prompt once, with its split."""

    kind = JobKind.INGEST_PROMPTS

    splits: dict[str, float]
    seed: int
    without: Prompts | None = None
    """Prompts to leave out, such as those trained on."""

    schema = records.PROMPT

    @property
    def columns(self) -> list[str]:
        """Columns that the input must have."""
        return self.input.columns.of_prompt

    def records(self, row: Row) -> list[PromptRow | RowError]:
        """One PROMPT record."""
        may_lack = self.step.config.get(REFERENCES) == OPTIONAL
        record = prompt_record(
            row, self.input.columns, self.splits, self.seed, may_lack_reference=may_lack
        )
        return [record]

    def finish_bucket(
        self, rows: list[PromptRow], run: Run, bucket: Bucket
    ) -> dict[str, list[PromptRow]]:
        """Each prompt once, without those of `without`: {subfolder: rows}."""
        unique = {row["prompt_id"]: row for row in rows}
        known: set[str] = set()
        if self.without:
            table = self.without.read(run.root, bucket, ["prompt_id", "split"])
            known = set(table["prompt_id"].to_pylist())
        return {"": [row for key, row in sorted(unique.items()) if key not in known]}


@dataclass(frozen=True)
class IngestResponses(IngestJob):
    """Write existing scored answers into SCORED shards, separately for target and sources."""

    kind = JobKind.INGEST_RESPONSES

    input: ImportConfig

    schema = records.SCORED

    @property
    def stores(self) -> tuple[str, ...]:
        """Both parts of its folder."""
        return tuple(f"{self.step.folder}/{part}" for part in (SOURCES, TARGET))

    def records(self, row: Row) -> list[ScoredRow | RowError]:
        """One SCORED record for each of the row's answers."""
        return scored_records(row, self.input)

    def finish_bucket(
        self, rows: list[ScoredRow], run: Run, bucket: Bucket
    ) -> dict[str, list[ScoredRow]]:
        """Number the samples of each (prompt, source), independently of the order of the files."""
        counts: dict[tuple[str, str], int] = {}
        parts: dict[str, list[ScoredRow]] = {SOURCES: [], TARGET: []}
        for row in sorted(
            rows, key=lambda r: (r["prompt_id"], r["source"], r["text"], r["reward"])
        ):
            key = row["prompt_id"], row["source"]
            row["sample"] = counts[key] = counts.get(key, -1) + 1
            parts[TARGET if row["source"] == self.input.target else SOURCES].append(row)
        return parts


@dataclass(frozen=True)
class IngestPreferences(IngestJob):
    """Write published preference rows into PREFERENCE shards."""

    kind = JobKind.INGEST_PREFERENCES

    input: ImportConfig

    schema = records.PREFERENCE

    def records(self, row: Row) -> list[Row | RowError]:
        """One PREFERENCE record."""
        return [{**from_published(row)}]

    def finish_bucket(self, rows: list[Row], run: Run, bucket: Bucket) -> dict[str, list[Row]]:
        """All rows, in an order that does not depend on the order of the files."""
        return {"": sorted(rows, key=lambda r: digest(r))}


AnyIngest = IngestPrompts | IngestResponses | IngestPreferences


def _ingest(run: Run, job: AnyIngest) -> dict[str, int]:
    what = job.step.name
    files = input_files(job.input.path, what)
    check_columns(files[0], job.columns, what)
    limit = getattr(job.input, "limit", None)
    if sum(Folder(uri).size for uri in files) <= SMALL:
        task = {"run": run, "job": job, "files": files, "limit": limit}
        totals = next(map_tasks(what, iter([task]), _ingest_here))
    else:
        totals = _shuffled(run, job, files, limit)
    metrics.add_counts(job.step, rows=totals["rows"], failures=totals["failed"])
    failures = job.step.failures(run.root)
    run.check_failures(job.step, totals["failed"], totals["read"] - totals["failed"])
    if not totals["rows"]:
        raise UserError(f"{what}: no usable row in {Folder(job.input.path)}; see {failures}")
    of_target = totals.pop("target_rows")
    if isinstance(job, IngestResponses) and job.input.target and not of_target:
        raise UserError(
            f"{what}: no answer in {Folder(job.input.path)} is of the target {job.input.target!r}; "
            f"set import.target to a name in the source column"
        )
    dropped = totals["read"] - totals["rows"] - totals["failed"]
    return totals | {"dropped": dropped}


def _ingest_here(task: Row) -> dict[str, int]:
    """Read all files and write all buckets, within one task."""
    run, job = task["run"], task["job"]
    read, write = _reader(job, run.buckets, task["limit"]), _writer(run, job)
    by_bucket: dict[int, list[Row]] = defaultdict(list)
    for row in read({"files": task["files"]}):
        by_bucket[row["bucket"]].append(row)
    totals = Counter[str](dict.fromkeys(COUNTS, 0))
    for rows in by_bucket.values():
        totals.update(write(pa.Table.from_pylist(rows)).to_pylist()[0])
    return dict(totals)


def _shuffled(run: Run, job: AnyIngest, files: list[str], limit: int | None) -> dict[str, int]:
    """Read each file in a task, shuffle the rows and write each bucket in another."""
    import ray

    tasks = [{"files": files}] if limit else [{"files": [uri]} for uri in files]
    read = _reader(job, run.buckets, limit)
    dataset = (
        ray.data.from_items(tasks, override_num_blocks=len(tasks))
        .flat_map(read, num_cpus=0.5)
        .groupby("bucket", num_partitions=min(run.buckets, 200))
        .map_groups(_writer(run, job), batch_format="pyarrow")
    )
    try:
        dataset.set_name(job.step.name)
        done = dataset.sum(list(COUNTS))
    except ray.exceptions.RayError as error:
        raise summarize_error(error, job.step.name) from error
    return {name: int(done[f"sum({name})"] or 0) for name in COUNTS}


def _reader(job: AnyIngest, buckets: int, limit: int | None) -> Callable[[Row], Iterator[Row]]:
    texts = job.input.columns.of_text if isinstance(job, IngestPrompts) else ()

    def read(task: Row) -> Iterator[Row]:
        rows = (found for uri in task["files"] for found in read_rows(uri, job.columns, texts))
        for place, row in islice(rows, limit):
            yield from _placed(job, place, row, buckets)

    read.__name__ = f"read {job.step.name}"  # as dashboards show it
    return read


def _placed(job: AnyIngest, place: str, row: Row | Exception, buckets: int) -> Iterator[Row]:
    """Yield the row's records, or failure rows, each with its bucket."""
    try:
        found: list[Any] = [row] if isinstance(row, Exception) else job.records(row)
    except Exception as error:  # any bad row is kept, with its error
        found = [error]
    for number, record in enumerate(found):
        key = record["prompt_id"] if isinstance(record, dict) else digest(place)
        if isinstance(record, Exception):
            where = place if len(found) == 1 else f"{place}[{number}]"
            failed = records.failure(job.step.name, record, where=where)
            yield _in_bucket(key, buckets, {**failed}, good=False)
        else:
            yield _in_bucket(key, buckets, record, good=True)


def _in_bucket(key: str, buckets: int, record: Row, *, good: bool) -> Row:
    return {"bucket": int(key[:8], 16) % buckets, "good": good, "record": json.dumps(record)}


def _writer(run: Run, job: AnyIngest) -> Callable[[pa.Table], pa.Table]:
    def write(group: pa.Table) -> pa.Table:
        """Write one bucket's shard; Ray Data calls it with all rows of the bucket."""
        bucket = Bucket(group["bucket"][0].as_py(), run.buckets)
        rows = [(r["good"], json.loads(r["record"])) for r in group.to_pylist()]
        good = [record for is_good, record in rows if is_good]
        failed = [record for is_good, record in rows if not is_good]
        folder = run.root / job.step.folder
        parts = job.finish_bucket(good, run, bucket)
        for part, kept in parts.items():
            write_shard(folder / part if part else folder, bucket, job.schema, kept, "all")
        write_failures(job.step.failures(run.root), bucket, failed, "all")
        counts = {
            "read": len(rows),
            "rows": sum(map(len, parts.values())),
            "failed": len(failed),
            "target_rows": len(parts.get(TARGET, ())),
        }
        return pa.table({name: [count] for name, count in counts.items()})

    write.__name__ = f"write {job.step.name}"
    return write
