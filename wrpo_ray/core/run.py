"""What a stage is given beside its jobs: the output, limits, and how its counts are summed."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from wrpo_ray.core import metrics
from wrpo_ray.core.progress import log
from wrpo_ray.core.spending import Ledger, Spent
from wrpo_ray.core.steps import Step
from wrpo_ray.core.storage import Folder
from wrpo_ray.errors import FailureLimitError


@dataclass(frozen=True)
class Run:
    """One call of the pipeline."""

    root: Folder
    buckets: int
    chunk: int = 64
    failure_limit: float = 0.01
    session: str = ""
    """Marks the processes of this driver, so that a later one can tell them from its own."""
    max_attempts: int = 3
    """How often a row is tried in all runs together before it stays failed."""
    ledger: Ledger | None = None
    """The driver's; workers have none."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "ledger"}

    def spend(
        self,
        step: Step,
        pool: str,
        seconds: float,
        *,
        idle: float = 0,
        gpus: float = 0,
        rows: int = 0,
        failed: int = 0,
        prompt_tokens: int = 0,
        output_tokens: int = 0,
    ) -> None:
        """Count what an actor of `gpus` GPUs took and made; the driver calls it.

        Of the seconds it was `idle` for some. Goes to the ledger and to Prometheus.

        Raises:
            BudgetError: the budget is spent.
        """
        metrics.count(
            step, rows=rows, failures=failed, tokens=output_tokens, prompt_tokens=prompt_tokens,
            actor_seconds=seconds, idle_seconds=idle, gpu_seconds=seconds * gpus,
        )  # fmt: skip
        if self.ledger:
            spent = Spent(rows, prompt_tokens, output_tokens, seconds, seconds * gpus)
            self.ledger.add(step, pool, spent)
            self.ledger.check()

    def check_failures(self, step: Step, failed: int, done: int) -> None:
        """Raise FailureLimitError when more than `failure_limit` of the rows failed."""
        if failed and failed > self.failure_limit * (failed + done):
            raise FailureLimitError(
                f"{step.name}: {failed} of {failed + done} rows failed, above failure_limit "
                f"{self.failure_limit}{self._example(step)}; all are kept in "
                f"{step.failures(self.root)}; put the cause right and run the same command "
                f"again (`wrpo failures` tells more), or raise failure_limit"
            )

    def _example(self, step: Step) -> str:
        folder = step.failures(self.root)
        row = folder.read_table(folder.files(suffix=".parquet")[0]).slice(0, 1).to_pylist()[0]
        where = row["where"] or f"prompt {row['prompt_id']}"
        return f" (such as {where}: {row['error']}: {row['message']})"


class Tally:
    """Sums a job's counts over its buckets; with the last bucket the job's step is finished.

    A result has `rows` (wanted ones that are there now), `new` (of them, those made by this
    call), `failed` and what else there is to sum.
    """

    def __init__(self, run: Run, step: Step):
        self.run, self.step = run, step
        self.counts: Counter[str] = Counter(rows=0, new=0, failed=0)
        self._buckets, self._started = 0, time.time()

    def add(self, result: dict[str, Any]) -> None:
        """Add a bucket's counts.

        Raises:
            FailureLimitError: more rows failed than may in the whole job.
        """
        self.counts.update(
            {k: v for k, v in result.items() if k not in ("job", "bucket", "seconds", "idle")}
        )
        self._buckets += 1
        failed, rows = self.counts["failed"], self.counts["rows"]
        expected = (failed + rows) * self.run.buckets // self._buckets
        self.run.check_failures(self.step, failed, expected - failed)
        if self._buckets == self.run.buckets:
            skipped = rows - self.counts.pop("new")
            self.step.finish(self.run.root, {**self.counts, "skipped": skipped}, self._started)
            if skipped:
                log(f"{self.step.name}: {skipped:,} of {rows:,} rows were there")
