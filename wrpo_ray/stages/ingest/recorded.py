"""Jobs that read recorded answers of a source or the target, and prompts of several files.

An answer belongs to the prompt of the run with the same messages, or with the same id. Answers
move to the buckets of their prompts as other rows do; by an id they first meet the rows of the
prompts' file in buckets of ids. All answers are stored, also those to no prompt of the run, so
that a run with more prompts uses the same store.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa

from wrpo_ray.config import PromptsConfig, RecordedAnswers
from wrpo_ray.data import records
from wrpo_ray.data.buckets import write_shard
from wrpo_ray.data.failures import write_failures
from wrpo_ray.data.published import RowError
from wrpo_ray.data.samples import Prompts, Samples
from wrpo_ray.errors import UserError
from wrpo_ray.runtime import metrics
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.job import AnyInput, BaseJob, JobKind
from wrpo_ray.runtime.progress import log
from wrpo_ray.stages.ingest.answers import is_of, merged_prompts, recorded_answers, settled
from wrpo_ray.stages.ingest.cells import exact_text
from wrpo_ray.stages.ingest.distribute import (
    EXAMPLES,
    SHOWN,
    Work,
    file_tasks,
    in_bucket,
    placed,
    split_good,
)
from wrpo_ray.stages.ingest.readers import cell_of, input_files, messages_of, read_rows
from wrpo_ray.stages.ingest.stage import IngestPrompts, reader
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step
from wrpo_ray.text.display import one_line

Row = dict[str, Any]
COUNTS = ("read", "rows", "failed", "unmatched", "prompts", "dropped")
"""Answers read; of these matched, failed, of no prompt of the run, and given before; prompts with
an answer."""
PLACED = pa.schema([("bucket", pa.int64()), ("good", pa.bool_()), ("record", pa.string())])
"""Rows on their way to a bucket."""
PROMPT_COUNTS = ("read", "rows", "failed")
NAMES = 1000
"""Rows whose names of models an error shows."""
OWN_SCORES = (
    "{} has scores of its own (column {}), on another scale than the run's reward; they are "
    "compared as they are"
)
UNUSED_SCORES = (
    "the scores of {} (column {}) are not used, as the run's reward scores its answers; set "
    "`reward: recorded` beside its path to use them"
)
OFF_POLICY = (
    "off-policy: y_wt and y_l are recorded answers of {}, not samples of the model that is trained"
)


@dataclass(frozen=True)
class IngestRecorded(BaseJob):
    """Write the recorded answers of one model into RESPONSE shards, or SCORED ones with scores."""

    kind = JobKind.INGEST_RECORDED

    step: Step
    source: str
    """Name of the source or target."""
    input: RecordedAnswers
    prompts: Prompts
    by_id: tuple[PromptsConfig, ...] = ()
    """The files of prompts with their ids; without any, the prompts themselves are compared."""
    is_own: bool = False
    """Whether they are the target's, in place of samples."""

    @property
    def has_scores(self) -> bool:
        """Whether its scores are used; else the run's reward scores the answers."""
        return self.input.reward is not None

    @property
    def schema(self) -> pa.Schema:
        """The schema of its shards."""
        return records.SCORED if self.has_scores else records.RESPONSE

    @property
    def samples(self) -> Samples:
        """All answers to the run's prompts."""
        return Samples(self.step, self.prompts, None)

    @property
    def stores(self) -> tuple[str, ...]:
        """Its folder, if it has scores."""
        return (self.step.folder,) if self.has_scores else ()

    @property
    def row_source(self) -> RecordedAnswers:
        """At most the rows of the files."""
        return self.input

    @property
    def note(self) -> str:
        """A remark for readers of the results: other or unused scores, off-policy training."""
        column = self.input.columns.reward
        told = OWN_SCORES if self.has_scores else UNUSED_SCORES
        own = told.format(self.source, column) if column else ""
        return "; ".join(filter(None, (OFF_POLICY.format(self.source) * self.is_own, own)))

    @classmethod
    def run(cls, run: Run, jobs: Sequence[IngestRecorded]) -> None:
        """Run each job.

        Raises:
            UserError: no answer is to a prompt of the run, or is of the source.
            FailureLimitError: too many answers cannot be used.
        """
        for job in jobs:
            started = time.time()
            counts, examples = _ingest(run, job)
            told = _told(job, counts, examples)
            job.step.finish(run.root, counts, started, told=told, unmatched=examples)
            log(f"{job.step.name}  {told}")
            if job.note:
                log(f"{job.step.name}  {job.note}")


def _told(job: IngestRecorded, counts: dict[str, int], examples: list[str]) -> str:
    such = f" (such as {'; '.join(examples)})" if examples else ""
    return (
        f"{counts['read']:,} answers read: {counts['rows']:,} to {counts['prompts']:,} prompts, "
        f"{counts['unmatched']:,} match no prompt{such}, {counts['failed']:,} failed, "
        f"{counts['dropped']:,} were given before"
    )


def _ingest(run: Run, job: IngestRecorded) -> tuple[dict[str, int], list[str]]:
    name = job.step.name
    tasks = file_tasks(input_files(job.input.path, name), None, of_prompts=None)
    read, write = _reader(job, run.buckets), _writer(run, job)
    writers = [write]
    if job.by_id:
        for number, given in enumerate(job.by_id):
            tasks += file_tasks(input_files(given.path, "prompts"), None, of_prompts=number)
        writers.insert(0, partial(_joined, name, run.buckets))
    counts, examples = Work(name, tasks, read, writers, COUNTS, run.buckets).run()
    metrics.add_counts(job.step, rows=counts["rows"], failures=counts["failed"])
    run.check_failures(job.step, counts["failed"], counts["read"] - counts["failed"])
    if counts["failed"] == counts["read"]:
        reasons = f"; see {job.step.failures(run.root)}" if counts["failed"] else ""
        raise UserError(_of_nobody(job) + reasons)
    if not counts["rows"]:
        raise UserError(
            f"{name}: none of the {counts['read']:,} answers in {Folder(job.input.path)} is to a "
            f"prompt of this run (such as {'; '.join(examples)}); give the prompts with the same "
            f"text in all messages, or an id in both files (`columns.id` of `prompts` and of "
            f"`answers`)"
        )
    return counts, examples


def _of_nobody(job: IngestRecorded) -> str:
    """The error where no row has an answer of the source, with names of models that are there."""
    column, place = job.input.columns.source, Folder(job.input.path)
    none = f"{job.step.name}: no usable answer in {place}"
    if column is None:
        return none
    rows = read_rows(input_files(job.input.path, job.step.name)[0], [column])
    cells = (row.get(column) for _, row in islice(rows, NAMES) if isinstance(row, dict))
    found = {str(cell) for cell in cells if cell is not None}
    names = ", ".join(one_line(name)[:80] for name in sorted(found)[:10])
    return (
        f"{none} is of {job.input.of or job.source!r} in the column {column!r}; set `answers.of` "
        f"to one of {names}"
    )


def _reader(job: IngestRecorded, buckets: int) -> Callable[[Row], Iterator[Row]]:
    given, stage = job.input, job.step.name

    def answers(place: str, row: Row) -> list[Any]:
        mine = is_of(row, given, job.source)
        return recorded_answers(row, given, job.source, place) if mine else []

    def read(task: Row) -> Iterator[Row]:
        for uri in task["files"]:
            if task["of_prompts"] is not None:
                yield from _ids(uri, job.by_id[task["of_prompts"]], buckets)
                continue
            texts = [given.columns.id] if given.columns.id else []
            for place, row in read_rows(uri, given.columns.of_answer, texts):
                yield from placed(stage, partial(answers, place), place, row, buckets)

    return read


def _ids(uri: str, given: PromptsConfig, buckets: int) -> Iterator[Row]:
    """The id and key of each prompt; a bad row is a failure of the step that reads prompts."""
    column = given.columns.id or ""
    for _, row in read_rows(uri, [given.columns.prompt, column], [column]):
        if isinstance(row, Exception):
            continue
        try:
            known = exact_text(cell_of(row, column), column)
            record = {"id": known, "of_prompt": records.prompt_id(messages_of(row, given.columns))}
        except RowError:
            continue
        yield in_bucket(digest(known), buckets, record, good=True)


def _joined(stage: str, buckets: int, group: pa.Table) -> pa.Table:
    """The answers of a bucket of ids, in the buckets of their prompts; of an unknown id as given.

    An answer whose id several prompts have is a failure.
    """
    good, failed = split_good(group)
    prompts: dict[str, set[str]] = defaultdict(set)
    for row in good:
        if "of_prompt" in row:
            prompts[row["id"]].add(row["of_prompt"])
    found = [in_bucket(digest(r["where"] or ""), buckets, r, good=False) for r in failed]
    for row in good:
        if "of_prompt" in row:
            continue
        keys = prompts.get(row["id"], set())
        if len(keys) > 1:
            error = RowError(f"{len(keys)} prompts have the id {row['id']!r}; give each its own")
            failure = records.failure(stage, error, where=row["where"], source=row["source"])
            found.append(in_bucket(digest(row["where"]), buckets, {**failure}, good=False))
        else:
            key = next(iter(keys), None)
            row["prompt_id"] = key
            found.append(in_bucket(key or digest(row["id"]), buckets, row, good=True))
    return pa.Table.from_pylist(found, schema=PLACED)


def _writer(run: Run, job: IngestRecorded) -> Callable[[pa.Table], pa.Table]:
    stage, model = job.step.name, (job.step.store or {}).get("path")

    def write(group: pa.Table) -> pa.Table:
        """Write one bucket's shard and failures; return the counts, and answers to no prompt."""
        bucket = run.bucket(group["bucket"][0].as_py())
        good, failed = split_good(group)
        placed_rows = [row for row in good if row["prompt_id"]]
        kept, twice = settled(placed_rows, stage)
        rows = [row | {"model": model} for row in kept]
        write_shard(run.root / job.step.folder, bucket, job.schema, rows, "all")
        failures = [*failed, *twice]
        write_failures(job.step.failures(run.root), bucket, failures, "all")
        asked = job.prompts.read(run.root, bucket, ["prompt_id", "split"])["prompt_id"]
        known = set(asked.to_pylist())
        matched = [row["prompt_id"] for row in kept if row["prompt_id"] in known]
        lost = [row for row in kept if row["prompt_id"] not in known]
        lost += [row for row in good if not row["prompt_id"]]
        counts = {
            "read": len(good) + len(failed),
            "rows": len(matched),
            "failed": len(failures),
            "unmatched": len(lost),
            "prompts": len(set(matched)),
            "dropped": len(placed_rows) - len(kept) - len(twice),
        }
        shown = sorted(f"{row['where']}: {row['shown']!r}" for row in lost)[:SHOWN]
        told = {name: [count] for name, count in counts.items()}
        return pa.table(told | {EXAMPLES: [json.dumps(shown)]})

    return write


# --- prompts of several files --------------------------------------------------------------------


@dataclass(frozen=True)
class IngestJoinedPrompts(BaseJob):
    """Write the prompts of several files, or of recorded answers, into PROMPT shards, each once."""

    kind = JobKind.INGEST_PROMPTS

    parts: tuple[IngestPrompts, ...]
    """A job for each file, as if it alone had the prompts; all have the same step."""

    @property
    def step(self) -> Step:
        """The step."""
        return self.parts[0].step

    @property
    def row_source(self) -> tuple[AnyInput, ...]:
        """At most the rows of all files."""
        return tuple(part.input for part in self.parts)

    @classmethod
    def run(cls, run: Run, jobs: Sequence[IngestJoinedPrompts]) -> None:
        """Run each job.

        Raises:
            UserError: there is no usable prompt.
            FailureLimitError: too many rows cannot be used.
        """
        for job in jobs:
            started, name = time.time(), job.step.name
            limits = [getattr(part.input, "limit", None) for part in job.parts]
            tasks = [
                task
                for number, (part, limit) in enumerate(zip(job.parts, limits, strict=True))
                for task in file_tasks(input_files(part.input.path, name), limit, part=number)
            ]
            pairs = zip(job.parts, limits, strict=True)
            readers = [reader(part, run.buckets, limit) for part, limit in pairs]
            read, write = partial(_read_part, readers), partial(_write_prompts, run, job)
            found, _ = Work(name, tasks, read, (write,), PROMPT_COUNTS, run.buckets).run()
            metrics.add_counts(job.step, rows=found["rows"], failures=found["failed"])
            run.check_failures(job.step, found["failed"], found["read"] - found["failed"])
            if not found["rows"]:
                raise UserError(f"{name}: no usable prompt; see {job.step.failures(run.root)}")
            dropped = found["read"] - found["rows"] - found["failed"]
            job.step.finish(run.root, found | {"dropped": dropped}, started)
            log(f"{name}  {found['rows']:,} of all files, {found['failed']} rows failed")


def _read_part(readers: Sequence[Callable[[Row], Iterator[Row]]], task: Row) -> Iterator[Row]:
    return readers[task["part"]](task)


def _write_prompts(run: Run, job: IngestJoinedPrompts, group: pa.Table) -> pa.Table:
    """Write one bucket's shard: of equal prompts one, with the reference and group of any."""
    bucket, step = run.bucket(group["bucket"][0].as_py()), job.step
    good, failed = split_good(group)
    kept, unlike = merged_prompts(good, step.name)
    write_shard(run.root / step.folder, bucket, records.PROMPT, kept, "all")
    failures = [*failed, *unlike]
    write_failures(step.failures(run.root), bucket, failures, "all")
    counts = {"read": len(good) + len(failed), "rows": len(kept), "failed": len(failures)}
    return pa.table({name: [count] for name, count in counts.items()})
