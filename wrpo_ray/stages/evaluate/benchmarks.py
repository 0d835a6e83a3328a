"""The public benchmarks, from their files: questions, baselines, judge templates; add one here.

The files are not part of this project; `fetch` downloads them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml

from wrpo_ray.data.buckets import buckets, write_shard
from wrpo_ray.data.records import ITEM
from wrpo_ray.errors import UserError
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.job import BaseJob, JobKind
from wrpo_ray.runtime.tasks import map_tasks
from wrpo_ray.stages.evaluate.protocols import (
    AlpacaEvalJudging,
    ArenaHardJudging,
    Item,
    Judging,
    MTBenchJudging,
)
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step
from wrpo_ray.text.documents import read_document, read_json
from wrpo_ray.text.files import decode

Row = dict[str, Any]
T = TypeVar("T")
GREEDY = "t0"
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1} | dict.fromkeys(
    ("extraction", "math", "coding", "reasoning"), 0.0
)
"""MT-Bench's sampling temperature by category; 0.7 for others."""
WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories for which MT-Bench's judge sees a reference answer."""
GAMED = "df_gamed.csv"
CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)\n?<\|im_end\|>", re.DOTALL)


def split_of(temperature: float) -> str:
    """The name of the split of questions that are answered at a temperature, such as `t0.7`."""
    return f"t{temperature:g}"


def read_items(name: str, folder: Folder) -> list[Item]:
    """Read a benchmark's questions (ITEM records), in the order of its file.

    Raises:
        UserError: a file is missing or malformed.
    """
    return _read(name, folder, _READERS[name])


def read_judging(name: str, folder: Folder) -> Judging:
    """Read the templates of a benchmark's judge.

    Raises:
        UserError: a file is missing or malformed.
    """
    return _read(name, folder, _JUDGINGS[name])


def _read(name: str, folder: Folder, read: Callable[[Folder], T]) -> T:
    """Call `read`; report an error of any kind as one of the benchmark's files."""
    try:
        return read(folder)
    except (OSError, LookupError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"evaluate.benchmarks.{name}: {folder} does not hold the benchmark's files "
            f"({type(error).__name__}: {reason}); `wrpo fetch {name} FOLDER` gets them"
        ) from None


# --- questions -------------------------------------------------------------------------------


def _item(
    name: str,
    index: int,
    turns: list[str],
    *,
    split: str = GREEDY,
    group: str | None = None,
    references: Sequence[str] = (),
    baseline: str | None = None,
) -> Item:
    return {
        # With the index, because a benchmark may ask the same question twice.
        "prompt_id": digest([name, index, turns]),
        "messages": [{"role": "user", "content": turns[0]}],
        "split": split,
        "reference": None,
        "group": group,
        "index": index,
        "turns": turns,
        "references": list(references),
        "baseline": baseline,
    }


def _alpaca_eval(folder: Folder) -> list[Item]:
    rows = folder.read_json("alpaca_eval_gpt4_baseline.json")
    return [
        _item("alpaca_eval", i, [r["instruction"]], baseline=r["output"], group=r.get("dataset"))
        for i, r in enumerate(rows)
    ]


def _arena_hard(folder: Folder) -> list[Item]:
    baseline = {r["question_id"]: _answer(r) for r in _jsonl(folder, "gpt-4-0314.jsonl")}
    return [
        _item("arena_hard", i, [r["turns"][0]["content"]], baseline=baseline[r["question_id"]])
        for i, r in enumerate(_jsonl(folder, "question.jsonl"))
    ]


def _answer(row: Row) -> str:
    text = row["choices"][0]["turns"][0]["content"]
    if not isinstance(text, str):
        raise TypeError(f"the baseline's answer to {row['question_id']} is not a text")
    return text


def _mt_bench(folder: Folder) -> list[Item]:
    right = {r["question_id"]: r["choices"][0]["turns"] for r in _jsonl(folder, "gpt-4.jsonl")}
    return [
        _item(
            "mt_bench",
            i,
            r["turns"],
            group=r["category"],
            split=split_of(TEMPERATURES.get(r["category"], 0.7)),
            references=right[r["question_id"]] if r["category"] in WITH_REFERENCE else [],
        )
        for i, r in enumerate(_jsonl(folder, "question.jsonl"))
    ]


def _jsonl(folder: Folder, name: str) -> list[Row]:
    lines = decode(folder.read(name), f"{folder}/{name}").split("\n")
    return [read_json(line) for line in lines if line.strip()]


# --- templates -------------------------------------------------------------------------------


def _alpaca_judging(folder: Folder) -> AlpacaEvalJudging:
    name = "alpaca_eval_clf.txt"
    template = tuple(CHATML.findall(decode(folder.read(name), f"{folder}/{name}")))
    text = "".join(text for _, text in template)
    if not all(f"{{{name}}}" in text for name in ("instruction", "output_1", "output_2")):
        raise ValueError("alpaca_eval_clf.txt has no <|im_start|> messages with both outputs")
    return AlpacaEvalJudging(template)


def _arena_judging(folder: Folder) -> ArenaHardJudging:
    settings = read_document(folder.read("judge_config.yaml"))
    return ArenaHardJudging(settings["system_prompt"], settings["prompt_template"][0])


def _mt_judging(folder: Folder) -> MTBenchJudging:
    rows = {r["name"]: r for r in _jsonl(folder, "judge_prompts.jsonl")}
    names = [f"single-{kind}v1{turn}" for kind in ("", "math-") for turn in ("", "-multi-turn")]
    return MTBenchJudging(
        tuple((n, rows[n]["system_prompt"], rows[n]["prompt_template"]) for n in names)
    )


_READERS = {"alpaca_eval": _alpaca_eval, "arena_hard": _arena_hard, "mt_bench": _mt_bench}
_JUDGINGS: dict[str, Callable[[Folder], Judging]] = {
    "alpaca_eval": _alpaca_judging,
    "arena_hard": _arena_judging,
    "mt_bench": _mt_judging,
}


# --- the step --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadBenchmark(BaseJob):
    """Write a benchmark's questions into ITEM shards."""

    kind = JobKind.READ_BENCHMARK

    name: str
    folder: Folder
    items: tuple[str, ...]
    """The questions' ids."""
    version: str
    """A hash of the questions, which determines the step key."""

    @staticmethod
    def of(name: str, folder: Folder) -> ReadBenchmark:
        """Create the job for a folder's files."""
        rows = read_items(name, folder)
        return ReadBenchmark(name, folder, tuple(r["prompt_id"] for r in rows), digest(rows, 16))

    @property
    def step(self) -> Step:
        """The step of the output folder."""
        return Step(f"benchmark-{self.name}", {"content": self.version})

    @property
    def row_source(self) -> int:
        """The number of questions."""
        return len(self.items)

    @classmethod
    def run(cls, run: Run, jobs: list[ReadBenchmark]) -> None:
        """Write each benchmark's questions, a few MB, in one task each."""
        for job in jobs:
            started = time.time()
            tasks = iter([{"job": job, "run": run}])
            counts = [r["rows"] for r in map_tasks(job.step.name, tasks, _write)]
            job.step.finish(run.root, {"rows": sum(counts)}, started)


def _write(task: dict[str, Any]) -> dict[str, Any]:
    job, run = task["job"], task["run"]
    rows = read_items(job.name, job.folder)
    for bucket in buckets(run.buckets):
        if found := [row for row in rows if row["prompt_id"] in bucket]:
            write_shard(run.root / job.step.folder, bucket, ITEM, found, "all")
    return {"rows": len(rows)}
