"""The works of a config: the chain's jobs with counts, lengths and rates.

Sources of the numbers: footers of Parquet files, newlines of JSONL files, manifests, the ledger,
and token counts of some shards of each store. The rows of a store are an upper bound of what is
skipped: they can hold answers to prompts that are not part of this config.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from wrpo_ray.config import Actors, Config, ImportConfig, PromptsConfig
from wrpo_ray.data.finished import stored_rows
from wrpo_ray.data.samples import Prompts
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.model_sections import pinned
from wrpo_ray.pipeline.stage_table import STAGES, Stage
from wrpo_ray.planning import rates
from wrpo_ray.planning.answered import Answered
from wrpo_ray.planning.branching import beside_of
from wrpo_ray.planning.input_rows import InputRows
from wrpo_ray.planning.lengths import AnswerLengths
from wrpo_ray.planning.measured import GUESS, Measured
from wrpo_ray.planning.memory import training_memory
from wrpo_ray.planning.speeds import SPREAD, Origin, Speeds, of_engine, on_gpu
from wrpo_ray.planning.spread import SURE, Spread
from wrpo_ray.planning.work import Plan, Work, share
from wrpo_ray.runtime.job import Job, JobKind
from wrpo_ray.stages.generate.stage import Generate
from wrpo_ray.stages.ingest.groups import CheckGroups
from wrpo_ray.stages.ingest.recorded import IngestRecorded
from wrpo_ray.stages.pair.stage import Pair, Select
from wrpo_ray.stages.score.stage import Score
from wrpo_ray.stages.train.prepare import Prepare
from wrpo_ray.stages.train.stage import Train
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

KEPT = ("rows", "prompt_tokens", "output_tokens", "gpu_hours", "money", "seconds")
"""Fields of a work that the report shows."""
NO_SIZE = (
    f"its model is not there and its name tells no size: {rates.UNKNOWN / 1e9:g}B parameters are "
    f"assumed; give plan.parameters"
)
FUNCTION_RATE = 1000.0
"""Answers/s of a reward function, a guess."""
J = TypeVar("J")


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
    shared = share(works, gpus) if gpus else works
    beside = None if estimator.room else beside_of(chain, shared, gpus)
    return Plan(shared, config.prices, gpus, memory, estimator.room, beside)


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
                    lacking = 0.0 if work.pool in started else self._lacking(phase, work)
                    started |= {work.pool} if work.startup else set()
                    yield replace(
                        work, stage=stage.name, phase=name, startup=lacking * work.startup
                    )

    def _lacking(self, phase: Sequence[Job], work: Work) -> float:
        """Share of a pool's engines that are not up."""
        jobs = (job for job in phase if isinstance(job, Generate) and job.model.name == work.pool)
        up = max((self.measured.told(job.step).under_way.actors for job in jobs), default=0)
        return max(0.0, 1 - up / work.engines)

    def memory(self) -> Iterator[str | None]:
        """A line for each training that is not finished."""
        lengths = self.lengths.of()
        for job in self._of(Train).values():
            if not job.step.is_done(self.root):
                _, base = self.speeds.model(job.step.name, job.base)
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
        name, samples, actors = job.model.name, job.sampling.samples, of_engine(job.model)
        prompts, lengths = self._count(job.prompts), self.lengths.of(job)
        wanted, at = prompts * samples, self.measured.told(job.step).under_way
        done = min(wanted, self._stored(job.step, wanted) + at.unstored)
        size = self.speeds.size(name, job.folder)
        spent = lengths.left(wanted - done, at, job.sampling)
        seconds, origin = self.speeds.answer_seconds(job.model, size, spent)
        alike = None if actors.num_gpus else job.kind  # on GPUs it depends on the size
        start = self.speeds.start(name, job.kind, alike) or rates.startup(size, actors.num_gpus)
        startup = self.config.plan.startup.get(name, start)
        return self._pool(
            Work(
                step=job.step.name,
                pool=name,
                prompts=prompts,
                rows=wanted,
                done=done,
                prompt_tokens=spent.prompt_tokens,
                output_tokens=spent.output_tokens,
                actor_seconds=seconds,
                startup=startup if spent.rows else 0.0,
                lengths=lengths.origin,
                rate=origin,
                note=NO_SIZE * (size == rates.UNKNOWN and origin == GUESS and spent.rows > 0),
            ),
            actors,
            lengths.spread,
        )

    def _score(self, job: Score) -> Work:
        reward, made = job.reward, self._of(Generate).get(job.answers.step.key)
        lengths = self.lengths.of(made)
        prompts, count = self._count(job.answers.prompts), job.answers.count
        rows = prompts * count if count else self._rows(job.answers.step)
        done = self._stored(job.step, rows)
        guess, tokens = FUNCTION_RATE, lengths.prompt + lengths.output
        folders = [folder for folder in job.folders if folder]
        if folders:
            size = sum(self.speeds.size(reward.name, folder) for folder in folders)
            guess = self.speeds.power(reward.actors).forward_rate(size) / tokens
            guess *= self.speeds.compute_speed(reward.actors)
        rate = self.speeds.rate(reward.name, self.measured.rows_rate(reward.name), guess)
        load = self.measured.start([reward.name], kind=job.kind) or (
            rates.CPU_LOAD * bool(folders) * self.measured.start_pace
        )
        start = (load + rates.CPU_TASK * self.measured.start_pace) * self.is_small
        return self._pool(
            Work(
                step=job.step.name,
                pool=reward.name,
                prompts=prompts,
                rows=rows,
                done=done,
                prompt_tokens=round((rows - done) * tokens) if folders else 0,
                actor_seconds=(rows - done) / rate[0],
                startup=start if rows > done else 0.0,
                lengths=lengths.origin,
                rate=rate[1],
            ),
            reward.actors,
        )

    def _prepare(self, job: Prepare) -> Work:
        guess, loads = rates.MOST, job.config.reference_mode == "stored"
        if loads:
            guess = self._reference_rate(job.name, job.base, job.actors)
        rate = self.speeds.rate(job.step.name, None, guess)
        work = self._tokens(job, job, rate)
        start = (rates.CPU_LOAD * loads + rates.CPU_TASK) * self.measured.start_pace
        return self._pool(self._started(work, start), job.actors, self._row_spread(job))

    def _reference_rate(self, name: str, base: Folder, actors: Actors) -> float:
        """Tokens/s of an actor or worker that computes log-probs under the reference."""
        rate = self.speeds.power(actors).forward_rate(self.speeds.size(name, base))
        return rate * self.speeds.compute_speed(actors)

    def _train(self, job: Train) -> Work:
        config = job.config
        actors = Actors(max=config.workers, num_cpus=config.num_cpus, num_gpus=config.num_gpus)
        rows, like = self._of(Prepare)[job.rows.key], self.measured.training_like(job)
        guess = self.speeds.train_guess(job) * self.speeds.compute_speed(actors)
        rate = self.speeds.rate(job.step.name, like.rate if like else None, guess)
        left = 1 - self.measured.trained_share(job)
        work = self._tokens(job, rows, rate, config.epochs * left)
        starts = [told.start for _, told in self.measured.trained if told.start is not None]
        if config.reference_mode == "split":  # once over the rows, before the first step
            once = self._reference_rate(job.step.name, job.base, actors)
            passed = work.prompt_tokens / config.epochs / once
            work = replace(work, actor_seconds=work.actor_seconds + passed)
        work = self._started(
            work, starts[0] if starts else rates.CPU_START * self.measured.start_pace
        )
        work = self._pool(work, actors, self._row_spread(rows))
        return replace(work, units=config.workers, engines=config.workers)

    def _started(self, work: Work, seconds: float) -> Work:
        """The work with the start of its workers, which counts in small runs only."""
        return replace(work, startup=seconds * self.is_small if work.rows > work.done else 0.0)

    def _tokens(
        self, job: Prepare | Train, rows_of: Prepare, rate: Origin, epochs: float = 1
    ) -> Work:
        """Passes over rows of one prompt and some answers; equal scores give no row.

        Of a training that is under way, `epochs` are those that are left.
        """
        rows, origin = self._rows(rows_of.step), self.lengths.of().origin
        done = rows if job.step.is_done(self.root) else 0
        paired, least = self._answered.paired(rows_of.rows)
        each = self.measured.row_tokens(rows_of.step) or self._row_tokens(rows_of)
        tokens = round((rows - done) * epochs * each * paired)
        return Work(
            step=job.step.name,
            pool=job.step.name,
            rows=rows,
            done=done,
            prompt_tokens=tokens,
            actor_seconds=tokens / rate[0],
            lengths=origin,
            rate=rate[1],
            least=least,
        )

    def _row_tokens(self, job: Prepare) -> float:
        """Mean tokens of a row: the prompt, an answer of a source, and others of the target."""
        _, *others = job.answers
        source, own = self.lengths.by_role
        return self.lengths.of().prompt + source + len(others) * own

    def _row_spread(self, job: Prepare) -> Spread:
        """How far the tokens of rows may be off."""
        return SURE if self.measured.row_tokens(job.step) else self.lengths.of().spread

    def _plain(self, job: Job) -> Work:
        """Ingesting, selecting, pairing, tables: short CPU work, of which only starts count."""
        rows = self._rows(job.step)
        is_done = job.step.is_done(self.root)
        startup = 0.0 if is_done else rates.CPU_TASK * self.measured.start_pace * self.is_small
        if job.kind is JobKind.EVALUATE:
            startup *= 2  # two of its actors share a CPU
        done = rows if is_done else 0
        return Work(
            step=job.step.name,
            pool="",
            rows=rows,
            done=done,
            note=job.note,
            startup=startup,
            spread=SPREAD[GUESS],
        )

    def _pool(self, work: Work, actors: Actors, lengths: Spread = SURE) -> Work:
        """The work on a pool of such actors; `lengths` is the spread of its tokens."""
        units, room = self.config.storage.buckets, actors.max
        if self.room and actors.cpus:
            room = max(1, int(self.room // actors.cpus))
        spread = self.speeds.spread(work.rate, actors).beside(lengths)
        return replace(
            work, gpus=actors.num_gpus, cpus=actors.cpus, units=units,
            engines=min(actors.max, room, units), spread=spread,
        )  # fmt: skip

    @cached_property
    def room(self) -> float | None:
        """CPUs of this node, if the run starts Ray here and needs no GPU."""
        uses_gpu = any(on_gpu(job.model) for job in self._of(Generate).values())
        if uses_gpu or self.config.cluster.address or os.environ.get("RAY_ADDRESS"):
            return None
        return self.config.cluster.num_cpus or len(os.sched_getaffinity(0))

    @property
    def is_small(self) -> bool:
        """Whether starts of processes count: where the run is on this node's CPUs."""
        return self.room is not None

    # --- counts

    @cached_property
    def measured(self) -> Measured:
        """The measurements in the output."""
        return Measured(self.root, self.jobs.values())

    @cached_property
    def speeds(self) -> Speeds:
        """Rates and model sizes."""
        return Speeds(self.config, self.root, self.jobs, self.measured)

    @cached_property
    def lengths(self) -> AnswerLengths:
        """Lengths of prompts and answers."""
        return AnswerLengths(self.config, self.root, self.jobs, self.measured)

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

    @cached_property
    def _answered(self) -> Answered:
        return Answered(self.root, self.jobs, self._inputs, self._count)

    def _rows(self, step: Step) -> int:
        """Rows of a step's result: of its manifest, or at most so many."""
        job = self.jobs[step.key]
        if isinstance(job, Prepare) and job.name == "sft" and not job.config.takes_all_prompts:
            return round(self._rows(job.rows) * self.config.split.sft)
        if step.is_done(self.root):
            return int(step.read_manifest(self.root)["counts"]["rows"])
        if isinstance(job, Select | Pair):
            return self._answered.rows(job)
        if isinstance(job, IngestRecorded):
            return self._inputs.recorded(job.input, job.source, step.name)[0]
        return self._source_rows(job)

    def _source_rows(self, job: Job) -> int:
        """Rows of what a job says that it has as many as."""
        step = job.step
        match job.row_source:
            case int(rows):
                return rows
            case Prompts() as prompts:
                return self._count(prompts)
            case Step() as other:
                return self._rows(other)
            case PromptsConfig() as given if getattr(job, "without", None):
                return self._inputs.held_out(given, step.name)
            case PromptsConfig() | ImportConfig() as given:
                return self._inputs.of(given, step.name)
            case tuple(inputs):
                return self._inputs.prompts(inputs, step.name)
        raise ValueError(f"{step.name}: nothing tells how many rows it has")

    def _stored(self, step: Step, wanted: int) -> int:
        """Rows that the store has, capped at those wanted."""
        if step.is_done(self.root):
            return wanted
        return min(wanted, stored_rows(self.root / step.folder))
