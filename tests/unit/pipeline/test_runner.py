"""The runner on toy jobs: it knows no stage, only what every job says of itself."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest

from wrpo_ray.config import Actors
from wrpo_ray.errors import WrpoError
from wrpo_ray.pipeline import runner
from wrpo_ray.pipeline.runner import run_stages
from wrpo_ray.pipeline.stage_table import Stage
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.job import BaseJob, JobKind, Stream
from wrpo_ray.runtime.placement import Pool
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step


class Log:
    """The calls of toy jobs, by name."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.fails: set[str] = set()


@dataclass(frozen=True)
class Toy(BaseJob):
    """Finishes its step; those that the log says fail do not."""

    kind: ClassVar[JobKind] = JobKind.SELECT
    name: str
    log: Log = field(compare=False)
    inputs: tuple[Step, ...] = ()

    @property
    def step(self) -> Step:
        return Step(self.name, {}, self.inputs)

    @classmethod
    def run(cls, context: Run, jobs: list["Toy"]) -> None:
        log = jobs[0].log
        log.calls.append([job.name for job in jobs])
        for job in jobs:
            if job.name in log.fails:
                raise WrpoError(f"{job.name} failed")
            job.step.finish(context.root, {"rows": 1}, 0)


@dataclass(frozen=True)
class Streaming(Toy):
    """Passes on its buckets, or takes those of `source`."""

    source: Step | None = None

    @property
    def stream(self) -> Stream:
        return Stream(_run_streaming, Pool(self.name, Actors()), self.source)


def _run_streaming(context, jobs, queue):
    """Producers add their buckets to the queue; consumers take rows until all have come."""
    rows = []
    if jobs[0].source:
        while len(rows) < context.buckets * len(jobs):
            rows += queue.take()
    else:
        for job in jobs:
            for bucket in range(context.buckets):
                queue.add(job.step, bucket)
    taken = sorted(f"{jobs[row['job']].name} {row['bucket']}" for row in rows)
    jobs[0].log.calls.append(taken or [job.name for job in jobs])
    for job in jobs:
        job.step.finish(context.root, {"rows": 1}, 0)


@pytest.fixture
def context(tmp_path) -> Run:
    return Run(Folder(str(tmp_path)), 2)


@pytest.fixture
def log() -> Log:
    return Log()


def chain(log: Log) -> list[Stage]:
    """Two stages; the second has two phases, of which the last depends on all before."""
    first = Toy("a", log), Toy("b", log)
    second = Toy("c", log, tuple(job.step for job in first))
    last = Toy("d", log, (second.step,)), Toy("e", log)
    return [Stage("one", (first,)), Stage("two", ((second,), last))]


def test_phases_run_in_order_and_the_reporter_is_told_after_each(context, log):
    told = []
    run_stages(context, chain(log), lambda: told.append(len(log.calls)))
    assert log.calls == [["a", "b"], ["c"], ["d", "e"]]
    assert told == [1, 2, 3]
    assert all(step.is_done(context.root) for stage in chain(log) for step in stage.steps)


def test_jobs_that_are_done_are_skipped(context, log, capsys):
    stages = chain(log)
    for step in (stages[0].jobs[1].step, stages[1].jobs[0].step):
        step.finish(context.root, {"rows": 1}, 0)
    told = []
    run_stages(context, stages, lambda: told.append(True))
    assert log.calls == [["a"], ["d", "e"]]
    assert len(told) == 2
    assert "[2/2] two: done before" in capsys.readouterr().err


def test_a_job_that_fails_keeps_what_is_done_and_the_next_run_resumes(context, log):
    log.fails = {"e"}
    with pytest.raises(WrpoError, match="e failed"):
        run_stages(context, chain(log), lambda: None)
    assert log.calls == [["a", "b"], ["c"], ["d", "e"]]
    log.calls, log.fails = [], set()
    run_stages(context, chain(log), lambda: None)
    assert log.calls == [["e"]]


@pytest.mark.parametrize("has_room", [True, False])
def test_buckets_stream_into_the_next_phase_where_there_is_room(
    context, log, monkeypatch, has_room
):
    """Without room the phases follow each other, in calls that know of no queue."""
    monkeypatch.setattr(runner, "fit_together", lambda pools: has_room)
    before, now = Streaming("before", log), Streaming("now", log)
    before.step.finish(context.root, {"rows": 1}, 0)
    scores = tuple(Streaming(f"score {j.name}", log, source=j.step) for j in (before, now))
    stages, told = [Stage("g", ((before, now),)), Stage("s", (scores,))], []
    run_stages(context, stages, lambda: told.append(True))
    if has_room:  # buckets of an earlier run are in the queue from the beginning
        scored = ["score before 0", "score before 1", "score now 0", "score now 1"]
        assert sorted(log.calls) == [["now"], scored]
        assert len(told) == 1
    else:
        assert log.calls == [["now"], ["score before", "score now"]]
        assert len(told) == 2


def test_all_rewards_that_fit_score_beside_generation_and_the_others_after_it(
    context, log, monkeypatch
):
    """Of four rewards one is done, and one has no room beside the two others."""
    asked: list[list[str]] = []

    def fits(pools: list[Pool]) -> bool:
        asked.append([pool.what for pool in pools])
        return "large a" not in asked[-1]

    monkeypatch.setattr(runner, "fit_together", fits)
    made = Streaming("a", log), Streaming("b", log)
    rewards = ("chat", "done", "large", "maths")
    phases = [
        tuple(Streaming(f"{name} {job.name}", log, source=job.step) for job in made)
        for name in rewards
    ]
    for job in phases[1]:
        job.step.finish(context.root, {"rows": 1}, 0)
    stages = [Stage("g", (made,)), Stage("s", tuple(phases)), Stage("x", ((Toy("x", log),),))]
    told: list[bool] = []
    run_stages(context, stages, lambda: told.append(True))
    first, last = log.calls[:3], log.calls[3:]
    scored = [[f"{name} {of} {i}" for of in "ab" for i in range(2)] for name in ("chat", "maths")]
    assert sorted(first) == sorted([["a", "b"], *scored])
    assert last == [["large a", "large b"], ["x"]]
    assert len(told) == 3
    assert asked[0] == ["a", "chat a"]
    assert asked[-1] == ["b", "chat a", "maths a"]
    assert all(step.is_done(context.root) for stage in stages for step in stage.steps)


def test_what_takes_buckets_behind_another_stage_waits_for_it(context, log, monkeypatch):
    monkeypatch.setattr(runner, "fit_together", lambda pools: True)
    made = Streaming("a", log)
    near, far = (Streaming(name, log, source=made.step) for name in ("near", "far"))
    stages = [Stage("g", ((made,), (near,), (Toy("x", log),), (far,)))]
    run_stages(context, stages, lambda: None)
    assert sorted(log.calls[:2]) == [["a"], ["near 0", "near 1"]]
    assert log.calls[2:] == [["x"], ["far"]]


def test_phases_side_by_side_know_of_each_others_pools(context, log, monkeypatch):
    """So that they share the cores: all pools before, and the one that all jobs after share."""
    monkeypatch.setattr(runner, "fit_together", lambda pools: True)
    seen = {}

    def streaming(context, jobs, queue):
        seen[jobs[0].name] = [pool.what for pool in context.beside]
        _run_streaming(context, jobs, queue)

    stream = Streaming.stream.fget
    told = property(lambda self: replace(stream(self), run=streaming))
    monkeypatch.setattr(Streaming, "stream", told)
    before = Streaming("a", log), Streaming("b", log), Streaming("alone", log)
    scores = tuple(Streaming(f"score {j.name}", log, source=j.step) for j in before[:2])
    stages = [Stage("g", (before[:2],)), Stage("s", (scores,)), Stage("x", (before[2:],))]
    run_stages(context, stages, lambda: None)
    assert seen == {"a": ["score a"], "score a": ["a", "b"]}
    assert context.beside == ()


def test_a_phase_without_a_stream_never_runs_beside_another(context, log, monkeypatch):
    monkeypatch.setattr(runner, "fit_together", lambda pools: pytest.fail("not asked"))
    producer, plain = Streaming("g", log), Toy("x", log)
    run_stages(context, [Stage("g", ((producer,),)), Stage("x", ((plain,),))], lambda: None)
    assert log.calls == [["g"], ["x"]]
