"""Counts of answers as engines make them: told by the actors, booked by the driver.

An engine that holds all its buckets finishes none for many minutes. So its actor also tells, every
few seconds, how many answers of unfinished buckets it has made: some numbers, whatever their count.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.placement import Pool
from wrpo_ray.runtime.progress import Progress
from wrpo_ray.runtime.ready_queue import Row
from wrpo_ray.storage.steps import Step

Counts = Mapping[int, Mapping[str, int]]
"""{number of the job: counts}: `begun` buckets with `asked` answers, of which `new` and `failed`
ones, `prompt_tokens` and `output_tokens`."""


class Untold:
    """The counts of an actor since its last report. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[int, Counter[str]] = defaultdict(Counter)

    def add(self, job: int, **counts: int) -> None:
        """Add to the counts of a job."""
        with self._lock:
            self._counts[job].update(counts)

    def take(self) -> Counts:
        """Return the counts, and begin anew."""
        with self._lock:
            return self._take()

    def take_answers(self) -> Counts:
        """The same if there is an answer, or a failed one; else nothing is taken."""
        with self._lock:
            has_some = any(counts["new"] or counts["failed"] for counts in self._counts.values())
            return self._take() if has_some else {}

    def _take(self) -> Counts:
        taken, self._counts = dict(self._counts), defaultdict(Counter)
        return taken


class Account:
    """Books the reports of a pool's actors, for the driver: each number once."""

    def __init__(
        self, run: Run, pool: Pool, jobs: Sequence[tuple[Step, str]], progress: Progress
    ) -> None:
        """`jobs` are the steps, and the names of the models whose prices apply."""
        self.run, self.pool, self.jobs, self.progress = run, pool, jobs, progress

    def add(self, told: Row) -> None:
        """Book what an actor made of buckets that are not finished; the budget is not checked.

        A run that stopped here would lose answers that are not committed.
        """
        self._book(told, may_stop=False)
        self.progress.count(*_totals(told["made"]))

    def finish(self, result: Row) -> None:
        """Book the end of a bucket, with what its actor had not told yet.

        Raises:
            BudgetError: the budget is spent.
        """
        try:
            self._book(result, may_stop=True)
        finally:
            self.progress.add(*_totals(result["made"]))

    def _book(self, told: Row, *, may_stop: bool) -> None:
        """Usage and progress; the actor's seconds belong to the jobs by their tokens."""
        made: Counts = told["made"] or {told["job"]: {}}
        start = told["start"]
        begun, asked = (sum(c.get(name, 0) for c in made.values()) for name in ("begun", "asked"))
        self.progress.begin(begun, asked, start)
        for job, share in _shares(made).items():
            counts, (step, name) = made[job], self.jobs[job]
            self.run.record_usage(
                step, name, told["seconds"] * share, idle=told["idle"] * share, start=start,
                gpus=self.pool.needs["GPU"], rows=counts.get("new", 0),
                failed=counts.get("failed", 0), prompt_tokens=counts.get("prompt_tokens", 0),
                output_tokens=counts.get("output_tokens", 0), may_stop=may_stop,
            )  # fmt: skip
            start = 0.0  # one engine started


def _shares(made: Counts) -> dict[int, float]:
    """{job: its share of an actor's time}: by its tokens, or equal ones without any."""
    tokens = {job: counts.get("output_tokens", 0) for job, counts in made.items()}
    total = sum(tokens.values())
    return {job: n / total if total else 1 / len(made) for job, n in tokens.items()}


def _totals(made: Counts) -> tuple[int, int, int]:
    """Answers, failed ones and their tokens over all jobs."""
    new, failed, tokens = (
        sum(counts.get(name, 0) for counts in made.values())
        for name in ("new", "failed", "output_tokens")
    )
    return new, failed, tokens
