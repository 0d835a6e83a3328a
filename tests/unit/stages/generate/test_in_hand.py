"""How many answers engines have at once: the pool's own assignment, and engines that count steps.

A fake engine has as many slots as its config says; in a step each running answer makes a token.
"""

import math
import random
from collections import Counter, deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from wrpo_ray.config import Actors, ModelConfig, PlanConfig, SamplingConfig
from wrpo_ray.data.samples import Prompts
from wrpo_ray.llm.vllm_settings import GPU_SLOTS
from wrpo_ray.runtime import pool as pools
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.pool_members import Pace
from wrpo_ray.stages.generate import stage
from wrpo_ray.stages.generate.stage import Generate, buckets_in_hand, pool_of
from wrpo_ray.stages.generate.vllm_engine import engine_arguments
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

SLOTS, ANSWERS = 256, 8


@dataclass(eq=False)
class CountingEngine:
    """An actor with an engine: rows are buckets, a list of the lengths of their answers each."""

    slots: int
    waiting: deque[tuple[object, int]] = field(default_factory=deque)
    running: list[list[Any]] = field(default_factory=list)
    left: Counter[object] = field(default_factory=Counter)
    """{result of a bucket: answers that are not finished}"""
    taken: int = 0
    """Buckets that it was given."""

    @property
    def work(self) -> SimpleNamespace:
        """As the handle of an actor has it."""
        return SimpleNamespace(remote=self._take)

    def _take(self, row: dict[str, Any]) -> object:
        result, self.taken = object(), self.taken + 1
        self.waiting += [(result, length) for length in row["lengths"]]
        self.left[result] = len(row["lengths"])
        return result

    def step(self) -> None:
        """Fill the slots, and make a token of each answer in them."""
        while self.waiting and len(self.running) < self.slots:
            self.running.append(list(self.waiting.popleft()))
        for answer in self.running:
            answer[1] -= 1
        self.left.subtract(answer[0] for answer in self.running if not answer[1])
        self.running = [answer for answer in self.running if answer[1]]


class Counted(pools.RunningPool):
    """A pool without a cluster: its engines are given, and take a step where it would wait."""

    def __init__(self, pool: pools.Pool, rows: list[dict], ready: int, coming: int = 0):
        self.pool, self.queue, self.left, self.to_come = pool, deque(rows), len(rows), 0
        self.losses, self.lost_starts, self.rows_are_short = Counter(), 0, False
        self.pace, self.watch = Pace(), None
        self.most, self.starts_until = pool.actors.max, 0.0  # the first one answered long ago
        slots = stage.engine_slots(MODEL)
        self.engines = [CountingEngine(slots) for _ in range(ready + coming)]
        self.members = [
            pools.Member(engine, object() if number >= ready else None, place="a")
            for number, engine in enumerate(self.engines)
        ]

    def wait(self, found: list[object], timeout: float) -> tuple[list[object], list[object]]:
        """As `ray.wait`."""
        for engine in self.engines:
            engine.step()
        done = {r for engine in self.engines for r, left in engine.left.items() if not left}
        return [r for r in found if r in done], [r for r in found if r not in done]

    def run(self) -> list[list[int]]:
        """Running answers of each engine, at each step while buckets wait to be taken."""
        seen = []
        while self.left:
            self._assign_rows()
            self._results()
            if self.queue:
                seen.append([len(engine.running) for engine in self.engines])
        return seen


MODEL = ModelConfig(
    name="m", model="m", engine={"max_num_seqs": SLOTS}, actors=Actors(max=4, num_cpus=1)
)


@pytest.fixture
def counted(monkeypatch):
    """Start a pool with engines that count."""

    def start(rows: list[dict], ready: int, coming: int = 0) -> Counted:
        pool = Counted(pool_of(MODEL, ANSWERS), rows, ready, coming)
        monkeypatch.setattr(ray, "wait", pool.wait)
        monkeypatch.setattr(ray, "get", lambda found: {"seconds": 1.0, "idle": 0.0})
        return pool

    return start


def buckets_of_answers(count: int) -> list[dict]:
    """Buckets whose answers have 20 to 400 tokens."""
    draw = random.Random(count)
    return [{"lengths": [draw.randint(20, 400) for _ in range(ANSWERS)]} for _ in range(count)]


def test_small_buckets_keep_an_engine_full_while_there_is_work(counted):
    pool = counted(buckets_of_answers(400), ready=1)
    running = [engines[0] for engines in pool.run()]
    assert len(running) > 1000
    assert min(running) >= 200


def test_four_engines_are_full_while_there_is_work(counted):
    pool = counted(buckets_of_answers(1200), ready=4)
    assert min(map(min, pool.run())) >= 200


def test_little_work_is_for_all_engines(counted):
    """As much as one engine could take at once: a quarter each."""
    pool = counted(buckets_of_answers(16), ready=4)
    pool._assign_rows()
    assert [engine.taken for engine in pool.engines] == [4, 4, 4, 4]
    pool.run()
    assert pool.left == 0


@pytest.mark.parametrize("buckets", [4, 16, 64])
def test_an_engine_that_comes_first_leaves_work_to_those_that_start(counted, buckets):
    pool = counted(buckets_of_answers(buckets), ready=1, coming=3)
    pool._assign_rows()
    assert [engine.taken for engine in pool.engines] == [buckets // 4, 0, 0, 0]


@pytest.mark.parametrize(
    ("bucket", "slots", "in_hand"),
    [
        (16, 256, 96),  # six fills
        (80, 256, 20),
        (512, 256, 3),
        (100_000, 256, 2),  # no more than two are in memory
        (1, 1024, 128),  # at most so many calls at once
        (0, 256, 128),
    ],
)
def test_buckets_in_hand_fill_an_engine_six_times(bucket, slots, in_hand):
    model = MODEL.model_copy(update={"engine": {"max_num_seqs": slots}})
    assert buckets_in_hand(model, bucket) == in_hand
    assert pool_of(model, bucket).threads == in_hand


@pytest.mark.parametrize(("weights", "threads"), [(10**6, 24), (200_000_000, 6)])
def test_a_run_asks_for_as_many_buckets_as_fill_the_engine_of_its_weights(
    weights, threads, tmp_path, monkeypatch
):
    """By the bytes of the model's folder, as its engine counts them: 64 answers a bucket."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(weights)
    started: list[pools.Pool] = []
    monkeypatch.setattr(stage, "_run_pool", lambda run, pool, *_: started.append(pool))
    monkeypatch.setattr(stage, "with_shares", lambda given, beside: list(given))
    run, step = Run(Folder(str(tmp_path / "out")), buckets=4), Step("prompts")
    step.finish(run.root, {"rows": 256}, 0.0)
    model = ModelConfig(name="m", model=str(tmp_path), actors=Actors(max=1))
    asked = Prompts(step, ("eval",)), SamplingConfig(samples=1)
    Generate.run(run, [Generate(model, Folder(str(tmp_path)), "weights", *asked, 0)])
    (pool,) = started
    assert pool.threads == threads


def test_the_answers_of_a_bucket_are_those_of_its_prompts(tmp_path):
    run, step = Run(Folder(str(tmp_path)), buckets=4), Step("prompts")
    folder = Folder("m").absolute()
    asked = Prompts(step, ("sft",))
    one = Generate(MODEL, folder, "weights", asked, SamplingConfig(samples=5), 0)
    other = Generate(MODEL, folder, "others", asked, SamplingConfig(samples=5), 0)
    assert stage._bucket(run, [one]) == float("inf")  # prompts are not there yet
    step.finish(run.root, {"rows": 64}, 0.0)
    assert stage._bucket(run, [one]) == 64 * 5 / 4
    assert stage._bucket(run, [one, other]) == float("inf")  # they take turns


def test_a_pool_expects_what_the_user_tells_plans(tmp_path, monkeypatch):
    """64 prompts in 4 buckets, 5 answers of 300 tokens each at 1,200 a second: 20 s a bucket."""
    started: list[pools.Pool] = []
    monkeypatch.setattr(stage, "_run_pool", lambda run, pool, *_: started.append(pool))
    monkeypatch.setattr(stage, "with_shares", lambda given, beside: list(given))
    told = PlanConfig(output_tokens=300, rates={"m": 1200.0}, startup={"m": 90.0})
    step = Step("prompts")
    for plan in (told, PlanConfig()):
        run = Run(Folder(str(tmp_path)), buckets=4, plan=plan)
        step.finish(run.root, {"rows": 64}, 0.0)
        asked = Prompts(step, ("sft",)), SamplingConfig(samples=5)
        model = ModelConfig(name="m", model="m", actors=Actors(num_gpus=1))
        Generate.run(run, [Generate(model, Folder("m").absolute(), "weights", *asked, 0)])
    assert [(pool.row, pool.startup) for pool in started] == [(20.0, 90.0), (None, 0.0)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tensor_parallel": 2, "actors": {"num_gpus": 1}}, (GPU_SLOTS, 16384)),
        ({"pipeline_parallel": 2, "actors": {"num_gpus": 1}}, (GPU_SLOTS, 16384)),
        ({"actors": {"num_gpus": 1}}, (None, None)),  # vLLM sees the GPU
        (
            {"tensor_parallel": 2, "actors": {"num_gpus": 1}, "engine": {"max_num_seqs": 32}},
            (32, 16384),
        ),
        ({"actors": {"num_gpus": 1}, "performance": {"max_num_seqs": 48}}, (48, None)),
    ],
)
def test_an_engine_of_several_gpus_has_the_values_of_a_gpu(changes, expected):
    """Its actor has no GPU by which vLLM could choose them."""
    model = ModelConfig.model_validate({"name": "m", "model": "m"} | changes)
    arguments = engine_arguments(model, weights=10**10)
    found = arguments.get("max_num_seqs"), arguments.get("max_num_batched_tokens")
    assert found == expected
    assert "enforce_eager" not in arguments
    if expected[0]:
        assert stage.engine_slots(model) == expected[0]


@pytest.mark.parametrize(
    ("changes", "weights", "slots"),
    [
        ({}, 10**6, 256),
        ({"tensor_parallel": 2}, 10**6, 256),
        ({}, 540_000_000, 64),  # keys and values of more do not fit, and they are no faster
        ({"performance": {"max_num_seqs": 200}}, 540_000_000, 200),
    ],
)
def test_an_engine_on_a_cpu_answers_as_many_at_once_as_pays(changes, weights, slots):
    model = ModelConfig.model_validate({"name": "m", "model": "m"} | changes)
    arguments = engine_arguments(model, weights)
    assert arguments["max_num_seqs"] == stage.engine_slots(model, weights) == slots
    filling = math.ceil(6 * slots / 64)
    assert buckets_in_hand(model, 64, weights) == pool_of(model, 64, weights).threads == filling
    assert stage.at_once(model, 64, weights=weights) == slots
    assert arguments["enforce_eager"]
    assert "max_num_batched_tokens" not in arguments
