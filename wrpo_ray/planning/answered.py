"""How many prompts get a row to train on: those with answers, and with answers of unequal rewards.

Models answer all prompts, or those of their groups. Recorded answers are to the prompts that they
match: as counted when they were read, before that as the first rows of the files tell.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from wrpo_ray.data.samples import Groups, Prompts, Samples
from wrpo_ray.planning.input_rows import InputRows
from wrpo_ray.planning.measured import unequal_share
from wrpo_ray.runtime.job import Job
from wrpo_ray.stages.generate.stage import Generate
from wrpo_ray.stages.ingest.recorded import IngestRecorded
from wrpo_ray.stages.pair.stage import Pair, Select
from wrpo_ray.stages.score.stage import Score
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

TIES = 0.5
"""Share of prompts that are expected to give a preference row where rewards are verdicts, which are
often equal for all answers to a prompt; between none and all."""


class Bounds(NamedTuple):
    """A share of prompts."""

    least: float = 1.0
    most: float = 1.0

    @property
    def expected(self) -> float:
        """Their mean."""
        return (self.least + self.most) / 2

    @property
    def certain(self) -> float:
        """The share of what is expected that there is in any case."""
        return self.least / self.expected if self.expected else 1.0


@dataclass(frozen=True)
class Answered:
    """The prompts with answers, for the jobs of a chain."""

    root: Folder
    jobs: Mapping[str, Job]
    """By their step's key."""
    inputs: InputRows
    count: Callable[[Prompts], int]
    """The number of some prompts."""

    def rows(self, job: Select | Pair) -> int:
        """Prompts that are expected to have the answers that the job chooses from."""
        return round(self.count(job.prompts) * self._share(job).expected)

    def paired(self, rows: Step) -> tuple[float, float]:
        """Share of the rows that have answers of unequal rewards, and how much of it is certain.

        `rows` selects or pairs answers. Of rows that are not there, their number is not certain
        either.
        """
        job = self.jobs[rows.key]
        if not isinstance(job, Select | Pair) or rows.is_done(self.root):
            return 1.0, 1.0
        unequal, certain = self._unequal(job) if isinstance(job, Pair) else (1.0, 1.0)
        return unequal, certain * self._share(job).certain

    def _unequal(self, pairs: Pair) -> tuple[float, float]:
        scores = (self.jobs.get(step.key) for step in pairs.step.inputs)
        compared = [job for job in scores if isinstance(job, Score)]
        for made in compared:
            unequal = unequal_share(made.samples.folder(self.root))
            if unequal is not None:
                return unequal, 1.0
        verdicts = any(part.verifier for made in compared for part in made.reward.parts)
        return (TIES, 0.0) if verdicts else (1.0, 1.0)

    def _share(self, job: Select | Pair) -> Bounds:
        """The share of the prompts with an answer of a source, and for pairs of the target."""
        if isinstance(job, Select):
            return self._of(job.sources.samples)
        chosen, own = self._share(job.select), self._of(job.answers.samples)
        return Bounds(max(0.0, chosen.least + own.least - 1), min(chosen.most, own.most))

    def _of(self, samples: Sequence[Samples]) -> Bounds:
        """The share of prompts that some of the answers are to."""
        made = {job.step.key: job for job in map(self._maker, samples)}.values()
        asked = [job.prompts for job in made if isinstance(job, Generate)]
        recorded = [job for job in made if isinstance(job, IngestRecorded)]
        is_known = len(asked) + len(recorded) == len(made) and self.inputs.config.prompt_files
        if not is_known or any(prompts.groups is None for prompts in asked):
            return Bounds()
        shares = [min(1.0, self._matched(job)) for job in recorded]
        if asked:
            names = {name for prompts in asked if prompts.groups for name in prompts.groups.names}
            grouped = replace(asked[0], groups=Groups(tuple(sorted(names))))
            shares.append(self.count(grouped) / max(1, self.count(replace(grouped, groups=None))))
        return Bounds(max(shares), min(1.0, sum(shares)))

    def _matched(self, job: IngestRecorded) -> float:
        """The share of the prompts that recorded answers are to."""
        if job.step.is_done(self.root):
            counts = job.step.read_manifest(self.root)["counts"]
            prompts = counts.get("prompts", counts["rows"])
        else:
            _, prompts = self.inputs.recorded(job.input, job.source, job.step.name)
        return float(prompts / max(1, self.count(job.prompts)))

    def _maker(self, samples: Samples) -> Job:
        """The job that made or read the answers, perhaps scored by others."""
        job = self.jobs[samples.step.key]
        return self._maker(job.answers) if isinstance(job, Score) else job
