"""Prepares rows to train on: token ids, and the reference's log-probs of each answer.

A pool of actors writes one file per bucket. Reference log-probs come from the trainer's own forward
pass, in larger micro-batches as there is no backward pass; they are stored beside their token ids.
The step's key holds the model, its tokenizer and template, and the length limits, so a change of
any of them recomputes the rows. Training then needs no reference model.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import pyarrow.compute as pc

from wrpo_ray.config import Actors, TrainConfig
from wrpo_ray.data.buckets import Bucket, buckets, read_bucket
from wrpo_ray.data.failures import retrying_failures, write_failures
from wrpo_ray.data.records import PREFERENCE, SELECTION, failure
from wrpo_ray.data.shards import place_name
from wrpo_ray.errors import UserError
from wrpo_ray.llm.chat import end_ids
from wrpo_ray.llm.reasoning import format_of
from wrpo_ray.llm.rendering import OWN, Template, load_tokenizer
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.cores import with_shares
from wrpo_ray.runtime.job import BaseJob, JobKind, models_of
from wrpo_ray.runtime.placement import MALLOC, Pool
from wrpo_ray.runtime.pool import map_rows
from wrpo_ray.runtime.pool_members import StartClock
from wrpo_ray.runtime.progress import Progress, log
from wrpo_ray.runtime.tally import NOT_COUNTED
from wrpo_ray.stages.train.rows import SUFFIX, Record, Rows, Tokenizing, read_counts, write_rows
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

FORMAT = 2
"""Version of the format of prepared rows, part of the step's key."""
COMPAT = {"published": "published, with headers"}
"""Key values of `compat` that differ from its name, as an earlier version had a fault."""
DROPPED = "dropped"
"""Subfolder of the step's failures for rows that are too long."""


@dataclass(frozen=True)
class Prepare(BaseJob):
    """The rows of one training run, or of several that differ only in optimization settings."""

    kind = JobKind.PREPARE

    name: str
    """`sft` or `wrpo`."""
    rows: Step
    """Its folder holds the SELECTION (SFT) or PREFERENCE (WRPO) shards."""
    base: Folder
    """The model that is trained, and the reference of preference training."""
    fingerprint: str
    """Fingerprint of the model, its tokenizer and its template."""
    config: TrainConfig
    template: Template = OWN
    """Replacement of the base's own chat template."""
    own: str | None = None
    """The model that sampled with the base's tokenizer: its answers keep their token ids, those of
    all others are tokenized from their text. Null where no answer of the rows is of such a model.
    """
    early: Step | None = None
    """A step with the same rows to train on as `rows`, which is read instead if it is finished: a
    selection of SFT's prompts only."""

    @property
    def answers(self) -> tuple[str, ...]:
        """The names of a row's answers."""
        return self.config.answers

    @property
    def actors(self) -> Actors:
        """The pool of workers."""
        config = self.config
        if config.reference_actors:
            return config.reference_actors
        plain = Actors(max=config.workers, num_cpus=config.num_cpus)
        if config.reference_mode != "stored":
            return plain
        as_trained = {"num_gpus": config.num_gpus, "resources": config.resources}
        return plain.model_copy(update=as_trained)

    @cached_property
    def step(self) -> Step:
        """The step; settings of the optimization are not in its key."""
        config = self.config
        key = {
            "answers": self.answers,
            "base": self.fingerprint,
            "max_length": config.max_length,
            "max_prompt_length": config.max_prompt_length,
            "overflow": config.overflow,
            "compat": COMPAT.get(config.compat, config.compat),
            "reference": config.precision if config.reference_mode == "stored" else None,
            "format": FORMAT,
        } | ({"prompts": "all"} if config.takes_all_prompts else {})
        if config.is_preference and self.own is None and config.compat != "published":
            key |= {"own": None}
        if self.template.reasoning:
            key |= {"reasoning": self.template.parser or "template"}
        return Step(f"rows-{self.name}", key, (self.rows,))

    @property
    def row_source(self) -> Step:
        """At most the rows that it reads."""
        return self.rows

    @property
    def loads(self) -> Pool:
        """The workers, which load at least the tokenizer."""
        env = MALLOC | ({} if self.actors.num_gpus else {"TORCHDYNAMO_DISABLE": "1"})
        has_model, models = self.config.reference_mode == "stored", ((self.base, self.fingerprint),)
        return Pool(self.step.name, self.actors, env, has_model=has_model, models=models)

    def decided(self, run: Run) -> Self:
        """The job without an `early` step that is not finished."""
        is_there = self.early and self.early.is_done(run.root)
        return self if is_there else replace(self, early=None)

    @property
    def source(self) -> Step:
        """The step whose shards are read."""
        return self.early or self.rows

    @classmethod
    def run(cls, run: Run, jobs: list[Self]) -> None:
        """Run the jobs; those with equal actors share a pool, one after another.

        Raises:
            UserError: no row is left to train on.
            FailureLimitError: more rows failed than `failure_limit` allows.
        """
        pools: dict[str, list[Prepare]] = {}
        for job in jobs:
            pools.setdefault(job.actors.model_dump_json(), []).append(job)
        for pool in pools.values():
            _prepare(run, pool)


def _prepare(run: Run, jobs: list[Prepare]) -> None:
    actors, indices = jobs[0].actors, [bucket.index for bucket in buckets(run.buckets)]
    rows = [{"job": number, "bucket": index} for number in range(len(jobs)) for index in indices]
    started = [time.time()] * len(jobs)
    counts = [Counter[str]() for _ in jobs]
    left = Counter({number: len(indices) for number in range(len(jobs))})
    progress = Progress(jobs[0].step.name, len(rows))
    has_model = any(job.config.reference_mode == "stored" for job in jobs)
    all_load = replace(jobs[0].loads, has_model=has_model, models=models_of(jobs))
    (pool,) = with_shares([all_load])
    jobs = [job.decided(run) for job in jobs]
    for result in map_rows(pool, rows, Preparer, {"run": run, "jobs": jobs}):
        number, job = result["job"], jobs[result["job"]]
        counts[number].update({k: v for k, v in result.items() if k not in NOT_COUNTED})
        progress.add(result["rows"])
        run.record_usage(
            job.step, job.step.name, result["seconds"], idle=result["idle"],
            start=result["start"], gpus=actors.num_gpus,
            rows=result["rows"], failed=result["failed"],
        )  # fmt: skip
        left[number] -= 1
        if not left[number]:
            _finish(run, job, counts[number], started[number])
            started[number + 1 :] = [time.time()] * (len(jobs) - number - 1)


def _finish(run: Run, job: Prepare, counts: Counter[str], started: float) -> None:
    totals = {name: counts[name] for name in ("rows", "dropped", "cut", "failed", "tokens")}
    run.check_failures(job.step, totals["failed"], totals["rows"])
    _check_any_row(job, totals)
    job.step.finish(run.root, totals, started)
    log(f"{job.step.name}  " + ", ".join(f"{k} {v:,}" for k, v in totals.items()))


def _check_any_row(job: Prepare, counts: dict[str, int]) -> None:
    if counts["rows"]:
        return
    if counts["dropped"]:
        most = job.config.max_prompt_length
        raise UserError(
            f"{job.name}: no row is left to train on: {counts['dropped']} rows have more than "
            f"{job.config.max_length} tokens in prompt and answer"
            + (f" or {most} in the prompt" if most else "")
            + f"; raise {job.name}.max_length"
        )
    raise UserError(
        f"{job.name}: {job.source.folder} holds no row to train on; give more prompts, or another "
        f"`split.sft`"
    )


class Preparer:
    """The actor of the pool; it holds the model of one job at a time, and returns counts."""

    def __init__(self, run: Run, jobs: list[Prepare]):
        self.run, self.jobs, self._start_clock = run, jobs, StartClock()
        self.job = jobs[0]

    @cached_property
    def tokenizing(self) -> Tokenizing:
        """How records become rows."""
        base = self.job.base.local(self.job.fingerprint)
        with self._start_clock.running():
            tokenizer = load_tokenizer(base, self.job.template)
        ends = end_ids(tokenizer, base)
        job, template = self.job, self.job.template
        format_ = format_of(tokenizer, template.parser) if template.reasoning else None
        return Tokenizing(tokenizer, ends, job.answers, job.config, job.own, format_)

    @cached_property
    def reference(self) -> Any:
        """Adds the reference's log-probs to rows."""
        with self._start_clock.running():
            from wrpo_ray.stages.train.model import Reference  # it imports torch

            base = self.job.base.local(self.job.fingerprint)
            return Reference(base, self.job.config, self.job.actors.num_gpus > 0)

    def _turn_to(self, job: Prepare) -> None:
        """Let go of what belongs to the job before."""
        if job is not self.job:
            self.job = job
            for name in ("tokenizing", "reference"):
                self.__dict__.pop(name, None)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Fill one bucket of one job, unless it is there without a fault."""
        self._turn_to(self.jobs[row["job"]])
        bucket = self.run.bucket(row["bucket"])
        folder = self.run.root / self.job.step.folder
        name = f"{place_name(bucket.place)}{SUFFIX}"
        counts = read_counts(folder, name)
        if counts is None or counts["failed"]:
            rows = self.tokenizing.rows(self._records(bucket), self.job.step.name)
            self._add_reference(rows)
            self._write_left_out(rows, bucket)
            counts = _counts(rows)
            write_rows(folder, name, rows.kept, counts)
        return row | counts | self._start_clock.take()

    def _write_left_out(self, rows: Rows, bucket: Bucket) -> None:
        """Write failure rows; those that are too long do not count against `failure_limit`."""
        failures = self.job.step.failures(self.run.root)
        for folder, part in ((failures, rows.faults), (failures / DROPPED, rows.too_long)):
            with retrying_failures(folder, bucket) as earlier:
                write_failures(folder, bucket, part, "rows", earlier)

    def _add_reference(self, rows: Rows) -> None:
        """Add reference log-probs to rows; a row with one that is not finite fails."""
        if not rows.kept or self.job.config.reference_mode != "stored":
            return
        kept, rows.kept = self.reference(rows.kept), []
        for row in kept:
            pairs = zip(self.job.answers, row.reference, strict=True)
            wrong = [f"{name} {value}" for name, value in pairs if not math.isfinite(value)]
            if not wrong:
                rows.kept.append(row)
                continue
            error = ValueError(f"log-probs under the reference are not finite: {', '.join(wrong)}")
            rows.failed.append(failure(self.job.step.name, error, prompt_id=row.prompt_id))

    def _records(self, bucket: Bucket) -> list[Record]:
        """The bucket's PREFERENCE records, or SELECTION records: those for SFT, or all."""
        folder = self.run.root / self.job.source.folder
        columns = ["prompt_id", "messages", *self.job.answers]
        records: list[Record]
        if self.job.config.is_preference:
            records = read_bucket(folder, bucket, PREFERENCE, columns).to_pylist()
            return records
        table = read_bucket(folder, bucket, SELECTION, [*columns, "split"])
        if not self.job.config.takes_all_prompts:
            table = table.filter(pc.equal(table["split"], "sft"))
        records = table.to_pylist()
        return records


def _counts(rows: Rows) -> dict[str, int]:
    return {
        "rows": len(rows.kept),
        "dropped": len(rows.too_long),
        "failed": len(rows.faults),
        "cut": rows.cut,
        "tokens": sum(sum(row.lengths) for row in rows.kept),
    }
