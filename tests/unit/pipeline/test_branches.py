"""The branches of a chain: which jobs come first, what waits for what, and where there is room."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from wrpo_ray.config import Actors, Config
from wrpo_ray.data.buckets import buckets
from wrpo_ray.errors import WrpoError
from wrpo_ray.pipeline import branches
from wrpo_ray.pipeline.branches import Branches, Early, Phase, split
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.runner import run_stages
from wrpo_ray.pipeline.stage_table import Stage
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.cores import Machine
from wrpo_ray.runtime.job import BaseJob, JobKind, Stream
from wrpo_ray.runtime.placement import Pool
from wrpo_ray.runtime.ready_queue import ReadyQueue
from wrpo_ray.stages.generate.stage import Generate, _rows
from wrpo_ray.stages.score.stage import Score
from wrpo_ray.stages.train.prepare import Prepare
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

ROOT = Path(__file__).parents[3]


def chain(**changes: Any) -> list[Stage]:
    """The stages of the demo, whose models need not be there."""
    tree = yaml.safe_load((ROOT / "jobs" / "demo.yaml").read_text())
    given = tree | {"evaluate": None} | changes
    return Chain(Config.model_validate(given), for_plan=True).build()


def jobs(stages: list[Stage], kind: type) -> dict[str, Any]:
    return {job.step.name: job for s in stages for job in s.jobs if isinstance(job, kind)}


def early(stages: list[Stage]) -> Early:
    found = Early.of(stages)
    assert found
    return found


def test_parts_of_sources_are_requests_to_the_same_stores_for_the_prompts_of_sft() -> None:
    stages = chain()
    found, whole = early(stages), jobs(stages, Generate) | jobs(stages, Score)
    names = ("llama-bytes", "qwen3-bpe", "gemma2-chars")
    expected = [f"{kind}-{name}" for name in names for kind in ("generate", "score-reward")]
    assert sorted(part.step.name for part in found.parts.values()) == sorted(expected)
    for key, part in found.parts.items():
        of = next(job for s in stages for job in s.jobs if job.step.key == key)
        assert part.step.folder == of.step.folder
        assert part.step.key != of.step.key
        assert part.samples.prompts.splits == ("sft",)
        assert replace(part.samples.prompts, splits=of.samples.prompts.splits) == of.samples.prompts
    scores = {key: p for key, p in found.parts.items() if isinstance(p, Score)}
    answers = {p.step.key for p in found.parts.values() if isinstance(p, Generate)}
    assert {p.answers.step.key for p in scores.values()} == answers
    assert whole["score-reward-llama-bytes"].step.key in scores


def test_the_early_selection_depends_on_the_parts_and_the_key_of_the_rows_does_not() -> None:
    stages = chain()
    found = early(stages)
    rows = jobs(stages, Prepare)["rows-sft"]
    made = {p.step.key for p in found.parts.values() if isinstance(p, Score)}
    inputs = {step.key for step in found.select.step.inputs}
    assert made < inputs
    assert found.select.prompts.splits == ("sft",)
    assert found.select.contamination is None
    (read,) = found.reading(Phase("sft", (rows,))).jobs
    assert isinstance(read, Prepare)
    assert read.source == found.select.step
    assert read.step == rows.step


def test_recorded_answers_are_scored_in_parts_and_all_prompts_are_never_split(tmp_path) -> None:
    """A recorded source is read before; SFT on all prompts, or none, has nothing to come first."""
    recorded = {"name": "old", "answers": {"path": str(tmp_path / "none.jsonl")}}
    tree = yaml.safe_load((ROOT / "jobs" / "demo.yaml").read_text())
    stages = chain(sources=[tree["sources"][0], recorded])
    parts = {part.step.name: part for part in early(stages).parts.values()}
    whole = jobs(stages, Score)["score-reward-old"]
    assert set(parts) == {"generate-llama-bytes", "score-reward-llama-bytes", "score-reward-old"}
    assert parts["score-reward-old"].answers.step == whole.answers.step
    assert parts["score-reward-old"].step.key != whole.step.key
    assert parts["score-reward-old"].step.folder == whole.step.folder
    assert Early.of(chain(sft=None)) is None


def test_the_part_of_a_bucket_comes_before_the_bucket_and_all_parts_before_all_others() -> None:
    stages = chain()
    whole = jobs(stages, Generate)["generate-llama-bytes"]
    part = early(stages).parts[whole.step.key]
    assert isinstance(part, Generate)
    rows = _rows([whole, part], buckets(2))
    assert [(r["job"], r["bucket"]) for r in rows] == [(1, 0), (1, 1), (0, 0), (0, 1)]


def test_a_queue_holds_back_a_bucket_until_its_part_is_finished() -> None:
    """Bucket 1 has no part left to do, as an earlier run did it."""
    step = Step("a")
    queue = ReadyQueue([step, step])
    first, second = ({"job": 1, "bucket": 0}, {"job": 0, "bucket": 0})
    queue.hold_back({0: 1}, [first, second, {"job": 0, "bucket": 1}])
    for bucket in range(2):
        queue.add(step, bucket)
    taken = [(row["job"], row["bucket"]) for row in queue.take()]
    assert taken == [(1, 0), (0, 1), (1, 1)]
    assert list(queue.take()) == []
    queue.finished({"job": 0, "bucket": 1})
    assert list(queue.take()) == []
    queue.finished(first)
    assert [(row["job"], row["bucket"]) for row in queue.take()] == [(0, 0)]


def test_phases_are_split_where_the_sources_begin_and_the_target_ends() -> None:
    stages = chain(evaluate={"prompts": {"path": "eval.jsonl"}})
    phases = [Phase(stage.name, phase) for stage in stages for phase in stage.phases]
    parts = [list(dict.fromkeys(p.stage for p in part)) for part in split(phases)]
    assert parts == [
        ["prompts"], ["generate", "score", "select"], ["sft", "sample"],
        ["pair", "train", "evaluate"],
    ]  # fmt: skip
    assert [p for part in split(phases) for p in part] == phases
    assert split(phases[-1:]) == (phases[-1:], [], [], [])


# --- running them ----------------------------------------------------------------------------


class Log:
    """What toy jobs did, in order, and what the test makes them wait for."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.gates: dict[str, threading.Event] = {}
        self.fails: set[str] = set()


@dataclass(frozen=True)
class Toy(BaseJob):
    """Finishes its step, after its gate, and tells a branch that waits for it."""

    name: str
    log: Log = field(compare=False)
    kind = JobKind.SELECT
    streams: bool = False

    @property
    def step(self) -> Step:
        return Step(self.name)

    @property
    def stream(self) -> Stream | None:
        return (
            Stream(lambda run, own, _: self.run(run, own), Pool(self.name, Actors()))
            if (self.streams)
            else None
        )

    @classmethod
    def run(cls, run: Run, own: list[Toy]) -> None:
        for job in own:
            job.log.events.append(f"{job.name} begins")
            if gate := job.log.gates.get(job.name):
                assert gate.wait(60)
            if job.name in job.log.fails:
                raise WrpoError(f"{job.name} failed")
            job.step.finish(run.root, {"rows": 1}, 0)
            job.log.events.append(f"{job.name} ends")
            run.finished(job.step)
            for waiting in [n for n in job.log.gates if n == f"after {job.name}"]:
                job.log.gates[waiting].set()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Folder(str(tmp_path)), 2)


@pytest.fixture
def log() -> Log:
    return Log()


def toys(
    log: Log, monkeypatch: pytest.MonkeyPatch, *, has_room: bool = True
) -> tuple[list[Stage], list[dict[str, float]]]:
    """A chain of toys whose part of the source is `part`, and the room that was asked for."""
    source, rows = Toy("source", log, streams=True), Toy("rows", log)
    part = Toy("part", log, streams=True)
    stages = [
        Stage("prompts", ((Toy("prompts", log),),)),
        Stage("generate", ((source,),)),
        Stage("select", ((Toy("select", log),),)),
        Stage("sft", ((rows,), (Toy("sft", log),))),
        Stage("sample", ((Toy("sample", log),),)),
        Stage("pair", ((Toy("pair", log),),)),
    ]
    made = Early({source.step.key: part}, Toy("early", log))  # type: ignore[dict-item,arg-type]
    asked: list[dict[str, float]] = []

    def room(need: dict[str, float]) -> bool:
        asked.append(dict(need))
        return has_room

    monkeypatch.setattr(Early, "of", staticmethod(lambda stages: made))
    monkeypatch.setattr(Early, "reading", lambda self, phase: phase)
    monkeypatch.setattr(branches, "_is_sft", lambda job: job.step.name == "rows")
    monkeypatch.setattr(branches, "has_room", room)
    monkeypatch.setattr(branches, "this_machine", lambda: Machine(0, 1))
    return stages, asked


def gated(log: Log, job: str, until: str) -> None:
    """The job goes on when the other one has ended."""
    log.gates[job] = log.gates[f"after {until}"] = threading.Event()


def order(log: Log, *events: str) -> None:
    """These happened, in this order."""
    places = [log.events.index(event) for event in events]
    assert places == sorted(places), log.events


def test_sft_and_samples_end_before_a_source_that_waits_for_them(log, run, monkeypatch) -> None:
    """The source's own part is done by then; what needs both branches comes after both."""
    stages, asked = toys(log, monkeypatch)
    gated(log, "source", until="sample")
    told: list[bool] = []
    run_stages(run, stages, lambda: told.append(True))
    order(
        log, "prompts ends", "part ends", "early begins", "rows begins", "sft begins",
        "sample ends", "source ends", "select begins", "pair begins",
    )  # fmt: skip
    assert asked == [{"CPU": 2.0}]
    assert len(told) == 8
    assert all(step.is_done(run.root) for stage in stages for step in stage.steps)


def test_the_target_waits_for_the_part(log, run, monkeypatch) -> None:
    stages, _ = toys(log, monkeypatch)
    log.gates["part"] = threading.Event()
    timer = threading.Timer(0.3, log.gates["part"].set)
    timer.start()
    run_stages(run, stages, lambda: None)
    order(log, "part ends", "early begins")


SERIAL = ["prompts", "source", "select", "rows", "sft", "sample", "pair"]


@pytest.mark.parametrize("why", ["no room", "own machine"])
def test_without_room_the_chain_is_serial_and_no_part_is_made(log, run, monkeypatch, why) -> None:
    stages, asked = toys(log, monkeypatch, has_room=why != "no room")
    if why == "own machine":
        monkeypatch.setattr(branches, "this_machine", lambda: Machine(2, 2))
    run_stages(run, stages, lambda: None)
    assert [e.split()[0] for e in log.events[::2]] == SERIAL
    assert bool(asked) == (why == "no room")


def again(log: Log, run: Run, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run once more; the jobs that ran."""
    log.events, log.gates, log.fails = [], {}, set()
    run_stages(run, toys(log, monkeypatch)[0], lambda: None)
    return sorted(event.split()[0] for event in log.events if event.endswith("ends"))


def end_threads() -> None:
    """Threads of a run that failed end by themselves."""
    found = [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]
    for thread in found:
        thread.join(60)
    assert not any(thread.is_alive() for thread in found)


def fail_after_sft(log: Log, run: Run, stages: list[Stage]) -> None:
    """The source fails when SFT has ended, before or beside the sample, which then goes on."""
    log.fails = {"source"}
    gated(log, "source", until="sft")
    log.gates["sample"] = threading.Event()
    with pytest.raises(WrpoError, match="^source failed$"):
        run_stages(run, stages, lambda: None)
    log.gates["sample"].set()
    end_threads()


def test_an_error_in_one_branch_ends_the_run_and_what_is_done_is_kept(
    log, run, monkeypatch
) -> None:
    """The source fails after SFT, before or beside the target's samples; then comes the rest."""
    stages, _ = toys(log, monkeypatch)
    fail_after_sft(log, run, stages)
    done = again(log, run, monkeypatch)
    assert set(done) - {"sample"} == {"pair", "select", "source"}
    assert again(log, run, monkeypatch) == []


def test_a_branch_begins_nothing_after_an_error_in_the_other(log, run, monkeypatch) -> None:
    """The sample that is made when the source fails is finished; with the pairs nothing begins."""
    stages, _ = toys(log, monkeypatch)
    stages[4] = Stage("sample", (*stages[4].phases, (Toy("scores", log),)))
    fail_after_sft(log, run, stages)
    assert not {"scores begins", "pair begins"} & set(log.events)


def test_a_source_that_fails_in_its_part_lets_the_target_go(log, run, monkeypatch) -> None:
    """Its thread ends, or the process would never."""
    stages, _ = toys(log, monkeypatch)
    log.fails = {"part"}
    with pytest.raises(WrpoError, match="^part failed$"):
        run_stages(run, stages, lambda: None)
    end_threads()
    assert "early begins" not in log.events


def test_a_run_with_rows_of_sft_waits_for_no_part(log, run, monkeypatch) -> None:
    stages, _ = toys(log, monkeypatch)
    for name in ("prompts", "rows"):
        Toy(name, log).step.finish(run.root, {"rows": 1}, 0)
    gated(log, "source", until="sample")
    run_stages(run, stages, lambda: None)
    assert not {"part begins", "early begins"} & set(log.events)
    order(log, "sft begins", "sample ends", "source ends", "pair begins")


def test_a_source_that_has_answered_all_prompts_has_no_part(log, run, monkeypatch) -> None:
    """Such as in an output from before there were parts, or of a cluster without room."""
    stages, _ = toys(log, monkeypatch)
    for name in ("prompts", "source"):
        Toy(name, log).step.finish(run.root, {"rows": 1}, 0)
    run_stages(run, stages, lambda: None)
    assert [e.split()[0] for e in log.events[::2]] == SERIAL[2:]


def test_the_target_waits_for_the_parts_of_sources_that_are_left(log, run, monkeypatch) -> None:
    monkeypatch.setattr(branches, "_is_sft", lambda job: job.step.name == "rows")
    sources = [Toy(name, log, streams=True) for name in ("a", "b")]
    parts = {job.step.key: Toy(f"part-{job.name}", log) for job in sources}
    sources[0].step.finish(run.root, {"rows": 1}, 0)
    made = Early(parts, Toy("early", log))  # type: ignore[arg-type]
    phases = [Phase("generate", tuple(sources))], [Phase("sft", (Toy("rows", log),))]
    found = Branches.of(run, made, *phases)
    assert found.awaited == (parts[sources[1].step.key],)
    assert [job.name for job in found.sources[0].jobs] == ["part-b", "a", "b"]


def test_pools_that_pass_on_buckets_need_room_at_once_and_others_one_after_another(run) -> None:
    """Two engines of a phase take turns at the least; a reward runs beside them."""
    made = [Needing(2.0, True), Needing(3.0, True)], [Needing(1.0, True)], [Needing(8.0, False)]
    phases = [Phase("a", tuple(own)) for own in made]
    assert branches._peak(run, phases) == {"CPU": 8.0}
    assert branches._peak(run, phases[:2]) == {"CPU": 4.0}
    assert branches._peak(run, []) == {}


@dataclass(frozen=True)
class Needing(BaseJob):
    """A job that needs so many CPUs."""

    cpus: float
    streams: bool

    @property
    def step(self) -> Step:
        return Step(f"{self.cpus}")

    @property
    def stream(self) -> Stream | None:
        return Stream(lambda *_: None, Pool("", Actors())) if self.streams else None

    @property
    def needs(self) -> dict[str, float]:
        return {"CPU": self.cpus}
