"""The sleeping engine of the benchmark on Ray takes the time that the simulator foretells."""

import threading
import time
from dataclasses import replace

import pytest

from benchmarks import sleeping
from benchmarks.simulation import Cluster, Policy, Source, simulate
from benchmarks.sleeping import FOLDER, Lengths, Pace, SleepingEngine, Table
from wrpo_ray.config import SamplingConfig
from wrpo_ray.stages.generate.vllm_engine import Request, SamplingIdentity

LENGTHS = Lengths(40.0, 0.8, 160)
STEPS = (0.002, 0.002, 0.0024, 0.0028, 0.0032)
"""Four slots: four answers at once make 2.5 times the tokens of one."""
WHO = SamplingIdentity("source", 0)


@pytest.fixture(autouse=True)
def _table(tmp_path, monkeypatch):
    sleeping.table.cache_clear()
    monkeypatch.setenv(FOLDER, str(tmp_path))
    Table({"source": Pace(0.0, STEPS)}, Pace(0.0, (0.001,)), 20.0, LENGTHS).write(tmp_path)
    yield
    sleeping.table.cache_clear()


def requests(bucket: int) -> list[Request]:
    return [Request(f"prompt-{bucket}-{n}", [], 0, 3) for n in range(8)]


def tokens(bucket: int) -> list[float]:
    return [
        float(LENGTHS.of("source", request.prompt_id, sample))
        for request in requests(bucket)
        for sample in request.samples
    ]


def test_a_batch_takes_the_time_of_the_simulator():
    """72 answers in four slots, by the engine's own clock; by that of the wall, no less."""
    asked = [request for bucket in range(3) for request in requests(bucket)]
    engine, began = SleepingEngine(Pace(0.0, STEPS)), time.monotonic()
    rows = [r for rows, _ in engine.answers(asked, SamplingConfig(), WHO) for r in rows]
    took, own = time.monotonic() - began, engine._now - began
    lengths = [n for bucket in range(3) for n in tokens(bucket)]
    assert sorted(r["output_tokens"] for r in rows) == sorted(lengths)
    assert all(r["output_tokens"] == int(r["text"]) for r in rows)
    source = Source("s", 1, 1, 4 / STEPS[-1], 0.0, [[lengths]], slots=4, steps=STEPS)
    foretold = simulate([source], Cluster(1, 1), Policy()).wall
    assert own == pytest.approx(foretold, rel=0.05)
    assert took >= own


def test_an_answer_that_comes_later_slows_the_others_from_then_on():
    """One answer alone, and from its middle on a second one: steps of 10 ms, then of 20 ms."""
    first, second = requests(0)[0], requests(1)[0]
    engine, ended = SleepingEngine(Pace(0.0, (0.01, 0.01, 0.02))), dict[str, float]()

    def answer(request: Request) -> None:
        list(engine.answers([replace(request, count=1)], SamplingConfig(), WHO))
        ended[request.prompt_id] = time.monotonic()

    lengths = [LENGTHS.of("source", request.prompt_id, 0) for request in (first, second)]
    began = time.monotonic()
    threads = [threading.Thread(target=answer, args=(r,)) for r in (first, second)]
    threads[0].start()
    time.sleep(0.01 * lengths[0] / 2)
    came = time.monotonic()
    threads[1].start()
    for thread in threads:
        thread.join()
    alone = (came - began) / 0.01
    both = min(lengths[0] - alone, lengths[1])
    least = came - began + 0.02 * both
    assert min(ended.values()) - began >= 0.99 * least


def test_the_table_is_what_was_written():
    table = sleeping.table()
    assert (table.engines, table.lengths) == ({"source": Pace(0.0, STEPS)}, LENGTHS)


def test_lengths_are_those_of_a_log_normal_that_is_cut():
    drawn = [LENGTHS.of("source", f"p{n}", 0) for n in range(4000)]
    assert sum(drawn) / len(drawn) == pytest.approx(38.4, abs=1.5)  # 40 before the cut
    assert max(drawn) == 160
    assert LENGTHS.of("source", "p1", 0) == drawn[1] != LENGTHS.of("source", "p1", 1)
