"""Counts of answers as engines make them: told by the actors, booked by the driver.

An engine that holds all its buckets finishes none for many minutes. So its actor also tells, every
few seconds, how many answers of unfinished buckets it has made, and what it is at: some numbers,
whatever their count. The first are added up; the latter replace those that the actor told before,
and are gone with it.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.ledger import AT_REST, UnderWay
from wrpo_ray.runtime.placement import Pool
from wrpo_ray.runtime.progress import Progress
from wrpo_ray.runtime.ready_queue import Row
from wrpo_ray.storage.steps import Step

Counts = Mapping[int, Mapping[str, int]]
"""{number of the job: counts}: `begun` buckets with `asked` answers, of which `new` and `failed`
ones, `prompt_tokens` and `output_tokens`; or the counts of `UnderWay`."""


class Untold:
    """The counts of an actor since its last report. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[int, Counter[str]] = defaultdict(Counter)
        self._unstored: Counter[int] = Counter()
        self._numbers = count()

    def add(self, job: int, **counts: int) -> None:
        """Add to the counts of a job."""
        with self._lock:
            self._counts[job].update(counts)
            self._unstored[job] += counts.get("new", 0)

    def stored(self, job: int, rows: int) -> None:
        """Note that so many new answers of a job were committed."""
        with self._lock:
            self._unstored[job] -= rows

    @property
    def has_answers(self) -> bool:
        """Whether there is an answer, or a failed one."""
        with self._lock:
            return any(counts["new"] or counts["failed"] for counts in self._counts.values())

    def take(self) -> Counts:
        """Return the counts, and begin anew."""
        with self._lock:
            taken, self._counts = dict(self._counts), defaultdict(Counter)
            return taken

    def tell(self, engine: Any) -> Row:
        """Return a report: the counts, and what the engine (None: it is not there) is at."""
        number = next(self._numbers)  # of two reports at once, the later one may arrive first
        made = self.take()  # first: an answer that ends just now is not counted twice
        now = {job: dict(counts) for job, counts in (engine.under_way() if engine else {}).items()}
        with self._lock:
            unstored = {job: rows for job, rows in self._unstored.items() if rows > 0}
        for job, rows in unstored.items():
            now.setdefault(job, {})["unstored"] = rows
        return {"made": made, "under_way": now, "number": number}


@dataclass
class _Times:
    """Seconds of an actor, as it tells them; some of them `idle`, others the `start`."""

    seconds: float = 0.0
    idle: float = 0.0
    start: float = 0.0

    def add(self, told: "_Times", share: float = 1.0) -> None:
        """Add a share of other times; their start is added once and by itself."""
        self.seconds += told.seconds * share
        self.idle += told.idle * share

    @property
    def busy(self) -> float:
        """Seconds with rows, without the start."""
        return max(0.0, self.seconds - self.idle - self.start)


@dataclass
class _Actor:
    """The state of an actor by its reports: answers under way, and times to be booked."""

    number: int = -1
    under_way: dict[int, UnderWay] = field(default_factory=dict)
    """{job: what the actor is at}, as in the ledger."""
    times: _Times = field(default_factory=_Times)
    """Its times that belong to no job yet."""
    pending: dict[int, _Times] = field(default_factory=lambda: defaultdict(_Times))
    """{job: its times since the last answer of the job}"""

    def tell(self, told: Row) -> tuple[dict[int, _Times], dict[int, UnderWay]]:
        """Take a report; return times by job to book, and the changes of what is under way.

        Times belong to the jobs by their tokens. They are booked with the job's next answers, as
        those of a lost actor are lost with it.
        """
        made, ended = told["made"], [told["job"]] if "job" in told else []
        now = {job: UnderWay(**counts) for job, counts in told["under_way"].items()}
        if told["number"] < self.number:
            now = self.under_way
        self.number = max(self.number, told["number"])
        self.times.add(_Times(told["seconds"], told["idle"]))
        self.times.start += told["start"]
        self._share(made, now, ended)
        ended += [job for job, counts in made.items() if counts.get("new") or counts.get("failed")]
        booked = {job: self.pending.pop(job) for job in dict.fromkeys(ended)}
        return booked, self._change(now)

    def _share(self, made: Counts, now: Mapping[int, UnderWay], ended: Iterable[int]) -> None:
        """Share the times among the jobs, by the tokens that were made since the last report."""
        tokens = dict.fromkeys((*made, *now, *ended), 0)
        for job in tokens:
            before = self.under_way.get(job, AT_REST).tokens
            moved = now.get(job, AT_REST).tokens - before
            tokens[job] = max(0, made.get(job, {}).get("output_tokens", 0) + moved)
        if not tokens:
            return
        self.pending[next(iter(tokens))].start += self.times.start  # one engine started
        total = sum(tokens.values())
        for job, n in tokens.items():
            self.pending[job].add(self.times, n / total if total else 1 / len(tokens))
        self.times = _Times()

    def _change(self, now: Mapping[int, UnderWay]) -> dict[int, UnderWay]:
        """Note what the actor is at, with its seconds; return the changes by job."""
        before, self.under_way = self.under_way, {}
        for job, counts in now.items():
            busy = self.pending[job].busy if job in self.pending else 0.0
            self.under_way[job] = replace(counts, seconds=busy, actors=int(bool(counts)))
        return {
            job: self.under_way.get(job, AT_REST) - before.get(job, AT_REST)
            for job in before | self.under_way
        }


class Account:
    """Books the reports of a pool's actors, for the driver: each number once."""

    def __init__(
        self, run: Run, pool: Pool, jobs: Sequence[tuple[Step, str]], progress: Progress
    ) -> None:
        """`jobs` are the steps, and the names of the models whose prices apply."""
        self.run, self.pool, self.jobs, self.progress = run, pool, jobs, progress
        self._actors: dict[int, _Actor] = defaultdict(_Actor)

    def add(self, told: Row) -> None:
        """Book what an actor made of buckets that are not finished, or that it was lost.

        The budget is not checked: a run that stopped here would lose answers that are not
        committed.
        """
        if "lost" in told:
            self._forget(told["lost"])
            return
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

    def close(self) -> None:
        """Note that the pool has ended: nothing is under way."""
        for actor in list(self._actors):
            self._forget(actor)
        if self.run.ledger:
            self.run.ledger.flush()

    def _forget(self, actor: int) -> None:
        """Take what an actor was at off the ledger; its time since then is lost, too."""
        for job, held in self._actors.pop(actor, _Actor()).under_way.items():
            self._record(job, {}, _Times(), AT_REST - held)

    def _book(self, told: Row, *, may_stop: bool) -> None:
        """Usage and progress; the actor's seconds belong to the jobs by their tokens."""
        made: Counts = told["made"]
        begun, asked = (sum(c.get(name, 0) for c in made.values()) for name in ("begun", "asked"))
        self.progress.begin(begun, asked, told["start"])
        times, changes = self._actors[told["actor"]].tell(told)
        for job in sorted({*made, *changes, *times}):
            self._record(
                job, made.get(job, {}), times.get(job, _Times()), changes.get(job, AT_REST)
            )
        if may_stop and self.run.ledger:
            self.run.ledger.check()

    def _record(self, job: int, counts: Mapping[str, int], times: _Times, change: UnderWay) -> None:
        self.progress.under_way += change
        step, name = self.jobs[job]
        self.run.record_usage(
            step, name, times.seconds, idle=times.idle, start=times.start,
            gpus=self.pool.needs["GPU"], rows=counts.get("new", 0), failed=counts.get("failed", 0),
            prompt_tokens=counts.get("prompt_tokens", 0),
            output_tokens=counts.get("output_tokens", 0), under_way=change, may_stop=False,
        )  # fmt: skip


def _totals(made: Counts) -> tuple[int, int, int]:
    """Answers, failed ones and their tokens over all jobs."""
    new, failed, tokens = (
        sum(counts.get(name, 0) for counts in made.values())
        for name in ("new", "failed", "output_tokens")
    )
    return new, failed, tokens
