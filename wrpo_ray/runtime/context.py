"""Run context: the output, limits and ledger that every stage of a run shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from wrpo_ray.config import PlanConfig
from wrpo_ray.data.buckets import Bucket
from wrpo_ray.data.shards import Layout, list_shards
from wrpo_ray.errors import FailureLimitError
from wrpo_ray.runtime import metrics
from wrpo_ray.runtime.awaited import Awaited
from wrpo_ray.runtime.connection import ClosedError
from wrpo_ray.runtime.ledger import AT_REST, Ledger, UnderWay, Usage
from wrpo_ray.runtime.placement import Pool
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step


@dataclass(frozen=True)
class Run:
    """Settings of one run, passed to every stage and worker."""

    root: Folder
    buckets: int
    commit_seconds: float = 300
    """Age at which answers and scores are committed."""
    failure_limit: float = 0.01
    session: str = ""
    """Id of this driver, in the environment of its processes."""
    max_attempts: int = 3
    """Attempts over all runs after which a failed row is not retried."""
    layouts: Mapping[Folder, Layout] = field(default_factory=dict, compare=False, repr=False)
    """What the driver saw in the folders that a pool reads, so that its workers need not look."""
    ledger: Ledger | None = None
    """None in workers: only the driver writes it."""
    beside: tuple[Pool, ...] = ()
    """Pools of another phase that runs at the same time."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """The user's rates and starts, by which pools have engines until there are measured ones."""
    awaited: Awaited | None = None
    """Steps for which another branch of the chain waits; None in workers."""

    def __getstate__(self) -> dict[str, Any]:
        own = ("ledger", "awaited")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def check_goes_on(self) -> None:
        """Raise ClosedError if another branch of the chain has failed."""
        if self.awaited and self.awaited.is_given_up:
            raise ClosedError("another branch of the chain has failed")

    def finished(self, step: Step) -> None:
        """Tell a branch that waits for the step."""
        if self.awaited:
            self.awaited.finished(step)

    def having_seen(self, stores: Iterable[Folder], finished: Iterable[Folder]) -> Run:
        """The run for a pool's workers, with the layouts of stores and of finished steps."""
        seen = {folder: Layout.of(folder) for folder in dict.fromkeys(stores)}
        seen |= {folder: Layout.whole(folder) for folder in dict.fromkeys(finished)}
        return replace(self, layouts=seen)

    def bucket(self, index: int, worker: str = "") -> Bucket:
        """A bucket of the run, for its workers, or for one of them that has an id of its own."""
        return Bucket(index, self.buckets, worker or self.session)

    def record_usage(
        self,
        step: Step,
        pool: str,
        seconds: float,
        *,
        idle: float = 0,
        start: float = 0,
        gpus: float = 0,
        rows: int = 0,
        failed: int = 0,
        prompt_tokens: int = 0,
        output_tokens: int = 0,
        under_way: UnderWay = AT_REST,
        may_stop: bool = True,
    ) -> None:
        """Add an actor's usage to the ledger and to the Prometheus metrics; for the driver.

        The actor has `gpus` GPUs, held them for `seconds`, was `idle` for some of these and
        loaded its model (`start`) for others. `under_way` is the change of what it is at.

        Raises:
            BudgetError: the budget is spent, and `may_stop`: what was made is committed.
        """
        metrics.add_counts(
            step, rows=rows, failures=failed, tokens=output_tokens, prompt_tokens=prompt_tokens,
            actor_seconds=seconds, idle_seconds=idle, gpu_seconds=seconds * gpus,
        )  # fmt: skip
        if self.ledger:
            usage = Usage(
                rows, prompt_tokens, output_tokens, seconds, seconds * gpus,
                idle, start, int(start > 0),
            )  # fmt: skip
            self.ledger.add(step, pool, usage, under_way)
            if may_stop:
                self.ledger.check()

    def check_failures(self, step: Step, failed: int, done: int, left: int = 0) -> None:
        """Raise FailureLimitError if more than `failure_limit` of the rows failed.

        Rows that are `left` count as if none of them would fail.
        """
        if failed and failed > self.failure_limit * (failed + done + left):
            so_far = " so far" if left else ""
            raise FailureLimitError(
                f"{step.name}: {failed} of {failed + done} rows failed{so_far}, above "
                f"failure_limit {self.failure_limit}{self._example(step)}; all are kept in "
                f"{step.failures(self.root)}; fix the cause and run the same command "
                f"again (`wrpo failures` shows more), or raise failure_limit"
            )

    def _example(self, step: Step) -> str:
        folder = step.failures(self.root)
        row = folder.read_table(list_shards(folder)[0].path).slice(0, 1).to_pylist()[0]
        where = row["where"] or f"prompt {row['prompt_id']}"
        return f" (such as {where}: {row['error']}: {row['message']})"
