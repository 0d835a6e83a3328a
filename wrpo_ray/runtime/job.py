"""Jobs: the units that a chain consists of, as the runner, the planner and the reports see them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Protocol, Self

from wrpo_ray.config import ImportConfig, PromptsConfig, RecordedAnswers
from wrpo_ray.data.samples import Prompts, Samples
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.placement import Model, Pool
from wrpo_ray.runtime.ready_queue import ReadyQueue
from wrpo_ray.storage.steps import Step


class JobKind(StrEnum):
    """The kinds of jobs; the values are kept in `chain.json`, so they never change."""

    INGEST_PROMPTS = "ingestprompts"
    INGEST_RESPONSES = "ingestresponses"
    INGEST_PREFERENCES = "ingestpreferences"
    INGEST_RECORDED = "ingestrecorded"
    CHECK_GROUPS = "checkgroups"
    READ_BENCHMARK = "readbenchmark"
    EVAL_NGRAMS = "evalngrams"
    CONTAMINATION = "contamination"
    GENERATE = "generate"
    SCORE = "score"
    SELECT = "select"
    PAIR = "pair"
    PREPARE = "prepare"
    TRAIN = "train"
    EVALUATE = "evaluate"
    VERDICTS = "verdicts"
    COMPARE = "compare"
    STUDY_TABLE = "studytable"


AnyInput = PromptsConfig | ImportConfig | RecordedAnswers
RowSource = int | Prompts | Step | AnyInput | tuple[AnyInput, ...]
"""A number of rows, or the prompts, step or input files that have as many."""


@dataclass(frozen=True)
class Stream:
    """How a job passes on buckets through a ready queue, or takes them from it."""

    run: Callable[[Run, list[Any], ReadyQueue], None]
    """Runs jobs of this kind with the queue."""
    pool: Pool
    """The actors, for which there must be room beside those of the other jobs."""
    source: Step | None = None
    """The step whose buckets the job takes; None: it passes on its own."""


class Job(Protocol):
    """A frozen specification of work whose result lies in the folder of its step."""

    @property
    def kind(self) -> JobKind:
        """The kind; jobs of one kind run together."""

    @property
    def step(self) -> Step:
        """The step; the job is done when its manifest is there."""

    @classmethod
    def run(cls, run: Run, jobs: list[Self]) -> None:
        """Run jobs of this kind whose steps are not done, and finish their steps.

        Raises:
            WrpoError: a job failed; what is finished is kept.
        """

    @property
    def is_retryable(self) -> bool:
        """Whether failed rows can get new attempts after the step is done."""

    @property
    def batch_key(self) -> object:
        """Jobs of one kind with equal keys can be given to one call of `run`."""

    @property
    def row_source(self) -> RowSource | None:
        """The source of the number of rows of the result, for plans; None if there is none."""

    @property
    def samples(self) -> Samples | None:
        """The answers that the job makes or scores."""

    @property
    def stores(self) -> tuple[str, ...]:
        """Folders of the scored answers that the job makes or chooses from."""

    @property
    def note(self) -> str:
        """A remark for readers of the results; empty for most jobs."""

    @property
    def stream(self) -> Stream | None:
        """How it runs side by side with the phase before or after it; None if it cannot."""

    @property
    def loads(self) -> Pool | None:
        """The workers that load models, with these; None if none does."""

    @property
    def needs(self) -> dict[str, float]:
        """Resources that it has to have at once, at the least."""


class BaseJob:
    """Defaults for most jobs."""

    is_retryable: ClassVar[bool] = False

    @property
    def note(self) -> str:
        """None."""
        return ""

    @property
    def batch_key(self) -> object:
        """All jobs of the kind run together."""
        return None

    @property
    def row_source(self) -> RowSource | None:
        """Unknown."""
        return None

    @property
    def samples(self) -> Samples | None:
        """No answers."""
        return None

    @property
    def stores(self) -> tuple[str, ...]:
        """No scored answers."""
        return ()

    @property
    def stream(self) -> Stream | None:
        """Whole phases only."""
        return None

    @property
    def loads(self) -> Pool | None:
        """No model."""
        return None

    @property
    def needs(self) -> dict[str, float]:
        """One of the workers that load models, else one task."""
        return self.loads.needs if self.loads else {"CPU": 1.0}


def models_of(jobs: Iterable[Job]) -> tuple[Model, ...]:
    """All models that workers of the jobs load, each once."""
    pools = [job.loads for job in jobs]
    return tuple(dict.fromkeys(model for pool in pools if pool for model in pool.models))
