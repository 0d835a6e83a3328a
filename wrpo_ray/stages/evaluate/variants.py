"""Computes the table of a study: mean scores of variants, and their paired differences."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Self

from wrpo_ray.data.buckets import Bucket, buckets
from wrpo_ray.data.records import SCORED
from wrpo_ray.data.samples import Samples
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.job import BaseJob, JobKind
from wrpo_ray.runtime.tasks import map_tasks
from wrpo_ray.stages.evaluate.stage import ScoredModel
from wrpo_ray.stages.evaluate.statistics import Crossed, crossed_interval, crossed_of, plain
from wrpo_ray.storage.steps import Step

TABLE = "table.json"
MEASURES = ("accuracy", "reward")
Key = tuple[str, str]
"""(measure, variant or contrast)"""


@dataclass(frozen=True)
class TrainedVariant:
    """One variant of a study, trained with one seed."""

    variant: str
    seed: int
    model: ScoredModel

    def answers(self, measure: str) -> Samples | None:
        """Its answers scored by a measure, or None."""
        return next(iter(self.model.answers(measure)), None)


@dataclass(frozen=True)
class VariantTable(BaseJob):
    """Compare variants on the same held-out prompts."""

    kind = JobKind.STUDY_TABLE

    models: tuple[TrainedVariant, ...]
    contrasts: tuple[tuple[str, str], ...]
    """Pairs (a, b) of variants: the paired difference a - b, over the seeds that both have."""

    @property
    def step(self) -> Step:
        """The step of the output folder."""
        inputs = [
            samples.step
            for trained in self.models
            for measure in MEASURES
            if (samples := trained.answers(measure))
        ]
        config = {
            "competitors": [[c.variant, c.seed] for c in self.models],
            "contrasts": self.contrasts,
        }
        return Step("study", config, tuple({step.key: step for step in inputs}.values()))

    @property
    def seeds(self) -> dict[str, list[int]]:
        """The seeds of each variant."""
        found: dict[str, list[int]] = {}
        for trained in self.models:
            found.setdefault(trained.variant, []).append(trained.seed)
        return found

    @classmethod
    def run(cls, run: Run, jobs: list[Self]) -> None:
        """Write each job's table."""
        for job in jobs:
            started, sums = time.time(), dict[Key, Crossed]()
            rows = ({"run": run, "job": job, "bucket": b} for b in buckets(run.buckets))
            for result in map_tasks(job.step.name, rows, _bucket):
                for measure, name, values in json.loads(result["sums"]):
                    found, key = Crossed(**values), (measure, name)
                    sums[key] = sums[key] + found if key in sums else found
            (run.root / job.step.folder).write_json(TABLE, tabulate(job, sums))
            job.step.finish(run.root, {"rows": max(s.prompts for s in sums.values())}, started)


def _bucket(task: dict[str, Any]) -> dict[str, Any]:
    """The sums of one bucket."""
    run, job, bucket = task["run"], task["job"], task["bucket"]
    found = [
        (measure, name, asdict(sums))
        for measure in MEASURES
        for name, sums in _sums(job, measure, _read(run, job, measure, bucket))
    ]
    return {"sums": json.dumps(found)}


Values = dict[tuple[str, int], dict[str, float]]
"""{(variant, seed): {prompt: mean over its samples}}"""


def _read(run: Run, job: VariantTable, measure: str, bucket: Bucket) -> Values:
    found: Values = {}
    for trained in job.models:
        samples = trained.answers(measure)
        if samples is None:
            continue
        table = samples.read(run.root, bucket, SCORED, ["prompt_id", "reward"])
        means = table.group_by("prompt_id").aggregate([("reward", "mean")]).to_pydict()
        of_prompts = dict(zip(means["prompt_id"], means["reward_mean"], strict=True))
        found[trained.variant, trained.seed] = of_prompts
    return found


def _sums(job: VariantTable, measure: str, values: Values) -> Iterator[tuple[str, Crossed]]:
    if not values:
        return
    seeds = job.seeds
    for variant, own in seeds.items():
        yield variant, crossed_of([values[variant, seed] for seed in own])
    for a, b in job.contrasts:
        shared = [seed for seed in seeds[a] if seed in seeds[b]]
        pairs = [(values[a, seed], values[b, seed]) for seed in shared]
        if pairs:
            yield _name(a, b), crossed_of([_difference(*pair) for pair in pairs])


def _difference(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return {key: a[key] - b[key] for key in a.keys() & b.keys()}


def _name(a: str, b: str) -> str:
    return f"{a} - {b}"


def tabulate(job: VariantTable, sums: dict[Key, Crossed]) -> dict[str, Any]:
    """{measure: {"variants" or "contrasts": {name: mean, low, high, n, seeds {seed: mean}}}}.

    Null where there are too few prompts.
    """
    seeds = job.seeds
    shared = {_name(a, b): [s for s in seeds[a] if s in seeds[b]] for a, b in job.contrasts}
    table: dict[str, Any] = {}
    for measure in MEASURES:
        kinds = {"variants": seeds, "contrasts": shared}
        found = {
            kind: {
                name: _row(sums[measure, name], own)
                for name, own in names.items()
                if (measure, name) in sums
            }
            for kind, names in kinds.items()
        }
        table |= {measure: found} if found["variants"] else {}
    return table


def _row(sums: Crossed, seeds: list[int]) -> dict[str, Any]:
    means = [None if math.isnan(mean) else mean for mean in sums.seed_means]
    return plain(crossed_interval(sums)) | {"seeds": dict(zip(map(str, seeds), means, strict=True))}
