"""The chain, readable from top to bottom: which steps a config asks for, and running them.

prompts -> generate (sources) -> score -> select -> sft -> sample (target-SFT) -> pair -> train
-> evaluate. Every stage is a list of phases, every phase some jobs of one kind, every job a
frozen spec with a `step`; jobs whose step is done are not run again.
"""

from __future__ import annotations

import importlib
import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import pyarrow as pa

from wrpo_ray.addresses import shown
from wrpo_ray.config import (
    AlphaConfig,
    Config,
    EndpointConfig,
    EvaluateConfig,
    ImportConfig,
    ModelConfig,
    PromptsConfig,
    RewardConfig,
    ScoreConfig,
    SftConfig,
)
from wrpo_ray.core.architecture import Use
from wrpo_ray.core.chat import OWN, Template
from wrpo_ray.core.cluster import fit_together, side_by_side
from wrpo_ray.core.fingerprint import data_fingerprint, model_fingerprint, unmarked
from wrpo_ray.core.hub import address
from wrpo_ray.core.model_folder import check_model_folder, small_files
from wrpo_ray.core.pools import Feed
from wrpo_ray.core.progress import log
from wrpo_ray.core.records import digest
from wrpo_ray.core.run import Run
from wrpo_ray.core.shards import Prompts, Samples, buckets
from wrpo_ray.core.spending import Ledger
from wrpo_ray.core.steps import Step, versions
from wrpo_ray.core.storage import HUB, Folder, check_writable
from wrpo_ray.errors import RegressionError, UserError
from wrpo_ray.evaluate.comparison import FILE as COMPARISON
from wrpo_ray.evaluate.pairwise import shortfall
from wrpo_ray.evaluate.stage import EXAMPLE, TABLE, Entrant, Evaluate
from wrpo_ray.evaluate.statistics import Estimate
from wrpo_ray.evaluation import Evaluation
from wrpo_ray.generate import stage as generate
from wrpo_ray.generate.stage import Generate
from wrpo_ray.ingest.cells import READING, beginnings_are, hold_more_than_text
from wrpo_ray.ingest.readers import check_columns, check_some_rows, input_files
from wrpo_ray.ingest.stage import (
    SOURCES,
    TARGET,
    IngestPreferences,
    IngestPrompts,
    IngestResponses,
)
from wrpo_ray.pair.answers import check_patterns
from wrpo_ray.pair.overlap import are_unspaced
from wrpo_ray.pair.stage import Answers, Contamination, EvalNgrams, Pair, Select
from wrpo_ray.report import comparison
from wrpo_ray.report.outline import FILE as OUTLINE
from wrpo_ray.report.outline import Outline
from wrpo_ray.reporting import Reporter, best_effort, keep_plan, outline
from wrpo_ray.score import stage as score
from wrpo_ray.score.check import check_reward_folder
from wrpo_ray.score.classifiers import can_end_with_padding
from wrpo_ray.score.rewards import load_function
from wrpo_ray.score.stage import Score
from wrpo_ray.score.verifiers import VERSIONS
from wrpo_ray.text_files import read_text
from wrpo_ray.train.prepare import Prepare
from wrpo_ray.train.stage import Train

STAGES = ("prompts", "generate", "score", "select", "sft", "sample", "pair", "train", "evaluate")
T = TypeVar("T")
Planner = Callable[[Config, Folder, list["Stage"]], dict[str, dict[str, Any]]]
"""Gives what each step is expected to take, by its key."""
SUMMARY = "summary.json"
RETRIES = "retries.json"
"""{key of a step: how often its failed rows were given new attempts}"""
SFT, DPO, FUSED = "target-sft", "target-dpo", "fused"


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
    def entrant(self) -> Entrant:
        """As `Evaluate` reads it."""
        found = (job.samples if job else None for job in (self.rewards, self.checks))
        return Entrant(self.name, *found)


def _by_phase(models: list[Compared]) -> Iterator[tuple[Any, ...]]:
    """Jobs that can run together: answers, rewards, checks."""
    for part in ("answers", "rewards", "checks"):
        yield tuple(job for model in models if (job := getattr(model, part)))


# --- the chain -----------------------------------------------------------------------------


@dataclass
class Chain:
    """Builds the stages of a config, up to and with `until`."""

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
    _trained_models: dict[str, tuple[ModelConfig, Folder, str]] = field(default_factory=dict)

    @cached_property
    def root(self) -> Folder:
        """The output folder."""
        return Folder(self.config.output).absolute()

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

    def _add(self, name: str, *phases: tuple[Any, ...]) -> None:
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
        given = self.config.prompts or _required(self.config.existing, "import")
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
        given = self.config.prompts or _required(self.config.existing, "import")
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
        prompts, given = self._prompts, _required(self.config.existing, "import")
        step = self._input_step("import", given, (prompts.step,))
        self._add("score", (IngestResponses(step, given),))
        left_out = self._contamination()
        selection = self._select(self._answers(Samples(step, prompts, None, SOURCES)), left_out)
        return selection, self._answers(Samples(step, self._preference_prompts, None, TARGET))

    def _published_preferences(self) -> Step:
        given = _required(self.config.existing, "import")
        step = self._input_step("import", given)
        self._add("pair", (IngestPreferences(step, given),))
        return step

    # --- models

    @property
    def _start_of_preferences(self) -> Folder:
        """target-SFT, or the target itself where there is no SFT."""
        if SFT in self._trained_models:
            return self._trained_models[SFT][1]
        return Folder(self._target.model).absolute()

    @property
    def _target(self) -> ModelConfig:
        return _required(self.config.target, "target")

    def _add_trained(self, name: str, job: Train) -> None:
        """A model of the run, served by vLLM with the target's own settings."""
        folder = self.root / job.step.folder / "model"
        settings = self._target.model_copy(update={"name": name, "model": folder.uri})
        if job.config.lora and settings.dtype == "auto":  # bf16 would round what was learnt away
            settings = settings.model_copy(update={"dtype": "float32"})
        self._trained_models[name] = settings, folder, job.step.key

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
        model = self._trained_models[SFT][0] if SFT in self._trained_models else self._target
        own = self._generate(model, self._preference_prompts)
        held_out = self._held_out(model) if model is not self._target else []
        return self._scored("sample", own, before=((own, *held_out),))

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
        if self._trained_models:
            key = self._trained_models[SFT][2]
        else:
            key = self._fingerprint(base, self._target)
        plain = self.config.wrpo.model_copy(update={"alpha": AlphaConfig(end=0)})
        configs = {FUSED: self.config.wrpo}
        is_dpo = not self.config.wrpo.alpha.end
        if self.config.evaluate and self.config.evaluate.dpo_baseline and not is_dpo:
            configs = {DPO: plain} | configs
        sampled = SFT if SFT in self._trained_models else self._target.name
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
        file = _template_fingerprint(template.file) if template.file else None
        return digest([weights, file, template.values, *template.revision], 16)

    # --- answers and rewards

    def _generate(self, model: ModelConfig, prompts: Prompts, sampling: Any = None) -> Generate:
        trained = self._trained_models.get(model.name)
        folder = trained[1] if trained else Folder(model.model).absolute()
        if model.endpoint:
            identity = digest([model.endpoint.url, model.model], 16)  # its weights are not seen
        else:
            identity = trained[2] if trained else self._fingerprint(folder, model)
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
        if not target or model.name not in (target.name, *self._trained_models):
            return ""
        key = self._fingerprint(Folder(target.model).absolute(), target)
        return f"{target.name} {key[:6]} and its kin"

    def _scored(self, stage: str, *answers: Generate, before: tuple[Any, ...] = ()) -> Answers:
        """Add the jobs that score the answers, and verify them where `pair.verifier` is given."""
        scores = tuple(self._score(job.samples) for job in answers)
        verify = self.config.pair.verifier
        reward = _verifier(verify) if verify else None
        checks = tuple(self._score(job.samples, reward) for job in answers) if reward else ()
        self._add(stage, *before, scores, checks)
        verdicts = tuple(job.samples for job in checks)
        return self._answers(*(job.samples for job in scores), verdicts=verdicts)

    def _answers(self, *samples: Samples, verdicts: tuple[Samples, ...] = ()) -> Answers:
        return Answers(samples, self.config.answers, verdicts)

    def _score(self, answers: Samples, reward: RewardConfig | None = None) -> Score:
        reward = reward or _required(self.config.reward, "reward")
        folders = [Folder(p.model).absolute() if p.model else None for p in reward.parts]
        identities = [
            self._classifier_fingerprint(part, folder) if folder else _scorer_fingerprint(part)
            for part, folder in zip(reward.parts, folders, strict=True)
        ]
        return self._retried(
            Score(answers, _with_absolute_paths(reward), tuple(folders), tuple(identities))
        )

    def _classifier_fingerprint(self, part: ScoreConfig, folder: Folder) -> str:
        """What identifies a reward model, and where it is read if that has changed.

        At first transformers looked for the last token that is not the padding.
        """
        weights = self._fingerprint(folder)
        if part.engine == "vllm" or (self.for_plan and not folder.exists("config.json")):
            return weights
        with _naming(f"reward: {part.model}"):
            is_read_elsewhere = can_end_with_padding(small_files(folder))
        return digest([weights, "last token"], 16) if is_read_elsewhere else weights

    def _retried(self, job: Any) -> Any:
        """The job as another request to its store, if its failed rows were given new attempts."""
        times = (self.retries or {}).get(job.step.key, 0)
        return replace(job, retry=times) if times else job

    # --- evaluation

    @property
    def _evaluating(self) -> bool:
        return self.config.evaluate is not None and self._wants("evaluate")

    @property
    def _evaluation(self) -> EvaluateConfig:
        return _required(self.config.evaluate, "evaluate")

    @property
    def _given_models(self) -> list[ModelConfig]:
        own = [self.config.target] if self.config.target else []
        others = self.config.evaluate.models if self.config.evaluate else ()
        return [*self.config.sources, *own, *others]

    @cached_property
    def _eval_prompts(self) -> Prompts:
        given, splits = _required(self._evaluation.prompts, "evaluate.prompts"), {"eval": 1.0}
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
        trained = [m for m, _, _ in self._trained_models.values()]
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
            tuple(f.entrant for f in found),
            tuple(self._contrasts()),
        )
        self._add("evaluate", *_by_phase(found), (job,))

    def _compared(self, model: ModelConfig) -> Compared:
        """What it takes to compare a model on the held-out prompts."""
        evaluate = self._evaluation
        answers = self._generate(model, self._eval_prompts, evaluate.sampling)
        rewards = self._score(answers.samples) if self.config.reward else None
        verify = _verifier(evaluate.verifier) if evaluate.verifier else None
        return Compared(
            answers, rewards, self._score(answers.samples, verify) if verify else None, model.name
        )

    def compared(self, name: str) -> tuple[Stage, Entrant, Prompts]:
        """What it takes to compare one model of the chain with those of others.

        Raises:
            UserError: the chain has no such model, or nothing to compare by.
        """
        models = [*self._given_models, *(m for m, _, _ in self._trained_models.values())]
        model = next((m for m in models if m.name == name), None)
        if model is None:
            there = ", ".join(m.name for m in models)
            raise UserError(f"model: there is no {name!r}; there are {there}")
        if not (self._evaluation.verifier or self.config.reward):
            raise UserError("evaluate: a study compares by `reward` or `evaluate.verifier`")
        prompts, found = self._eval_prompts, self._compared(model)
        return Stage("evaluate", tuple(_by_phase([found]))), found.entrant, prompts

    def _contrasts(self) -> Iterator[tuple[str, str]]:
        """Paired differences worth knowing: the fused model's first."""
        own = self._trained_models
        if FUSED not in own:
            return
        target = self._target.name
        yield FUSED, target
        yield from ((FUSED, name) for name in (SFT, DPO) if name in own)
        if SFT in own:
            yield SFT, target


def _absolute(path: str | None) -> str | None:
    return None if path is None else Folder(path).path


def _verifier(name: str) -> RewardConfig:
    """A verifier, built in or a function, as the reward that it is."""
    kind = "function" if ":" in name else "verifier"
    return RewardConfig.model_validate({"name": "verifier", kind: name})


def _with_absolute_paths(reward: RewardConfig) -> RewardConfig:
    """The reward with the files of its judges by paths that any working directory leads to."""

    def moved(part: Any) -> Any:
        if not part.judge:
            return part
        template = _absolute(part.judge.template)
        return part.model_copy(
            update={"judge": part.judge.model_copy(update={"template": template})}
        )

    parts = tuple(moved(part) for part in reward.mixture)
    return moved(reward).model_copy(update={"mixture": parts})


def _template_fingerprint(path: str) -> str:
    """What identifies a chat template.

    Raises:
        UserError: it is not UTF-8.
    """
    content = data_fingerprint([path])
    read_text(path, "chat_template")
    return unmarked(content, Folder(path))


def _scorer_fingerprint(part: ScoreConfig) -> str:
    """Identity of a reward without weights, for step keys: its name and its version.

    The version of a function is its attribute `version`, else its module's source; that of a
    judge is its template.
    """
    if part.verifier:
        return digest([part.verifier, VERSIONS[part.verifier]], 16)
    if part.judge:
        from wrpo_ray.score.judge import READING, template_text  # it imports a client

        return digest([part.judge.model, template_text(part.judge), READING], 16)
    path = _required(part.function, "reward.function")
    module_name, _, name = path.partition(":")
    module = importlib.import_module(module_name)
    if (version := getattr(getattr(module, name, None), "version", None)) is not None:
        return digest([path, str(version)], 16)
    source = getattr(module, "__file__", None)  # a module built into Python has none
    return digest([path, data_fingerprint([source] if source else [])], 16)


@contextmanager
def _reading(name: str, given: Any) -> Iterator[None]:
    """For what reads input files; a file that cannot be read is told with its section."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{name}: {Folder(given.path)} cannot be read: {error}") from None


def _required(value: T | None, key: str) -> T:
    if value is None:
        raise UserError(f"{key}: missing; this step needs it in the config")
    return value


# --- checks before any work ------------------------------------------------------------------


def preflight(config: Config) -> Config:
    """Check whatever can be checked without starting anything.

    Returns the config with every hub id at the commit that it is at now.

    Raises:
        UserError: with one line for each problem.
    """
    problems: list[str] = []

    def told(check: Any, *arguments: Any) -> Any:
        try:
            return check(*arguments)
        except UserError as error:
            problems.append(str(error))
        except (OSError, ValueError) as error:  # a store that does not answer, a broken JSON file
            problems.append(f"cannot be read: {' '.join(shown(str(error)).split())}")
        return None

    config = _with_models(config, lambda what, model: told(_checked, what, model) or model)
    for check in _checks(config):
        told(check)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return config


def pinned(config: Config) -> Config:
    """The config with every hub id at the commit that it is at now.

    Raises:
        UserError: a model cannot be found.
    """
    return _with_models(config, _pinned)


def _with_models(config: Config, change: Callable[[str, Any], Any]) -> Config:
    """The config with each section that names a model changed: `change(what, section)`."""
    models: dict[str, Any] = {
        "sources": tuple(
            model if model.endpoint else change(f"sources.{model.name}", model)
            for model in config.sources
        )
    }
    if config.target:
        models["target"] = change("target", config.target)
    if asked := config.evaluate:
        own: dict[str, Any] = {
            "models": tuple(_changed(change, f"evaluate.models.{m.name}", m) for m in asked.models)
        }
        own |= {"judge": _changed(change, "evaluate.judge", asked.judge)} if asked.judge else {}
        models["evaluate"] = asked.model_copy(update=own)
    if config.reward and config.reward.mixture:
        parts = [
            change(f"reward.mixture.{i}", part) if part.model else part
            for i, part in enumerate(config.reward.mixture)
        ]
        models["reward"] = config.reward.model_copy(update={"mixture": tuple(parts)})
    elif config.reward and config.reward.model:
        models["reward"] = change("reward", config.reward)
    return config.model_copy(update=models)


def _changed(change: Callable[[str, Any], Any], what: str, model: ModelConfig) -> ModelConfig:
    return model if model.endpoint else change(what, model)


def _pinned(what: str, model: Any) -> Any:
    """The section with a hub id at the commit that it is at now."""
    with _naming(what):
        return model.model_copy(
            update={"model": address(model.model, model.revision), "revision": None}
        )


def _checked(what: str, model: Any) -> Any:
    """The pinned section, once it holds a model that can be talked to."""
    found = _pinned(what, model)
    folder = Folder(found.model)
    name = model.model if folder.uri.startswith(HUB) else ""
    if isinstance(model, ScoreConfig):
        check_reward_folder(folder, model, what, name)
    else:
        use = Use.TRAINED if what == "target" else Use.ANSWERS
        check_model_folder(folder, what, use, Template.of(model), name)
    return found


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Puts the config's key in front of a problem."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def _checks(config: Config) -> Iterator[Any]:
    for model in config.sources:
        if model.endpoint:
            yield partial(_check_key, f"sources.{model.name}", model.endpoint)
    asked = config.evaluate
    others = [*asked.models, *([asked.judge] if asked.judge else [])] if asked else []
    for model in others:
        if model.endpoint:
            yield partial(_check_key, f"evaluate.{model.name}", model.endpoint)
    scorers = list(config.reward.parts) if config.reward else []
    verifiers = (config.evaluate.verifier if config.evaluate else None, config.pair.verifier)
    for part in [*scorers, *(_verifier(name) for name in verifiers if name)]:
        yield partial(_check_scorer, part)
    yield partial(check_patterns, config.answers.refusal_patterns)
    for what, given in (("prompts", config.prompts), ("import", config.existing)):
        if given:
            yield lambda what=what, g=given: _check_input(what, g)
    if asked and (held_out := asked.prompts):
        yield lambda: _check_input("evaluate.prompts", held_out)
    yield lambda: check_writable(Folder(config.output))


def _check_scorer(part: ScoreConfig) -> None:
    """Check what a part of the reward needs, as far as this machine shows it."""
    if part.function:
        load_function(part.function)
    if part.judge:
        from wrpo_ray.score.judge import Question  # it imports a client

        _check_key("reward.judge", part.judge.endpoint)
        Question(part.judge)


def _check_key(what: str, endpoint: EndpointConfig) -> None:
    from wrpo_ray.core.endpoint import read_key

    with _naming(f"{what}.endpoint"):
        read_key(endpoint)


def _check_input(what: str, given: PromptsConfig | ImportConfig) -> None:
    files = input_files(given.path, what)
    for uri in files:
        check_columns(uri, given.needed, what)
    check_some_rows(files, what)


# --- running ---------------------------------------------------------------------------------


def fuse(config: Config, until: str = STAGES[-1], planner: Planner | None = None) -> dict[str, Any]:
    """Run the chain up to and with the stage `until`, and return the summary.

    Finished steps are skipped; if all are, not even Ray is started. What `planner` expects of the
    steps is kept for the report.

    Raises:
        WrpoError: see `errors`.
    """
    chain = Chain(preflight(config), until)
    stages, root = chain.build(), chain.root
    told = outline_of(chain)
    reporter = Reporter(partial(_report, root, told) if config.report else _nothing)
    if all(step.is_done(root) for stage in stages for step in stage.steps):
        log(f"all steps are done in {root}")
    else:
        with _reporting(reporter), session(config, root) as run, reporter:
            _begin(chain, told, planner)
            _run_stages(run, stages, reporter.tell)
    summary = summarise(chain, stages)
    _write_comparison(root, summary)
    if not root.says(SUMMARY, summary):
        root.write_json(SUMMARY, summary)
    if not root.exists(OUTLINE):
        _begin(chain, told, None)
    reporter.finish()
    return summary


@contextmanager
def session(config: Config, root: Folder) -> Iterator[Run]:
    """The output is this run's, and Ray is there.

    Raises:
        WrpoError: another run holds the output, its budget is spent, or Ray cannot be had.
    """
    from wrpo_ray.core import cluster
    from wrpo_ray.core.lease import Lease

    run = Run(
        root,
        config.storage.buckets,
        config.storage.chunk,
        config.failure_limit,
        uuid.uuid4().hex,
        config.max_attempts,
    )
    with (
        Lease(root, run.session),
        Ledger(root, config.prices, config.budget) as ledger,
    ):
        ledger.check()
        cluster.connect(config.cluster, root, run.session)
        try:
            cluster.check_reachable(Folder(config.output))
            cluster.end_orphans(root, run.session)
            yield replace(run, ledger=ledger)
        finally:
            cluster.disconnect()


def outline_of(chain: Chain) -> Outline:
    """What a built chain is to do, for those who have only its output."""
    jobs = [(s.name, job) for s in chain.stages for phase in s.phases for job in phase]
    return outline(chain.config, chain.until, jobs, _models(chain.config))


def _begin(chain: Chain, told: Outline, planner: Planner | None) -> None:
    """Leave the outline and the plan in the output."""
    with best_effort("outline"):
        told.write(chain.root)
    if planner:
        with best_effort("plan"):
            keep_plan(chain.root, planner(chain.config, chain.root, chain.stages))


@contextmanager
def _reporting(reporter: Reporter) -> Iterator[None]:
    """A report once more where the block fails: it tells of failures."""
    try:
        yield
    except Exception:
        if reporter.has_begun:
            reporter.finish()
        raise


def _report(root: Folder, told: Outline, is_running: bool) -> None:
    from wrpo_ray.report.page import write  # it imports a library of plots

    write(root, told, is_running=is_running)


def _nothing(is_running: bool) -> None:
    """No report is wanted."""


def _run_stages(run: Run, stages: list[Stage], tell: Callable[[], None]) -> None:
    phases = [(number, phase) for number, s in enumerate(stages) for phase in s.phases]
    while phases:
        number, phase = phases.pop(0)
        jobs = missing(run, phase)
        following = missing(run, phases[0][1]) if jobs and phases else []
        if following and _can_follow(jobs, following):
            number, _ = phases.pop(0)
        else:
            following = []
        label = f"[{number + 1}/{len(stages)}] {stages[number].name}"
        started, names = time.time(), dict.fromkeys(job.step.name for job in jobs + following)
        if not names:
            log(f"{label}: done before")
            continue
        log(f"{label}: {', '.join(names)}")
        tell_resumed(run, jobs + following)
        if following:
            _run_together(run, jobs, following)
        else:
            runner(jobs[0])(run, jobs)
        log(f"{label}: finished in {time.time() - started:.0f} s")
        tell()


def missing(run: Run, jobs: Sequence[Any]) -> list[Any]:
    """The jobs whose steps are not done."""
    return [job for job in jobs if not job.step.is_done(run.root)]


def tell_resumed(run: Run, jobs: list[Any]) -> None:
    """Log what is there already of stores that the jobs fill."""
    for step in {job.step.folder: job.step for job in jobs if job.step.store}.values():
        if found := len((run.root / step.folder).files(suffix=".parquet")):
            log(f"{step.name}: {found:,} shards are there; what they hold is passed over")


def _can_follow(jobs: list[Any], following: list[Any]) -> bool:
    """Whether answers can be scored while others are generated: there has to be room for both."""
    if not isinstance(jobs[0], Generate) or not isinstance(following[0], Score):
        return False
    pools = [generate.pool_of(job.model) for job in jobs]
    return all(fit_together([pool, score.pool_of(following[0].reward)]) for pool in pools)


def _run_together(run: Run, jobs: list[Generate], scores: list[Score]) -> None:
    """Generate, and score each bucket as soon as it is filled."""
    feed = Feed([job.answers.step for job in scores])
    made = {job.step.key for job in jobs}
    for job in scores:
        if job.answers.step.key not in made:  # made before
            for bucket in buckets(run.buckets):
                feed.add(job.answers.step, bucket.index)
    side_by_side([lambda: generate.run(run, jobs, feed), lambda: score.run(run, scores, feed)])


def runner(job: Any) -> Any:
    """The `run` function of the stage module that defines the job."""
    return importlib.import_module(type(job).__module__).run


def plan(config: Config, until: str = STAGES[-1]) -> list[tuple[str, Step, bool]]:
    """(stage, step, whether it is done) for each step, without running anything."""
    chain = Chain(preflight(config), until)
    return [(s.name, step, step.is_done(chain.root)) for s in chain.build() for step in s.steps]


def summarise(chain: Chain, stages: list[Stage]) -> dict[str, Any]:
    """What a run did: its steps, the evaluation's table, and where the fused model lies."""
    root = chain.root
    summary: dict[str, Any] = {
        "output": str(root),
        "versions": versions(),
        "models": _models(chain.config),
        "steps": [_step_summary(root, s.name, step) for s in stages for step in s.steps],
    }
    for stage in stages:
        for step in stage.steps:
            if step.name == "evaluate" and step.is_done(root):
                summary["evaluation"] = (root / step.folder).read_json(TABLE)
                summary["example"] = (root / step.folder).read_json(EXAMPLE)
            if step.name == "comparison" and step.is_done(root):
                summary["comparison"] = (root / step.folder).read_json(COMPARISON)
                summary["comparison_folder"] = str(root / step.folder)
            if step.name == "wrpo" and step.is_done(root):
                summary["fused_model"] = str(root / step.folder / "model")
    return summary


def _write_comparison(root: Folder, summary: dict[str, Any]) -> None:
    """The table of the judged models for those who read, beside the step's own."""
    if "comparison" not in summary:
        return
    name, table = summary["comparison_folder"].rpartition("/")[2], summary["comparison"]
    folder = root / name  # what the summary shows has no options of the store
    for name, text in (
        ("comparison.md", comparison.markdown(table)),
        ("comparison.html", comparison.html(table)),
    ):
        if not folder.exists(name) or folder.read(name) != text.encode():
            folder.write(name, text.encode())


def check_pairs(summary: dict[str, Any], floor: float) -> None:
    """Check that no pair of a run's comparison has a win rate below `floor`.

    Raises:
        UserError: there is no pair.
        RegressionError: one has, or its rate is not known.
    """
    pairs = summary.get("comparison", {}).get("pairs", [])
    if not pairs:
        raise UserError("--fail-below: the config compares no pairs; set evaluate.pairwise")
    below = []
    for pair in pairs:
        rate: dict[str, Any] = {
            name: math.nan if value is None else value for name, value in pair["win_rate"].items()
        }
        name = f"win rate of {pair['a']} against {pair['b']}"
        below += [told] if (told := shortfall(name, Estimate(**rate), floor)) else []
    if below:
        raise RegressionError("\n".join(below))


def _models(config: Config) -> dict[str, str]:
    """{name: where it lies} of the given models; a hub id with its commit."""
    found: dict[str, str] = {}
    _with_models(
        config, lambda what, m: found.update({getattr(m, "name", what): str(Folder(m.model))}) or m
    )
    return found


def _step_summary(root: Folder, stage: str, step: Step) -> dict[str, Any]:
    summary = {"stage": stage, "step": step.name, "folder": step.folder, "state": "to do"}
    if not step.is_done(root):
        return summary
    record = step.read_manifest(root)
    rows_in = sum(_rows(i.read_manifest(root)) for i in step.inputs if i.is_done(root))
    return summary | {
        "state": "done",
        "rows_in": rows_in,
        "rows_out": _rows(record),
        "seconds": record["seconds"],
        "counts": record["counts"],
    }


def _rows(record: dict[str, Any]) -> int:
    return record["counts"].get("rows", 0)
