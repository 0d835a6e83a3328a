"""The stages of a chain, and phases of jobs that can run together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from wrpo_ray.runtime.job import Job
from wrpo_ray.stages.evaluate.stage import (
    ScoredModel,
)
from wrpo_ray.stages.generate.stage import Generate
from wrpo_ray.stages.score.stage import Score
from wrpo_ray.storage.steps import Step

STAGES = ("prompts", "generate", "score", "select", "sft", "sample", "pair", "train", "evaluate")


@dataclass(frozen=True)
class Stage:
    """A name to stop after, and phases of jobs that run one after another."""

    name: str
    phases: tuple[tuple[Job, ...], ...]

    @property
    def jobs(self) -> list[Job]:
        """The jobs of all phases."""
        return [job for phase in self.phases for job in phase]

    @property
    def steps(self) -> list[Step]:
        """The steps of all jobs."""
        return [job.step for job in self.jobs]


@dataclass(frozen=True)
class Compared:
    """A model's answers to the held-out prompts, with rewards and a verifier's outcomes."""

    answers: Generate
    rewards: Score | None
    checks: Score | None
    name: str

    @property
    def scored_model(self) -> ScoredModel:
        """As `Evaluate` reads it."""
        found = (job.samples if job else None for job in (self.rewards, self.checks))
        return ScoredModel(self.name, *found)


def by_phase(models: list[Compared]) -> Iterator[tuple[Job, ...]]:
    """Jobs that can run together: answers, rewards, checks."""
    yield tuple(model.answers for model in models)
    yield tuple(model.rewards for model in models if model.rewards)
    yield tuple(model.checks for model in models if model.checks)
