"""Comparison of models by their rewards, or a verifier's outcomes, on the held-out prompts."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

from wrpo_ray.config import EvaluateConfig, ModelConfig
from wrpo_ray.data.samples import Prompts
from wrpo_ray.pipeline.identities import verifier_reward
from wrpo_ray.pipeline.model_jobs import ModelJobs
from wrpo_ray.runtime.job import Job
from wrpo_ray.stages.evaluate.stage import ScoredModel
from wrpo_ray.stages.generate.stage import Generate
from wrpo_ray.stages.score.stage import Score

SFT, DPO, FUSED = "target-sft", "target-dpo", "fused"
"""Names of the trained models."""


@dataclass(frozen=True)
class ComparedModel:
    """The jobs that compare one model: its answers, their rewards and a verifier's outcomes."""

    name: str
    answers: Generate
    rewards: Score | None
    checks: Score | None

    @staticmethod
    def of(
        model: ModelConfig, prompts: Prompts, config: EvaluateConfig, jobs: ModelJobs
    ) -> ComparedModel:
        """The jobs for a model's answers to `prompts`."""
        answers = jobs.generate(model, prompts, config.sampling)
        rewards = jobs.score(answers.samples) if jobs.config.reward else None
        verify = verifier_reward(config.verifier) if config.verifier else None
        checks = jobs.score(answers.samples, verify) if verify else None
        return ComparedModel(model.name, answers, rewards, checks)

    @property
    def scored_model(self) -> ScoredModel:
        """The model as `Evaluate` reads it."""
        found = (job.samples if job else None for job in (self.rewards, self.checks))
        return ScoredModel(self.name, *found)


def by_phase(models: list[ComparedModel]) -> Iterator[tuple[Job, ...]]:
    """Jobs that can run together: all answers, all rewards, all checks."""
    yield tuple(model.answers for model in models)
    yield tuple(model.rewards for model in models if model.rewards)
    yield tuple(model.checks for model in models if model.checks)


def contrasts(trained: Container[str], target: str) -> Iterator[tuple[str, str]]:
    """Pairs of models whose paired difference is worth knowing: the fused model's first."""
    if FUSED not in trained:
        return
    yield FUSED, target
    yield from ((FUSED, name) for name in (SFT, DPO) if name in trained)
    if SFT in trained:
        yield SFT, target
