"""A process that generates with a fake engine, for tests that kill it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from wrpo_ray.config import ModelConfig, SamplingConfig
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, write_shard
from wrpo_ray.data.samples import Prompts
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.tally import Tally, unmarked
from wrpo_ray.stages.generate.stage import Generate, Generator, _rows
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

BUCKETS, SAMPLES = 2, 2
EACH = 0.01
"""Seconds of an answer."""
AGE = 0.4
"""`commit_seconds`."""


class LoggedEngine:
    """Answers one request after another, and notes the time of each in a file."""

    def __init__(self, log: Path):
        self.log = log.open("a", buffering=1)

    def answers(self, requests: list[Any], *_: Any) -> Iterator[tuple[list[Any], list[Any]]]:
        """The answers of one request after another."""
        for request in requests:
            time.sleep(EACH * 2 * request.count)  # two buckets at once
            for sample in request.samples:
                self.log.write(f"{time.time()} {request.prompt_id} {sample}\n")
            yield [self._row(request.prompt_id, sample) for sample in request.samples], []

    def under_way(self) -> dict:
        """Nothing: an answer is there at once."""
        return {}

    def _row(self, prompt_id: str, sample: int) -> dict[str, Any]:
        key = {"prompt_id": prompt_id, "source": "m", "sample": sample}
        return key | {"text": prompt_id * 20, "output_tokens": 1, "prompt_tokens": 2}


def run_of(output: Path) -> Run:
    """The run."""
    return Run(Folder(str(output)), BUCKETS, commit_seconds=AGE)


def job_of() -> Generate:
    """The job."""
    prompts = Prompts(Step("prompts"), ("sft",))
    sampling = SamplingConfig(samples=SAMPLES)
    return Generate(ModelConfig(name="m", model="m"), Folder("m").absolute(), "m", prompts,
                    sampling, 0)  # fmt: skip


def write_prompts(output: Path, count: int) -> None:
    """So many prompts, in all buckets."""
    run = run_of(output)
    for index in range(BUCKETS):
        bucket = Bucket(index, BUCKETS)
        keys = (k for k in map(records.digest, range(count)) if k in bucket)
        rows = [{"prompt_id": k, "messages": [], "split": "sft"} for k in keys]
        write_shard(run.root / Step("prompts").folder, bucket, records.PROMPT, rows, "all")


def work(output: Path, log: Path) -> None:
    """What a driver and its actor do, in one process."""
    run, job = run_of(output), job_of()
    tally = Tally(run, job.step, job.samples.folder(run.root))
    rows = unmarked([tally], _rows([job], [Bucket(i, BUCKETS) for i in range(BUCKETS)]))
    stores = [job.samples.folder(run.root), job.step.failures(run.root)]
    actor = Generator(run.having_seen(stores, [run.root / job.prompts.step.folder]), [job])
    actor.engine = LoggedEngine(log)
    with ThreadPoolExecutor(2) as threads:
        for result in threads.map(actor, rows):
            tally.add(result)
