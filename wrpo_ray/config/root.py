"""One frozen config tree, read from YAML: every field with type, bound, default and unit.

Nothing here imports torch or ray. `load` reports all problems of a file at once, each as
`path: problem (got value)`, and suggests the nearest name for an unknown key.
Fields marked `PLACEMENT` say where and how fast a step runs, never what it computes, and
stay out of its identity (`Section.identity`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from pydantic import (
    Field,
    model_validator,
)

from wrpo_ray.config.base import PLACEMENT, Section
from wrpo_ray.config.data import ImportConfig, PromptsConfig, SplitConfig, StorageConfig
from wrpo_ray.config.evaluation import BenchmarksConfig, EvaluateConfig
from wrpo_ray.config.models import ModelConfig, SamplingConfig
from wrpo_ray.config.pairing import AnswersConfig, PairConfig
from wrpo_ray.config.planning import BudgetConfig, PlanConfig, PricesConfig
from wrpo_ray.config.resources import ClusterConfig
from wrpo_ray.config.reward import RewardConfig, VerifierName
from wrpo_ray.config.training import SftConfig, WrpoConfig


class Config(Section):
    """A fusion run."""

    output: str
    """Folder of all results, local or in an object store (s3://, gs://). What opens the store is in
    the environment or the machine's role, never in an address."""
    seed: int = Field(42, ge=0, lt=2**31)
    """Decides splits, samples, orders."""
    prompts: PromptsConfig | None = None
    """Prompts to generate answers for."""
    existing: ImportConfig | None = Field(None, alias="import")
    """Existing answers, instead of `prompts` and `sources`."""
    sources: tuple[ModelConfig, ...] = ()
    """The source models."""
    target: ModelConfig | None = None
    """The model to be improved."""
    sampling: SamplingConfig = SamplingConfig()
    """How sources and target-SFT are sampled."""
    reward: RewardConfig | None = None
    """What scores the answers."""
    split: SplitConfig = SplitConfig()
    """SFT and preference prompts."""
    answers: AnswersConfig = AnswersConfig()
    """Which answers may be chosen or rejected."""
    pair: PairConfig = PairConfig()
    """Selection of y_ws, y_wt, y_l."""
    sft: SftConfig | None = SftConfig()
    """SFT of the target on y_ws (paper, section 4.1). null leaves it out: the target itself is
    sampled, trained and compared with; with `wrpo.alpha.end: 0` that is on-policy DPO."""
    wrpo: WrpoConfig = WrpoConfig()
    """Preference training of target-SFT."""
    evaluate: EvaluateConfig | None = None
    """Held-out evaluation."""
    storage: StorageConfig = StorageConfig()
    """Layout of the output."""
    cluster: ClusterConfig = Field(ClusterConfig(), json_schema_extra=PLACEMENT)
    """Where to run."""
    prices: PricesConfig = Field(PricesConfig(), json_schema_extra=PLACEMENT)
    """What work costs."""
    budget: BudgetConfig = Field(BudgetConfig(), json_schema_extra=PLACEMENT)
    """When to stop."""
    plan: PlanConfig = Field(PlanConfig(), json_schema_extra=PLACEMENT)
    """What `wrpo plan` reckons with."""
    report: bool = Field(True, json_schema_extra=PLACEMENT)
    """Write `report.html` into the output as steps finish; `wrpo report` makes it at any time."""
    failure_limit: float = Field(0.01, ge=0, le=1, json_schema_extra=PLACEMENT)
    """Greatest share of failed rows in a step before the run stops."""
    max_attempts: int = Field(3, ge=1, json_schema_extra=PLACEMENT)
    """Runs in which an answer or a score is tried before it stays failed; `wrpo failures --retry`
    gives as many again."""

    @model_validator(mode="after")
    def _whole(self) -> Config:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        asked, has_input = self.evaluate, self.prompts or self.existing
        if (self.prompts and self.existing) or (not has_input and not (asked and asked.models)):
            yield "give exactly one of `prompts` and `import`"
        if self.prompts and not self.sources:
            yield "sources: zero sources, so nothing to fuse; add at least one {name, model}"
        if self.prompts and not self.reward:
            yield "reward: missing; give `model`, `function`, `verifier`, `judge` or `mixture`"
        yield from self._without_reference()
        if self.target and self.target.endpoint:
            yield "target: it is trained, so it needs weights: give a model folder, no endpoint"
        if asked and has_input and not self.target:
            yield "evaluate: needs a `target`"
        if asked and not (self.reward or asked.verifier or asked.judge):
            yield "evaluate: needs a `reward`, a `verifier` or a `judge`"
        yield from self._without_judge()
        if self.pair.policy == "fusechat3" and self.wrpo.alpha.end:
            yield (
                "pair.policy: fusechat3 trains by DPO, its rows have one chosen answer; set "
                "wrpo.alpha.end: 0"
            )
        if self.pair.verifier and self.existing:
            yield "pair.verifier: works on generated answers, not on those of `import`"
        names = [m.name for m in self.sources] + ([self.target.name] if self.target else [])
        names += [m.name for m in asked.models] if asked else []
        taken = {"target-sft", "target-dpo", "fused", "best-of-sources", "mixture"}
        reserved = taken & set(names)
        if reserved:
            yield f"sources: the name {sorted(reserved)[0]!r} is taken by the run's own models"
        for name in {n for n in names if names.count(n) > 1}:
            yield f"sources: the name {name!r} is given twice"

    def _without_judge(self) -> Iterator[str]:
        """What an evaluation lacks for what it is asked for."""
        asked = self.evaluate
        if asked is None:
            return
        pairs, baselines = asked.pairwise, asked.baselines
        has_benchmark = any(
            getattr(asked.benchmarks, name) for name in BenchmarksConfig.model_fields
        )
        if not asked.prompts and not has_benchmark:
            yield "evaluate: give `prompts` or one of `benchmarks`"
        if not asked.judge and (has_benchmark or (pairs and pairs.by == "judge")):
            yield "evaluate.judge: missing; benchmarks and `pairwise.by: judge` need it"
        if pairs and not asked.prompts:
            yield "evaluate.pairwise: needs `evaluate.prompts`"
        if not self.reward and (baselines.best_of_sources or (pairs and pairs.by == "reward")):
            yield "evaluate: best_of_sources and `pairwise.by: reward` need a `reward`"
        if not self.sources and (baselines.best_of_sources or baselines.mixture):
            yield "evaluate.baselines: need `sources`"

    def _without_reference(self) -> Iterator[str]:
        """Verifiers that have nothing to compare with."""
        lack = "verifies answers, so set {}.columns.reference to the column with the right ones"
        verifies = bool(self.reward and any(part.verifier for part in self.reward.parts))
        if verifies and self.prompts and not self.prompts.columns.reference:
            yield f"reward: it {lack.format('prompts')}"
        asked = self.evaluate
        checks = bool(asked and asked.verifier in get_args(VerifierName))
        held_out = asked.prompts if asked else None
        if held_out and (verifies or checks) and not held_out.columns.reference:
            yield f"evaluate: it {lack.format('evaluate.prompts')}"
