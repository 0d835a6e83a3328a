"""Selection and pairing, bucket by bucket: all of a prompt's candidates lie in one bucket."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from wrpo_ray.config import Actors
from wrpo_ray.core import records
from wrpo_ray.core.cluster import Pool, map_rows
from wrpo_ray.core.progress import log
from wrpo_ray.core.run import Run
from wrpo_ray.core.shards import Bucket, Prompts, Samples, buckets, read_bucket, write_shard
from wrpo_ray.core.steps import Step
from wrpo_ray.pair.select import by_prompt, pair, select

Row = dict[str, Any]
USED = ["prompt_id", "source", "sample", "text", "token_ids", "finish_reason", "reward"]
"""The columns of a candidate that selection reads."""


@dataclass(frozen=True)
class Select:
    """y_ws of every prompt: the source-selection table, and the rows of SFT."""

    prompts: Prompts
    sources: tuple[Samples, ...]

    @property
    def step(self) -> Step:
        """The step."""
        inputs = (self.prompts.step, *(s.step for s in self.sources))
        return Step("select", {"splits": list(self.prompts.splits)}, inputs)

    def fill(self, run: Run, bucket: Bucket) -> dict[str, int]:
        """Write the bucket's SELECTION shard and count wins by source."""
        candidates = [c for s in self.sources for c in _read(s, run, bucket)]
        groups = by_prompt(candidates)
        prompts = self.prompts.read(run.root, bucket).to_pylist()
        rows = [select(p, groups[p["prompt_id"]]) for p in prompts if p["prompt_id"] in groups]
        rows.sort(key=lambda row: row["prompt_id"])
        folder = run.root / self.step.folder
        write_shard(folder, bucket, records.SELECTION, rows, "all")
        wins = Counter(f"wins.{r['source_chosen']['source']}" for r in rows)
        splits = Counter(f"{r['split']}_rows" for r in rows)
        return {
            **wins,
            **splits,
            "rows": len(rows),
            "candidates": len(candidates),
            "ties": sum(map(_is_tied, rows)),
            "without_answer": len(prompts) - len(rows),
        }


@dataclass(frozen=True)
class Pair:
    """(x, y_ws, y_wt, y_l) of the preference prompts."""

    select: Select
    own: Samples
    source_below_target: Literal["keep", "drop"]

    @property
    def step(self) -> Step:
        """The step."""
        config = {
            "source_below_target": self.source_below_target,
            "splits": self.own.prompts.splits,
        }
        return Step("pair", config, (self.select.step, self.own.step))

    def fill(self, run: Run, bucket: Bucket) -> dict[str, int]:
        """Write the bucket's PREFERENCE shard and count what was dropped and why."""
        own = by_prompt(_read(self.own, run, bucket))
        table = read_bucket(run.root / self.select.step.folder, bucket, records.SELECTION)
        chosen = [r for r in table.to_pylist() if r["split"] in self.own.prompts.splits]
        results = [pair(r, own.get(r["prompt_id"], []), self.source_below_target) for r in chosen]
        rows = [r for r in results if isinstance(r, dict)]
        write_shard(run.root / self.step.folder, bucket, records.PREFERENCE, rows, "all")
        dropped = Counter(f"dropped.{r}" for r in results if isinstance(r, str))
        below = sum(r["source_margin"] < 0 for r in rows)
        found = {"prompts": len(chosen), "rows": len(rows), "source_below_target": below}
        return {**dropped, **found}


def run(run: Run, jobs: list[Select | Pair]) -> None:
    """Do each job."""
    for job in jobs:
        started = time.time()
        counts: Counter[str] = Counter()
        rows = [{"bucket": b.index} for b in buckets(run.buckets)]
        pool = Pool(job.step.name, Actors(num_cpus=0.5, max=64))
        for result in map_rows(pool, rows, Filler, {"run": run, "job": job}):
            counts.update(json.loads(result["counts"]))
        totals = dict(sorted(counts.items()))
        job.step.finish(run.root, totals, started)
        told = {k: v for k, v in totals.items() if not k.startswith("wins.")}
        log(f"{job.step.name}  " + ", ".join(f"{k} {v:,}" for k, v in told.items()))


class Filler:
    """The Ray Data actor; what is returned are counts only."""

    def __init__(self, run: Run, job: Select | Pair):
        self.run, self.job = run, job

    def __call__(self, row: Row) -> Row:
        """Fill one bucket."""
        counts = self.job.fill(self.run, Bucket(row["bucket"], self.run.buckets))
        return row | {"counts": json.dumps(counts)}


def _read(samples: Samples, run: Run, bucket: Bucket) -> list[Row]:
    return samples.read(run.root, bucket, records.SCORED, USED).to_pylist()


def _is_tied(row: Row) -> bool:
    best = row["source_chosen"]["reward"]
    return sum(c["reward"] == best for c in row["candidates"]) > 1
