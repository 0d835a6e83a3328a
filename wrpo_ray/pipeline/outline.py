"""What a run leaves for those who look at it: its outline, its plan, and `report.html`.

All of it is best effort: a report that fails is told in one line and never stops or slows a run.
It is made in a thread of the driver, at most a twentieth of the time; nothing waits for it but
the end of a run.
"""

from __future__ import annotations

from typing import Any

from wrpo_ray.config import Config
from wrpo_ray.data.outline import PLAN, Outline, StepOutline
from wrpo_ray.data.samples import Samples
from wrpo_ray.stages.generate.stage import Generate
from wrpo_ray.stages.ingest.stage import SOURCES, TARGET, IngestResponses
from wrpo_ray.stages.pair.stage import Pair, Select
from wrpo_ray.stages.score.stage import Score
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.addresses import without_secrets

Row = dict[str, Any]
Job = tuple[str, Any]
"""The stage's name, and the job."""


def outline(config: Config, until: str, jobs: list[Job], models: dict[str, str]) -> Outline:
    """The chain as those see it who have only the output."""
    tree = without_secrets(config.model_dump(mode="json", by_alias=True))
    steps = tuple(_step(stage, job) for stage, job in jobs)
    return Outline(until, config.storage.buckets, tree, models, steps)


def _step(stage: str, job: Any) -> StepOutline:
    step = job.step
    asked: Row = {}
    if isinstance(job, Generate):
        asked = {"samples": job.sampling.samples} | _prompts(job)
    elif isinstance(job, Score):
        asked = {"samples": job.answers.count} | _prompts(job.answers)
    return StepOutline(
        stage=stage,
        name=step.name,
        key=step.key,
        folder=step.folder,
        manifest=step.manifest,
        kind=job.kind,
        source=step.source,
        stores=tuple(dict.fromkeys(_stores(job))),
        **asked,
    )


def _prompts(asked: Any) -> Row:
    return {"prompts": asked.prompts.step.key, "splits": asked.prompts.splits}


def _stores(job: Any) -> list[str]:
    """Folders of scored answers: those that it makes, or chooses from."""
    if isinstance(job, Score):
        return [job.step.folder]
    if isinstance(job, IngestResponses):
        return [f"{job.step.folder}/{part}" for part in (SOURCES, TARGET)]
    if isinstance(job, Select):
        return [_store(samples) for samples in job.sources.samples]
    if isinstance(job, Pair):
        return [*_stores(job.select), *(_store(samples) for samples in job.answers.samples)]
    return []


def _store(samples: Samples) -> str:
    folder = samples.step.folder
    return f"{folder}/{samples.part}" if samples.part else folder


def keep_plan(root: Folder, planned: dict[str, Row]) -> None:
    """Keep what steps were expected to take ({key of a step: its work}): the first word stays."""
    known = root.read_record(PLAN) if root.exists(PLAN) else {}
    new = {key: work for key, work in planned.items() if key not in known}
    if new:
        root.write_json(PLAN, known | new)
