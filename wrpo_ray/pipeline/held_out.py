"""Comparison of models by their rewards, or a verifier's outcomes, on the held-out prompts."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace

from wrpo_ray.config import EvaluateConfig, ModelConfig
from wrpo_ray.data.samples import Prompts
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline.model_jobs import ModelJobs, by_reward
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
    rewards: tuple[Score, ...]
    checks: tuple[Score, ...]

    @staticmethod
    def of(
        model: ModelConfig, prompts: Prompts, config: EvaluateConfig, jobs: ModelJobs
    ) -> ComparedModel:
        """The jobs for a model's answers to `prompts`."""
        answers = jobs.generate(model, prompts, config.sampling)
        rewards = jobs.scores(answers.samples) if jobs.config.reward else ()
        checks = (jobs.verify(answers.samples, config.verifier),) if config.verifier else ()
        return ComparedModel(model.name, answers, rewards, checks)

    @property
    def on_one_scale(self) -> ComparedModel:
        """Without rewards that differ by group, whose mean over all prompts tells nothing.

        Raises:
            UserError: nothing is left to compare by.
        """
        found = replace(self, rewards=self.rewards if len(self.rewards) == 1 else ())
        if not (found.rewards or found.checks):
            told = "; rewards by_group have scales of their own" if self.rewards else ""
            raise UserError(f"evaluate: a study compares by `reward` or `evaluate.verifier`{told}")
        return found

    @property
    def scored_model(self) -> ScoredModel:
        """The model as `Evaluate` reads it."""
        found = (tuple(job.samples for job in jobs) for jobs in (self.rewards, self.checks))
        return ScoredModel(self.name, *found)


def by_phase(models: list[ComparedModel]) -> Iterator[tuple[Job, ...]]:
    """Jobs that can run together: all answers, the scores of each reward, all checks."""
    yield tuple(model.answers for model in models)
    yield from by_reward(job for model in models for job in model.rewards)
    yield tuple(job for model in models for job in model.checks)


def contrasts(trained: Container[str], target: str) -> Iterator[tuple[str, str]]:
    """Pairs of models whose paired difference is worth knowing: the fused model's first."""
    if FUSED not in trained:
        return
    yield FUSED, target
    yield from ((FUSED, name) for name in (SFT, DPO) if name in trained)
    if SFT in trained:
        yield SFT, target
