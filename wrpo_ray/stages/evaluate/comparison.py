"""The comparison table of a run: each benchmark's figures by model, and those of pairs of models.

Each task reads the verdicts (numbers, no texts) of one benchmark or one pair. Pairs that are
compared by reward are read from the scores.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

import pyarrow as pa

from wrpo_ray.data.buckets import buckets, read_bucket
from wrpo_ray.data.records import JUDGMENT, SCORED
from wrpo_ray.data.samples import Prompts, Samples
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.job import BaseJob, JobKind
from wrpo_ray.runtime.tasks import map_tasks
from wrpo_ray.stages.evaluate.alpaca_eval import alpaca_eval, read_reference
from wrpo_ray.stages.evaluate.arena_hard import Games, Style, arena_hard, length_of, style_of
from wrpo_ray.stages.evaluate.benchmarks import GAMED
from wrpo_ray.stages.evaluate.mt_bench import Rating, mt_bench
from wrpo_ray.stages.evaluate.pairwise import Comparison, pairwise, share_of_games, share_of_rewards
from wrpo_ray.stages.evaluate.questions import items
from wrpo_ray.stages.evaluate.verdicts import Verdicts, once
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

Row = dict[str, Any]
FILE = "comparison.json"
CONTROLLED = ("alpaca_eval", "pairwise")
"""Comparisons with length-controlled figures."""


@dataclass(frozen=True)
class RewardPair:
    """A comparison of two models by their rewards on the same prompts."""

    a: str
    b: str
    rewards: tuple[tuple[Samples, ...], tuple[Samples, ...]]
    """The scored answers of each model; the best answer to a prompt counts."""
    prompts: Prompts
    margin: float


@dataclass(frozen=True)
class Compare(BaseJob):
    """Write the comparison table of a run."""

    kind = JobKind.COMPARE

    verdicts: tuple[Verdicts, ...]
    reward_pairs: tuple[RewardPair, ...]
    judge: str | None
    reference: Folder | None
    """AlpacaEval's folder, for its data on length control."""
    style_control: bool = False
    """Whether to also compute Arena-Hard's figures with style control."""

    @cached_property
    def step(self) -> Step:
        """The step of the output folder."""
        inputs = [v.step for v in self.verdicts]
        inputs += [s.step for p in self.reward_pairs for side in p.rewards for s in side]
        pairs = [[p.a, p.b, p.margin] for p in self.reward_pairs]
        config: dict[str, Any] = {"reward_pairs": pairs}
        config |= {"style_control": True} if self.style_control else {}
        controls = self.reward_pairs or any(v.judging.name in CONTROLLED for v in self.verdicts)
        config |= {"length_control": 2} if controls else {}
        return Step("comparison", config, once(inputs))

    @property
    def row_source(self) -> int:
        """The rows of the table."""
        return len(self.verdicts) + len(self.reward_pairs)

    @classmethod
    def run(cls, run: Run, jobs: list[Self]) -> None:
        """Write each job's table."""
        for job in jobs:
            started = time.time()
            pairs: list[Any] = [v for v in job.verdicts if v.against] + list(job.reward_pairs)
            tasks: list[Row] = [{"benchmark": v} for v in job.benchmarks().values()]
            tasks += [{"pair": pair} for pair in pairs]
            rows = (task | {"run": run, "number": i, "job": job} for i, task in enumerate(tasks))
            found = {r["number"]: r for r in map_tasks(job.step.name, rows, _figures)}
            results = [found[i] for i in range(len(tasks))]
            table = {
                "judge": job.judge,
                "benchmarks": {r["name"]: r["models"] for r in results if "models" in r},
                "pairs": [r["pair"] for r in results if "pair" in r],
            }
            (run.root / job.step.folder).write_json(FILE, _without_nan(table))
            job.step.finish(run.root, {"rows": job.row_source}, started)

    def benchmarks(self) -> dict[str, list[Verdicts]]:
        """The verdicts on models, by benchmark."""
        found: dict[str, list[Verdicts]] = defaultdict(list)
        for verdicts in self.verdicts:
            if verdicts.against is None:
                found[verdicts.judging.name].append(verdicts)
        return found


def _figures(task: Row) -> Row:
    """Compute the figures of one benchmark or pair, ready for JSON."""
    run, place = task["run"], {"number": task["number"]}
    if "pair" in task:
        return place | {"pair": _pair(run, task["pair"])}
    all_verdicts: list[Verdicts] = task["benchmark"]
    name = all_verdicts[0].judging.name
    rows = {v.model: _read(run, v) for v in all_verdicts}
    kinds = {"alpaca_eval": _alpaca_eval, "arena_hard": _arena_hard, "mt_bench": _mt_bench}
    figures = kinds[name](rows, task["job"])
    if name == "arena_hard" and task["job"].style_control:
        controlled = _style_controlled(run, all_verdicts, rows)
        figures = {m: f | {"style_controlled": controlled[m]} for m, f in figures.items()}
    models = {model: figures[model] | _tokens_per_answer(rows[model]) for model in rows}
    return place | {"name": name, "models": models}


def _read(run: Run, verdicts: Verdicts) -> list[Row]:
    """A job's JUDGMENT rows, in the order of the questions."""
    folder = run.root / verdicts.step.folder
    tables = [read_bucket(folder, b, JUDGMENT) for b in buckets(run.buckets)]
    rows = pa.concat_tables(tables).to_pylist()
    return sorted(rows, key=lambda r: (r["index"] or 0, r["prompt_id"], r["position"]))


def _tokens_per_answer(rows: list[Row]) -> Row:
    """Mean output tokens of an answer, of all models that contributed to it."""
    by_prompt = {r["prompt_id"]: r["tokens"] for r in rows}
    return {"tokens": sum(by_prompt.values()) / len(by_prompt) if by_prompt else math.nan}


def _alpaca_eval(models: dict[str, list[Row]], job: Compare) -> dict[str, Row]:
    assert job.reference is not None
    reference = read_reference(job.reference.local() / GAMED)
    return {
        model: asdict(
            alpaca_eval(
                pa.table(
                    {
                        "index": [r["index"] for r in rows],
                        "preference": pa.array([r["value"] for r in rows], pa.float64()),
                        "len_1": [r["other_length"] for r in rows],
                        "len_2": [r["length"] for r in rows],
                    }
                ),
                reference,
            )
        )
        for model, rows in models.items()
    }


def _arena_hard(models: dict[str, list[Row]], job: Compare) -> dict[str, Row]:
    board = {
        model: [Games(games.get(1), games.get(2)) for games in _by_prompt(rows, "label").values()]
        for model, rows in models.items()
    }
    return {model: asdict(figures) for model, figures in arena_hard(board).items()}


def _style_controlled(
    run: Run, all_verdicts: list[Verdicts], models: dict[str, list[Row]]
) -> dict[str, Row]:
    """Each model's win rate and interval, adjusted for the style of the answers."""
    board = {}
    for verdicts in all_verdicts:
        styles = _styles(run, verdicts)
        games = _by_prompt(models[verdicts.model], "label")
        board[verdicts.model] = [
            Games(labels.get(1), labels.get(2), *styles.get(key, (None, None)))
            for key, labels in games.items()
        ]
    figures = arena_hard(board, style_control=True)
    return {m: {n: asdict(f)[n] for n in ("win_rate", "low", "high")} for m, f in figures.items()}


def _styles(run: Run, verdicts: Verdicts) -> dict[str, tuple[Style, Style]]:
    """The styles of the baseline's and the model's answer, for each prompt that has an answer."""
    found = {}
    for bucket in buckets(run.buckets):
        answers = verdicts.answers[0].read(run.root, bucket)
        for item in items(verdicts.prompts, verdicts.judging.schema, run.root, bucket):
            if answer := answers.get(item["prompt_id"]):
                texts = item["baseline"] or "", answer.text
                first, second = (style_of(text, length_of(text)) for text in texts)
                found[item["prompt_id"]] = first, second
    return found


def _mt_bench(models: dict[str, list[Row]], job: Compare) -> dict[str, Row]:
    return {
        model: asdict(
            mt_bench([Rating(r["index"], r["position"], r["group"], r["value"]) for r in rows])
        )
        for model, rows in models.items()
    }


def _by_prompt(rows: list[Row], column: str) -> dict[str, dict[int, Any]]:
    """{prompt id: {position: value}}, in the order of the rows."""
    found: dict[str, dict[int, Any]] = defaultdict(dict)
    for row in rows:
        found[row["prompt_id"]][row["position"]] = row[column]
    return found


def _pair(run: Run, pair: Verdicts | RewardPair) -> Row:
    if isinstance(pair, RewardPair):
        names = {"a": pair.a, "b": pair.b, "by": "reward"}
        return names | asdict(pairwise(list(_reward_comparisons(run, pair))))
    rows = _read(run, pair)
    lengths = {r["prompt_id"]: (r["length"], r["other_length"]) for r in rows}
    comparisons = [
        Comparison(share_of_games(games.get(1), games.get(2)), lengths[key])
        for key, games in _by_prompt(rows, "value").items()
    ]
    return {"a": pair.model, "b": pair.against, "by": "judge"} | asdict(pairwise(comparisons))


def _reward_comparisons(run: Run, pair: RewardPair) -> Iterator[Comparison]:
    for bucket in buckets(run.buckets):
        sides = [_best(run, side, bucket) for side in pair.rewards]
        columns = ["prompt_id", "split"]
        for key in pair.prompts.read(run.root, bucket, columns)["prompt_id"].to_pylist():
            found = [side.get(key) for side in sides]
            if None in found:
                yield Comparison(None, (0, 0))
            else:
                (first, one), (second, other) = (f for f in found if f)
                yield Comparison(share_of_rewards(first, second, pair.margin), (one, other))


def _best(run: Run, stores: tuple[Samples, ...], bucket: Any) -> dict[str, tuple[float, int]]:
    """(reward, length) of each prompt's best answer."""
    best: dict[str, tuple[float, int]] = {}
    for samples in stores:
        table = samples.read(run.root, bucket, SCORED, ["prompt_id", "reward", "text"])
        for row in table.to_pylist():
            key = row["prompt_id"]
            if key not in best or row["reward"] > best[key][0]:
                best[key] = row["reward"], len(row["text"])
    return best


def _without_nan(value: Any) -> Any:
    """Replace NaN, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {str(k): _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
