"""Mean tokens of prompts and answers: of a store, else of the likest, else by the input or a guess.

What is not measured has bounds: an answer has at most `max_tokens`, a trained target answers about
as its sources do, whose recorded answers are in files, and texts have some bytes for each token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import mean

from wrpo_ray.config import Config, SamplingConfig
from wrpo_ray.planning.input_texts import prompt_bytes, recorded_bytes
from wrpo_ray.planning.measured import GIVEN, GUESS, INPUT, MEASURED, TOKEN, Measured
from wrpo_ray.planning.spread import SURE, Spread
from wrpo_ray.runtime.job import Job
from wrpo_ray.runtime.ledger import Entry, UnderWay, Usage
from wrpo_ray.stages.generate.stage import Generate
from wrpo_ray.storage.folder import Folder

TEMPLATE = 15
"""Tokens that a chat template adds to a prompt, a guess."""
ALIKE = Spread.both(1.5)
"""Of answers by those of other models to the same prompts, and by bytes of texts."""
UNKNOWN = Spread.both(4)
"""Of answers of which nothing is known, below `max_tokens`."""
WEIGHT = 3
"""Answers that tell as much of a mean length as those of other models do: lengths deviate by about
0.7 of their mean, so that the mean of three is off by `ALIKE`."""


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of an answer."""

    prompt: float
    output: float
    origin: str
    spread: Spread = SURE
    """How far the answers' tokens may be off."""

    def left(self, rows: int, at: UnderWay, sampling: SamplingConfig) -> Usage:
        """The rest of `rows` answers that are not there, some of which engines are at."""
        rows = max(0, rows - at.ended)
        running = min(rows, at.running)
        begun = running * at.still(self.output, sampling.max_tokens)
        asked = math.ceil((rows - running) / sampling.samples)
        tokens = round((rows - running) * self.output + begun)
        return Usage(rows, round(asked * self.prompt), tokens)


class AnswerLengths:
    """The lengths of a config's answers, by its output and its input files."""

    def __init__(
        self, config: Config, root: Folder, jobs: Mapping[str, Job], measured: Measured
    ) -> None:
        self.config, self.root, self.measured = config, root, measured
        self.jobs = [job for job in jobs.values() if isinstance(job, Generate)]

    def of(self, job: Generate | None = None) -> Lengths:
        """Mean lengths of the job's answers, or of any; at most as sampling allows."""
        sampling = job.sampling if job else self.config.sampling
        output, origin, spread = self._output(job, sampling)
        most = sampling.max_tokens
        output = min(output, most)
        if job:
            output = _with_those(self.measured.told(job.step), output, most)
        spread = Spread(spread.less, min(spread.more, max(1.0, most / output)))
        return Lengths(self._prompt(job), output, origin, spread)

    def _prompt(self, job: Generate | None) -> float:
        given = self.config.plan
        if found := self._likest(job):
            return mean(prompt for prompt, _ in found)
        if "prompt_tokens" not in given.model_fields_set and self._prompt_bytes:
            return self._prompt_bytes / TOKEN + TEMPLATE
        return given.prompt_tokens

    def _output(self, job: Generate | None, sampling: SamplingConfig) -> tuple[float, str, Spread]:
        """Mean tokens of an answer, where they come from, and how far they may be off."""
        given, found = self.config.plan, self._likest(job)
        learns = job is None or self._is_trained(job)
        if learns and self._source_length and not self._of_trained:
            origin = MEASURED if found or self.measured.recorded_length else INPUT
            return self._source_length, origin, ALIKE  # it learned to answer as the sources
        if found:
            is_own = job is None or self._of_model(job) or (learns and self._of_trained)
            return mean(output for _, output in found), MEASURED, SURE if is_own else ALIKE
        if "output_tokens" in given.model_fields_set:
            return given.output_tokens, GIVEN, SURE
        return min(given.output_tokens, sampling.max_tokens / 2), GUESS, UNKNOWN

    @cached_property
    def _prompt_bytes(self) -> float | None:
        given = self.config
        existing = (given.existing,) if given.existing else ()
        return prompt_bytes(given.prompt_files or existing or given.recorded.values())

    def _likest(self, job: Generate | None) -> list[tuple[float, float]]:
        """Lengths in the job's store, else of its model, else of trained models, else all."""
        trained = self._of_trained if job and self._is_trained(job) else []
        of_all = list(self.measured.lengths.values())
        return (self._of_model(job) if job else []) or trained or of_all

    def _of_model(self, job: Generate) -> list[tuple[float, float]]:
        """Lengths in the job's store, else in all stores of its model."""
        found = self.measured.lengths
        if job.step.folder in found:
            return [found[job.step.folder]]
        named = {j.step.folder for j in self.jobs if j.model.name == job.model.name}
        return [found[folder] for folder in sorted(named) if folder in found]

    @cached_property
    def _of_trained(self) -> list[tuple[float, float]]:
        """Lengths of the stores of trained models."""
        jobs = {j.step.folder: j for j in self.jobs if self._is_trained(j)}
        return [self.measured.lengths[f] for f in sorted(jobs) if f in self.measured.lengths]

    def _is_trained(self, job: Generate) -> bool:
        return job.folder.is_within(self.root)

    @cached_property
    def _source_length(self) -> float | None:
        """Mean tokens of the sources' answers, recorded ones by their bytes.

        Before a recorded answer is read into the output, by the files; a number in the config goes
        before these.
        """
        names = {source.name for source in self.config.sources}
        jobs = {j.step.folder for j in self.jobs if j.model.name in names}
        found = [self.measured.lengths[f][1] for f in sorted(jobs) if f in self.measured.lengths]
        recorded = self.measured.recorded_length
        if not recorded and "output_tokens" not in self.config.plan.model_fields_set:
            size = recorded_bytes(self.config.recorded.values())
            recorded = size / TOKEN if size else None
        found += [recorded] if recorded else []
        return mean(found) if found else None

    @cached_property
    def by_role(self) -> tuple[float, float]:
        """Mean tokens of a source's answer and of the target's."""
        own = [pair[1] for pair in self._of_trained]
        source = self._source_length or self.of().output
        return source, mean(own) if own else source


def _with_those(entry: Entry, length: float, most: int) -> float:
    """The mean length of a store's answers, where engines are at some that tell more of it.

    Those that have ended are the shortest ones, so the others count with what they still need.
    """
    at, spent = entry.under_way, entry.usage
    if not at:
        return length
    tokens = spent.output_tokens + at.tokens + at.running * at.still(length, most)
    rows = spent.rows + at.ended + at.running
    return (WEIGHT * length + tokens) / (WEIGHT + rows)
