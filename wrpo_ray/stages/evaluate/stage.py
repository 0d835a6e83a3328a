"""The held-out comparison: mean reward and accuracy of each model, with intervals."""

import json
import time
from dataclasses import dataclass
from typing import Any, Self

from wrpo_ray.config import Actors
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, buckets
from wrpo_ray.data.references import unpack_reference
from wrpo_ray.data.samples import Prompts, Samples
from wrpo_ray.runtime import metrics
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.job import BaseJob, JobKind
from wrpo_ray.runtime.placement import Pool
from wrpo_ray.runtime.pool import map_rows
from wrpo_ray.stages.evaluate.statistics import Sums, normal_interval, plain, wilson_interval
from wrpo_ray.storage.steps import Step

Row = dict[str, Any]
ALL = "all"
UNGROUPED = "no group"
"""Column of the prompts without a group where there is none of all prompts."""
TABLE, EXAMPLE = "table.json", "example.json"
Key = tuple[str, str, str]
"""(measure, model or contrast, group)"""


@dataclass(frozen=True)
class ScoredModel:
    """A model to compare, with its answers scored by rewards, the verifier, or both."""

    name: str
    rewarded: tuple[Samples, ...]
    """By each reward those to the prompts of its groups; empty without."""
    verified: tuple[Samples, ...]

    def answers(self, measure: str) -> tuple[Samples, ...]:
        """The answers scored by a measure, `reward` or `accuracy`."""
        return self.rewarded if measure == "reward" else self.verified


@dataclass(frozen=True)
class Evaluate(BaseJob):
    """Compare models on held-out prompts: mean reward and accuracy, with intervals."""

    kind = JobKind.EVALUATE

    prompts: Prompts
    models: tuple[ScoredModel, ...]
    contrasts: tuple[tuple[str, str], ...]
    """Pairs (a, b) of names: the paired difference a - b is estimated as well."""

    @property
    def step(self) -> Step:
        """The step of the output folder."""
        inputs = [self.prompts.step]
        for model in self.models:
            inputs += [s.step for s in (*model.rewarded, *model.verified)]
        config = {"models": [m.name for m in self.models], "contrasts": self.contrasts}
        return Step("evaluate", config, tuple(inputs))

    def has_scales(self, measure: str) -> bool:
        """Whether prompts of different groups are measured on different scales."""
        return len(self.models[0].answers(measure)) > 1

    @property
    def row_source(self) -> Prompts:
        """The held-out prompts."""
        return self.prompts

    @classmethod
    def run(cls, run: Run, jobs: list[Self]) -> None:
        """Write each job's table and one example prompt."""
        for job in jobs:
            started = time.time()
            sums: dict[Key, Sums] = {}
            examples: list[dict[str, Any]] = []
            rows = [{"bucket": b.index} for b in buckets(run.buckets)]
            pool = Pool(job.step.name, Actors(num_cpus=0.5, max=64))
            for result in map_rows(pool, rows, Summer, {"run": run, "job": job}):
                part = json.loads(result["part"])
                for key, values in part["sums"]:
                    measure, name, group = key
                    sums[measure, name, group] = sums.get((measure, name, group), Sums()) + Sums(
                        *values
                    )
                examples += part["examples"]
            folder = run.root / job.step.folder
            table = tabulate(job, sums)
            folder.write_json(TABLE, table)
            # One example of all buckets is kept: first where the models differ, then by prompt id.
            folder.write_json(
                EXAMPLE,
                min(examples, key=lambda e: (not e["told_apart"], e["prompt_id"]), default=None),
            )
            rows_compared = sums[_measures(job)[0], job.models[0].name, ALL].n
            metrics.add_counts(job.step, rows=rows_compared)
            job.step.finish(run.root, {"rows": rows_compared}, started)


def _measures(job: Evaluate) -> list[str]:
    return [measure for measure in ("reward", "accuracy") if job.models[0].answers(measure)]


def tabulate(job: Evaluate, sums: dict[Key, Sums]) -> dict[str, Any]:
    """{measure: {"models": {name: {group: estimate}}, "contrasts": {"a - b": estimate}}}.

    Where groups have scales of their own, nothing is estimated over all prompts, and there is a
    contrast "a - b, group" for each group.
    """
    names = [m.name for m in job.models]
    groups = [*sorted({group for _, _, group in sums} - {ALL}), ALL]
    table: dict[str, Any] = {"groups": groups}
    for measure in _measures(job):
        interval = wilson_interval if measure == "accuracy" else normal_interval
        by_group = job.has_scales(measure)
        shown = dict(sums) | {(measure, name, ALL): Sums() for name in names if by_group}
        of_contrasts = {ALL: ""} if not by_group else {g: f", {g}" for g in groups if g != ALL}
        table[measure] = {
            "models": {
                name: {g: plain(interval(shown.get((measure, name, g), Sums()))) for g in groups}
                for name in names
            },
            "contrasts": {
                f"{a} - {b}{told}": plain(
                    normal_interval(sums.get((measure, f"{a} - {b}", group), Sums()))
                )
                for a, b in job.contrasts
                for group, told in of_contrasts.items()
            },
        }
    return table


class Summer:
    """The actor. It returns sums and at most one example for each bucket, not rows."""

    def __init__(self, run: Run, job: Evaluate):
        self.run, self.job = run, job

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The sums of one bucket."""
        bucket = self.run.bucket(row["bucket"])
        prompts = {
            p["prompt_id"]: p for p in self.job.prompts.read(self.run.root, bucket).to_pylist()
        }
        sums: list[tuple[Key, tuple[int, float, float]]] = []
        accuracy: dict[str, dict[str, float]] = {}
        for measure in _measures(self.job):
            means = {m.name: self._means(m, measure, bucket) for m in self.job.models}
            sums += [
                (key, (s.n, s.total, s.squares)) for key, s in self._sums(measure, means, prompts)
            ]
            accuracy = means if measure == "accuracy" else {}
        return row | {
            "part": json.dumps({"sums": sums, "examples": self._example(accuracy, prompts, bucket)})
        }

    def _answers(
        self, model: ScoredModel, measure: str, bucket: Bucket, column: str
    ) -> dict[str, list[Any]]:
        """A column of the model's answers by prompt id, one value for each sample."""
        names = ["prompt_id", "source", "sample", column]
        values: dict[str, list[Any]] = {}
        for samples in model.answers(measure):
            table = samples.read(self.run.root, bucket, records.SCORED, names)
            for key, value in zip(
                table["prompt_id"].to_pylist(), table[column].to_pylist(), strict=True
            ):
                values.setdefault(key, []).append(value)
        return values

    def _means(self, model: ScoredModel, measure: str, bucket: Bucket) -> dict[str, float]:
        """The mean over each prompt's samples."""
        values = self._answers(model, measure, bucket, "reward")
        return {key: sum(v) / len(v) for key, v in values.items()}

    def _sums(
        self, measure: str, means: dict[str, dict[str, float]], prompts: dict[str, Row]
    ) -> list[tuple[Key, Sums]]:
        by_group = self.job.has_scales(measure)
        found: list[tuple[Key, Sums]] = []
        for name, by_prompt in means.items():
            groups: dict[str, list[float]] = {ALL: list(by_prompt.values())}
            for key, value in by_prompt.items():
                group = prompts[key]["group"] or (UNGROUPED if by_group else "")
                groups.setdefault(group, []).append(value)
            groups.pop("", None)
            found += [((measure, name, group), Sums.of(v)) for group, v in groups.items()]
        for a, b in self.job.contrasts:
            differences: dict[str, list[float]] = {} if by_group else {ALL: []}
            for key in sorted(means[a].keys() & means[b].keys()):
                group = (prompts[key]["group"] or UNGROUPED) if by_group else ALL
                differences.setdefault(group, []).append(means[a][key] - means[b][key])
            name = f"{a} - {b}"
            found += [((measure, name, group), Sums.of(v)) for group, v in differences.items()]
        return found

    def _example(
        self, accuracy: dict[str, dict[str, float]], prompts: dict[str, Row], bucket: Bucket
    ) -> list[dict[str, Any]]:
        """A prompt, with both answers, that only the first contrast's better model gets right."""
        if not self.job.contrasts or not prompts:
            return []
        better, worse = self.job.contrasts[0]
        won = [
            k
            for k in prompts
            if accuracy and accuracy[better].get(k, 0) > accuracy[worse].get(k, 0)
        ]
        key = min(won, default=min(prompts))
        models, measure = {m.name: m for m in self.job.models}, _measures(self.job)[0]
        answers = {
            name: self._answers(models[name], measure, bucket, "text").get(key, [""])[0]
            for name in (worse, better)
        }
        prompt = prompts[key]
        return [
            {
                "prompt_id": key,
                "messages": prompt["messages"],
                "reference": unpack_reference(prompt["reference"]),
                "answers": answers,
                "told_apart": bool(won),
            }
        ]
