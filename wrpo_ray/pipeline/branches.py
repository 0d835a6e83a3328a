"""The two branches of a chain that can run side by side, and the steps between them.

    sources ──── generate ∥ score ─────────────────────── select ──┐
                    └ all of SFT's prompts                         ├── pair, train, ...
    target            └── select for SFT, sft, sample ∥ score ─────┘

SFT trains on y_ws of its own split only. So its prompts go through all sources first, as steps of
their own in the same stores, and a selection of these alone is what SFT trains on. The keys of all
other steps are those of a chain without branches: what they hold is the same.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from wrpo_ray.data.samples import Samples
from wrpo_ray.pipeline.stage_table import Stage
from wrpo_ray.runtime.awaited import Awaited
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.cores import this_machine
from wrpo_ray.runtime.job import Job
from wrpo_ray.runtime.placement import has_room
from wrpo_ray.runtime.progress import log
from wrpo_ray.stages.generate.stage import Generate
from wrpo_ray.stages.pair.stage import Select
from wrpo_ray.stages.score.stage import Score
from wrpo_ray.stages.train.prepare import Prepare

SFT = ("sft",)
"""The split whose prompts come first."""
SOURCES, SELECT, TARGET = ("generate", "score"), "select", ("sft", "sample")
"""Stages of each branch, and the one that ends the branch of the sources."""


class Phase(NamedTuple):
    """Jobs of one kind that run at once, of the stage with this name."""

    stage: str
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Early:
    """The jobs that make the rows of SFT before those of the other split."""

    parts: Mapping[str, Generate | Score]
    """{key of a step: the job that does its part for SFT's prompts}"""
    select: Select

    @staticmethod
    def of(stages: Iterable[Stage]) -> "Early | None":
        """Those of a chain; None if nothing would be done earlier."""
        jobs = {job.step.key: job for stage in stages for job in stage.jobs}
        rows = [j for j in jobs.values() if isinstance(j, Prepare) and _is_sft(j)]
        select = jobs.get(rows[0].rows.key) if rows else None
        if not isinstance(select, Select) or rows[0].config.takes_all_prompts:
            return None
        found: dict[str, Generate | Score] = {}
        samples, verdicts = (
            tuple(_part(one, jobs, found) for one in given)
            for given in (select.sources.samples, select.sources.verdicts)
        )
        if not found:
            return None
        sources = replace(select.sources, samples=samples, verdicts=verdicts)
        return Early(found, replace(select, prompts=select.prompts.of_splits(SFT), sources=sources))

    def first(self, phase: Phase) -> Phase:
        """The phase with the parts of its jobs before them."""
        own = [self.parts[job.step.key] for job in phase.jobs if job.step.key in self.parts]
        return Phase(phase.stage, (*own, *phase.jobs))

    def reading(self, phase: Phase) -> Phase:
        """The phase with the rows of SFT read from the selection of these alone."""
        step = self.select.step
        jobs = (
            replace(j, early=step) if isinstance(j, Prepare) and _is_sft(j) else j
            for j in phase.jobs
        )
        return Phase(phase.stage, tuple(jobs))


def _is_sft(job: Job) -> bool:
    """Whether it prepares the rows of SFT."""
    return isinstance(job, Prepare) and job.name == "sft"


def _part(samples: Samples, jobs: Mapping[str, Job], found: dict[str, Generate | Score]) -> Samples:
    """The answers to SFT's prompts among these; the jobs that make them are added to `found`."""
    prompts = samples.prompts.of_splits(SFT)
    job = jobs.get(samples.step.key)
    if isinstance(job, Generate):
        found[job.step.key] = part = job.of_splits(SFT)
        return replace(samples, step=part.step, prompts=prompts)
    if isinstance(job, Score):
        found[job.step.key] = scores = job.part(_part(job.answers, jobs, found))
        return replace(samples, step=scores.step, prompts=prompts)
    return replace(samples, prompts=prompts)  # they are read before


@dataclass(frozen=True)
class Branches:
    """Phases that run side by side: those of each branch follow one another."""

    sources: tuple[Phase, ...]
    target: tuple[Phase, ...]
    awaited: tuple[Job, ...]
    """Jobs of the sources for which the target waits."""

    @staticmethod
    def of(run: Run, early: Early, sources: Sequence[Phase], target: Sequence[Phase]) -> "Branches":
        """The branches with the work that is left.

        Without rows of SFT the sources answer its prompts first, and these are selected alone. A
        source that has answered all prompts has no part left.
        """
        wants_rows = any(_is_sft(job) for job in _missing(run, target))
        if not wants_rows:
            return Branches(tuple(sources), tuple(target), ())
        selected = Phase(SELECT, (early.select,))
        left = {job.step.key for job in _missing(run, sources)}
        first = replace(early, parts={k: part for k, part in early.parts.items() if k in left})
        parts = [part for part in first.parts.values() if not part.step.is_done(run.root)]
        return Branches(
            tuple(first.first(phase) for phase in sources), (selected, *target), tuple(parts)
        )

    def are_worth_it(self, run: Run, room: Callable[[Mapping[str, float]], bool]) -> bool:
        """Whether both have work, and there is room for a training beside the sources' engines.

        `room` tells it of resources: those of the cluster, or of a plan.
        """
        left = [list(_missing(run, branch)) for branch in (self.sources, self.target)]
        if not all(left) or not any(job.stream for job in left[0]):
            return False
        return room(_peak(run, self.sources) + _peak(run, self.target))

    def wait(self) -> Awaited:
        """The steps for which the target's branch waits."""
        return Awaited(job.step for job in self.awaited)


def room_now(need: Mapping[str, float]) -> bool:
    """Whether the cluster has these resources for both branches.

    On a machine's own CPUs there is no room: all that runs there shares its cores and memory.
    """
    if this_machine().cores:
        return False
    if has_room(need):
        return True
    log("SFT follows the sources: the cluster has no room for its workers beside their engines")
    return False


def split(
    phases: Sequence[Phase],
) -> tuple[list[Phase], list[Phase], list[Phase], list[Phase]]:
    """The phases before the branches, of the sources, of the target, and after both."""
    stages = [phase.stage for phase in phases]
    begin = min((stages.index(name) for name in SOURCES if name in stages), default=len(stages))
    middle = len(stages) - stages[::-1].index(SELECT) if SELECT in stages else begin
    end = middle
    while end < len(stages) and stages[end] in TARGET:
        end += 1
    return [*phases[:begin]], [*phases[begin:middle]], [*phases[middle:end]], [*phases[end:]]


def _missing(run: Run, phases: Iterable[Phase]) -> Iterator[Job]:
    return (job for phase in phases for job in phase.jobs if not job.step.is_done(run.root))


def _peak(run: Run, phases: Iterable[Phase]) -> Counter[str]:
    """The most that a branch has to have at once: phases that pass on buckets run side by side."""
    streaming, most = Counter[str](), Counter[str]()
    for phase in phases:
        needs = Counter[str]()
        for job in _missing(run, [phase]):
            needs |= Counter(job.needs)
        if all(job.stream for job in phase.jobs):
            streaming += needs
        else:
            most |= needs
    return most | streaming
