"""Plans of a run whose engines are at answers, by what the ledger says of these."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.planning.test_plan import job_of, of, on_cpus, tree

from wrpo_ray.config import Config, SamplingConfig
from wrpo_ray.planning.estimate import plan as make_plan
from wrpo_ray.planning.lengths import Lengths
from wrpo_ray.planning.measured import unequal_share
from wrpo_ray.planning.work import Work
from wrpo_ray.runtime import lease
from wrpo_ray.runtime.ledger import FILE, UnderWay
from wrpo_ray.storage.folder import Folder

counts = st.integers(0, 3000)


def hold(config: Config) -> None:
    """A run on another machine holds the output; its heartbeat is recent."""
    record = {"session": "s", "host": "elsewhere", "machine": "m", "pid": 7, "started": 0}
    Folder(config.output).absolute().write_json(lease.file_name("s"), record | {"held": True})


def tell(config: Config, step: str, at: dict, **spent: float) -> None:
    """The ledger of a run whose engines are at answers of a step."""
    job = job_of(config, step)
    entry = {"pool": job.model.name} | spent | {"under_way": at}
    ledger = {"seconds": 9, "open": True, "steps": {job.step.folder: entry}}
    Folder(config.output).absolute().write_json(FILE, ledger)


AT = {"running": 100, "running_tokens": 15_000, "ended": 20, "ended_tokens": 4000}


def test_tokens_under_way_are_taken_off_the_work_that_is_left(tmp_path):
    """100 answers have 150 tokens of the 300 that are given, 20 have ended with 200 each.

    With 150 tokens an answer needs 150 * (1 + 1/2) = 225 more on average, so it will have 375. With
    three answers' weight for the given 300 the mean is (900 + 4,000 + 37,500) / 123.
    """
    config = tree(tmp_path)
    before = of(make_plan(config), "generate-a")
    hold(config)
    tell(config, "generate-a", AT | {"unstored": 30, "actors": 1})
    after = of(make_plan(config), "generate-a")
    assert before.output_tokens == 3000 * 300
    mean = (900 + 4000 + 37_500) / 123
    still = mean / 2 * (1 + 1 / (1 + 300 / mean))
    assert (after.rows, after.done) == (3000, 30)
    assert after.output_tokens == pytest.approx(2850 * mean + 100 * still, abs=1)
    assert after.prompt_tokens == 2850 / 5 * 100
    assert after.startup == before.startup / 2  # one of two engines is up


def test_nothing_is_under_way_in_a_run_that_was_killed(tmp_path):
    """Its engines are gone, and their answers will be made again."""
    config = tree(tmp_path)
    before = of(make_plan(config), "generate-a")
    tell(config, "generate-a", AT | {"unstored": 30, "actors": 2})
    assert of(make_plan(config), "generate-a") == before
    hold(config)
    assert of(make_plan(config), "generate-a").output_tokens != before.output_tokens


def test_a_speed_is_known_before_the_first_answer_ends(tmp_path, monkeypatch):
    """An engine is at 64 answers, and took twice as long as guessed for their tokens so far."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = on_cpus(tmp_path)
    guessed = of(make_plan(config), "generate-a")
    assert guessed.rate == "guess"
    share = 64 / guessed.rows
    tokens = round(guessed.output_tokens * share)
    at = {"running": 64, "running_tokens": tokens, "actors": 1}
    at["prompt_tokens"] = round(guessed.prompt_tokens * share)
    hold(config)
    told = {"actor_seconds": 50.0, "start_seconds": 50.0, "starts": 1}
    plans: list[Work] = []
    for seconds in (100.0, 200.0):
        tell(config, "generate-a", at | {"seconds": seconds}, **told)
        plans.append(of(make_plan(config), "generate-a"))
        assert plans[-1].rate == "measured"
        assert plans[-1].startup == 0
    one, two = (work.actor_seconds for work in plans)
    assert two == pytest.approx(2 * one)


def test_answers_under_way_tell_a_speed_where_few_have_ended(tmp_path, monkeypatch):
    """The 100 s were for 20 that have ended and for 64 longer ones; at first for prompts."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = on_cpus(tmp_path)
    hold(config)
    spent = {"rows": 20, "output_tokens": 200, "prompt_tokens": 2000, "actor_seconds": 100.0}
    tell(config, "generate-a", {}, **spent)
    assert of(make_plan(config), "generate-a").rate == "guess"
    rates = []
    for running in (2000, 3000, 30_000):
        at = {"running": 64, "running_tokens": running, "prompt_tokens": 6400, "actors": 1}
        tell(config, "generate-a", at, **spent)
        work = of(make_plan(config), "generate-a")
        assert work.rate == ("measured" if running > 2000 else "guess")  # 84 * 32 - 200 = 2,488
        rates.append(work.output_tokens / work.actor_seconds)
    assert rates[2] > 3 * rates[1]


@given(counts, counts, st.integers(0, 10**7), counts, st.floats(0.1, 300), st.integers(1, 300))
def test_what_is_left_is_never_negative_nor_longer_than_answers_may_be(
    rows, running, tokens, ended, length, most
):
    """Whatever engines tell: also of more answers than are left, and longer ones than may be."""
    at = UnderWay(running, tokens, ended, 10 * ended)
    left = Lengths(50, min(length, most), "given").left(
        rows, at, SamplingConfig(samples=5, max_tokens=most)
    )
    assert 0 <= left.rows <= rows
    assert 0 <= left.output_tokens <= left.rows * most + 1
    assert left.prompt_tokens >= 0
    nothing = Lengths(50, min(length, most), "given").left(
        rows, UnderWay(), SamplingConfig(samples=5, max_tokens=most)
    )
    assert left.output_tokens <= nothing.output_tokens


def test_answers_that_are_longer_than_predicted_lengthen_the_others(tmp_path):
    """Of a thousand that have the expected 300 tokens and more, each still needs some."""
    config = tree(tmp_path)
    hold(config)
    found = []
    for made in (0.001, 300, 600, 1000):
        tell(config, "generate-a", {"running": 1000, "running_tokens": round(1000 * made)})
        found.append(of(make_plan(config), "generate-a").output_tokens)
    most = config.sampling.max_tokens
    assert found[0] < found[1] < found[2]
    assert found[2] < found[3] <= 2000 * most + 1000 * (most - 1000)


def test_a_ledger_of_an_earlier_version_is_read(tmp_path):
    config = tree(tmp_path)
    hold(config)
    job = job_of(config, "generate-a")
    entry = {"pool": "a", "rows": 3, "output_tokens": 9, "prompt_tokens": 3, "actor_seconds": 1.0}
    ledger = {"seconds": 9, "open": False, "steps": {job.step.folder: entry}}
    (Folder(config.output).absolute() / "").write(FILE, json.dumps(ledger).encode())
    assert of(make_plan(config), "generate-a").output_tokens == 3000 * 3


@pytest.mark.parametrize(
    ("prompts", "unequal", "share"), [(4, 0, 1 / 6), (4, 4, 5 / 6), (98, 49, 0.5)]
)
def test_a_few_scored_prompts_do_not_tell_that_none_will_be_trained_on(
    prompts, unequal, share, tmp_path
):
    """Of answers that have just begun to be scored: five to each prompt."""
    ids = [str(n) for n in range(prompts) for _ in range(5)]
    rewards = [float(n < unequal and not s) for n in range(prompts) for s in range(5)]
    table = pa.table({"prompt_id": ids, "reward": rewards})
    pq.write_table(table, tmp_path / "00000-of-00001-x.parquet")
    assert unequal_share(Folder(str(tmp_path))) == pytest.approx(share)
