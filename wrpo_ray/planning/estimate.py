"""The works of a config: the chain's jobs with counts, lengths and rates.

Sources of the numbers: footers of Parquet files, newlines of JSONL files, manifests, the ledger,
and token counts of some shards of each store. The rows of a store are an upper bound of what is
skipped: they can hold answers to prompts that are not part of this config.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import mean, median
from typing import Any, TypeVar

from wrpo_ray.config import (
    Actors,
    Config,
    ImportConfig,
    ModelConfig,
    PromptsConfig,
    RecordedAnswers,
)
from wrpo_ray.data.finished import stored, stored_rows
from wrpo_ray.data.samples import Prompts
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.held_out import DPO, FUSED, SFT
from wrpo_ray.pipeline.model_sections import pinned
from wrpo_ray.pipeline.stage_table import STAGES, Stage
from wrpo_ray.planning import rates
from wrpo_ray.planning.input_rows import InputRows
from wrpo_ray.planning.memory import training_memory
from wrpo_ray.planning.work import Plan, Work, share
from wrpo_ray.runtime.job import Job, JobKind
from wrpo_ray.runtime.ledger import Entry, read_ledger
from wrpo_ray.stages.generate.stage import Generate
from wrpo_ray.stages.ingest.groups import CheckGroups
from wrpo_ray.stages.score.stage import Score
from wrpo_ray.stages.train.prepare import Prepare
from wrpo_ray.stages.train.stage import Train
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

GIVEN, MEASURED, GUESS = "given", "measured", "guess"
SHARDS = 32
"""Number of shards of a store whose token counts are read."""
METRICS = "metrics.jsonl"
KEPT = ("rows", "prompt_tokens", "output_tokens", "gpu_hours", "money", "seconds")
"""Fields of a work that the report shows."""
FUNCTION_RATE = 1000.0
"""Answers/s of a reward function, a guess."""
J = TypeVar("J")
Origin = tuple[float, str]
"""A number, and where it comes from."""


def plan(config: Config, until: str = STAGES[-1], gpus: int | None = None) -> Plan:
    """Estimate rows, tokens, GPU-hours, money and time of a config on `gpus` GPUs.

    Nothing is started and nothing written. `gpus=None` takes all actors that the config allows.

    Raises:
        UserError: the prompts cannot be counted and `plan.prompts` does not give their number.

    Example:
        >>> plan(load("fusion.yaml"), gpus=64).seconds()  # doctest: +SKIP
        16980.0
    """
    with suppress(UserError):  # a plan can be made where the hub is not reached
        config = pinned(config)
    chain = Chain(config, until, for_plan=True)
    estimator = _Estimator(config, chain.root, chain.build())
    works = list(estimator.works())
    memory = list(filter(None, estimator.memory()))
    return Plan(share(works, gpus) if gpus else works, config.prices, gpus, memory)


def expected(config: Config, root: Folder, stages: list[Stage]) -> dict[str, dict[str, Any]]:
    """The expected work of each unfinished step of a built chain, by its key."""
    works = list(_Estimator(config, root, stages).works())
    record = Plan(works, config.prices).record()
    steps = [step for stage in stages for step in stage.steps]
    return {
        step.key: {name: work[name] for name in KEPT}
        for step, work in zip(steps, record["works"], strict=True)
        if not step.is_done(root)
    }


@dataclass(frozen=True)
class _Lengths:
    """Mean tokens of a prompt and of an answer."""

    prompt: float
    output: float
    origin: str


@dataclass
class _Estimator:
    config: Config
    root: Folder
    stages: list[Stage]

    def works(self) -> Iterator[Work]:
        """One for each step."""
        for stage in self.stages:
            for number, phase in enumerate(stage.phases):
                started: set[str] = set()
                for job in phase:
                    work = self._work(job)
                    # only models answer side by side; all requests to one share its engines
                    name = f"{number}" if job.kind is JobKind.GENERATE else f"{number} {work.pool}"
                    startup = 0.0 if work.pool in started else work.startup
                    started.add(work.pool)
                    yield replace(work, stage=stage.name, phase=name, startup=startup)

    def memory(self) -> Iterator[str | None]:
        """A line for each training that is not finished."""
        lengths = self._lengths()
        for job in self._of(Train).values():
            if not job.step.is_done(self.root):
                _, base = self._model(job.step.name, job.base)
                yield training_memory(self.config, job, base, lengths.prompt, lengths.output)

    def _work(self, job: Job) -> Work:
        match job:
            case Generate():
                return self._generate(job)
            case Score():
                return self._score(job)
            case Prepare():
                return self._prepare(job)
            case Train():
                return self._train(job)
        return self._plain(job)

    # --- kinds of jobs

    def _generate(self, job: Generate) -> Work:
        name, samples, actors = job.model.name, job.sampling.samples, _of_engine(job.model)
        prompts, lengths = self._count(job.prompts), self._lengths(job)
        done = self._stored(job.step, prompts * samples)
        left = prompts * samples - done
        size = self._size(name, job.folder)
        guess = self._power(actors).decode_rate(size)
        if job.model.endpoint:
            guess = job.model.endpoint.concurrency * rates.STREAM
        rate = self._rate(name, self._measured_rate(name, "output_tokens", JobKind.GENERATE), guess)
        tokens = round(left * lengths.output)
        startup = self.config.plan.startup.get(name, rates.startup(size, actors.num_gpus))
        return self._pool(
            Work(
                step=job.step.name,
                pool=name,
                prompts=prompts,
                rows=prompts * samples,
                done=done,
                prompt_tokens=round(math.ceil(left / samples) * lengths.prompt),
                output_tokens=tokens,
                actor_seconds=tokens / rate[0],
                startup=startup if left else 0.0,
                lengths=lengths.origin,
                rate=rate[1],
            ),
            actors,
        )

    def _score(self, job: Score) -> Work:
        reward, made = job.reward, self._of(Generate).get(job.answers.step.key)
        lengths = self._lengths(made)
        prompts, count = self._count(job.answers.prompts), job.answers.count
        rows = prompts * count if count else self._rows(job.answers.step)
        done = self._stored(job.step, rows)
        guess, tokens = FUNCTION_RATE, lengths.prompt + lengths.output
        folders = [folder for folder in job.folders if folder]
        if folders:
            size = sum(self._size(reward.name, folder) for folder in folders)
            guess = self._power(reward.actors).forward_rate(size) / tokens
        rate = self._rate(
            reward.name, self._measured_rate(reward.name, "rows", JobKind.SCORE), guess
        )
        return self._pool(
            Work(
                step=job.step.name,
                pool=reward.name,
                prompts=prompts,
                rows=rows,
                done=done,
                prompt_tokens=round((rows - done) * tokens) if folders else 0,
                actor_seconds=(rows - done) / rate[0],
                lengths=lengths.origin,
                rate=rate[1],
            ),
            reward.actors,
        )

    def _prepare(self, job: Prepare) -> Work:
        guess = rates.MOST
        if job.config.stores_reference:
            guess = self._power(job.actors).forward_rate(self._size(job.name, job.base))
        rate = self._rate(job.step.name, None, guess)
        work = self._tokens(job.step, self._rows(job.step), len(job.answers), rate)
        return self._pool(work, job.actors)

    def _train(self, job: Train) -> Work:
        config = job.config
        actors = Actors(max=config.workers, num_cpus=config.num_cpus, num_gpus=config.num_gpus)
        guess = self._power(actors).training_rate(
            self._size(job.step.name, job.base), checkpointing=config.gradient_checkpointing
        )
        rate = self._rate(job.step.name, self._trained_rate, guess)
        answers = len(self._of(Prepare)[job.rows.key].answers)
        work = self._tokens(job.step, self._rows(job.rows), answers, rate, config.epochs)
        return replace(self._pool(work, actors), units=config.workers)

    def _tokens(self, step: Step, rows: int, answers: int, rate: Origin, epochs: int = 1) -> Work:
        """Passes over rows of one prompt and some answers."""
        done, lengths = rows if step.is_done(self.root) else 0, self._lengths()
        tokens = round((rows - done) * epochs * (lengths.prompt + answers * lengths.output))
        return Work(
            step=step.name,
            pool=step.name,
            rows=rows,
            done=done,
            prompt_tokens=tokens,
            actor_seconds=tokens / rate[0],
            lengths=lengths.origin,
            rate=rate[1],
        )

    def _plain(self, job: Job) -> Work:
        """Ingesting, selecting, pairing, tables: short CPU work, which is not estimated."""
        rows = self._rows(job.step)
        done = rows if job.step.is_done(self.root) else 0
        return Work(step=job.step.name, pool="", rows=rows, done=done, note=job.note)

    def _pool(self, work: Work, actors: Actors) -> Work:
        units = self.config.storage.buckets
        return replace(work, gpus=actors.num_gpus, engines=min(actors.max, units), units=units)

    # --- counts

    @cached_property
    def jobs(self) -> dict[str, Job]:
        """All jobs, by their step's key."""
        return {job.step.key: job for stage in self.stages for job in stage.jobs}

    def _of(self, kind: type[J]) -> dict[str, J]:
        """The jobs of one class, by their step's key."""
        return {key: job for key, job in self.jobs.items() if isinstance(job, kind)}

    def _count(self, prompts: Prompts) -> int:
        shares = {"sft": self.config.split.sft, "preference": 1 - self.config.split.sft}
        share = sum(shares.get(split, 1.0) for split in prompts.splits)
        if prompts.groups:
            checks = self._of(CheckGroups).values()
            check = next(job for job in checks if job.prompts.step == prompts.step)
            share *= check.known(self.root).share(prompts.groups)
        return round(self._rows(prompts.step) * share)

    @cached_property
    def _inputs(self) -> InputRows:
        return InputRows(self.config)

    def _rows(self, step: Step) -> int:
        """Rows of a step's result: of its manifest, or at most so many."""
        job = self.jobs[step.key]
        if isinstance(job, Prepare) and job.name == "sft" and not job.config.takes_all_prompts:
            return round(self._rows(job.rows) * self.config.split.sft)
        if step.is_done(self.root):
            return int(step.read_manifest(self.root)["counts"]["rows"])
        match job.row_source:
            case int(rows):
                return rows
            case Prompts() as prompts:
                return self._count(prompts)
            case Step() as other:
                return self._rows(other)
            case PromptsConfig() | ImportConfig() | RecordedAnswers() as given:
                return self._inputs.of(given, step.name)
            case tuple(inputs):
                return sum(self._inputs.of(given, step.name) for given in inputs)
        raise ValueError(f"{step.name}: nothing tells how many rows it has")

    def _stored(self, step: Step, wanted: int) -> int:
        """Rows that the store has, capped at those wanted."""
        if step.is_done(self.root):
            return wanted
        return min(wanted, stored_rows(self.root / step.folder))

    # --- lengths and rates

    def _lengths(self, job: Generate | None = None) -> _Lengths:
        """Mean lengths of the job's own answers so far; else of all answers; else as given."""
        own = self._measured.get(job.step.folder) if job else None
        found = [own] if own else list(self._measured.values())
        given, sampling = self.config.plan, job.sampling if job else self.config.sampling
        if found:
            prompt, output = (mean(getattr(m, n) for m in found) for n in ("prompt", "output"))
            origin = MEASURED
        else:
            prompt, output = given.prompt_tokens, given.output_tokens
            origin = GIVEN if "output_tokens" in given.model_fields_set else GUESS
        return _Lengths(prompt, min(output, sampling.max_tokens), origin)

    @cached_property
    def _measured(self) -> dict[str, _Lengths]:
        """By store, of some of its shards."""
        found = {}
        for job in self._of(Generate).values():
            sums = stored(self.root / job.step.folder, most=SHARDS)
            if sums.rows:
                prompts = sums.rows / job.sampling.samples
                found[job.step.folder] = _Lengths(
                    sums.prompt_tokens / prompts, sums.output_tokens / sums.rows, MEASURED
                )
        return found

    def _rate(self, pool: str, measured: float | None, guess: float) -> Origin:
        """Tokens or rows that an actor makes in a second: given, measured or guessed."""
        given = [self.config.plan.rates.get(name) for name in self._names(pool)]
        choices = [(n, GIVEN) for n in given if n] + ([(measured, MEASURED)] if measured else [])
        return (*choices, (guess, GUESS))[0]

    def _measured_rate(self, pool: str, unit: str, kind: JobKind) -> float | None:
        """`unit` per actor-second by the ledger, whose folders are named by kind."""
        for name in self._names(pool):
            spent = [
                e.usage
                for f, e in self._ledger.items()
                if e.pool == name and f.startswith(f"{kind}-")
            ]
            held = sum(s.actor_seconds for s in spent)
            if held and (made := sum(getattr(s, unit) for s in spent)):
                return float(made / held)
        return None

    @cached_property
    def _ledger(self) -> dict[str, Entry]:
        return read_ledger(self.root)

    def _names(self, pool: str) -> tuple[str, ...]:
        """Names under which a rate may be given: a trained model is as fast as the target."""
        target = self.config.target
        return (pool, target.name) if target and pool in (SFT, DPO, FUSED) else (pool,)

    @cached_property
    def _trained_rate(self) -> float | None:
        """Tokens/s a worker, by the metrics of an earlier training in the output."""
        for job in self._of(Train).values():
            folder = self.root / job.step.folder
            if folder.exists(METRICS):
                records = folder.read_records(METRICS)
                if speeds := [r["tokens_per_s"] for r in records if r.get("tokens_per_s")]:
                    return float(median(speeds) / job.config.workers)
        return None

    def _size(self, name: str, folder: Folder) -> float:
        """Parameters that each token uses."""
        name, folder = self._model(name, folder)
        return self.config.plan.parameters.get(name) or rates.parameters(folder, name)

    def _model(self, name: str, folder: Folder) -> tuple[str, Folder]:
        """Name and folder of a model of the same sizes: for a trained one the target."""
        target = self.config.target
        if target and folder.is_within(self.root):
            return target.name, Folder(target.model).absolute()
        return name, folder

    def _power(self, actors: Actors) -> rates.Power:
        return rates.Power(actors.num_gpus, actors.num_cpus, self.config.plan.gpu_tflops)


def _of_engine(model: ModelConfig) -> Actors:
    """The pool with the GPUs of all parts of an engine."""
    gpus = model.actors.num_gpus * model.parts
    return model.actors.model_copy(update={"num_gpus": gpus})
