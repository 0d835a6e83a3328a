"""Jobs that read the user's files: `readers` opens them, `distribute` moves rows to buckets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from wrpo_ray.config import ImportConfig, PromptsConfig, RecordedAnswers
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, write_shard
from wrpo_ray.data.failures import write_failures
from wrpo_ray.data.published import RowError, from_published
from wrpo_ray.data.records import FailureRow
from wrpo_ray.data.samples import Prompts
from wrpo_ray.errors import UserError
from wrpo_ray.runtime import metrics
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.job import BaseJob, JobKind
from wrpo_ray.runtime.progress import log
from wrpo_ray.stages.ingest.answers import merged_prompts
from wrpo_ray.stages.ingest.distribute import Work, file_tasks, placed, split_good
from wrpo_ray.stages.ingest.input_checks import check_columns
from wrpo_ray.stages.ingest.readers import (
    PromptRow,
    ScoredRow,
    input_files,
    prompt_record,
    read_rows,
    scored_records,
)
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

Row = dict[str, Any]
Finished = tuple[dict[str, list[Row]], list[FailureRow]]
"""{subfolder: rows} of a bucket, and failures that only all of its rows show."""
SOURCES, TARGET = "sources", "target"
"""Subfolders of the imported answers."""
REFERENCES, OPTIONAL = "references", "optional"
"""The entry of a step's config by which its prompts may lack a reference."""
COUNTS = ("read", "rows", "failed", "target_rows")


@dataclass(frozen=True)
class IngestJob(BaseJob):
    """A job that reads input files; the tasks write records and failures of one bucket each."""

    step: Step
    input: PromptsConfig | ImportConfig | RecordedAnswers

    @property
    def columns(self) -> list[str]:
        """Columns that the input must have."""
        return self.input.needed

    @property
    def row_source(self) -> PromptsConfig | ImportConfig | RecordedAnswers:
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
        group = self.input.group if isinstance(self.input, PromptsConfig) else None
        columns, drawn = self.input.columns, (self.splits, self.seed)
        return [prompt_record(row, columns, *drawn, group=group, may_lack_reference=may_lack)]

    def finish_bucket(self, rows: list[Row], run: Run, bucket: Bucket) -> Finished:
        """Each prompt once, without those of `without`; one with two references fails."""
        known: set[str] = set()
        if self.without:
            table = self.without.read(run.root, bucket, ["prompt_id", "split"])
            known = set(table["prompt_id"].to_pylist())
        new = [row for row in rows if row["prompt_id"] not in known]
        kept, failed = merged_prompts(new, self.step.name)
        return {"": kept}, failed


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

    def finish_bucket(self, rows: list[Row], run: Run, bucket: Bucket) -> Finished:
        """Number the samples of each (prompt, source), independently of the order of the files."""
        counts: dict[tuple[str, str], int] = {}
        parts: dict[str, list[Row]] = {SOURCES: [], TARGET: []}
        for row in sorted(
            rows, key=lambda r: (r["prompt_id"], r["source"], r["text"], r["reward"])
        ):
            key = row["prompt_id"], row["source"]
            row["sample"] = counts[key] = counts.get(key, -1) + 1
            parts[TARGET if row["source"] == self.input.target else SOURCES].append(row)
        return parts, []


@dataclass(frozen=True)
class IngestPreferences(IngestJob):
    """Write published preference rows into PREFERENCE shards."""

    kind = JobKind.INGEST_PREFERENCES

    input: ImportConfig

    schema = records.PREFERENCE

    def records(self, row: Row) -> list[Row | RowError]:
        """One PREFERENCE record."""
        return [{**from_published(row)}]

    def finish_bucket(self, rows: list[Row], run: Run, bucket: Bucket) -> Finished:
        """All rows, in an order that does not depend on the order of the files."""
        return {"": sorted(rows, key=lambda r: digest(r))}, []


AnyIngest = IngestPrompts | IngestResponses | IngestPreferences


def _ingest(run: Run, job: AnyIngest) -> dict[str, int]:
    what = job.step.name
    files = input_files(job.input.path, what)
    check_columns(files[0], job.columns, what)
    limit = getattr(job.input, "limit", None)
    read, write = reader(job, run.buckets, limit), _writer(run, job)
    totals, _ = Work(what, file_tasks(files, limit), read, (write,), COUNTS, run.buckets).run()
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


def reader(job: AnyIngest, buckets: int, limit: int | None) -> Callable[[Row], Iterator[Row]]:
    """The function that reads the files of a task into records and failures, each in its bucket."""
    texts = job.input.columns.of_text if isinstance(job, IngestPrompts) else ()

    def read(task: Row) -> Iterator[Row]:
        rows = (found for uri in task["files"] for found in read_rows(uri, job.columns, texts))
        for place, row in islice(rows, limit):
            yield from placed(job.step.name, job.records, place, row, buckets)

    return read


def _writer(run: Run, job: AnyIngest) -> Callable[[pa.Table], pa.Table]:
    def write(group: pa.Table) -> pa.Table:
        """Write one bucket's shard; Ray Data calls it with all rows of the bucket."""
        bucket = run.bucket(group["bucket"][0].as_py())
        good, failed = split_good(group)
        folder = run.root / job.step.folder
        parts, unlike = job.finish_bucket(good, run, bucket)
        for part, kept in parts.items():
            write_shard(folder / part if part else folder, bucket, job.schema, kept, "all")
        failures = [*failed, *unlike]
        write_failures(job.step.failures(run.root), bucket, failures, "all")
        counts = {
            "read": len(good) + len(failed),
            "rows": sum(map(len, parts.values())),
            "failed": len(failures),
            "target_rows": len(parts.get(TARGET, ())),
        }
        return pa.table({name: [count] for name, count in counts.items()})

    return write
