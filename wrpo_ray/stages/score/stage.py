"""Scores of answers, by a pool of actors; the unit of work is a bucket of one store of answers.

An actor skips the answers that have a score, and commits the others by their size and age
(`ShardWriter`). A bucket that is whole, answers and scores, is marked and passed over later. Scores
are rewards, or a verifier's verdicts on answers that have rewards too: `Score.outcome` says which.
An actor reads its next bucket, and writes the last one, while it scores: it has two at most.
"""

import json
import threading
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.compute as pc

from wrpo_ray.config import RewardConfig
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, buckets, chunks, read_bucket
from wrpo_ray.data.failures import EarlierFailures, write_failures
from wrpo_ray.data.finished import Filling
from wrpo_ray.data.samples import Prompts, Samples, parts, shares
from wrpo_ray.data.writer import ShardWriter
from wrpo_ray.llm.vllm_settings import engine_env
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.cores import with_shares
from wrpo_ray.runtime.job import BaseJob, JobKind, Stream
from wrpo_ray.runtime.placement import Pool
from wrpo_ray.runtime.pool import map_rows
from wrpo_ray.runtime.pool_members import StartClock
from wrpo_ray.runtime.progress import Progress
from wrpo_ray.runtime.ready_queue import ReadyQueue
from wrpo_ray.runtime.tally import Tally, unmarked
from wrpo_ray.runtime.workplace import Workplace
from wrpo_ray.stages.score.base import Item, Reward
from wrpo_ray.stages.score.rewards import load_reward
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

Row = dict[str, Any]
SCORE = "reward"
"""The column of SCORED with the scores: rewards, or verdicts as 1.0 (right) and 0.0 (wrong)."""
Outcome = Literal["reward", "verdict"]
SHOWN_AS = {"reward": "mean reward", "verdict": "share right"}
"""The mean of a job's scores, as the progress calls it."""
BATCHES = 64
"""Batches that a reward scores at once, in an order of its own, such as by length."""
SAMPLED_BUCKETS = 8
"""Evenly chosen buckets in which the share of wins is counted. A bucket reads two columns of each
source for it; counting in all of them would cost more with every bucket of the run."""


@dataclass(frozen=True)
class Score(BaseJob):
    """The rewards of some answers, or a verifier's verdicts on them."""

    kind = JobKind.SCORE
    is_retryable = True

    answers: Samples
    reward: RewardConfig
    folders: tuple[Folder | None, ...]
    """The weights of each part of the reward; None for a part without weights."""
    fingerprints: tuple[str, ...]
    """Of weights, code or text of each part."""
    retry: int = 0
    outcome: Outcome = "reward"
    """The meaning of a score: a reward to rank by, or a verdict (1.0 or 0.0) beside the rewards."""
    is_part: bool = False
    """Whether another job of the run scores the answers to more splits of the prompts."""

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the whole reward or verifier: part of the store's key."""
        whole = self.fingerprints
        return whole[0] if len(whole) == 1 else digest(whole, 16)

    @cached_property
    def step(self) -> Step:
        """The step; its store grows with the store of answers."""
        source = self.answers.step
        name = source.source or source.name
        store = {
            "reward": self.reward.identity() | {"model": self.fingerprint},
            "answers": source.folder,
        }
        if not self.reward.model:  # it may look at the prompts' references
            store["prompts"] = self.answers.prompts.step.key
        label = f"score-{self.reward.name}-{name}"
        prompts = self.answers.prompts
        wanted = dict(prompts.narrowing)  # the store can hold scores of other prompts
        wanted |= {"splits": list(prompts.splits)} if self.is_part else {}
        return Step(label, wanted, (source,), store, self.retry, source=name)

    @property
    def samples(self) -> Samples:
        """The same answers with their scores (records SCORED), as later stages read them."""
        return Samples(self.step, self.answers.prompts, self.answers.count)

    @property
    def batch_key(self) -> RewardConfig:
        """Jobs with one reward share its actors."""
        return self.reward

    @property
    def stores(self) -> tuple[str, ...]:
        """Its own."""
        return (self.step.folder,)

    @property
    def stream(self) -> Stream:
        """It can score the buckets of answers that are generated meanwhile."""
        return Stream(self.run, pool_of(self.reward), self.answers.step)

    @property
    def loads(self) -> Pool:
        """The reward's actors."""
        parts = zip(self.folders, self.fingerprints, strict=True)
        models = tuple((folder, key) for folder, key in parts if folder)
        return replace(pool_of(self.reward), models=models)

    def part(self, answers: Samples) -> Self:
        """The part of the job for some of its answers, in the same store."""
        return replace(self, answers=answers, is_part=True)

    @classmethod
    def run(cls, run: Run, jobs: list[Self], ready_queue: ReadyQueue | None = None) -> None:
        """Run the jobs; the jobs of one reward or verifier share its actors.

        A `ready_queue` gives the buckets of the jobs' answers that are ready, while others are
        still generated; then all jobs have the same reward.

        Raises:
            FailureLimitError: too many answers could not be scored.
        """
        for _, group in groupby(jobs, key=lambda job: job.reward):
            _run_pool(run, list(group), ready_queue)


def pool_of(reward: RewardConfig) -> Pool:
    """Return the pool of a reward's or verifier's actors."""
    env = {}
    if any(part.engine == "vllm" for part in reward.parts):
        env = engine_env(on_gpu=bool(reward.actors.num_gpus))
    has_model = any(part.model for part in reward.parts)
    is_light = not has_model and all(part.verifier != "code" for part in reward.parts)
    # a user's function may need the process's main thread, as for `signal.alarm`
    reads_ahead = not any(part.function for part in reward.parts)
    return Pool(
        f"score with {reward.name}", reward.actors, env, threads=1 + reads_ahead,
        has_model=has_model, is_light=is_light,
    )  # fmt: skip


def _run_pool(run: Run, jobs: list[Score], ready_queue: ReadyQueue | None) -> None:
    (pool,) = with_shares([jobs[0].loads], run.beside)
    tallies = [
        Tally(run, job.step, job.samples.folder(run.root), share)
        for job, share in zip(jobs, shares(_asked(jobs)), strict=True)
    ]
    rows = [{"job": j, "bucket": b.index} for b in buckets(run.buckets) for j in range(len(jobs))]
    rows = sorted(unmarked(tallies, rows), key=lambda row: not jobs[row["job"]].is_part)
    if ready_queue:
        ready_queue.passed_over |= {(j, b) for j, tally in enumerate(tallies) for b in tally.marks}
    if not rows:
        return
    stores = [s.folder(run.root) for job in jobs for s in (job.samples, job.answers)]
    stores += [job.step.failures(run.root) for job in jobs]
    prompts = [run.root / job.answers.prompts.step.folder for job in jobs]
    seen = run.having_seen(stores, prompts)
    shown = [_SourceProgress(job, t.left) for job, t in zip(jobs, tallies, strict=True)]
    queue = ready_queue or ReadyQueue.of(rows)
    queue.hold_back(parts(_asked(jobs)), rows)
    for result in map_rows(pool, rows, Scorer, {"run": seen, "jobs": jobs}, queue):
        queue.finished(result)
        _show(shown, result["job"], result, json.loads(result.pop("wins")))
        tallies[result["job"]].add(result)
        run.record_usage(
            jobs[result["job"]].step, jobs[0].reward.name, result["seconds"],
            idle=result["idle"], start=result["start"], gpus=pool.needs["GPU"],
            rows=result["new"], failed=result["failed"],
        )  # fmt: skip


def _asked(jobs: list[Score]) -> list[tuple[str, Prompts]]:
    return [(job.step.folder, job.answers.prompts) for job in jobs]


class _SourceProgress(Progress):
    """A source's progress, with its scores so far."""

    def __init__(self, job: Score, buckets: int):
        super().__init__(f"score {job.step.source}{', for SFT' * job.is_part}", buckets)
        self.mean_is, self.is_part = SHOWN_AS[job.outcome], job.is_part
        self.score_sum, self.wins = 0.0, 0


def _show(shown: list[_SourceProgress], job: int, result: Row, wins: list[int]) -> None:
    """Show the mean score of a source, and the share of prompts that it answers best, so far."""
    for source, won in zip((s for s in shown if not s.is_part), wins, strict=False):
        source.wins += won
    decided = sum(source.wins for source in shown)
    this = shown[job]
    this.score_sum += result.pop("score_sum")
    if rows := this.rows + result["new"]:
        this.about[this.mean_is] = f"{this.score_sum / rows:.3g}"
    if decided and not this.is_part:
        this.about["best"] = f"{this.wins / decided:.0%}"
    this.add(result["new"], result["failed"])


class Scorer:
    """The actor: a reward or verifier that is loaded at the first answer without a score."""

    def __init__(self, run: Run, jobs: list[Score]):
        self.run, self.jobs = run, jobs
        self.workplace = Workplace(run, [job.step for job in jobs], parts(_asked(jobs)))
        self._start_clock = StartClock()
        self._scoring = threading.Lock()
        """Held while answers are scored, of one bucket at a time; another is read and written."""

    @cached_property
    def reward(self) -> Reward:
        """The loaded reward or verifier."""
        job = self.jobs[0]
        parts = zip(job.folders, job.fingerprints, strict=True)
        with self._start_clock.running():
            return load_reward(
                job.reward, [folder.local(key) if folder else None for folder, key in parts]
            )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score one bucket of one job; return counts only. Threads may call at once."""
        job, bucket = self.jobs[row["job"]], self.workplace.bucket(row)
        done, failed, score_sum = 0, 0, 0.0
        with self.workplace.filling(row, records.SCORED) as (filling, earlier):
            held, given_up, missing = self._missing(job, bucket, filling, earlier)
            prompts = self._prompts(job, bucket) if missing else {}
            commit = partial(self._commit, job, filling, earlier)
            with ShardWriter(commit, self.run.commit_seconds) as writer, self._scoring:
                for rows in chunks(missing, BATCHES * job.reward.batch_size):
                    good, failures = self._score(job, prompts, rows)
                    writer.add(good, failures)
                    done, failed = done + len(good), failed + len(failures)
                    score_sum += sum(r[SCORE] for r in good)
        if not failed and not earlier.just_tried and row.get("is_whole", True):
            filling.mark(rows=held + done, failed=given_up, attempts=self.run.max_attempts)
        counts = {"rows": held + done, "new": done, "failed": given_up + failed}
        is_sampled = bucket.index % max(1, bucket.count // SAMPLED_BUCKETS) == 0
        wins = self._wins(bucket) if done and is_sampled and not job.is_part else []
        told = {"score_sum": score_sum, "wins": json.dumps(wins)}
        return row | counts | told | self._start_clock.take()

    def _wins(self, bucket: Bucket) -> list[int]:
        """Return how many of the bucket's prompts each job's source wins, if all are scored.

        Empty where a source has several jobs: of other seeds, or after other training.
        """
        whole = [job for job in self.jobs if not job.is_part]
        if len({job.step.source for job in whole}) < len(whole):
            return []
        columns, best = ["prompt_id", SCORE], list[pa.Table]()
        for job in reversed(whole):  # the last one is scored last
            store = job.samples.folder(self.run.root)
            table = read_bucket(store, bucket, records.SCORED, columns)
            if not table.num_rows:
                return []
            best.insert(0, table.group_by("prompt_id").aggregate([(SCORE, "max")]))
        highest = f"{SCORE}_max"
        most = pa.concat_tables(best).group_by("prompt_id").aggregate([(highest, "max")])
        return [
            pc.sum(pc.equal(joined[highest], joined[f"{highest}_max"])).as_py() or 0
            for joined in (table.join(most, "prompt_id") for table in best)
        ]

    def _missing(
        self, job: Score, bucket: Bucket, filling: Filling, earlier: EarlierFailures
    ) -> tuple[int, int, list[Row]]:
        """Return how many wanted answers have a score, how many are left out, and the others."""
        done = filling.sample_keys()
        answers = job.answers.read(self.run.root, bucket, records.RESPONSE).to_pylist()
        given_up = earlier.left_out - done
        keys = [(row["prompt_id"], row["sample"]) for row in answers]
        missing = [
            row
            for row, key in zip(answers, keys, strict=True)
            if key not in done and key not in given_up
        ]
        return len(answers) - len(missing) - len(given_up), len(given_up), missing

    def _prompts(self, job: Score, bucket: Bucket) -> dict[str, Row]:
        prompts = job.answers.prompts.read(self.run.root, bucket).to_pylist()
        return {prompt["prompt_id"]: prompt for prompt in prompts}

    def _score(
        self, job: Score, prompts: dict[str, Row], rows: list[Row]
    ) -> tuple[list[Row], list[records.FailureRow]]:
        asked = [prompts[row["prompt_id"]] for row in rows]
        items = [
            Item(prompt["messages"], row["text"], prompt["reference"])
            for prompt, row in zip(asked, rows, strict=True)
        ]
        good, failed = [], []
        for row, value in zip(rows, self.reward.score(items), strict=True):
            if isinstance(value, Exception):
                key = {name: row[name] for name in ("prompt_id", "source", "sample")}
                failed.append(records.failure("score", value, **key))
            else:
                good.append(row | {SCORE: value, "reward_model": job.fingerprint})
        return good, failed

    def _commit(
        self,
        job: Score,
        filling: Filling,
        earlier: EarlierFailures,
        good: list[Row],
        failed: list[records.FailureRow],
    ) -> None:
        key = sorted([r["prompt_id"], r["source"], r["sample"]] for r in [*good, *failed])
        if good:
            filling.write(good, key)
        folder = job.step.failures(self.run.root)
        write_failures(folder, filling.bucket, failed, key, earlier)
