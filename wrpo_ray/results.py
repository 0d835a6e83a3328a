"""What a finished output holds, for those who look at it: failed rows, and preference rows."""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from wrpo_ray.config import Config
from wrpo_ray.core.lease import Lease
from wrpo_ray.core.shards import failed_by_error
from wrpo_ray.core.steps import Step
from wrpo_ray.core.storage import Folder
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline import RETRIES, STAGES, Chain
from wrpo_ray.train.prepare import DROPPED
from wrpo_ray.train.stage import Train

Row = dict[str, Any]


# --- failed rows -----------------------------------------------------------------------------


def failures(config: Config, only: str | None = None) -> list[Row]:
    """Failed rows of every step, or of one stage or step, by step and type of error.

    {stage, step, done, can_retry, error, rows, attempts, where, prompt_id, message, folder}:
    `attempts` is the most of any row, `where`, `prompt_id` and `message` are one row's. Rows
    that are too long to train on come as the step's `dropped`.

    Raises:
        UserError: no stage or step is named `only`.
    """
    chain = _chain(config)
    return _failures(chain.root, _jobs(chain), only)


def _failures(root: Folder, jobs: list[tuple[str, Any]], only: str | None) -> list[Row]:
    names = {name: None for stage, job in jobs for name in (stage, job.step.name)}
    if only is not None and only not in names:
        raise UserError(f"--step {only}: no such stage or step; there are {', '.join(names)}")
    found = []
    for stage, job in jobs:
        step: Step = job.step
        if only not in (None, stage, step.name):
            continue
        told = {"stage": stage, "step": step.name, "done": step.is_done(root)}
        folder = step.failures(root)
        for name, part in ((step.name, folder), (f"{step.name} {DROPPED}", folder / DROPPED)):
            can_retry = hasattr(job, "retry")
            more = told | {"step": name, "can_retry": can_retry, "folder": str(part)}
            found += [more | group for group in failed_by_error(part)]
    return found


@dataclass(frozen=True)
class Retry:
    """Failed rows that get new attempts, and what is done again for it."""

    rows: dict[str, int]
    """By step: how many failed rows."""
    again: list[str]
    """Finished steps that the next run does again."""
    trained: list[str]
    """Those of them that train a model."""
    retries: dict[str, int]
    """What the output's `retries.json` is to say."""


def plan_retry(config: Config, only: str | None = None) -> Retry:
    """What `retry` would do.

    Failed answers and scores get new attempts; what else failed is as it is until its cause is
    put right. A step that is retried is another request to its store, so it and all that
    depends on it have new keys: what they hold now stays where it is.

    Raises:
        UserError: there is no failed row to retry.
    """
    chain, rows = _chain(config), Counter[str]()
    now = _jobs(chain)
    for group in _failures(chain.root, now, only):
        if group["can_retry"]:
            rows[group["step"]] += group["rows"]
    if not rows:
        raise UserError("failures: there is no failed answer or score to retry")
    retries = dict(chain.retries or {})
    for _, job in now:
        if job.step.name in rows and hasattr(job, "retry"):
            retries[replace(job, retry=0).step.key] = job.retry + 1
    after = {job.step.key for _, job in _jobs(_chain(config, retries))}
    again = [j for _, j in now if j.step.key not in after and j.step.is_done(chain.root)]
    names = list(dict.fromkeys(job.step.name for job in again))
    trained = [job.step.name for job in again if isinstance(job, Train)]
    return Retry(rows, names, trained, retries)


def retry(config: Config, plan: Retry) -> None:
    """Give the failed rows of a plan new attempts: the next run makes them.

    Raises:
        LeaseError: a run is using the output.
    """
    root = _chain(config).root
    with Lease(root, uuid.uuid4().hex):
        root.write_json(RETRIES, plan.retries)


def _chain(config: Config, retries: dict[str, int] | None = None) -> Chain:
    """As far as the config goes: without a target nothing is sampled from it or trained."""
    without_target = "pair" if config.existing else "select"
    return Chain(config, STAGES[-1] if config.target else without_target, retries)


def _jobs(chain: Chain) -> list[tuple[str, Any]]:
    """(stage, job) of the chain."""
    return [(s.name, job) for s in chain.build() for phase in s.phases for job in phase]
