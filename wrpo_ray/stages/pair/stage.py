"""Selection and pairing, bucket by bucket: all of a prompt's candidates lie in one bucket."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wrpo_ray.config import AnswersConfig, PairConfig
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, buckets, read_bucket, write_shard
from wrpo_ray.data.samples import Prompts, Samples
from wrpo_ray.runtime import metrics
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.job import BaseJob, JobKind
from wrpo_ray.runtime.progress import log
from wrpo_ray.runtime.tasks import map_tasks
from wrpo_ray.stages.pair import overlap
from wrpo_ray.stages.pair.answers import Eligible, judge
from wrpo_ray.stages.pair.candidates import (
    Candidates,
    Verdicts,
    read_candidates,
    read_verdicts,
)
from wrpo_ray.stages.pair.select import (
    FOUND,
    NONE,
    REASONS,
    Outcomes,
    at,
    best_of,
    is_tied,
    pair,
)
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

WHOLE = Bucket(0, 1)
"""The bucket that all others lie in."""


# --- contamination -----------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalNgrams(BaseJob):
    """The distinct n-grams of the evaluation prompts, in one shard: there are few such prompts."""

    kind = JobKind.EVAL_NGRAMS

    prompts: Prompts
    ngram: int
    unspaced: bool = False
    """Whether these prompts, or those compared with them, have text in scripts without spaces, of
    which each letter is a word."""

    @property
    def step(self) -> Step:
        """The step."""
        key = {"ngram": self.ngram} | ({"unspaced": "letters"} if self.unspaced else {})
        return Step("eval-ngrams", key, (self.prompts.step,))

    def buckets(self, run: Run) -> list[Bucket]:
        """The units of work."""
        return [WHOLE]

    @property
    def row_source(self) -> Prompts:
        """At most one row a prompt."""
        return self.prompts

    @classmethod
    def run(cls, context: Run, jobs: list[EvalNgrams]) -> None:
        """Run the jobs together."""
        run(context, jobs)

    def fill(self, run: Run, bucket: Bucket) -> dict[str, int]:
        """Write the NGRAMS shard, sorted."""
        texts = _texts(self.prompts.read(run.root, bucket))
        known = np.unique(overlap.ngrams(texts, self.ngram)[0])
        table = pa.table([known], schema=records.NGRAMS)
        write_shard(run.root / self.step.folder, bucket, records.NGRAMS, table, "all")
        return {"prompts": len(texts), "rows": len(known)}


@dataclass(frozen=True)
class Contamination(BaseJob):
    """How much of each training prompt evaluation prompts have, too."""

    kind = JobKind.CONTAMINATION

    prompts: Prompts
    ngrams: EvalNgrams

    @property
    def step(self) -> Step:
        """The step."""
        config = {"splits": list(self.prompts.splits)}
        return Step("contamination", config, (self.prompts.step, self.ngrams.step))

    def buckets(self, run: Run) -> list[Bucket]:
        """The units of work."""
        return buckets(run.buckets)

    @property
    def row_source(self) -> Prompts:
        """At most one row a prompt."""
        return self.prompts

    @classmethod
    def run(cls, context: Run, jobs: list[Contamination]) -> None:
        """Run the jobs together."""
        run(context, jobs)

    def fill(self, run: Run, bucket: Bucket) -> dict[str, int]:
        """Write the bucket's OVERLAP shard."""
        prompts = self.prompts.read(run.root, bucket)
        known = _read_ngrams(run.root / self.ngrams.step.folder)
        shares = overlap.overlaps(_texts(prompts), self.ngrams.ngram, known)
        table = pa.table([prompts["prompt_id"], shares], schema=records.OVERLAP)
        write_shard(run.root / self.step.folder, bucket, records.OVERLAP, table, "all")
        return {"rows": len(shares), "contaminated": int((shares > 0).sum())}

    def without(self, run: Run, bucket: Bucket, prompts: pa.Table) -> pa.Table:
        """The bucket's prompts but for those that share anything."""
        table = read_bucket(run.root / self.step.folder, bucket, records.OVERLAP)
        shared = table.filter(pc.greater(table["overlap"], 0))["prompt_id"].combine_chunks()
        return prompts.filter(pc.invert(pc.is_in(prompts["prompt_id"], shared)))


def _texts(prompts: pa.Table) -> pa.Array:
    """What the users say in each prompt; a system prompt is no one's own."""
    said = [
        " ".join(m["content"] for m in messages if m["role"] == "user")
        for messages in prompts["messages"].to_pylist()
    ]
    return pa.array(said, pa.string())


@cache
def _read_ngrams(folder: Folder) -> np.ndarray:
    return read_bucket(folder, WHOLE, records.NGRAMS)["hash"].to_numpy()


# --- y_ws --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Scored answers, which of them may be used, and what a verifier said of them, if one did."""

    samples: tuple[Samples, ...]
    policies: AnswersConfig
    verdicts: tuple[Samples, ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps that made them."""
        return tuple(s.step for s in (*self.samples, *self.verdicts))

    @property
    def stores(self) -> tuple[str, ...]:
        """Names of the folders with the scored answers."""
        return tuple(f"{s.step.folder}/{s.part}".rstrip("/") for s in self.samples)

    def read(self, run: Run, bucket: Bucket, prompts: pa.Table) -> tuple[Candidates, Eligible]:
        """The candidates of these prompts (sorted; with `reference`), and what each may be."""
        ids = prompts["prompt_id"].combine_chunks()
        candidates = read_candidates(self.samples, run.root, bucket, ids)
        verdicts = self._verdicts(run, bucket, prompts, candidates)
        return candidates, judge(candidates, self.policies, verdicts)

    def _verdicts(
        self, run: Run, bucket: Bucket, prompts: pa.Table, candidates: Candidates
    ) -> Verdicts | None:
        if not self.verdicts:
            return None
        verifiable = pc.is_valid(prompts["reference"]).to_numpy()
        return read_verdicts(self.verdicts, run.root, bucket, candidates, verifiable)


@dataclass(frozen=True)
class Select(BaseJob):
    """y_ws of every prompt: the source-selection table, and the rows of SFT."""

    kind = JobKind.SELECT

    prompts: Prompts
    sources: Answers
    contamination: Contamination | None = None
    """What to leave out."""

    @property
    def step(self) -> Step:
        """The step."""
        config = {
            "splits": list(self.prompts.splits),
            "answers": self.sources.policies.identity(),
        }
        left_out = (self.contamination.step,) if self.contamination else ()
        return Step("select", config, (self.prompts.step, *self.sources.steps, *left_out))

    def buckets(self, run: Run) -> list[Bucket]:
        """The units of work."""
        return buckets(run.buckets)

    @property
    def row_source(self) -> Prompts:
        """At most one row a prompt."""
        return self.prompts

    @property
    def stores(self) -> tuple[str, ...]:
        """Those of the sources."""
        return self.sources.stores

    @classmethod
    def run(cls, context: Run, jobs: list[Select]) -> None:
        """Run the jobs together."""
        run(context, jobs)

    def fill(self, run: Run, bucket: Bucket) -> dict[str, int]:
        """Write the bucket's SELECTION shard and count wins by source."""
        prompts = self.prompts.read(run.root, bucket).sort_by("prompt_id")
        given = len(prompts)
        if self.contamination:
            prompts = self.contamination.without(run, bucket, prompts)
        count = len(prompts)
        candidates, eligible = self.sources.read(run, bucket, prompts)
        rewards, groups = candidates.rewards, candidates.prompts
        best = best_of(rewards, eligible.chosen, groups, count, candidates.ties)
        found = np.flatnonzero(best != NONE)
        kept = prompts.take(found)
        columns = {name: kept[name] for name in ("prompt_id", "messages", "split")} | {
            "source_chosen": candidates.answers(best[found]),
            "candidates": candidates.scores(count).take(found),
        }
        table = pa.table(columns, schema=records.SELECTION)
        write_shard(run.root / self.step.folder, bucket, records.SELECTION, table, "all")
        wins = candidates.by_source(best[found])
        splits = pc.value_counts(kept["split"]).to_pylist()
        return {
            **eligible.counts,
            **{f"wins.{source}": won for source, won in wins.items()},
            **{f"{split['values']}_rows": split["counts"] for split in splits},
            "rows": len(found),
            "candidates": len(candidates),
            "ties": int(is_tied(rewards, eligible.chosen, groups, best).sum()),
            "without_answer": count - len(found),
            **({"contaminated": given - count} if self.contamination else {}),
        }


# --- y_wt and y_l ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair(BaseJob):
    """(x, y_ws, y_wt, y_l) of the preference prompts."""

    kind = JobKind.PAIR

    select: Select
    answers: Answers
    """Those that y_wt and y_l are among: the target's own, or for `fusechat3` the sources'."""
    config: PairConfig

    @property
    def prompts(self) -> Prompts:
        """The preference prompts."""
        return self.answers.samples[0].prompts

    @property
    def step(self) -> Step:
        """The step."""
        config = {
            "pair": self.config.identity() | {"contamination": None},  # done by `select`
            "answers": self.answers.policies.identity(),
            "splits": list(self.prompts.splits),
        }
        return Step("pair", config, (self.select.step, *self.answers.steps))

    def buckets(self, run: Run) -> list[Bucket]:
        """The units of work."""
        return buckets(run.buckets)

    @property
    def row_source(self) -> Prompts:
        """At most one row a prompt."""
        return self.prompts

    @property
    def stores(self) -> tuple[str, ...]:
        """Those of the sources, and of the answers that y_wt and y_l are among."""
        return self.select.stores + self.answers.stores

    @classmethod
    def run(cls, context: Run, jobs: list[Pair]) -> None:
        """Run the jobs together."""
        run(context, jobs)

    def fill(self, run: Run, bucket: Bucket) -> dict[str, int]:
        """Write the bucket's PREFERENCE shard and count what was dropped and why."""
        selection = self._selection(run, bucket)
        count = len(selection)
        candidates, eligible = self.answers.read(run, bucket, selection)
        groups, prompts = candidates.groups, candidates.group_prompts
        best, worst, outcomes = pair(
            candidates.rewards, eligible.chosen, eligible.rejected, groups,
            len(prompts), candidates.ties, self.config.margins,
        )  # fmt: skip
        self._check_texts(outcomes, candidates, best, worst)
        if self.config.source_below_target == "drop":
            source = _field(selection, "source_chosen", "reward")
            outcomes.fail("source_below_target", source[prompts] < at(candidates.rewards, best))
        winners = best_of(
            at(candidates.rewards, best), outcomes.found, prompts, count,
            lambda found: candidates.ties(best[found]),
        )  # fmt: skip
        found = np.flatnonzero(winners != NONE)
        best, worst = best[winners[found]], worst[winners[found]]
        table = self._rows(selection, candidates, found, best, worst)
        write_shard(run.root / self.step.folder, bucket, records.PREFERENCE, table, "all")
        below = int((table["source_margin"].to_numpy() < 0).sum())
        numbers = {"prompts": count, "rows": len(found), "source_below_target": below}
        return {**eligible.counts, **_dropped(outcomes, prompts, count), **numbers}

    def _selection(self, run: Run, bucket: Bucket) -> pa.Table:
        """The bucket's preference prompts that have a y_ws, with their references."""
        table = read_bucket(run.root / self.select.step.folder, bucket, records.SELECTION)
        table = table.filter(pc.is_in(table["split"], pa.array(self.prompts.splits)))
        table = table.sort_by("prompt_id")
        if not self.answers.verdicts:
            return table
        columns = ["prompt_id", "split", "reference"]
        given = self.prompts.read(run.root, bucket, columns)
        places = pc.index_in(table["prompt_id"], value_set=given["prompt_id"].combine_chunks())
        return table.append_column("reference", given["reference"].take(places))

    def _check_texts(
        self, outcomes: Outcomes, candidates: Candidates, best: np.ndarray, worst: np.ndarray
    ) -> None:
        """Fail pairs of equal or too similar texts."""
        found = np.flatnonzero(outcomes.found)
        chosen, rejected = candidates.texts(best[found]), candidates.texts(worst[found])
        failing = np.zeros(len(best), bool)
        failing[found] = pc.equal(chosen, rejected).to_numpy()
        outcomes.fail("same_text", failing)
        limit = self.config.max_similarity
        if limit is not None:
            pairs = zip(chosen.to_pylist(), rejected.to_pylist(), strict=True)
            failing[found] = [overlap.similarity(*texts) > limit for texts in pairs]
            outcomes.fail("similar_text", failing)

    def _rows(
        self,
        selection: pa.Table,
        candidates: Candidates,
        found: np.ndarray,
        best: np.ndarray,
        worst: np.ndarray,
    ) -> pa.Table:
        """The PREFERENCE records of the prompts `found`, with these chosen and rejected answers."""
        kept, answers = selection.take(found), candidates.answers(np.append(best, worst))
        chosen, rejected = answers[: len(best)], answers[len(best) :]
        is_wrpo = self.config.policy == "wrpo"
        source = kept["source_chosen"].combine_chunks() if is_wrpo else chosen
        scores = kept["candidates"].combine_chunks()
        own = candidates.scores(len(selection)).take(found)
        rewards = candidates.rewards
        columns = {
            "prompt_id": kept["prompt_id"],
            "messages": kept["messages"],
            "source_chosen": source,
            "target_chosen": chosen,
            "rejected": rejected,
            "source_margin": source.field("reward").to_numpy() - rewards[best],
            "target_margin": rewards[best] - rewards[worst],
            "candidates": _joined(scores, own) if is_wrpo else scores,
        }
        return pa.table(columns, schema=records.PREFERENCE)


def _field(table: pa.Table, column: str, name: str) -> np.ndarray:
    return table[column].combine_chunks().field(name).to_numpy()


def _joined(first: pa.ListArray, second: pa.ListArray) -> pa.ListArray:
    """Lists of the first with the elements of the second's behind them."""
    lengths = np.stack([pc.list_value_length(x).to_numpy() for x in (first, second)], axis=1)
    values = pa.concat_arrays([first.flatten(), second.flatten()])
    starts = (np.cumsum(lengths.T) - lengths.T.ravel()).reshape(2, -1).T.ravel()
    counts = lengths.ravel()
    shifts = starts - (np.cumsum(counts) - counts)
    order = np.arange(len(values)) + np.repeat(shifts, counts)
    offsets = np.append(0, np.cumsum(lengths.sum(axis=1))).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, values.take(pa.array(order)), type=first.type)


def _dropped(outcomes: Outcomes, prompts: np.ndarray, count: int) -> dict[str, int]:
    """How many of `count` prompts have no pair, by the last reason that one of its groups met."""
    codes = np.full(count, REASONS.index("too_few"))
    np.maximum.at(codes, prompts, outcomes.codes)
    numbers = np.bincount(codes, minlength=FOUND)
    return {f"dropped.{r}": int(n) for r, n in zip(REASONS, numbers, strict=False) if n}


# --- running -----------------------------------------------------------------------------------

BucketJob = EvalNgrams | Contamination | Select | Pair


def run(run: Run, jobs: Sequence[BucketJob]) -> None:
    """Do each job; the driver sees counts only."""
    for job in jobs:
        started, totals = time.time(), Counter[str]()
        rows = ({"index": b.index, "count": b.count} for b in job.buckets(run))
        for counts in map_tasks(job.step.name, rows, partial(_fill, run, job)):
            totals.update(counts)
            metrics.add_counts(job.step, rows=counts["rows"])
        record = job.step.finish(run.root, dict(sorted(totals.items())), started)
        told = ", ".join(f"{name} {count:,}" for name, count in _told(record["counts"]).items())
        log(f"{job.step.name}  {told}")


def _fill(run: Run, job: BucketJob, row: dict[str, int]) -> dict[str, int]:
    return job.fill(run, Bucket(**row))


def _told(totals: dict[str, int]) -> dict[str, int]:
    """The counts without those by source: no wins, and answers by policy only."""
    told: Counter[str] = Counter()
    for name, count in totals.items():
        kind, _, rest = name.partition(".")
        if kind != "wins":
            told[f"{rest.partition('.')[0]} answers" if kind == "answers" else name] += count
    return told
