"""The stages of a chain, and phases of jobs that can run together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
    phases: tuple[tuple[Any, ...], ...]

    @property
    def steps(self) -> list[Step]:
        """The steps of all jobs."""
        return [job.step for phase in self.phases for job in phase]


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


def by_phase(models: list[Compared]) -> Iterator[tuple[Any, ...]]:
    """Jobs that can run together: answers, rewards, checks."""
    for part in ("answers", "rewards", "checks"):
        yield tuple(job for model in models if (job := getattr(model, part)))
