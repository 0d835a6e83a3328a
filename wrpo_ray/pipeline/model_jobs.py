"""Jobs that call or train models, and the fingerprints of the models' weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from wrpo_ray.config import (
    Config,
    ModelConfig,
    RewardConfig,
    SamplingConfig,
    ScoreConfig,
    TrainConfig,
)
from wrpo_ray.config.base import required
from wrpo_ray.config.models import STREAMER
from wrpo_ray.data.samples import Groups, Prompts, Samples
from wrpo_ray.llm.architecture import telling_of
from wrpo_ray.llm.model_folder import small_files
from wrpo_ray.llm.rendering import OWN, Template
from wrpo_ray.pipeline.identities import (
    scorer_fingerprint,
    template_fingerprint,
    verifier_reward,
    with_absolute_paths,
)
from wrpo_ray.stages.generate.stage import Generate
from wrpo_ray.stages.ingest.stage import OPTIONAL, REFERENCES
from wrpo_ray.stages.score.reward_models import can_end_with_padding
from wrpo_ray.stages.score.stage import Outcome, Score
from wrpo_ray.stages.train.prepare import Prepare
from wrpo_ray.stages.train.stage import Train
from wrpo_ray.storage.fingerprints import digest, model_fingerprint
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

Retryable = TypeVar("Retryable", Generate, Score)


class Trained(NamedTuple):
    """A model that the chain trains."""

    model: ModelConfig
    """The target's settings, with the name and folder of this model."""
    folder: Folder
    step: Step
    """The step that trains it."""

    @staticmethod
    def of(name: str, job: Train, target: ModelConfig, root: Folder) -> Trained:
        """The result of a training job in the output `root`."""
        folder = root / job.step.folder / "model"
        settings = target.model_copy(update={"name": name, "model": folder.uri})
        if job.config.lora and settings.dtype == "auto":  # bf16 would round the training away
            settings = settings.model_copy(update={"dtype": "float32"})
        return Trained(settings, folder, job.step)


@dataclass
class ModelJobs:
    """Makes the jobs of a chain that generate or score answers, or train."""

    config: Config
    retries: dict[str, int]
    """{key of a step without retries: how often its failed rows were given new attempts}"""
    trained: dict[str, Trained]
    """The models that the chain trains, by name."""
    fingerprints: dict[str, str]
    """Fingerprints of given models' weights, by folder; each is computed once."""
    for_plan: bool
    """Whether models may be missing; a hash of the address then stands for their weights."""
    shares_engines: bool
    """Whether the target and the models trained from it take turns in the same engines."""

    def generate(
        self, model: ModelConfig, prompts: Prompts, sampling: SamplingConfig | None = None
    ) -> Generate:
        """The job in which a model answers prompts."""
        trained = self.trained.get(model.name)
        folder = trained.folder if trained else Folder(model.model).absolute()
        if model.endpoint:
            identity = digest([model.endpoint.url, model.model], 16)  # its weights are not seen
        else:
            identity = trained.step.key if trained else self.fingerprint(folder, model)
        model = model.model_copy(update={"chat_template": Template.of(model).file})
        if model.dtype == "auto" and not model.actors.num_gpus and not model.endpoint:
            model = model.model_copy(update={"dtype": "float32"})  # it decides the answers
        sampling = sampling or self.config.sampling.updated(model.sampling)
        family = self._family(model) if self.shares_engines else ""
        seed = self.config.seed
        return self._retried(Generate(model, folder, identity, prompts, sampling, seed, 0, family))

    def scores(self, answers: Samples, *, of_benchmark: bool = False) -> tuple[Score, ...]:
        """The jobs that score answers: one for each reward of the groups that their prompts are of.

        Questions of a benchmark are of no group of the config.
        """
        given = required(self.config.reward, "reward")
        if of_benchmark or not given.by_group:
            return (self.score(answers, required(given.default, "reward")),)
        mine = answers.prompts.groups
        jobs = []
        for reward in given.each:
            groups = Groups(*given.covered_by(reward)).only(mine.names if mine else None)
            if groups.names or groups.others:
                own = replace(answers, prompts=replace(answers.prompts, groups=groups))
                jobs.append(self.score(own, reward))
        return tuple(jobs)

    def verify(self, answers: Samples, name: str) -> Score:
        """The job that checks answers with a verifier.

        If prompts may lack a reference, it is only of those that have one.
        """
        read = answers.prompts.step.config
        if read.get(REFERENCES) == OPTIONAL and _have_references(read):
            answers = replace(answers, prompts=replace(answers.prompts, referenced=True))
        return self.score(answers, verifier_reward(name), "verdict")

    def score(self, answers: Samples, reward: RewardConfig, outcome: Outcome = "reward") -> Score:
        """The job that scores answers with one reward or verifier."""
        folders = [Folder(p.model).absolute() if p.model else None for p in reward.parts]
        identities = [
            self._classifier_fingerprint(part, folder) if folder else scorer_fingerprint(part)
            for part, folder in zip(reward.parts, folders, strict=True)
        ]
        known = tuple(folders), tuple(identities)
        return self._retried(Score(answers, with_absolute_paths(reward), *known, outcome=outcome))

    def prepare(
        self,
        name: str,
        rows: Step,
        base: Folder,
        fingerprint: str,
        config: TrainConfig,
        sampled_by: str | None = None,
    ) -> Prepare:
        """The job that prepares rows to train the target, or a model trained from it, on."""
        template = Template.of(required(self.config.target, "target"))
        return Prepare(name, rows, base, fingerprint, config, template, sampled_by)

    def train(self, name: str, rows: Prepare, config: TrainConfig) -> Train:
        """The job that trains on prepared rows."""
        identity = {"train": config.identity(), "base": rows.fingerprint, "seed": self.config.seed}
        step = Step(name, identity, (rows.step,))
        return Train(
            step, rows.step, rows.base, rows.fingerprint, config, self.config.seed,
            rows.template, self.shares_engines,
        )  # fmt: skip

    def fingerprint(self, folder: Folder, model: ModelConfig | None = None) -> str:
        """A hash of the given weights, and of the chat template where the config sets one."""
        if self._is_unknown(folder):
            return digest(folder.uri, 16)
        if folder.uri not in self.fingerprints:
            self.fingerprints[folder.uri] = model_fingerprint(folder)
        weights = self.fingerprints[folder.uri]
        template = Template.of(model) if model else OWN
        if not template.file and not template.values:
            return weights
        file = template_fingerprint(template.file) if template.file else None
        return digest([weights, file, template.values, *template.revision], 16)

    def _is_unknown(self, folder: Folder) -> bool:
        return self.for_plan and not folder.exists("config.json")

    def _family(self, model: ModelConfig) -> str:
        """A name for the target and the models trained from it, which differ in weights only."""
        target = self.config.target
        if not target or model.name not in (target.name, *self.trained):
            return ""
        if model.load_format == STREAMER:  # vLLM's gives a running engine no other weights
            return ""
        key = self.fingerprint(Folder(target.model).absolute(), target)
        return f"{target.name} {key[:6]} and its kin"

    def _classifier_fingerprint(self, part: ScoreConfig, folder: Folder) -> str:
        """The fingerprint of a reward model, and where the score is read if that has changed.

        Earlier versions let transformers look for the last token that is not the padding.
        """
        weights = self.fingerprint(folder)
        if part.engine == "vllm" or self._is_unknown(folder):
            return weights
        with telling_of(f"reward: {part.model}"):
            is_read_elsewhere = can_end_with_padding(small_files(folder))
        return digest([weights, "last token"], 16) if is_read_elsewhere else weights

    def _retried(self, job: Retryable) -> Retryable:
        """The job as a new request to its store, if its failed rows were given new attempts."""
        times = self.retries.get(job.step.key, 0)
        return replace(job, retry=times) if times else job


def _have_references(read: dict[str, Any]) -> bool:
    """Whether a file of prompts has a column with references, by the config of their step."""
    if "columns" in read:
        return read["columns"]["reference"] is not None
    return any(json.loads(of_file)[2] for of_file in read["files"])  # `Inputs.prompts`


def by_reward(jobs: Iterable[Score]) -> list[tuple[Score, ...]]:
    """The jobs of each reward; those with models come first, to score while others generate."""
    found: list[list[Score]] = []
    for job in jobs:
        alike = next((own for own in found if own[0].reward == job.reward), None)
        if alike is None:
            found.append([job])
        else:
            alike.append(job)
    return [tuple(own) for own in sorted(found, key=lambda own: not any(own[0].folders))]
