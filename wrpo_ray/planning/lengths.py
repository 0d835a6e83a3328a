"""Mean tokens of prompts and answers: of a store, else of the likest, else as the config says."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import mean

from wrpo_ray.config import Config
from wrpo_ray.planning.measured import GIVEN, GUESS, MEASURED, Measured
from wrpo_ray.runtime.job import Job
from wrpo_ray.stages.generate.stage import Generate
from wrpo_ray.storage.folder import Folder


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of an answer."""

    prompt: float
    output: float
    origin: str


class AnswerLengths:
    """The lengths of a config's answers, by what its output shows."""

    def __init__(
        self, config: Config, root: Folder, jobs: Mapping[str, Job], measured: Measured
    ) -> None:
        self.config, self.root, self.measured = config, root, measured
        self.jobs = [job for job in jobs.values() if isinstance(job, Generate)]

    def of(self, job: Generate | None = None) -> Lengths:
        """Mean lengths of the job's answers: of its store, or of the likest; else as given."""
        given, sampling = self.config.plan, job.sampling if job else self.config.sampling
        found = self._likest(job)
        if found:
            prompt, output = (mean(pair[place] for pair in found) for place in (0, 1))
            origin = MEASURED
        else:
            prompt, output = given.prompt_tokens, given.output_tokens
            origin = GIVEN if "output_tokens" in given.model_fields_set else GUESS
        if job and self._is_trained(job) and self._source_length and not self._of_trained:
            output = self._source_length  # it learned to answer as the sources
        return Lengths(prompt, min(output, sampling.max_tokens), origin)

    def _likest(self, job: Generate | None) -> list[tuple[float, float]]:
        """Lengths in the job's store, else of its model, else of trained models, else all."""
        found = self.measured.lengths
        if job and job.step.folder in found:
            return [found[job.step.folder]]
        jobs = self.jobs if job else []
        named = {j.step.folder for j in jobs if job and j.model.name == job.model.name}
        trained = self._of_trained if job and self._is_trained(job) else []
        return [found[f] for f in sorted(named) if f in found] or trained or list(found.values())

    @cached_property
    def _of_trained(self) -> list[tuple[float, float]]:
        """Lengths of the stores of trained models."""
        jobs = {j.step.folder: j for j in self.jobs if self._is_trained(j)}
        return [self.measured.lengths[f] for f in sorted(jobs) if f in self.measured.lengths]

    def _is_trained(self, job: Generate) -> bool:
        return job.folder.is_within(self.root)

    @cached_property
    def _source_length(self) -> float | None:
        """Mean tokens of the sources' answers, recorded ones by their bytes."""
        names = {source.name for source in self.config.sources}
        jobs = {j.step.folder for j in self.jobs if j.model.name in names}
        found = [self.measured.lengths[f][1] for f in sorted(jobs) if f in self.measured.lengths]
        recorded = self.measured.recorded_length
        found += [recorded] if recorded else []
        return mean(found) if found else None

    @cached_property
    def by_role(self) -> tuple[float, float]:
        """Mean tokens of a source's answer and of the target's."""
        own = [pair[1] for pair in self._of_trained]
        source = self._source_length or self.of().output
        return source, mean(own) if own else source
