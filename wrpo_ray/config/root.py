"""The root of the config, `Config`: joins the sections of the other modules.

Nothing here imports torch or ray. `load` reports all problems of a file at once, each as
`path: problem (got value)`, and suggests the closest match for an unknown key.
Fields marked `PLACEMENT` say where and how fast a step runs, never what it computes, and
stay out of its identity (`Section.identity`).
"""

from collections.abc import Collection, Iterator
from typing import Any, Self, get_args

from pydantic import Field, field_validator, model_validator

from wrpo_ray.config.base import PLACEMENT, Section
from wrpo_ray.config.data import (
    ImportConfig,
    OneOrSeveral,
    PromptsConfig,
    SplitConfig,
    StorageConfig,
)
from wrpo_ray.config.evaluation import BenchmarksConfig, EvaluateConfig
from wrpo_ray.config.models import ModelConfig, SamplingConfig
from wrpo_ray.config.pairing import AnswersConfig, PairConfig
from wrpo_ray.config.planning import BudgetConfig, PlanConfig, PricesConfig
from wrpo_ray.config.recorded import RecordedAnswers, RecordedConfig, Source, TargetConfig
from wrpo_ray.config.resources import ClusterConfig
from wrpo_ray.config.reward import GroupedRewardConfig, VerifierName
from wrpo_ray.config.training import SftConfig, WrpoConfig

RESERVED = frozenset({"target-sft", "target-dpo", "fused", "best-of-sources", "mixture"})
"""Names of the run's own models in tables."""


class Config(Section):
    """The config of a fusion run.

    Example:
        >>> Config(output="out", existing={"path": "answers.parquet"}).existing.path
        'answers.parquet'
    """

    output: str
    """Folder of all results, local or in an object store (s3://, gs://). Credentials come
    from the environment or the machine's role, never from the address."""
    seed: int = Field(42, ge=0, lt=2**31)
    """Random seed of splits, samples and orders."""
    prompts: OneOrSeveral = None
    """The prompts to generate answers for, or a list of such sections: files of several kinds, such
    as chat and maths, each with its columns and its `group`. null takes those of the recorded
    answers."""
    existing: ImportConfig | None = Field(None, alias="import")
    """Existing answers, instead of `prompts` and `sources`."""
    sources: tuple[Source, ...] = ()
    """The source models: each is asked (`model`), or its answers are recorded (`answers`)."""
    target: TargetConfig | None = None
    """The model to be improved."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling of the sources and target-SFT."""
    reward: GroupedRewardConfig | None = None
    """The score of an answer."""
    split: SplitConfig = SplitConfig()
    """Shares of prompts for SFT and for preferences."""
    answers: AnswersConfig = AnswersConfig()
    """Which answers may be chosen or rejected."""
    pair: PairConfig = PairConfig()
    """Selection of y_ws, y_wt, y_l."""
    sft: SftConfig | None = SftConfig()
    """SFT of the target on y_ws (paper, section 4.1). null skips it: the target itself is sampled,
    trained and used as the reference; with `wrpo.alpha.end: 0` that is on-policy DPO."""
    wrpo: WrpoConfig = WrpoConfig()
    """Preference training of target-SFT."""
    evaluate: EvaluateConfig | None = None
    """Held-out evaluation."""
    storage: StorageConfig = StorageConfig()
    """Layout of the output."""
    cluster: ClusterConfig = Field(ClusterConfig(), json_schema_extra=PLACEMENT)
    """The Ray cluster."""
    prices: PricesConfig = Field(PricesConfig(), json_schema_extra=PLACEMENT)
    """Prices of work."""
    budget: BudgetConfig = Field(BudgetConfig(), json_schema_extra=PLACEMENT)
    """Limits on tokens, cost and time."""
    plan: PlanConfig = Field(PlanConfig(), json_schema_extra=PLACEMENT)
    """Assumptions of `wrpo plan`."""
    report: bool = Field(True, json_schema_extra=PLACEMENT)
    """Write `report.html` into the output as steps finish; `wrpo report` makes it at any time."""
    failure_limit: float = Field(0.01, ge=0, le=1, json_schema_extra=PLACEMENT)
    """Maximum share of failed rows in a step; beyond it the run stops."""
    max_attempts: int = Field(3, ge=1, json_schema_extra=PLACEMENT)
    """Number of runs that attempt an answer or a score before it stays failed; `wrpo failures
    --retry` resets the count."""

    @field_validator("target", mode="before")
    @classmethod
    def _as_target(cls, given: Any) -> Any:
        """A model given from Python as the target."""
        return given.model_dump() if type(given) is ModelConfig else given

    @property
    def prompt_files(self) -> tuple[PromptsConfig, ...]:
        """The sections of `prompts`: one, several or none."""
        if isinstance(self.prompts, PromptsConfig):
            return (self.prompts,)
        return self.prompts or ()

    @property
    def prompt_sections(self) -> dict[str, PromptsConfig]:
        """{place in the config: prompts}."""
        if isinstance(self.prompts, PromptsConfig):
            return {"prompts": self.prompts}
        return {f"prompts.{number}": given for number, given in enumerate(self.prompt_files)}

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        """The sources that are asked."""
        return tuple(source for source in self.sources if isinstance(source, ModelConfig))

    @property
    def recorded(self) -> dict[str, RecordedAnswers]:
        """{name: answers} of the sources whose answers are recorded."""
        return {s.name: s.answers for s in self.sources if isinstance(s, RecordedConfig)}

    @property
    def recorded_sections(self) -> dict[str, RecordedAnswers]:
        """{place in the config: recorded answers} of sources and target."""
        found = {f"sources.{name}.answers": answers for name, answers in self.recorded.items()}
        own = self.target.answers if self.target else None
        return found | ({"target.answers": own} if own else {})

    @property
    def has_input(self) -> bool:
        """Whether there are prompts or answers to train on."""
        return bool(self.prompts or self.existing or self.recorded)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        yield from self._input_problems()
        yield from self._recorded_problems()
        yield from self._without_reference()
        if self.target and self.target.endpoint:
            yield "target: it is trained, so it needs weights: give a model folder, no endpoint"
        yield from self._evaluation_problems()
        yield from self._pairing_problems()
        yield from self._name_problems()
        yield from self._group_problems()
        yield from self._reasoning_problems()

    def _reasoning_problems(self) -> Iterator[str]:
        target = self.target
        if not target:
            return
        thinking = {f"sources.{m.name}": m.reasoning for m in self.models}
        thinking |= {where: answers.reasoning for where, answers in self.recorded_sections.items()}
        kept = next((where for where, policy in thinking.items() if policy == "keep"), None)
        if kept and target.reasoning != "keep":
            yield (
                f"{kept}.reasoning: keep trains the target to reason; set target.reasoning to "
                f"keep, too, or this one to strip"
            )
        if target.reasoning and "published" in (self.wrpo.compat, self.sft and self.sft.compat):
            yield "target.reasoning: `compat: published` knows no reasoning; leave one of them out"

    def _input_problems(self) -> Iterator[str]:
        is_evaluation = bool(self.evaluate and self.evaluate.models)
        if (self.prompts and self.existing) or (not self.has_input and not is_evaluation):
            yield "give exactly one of `prompts` and `import`, or sources with recorded `answers`"
        if self.prompts and not self.sources:
            yield "sources: zero sources, so nothing to fuse; add at least one {name, model}"
        if self._scores_answers and not self.reward:
            yield (
                f"reward: missing; give `model`, `function`, `verifier`, `judge`, `mixture` or "
                f"`by_group`{self._own_scores}"
            )

    @property
    def _own_scores(self) -> str:
        """How to use the scores of a file that has some and is scored again."""
        given = self.recorded_sections.items()
        unused = next((w for w, own in given if own.columns.reward and not own.reward), None)
        return f", or set {unused}.reward: recorded to use the scores in its file" if unused else ""

    @property
    def _scores_answers(self) -> bool:
        """Whether there are answers without recorded scores."""
        if self.existing or not self.has_input:
            return False
        given = [*self.recorded.values()]
        is_asked = bool(self.models) or not self.sources
        if self.target and self.pair.policy != "fusechat3":
            given += [self.target.answers] if self.target.answers else []
            is_asked = is_asked or not self.target.answers
        return is_asked or not all(answers.reward for answers in given)

    def _recorded_problems(self) -> Iterator[str]:
        given = self.recorded_sections
        if self.existing and given:
            yield "import: it brings its own answers; leave out `answers`, or `import`"
        if "target.answers" in given and not self.sources:
            yield "target.answers: needs `sources`, whose best answers they are paired with"
        has_ids = bool(self.prompts) and all(one.columns.id for one in self.prompt_files)
        for where, answers in given.items():
            if answers.columns.id and not has_ids:
                yield f"{where}: columns.id needs `prompts` with the same ids (prompts.columns.id)"
        held_out = self.evaluate.prompts if self.evaluate else None
        for where, other in {"import": self.existing, "evaluate.prompts": held_out}.items():
            if other and other.columns.id:
                yield f"{where}: columns.id is for `prompts`, to find recorded answers"

    def _evaluation_problems(self) -> Iterator[str]:
        asked = self.evaluate
        if asked is None:
            return
        if self.has_input and not self.target:
            yield "evaluate: needs a `target`"
        if not (self.reward or asked.verifier or asked.judge):
            yield "evaluate: needs a `reward`, a `verifier` or a `judge`"
        yield from self._without_judge(asked)

    def _pairing_problems(self) -> Iterator[str]:
        if self.pair.policy == "fusechat3" and self.wrpo.alpha.end:
            yield (
                "pair.policy: fusechat3 trains by DPO, its rows have one chosen answer; set "
                "wrpo.alpha.end: 0"
            )
        if self.pair.verifier and self.existing:
            yield "pair.verifier: works on generated answers, not on those of `import`"

    def _name_problems(self) -> Iterator[str]:
        asked = self.evaluate.models if self.evaluate else ()
        models = [*self.sources, *([self.target] if self.target else []), *asked]
        names = [model.name for model in models]
        if reserved := RESERVED & set(names):
            yield f"sources: the name {min(reserved)!r} is taken by the run's own models"
        for name in {n for n in names if names.count(n) > 1}:
            yield f"sources: the name {name!r} is given twice"

    def _without_judge(self, asked: EvaluateConfig) -> Iterator[str]:
        """Sections that the evaluation needs and that are missing."""
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
        if not self.models and (baselines.best_of_sources or baselines.mixture):
            yield "evaluate.baselines: need `sources` that are asked ({name, model})"

    def _without_reference(self) -> Iterator[str]:
        """Verifiers of prompts that have no reference column."""
        lack = "verifies answers, so set {}.columns.reference to the column with the right ones"
        rewards = self.reward.each if self.reward else ()
        verifies = any(part.verifier for reward in rewards for part in reward.parts)
        given = self.prompt_sections
        bare = [where for where, one in given.items() if not one.columns.reference]
        is_of_all = bool(self.reward and not self.reward.by_group)
        if verifies and bare and (is_of_all or len(bare) == len(given)):
            yield f"reward: it {lack.format(bare[0])}"
        recorded = [] if self.prompts else list(self.recorded.items())
        if verifies and recorded and not any(a.columns.reference for _, a in recorded):
            yield f"reward: it {lack.format(f'sources.{recorded[0][0]}.answers')}"
        asked = self.evaluate
        checks = bool(asked and asked.verifier in get_args(VerifierName))
        held_out = asked.prompts if asked else None
        if held_out and (verifies or checks) and not held_out.columns.reference:
            yield f"evaluate: it {lack.format('evaluate.prompts')}"

    @property
    def group_names(self) -> tuple[str, ...]:
        """The groups of prompts that rewards, sources or margins are given for, sorted."""
        by_reward = self.reward.by_group if self.reward else {}
        of_sources = [name for source in self.models for name in source.groups or ()]
        return tuple(sorted({*by_reward, *of_sources, *self.pair.by_group}))

    def _group_problems(self) -> Iterator[str]:
        """Sections of groups where the prompts have none, or where all prompts are meant."""
        asked = self.evaluate
        others: list[tuple[str, ModelConfig]] = [("target", self.target)] if self.target else []
        if asked:
            others += [(f"evaluate.models.{m.name}", m) for m in asked.models]
            others += [("evaluate.judge", asked.judge)] if asked.judge else []
        for what, model in others:
            if model.groups:
                yield f"{what}.groups: only sources have it; this model answers all prompts"
        of_answers = [self.existing] if self.existing else list(self.recorded.values())
        files = self.prompt_files or of_answers
        if files and self.group_names and not any(map(_has_group, files)):
            yield (
                "reward.by_group, pair.by_group, sources.groups: set columns.group of the prompts "
                "to the column with the group of each prompt, or `group` to that of a whole file"
            )
        if self.reward and self.reward.by_group:
            names = {model.name for _, model in others} | {source.name for source in self.sources}
            yield from self._reward_problems(self.reward, names)

    def _reward_problems(
        self, reward: GroupedRewardConfig, models: Collection[str]
    ) -> Iterator[str]:
        """Rewards by group with the name of a model, or without one for what has no group."""
        for own in reward.each:
            if own.name in models:
                yield f"reward: the name {own.name!r} is a model's; give it another `name`"
        for group in (name for name, own in reward.by_group.items() if own.verifier):
            high = self.pair.margins_of(group)[1]
            if high < 1:
                yield (
                    f"pair: its verifier gives group {group!r} rewards of 0 and 1, and pairs may "
                    f"differ by {high:g}; set pair.by_group.{group}.max_margin: 1"
                )
        asked = self.evaluate
        if reward.default or not asked:
            return
        if asked.prompts and not _has_group(asked.prompts):
            yield (
                "evaluate: rewards are given by_group, so set evaluate.prompts.columns.group, or "
                "give `reward` a kind beside by_group for all other prompts"
            )
        benchmarks = asked.benchmarks.model_dump(exclude_none=True)
        if asked.baselines.best_of_sources and benchmarks:
            yield (
                "evaluate.baselines.best_of_sources: questions of benchmarks are of no group; give "
                "`reward` a kind beside by_group for them"
            )


def _has_group(given: PromptsConfig | ImportConfig | RecordedAnswers) -> bool:
    """Whether the prompts of the files have groups."""
    return bool(given.columns.group or (isinstance(given, PromptsConfig) and given.group))
