"""One pool of vLLM actors for each model, on Ray Data; the unit of work is a bucket.

An actor reads its bucket's prompts, passes over the (prompt, sample) pairs that the store
already holds, and commits the rest chunk by chunk. So a crash loses at most the chunks in
hand, and more prompts or samples are only added.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from wrpo_ray.config import ModelConfig, SamplingConfig
from wrpo_ray.core import records
from wrpo_ray.core.cluster import map_rows, thread_env
from wrpo_ray.core.run import Progress, Run, log
from wrpo_ray.core.shards import (
    Bucket,
    Prompts,
    Samples,
    buckets,
    chunks,
    clear_failures,
    read_bucket,
    sample_keys,
    write_failures,
    write_shard,
)
from wrpo_ray.core.steps import Step
from wrpo_ray.core.storage import Folder
from wrpo_ray.generate.engine import CPU_ENV, ENV, Engine, Request


@dataclass(frozen=True)
class Generate:
    """Answers of one model to some prompts."""

    model: ModelConfig
    folder: Folder
    """The model's weights."""
    fingerprint: str
    """What identifies the weights: part of the store's key."""
    prompts: Prompts
    sampling: SamplingConfig
    seed: int

    @cached_property
    def step(self) -> Step:
        """The step; prompts and number of samples are not in the store's key, so they can grow."""
        sampling = self.sampling.identity()
        count = sampling.pop("samples")
        store = {
            "model": self.model.identity() | {"model": self.fingerprint},
            "sampling": sampling,
            "seed": self.seed,
        }
        wanted = {"samples": count, "splits": list(self.prompts.splits)}
        return Step(f"generate-{self.model.name}", wanted, (self.prompts.step,), store)

    @property
    def samples(self) -> Samples:
        """What the step is done for, as later stages read it."""
        return Samples(self.step, self.prompts, self.sampling.samples)


def run(run: Run, jobs: list[Generate]) -> None:
    """Do each job; the jobs of one model share its engines, models run side by side.

    Raises:
        FailureLimitError: too many rows failed.
    """
    pools = [list(group) for _, group in groupby(jobs, key=lambda job: job.model)]
    threads = ThreadPoolExecutor(len(pools))
    try:
        for done in as_completed([threads.submit(_run_pool, run, pool) for pool in pools]):
            done.result()
    finally:
        # After an error or Ctrl-C nobody waits: the other pools end with the connection to Ray.
        threads.shutdown(wait=False, cancel_futures=True)


def _run_pool(run: Run, jobs: list[Generate]) -> None:
    model, started = jobs[0].model, time.time()
    log(f"generate {model.name}: starting engines")
    rows = [{"job": j, "bucket": b.index} for b in buckets(run.buckets) for j in range(len(jobs))]
    env = ENV | thread_env(model.actors.num_cpus) | (CPU_ENV if model.actors.num_gpus == 0 else {})
    progress = Progress(f"generate {model.name}", len(rows))
    tallies = [_Tally() for _ in jobs]
    for result in map_rows(
        progress.label, rows, Generator, {"run": run, "jobs": jobs}, model.actors, env
    ):
        tallies[result["job"]].add(result)
        progress.add(result["new"])
    for job, tally in zip(jobs, tallies, strict=True):
        run.check_failures(job.step, tally.failed, tally.rows)
        job.step.finish(run.root, tally.counts(), started)
        if tally.rows > tally.new:
            log(f"{job.step.name}: {tally.rows - tally.new:,} of {tally.rows:,} rows were there")


@dataclass
class _Tally:
    """Sums over a job's buckets."""

    rows: int = 0
    new: int = 0
    failed: int = 0
    tokens: int = 0

    def add(self, result: dict[str, Any]) -> None:
        for name in ("rows", "new", "failed", "tokens"):
            setattr(self, name, getattr(self, name) + result[name])

    def counts(self) -> dict[str, int]:
        return {
            "rows": self.rows,
            "skipped": self.rows - self.new,
            "failed": self.failed,
            "output_tokens": self.tokens,
        }


class Generator:
    """The Ray Data actor: an engine that is started when the first missing answer is met."""

    def __init__(self, run: Run, jobs: list[Generate]):
        self.run, self.jobs = run, jobs

    @cached_property
    def engine(self) -> Engine:
        """The model's engine."""
        job = self.jobs[0]
        return Engine(job.model, job.folder.local(job.fingerprint), job.seed)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Fill one bucket of one job; what is returned are counts only."""
        job, bucket = self.jobs[row["job"]], Bucket(row["bucket"], self.run.buckets)
        held, requests = self._missing(job, bucket)
        clear_failures(job.step.failures(self.run.root), bucket)
        done = failed = tokens = 0
        for part in chunks(requests, self.run.chunk):
            rows, failures = self.engine.generate(part, job.sampling)
            self._commit(bucket, job, rows, failures)
            done, failed = done + len(rows), failed + len(failures)
            tokens += sum(r["output_tokens"] for r in rows)
        return row | {"rows": held + done, "new": done, "failed": failed, "tokens": tokens}

    def _missing(self, job: Generate, bucket: Bucket) -> tuple[int, list[Request]]:
        """How many wanted answers the store holds, and requests for the others."""
        store = self.run.root / job.step.folder
        done = sample_keys(read_bucket(store, bucket, records.RESPONSE, ["prompt_id", "sample"]))
        prompts = job.prompts.read(self.run.root, bucket).to_pylist()
        requests, wanted = [], job.sampling.samples
        for prompt in prompts:
            lacking = [s for s in range(wanted) if (prompt["prompt_id"], s) not in done]
            requests += [
                Request(prompt["prompt_id"], prompt["messages"], first, count)
                for first, count in _runs(lacking)
            ]
        return wanted * len(prompts) - sum(r.count for r in requests), requests

    def _commit(
        self, bucket: Bucket, job: Generate, rows: list[dict], failures: list[dict]
    ) -> None:
        key = sorted([r["prompt_id"], r["sample"]] for r in rows + failures)
        if rows:
            marked = [row | {"model": job.fingerprint} for row in rows]
            write_shard(job.samples.folder(self.run.root), bucket, records.RESPONSE, marked, key)
        write_failures(job.step.failures(self.run.root), bucket, failures, key)


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """(first, count) of each run of consecutive numbers: [0, 1, 4] gives (0, 2), (4, 1)."""
    groups = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return [(run[0], len(run)) for run in runs]
