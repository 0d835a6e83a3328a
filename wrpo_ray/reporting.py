"""What a run leaves for those who look at it: its outline, its plan, and `report.html`.

All of it is best effort: a report that fails is told in one line and never stops or slows a run.
It is made in a thread of the driver, at most a twentieth of the time; nothing waits for it but
the end of a run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from wrpo_ray.addresses import public
from wrpo_ray.config import Config
from wrpo_ray.core.progress import log
from wrpo_ray.core.shards import Samples
from wrpo_ray.core.storage import Folder
from wrpo_ray.generate.stage import Generate
from wrpo_ray.ingest.stage import SOURCES, TARGET, IngestResponses
from wrpo_ray.pair.stage import Pair, Select
from wrpo_ray.report.outline import PLAN, Outline, StepOutline
from wrpo_ray.score.stage import Score

EVERY = 20.0
"""Seconds between two reports at the least."""
SHARE = 20
"""The time between two reports is at least so many times what one took."""
PATIENCE = 60.0
"""Seconds that the end of a run waits for a report that is being made."""
Row = dict[str, Any]
Job = tuple[str, Any]
"""The stage's name, and the job."""


def outline(config: Config, until: str, jobs: list[Job], models: dict[str, str]) -> Outline:
    """The chain as those see it who have only the output."""
    tree = public(config.model_dump(mode="json", by_alias=True))
    steps = tuple(_step(stage, job) for stage, job in jobs)
    return Outline(until, config.storage.buckets, tree, models, steps)


def _step(stage: str, job: Any) -> StepOutline:
    step = job.step
    asked: Row = {}
    if isinstance(job, Generate):
        asked = {"samples": job.sampling.samples} | _prompts(job)
    elif isinstance(job, Score):
        asked = {"samples": job.answers.count} | _prompts(job.answers)
    return StepOutline(
        stage=stage,
        name=step.name,
        key=step.key,
        folder=step.folder,
        manifest=step.manifest,
        kind=job.kind,
        source=step.source,
        stores=tuple(dict.fromkeys(_stores(job))),
        **asked,
    )


def _prompts(asked: Any) -> Row:
    return {"prompts": asked.prompts.step.key, "splits": asked.prompts.splits}


def _stores(job: Any) -> list[str]:
    """Folders of scored answers: those that it makes, or chooses from."""
    if isinstance(job, Score):
        return [job.step.folder]
    if isinstance(job, IngestResponses):
        return [f"{job.step.folder}/{part}" for part in (SOURCES, TARGET)]
    if isinstance(job, Select):
        return [_store(samples) for samples in job.sources.samples]
    if isinstance(job, Pair):
        return [*_stores(job.select), *(_store(samples) for samples in job.answers.samples)]
    return []


def _store(samples: Samples) -> str:
    folder = samples.step.folder
    return f"{folder}/{samples.part}" if samples.part else folder


class Reporter:
    """Makes the report of a run when it is told that something has changed.

    `make(is_running)` writes it; within the `with` block it is called in a thread.
    """

    def __init__(self, make: Callable[[bool], Any], every: float = EVERY):
        self._make, self._every = make, every
        self._changed, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)

    def __enter__(self) -> Reporter:
        self._thread.start()
        return self

    def tell(self) -> None:
        """A step is finished."""
        self._changed.set()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._changed.set()

    @property
    def has_begun(self) -> bool:
        """Whether the run has got as far as its first step."""
        return self._thread.ident is not None

    def finish(self) -> None:
        """The last report, which the caller waits for, though not for ever."""
        last = threading.Thread(target=self._last, name="report", daemon=True)
        last.start()
        last.join(PATIENCE)

    def _last(self) -> None:
        if self.has_begun:
            self._thread.join()
        self._write(False)

    def _work(self) -> None:
        pause = self._every
        while not self._ended.wait(pause):
            self._changed.wait()
            if self._ended.is_set():
                return
            self._changed.clear()
            started = time.monotonic()
            self._write(True)
            pause = max(self._every, SHARE * (time.monotonic() - started))

    def _write(self, is_running: bool) -> None:
        with best_effort("report"):
            self._make(is_running)


@contextmanager
def best_effort(what: str) -> Any:
    """Whatever goes wrong in the block is told in a line."""
    try:
        yield
    except Exception as error:  # nobody shall lose a run for its report
        log(f"{what}: not written: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def keep_plan(root: Folder, planned: dict[str, Row]) -> None:
    """Keep what steps were expected to take ({key of a step: its work}): the first word stays."""
    known = root.read_record(PLAN) if root.exists(PLAN) else {}
    new = {key: work for key, work in planned.items() if key not in known}
    if new:
        root.write_json(PLAN, known | new)
