"""Run artifacts: `chain.json` (the steps and the config) and `plan.json` (expected work).

Reports and `wrpo status` read them, so that they need neither the config nor the models.
"""

from typing import Any

from wrpo_ray.config import Config
from wrpo_ray.data.outline import PLAN, Outline, StepOutline
from wrpo_ray.runtime.job import Job
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.addresses import without_secrets

Row = dict[str, Any]


def outline(
    config: Config, until: str, jobs: list[tuple[str, Job]], models: dict[str, str]
) -> Outline:
    """The record of a chain for `chain.json`, without credentials."""
    tree = without_secrets(config.model_dump(mode="json", by_alias=True))
    steps = tuple(_step(stage, job) for stage, job in jobs)
    return Outline(until, config.storage.buckets, tree, models, steps)


def _step(stage: str, job: Job) -> StepOutline:
    step = job.step
    asked: Row = {}
    if samples := job.samples:
        prompts = samples.prompts
        asked = {"samples": samples.count, "prompts": prompts.step.key, "splits": prompts.splits}
    return StepOutline(
        stage=stage,
        name=step.name,
        key=step.key,
        folder=step.folder,
        manifest=step.manifest,
        kind=job.kind,
        source=step.source,
        stores=tuple(dict.fromkeys(job.stores)),
        **asked,
    )


def keep_plan(root: Folder, planned: dict[str, Row]) -> None:
    """Add expected work to `plan.json` ({key of a step: work}); known steps keep their entry."""
    known = root.read_record(PLAN) if root.exists(PLAN) else {}
    new = {key: work for key, work in planned.items() if key not in known}
    if new:
        root.write_json(PLAN, known | new)
