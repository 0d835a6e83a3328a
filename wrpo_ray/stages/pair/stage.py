"""Jobs of selection and pairing, bucket by bucket: a bucket holds all answers to its prompts."""

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
from wrpo_ray.data.group_counts import MARK, Number
from wrpo_ray.data.samples import Prompts, Samples, of_splits, sorted_by_prompt
from wrpo_ray.data.shards import in_one, share_layouts
from wrpo_ray.runtime import metrics
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.job import BaseJob, JobKind
from wrpo_ray.runtime.progress import log
from wrpo_ray.runtime.tasks import map_tasks
from wrpo_ray.stages.pair import overlap, pairs
from wrpo_ray.stages.pair.candidates import Candidates, Verdicts, read_candidates, read_verdicts
from wrpo_ray.stages.pair.eligibility import Eligible, eligible_answers
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

WHOLE = Bucket(0, 1)
"""One bucket of all prompts."""


class BucketJob(BaseJob):
    """A job with a task for each bucket: `fill` writes its shard and returns counts."""

    def buckets(self, run: Run) -> list[Bucket]:
        """The buckets that `fill` is called for."""
        return buckets(run.buckets)

    @classmethod
    def run(cls, run: Run, jobs: Sequence[AnyBucketJob]) -> None:
        """Run each job; its tasks return only counts to the driver."""
        for job in jobs:
            started, totals = time.time(), Counter[str]()
            rows = ({"index": b.index, "count": b.count} for b in job.buckets(run))
            given = job.row_source
            prompts = [run.root / given.step.folder] if isinstance(given, Prompts) else []
            seen = run.having_seen((run.root / store for store in job.stores), prompts)
            for counts in map_tasks(job.step.name, rows, partial(_fill, seen, job)):
                totals.update(counts)
                metrics.add_counts(job.step, rows=counts["rows"])
            record = job.step.finish(run.root, dict(sorted(totals.items())), started)
            shown = _without_sources(record["counts"]).items()
            log(f"{job.step.name}  {', '.join(f'{name} {count:,}' for name, count in shown)}")


def _fill(run: Run, job: AnyBucketJob, row: dict[str, int]) -> dict[str, Number]:
    index, count = row["index"], row["count"]
    share_layouts(run.session, run.layouts)
    return job.fill(run, run.bucket(index) if count == run.buckets else Bucket(index, count))


def _without_sources(totals: dict[str, int]) -> dict[str, int]:
    """The counts for the log: none by source or group, one count of answers for each policy."""
    shown: Counter[str] = Counter()
    for name, count in totals.items():
        kind, _, rest = name.partition(".")
        if kind != "wins" and not name.startswith(MARK):
            shown[f"{rest.partition('.')[0]} answers" if kind == "answers" else name] += count
    return shown


# --- contamination -----------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalNgrams(BucketJob):
    """The distinct n-grams of the evaluation prompts, in one shard: there are few such prompts."""

    kind = JobKind.EVAL_NGRAMS

    prompts: Prompts
    ngram: int
    unspaced: bool = False
    """Whether these prompts, or the training prompts, have text in scripts without spaces, where
    each letter counts as a word."""

    @property
    def step(self) -> Step:
        """The step of the output folder."""
        key = {"ngram": self.ngram} | ({"unspaced": "letters"} if self.unspaced else {})
        return Step("eval-ngrams", key, (self.prompts.step,))

    def buckets(self, run: Run) -> list[Bucket]:
        """The buckets that `fill` is called for."""
        return [WHOLE]

    @property
    def row_source(self) -> Prompts:
        """At most one row a prompt."""
        return self.prompts

    def fill(self, run: Run, bucket: Bucket) -> dict[str, Number]:
        """Write the NGRAMS shard, sorted by hash."""
        texts = _texts(self.prompts.read(run.root, bucket))
        known = np.unique(overlap.ngrams(texts, self.ngram)[0])
        table = pa.table([known], schema=records.NGRAMS)
        write_shard(run.root / self.step.folder, bucket, records.NGRAMS, table, "all")
        return {"prompts": len(texts), "rows": len(known)}


@dataclass(frozen=True)
class Contamination(BucketJob):
    """The share of each training prompt's n-grams that evaluation prompts have too."""

    kind = JobKind.CONTAMINATION

    prompts: Prompts
    ngrams: EvalNgrams

    @property
    def step(self) -> Step:
        """The step of the output folder."""
        config = {"splits": list(self.prompts.splits)}
        return Step("contamination", config, (self.prompts.step, self.ngrams.step))

    @property
    def row_source(self) -> Prompts:
        """At most one row a prompt."""
        return self.prompts

    def fill(self, run: Run, bucket: Bucket) -> dict[str, Number]:
        """Write the bucket's OVERLAP shard."""
        prompts = self.prompts.read(run.root, bucket)
        known = _read_ngrams(run.root / self.ngrams.step.folder)
        shares = overlap.overlaps(_texts(prompts), self.ngrams.ngram, known)
        table = pa.table([prompts["prompt_id"], shares], schema=records.OVERLAP)
        write_shard(run.root / self.step.folder, bucket, records.OVERLAP, table, "all")
        return {"rows": len(shares), "contaminated": int((shares > 0).sum())}

    def without(self, run: Run, bucket: Bucket, prompts: pa.Table) -> pa.Table:
        """The bucket's prompts without those that share an n-gram with an evaluation prompt."""
        table = read_bucket(run.root / self.step.folder, bucket, records.OVERLAP)
        shared = table.filter(pc.greater(table["overlap"], 0))["prompt_id"].combine_chunks()
        return prompts.filter(pc.invert(pc.is_in(prompts["prompt_id"], shared)))


def _texts(prompts: pa.Table) -> pa.Array:
    """The user messages of each prompt; many prompts share one system message."""
    texts = [
        " ".join(m["content"] for m in messages if m["role"] == "user")
        for messages in prompts["messages"].to_pylist()
    ]
    return pa.array(texts, pa.string())


@cache
def _read_ngrams(folder: Folder) -> overlap.Hashes:
    hashes: overlap.Hashes = read_bucket(folder, WHOLE, records.NGRAMS)["hash"].to_numpy()
    return hashes


# --- y_ws --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Scored answers, the policies on which of them may be used, and a verifier's outcomes."""

    samples: tuple[Samples, ...]
    policies: AnswersConfig
    verdicts: tuple[Samples, ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps that wrote the scores and the outcomes."""
        return tuple(s.step for s in (*self.samples, *self.verdicts))

    @property
    def stores(self) -> tuple[str, ...]:
        """Names of the folders with the scored answers."""
        return tuple(f"{s.step.folder}/{s.part}".rstrip("/") for s in self.samples)

    def read(self, run: Run, bucket: Bucket, prompts: pa.Table) -> tuple[Candidates, Eligible]:
        """The candidates of these prompts (sorted, with `reference`), and which may be used."""
        ids = in_one(prompts["prompt_id"])
        candidates = read_candidates(self.samples, run.root, bucket, ids)
        verdicts = self._verdicts(run, bucket, prompts, candidates)
        return candidates, eligible_answers(candidates, self.policies, verdicts)

    def _verdicts(
        self, run: Run, bucket: Bucket, prompts: pa.Table, candidates: Candidates
    ) -> Verdicts | None:
        if not self.verdicts:
            return None
        verifiable = pc.is_valid(prompts["reference"]).to_numpy()
        return read_verdicts(self.verdicts, run.root, bucket, candidates, verifiable)


@dataclass(frozen=True)
class Select(BucketJob):
    """Choose y_ws, the best answer of all sources, of every prompt; these are the rows of SFT."""

    kind = JobKind.SELECT

    prompts: Prompts
    sources: Answers
    contamination: Contamination | None = None
    """Leaves out contaminated prompts; null keeps them."""
    groups: tuple[str, ...] = ()
    """Groups whose prompts are counted; other names come with other scores, so with another key."""

    @property
    def step(self) -> Step:
        """The step of the output folder."""
        config = {"splits": list(self.prompts.splits), "answers": self.sources.policies.identity()}
        left_out = (self.contamination.step,) if self.contamination else ()
        return Step("select", config, (self.prompts.step, *self.sources.steps, *left_out))

    @property
    def row_source(self) -> Prompts:
        """At most one row a prompt."""
        return self.prompts

    @property
    def stores(self) -> tuple[str, ...]:
        """Those of the sources."""
        return self.sources.stores

    def fill(self, run: Run, bucket: Bucket) -> dict[str, Number]:
        """Write the bucket's SELECTION shard; return its counts, such as `wins.<source>`."""
        prompts = sorted_by_prompt(self.prompts.read(run.root, bucket))
        given = len(prompts)
        if self.contamination:
            prompts = self.contamination.without(run, bucket, prompts)
        candidates, eligible = self.sources.read(run, bucket, prompts)
        table, counts = pairs.source_selection(prompts, candidates, eligible)
        write_shard(run.root / self.step.folder, bucket, records.SELECTION, table, "all")
        counts |= pairs.selected_by_group(prompts, table, self.groups) if self.groups else {}
        return counts | ({"contaminated": given - len(prompts)} if self.contamination else {})


# --- y_wt and y_l ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair(BucketJob):
    """Choose y_wt and y_l, the best and the worst of the target's answers, of each prompt."""

    kind = JobKind.PAIR

    select: Select
    answers: Answers
    """The answers to choose from: the target's own, or for `fusechat3` the sources'."""
    config: PairConfig

    @property
    def prompts(self) -> Prompts:
        """The preference prompts."""
        samples = self.answers.samples[0]
        return Prompts(self.select.prompts.step, samples.prompts.splits)

    @property
    def step(self) -> Step:
        """The step of the output folder."""
        config = {
            "pair": self.config.identity() | {"contamination": None},  # done by `select`
            "answers": self.answers.policies.identity(),
            "splits": list(self.prompts.splits),
        }
        return Step("pair", config, (self.select.step, *self.answers.steps))

    @property
    def row_source(self) -> Prompts:
        """At most one row a prompt."""
        return self.prompts

    @property
    def stores(self) -> tuple[str, ...]:
        """Those of the sources, and of the answers that y_wt and y_l are among."""
        return self.select.stores + self.answers.stores

    def fill(self, run: Run, bucket: Bucket) -> dict[str, Number]:
        """Write the bucket's PREFERENCE shard; return its counts, such as `dropped.<reason>`."""
        selection = self._selection(run, bucket)
        candidates, eligible = self.answers.read(run, bucket, selection)
        named, groups = self.select.groups, None
        if named:
            prompts = self.prompts.read(run.root, bucket, ["prompt_id", "split", "group"])
            groups = pairs.groups_of(selection, prompts)
        given = selection, candidates, eligible
        table, counts = pairs.preference_rows(*given, self.config, groups)
        write_shard(run.root / self.step.folder, bucket, records.PREFERENCE, table, "all")
        return counts | (pairs.paired_by_group(prompts, selection, table, named) if named else {})

    def _selection(self, run: Run, bucket: Bucket) -> pa.Table:
        """The bucket's preference prompts that have a y_ws, with their references."""
        table = read_bucket(run.root / self.select.step.folder, bucket, records.SELECTION)
        table = sorted_by_prompt(of_splits(table, self.prompts.splits))
        if not self.answers.verdicts:
            return table
        columns = ["prompt_id", "split", "reference"]
        given = self.prompts.read(run.root, bucket, columns)
        places = pc.index_in(table["prompt_id"], value_set=in_one(given["prompt_id"]))
        return table.append_column("reference", given["reference"].take(places))


AnyBucketJob = EvalNgrams | Contamination | Select | Pair
