"""The table of stages, in order, for the chain and the command line; imports are light."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wrpo_ray.runtime.job import Job
    from wrpo_ray.storage.steps import Step

STAGE_HELP = {
    "prompts": "read prompts, or existing answers, into records",
    "generate": "sample answers from every source on vLLM",
    "score": "score every answer with the reward",
    "select": "choose the best source answer of each prompt (y_ws)",
    "sft": "fine-tune the target on y_ws",
    "sample": "sample and score answers of target-SFT",
    "pair": "write the preference shards (x, y_ws, y_wt, y_l)",
    "train": "WRPO from target-SFT, and DPO to compare with",
    "evaluate": "compare all models on held-out prompts",
}
"""{name of a stage: what it does}"""
STAGES = tuple(STAGE_HELP)


@dataclass(frozen=True)
class Stage:
    """A name to stop after, and phases that run one after another, each of jobs of one kind."""

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
