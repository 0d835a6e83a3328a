"""Run a chain: connect to Ray, run the missing jobs, and write the summary and the report."""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from wrpo_ray.config import Config
from wrpo_ray.data.buckets import buckets
from wrpo_ray.data.outline import FILE as OUTLINE
from wrpo_ray.data.outline import Outline
from wrpo_ray.data.shards import Layout
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.model_sections import keep_pins
from wrpo_ray.pipeline.preflight import preflight
from wrpo_ray.pipeline.stage_table import STAGES, Stage
from wrpo_ray.pipeline.summary import (
    keep_plan,
    model_addresses,
    outline,
    summarise,
    write_comparison,
)
from wrpo_ray.report.live import Reporter, best_effort
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.job import Job
from wrpo_ray.runtime.ledger import Ledger
from wrpo_ray.runtime.placement import fit_together
from wrpo_ray.runtime.progress import log
from wrpo_ray.runtime.ready_queue import ReadyQueue
from wrpo_ray.runtime.tasks import run_in_threads
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.hub import Pins
from wrpo_ray.storage.steps import Step

Planner = Callable[[Config, Folder, list["Stage"]], dict[str, dict[str, Any]]]
"""Return the expected work of each step, by its key."""
SUMMARY = "summary.json"


def fuse(config: Config, until: str = STAGES[-1], planner: Planner | None = None) -> dict[str, Any]:
    """Run the chain up to and with the stage `until`, and return the summary.

    Finished steps are skipped; if all are finished, Ray is not started. The work that `planner`
    expects of each step is kept for the report.

    Raises:
        WrpoError: see `errors`.

    Example:
        >>> summary = fuse(load("fusion.yaml"), until="pair")  # doctest: +SKIP
        >>> [step["step"] for step in summary["steps"]]  # doctest: +SKIP
        ['prompts', 'generate-qwen', 'score-reward-qwen', 'select', ...]
    """
    pins: Pins = {}
    chain = Chain(preflight(config, pins), until)
    stages, root = chain.build(), chain.root
    described = outline_of(chain)
    reporter = Reporter(partial(_report, root, described) if config.report else lambda _: None)
    if all(step.is_done(root) for stage in stages for step in stage.steps):
        log(f"all steps are done in {root}")
    else:
        with _reporting(reporter), session(config, root, pins) as run, reporter:
            _begin(chain, described, planner)
            run_stages(run, stages, reporter.tell)
    summary = summarise(chain, stages)
    write_comparison(root, summary)
    if not root.holds_json(SUMMARY, summary):
        root.write_json(SUMMARY, summary)
    if not root.exists(OUTLINE):
        _begin(chain, described, None)
    reporter.finish()
    return summary


@contextmanager
def session(config: Config, root: Folder, pins: Pins) -> Iterator[Run]:
    """Hold the lease of the output and a connection to Ray; state and log go to the output.

    The output keeps the pins, so that a run that resumes has the same models and files.

    Raises:
        WrpoError: another run holds the output, its budget is spent, or Ray cannot be reached.
    """
    from wrpo_ray.runtime import cluster
    from wrpo_ray.runtime.lease import Lease
    from wrpo_ray.runtime.tries import Try

    run = Run(
        root,
        config.storage.buckets,
        config.storage.commit_seconds,
        config.failure_limit,
        uuid.uuid4().hex,
        config.max_attempts,
    )
    with (
        Lease(root, run.session) as lease,
        Try(root, lease),
        Ledger(root, config.prices, config.budget) as ledger,
    ):
        ledger.check()
        keep_pins(root, pins)
        cluster.connect(config.cluster, root, run.session)
        try:
            cluster.check_reachable(Folder(config.output))
            cluster.kill_orphans(root, run.session)
            yield replace(run, ledger=ledger)
        finally:
            cluster.disconnect()


def outline_of(chain: Chain) -> Outline:
    """The outline of a built chain, for `chain.json`."""
    jobs = [(stage.name, job) for stage in chain.stages for job in stage.jobs]
    return outline(chain.config, chain.until, jobs, model_addresses(chain.config))


def _begin(chain: Chain, described: Outline, planner: Planner | None) -> None:
    """Write the outline and the plan to the output."""
    with best_effort("outline"):
        described.write(chain.root)
    if planner:
        with best_effort("plan"):
            keep_plan(chain.root, planner(chain.config, chain.root, chain.stages))


@contextmanager
def _reporting(reporter: Reporter) -> Iterator[None]:
    """Write the report once more if the block fails, as it lists failures."""
    try:
        yield
    except Exception:
        if reporter.has_begun:
            reporter.finish()
        raise


def _report(root: Folder, described: Outline, is_running: bool) -> None:
    from wrpo_ray.report.page import write  # it imports a library of plots

    write(root, described, is_running=is_running)


def run_stages(run: Run, stages: list[Stage], tell: Callable[[], None]) -> None:
    """Run the jobs that are not done, phase by phase; `tell` is called after each phase.

    A phase that can take the buckets of the one before it runs side by side with that.

    Raises:
        WrpoError: a job failed; what is finished is kept.
    """
    phases = [(number, phase) for number, s in enumerate(stages) for phase in s.phases]
    while phases:
        number, phase = phases.pop(0)
        jobs = missing(run, phase)
        following = missing(run, phases[0][1]) if jobs and phases else []
        if following and _can_stream(jobs, following):
            number, _ = phases.pop(0)
        else:
            following = []
        label = f"[{number + 1}/{len(stages)}] {stages[number].name}"
        if not jobs:
            log(f"{label}: done before")
            continue
        _run_phase(run, label, jobs, following)
        tell()


def _run_phase(run: Run, label: str, jobs: list[Job], following: list[Job]) -> None:
    """Run a phase, and the one that takes its buckets, if there is one."""
    started, names = time.time(), dict.fromkeys(job.step.name for job in jobs + following)
    log(f"{label}: {', '.join(names)}")
    log_resumed(run, jobs + following)
    if following:
        _stream(run, jobs, following)
    else:
        jobs[0].run(run, jobs)
    log(f"{label}: finished in {time.time() - started:.0f} s")


def missing(run: Run, jobs: Sequence[Job]) -> list[Job]:
    """The jobs whose steps are not done."""
    return [job for job in jobs if not job.step.is_done(run.root)]


def log_resumed(run: Run, jobs: list[Job]) -> None:
    """Log in how many buckets the stores that the jobs fill have rows already."""
    for step in {job.step.folder: job.step for job in jobs if job.is_retryable}.values():
        if found := len(Layout.of(run.root / step.folder).filled):
            log(f"{step.name}: {found:,} buckets have rows, which are skipped")


def _can_stream(jobs: list[Job], following: list[Job]) -> bool:
    """Whether `following` can take the buckets of `jobs` while these run, with room for both.

    All jobs of `following` share the pool of the first one.
    """
    producers = [job.stream for job in jobs if job.stream and not job.stream.source]
    consumers = [job.stream for job in following if job.stream and job.stream.source]
    if len(producers) < len(jobs) or len(consumers) < len(following):
        return False
    return all(fit_together([stream.pool, consumers[0].pool]) for stream in producers)


def _stream(run: Run, jobs: list[Job], following: list[Job]) -> None:
    """Run two phases side by side: `following` takes each bucket as soon as it is filled."""
    sources = [job.stream.source for job in following if job.stream and job.stream.source]
    queue, made = ReadyQueue(sources), {job.step.key for job in jobs}
    for step in sources:
        if step.key not in made:  # by an earlier run
            for bucket in buckets(run.buckets):
                queue.add(step, bucket.index)
    run_in_threads([partial(_with_queue, run, phase, queue) for phase in (jobs, following)])


def _with_queue(run: Run, jobs: list[Job], queue: ReadyQueue) -> None:
    assert jobs[0].stream is not None
    jobs[0].stream.run(run, jobs, queue)


def plan(config: Config, until: str = STAGES[-1]) -> list[tuple[str, Step, bool]]:
    """(stage, step, whether it is done) for each step, without running anything."""
    chain = Chain(preflight(config), until)
    return [(s.name, step, step.is_done(chain.root)) for s in chain.build() for step in s.steps]
