"""Run a chain: connect to Ray, run the missing jobs, and write the summary and the report."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from wrpo_ray.config import Config
from wrpo_ray.data.buckets import buckets
from wrpo_ray.data.outline import FILE as OUTLINE
from wrpo_ray.data.outline import Outline
from wrpo_ray.data.shards import Layout
from wrpo_ray.pipeline.branches import Branches, Early, Phase, room_now, split
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
from wrpo_ray.runtime.job import Job, JobKind
from wrpo_ray.runtime.ledger import Ledger
from wrpo_ray.runtime.placement import Pool, fit_together, is_own_ray
from wrpo_ray.runtime.prefetch import PREFETCH
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
        config.storage.commit_age(is_remote=root.is_remote),
        config.failure_limit,
        uuid.uuid4().hex,
        config.max_attempts,
        plan=config.plan,
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
            PREFETCH.open(run.session)
            yield replace(run, ledger=ledger)
        finally:
            PREFETCH.close()
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

    The phases that can take the buckets of the one before them run side by side with that. Where
    there is room, SFT and the target's answers run beside those of the sources (`branches`).

    Raises:
        WrpoError: a job failed; what is finished is kept.
    """
    phases = [Phase(stage.name, phase) for stage in stages for phase in stage.phases]
    order = list(dict.fromkeys(phase.stage for phase in phases))
    if early := Early.of(stages):
        phases = [early.reading(phase) for phase in phases]
    before, sources, target, after = split(phases)
    ahead = _models_ahead(run, phases)
    run_all = partial(_run_phases, order=order, ahead=ahead, tell=tell)
    run_all(run, before)
    branches = Branches.of(run, early, sources, target) if early else None
    if branches and branches.are_worth_it(run, room_now):
        _run_branches(run, branches, partial(run_all, fits=lambda _: True))
        sources = target = []
    run_all(run, [*sources, *target, *after])


def _run_branches(
    run: Run, branches: Branches, run_all: Callable[[Run, Sequence[Phase]], None]
) -> None:
    """Run both branches; an error in one ends the other, whose finished buckets are kept."""
    awaited = branches.wait()
    run = replace(run, awaited=awaited)

    def follow() -> None:
        if awaited.wait():
            run_all(run, branches.target)

    log("SFT and the target's answers run beside the sources, which answer SFT's prompts first")
    try:
        run_in_threads([partial(run_all, run, branches.sources), follow])
    finally:
        awaited.give_up()


def _run_phases(
    run: Run,
    phases: Sequence[Phase],
    order: list[str],
    ahead: dict[str, list[Pool]],
    tell: Callable[[], None],
    fits: Callable[[list[Pool]], bool] | None = None,
) -> None:
    """Run phases one after another; `fits` tells whether pools have room side by side.

    `ahead` has the models of steps that no phase has begun yet (`_models_ahead`).
    """
    phases = list(phases)
    while phases:
        name, phase = phases.pop(0)
        run.check_goes_on()
        jobs = missing(run, phase)
        later = [other.jobs for other in phases]
        beside = _streaming(run, jobs, later, fits or fit_together)
        following = list(beside.values())
        together = dict.fromkeys([name, *(phases[place].stage for place in beside)])
        label = f"[{order.index(name) + 1}/{len(order)}] {' and '.join(together)}"
        phases = [other for place, other in enumerate(phases) if place not in beside]
        if not jobs:
            log(f"{label}: done before")
            continue
        for job in [*jobs, *(job for others in following for job in others)]:
            ahead.pop(job.step.key, None)
        bring_ahead(jobs, [pool for pools in tuple(ahead.values()) for pool in pools])
        _run_phase(run, label, jobs, following)
        tell()


def bring_ahead(jobs: Iterable[Job], later: Iterable[Pool]) -> None:
    """Bring models of trainings, and then of later pools, to nodes; pools that run bring theirs.

    On one node, a training's own workers fetch it as soon.
    """
    trained = [] if is_own_ray() else loading([job for job in jobs if job.kind == JobKind.TRAIN])
    PREFETCH.want([*trained, *later])


def loading(jobs: Iterable[Job]) -> list[Pool]:
    """The pools that load models from a store or the hub."""
    pools = [job.loads for job in jobs]
    return [p for p in pools if p and any(folder.is_remote for folder, _ in p.models)]


def _models_ahead(run: Run, phases: Sequence[Phase]) -> dict[str, list[Pool]]:
    """{key of a step that is not done: pools that load models which are there before the run}."""
    found = {}
    for job in (job for phase in phases for job in phase.jobs):
        pools = loading([job])
        is_made_here = any(f.is_within(run.root) for p in pools for f, _ in p.models)
        if pools and not is_made_here and not job.step.is_done(run.root):
            found[job.step.key] = pools
    return found


def _run_phase(run: Run, label: str, jobs: list[Job], following: list[list[Job]]) -> None:
    """Run a phase, and those that take its buckets."""
    started, all_jobs = time.time(), [*jobs, *(job for others in following for job in others)]
    log(f"{label}: {', '.join(dict.fromkeys(job.step.name for job in all_jobs))}")
    log_resumed(run, all_jobs)
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


def _streaming(
    run: Run, jobs: list[Job], later: list[tuple[Job, ...]], fits: Callable[[list[Pool]], bool]
) -> dict[int, list[Job]]:
    """{place: jobs to run} of the later phases that can take the buckets of `jobs` meanwhile.

    They are among the phases behind it that take buckets, up to one that does not: those of the
    rewards of several groups, say. There must be room for an actor of each beside one of every pool
    that fills buckets. All jobs of such a phase share the pool of the first one.
    """
    producers = [job.stream.pool for job in jobs if job.stream and not job.stream.source]
    if not jobs or len(producers) < len(jobs):
        return {}
    found: dict[int, list[Job]] = {}
    pools: list[Pool] = []
    for place, phase in enumerate(later):
        waiting = missing(run, phase)
        takers = [job.stream.pool for job in waiting if job.stream and job.stream.source]
        if len(takers) < len(waiting):
            break
        more = [*pools, *takers[:1]]
        if takers and all(fits([pool, *more]) for pool in producers):
            found[place] = waiting
            pools = more
    return found


class _EachQueue(ReadyQueue):
    """Adds each bucket to the queues of all phases that take it."""

    def __init__(self, queues: list[ReadyQueue]):
        super().__init__([])
        self.queues = queues

    def add(self, step: Step, bucket: int, **more: bool) -> None:
        for queue in self.queues:
            queue.add(step, bucket, **more)


def _stream(run: Run, jobs: list[Job], following: list[list[Job]]) -> None:
    """Run phases side by side: those that follow take each bucket as soon as it is filled."""
    made = {job.step.key for job in jobs}
    queues = [_queue(run, others, made) for others in following]
    phases = [jobs, *following]
    work: list[Callable[[], None]] = []
    for phase, queue in zip(phases, [_EachQueue(queues), *queues], strict=True):
        beside = [pool for other in phases if other is not phase for pool in _pools(other)]
        work.append(partial(_with_queue, replace(run, beside=tuple(beside)), phase, queue))
    run_in_threads(work)


def _queue(run: Run, jobs: list[Job], made: set[str]) -> ReadyQueue:
    """The queue of a phase, with the buckets of all sources but those that are being made."""
    sources = [job.stream.source for job in jobs if job.stream and job.stream.source]
    queue = ReadyQueue(sources)
    for step in {step.key: step for step in sources}.values():
        if step.key not in made:  # by an earlier run
            for bucket in buckets(run.buckets):
                queue.add(step, bucket.index)
    return queue


def _pools(jobs: list[Job]) -> list[Pool]:
    """The pools of a phase that streams, each once; jobs that take buckets share the first one."""
    found = [job.stream for job in jobs if job.stream]
    pools = [stream.pool for stream in found if not stream.source]
    return list({pool.what: pool for pool in pools or [found[0].pool]}.values())


def _with_queue(run: Run, jobs: list[Job], queue: ReadyQueue) -> None:
    assert jobs[0].stream is not None
    jobs[0].stream.run(run, jobs, queue)


def plan(config: Config, until: str = STAGES[-1]) -> list[tuple[str, Step, bool]]:
    """(stage, step, whether it is done) for each step, without running anything."""
    chain = Chain(preflight(config), until)
    return [(s.name, step, step.is_done(chain.root)) for s in chain.build() for step in s.steps]
