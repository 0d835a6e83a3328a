"""A pool of reward actors on Ray Data; the unit of work is a bucket of one store of answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from wrpo_ray.config import RewardConfig
from wrpo_ray.core import records
from wrpo_ray.core.cluster import Feed, Pool, map_rows, thread_env
from wrpo_ray.core.progress import Progress
from wrpo_ray.core.run import Run, Tally
from wrpo_ray.core.shards import (
    Bucket,
    Earlier,
    Samples,
    buckets,
    clear_failures,
    read_bucket,
    sample_keys,
    write_failures,
    write_shard,
)
from wrpo_ray.core.steps import Step
from wrpo_ray.core.storage import Folder
from wrpo_ray.score.rewards import Item, Reward, load_reward

Row = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """The rewards of some answers."""

    answers: Samples
    reward: RewardConfig
    folder: Folder | None
    """The reward model's weights; None for a function."""
    fingerprint: str
    """What identifies them: part of the store's key."""
    retry: int = 0

    @cached_property
    def step(self) -> Step:
        """The step; its store grows with the store of answers."""
        source = self.answers.step
        name = source.name.removeprefix("generate-")
        store = {
            "reward": self.reward.identity() | {"model": self.fingerprint},
            "answers": source.folder,
        }
        if self.reward.function:  # it may look at the prompts' references
            store["prompts"] = self.answers.prompts.step.key
        return Step(f"score-{self.reward.name}-{name}", {}, (source,), store, self.retry)

    @property
    def samples(self) -> Samples:
        """The same answers with their rewards (records SCORED), as later stages read them."""
        return Samples(self.step, self.answers.prompts, self.answers.count)


def run(run: Run, jobs: list[Score], feed: Feed | None = None) -> None:
    """Do each job; the jobs of one reward share its actors.

    A `feed` tells which buckets of the jobs' answers can be read, while others are still made;
    the jobs have one reward then.

    Raises:
        FailureLimitError: too many answers could not be scored.
    """
    for _, group in groupby(jobs, key=lambda job: job.reward):
        _run_pool(run, list(group), feed)


def pool_of(reward: RewardConfig) -> Pool:
    """The reward as a pool of actors."""
    return Pool(f"score with {reward.name}", reward.actors, thread_env(reward.actors.num_cpus))


def _run_pool(run: Run, jobs: list[Score], feed: Feed | None) -> None:
    pool = pool_of(jobs[0].reward)
    rows = [{"job": j, "bucket": b.index} for b in buckets(run.buckets) for j in range(len(jobs))]
    progress = Progress(pool.what, len(rows))
    tallies = [Tally(run, job.step) for job in jobs]
    for result in map_rows(pool, rows, Scorer, {"run": run, "jobs": jobs}, feed):
        progress.add(result["new"], result["failed"])
        tallies[result["job"]].add(result)


class Scorer:
    """The Ray Data actor: a reward that is loaded when the first unscored answer is met."""

    def __init__(self, run: Run, jobs: list[Score]):
        self.run, self.jobs = run, jobs

    @cached_property
    def reward(self) -> Reward:
        """The loaded reward."""
        job = self.jobs[0]
        return load_reward(job.reward, job.folder.local(job.fingerprint) if job.folder else None)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Fill one bucket of one job; what is returned are counts only."""
        job, bucket = self.jobs[row["job"]], Bucket(row["bucket"], self.run.buckets)
        kept = job.step.failures(self.run.root)
        earlier = clear_failures(kept, bucket, self.run.max_attempts)
        held, given_up, missing = self._missing(job, bucket, earlier)
        good, failed = self._score(job, bucket, missing) if missing else ([], [])
        key = sorted([r["prompt_id"], r["source"], r["sample"]] for r in missing)
        if good:
            write_shard(job.samples.folder(self.run.root), bucket, records.SCORED, good, key)
        write_failures(kept, bucket, failed, key, earlier)
        counts = {"rows": held + len(good), "new": len(good), "failed": given_up + len(failed)}
        return row | counts

    def _missing(self, job: Score, bucket: Bucket, earlier: Earlier) -> tuple[int, int, list[Row]]:
        """How many wanted answers are scored, how many given up, and the others."""
        store = job.samples.folder(self.run.root)
        done = sample_keys(read_bucket(store, bucket, records.SCORED, ["prompt_id", "sample"]))
        answers = job.answers.read(self.run.root, bucket, records.RESPONSE).to_pylist()
        given_up = earlier.given_up - done
        keys = [(row["prompt_id"], row["sample"]) for row in answers]
        missing = [
            row
            for row, key in zip(answers, keys, strict=True)
            if key not in done and key not in given_up
        ]
        return len(answers) - len(missing) - len(given_up), len(given_up), missing

    def _score(self, job: Score, bucket: Bucket, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        prompts = job.answers.prompts.read(self.run.root, bucket).to_pylist()
        by_id = {p["prompt_id"]: p for p in prompts}
        asked = [by_id[row["prompt_id"]] for row in rows]
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
                good.append(row | {"reward": value, "reward_model": job.fingerprint})
        return good, failed
