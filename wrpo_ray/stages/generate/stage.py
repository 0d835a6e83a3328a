"""Answers of the sources, on a pool of actors each; a new kind of source is added here.

The unit of work is a bucket. An actor reads its bucket's prompts, skips the (prompt, sample) pairs
that the store already holds, and commits the rest by its size and age (`ShardWriter`). So a kill
loses at most the answers of the last `storage.commit_seconds`, and larger runs only add what is
missing. A bucket without missing answers is marked, and later runs of the step pass over it. An
actor works on several buckets at once, on more the smaller they are, so that its engine's batch
stays full.
"""

import math
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

from wrpo_ray.config import ModelConfig, SamplingConfig
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, buckets
from wrpo_ray.data.failures import EarlierFailures, write_failures
from wrpo_ray.data.finished import Filling
from wrpo_ray.data.samples import Prompts, Samples, parts, shares
from wrpo_ray.data.writer import ShardWriter
from wrpo_ray.llm.vllm_settings import engine_env, slots, weight_bytes
from wrpo_ray.llm.weight_stream import streams
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.cores import with_shares
from wrpo_ray.runtime.job import BaseJob, JobKind, Stream, models_of
from wrpo_ray.runtime.placement import Pool
from wrpo_ray.runtime.pool import map_rows
from wrpo_ray.runtime.pool_members import StartClock
from wrpo_ray.runtime.progress import Progress, log
from wrpo_ray.runtime.ready_queue import ReadyQueue
from wrpo_ray.runtime.tally import Tally, unmarked
from wrpo_ray.runtime.tasks import run_in_threads
from wrpo_ray.runtime.workplace import Workplace
from wrpo_ray.stages.generate.account import Account, Untold
from wrpo_ray.stages.generate.vllm_engine import (
    Answers,
    Engine,
    Request,
    Row,
    SamplingIdentity,
    VllmEngine,
    requests_for,
)
from wrpo_ray.storage.folder import Folder, WithoutWeights
from wrpo_ray.storage.steps import Step

LEAST_IN_HAND, MOST_IN_HAND, MAX_ENDPOINT_BUCKETS = 2, 128, 8
"""Buckets that an actor works on at once: those that fill its engine, which holds them in memory;
for an endpoint, so that small buckets also reach its limit of calls in flight."""
FILLS = 6
"""Times that the buckets in hand fill an engine: long answers take over four times the mean, so
that twice leaves it half empty while the last ones of a bucket are awaited (simulated: 0.57 of the
GPUs' time against 0.85; `benchmarks/SIMULATION.md`)."""


@dataclass(frozen=True)
class Generate(BaseJob):
    """Answers of one model to some prompts."""

    kind = JobKind.GENERATE
    is_retryable = True

    model: ModelConfig
    folder: Folder
    """The model's weights."""
    fingerprint: str
    """The fingerprint of the weights: part of the store's key."""
    prompts: Prompts
    sampling: SamplingConfig
    seed: int
    retry: int = 0
    family: str = ""
    """Models of one family differ only in their weights and share engines, one after another; a
    model without a family has engines of its own."""

    @property
    def engines(self) -> ModelConfig:
        """The pool of engines; jobs for which this is equal share one."""
        if not self.family:
            return self.model
        return self.model.model_copy(update={"name": self.family, "model": ""})

    @property
    def copied(self) -> Folder:
        """The folder as nodes copy it: without weights that engines read in the store."""
        return WithoutWeights(self.folder.uri) if streams(self.model, self.folder) else self.folder

    def local(self) -> Path:
        """The model's files on this node."""
        return self.copied.local(self.fingerprint)

    @cached_property
    def step(self) -> Step:
        """The step; prompts and number of samples are not in the store's key, so they can grow."""
        sampling = self.sampling.identity()
        count = sampling.pop("samples")
        store = {
            "model": self.model.identity() | {"model": self.fingerprint},
            "sampling": sampling,
            "seed": self.seed,
        } | ({"asks": self.prompts.asks} if self.prompts.asks else {})
        wanted = {"samples": count, "splits": list(self.prompts.splits)} | self.prompts.narrowing
        name, inputs = self.model.name, self.prompts.inputs
        return Step(f"generate-{name}", wanted, inputs, store, self.retry, source=name)

    @property
    def samples(self) -> Samples:
        """The answers of the step, as later stages read them."""
        return Samples(self.step, self.prompts, self.sampling.samples)

    @property
    def has_scores(self) -> bool:
        """No: they have to be scored."""
        return False

    @property
    def stream(self) -> Stream:
        """Finished buckets can be scored while others are generated."""
        return Stream(self.run, pool_of(self.engines))

    @property
    def loads(self) -> Pool:
        """The engines."""
        models = () if self.model.endpoint else ((self.copied, self.fingerprint),)
        return replace(pool_of(self.engines), models=models)

    def of_splits(self, splits: tuple[str, ...]) -> Self:
        """The part of the job for some splits of its prompts, in the same store."""
        return replace(self, prompts=self.prompts.of_splits(splits))

    @classmethod
    def run(cls, run: Run, jobs: list[Self], ready_queue: ReadyQueue | None = None) -> None:
        """Run the jobs; the jobs of one model, or family, share engines; pools run concurrently.

        Each finished bucket is added to `ready_queue`; a job's last one when the job is done.

        Raises:
            FailureLimitError: too many rows failed.
        """
        pools: dict[str, list[Generate]] = defaultdict(list)
        for job in jobs:
            pools[job.engines.model_dump_json()].append(job)
        alike = [
            replace(
                pool_of(same[0].engines, _bucket(run, same), bytes_of(same[0])),
                models=models_of(same),
                row=_expected(run, same),
                startup=run.plan.startup.get(same[0].model.name, 0.0),
            )
            for same in pools.values()
        ]
        shared = with_shares(alike, run.beside)
        pairs = zip(shared, pools.values(), strict=True)
        run_in_threads([partial(_run_pool, run, *pair, ready_queue) for pair in pairs])


def buckets_in_hand(model: ModelConfig, bucket: float, weights: float = 0) -> int:
    """Buckets of `bucket` answers that an actor of the model, of so many bytes, works on at once.

    Small ones are so many that its engine stays full; of large ones two are, so that the second
    fills the batch while the last long answers of the first are finished.

    Example:
        >>> buckets_in_hand(ModelConfig(name="m", model="m"), bucket=32)
        48
        >>> buckets_in_hand(ModelConfig(name="m", model="m"), bucket=32, weights=270e6)
        12
        >>> buckets_in_hand(ModelConfig(name="m", model="m"), bucket=5000)
        2
    """
    if model.endpoint:
        return MAX_ENDPOINT_BUCKETS
    filling = math.ceil(FILLS * engine_slots(model, weights) / max(1.0, bucket))
    return min(max(LEAST_IN_HAND, filling), MOST_IN_HAND)


def engine_slots(model: ModelConfig, weights: float = 0) -> int:
    """Answers that the model's engine, of so many bytes, has room for at once."""
    arguments = model.performance | model.engine
    return slots(arguments, on_gpu=bool(model.actors.num_gpus), weights=weights)


def at_once(
    model: ModelConfig, bucket: float, buckets: float = math.inf, weights: float = 0
) -> float:
    """Answers that an engine works on at once, of `buckets` buckets of `bucket` answers."""
    in_hand = min(buckets_in_hand(model, bucket, weights), buckets)
    return min(engine_slots(model, weights), in_hand * bucket)


def pool_of(model: ModelConfig, bucket: float = math.inf, weights: float = 0) -> Pool:
    """Return the pool of actors that hold the model's engines, for buckets of `bucket` answers.

    `weights` are the model's bytes, by which an engine on a CPU has room for more or fewer answers.
    """
    is_here = model.endpoint is None
    return Pool(
        f"generate {model.name}",
        model.actors,
        engine_env(on_gpu=bool(model.actors.num_gpus)) if is_here else {},
        threads=buckets_in_hand(model, bucket, weights),
        parts=model.parts if is_here else 1,
        has_model=is_here,
        is_light=not is_here,
    )


def _bucket(run: Run, jobs: list[Generate]) -> float:
    """Answers of a bucket of the jobs, at the most on average; infinite if that is not known.

    It is for jobs of several weights, too, which take turns in an engine: with few buckets in hand
    it seldom changes between them.
    """
    steps = [job.prompts.step for job in jobs]
    if len({job.fingerprint for job in jobs}) > 1 or not all(s.is_done(run.root) for s in steps):
        return math.inf
    counts = [step.read_manifest(run.root)["counts"].get("rows", 0) for step in steps]
    in_others = set(_parts(jobs).values())  # what a part answers is not left for the whole
    samples = [job.sampling.samples * (n not in in_others) for n, job in enumerate(jobs)]
    return float(sum(map(math.prod, zip(counts, samples, strict=True))) / len(jobs) / run.buckets)


def _expected(run: Run, jobs: list[Generate]) -> float | None:
    """Seconds of an engine for a bucket of the jobs, by the rate that the user gives for `plan`."""
    rate, bucket = run.plan.rates.get(jobs[0].model.name), _bucket(run, jobs)
    return bucket * run.plan.output_tokens / rate if rate and bucket < math.inf else None


def bytes_of(job: Generate) -> int:
    """Bytes of the weights of a job's engines, by which one on a CPU has its slots; else 0."""
    model = job.model
    return 0 if model.endpoint or model.actors.num_gpus else weight_bytes(job.folder)


def _run_pool(run: Run, pool: Pool, jobs: list[Generate], ready_queue: ReadyQueue | None) -> None:
    tallies = [
        Tally(run, job.step, job.samples.folder(run.root), share)
        for job, share in zip(jobs, shares(_asked(jobs)), strict=True)
    ]
    rows = unmarked(tallies, _rows(jobs, buckets(run.buckets)))
    if ready_queue:
        for job, tally in zip(jobs, tallies, strict=True):
            for bucket in tally.marks:
                ready_queue.add(job.step, bucket)
    if not rows:
        return
    log(f"{pool.what}: starting engines")
    stores = [f for j in jobs for f in (j.samples.folder(run.root), j.step.failures(run.root))]
    seen = run.having_seen(stores, [run.root / job.prompts.step.folder for job in jobs])
    progress = Progress(pool.what, len(rows))
    queue = ReadyQueue.of(rows)
    queue.hold_back(_parts(jobs), rows)
    account = Account(run, pool, [(job.step, job.model.name) for job in jobs], progress)
    arguments = {"run": seen, "jobs": jobs}
    with closing(account):
        for result in map_rows(pool, rows, Generator, arguments, queue, account.add):
            step, is_whole = jobs[result["job"]].step, result["is_whole"]
            queue.finished(result)
            tallies[result["job"]].add(result)
            account.finish(result)
            if ready_queue:
                ready_queue.add(step, result["bucket"], is_whole=is_whole)


def _parts(jobs: list[Generate]) -> dict[int, int]:
    """{number of a job: number of the job that does a part of it}."""
    return parts(_asked(jobs))


def _asked(jobs: list[Generate]) -> list[tuple[str, Prompts]]:
    return [(job.step.folder, job.prompts) for job in jobs]


def _rows(jobs: list[Generate], buckets: list[Bucket]) -> list[dict[str, Any]]:
    """Return a row for each bucket of each job; jobs of the same weights go together.

    Those that do a part of others come first.
    """
    first = set(_parts(jobs).values())
    by_weights: dict[str, list[int]] = defaultdict(list)
    for number, job in enumerate(jobs):
        by_weights[job.fingerprint].append(number)
    rows = [
        {"job": number, "bucket": bucket.index}
        for numbers in by_weights.values()
        for bucket in buckets
        for number in numbers
    ]
    return sorted(rows, key=lambda row: row["job"] not in first)


class Generator:
    """The actor: an engine that is started at the first missing answer."""

    def __init__(self, run: Run, jobs: list[Generate]):
        self.run, self.jobs = run, jobs
        self.workplace = Workplace(run, [job.step for job in jobs], _parts(jobs))
        self._starting, self._start_clock = threading.Lock(), StartClock()
        self._untold = Untold()

    @cached_property
    def engine(self) -> Engine:
        """The model's engine."""
        job = self.jobs[0]
        if job.model.endpoint:
            from wrpo_ray.stages.generate.endpoint import EndpointEngine  # it imports a client

            return EndpointEngine(job.model, job.seed)
        with self._start_clock.running():
            return VllmEngine(job.model, job.local(), job.seed, job.folder)

    def made(self) -> dict[str, Any]:
        """Return what was made of unfinished buckets, and what is under way; thread-safe."""
        is_loaded = "engine" in self.__dict__
        return self._told() if is_loaded or self._untold.has_answers else {}

    def _told(self) -> dict[str, Any]:
        """Return what was made since the last report."""
        return self._untold.tell(self.__dict__.get("engine")) | self._start_clock.take()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Fill one bucket of one job and return counts only; thread-safe."""
        job, bucket = self.jobs[row["job"]], self.workplace.bucket(row)
        made = Counter(new=0, failed=0, prompt_tokens=0, output_tokens=0)
        with self.workplace.filling(row, records.RESPONSE) as (filling, earlier):
            held, given_up, requests = self._missing(row["job"], bucket, filling, earlier)
            asked = sum(request.count for request in requests)
            self._untold.add(row["job"], begun=1, asked=asked, failed=given_up)
            commit = partial(self._commit, row["job"], filling, earlier)
            with ShardWriter(commit, self.run.commit_seconds) as writer:
                for rows, failures in self._answers(job, requests):
                    writer.add(rows, failures)
                    counts = self._counts(job, rows, failures)
                    made.update(counts)
                    self._untold.add(row["job"], **counts)
        totals = made | {"rows": held + made["new"], "failed": given_up + made["failed"]}
        if is_whole := not made["failed"] and not earlier.just_tried:
            most = self.run.max_attempts
            filling.mark(rows=totals["rows"], failed=given_up, attempts=most)
        return row | totals | {"is_whole": is_whole} | self._told()

    def _counts(
        self, job: Generate, rows: list[Row], failures: list[records.FailureRow]
    ) -> dict[str, int]:
        """Return the counts; vLLM reads a prompt once for all its samples, a server for each."""
        lengths = [(row["prompt_id"], row["prompt_tokens"] or 0) for row in rows]
        read = lengths if job.model.endpoint else dict(lengths).items()
        made = sum(row["output_tokens"] or 0 for row in rows)
        tokens = {"prompt_tokens": sum(n for _, n in read), "output_tokens": made}
        return {"new": len(rows), "failed": len(failures)} | tokens

    def _answers(self, job: Generate, requests: list[Request]) -> Iterator[Answers]:
        """Yield the answers of each request as they finish."""
        if not requests:
            return
        with self._starting:
            engine = self.engine
        yield from engine.answers(requests, job.sampling, self._identity(job))

    def _identity(self, job: Generate) -> SamplingIdentity:
        folder = None if job.model.endpoint else job.local()
        return SamplingIdentity(job.model.name, job.seed, folder)

    def _missing(
        self, number: int, bucket: Bucket, filling: Filling, earlier: EarlierFailures
    ) -> tuple[int, int, list[Request]]:
        """Return the numbers of answers stored and left out, and requests for the others."""
        job, done = self.jobs[number], filling.sample_keys()
        given_up = earlier.left_out - done
        prompts = job.prompts.read(self.run.root, bucket).to_pylist()
        requests, wanted = list[Request](), job.sampling.samples
        for prompt in prompts:
            keys = [(prompt["prompt_id"], sample) for sample in range(wanted)]
            lacking = [key[1] for key in keys if key not in done and key not in given_up]
            requests += requests_for(prompt, lacking, number)
        tried = sum(request.count for request in requests)
        return wanted * len(prompts) - tried - len(given_up), len(given_up), requests

    def _commit(
        self,
        number: int,
        filling: Filling,
        earlier: EarlierFailures,
        rows: list[Row],
        failures: list[records.FailureRow],
    ) -> None:
        job = self.jobs[number]
        key = sorted([r["prompt_id"], r["sample"]] for r in [*rows, *failures])
        if rows:
            filling.write([row | {"model": job.fingerprint} for row in rows], key)
            self._untold.stored(number, len(rows))
        folder = job.step.failures(self.run.root)
        write_failures(folder, filling.bucket, failures, key, earlier)
