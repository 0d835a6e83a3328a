"""Counts of prompts by group, and the check that each group has sources and a reward.

The check runs after the prompts are read and before any answer is generated. Tasks count the groups
of a bucket each; the driver adds their counts up.
"""

from __future__ import annotations

import difflib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import Any

import pyarrow.compute as pc

from wrpo_ray.config import PromptsConfig, RecordedAnswers
from wrpo_ray.data.buckets import buckets
from wrpo_ray.data.group_counts import OTHERS, key_of, read_counts
from wrpo_ray.data.published import RowError
from wrpo_ray.data.samples import Groups, Prompts
from wrpo_ray.errors import UserError
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.job import BaseJob, JobKind
from wrpo_ray.runtime.progress import log
from wrpo_ray.runtime.tasks import map_tasks
from wrpo_ray.stages.ingest.cells import group_of, is_missing
from wrpo_ray.stages.ingest.readers import exist, input_files, read_rows
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

Row = dict[str, Any]
PromptFiles = PromptsConfig | RecordedAnswers
FIRST = 10_000
"""Rows of a file that are counted before a run begins."""
MOST = 1000
"""Groups that a bucket counts by name, the largest; a column of ids would have as many as rows."""
SHOWN = 5
"""Groups that a message names."""


@dataclass(frozen=True)
class GroupCounts:
    """Numbers of prompts by group; None is no group."""

    prompts: Counter[str | None] = field(default_factory=Counter)
    bare: Counter[str | None] = field(default_factory=Counter)
    """Of those, without a reference."""

    def share(self, groups: Groups) -> float:
        """The share of the prompts that are of these groups."""
        named = sum(self.prompts[name] for name in groups.names)
        total = self.prompts.total()
        return (total - named if groups.others else named) / max(1, total)


@dataclass(frozen=True)
class Coverage:
    """Which groups of prompts have what they need."""

    rewarded: Groups | None
    """Those with a reward; None: all."""
    answered: Groups | None
    """Those that a source answers; None: all."""
    verified: Groups
    """Those whose reward compares with the reference."""
    named: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(field of the config, groups that it names, which have to be there)."""

    @property
    def identity(self) -> Row:
        """The part of step keys that the check depends on beside the prompts."""
        groups = {"rewarded": self.rewarded, "answered": self.answered, "verified": self.verified}
        return {n: g and g.identity for n, g in groups.items()} | {"named": self.named}

    def problems(
        self, what: str, counts: GroupCounts, limit: float, *, is_complete: bool = True
    ) -> Iterator[str]:
        """A line for each kind of prompts without reward, source or reference, and wrong name.

        Args:
            what: the section of the prompts.
            counts: their groups.
            limit: the share of prompts of a group that may lack a reference.
            is_complete: whether all prompts are counted, not only the first.
        """
        what += "" if is_complete else f" (first {FIRST:,} rows)"
        for covered, lack in ((self.rewarded, NO_REWARD), (self.answered, NO_SOURCE)):
            missing = Counter(
                {g: n for g, n in counts.prompts.items() if covered and not _has(covered, g)}
            )
            if missing:
                yield f"{what}: {lack[0]} the prompts {_told(missing)}; {lack[1]}"
        for group, bare in sorted(counts.bare.items(), key=lambda item: str(item[0])):
            total = counts.prompts[group]
            if _has(self.verified, group) and bare > limit * total:
                yield (
                    f"{what}: {bare:,} of {total:,} prompts {_told(Counter([group]), 0)} have no "
                    f"reference, which their reward compares with; fill the column, or give the "
                    f"group another reward"
                )
        if is_complete:
            there = sorted(group for group in counts.prompts if group is not None)
            for name, given in self.named:
                for group in (g for g in given if g not in counts.prompts):
                    yield f"{name}: no prompt is of group {group!r}{_nearest(group, there)}"


NO_REWARD = (
    "no reward covers",
    "add the groups to reward.by_group, or give `reward` a kind beside it for all other prompts",
)
NO_SOURCE = (
    "no source answers",
    "add the groups to `groups` of a source, or leave that out of a source for all prompts",
)


def _has(groups: Groups, name: str | None) -> bool:
    return (name in groups.names) != groups.others


def _told(groups: Counter[str | None], least: int = 1) -> str:
    """Such as "of group 'law' (12), of no group (3)", the largest first."""
    most = sorted(groups.items(), key=lambda item: (-item[1], str(item[0])))
    names = ("of no group" if name is None else f"of group {name!r}" for name, _ in most)
    counts = (f" ({count:,})" if least else "" for _, count in most)
    told = [name + count for name, count in zip(names, counts, strict=True)]
    more = f" and of {len(told) - SHOWN:,} more groups" if len(told) > SHOWN else ""
    return ", ".join(told[:SHOWN]) + more


def _nearest(group: str, there: Sequence[str]) -> str:
    close = difflib.get_close_matches(group, there, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(map(repr, there[:20]))}" if there else "; all have none"


# --- in a run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckGroups(BaseJob):
    """Count the prompts of each group, and check that all have what they need."""

    kind = JobKind.CHECK_GROUPS

    prompts: Prompts
    given: tuple[PromptFiles, ...]
    """The inputs that they are from."""
    coverage: Coverage
    counted: tuple[str, ...]
    """Groups that are counted by name in the manifest; the others together."""

    @property
    def step(self) -> Step:
        """The step of the output folder."""
        name = f"{self.prompts.step.name.removesuffix('prompts')}groups"
        return Step(name, self.coverage.identity | {"counted": self.counted}, (self.prompts.step,))

    @property
    def row_source(self) -> Prompts:
        """The prompts."""
        return self.prompts

    def known(self, root: Folder) -> GroupCounts:
        """The groups of the prompts as they were counted, else of the input's first rows."""
        if not self.step.is_done(root):
            return self._first
        found = read_counts(self.step.read_manifest(root)["counts"])
        return GroupCounts(Counter({name: int(n["prompts"]) for name, n in found.items()}))

    @cached_property
    def _first(self) -> GroupCounts:
        is_there = all(exist(given.path) for given in self.given)  # a plan can be made without
        return first_groups(self.given, self.prompts.step.name)[0] if is_there else GroupCounts()

    @classmethod
    def run(cls, run: Run, jobs: Sequence[CheckGroups]) -> None:
        """Run each job.

        Raises:
            UserError: prompts lack a reward, a source or a reference, or a group has no prompts.
        """
        for job in jobs:
            started, counts = time.time(), GroupCounts()
            rows = ({"index": b.index, "count": b.count} for b in buckets(run.buckets))
            for result in map_tasks(job.step.name, rows, partial(_count, run, job)):
                for group, prompts, bare in json.loads(result["groups"]):
                    counts.prompts[group] += prompts
                    counts.bare[group] += bare
            what = job.prompts.step.name
            if problems := list(job.coverage.problems(what, counts, run.failure_limit)):
                raise UserError("\n".join(problems))
            named = {name: counts.prompts[name] for name in job.counted}
            others = {OTHERS: counts.prompts.total() - sum(named.values())}
            found = {key_of("prompts", name): n for name, n in (named | others).items()}
            job.step.finish(run.root, {"rows": counts.prompts.total()} | found, started)
            told = (f"{name} {n:,}" for name, n in named.items())
            log(f"{job.step.name}  {', '.join(told)}, others {others[OTHERS]:,}")


def _count(run: Run, job: CheckGroups, row: dict[str, int]) -> Row:
    """[[group, prompts, prompts without a reference]] of a bucket, as JSON."""
    columns = ["prompt_id", "split", "group", "reference"]
    table = job.prompts.read(run.root, run.bucket(row["index"]), columns)
    table = table.append_column("bare", pc.cast(pc.is_null(table["reference"]), "int64"))
    sums = table.group_by("group").aggregate([("bare", "count"), ("bare", "sum")])
    found = zip(*(sums[n].to_pylist() for n in ("group", "bare_count", "bare_sum")), strict=True)
    most = sorted(found, key=lambda item: (item[0] not in job.counted, -item[1], str(item[0])))
    return {"groups": json.dumps(most[: MOST + len(job.counted)])}


# --- before a run ------------------------------------------------------------------------------


def first_groups(inputs: Sequence[PromptFiles], what: str) -> tuple[GroupCounts, bool]:
    """Count the groups of the first rows of inputs; and whether these are all of their rows.

    Raises:
        UserError: there is no such file.
    """
    counts = GroupCounts()
    is_whole = [_count_first(given, what, counts) for given in inputs]
    return counts, all(is_whole)


def _count_first(given: PromptFiles, what: str, counts: GroupCounts) -> bool:
    """Add the groups of an input's first rows to the counts; return whether it has no others."""
    columns = given.columns
    uris = input_files(given.path, what)
    texts = [name for name in (columns.group, columns.reference) if name]
    every = (found for uri in uris for found in read_rows(uri, columns.of_prompt, texts))
    limit, of_all = None, None
    if isinstance(given, PromptsConfig):
        limit, of_all = given.limit, given.group
    rows = list(islice(every, min(limit or FIRST + 1, FIRST + 1)))
    for _, row in rows[:FIRST]:
        if isinstance(row, Exception):
            continue
        try:
            group = group_of(row.get(columns.group), columns.group) if columns.group else of_all
        except RowError:
            continue
        counts.prompts[group] += 1
        counts.bare[group] += not columns.reference or is_missing(row.get(columns.reference))
    return len(rows) <= FIRST
