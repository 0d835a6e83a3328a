"""Measurements in an output: lengths of answers, and how fast its actors and workers were.

Speeds are kept as a *pace*: the measured seconds over those guessed for the same tokens. Engines
that are half empty, and prompts that are read, are in the guess. So a pace carries over from few
held-out prompts to all prompts, and from a model to others on the same kind of hardware.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, median

import pyarrow as pa
import pyarrow.compute as pc

from wrpo_ray.data.finished import sampled, stored
from wrpo_ray.planning.rates import CPU_START
from wrpo_ray.report.status import is_running
from wrpo_ray.runtime.job import Job, JobKind
from wrpo_ray.runtime.ledger import Entry, Usage, is_open, read_ledger
from wrpo_ray.stages.generate.stage import Generate, bytes_of, engine_slots
from wrpo_ray.stages.train.stage import Train
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

GIVEN, MEASURED, INPUT, GUESS = "given", "measured", "input", "guess"
"""Where a number comes from."""
SHARDS = 32
"""Number of shards of a store whose token counts are read."""
READ = 32
"""Mean tokens of answers from which on less of the time was for their prompts."""
METRICS = "metrics.jsonl"
TEXTS = pa.schema([("text", pa.string())])
REWARDS = pa.schema([("prompt_id", pa.string()), ("reward", pa.float64())])
TOKEN = 3.5
"""Bytes of a token of text, a guess for recorded answers."""


@dataclass(frozen=True)
class Trained:
    """A training of the output."""

    rate: float
    """Tokens/s of a worker."""
    start: float | None
    """Seconds that were no optimizer steps; None while it runs."""
    share: float
    """Of the optimizer steps, those that are done."""


class Measured:
    """The measurements in an output, by its ledger, manifests and metrics."""

    def __init__(self, root: Folder, jobs: Iterable[Job]):
        self.root, self.jobs = root, list(jobs)

    @cached_property
    def ledger(self) -> dict[str, Entry]:
        """The usage of each step folder; of answers that are too early to tell only the starts.

        With those under way they tell a speed once prompts are the lesser part of the time.
        """
        found = dict(self._told)
        for folder in self._early & found.keys():
            entry, spent = found[folder], found[folder].usage
            made = spent + entry.under_way.usage
            if not entry.under_way or made.output_tokens < READ * made.rows:
                starts = Usage(start_seconds=spent.start_seconds, starts=spent.starts)
                found[folder] = Entry(entry.pool, starts)
        return found

    @cached_property
    def _told(self) -> dict[str, Entry]:
        """The ledger; nothing is under way in a run that was killed."""
        found = read_ledger(self.root)
        if any(entry.under_way for entry in found.values()) and not is_running(self.root):
            return {folder: Entry(entry.pool, entry.usage) for folder, entry in found.items()}
        return found

    def told(self, step: Step) -> Entry:
        """The entry of the ledger for a step, with the answers that engines are at, or hold."""
        return self._told.get(step.folder, Entry("", Usage()))

    @cached_property
    def _early(self) -> set[str]:
        """Stores of which a run under way has made fewer answers than their engine has at once.

        These are the shortest ones, and the time for the others' tokens would count as theirs.
        """
        if not is_open(self.root):
            return set()
        spent = self._told
        answering = [j for j in self.jobs if isinstance(j, Generate) and j.step.folder in spent]
        return {
            job.step.folder
            for job in answering
            if not job.step.is_done(self.root)
            and spent[job.step.folder].usage.rows < engine_slots(job.model, bytes_of(job))
        }

    # --- lengths

    @cached_property
    def lengths(self) -> dict[str, tuple[float, float]]:
        """{store: mean tokens of a prompt and of an answer}."""
        found = {}
        for job in self.jobs:
            if isinstance(job, Generate) and job.step.folder not in found:
                sums = self._answers(job)
                if sums.rows:
                    asked = sums.rows / job.sampling.samples
                    found[job.step.folder] = (
                        sums.prompt_tokens / asked,
                        sums.output_tokens / sums.rows,
                    )
        return found

    def _answers(self, job: Generate) -> Usage:
        """Rows and tokens of a store: by the ledger, or by some of its shards."""
        if job.step.folder in self._early:
            return Usage()
        entry = self.ledger.get(job.step.folder)
        if entry and entry.usage.rows and entry.usage.prompt_tokens and not job.model.endpoint:
            return entry.usage
        return Usage.of(stored(self.root / job.step.folder, most=SHARDS))

    @cached_property
    def recorded_length(self) -> float | None:
        """Mean tokens of a recorded answer, by its bytes."""
        steps = [job.step for job in self.jobs if job.kind is JobKind.INGEST_RECORDED]
        sizes = [answer_bytes(self.root / step.folder) for step in steps]
        found = [size / TOKEN for size in sizes if size]
        return mean(found) if found else None

    def row_tokens(self, rows: Step) -> float | None:
        """Mean tokens of a prepared row, if the step that prepares them is finished."""
        if not rows.is_done(self.root):
            return None
        counts = rows.read_manifest(self.root)["counts"]
        tokens, made = counts.get("tokens"), counts.get("rows")
        return tokens / made if tokens and made else None

    # --- speeds

    def usage(self, pool: str, kind: JobKind) -> Iterator[Usage]:
        """The usages of a pool, with what is under way; folders are named by kind."""
        for folder, entry in self.ledger.items():
            if entry.pool == pool and folder.startswith(f"{kind}-"):
                yield entry.usage + entry.under_way.usage

    def pace(self, pool: str, kind: JobKind, guess: Callable[[Usage], float]) -> float | None:
        """The pace of a pool; `guess` gives the seconds that a usage should have taken."""
        spent = [u for u in self.usage(pool, kind) if u.output_tokens and u.busy_seconds]
        expected = sum(map(guess, spent))
        return sum(u.busy_seconds for u in spent) / expected if expected else None

    def rows_rate(self, pool: str) -> float | None:
        """Scores/s of an actor."""
        spent = sum(self.usage(pool, JobKind.SCORE), Usage())
        return spent.rows / spent.busy_seconds if spent.rows and spent.busy_seconds else None

    def start(self, pools: Collection[str] | None = None, *, kind: JobKind) -> float | None:
        """Mean seconds in which an actor of the pools, or of any, loaded its model."""
        entries = [e for f, e in self.ledger.items() if f.startswith(f"{kind}-")]
        found = sum((e.usage for e in entries if pools is None or e.pool in pools), Usage())
        return found.start_seconds / found.starts if found.starts else None

    @cached_property
    def start_pace(self) -> float:
        """Measured seconds of engines' starts on CPUs over the guessed ones; 1 without any.

        Other processes start as much slower or faster: how busy and quick the machine is counts.
        """
        usages = (e.usage for f, e in self.ledger.items() if f.startswith("generate-"))
        found = sum((u for u in usages if not u.gpu_seconds), Usage())
        return found.start_seconds / found.starts / CPU_START if found.starts else 1.0

    @cached_property
    def trained(self) -> list[tuple[Train, Trained]]:
        """The trainings that have made optimizer steps."""
        found = []
        for job in self.jobs:
            if isinstance(job, Train) and (told := self._trained(job)):
                found.append((job, told))
        return found

    def training_like(self, job: Train) -> Trained | None:
        """The measurements of the job's own steps, else of another training."""
        of_step = {trained.step.key: told for trained, told in self.trained}
        return of_step.get(job.step.key) or next(iter(of_step.values()), None)

    def trained_share(self, job: Train) -> float:
        """Share of a training's optimizer steps that are done."""
        return next((t.share for j, t in self.trained if j.step.key == job.step.key), 0.0)

    def _trained(self, job: Train) -> Trained | None:
        folder = self.root / job.step.folder
        if not folder.exists(METRICS):
            return None
        told = [r for r in folder.read_records(METRICS) if r.get("tokens_per_s")]
        if not told:
            return None
        stepping = sum(r.get("tokens", 0) / r["tokens_per_s"] for r in told)
        start = None
        passes = job.config.reference_mode == "split"  # over all rows, before the steps
        if stepping and not passes and job.step.is_done(self.root):
            start = max(0.0, job.step.read_manifest(self.root)["seconds"] - stepping)
        rate = median(r["tokens_per_s"] for r in told) / job.config.workers
        share = min(1.0, (told[-1].get("step", 0) + 1) / (told[-1].get("steps") or math.inf))
        return Trained(rate, start, share)


def geometric_mean(numbers: list[float]) -> float:
    """Of positive numbers; 1 of none."""
    return math.exp(mean(map(math.log, numbers))) if numbers else 1.0


def answer_bytes(store: Folder) -> float | None:
    """Mean bytes of an answer's text in some of a store's shards; None without answers."""
    texts = sampled(store, TEXTS, SHARDS)["text"]
    return pc.mean(pc.binary_length(texts)).as_py() if len(texts) else None


def unequal_share(store: Folder) -> float | None:
    """Share of the prompts with unequal rewards, by some of a store's shards; None without any.

    The first bucket may have a few prompts only, so one more of each kind counts (Laplace's rule).
    """
    rewards = sampled(store, REWARDS, SHARDS).group_by("prompt_id")
    ends = rewards.aggregate([("reward", "min"), ("reward", "max"), ("reward", "count")])
    ends = ends.filter(pc.greater(ends["reward_count"], 1))
    unequal = pc.less(ends["reward_min"], ends["reward_max"])
    return float((pc.sum(unequal).as_py() + 1) / (len(ends) + 2)) if len(ends) else None
