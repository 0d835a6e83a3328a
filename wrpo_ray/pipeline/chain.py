"""The chain, readable from top to bottom: which steps a config asks for, and running them.

prompts -> generate (sources) -> score -> select -> sft -> sample (target-SFT) -> pair -> train
-> evaluate. Every stage is a list of phases, every phase some jobs of one kind, every job a
frozen spec with a `step`; jobs whose step is done are not run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from wrpo_ray.config import (
    AlphaConfig,
    Config,
    EvaluateConfig,
    ModelConfig,
    RewardConfig,
    ScoreConfig,
    SftConfig,
)
from wrpo_ray.config.base import required
from wrpo_ray.data.samples import Prompts, Samples
from wrpo_ray.errors import UserError
from wrpo_ray.llm.model_folder import small_files
from wrpo_ray.llm.rendering import OWN, Template
from wrpo_ray.pipeline.evaluation import Evaluation
from wrpo_ray.pipeline.identities import (
    scorer_fingerprint,
    template_fingerprint,
    verifier_reward,
    with_absolute_paths,
)
from wrpo_ray.pipeline.models import naming_key
from wrpo_ray.pipeline.stage import STAGES, Compared, Stage, by_phase
from wrpo_ray.runtime.job import Job
from wrpo_ray.stages.evaluate.stage import (
    Evaluate,
    ScoredModel,
)
from wrpo_ray.stages.generate.stage import Generate
from wrpo_ray.stages.ingest.cells import READING, beginnings_are, hold_more_than_text
from wrpo_ray.stages.ingest.readers import input_files
from wrpo_ray.stages.ingest.stage import (
    SOURCES,
    TARGET,
    IngestPreferences,
    IngestPrompts,
    IngestResponses,
)
from wrpo_ray.stages.pair.overlap import are_unspaced
from wrpo_ray.stages.pair.stage import (
    Answers,
    Contamination,
    EvalNgrams,
    Pair,
    Select,
)
from wrpo_ray.stages.score.classifiers import can_end_with_padding
from wrpo_ray.stages.score.stage import Score
from wrpo_ray.stages.train.prepare import Prepare
from wrpo_ray.stages.train.stage import Train
from wrpo_ray.storage.fingerprints import data_fingerprint, digest, model_fingerprint
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

RETRIES = "retries.json"
"""{key of a step: how often its failed rows were given new attempts}"""
SFT, DPO, FUSED = "target-sft", "target-dpo", "fused"
Retryable = TypeVar("Retryable", Generate, Score)


class Trained(NamedTuple):
    """A model that the chain trains."""

    model: ModelConfig
    """Served by vLLM with the target's own settings."""
    folder: Folder
    step: Step


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
    """By key of a step without them; null reads those of the output."""
    for_plan: bool = False
    """Models and prompts that are not here yet pass for unknown ones."""
    shares_engines: bool = False
    """The target and what is trained from it take turns in the same engines and workers."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Those of given models by folder, which chains over the same models share."""
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
        """All stages, in order."""
        if self.retries is None:
            self.retries = self.root.read_record(RETRIES) if self.root.exists(RETRIES) else {}
        existing = self.config.existing
        if not existing and not self.config.prompts:
            pass  # models that are there already are compared
        elif existing and existing.format == "preferences":
            rows = self._published_preferences()
            if self._wants("train"):
                self._train(rows, Folder(self._target.model).absolute())
        else:
            selection, answers = self._imported() if existing else (self._generated(), None)
            if self.config.pair.policy == "fusechat3":
                answers = self._source_answers(selection)
            if self._wants("sft") and (self.config.target or not existing):
                if self.config.sft:
                    self._sft(selection, self.config.sft)
                answers = answers or self._own_answers()
            if self._wants("pair") and answers:
                pairs = Pair(selection, answers, self.config.pair)
                self._add("pair", (pairs,))
                if self._wants("train") and self.config.target:
                    self._train(pairs.step, self._start_of_preferences)
        if self._evaluating:
            self._evaluate()
        self._check_reached()
        return self.stages

    def _check_reached(self) -> None:
        """A stage that was asked for has to be there; without asking all that there are run."""
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
        """Add a stage; jobs that an earlier stage has are left to it."""
        if not self._wants(name):
            return
        known = {step.key for stage in self.stages for step in stage.steps}
        new = (tuple(job for job in phase if job.step.key not in known) for phase in phases)
        self.stages.append(Stage(name, tuple(phase for phase in new if phase)))

    # --- prompts and candidates

    @cached_property
    def _splits(self) -> dict[str, float]:
        sft = self.config.split.sft
        return {"sft": sft, "preference": 1 - sft}

    @cached_property
    def _prompts(self) -> Prompts:
        given = self.config.prompts or required(self.config.existing, "import")
        step = self._input_step("prompts", given, splits=self._splits, seed=self.config.seed)
        self._add("prompts", (IngestPrompts(step, given, self._splits, self.config.seed),))
        return Prompts(step, tuple(self._splits))

    @property
    def _preference_prompts(self) -> Prompts:
        return Prompts(self._prompts.step, ("preference",))

    def _input_step(
        self, name: str, given: Any, inputs: tuple[Step, ...] = (), **config: Any
    ) -> Step:
        section = self._section(given)
        with _reading(section, given):
            is_unknown = self.for_plan and not Folder(given.path).exists()
            files = [] if is_unknown else input_files(given.path, section)
            content = data_fingerprint(files) if files else given.path
            has_more = hold_more_than_text(files, given.columns.of_text, content)
        read = given.identity() | {"path": content, "buckets": self.config.storage.buckets}
        read |= {"cells": READING} if has_more else {}
        return Step(name, read | config, inputs)

    def _generated(self) -> Select:
        prompts, left_out = self._prompts, self._contamination()
        answers = [self._generate(source, prompts) for source in self.config.sources]
        # Held-out answers come from the same engines, so that none is started twice.
        held_out = [job for m in self._given_models for job in self._held_out(m)]
        by_model = sorted([*answers, *held_out], key=lambda job: job.model.name)
        self._add("generate", tuple(by_model))
        return self._select(self._scored("score", *answers), left_out)

    def _select(self, sources: Answers, left_out: Contamination | None) -> Select:
        selection = Select(self._prompts, sources, left_out)
        self._add("select", (selection,))
        return selection

    def _contamination(self) -> Contamination | None:
        """What training prompts share with evaluation prompts; returned if it is to be left out.

        It does not depend on the last stage that is asked for, as keys of steps must not.
        """
        config = self.config.pair.contamination
        asked = self.config.evaluate
        if asked is None or asked.prompts is None or config.action == "off":
            return None
        given = self.config.prompts or required(self.config.existing, "import")
        both = (given, self._prompts.step), (asked.prompts, self._eval_prompts.step)
        unspaced = any(self._is_unspaced(*one) for one in both)
        ngrams = EvalNgrams(self._eval_prompts, config.ngram, unspaced)
        job = Contamination(self._prompts, ngrams)
        self._add("prompts", (ngrams,), (job,))
        return job if config.action == "drop" else None

    def _section(self, given: Any) -> str:
        """Of the config, that input files are given in."""
        own = {"prompts": self.config.prompts, "import": self.config.existing}
        return next((name for name, part in own.items() if part is given), "evaluate.prompts")

    def _is_unspaced(self, given: Any, step: Step) -> bool:
        """Whether prompts hold text in a script without spaces between words."""
        section = self._section(given)
        with _reading(section, given):
            if self.for_plan and not Folder(given.path).exists():
                return False
            files = input_files(given.path, section)
            content = step.config["path"]
            return beginnings_are(are_unspaced, files, given.columns.prompt, content)

    def _imported(self) -> tuple[Select, Answers]:
        prompts, given = self._prompts, required(self.config.existing, "import")
        step = self._input_step("import", given, (prompts.step,))
        self._add("score", (IngestResponses(step, given),))
        left_out = self._contamination()
        selection = self._select(self._answers(Samples(step, prompts, None, SOURCES)), left_out)
        return selection, self._answers(Samples(step, self._preference_prompts, None, TARGET))

    def _published_preferences(self) -> Step:
        given = required(self.config.existing, "import")
        step = self._input_step("import", given)
        self._add("pair", (IngestPreferences(step, given),))
        return step

    # --- models

    @property
    def _start_of_preferences(self) -> Folder:
        """target-SFT, or the target itself where there is no SFT."""
        if SFT in self.trained:
            return self.trained[SFT].folder
        return Folder(self._target.model).absolute()

    @property
    def _target(self) -> ModelConfig:
        return required(self.config.target, "target")

    def _add_trained(self, name: str, job: Train) -> None:
        """A model of the run, served by vLLM with the target's own settings."""
        folder = self.root / job.step.folder / "model"
        settings = self._target.model_copy(update={"name": name, "model": folder.uri})
        if job.config.lora and settings.dtype == "auto":  # bf16 would round what was learnt away
            settings = settings.model_copy(update={"dtype": "float32"})
        self.trained[name] = Trained(settings, folder, job.step)

    def _prepare_job(
        self, name: str, rows: Step, base: Folder, key: str, config: Any, own: str | None = None
    ) -> Prepare:
        return Prepare(name, rows, base, key, config, Template.of(self._target), own)

    @property
    def _samples_sources(self) -> bool:
        """Whether y_wt and y_l are generated answers of the sources."""
        return self.config.pair.policy == "fusechat3" and not self.config.existing

    def _train_job(self, name: str, rows: Prepare, config: Any) -> Train:
        identity = {"train": config.identity(), "base": rows.fingerprint, "seed": self.config.seed}
        step = Step(name, identity, (rows.step,))
        return Train(
            step, rows.step, rows.base, rows.fingerprint, config, self.config.seed,
            rows.template, self.shares_engines,
        )  # fmt: skip

    def _sft(self, selection: Select, config: SftConfig) -> None:
        """SFT of the target on y_ws."""
        base = Folder(self._target.model).absolute()
        key = self._fingerprint(base, self._target)
        rows = self._prepare_job("sft", selection.step, base, key, config)
        job = self._train_job("sft", rows, config)
        self._add("sft", (rows,), (job,))
        self._add_trained(SFT, job)

    def _own_answers(self) -> Answers:
        """What target-SFT, or without SFT the target, answers to the preference prompts."""
        model = self.trained[SFT].model if SFT in self.trained else self._target
        own = self._generate(model, self._preference_prompts)
        held_out = self._held_out(model) if model is not self._target else []
        return self._scored("sample", own, before=(own, *held_out))

    def _source_answers(self, selection: Select) -> Answers:
        """What the sources answer to the preference prompts."""
        sources = selection.sources
        samples, verdicts = (
            tuple(replace(s, prompts=self._preference_prompts) for s in given)
            for given in (sources.samples, sources.verdicts)
        )
        return replace(sources, samples=samples, verdicts=verdicts)

    def _train(self, rows: Step, base: Folder) -> None:
        """WRPO from target-SFT, and plain DPO to compare with, on the same prepared rows."""
        sft = self.trained.get(SFT)
        key = sft.step.key if sft else self._fingerprint(base, self._target)
        plain = self.config.wrpo.model_copy(update={"alpha": AlphaConfig(end=0)})
        configs = {FUSED: self.config.wrpo}
        is_dpo = not self.config.wrpo.alpha.end
        if self.config.evaluate and self.config.evaluate.dpo_baseline and not is_dpo:
            configs = {DPO: plain} | configs
        sampled = SFT if SFT in self.trained else self._target.name
        own = None if self._samples_sources else sampled
        prepared = self._prepare_job("wrpo", rows, base, key, self.config.wrpo, own)
        jobs = {
            name: self._train_job(name.replace(FUSED, "wrpo").removeprefix("target-"), prepared, c)
            for name, c in configs.items()
        }
        self._add("train", (prepared,), tuple(jobs.values()))
        for name, job in jobs.items():
            self._add_trained(name, job)

    def _fingerprint(self, folder: Folder, model: ModelConfig | None = None) -> str:
        """What identifies given weights, with the chat template; each folder is read once."""
        if self.for_plan and not folder.exists("config.json"):
            return digest(folder.uri, 16)
        if folder.uri not in self.fingerprints:
            self.fingerprints[folder.uri] = model_fingerprint(folder)
        weights = self.fingerprints[folder.uri]
        template = Template.of(model) if model else OWN
        if template == OWN:
            return weights
        file = template_fingerprint(template.file) if template.file else None
        return digest([weights, file, template.values, *template.revision], 16)

    # --- answers and rewards

    def _generate(self, model: ModelConfig, prompts: Prompts, sampling: Any = None) -> Generate:
        trained = self.trained.get(model.name)
        folder = trained.folder if trained else Folder(model.model).absolute()
        if model.endpoint:
            identity = digest([model.endpoint.url, model.model], 16)  # its weights are not seen
        else:
            identity = trained.step.key if trained else self._fingerprint(folder, model)
        model = model.model_copy(update={"chat_template": Template.of(model).file})
        if model.dtype == "auto" and not model.actors.num_gpus and not model.endpoint:
            model = model.model_copy(update={"dtype": "float32"})  # it decides the answers
        sampling = sampling or self.config.sampling.updated(model.sampling)
        family = self._family(model) if self.shares_engines else ""
        seed = self.config.seed
        return self._retried(Generate(model, folder, identity, prompts, sampling, seed, 0, family))

    def _family(self, model: ModelConfig) -> str:
        """Of the target and what is trained from it, which differ in their weights only."""
        target = self.config.target
        if not target or model.name not in (target.name, *self.trained):
            return ""
        key = self._fingerprint(Folder(target.model).absolute(), target)
        return f"{target.name} {key[:6]} and its kin"

    def _scored(self, stage: str, *answers: Generate, before: Sequence[Job] = ()) -> Answers:
        """Add the jobs that score the answers, and verify them where `pair.verifier` is given."""
        scores = tuple(self._score(job.samples) for job in answers)
        verify = self.config.pair.verifier
        reward = verifier_reward(verify) if verify else None
        checks = tuple(self._score(job.samples, reward) for job in answers) if reward else ()
        self._add(stage, before, scores, checks)
        verdicts = tuple(job.samples for job in checks)
        return self._answers(*(job.samples for job in scores), verdicts=verdicts)

    def _answers(self, *samples: Samples, verdicts: tuple[Samples, ...] = ()) -> Answers:
        return Answers(samples, self.config.answers, verdicts)

    def _score(self, answers: Samples, verifier: RewardConfig | None = None) -> Score:
        reward = verifier or required(self.config.reward, "reward")
        folders = [Folder(p.model).absolute() if p.model else None for p in reward.parts]
        identities = [
            self._classifier_fingerprint(part, folder) if folder else scorer_fingerprint(part)
            for part, folder in zip(reward.parts, folders, strict=True)
        ]
        return self._retried(
            Score(
                answers,
                with_absolute_paths(reward),
                tuple(folders),
                tuple(identities),
                outcome="verdict" if verifier else "reward",
            )
        )

    def _classifier_fingerprint(self, part: ScoreConfig, folder: Folder) -> str:
        """What identifies a reward model, and where it is read if that has changed.

        At first transformers looked for the last token that is not the padding.
        """
        weights = self._fingerprint(folder)
        if part.engine == "vllm" or (self.for_plan and not folder.exists("config.json")):
            return weights
        with naming_key(f"reward: {part.model}"):
            is_read_elsewhere = can_end_with_padding(small_files(folder))
        return digest([weights, "last token"], 16) if is_read_elsewhere else weights

    def _retried(self, job: Retryable) -> Retryable:
        """The job as another request to its store, if its failed rows were given new attempts."""
        times = (self.retries or {}).get(job.step.key, 0)
        return replace(job, retry=times) if times else job

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
        return [*self.config.sources, *own, *others]

    @cached_property
    def _eval_prompts(self) -> Prompts:
        given, splits = required(self._evaluation.prompts, "evaluate.prompts"), {"eval": 1.0}
        existing = self.config.existing
        is_published = existing and existing.format == "preferences"
        has_prompts = (self.config.prompts or existing) and not is_published
        trained_on = self._prompts if has_prompts else None
        inputs = (trained_on.step,) if trained_on else ()
        step = self._input_step("eval-prompts", given, inputs, seed=self.config.seed)
        job = IngestPrompts(step, given, splits, self.config.seed, without=trained_on)
        self._add("prompts", (job,))
        return Prompts(step, tuple(splits))

    def _held_out(self, model: ModelConfig) -> list[Generate]:
        """What a model answers for the evaluation that needs no other answer."""
        if not self._evaluating:
            return []
        asked = self._evaluation
        own = [self._generate(model, self._eval_prompts, asked.sampling)] if asked.prompts else []
        return own + self._judged([model]).first_answers(model)

    def _judged(self, models: Sequence[ModelConfig]) -> Evaluation:
        """What is judged; its answers to the benchmarks' prompts come from the same jobs."""
        evaluate = self._evaluation
        pairwise = evaluate.pairwise
        if pairwise and not pairwise.pairs:
            pairwise = pairwise.model_copy(update={"pairs": ((FUSED, self._target.name),)})
            evaluate = evaluate.model_copy(update={"pairwise": pairwise})
        sources = tuple(m.name for m in self.config.sources)
        own = self._eval_prompts if evaluate.prompts else None
        found = Evaluation(evaluate, models, sources, own, self._generate, self._score)
        self._add("prompts", tuple(found.benchmarks.values()))
        return found

    def _evaluate(self) -> None:
        trained = [t.model for t in self.trained.values()]
        models = [*self._given_models, *trained]
        if self._evaluation.prompts and (self.config.reward or self._evaluation.verifier):
            self._compare_rewards(models)
        judged = self._judged(models)
        judged.check_names()
        self._add("evaluate", *judged.phases())

    def _compare_rewards(self, models: list[ModelConfig]) -> None:
        found = [self._compared(model) for model in models]
        job = Evaluate(
            self._eval_prompts,
            tuple(f.scored_model for f in found),
            tuple(self._contrasts()),
        )
        self._add("evaluate", *by_phase(found), (job,))

    def _compared(self, model: ModelConfig) -> Compared:
        """What it takes to compare a model on the held-out prompts."""
        evaluate = self._evaluation
        answers = self._generate(model, self._eval_prompts, evaluate.sampling)
        rewards = self._score(answers.samples) if self.config.reward else None
        verify = verifier_reward(evaluate.verifier) if evaluate.verifier else None
        return Compared(
            answers, rewards, self._score(answers.samples, verify) if verify else None, model.name
        )

    def compared(self, name: str) -> tuple[Stage, ScoredModel, Prompts]:
        """What it takes to compare one model of the chain with those of others.

        Raises:
            UserError: the chain has no such model, or nothing to compare by.
        """
        models = [*self._given_models, *(t.model for t in self.trained.values())]
        model = next((m for m in models if m.name == name), None)
        if model is None:
            there = ", ".join(m.name for m in models)
            raise UserError(f"model: there is no {name!r}; there are {there}")
        if not (self._evaluation.verifier or self.config.reward):
            raise UserError("evaluate: a study compares by `reward` or `evaluate.verifier`")
        prompts, found = self._eval_prompts, self._compared(model)
        return Stage("evaluate", tuple(by_phase([found]))), found.scored_model, prompts

    def _contrasts(self) -> Iterator[tuple[str, str]]:
        """Paired differences worth knowing: the fused model's first."""
        own = self.trained
        if FUSED not in own:
            return
        target = self._target.name
        yield FUSED, target
        yield from ((FUSED, name) for name in (SFT, DPO) if name in own)
        if SFT in own:
            yield SFT, target


@contextmanager
def _reading(name: str, given: Any) -> Iterator[None]:
    """For what reads input files; a file that cannot be read is told with its section."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{name}: {Folder(given.path)} cannot be read: {error}") from None
