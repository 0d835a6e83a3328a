"""Failed rows of a run: lists them, and gives them new attempts."""

import uuid
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from wrpo_ray.config import Config
from wrpo_ray.data.failures import failed_by_error
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline.branches import Early
from wrpo_ray.pipeline.chain import RETRIES, Chain
from wrpo_ray.pipeline.model_sections import pinned
from wrpo_ray.pipeline.stage_table import STAGES
from wrpo_ray.runtime.job import Job, JobKind
from wrpo_ray.runtime.lease import Lease
from wrpo_ray.stages.train.prepare import DROPPED
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

Row = dict[str, Any]
StageJob = tuple[str, Job]
"""The stage's name, and the job."""


def failures(config: Config, only: str | None = None) -> list[Row]:
    """Failed rows of every step, or of one stage or step, by step and type of error.

    {stage, step, done, can_retry, error, rows, attempts, where, prompt_id, message, folder}:
    `attempts` is the most of any row, `where`, `prompt_id` and `message` are one row's. Rows
    that are too long to train on come as the step's `dropped`.

    Raises:
        UserError: no stage or step is named `only`.
    """
    chain = _chain(config)
    jobs = jobs_of(chain)
    return failures_of(chain.root, _named([*jobs, *_parts(chain, jobs)], only))


def _parts(chain: Chain, jobs: list[StageJob]) -> list[StageJob]:
    """Jobs that do a part of one that is not finished: later runs try their failed rows again."""
    early = Early.of(chain.stages)
    parts = early.parts if early else {}
    left = [(stage, job.step) for stage, job in jobs if job.step.key in parts]
    return [(stage, parts[step.key]) for stage, step in left if not step.is_done(chain.root)]


def failures_of(root: Folder, jobs: list[StageJob]) -> list[Row]:
    """Failed rows of the jobs' steps, grouped by stage, step and error."""
    found = []
    for stage, job in jobs:
        step: Step = job.step
        common = {"stage": stage, "done": step.is_done(root), "can_retry": job.is_retryable}
        folder = step.failures(root)
        for name, part in ((step.name, folder), (f"{step.name} {DROPPED}", folder / DROPPED)):
            groups = failed_by_error(part)
            found += [{"step": name, **common, "folder": str(part), **group} for group in groups]
    return found


@dataclass(frozen=True)
class Retry:
    """Failed rows that get new attempts, and the steps that run again because of it."""

    rows: dict[str, int]
    """Number of failed rows by step."""
    again: list[str]
    """Finished steps that the next run repeats."""
    trained: list[str]
    """Those of them that train a model."""
    retries: dict[str, int]
    """The new content of `retries.json`."""


def plan_retry(config: Config, only: str | None = None) -> Retry:
    """The plan of a retry.

    Failed answers and scores get new attempts; other failed rows need their cause fixed first. A
    retried step is a new request to its store, so it and all steps that depend on it get new keys;
    earlier results stay in their folders.

    Raises:
        UserError: there is no failed row to retry.
    """
    chain, rows = _chain(config), Counter[str]()
    now = jobs_of(chain)
    retries = dict(chain.retries or {})
    for stage, job in _named(now, only):
        failed = failures_of(chain.root, [(stage, job)])
        if failed and job.is_retryable:
            rows[job.step.name] += sum(group["rows"] for group in failed)
            retries[replace(job.step, retry=0).key] = job.step.retry + 1
    if not rows:
        raise UserError("failures: there is no failed answer or score to retry")
    after = {job.step.key for _, job in jobs_of(_chain(config, retries))}
    again = [j for _, j in now if j.step.key not in after and j.step.is_done(chain.root)]
    names = list(dict.fromkeys(job.step.name for job in again))
    trained = [job.step.name for job in again if job.kind is JobKind.TRAIN]
    return Retry(rows, names, trained, retries)


def retry(config: Config, plan: Retry) -> None:
    """Write `retries.json`, so that the next run retries the failed rows of the plan.

    Raises:
        LeaseError: a run is using the output.
    """
    root = _chain(config).root
    with Lease(root, uuid.uuid4().hex):
        root.write_json(RETRIES, plan.retries)


def _chain(config: Config, retries: dict[str, int] | None = None) -> Chain:
    """The chain up to its last possible stage: without a target there is no training."""
    without_target = "pair" if config.existing else "select"
    return Chain(pinned(config), STAGES[-1] if config.target else without_target, retries)


def jobs_of(chain: Chain) -> list[StageJob]:
    """All jobs of the chain, in order."""
    return [(stage.name, job) for stage in chain.build() for job in stage.jobs]


def _named(jobs: list[StageJob], only: str | None) -> list[StageJob]:
    """The jobs of the stage or step `only`; all jobs if it is None.

    Raises:
        UserError: there is none.
    """
    names = {name: None for stage, job in jobs for name in (stage, job.step.name)}
    if only is not None and only not in names:
        raise UserError(f"--step {only}: no such stage or step; there are {', '.join(names)}")
    return [(stage, job) for stage, job in jobs if only in (None, stage, job.step.name)]
