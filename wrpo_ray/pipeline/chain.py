"""The chain, readable from top to bottom: which jobs a config asks for, in which stages.

prompts -> generate (sources) -> score -> select -> sft -> sample (target-SFT) -> pair -> train ->
evaluate; `branches` runs sft and sample beside what is before them. Every stage is a list of
phases, every phase some jobs of one kind, every job a frozen specification with a `step`; jobs
whose step is done are not run again. The parts that need more than a few lines are beside it:
`inputs` (the user's files), `model_jobs` (answers and scores), `held_out` and `evaluation`
(comparison of models).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from wrpo_ray.config import (
    AlphaConfig,
    Config,
    EvaluateConfig,
    ModelConfig,
    SftConfig,
    TargetConfig,
)
from wrpo_ray.config.base import required
from wrpo_ray.data.samples import Prompts, Samples
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline.evaluation import Evaluation
from wrpo_ray.pipeline.groups import group_check
from wrpo_ray.pipeline.held_out import DPO, FUSED, SFT, ComparedModel, by_phase, contrasts
from wrpo_ray.pipeline.inputs import Inputs
from wrpo_ray.pipeline.model_jobs import ModelJobs, Trained, by_reward
from wrpo_ray.pipeline.stage_table import STAGES, Stage
from wrpo_ray.runtime.job import Job
from wrpo_ray.stages.evaluate.stage import Evaluate, ScoredModel
from wrpo_ray.stages.generate.stage import Generate
from wrpo_ray.stages.ingest.recorded import IngestRecorded
from wrpo_ray.stages.ingest.stage import (
    SOURCES,
    TARGET,
    IngestPreferences,
    IngestPrompts,
    IngestResponses,
)
from wrpo_ray.stages.pair.stage import Answers, Contamination, EvalNgrams, Pair, Select
from wrpo_ray.stages.score.stage import Score
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

RETRIES = "retries.json"
"""{key of a step: how often its failed rows were given new attempts}"""
TRAINING_STEPS = {DPO: "dpo", FUSED: "wrpo"}
"""The step that trains each, by name of the model."""


@dataclass
class Chain:
    """Builds the stages of a config, up to and with `until`.

    Example:
        >>> chain = Chain(load("fusion.yaml"))  # doctest: +SKIP
        >>> [step.folder for stage in chain.build() for step in stage.steps]  # doctest: +SKIP
        ['prompts-3f0c8e5b1a2d', 'generate-qwen-90d1c2b7e4f6', ...]
    """

    config: Config
    until: str = STAGES[-1]
    retries: dict[str, int] | None = None
    """By key of a step without retries; null reads those of the output."""
    for_plan: bool = False
    """Whether models and prompts may be missing: keys are then not those of a run."""
    shares_engines: bool = False
    """Whether the target and the models trained from it share engines and workers."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Fingerprints of given models by folder, which chains over the same models share."""
    stages: list[Stage] = field(default_factory=list)
    trained: dict[str, Trained] = field(default_factory=dict)
    """Models that the chain trains, by name."""

    @cached_property
    def root(self) -> Folder:
        """The output folder."""
        return Folder(self.config.output).absolute()

    @property
    def fused(self) -> Trained | None:
        """The model after preference training, if the chain goes so far."""
        return self.trained.get(FUSED)

    def build(self) -> list[Stage]:
        """All stages, in order.

        Raises:
            UserError: an input or model cannot be read, or there is no stage `until`.
        """
        if self.retries is None:
            self.retries = self.root.read_record(RETRIES) if self.root.exists(RETRIES) else {}
        existing = self.config.existing
        if existing and existing.format == "preferences":
            self._train_on_published_pairs()
        elif self.config.has_input:
            self._pair_and_train()
        if self._evaluating:
            self._evaluate()
        self._check_until()
        return self.stages

    def _train_on_published_pairs(self) -> None:
        given = required(self.config.existing, "import")
        step = self._inputs.step("import", given)
        self._add("pair", (IngestPreferences(step, given),))
        if self._wants("train"):
            self._train(step, Folder(self._target.model).absolute())

    def _pair_and_train(self) -> None:
        config = self.config
        selection, answers = self._imported() if config.existing else (self._generated(), None)
        if config.pair.policy == "fusechat3":
            answers = self._source_answers(selection)
        if self._wants("sft") and (config.target or not config.existing):
            if config.sft:
                self._sft(selection, config.sft)
            answers = answers or self._target_answers()
        if self._wants("pair") and answers:
            pairs = Pair(selection, answers, config.pair)
            self._add("pair", (pairs,))
            if self._wants("train") and config.target:
                self._train(pairs.step, self._start_of_preferences)

    def _check_until(self) -> None:
        """Check that the stage that was asked for is there; the last one need not be."""
        if self.until == STAGES[-1] or any(stage.name == self.until for stage in self.stages):
            return
        there = ", ".join(dict.fromkeys(stage.name for stage in self.stages))
        raise UserError(
            f"{self.until}: this config has no such stage; it has {there} (see `target`, "
            f"`import.target` and `evaluate`)"
        )

    def _wants(self, stage: str) -> bool:
        return STAGES.index(stage) <= STAGES.index(self.until)

    def _add(self, name: str, *phases: Sequence[Job]) -> None:
        """Add a stage, without the jobs that an earlier stage has."""
        if not self._wants(name):
            return
        known = {step.key for stage in self.stages for step in stage.steps}
        new = (tuple(job for job in phase if job.step.key not in known) for phase in phases)
        self.stages.append(Stage(name, tuple(phase for phase in new if phase)))

    # --- prompts, answers of the sources, and y_ws

    @cached_property
    def _inputs(self) -> Inputs:
        return Inputs(self.config, self.for_plan)

    @cached_property
    def _jobs(self) -> ModelJobs:
        return ModelJobs(
            self.config, self.retries or {}, self.trained, self.fingerprints,
            self.for_plan, self.shares_engines,
        )  # fmt: skip

    @cached_property
    def _splits(self) -> dict[str, float]:
        sft = self.config.split.sft
        return {"sft": sft, "preference": 1 - sft}

    @cached_property
    def _prompts(self) -> Prompts:
        job = self._inputs.prompts(self._splits)
        prompts = Prompts(job.step, tuple(self._splits))
        self._add("prompts", (job,), group_check(self.config, prompts))
        return prompts

    @cached_property
    def _recorded_target(self) -> list[IngestRecorded]:
        """The job that reads recorded answers of the target, if it has these."""
        return self._inputs.recorded_target(self._prompts)

    @property
    def _preference_prompts(self) -> Prompts:
        return Prompts(self._prompts.step, ("preference",))

    def _generated(self) -> Select:
        """Answers of the sources, generated or recorded, scored, and y_ws among them."""
        prompts, left_out = self._prompts, self._contamination()
        recorded = self._inputs.recorded_sources(prompts)
        self._add("prompts", [*recorded.values(), *self._recorded_target])
        asked = {
            m.name: self._jobs.generate(m, prompts.of_groups(m.groups)) for m in self.config.models
        }
        # Held-out answers come from the same engines, so that none is started twice.
        held_out = [job for m in self._given_models for job in self._held_out(m)]
        by_model = sorted([*asked.values(), *held_out], key=lambda job: job.model.name)
        self._add("generate", by_model)
        answers = [(asked | recorded)[source.name] for source in self.config.sources]
        return self._select(self._scored("score", *answers), left_out)

    def _imported(self) -> tuple[Select, Answers]:
        """The y_ws of existing scored answers, and those of the target."""
        prompts, given = self._prompts, required(self.config.existing, "import")
        step = self._inputs.step("import", given, (prompts.step,))
        self._add("score", (IngestResponses(step, given),))
        left_out = self._contamination()
        selection = self._select(self._answers(Samples(step, prompts, None, SOURCES)), left_out)
        return selection, self._answers(Samples(step, self._preference_prompts, None, TARGET))

    def _select(self, sources: Answers, left_out: Contamination | None) -> Select:
        selection = Select(self._prompts, sources, left_out, self.config.group_names)
        self._add("select", (selection,))
        return selection

    def _contamination(self) -> Contamination | None:
        """The overlap of training and evaluation prompts; None if nothing is to be left out.

        It is measured whatever stage is the last one, as keys of steps must not depend on that.
        """
        config = self.config.pair.contamination
        asked = self.config.evaluate
        if asked is None or asked.prompts is None or config.action == "off":
            return None
        unspaced = self._inputs.are_prompts_unspaced() or self._inputs.is_unspaced(asked.prompts)
        ngrams = EvalNgrams(self._eval_prompts, config.ngram, unspaced)
        job = Contamination(self._prompts, ngrams)
        self._add("prompts", (ngrams,), (job,))
        return job if config.action == "drop" else None

    def _scored(
        self, stage: str, *answers: Generate | IngestRecorded, before: Sequence[Job] = ()
    ) -> Answers:
        """Add the jobs that score the answers, and verify them where `pair.verifier` is given."""
        scored: list[Generate | IngestRecorded | Score] = []
        for job in answers:
            scored += [job] if job.has_scores else self._jobs.scores(job.samples)
        scores = [job for job in scored if isinstance(job, Score)]
        verify = self.config.pair.verifier
        checks = tuple(self._jobs.verify(job.samples, verify) for job in answers) if verify else ()
        self._add(stage, before, *by_reward(scores), checks)
        verdicts = tuple(job.samples for job in checks)
        return self._answers(*(job.samples for job in scored), verdicts=verdicts)

    def _answers(self, *samples: Samples, verdicts: tuple[Samples, ...] = ()) -> Answers:
        return Answers(samples, self.config.answers, verdicts)

    # --- training, and answers to pair

    @property
    def _target(self) -> TargetConfig:
        return required(self.config.target, "target")

    @property
    def _start_of_preferences(self) -> Folder:
        """target-SFT, or the target itself where there is no SFT."""
        if SFT in self.trained:
            return self.trained[SFT].folder
        return Folder(self._target.model).absolute()

    def _sft(self, selection: Select, config: SftConfig) -> None:
        """SFT of the target on y_ws."""
        base = Folder(self._target.model).absolute()
        key = self._jobs.fingerprint(base, self._target)
        rows = self._jobs.prepare("sft", selection.step, base, key, config)
        job = self._jobs.train("sft", rows, config)
        self._add("sft", (rows,), (job,))
        self.trained[SFT] = Trained.of(SFT, job, self._target, self.root)

    def _target_answers(self) -> Answers:
        """Answers of target-SFT, or without SFT of the target, to the preference prompts.

        They are recorded ones where the target has these.
        """
        model = self.trained[SFT].model if SFT in self.trained else self._target
        held_out = self._held_out(model) if model is not self._target else []
        for recorded in self._recorded_target:
            given = replace(recorded, prompts=self._preference_prompts)
            return self._scored("sample", given, before=held_out)
        own = self._jobs.generate(model, self._preference_prompts)
        return self._scored("sample", own, before=(own, *held_out))

    def _source_answers(self, selection: Select) -> Answers:
        """Answers of the sources to the preference prompts."""
        sources = selection.sources
        samples, verdicts = (
            tuple(replace(s, prompts=replace(s.prompts, splits=("preference",))) for s in given)
            for given in (sources.samples, sources.verdicts)
        )
        return replace(sources, samples=samples, verdicts=verdicts)

    def _train(self, rows: Step, base: Folder) -> None:
        """WRPO from target-SFT, and plain DPO to compare with, on the same prepared rows."""
        sft, wrpo = self.trained.get(SFT), self.config.wrpo
        key = sft.step.key if sft else self._jobs.fingerprint(base, self._target)
        configs = {FUSED: wrpo}
        if self.config.evaluate and self.config.evaluate.dpo_baseline and wrpo.alpha.end:
            configs = {DPO: wrpo.model_copy(update={"alpha": AlphaConfig(end=0)})} | configs
        is_of_sources = self.config.pair.policy == "fusechat3" and not self.config.existing
        is_stripped = self._target.reasoning == "strip"  # all answers follow the template alike
        own = SFT if sft and not self._target.answers else self._target.name
        sampled_by = None if is_of_sources or is_stripped else own
        prepared = self._jobs.prepare("wrpo", rows, base, key, wrpo, sampled_by)
        jobs = {
            name: self._jobs.train(TRAINING_STEPS[name], prepared, config)
            for name, config in configs.items()
        }
        self._add("train", (prepared,), tuple(jobs.values()))
        for name, job in jobs.items():
            self.trained[name] = Trained.of(name, job, self._target, self.root)

    # --- evaluation

    @property
    def _evaluating(self) -> bool:
        return self.config.evaluate is not None and self._wants("evaluate")

    @property
    def _evaluation(self) -> EvaluateConfig:
        return required(self.config.evaluate, "evaluate")

    @property
    def _given_models(self) -> list[ModelConfig]:
        own = [self.config.target] if self.config.target else []
        others = self.config.evaluate.models if self.config.evaluate else ()
        return [*self.config.models, *own, *others]

    @property
    def _models(self) -> list[ModelConfig]:
        return [*self._given_models, *(trained.model for trained in self.trained.values())]

    @cached_property
    def _eval_prompts(self) -> Prompts:
        given, splits = required(self._evaluation.prompts, "evaluate.prompts"), {"eval": 1.0}
        existing = self.config.existing
        is_published = existing is not None and existing.format == "preferences"
        trained_on = self._prompts if self.config.has_input and not is_published else None
        inputs = (trained_on.step,) if trained_on else ()
        step = self._inputs.step("eval-prompts", given, inputs, seed=self.config.seed)
        job = IngestPrompts(step, given, splits, self.config.seed, without=trained_on)
        prompts = Prompts(step, tuple(splits))
        self._add("prompts", (job,), group_check(self.config, prompts, is_held_out=True))
        return prompts

    def _held_out(self, model: ModelConfig) -> list[Generate]:
        """A model's answers for the evaluation that depend on no other answer."""
        if not self._evaluating:
            return []
        asked = self._evaluation
        jobs = self._judged([model]).first_answers(model)
        if not asked.prompts:
            return jobs
        return [self._jobs.generate(model, self._eval_prompts, asked.sampling), *jobs]

    def _judged(self, models: Sequence[ModelConfig]) -> Evaluation:
        """The judged part of the evaluation; the same jobs answer the benchmarks' prompts."""
        evaluate = self._evaluation
        pairwise = evaluate.pairwise
        if pairwise and not pairwise.pairs:
            pairwise = pairwise.model_copy(update={"pairs": ((FUSED, self._target.name),)})
            evaluate = evaluate.model_copy(update={"pairwise": pairwise})
        sources = tuple(m.name for m in self.config.models)
        own = self._eval_prompts if evaluate.prompts else None
        generate, scores = self._jobs.generate, self._jobs.scores
        found = Evaluation(evaluate, models, sources, own, generate, scores)
        self._add("prompts", tuple(found.benchmarks.values()))
        return found

    def _evaluate(self) -> None:
        if self._evaluation.prompts and (self.config.reward or self._evaluation.verifier):
            found = [self._compared(model) for model in self._models]
            entrants = tuple(model.scored_model for model in found)
            target = self._target.name if self.config.target else ""
            job = Evaluate(self._eval_prompts, entrants, tuple(contrasts(self.trained, target)))
            self._add("evaluate", *by_phase(found), (job,))
        judged = self._judged(self._models)
        judged.check_names()
        self._add("evaluate", *judged.phases())

    def _compared(self, model: ModelConfig) -> ComparedModel:
        return ComparedModel.of(model, self._eval_prompts, self._evaluation, self._jobs)

    def compared(self, name: str) -> tuple[Stage, ScoredModel, Prompts]:
        """The jobs that compare one model of a built chain with those of other chains.

        Raises:
            UserError: the chain has no such model, or nothing to compare by.
        """
        model = next((m for m in self._models if m.name == name), None)
        if model is None:
            there = ", ".join(m.name for m in self._models)
            raise UserError(f"model: there is no {name!r}; there are {there}")
        prompts, found = self._eval_prompts, self._compared(model).on_one_scale
        return Stage("evaluate", tuple(by_phase([found]))), found.scored_model, prompts
